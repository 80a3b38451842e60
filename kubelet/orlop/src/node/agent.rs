//! The kubelet of this process: identity, pods, node object, HTTP server.

use crate::config::{MissingControllers, NodeConfig};
use anyhow::{Context, Result};
use orlop_api::Client;
use orlop_api::certificates::{Bootstrap, CertificateStore, Purpose, Rotation, Sink};
use orlop_kubelet::Kubelet;
use orlop_kubelet::config::{self, Config, KubeletConfiguration, KubeletFlags};
use orlop_kubelet::cri::Cri;
use orlop_kubelet::node::refuse_swap;
use orlop_kubelet::server::{Parts, Server, Statistics, serving_certificate};
use orlop_kubelet::shutdown::Shutdown;
use std::net::IpAddr;
use std::sync::Arc;
use tokio::sync::watch;

/// What a kubelet is told, wherever it was written.
#[derive(Debug)]
pub struct Request {
    pub flags: KubeletFlags,
    pub file: KubeletConfiguration,
    /// The environment's word when absent.
    pub missing_controllers: Option<MissingControllers>,
}

impl Request {
    /// The kubelet's part of the node's configuration.
    pub fn of_node(config: &NodeConfig) -> Result<Self> {
        let file = config::from_map("the key kubelet", config.kubelet.clone())?;
        let flags = KubeletFlags {
            kubeconfig: config.kubeconfig.clone(),
            bootstrap_kubeconfig: config.bootstrap_kubeconfig.clone(),
            hostname_override: Some(config.node_name.clone()).filter(|name| !name.is_empty()),
            node_ip: config.node_ip.map(|ip| ip.to_string()),
            ..KubeletFlags::default()
        };
        Ok(Self { flags, file, missing_controllers: config.runtime.missing_controllers })
    }
}

/// Started but for the pods: the listeners are bound.
#[derive(Debug)]
pub struct Agent {
    pub node_name: String,
    pub client: Option<Client>,
    kubelet: Kubelet,
    server: Server,
}

impl Agent {
    pub async fn run(self, shutdown: Shutdown) {
        let Self { kubelet, server, .. } = self;
        tokio::join!(Box::pin(kubelet.run(shutdown.clone())), Box::pin(server.run(shutdown)));
    }
}

/// Joins the cluster, if there is one, and binds the listeners.
pub async fn start(request: Request, cri: Cri, shutdown: &Shutdown) -> Result<Agent> {
    let mut config = config::resolve(&request.flags, request.file)?;
    // Without the file the kernel has no swap.
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    refuse_swap(config.raw.fail_swap_on, &swaps)?;
    if let Some(word) = request.missing_controllers {
        config.settings.missing_controllers = match word {
            MissingControllers::Refuse => orlop_kubelet::context::MissingControllers::Refuse,
            MissingControllers::Warn => orlop_kubelet::context::MissingControllers::Warn,
        };
    }
    let config = Arc::new(config);
    for key in &config.inactive {
        tracing::warn!(key, "this setting has no effect in this version");
    }
    let client = join(&config, shutdown).await?;
    let certificate = serving_certificate(&config, client.as_ref(), addresses(&config), shutdown)?;
    let kubelet = Kubelet::new(config.clone(), client.clone(), cri.clone());
    let parts = Parts {
        config: config.clone(),
        cri,
        api: client.clone(),
        pods: kubelet.directory(),
        certificate,
        prober: kubelet.prober(),
        statistics: Statistics::default(),
    };
    let server = Server::bind(parts).await?;
    Ok(Agent { node_name: config.node_name.clone(), client, kubelet, server })
}

/// The node's own client; none for a standalone node.
async fn join(config: &Config, shutdown: &Shutdown) -> Result<Option<Client>> {
    let Some(kubeconfig) = config.kubeconfig.clone() else { return Ok(None) };
    let bootstrap = Bootstrap {
        node_name: config.node_name.clone(),
        kubeconfig,
        bootstrap_kubeconfig: config.bootstrap_kubeconfig.clone(),
        cert_dir: config.cert_dir.clone(),
    };
    let joining = shutdown.unless_triggered(Box::pin(bootstrap.client())).await;
    let client = joining.context("asked to stop before the node had joined")??;
    if config.raw.rotate_certificates {
        let purpose = Purpose::Client { node: config.node_name.clone() };
        let rotation = Rotation {
            client: client.clone(),
            store: CertificateStore::client(&config.cert_dir),
            purpose: watch::Sender::new(purpose).subscribe(),
            sink: Sink::Client,
            bootstrap_kubeconfig: config.bootstrap_kubeconfig.clone(),
        };
        tokio::spawn(rotation.run(shutdown.token()));
    }
    Ok(Some(client))
}

/// What callers reach this node by.
fn addresses(config: &Config) -> Vec<IpAddr> {
    let mut addresses = config.node_ips.clone();
    addresses.push(IpAddr::from([127, 0, 0, 1]));
    addresses
}
