//! The built-in pod network in the shape that the runtime wants, and the overlay's settings.

use crate::config::NodeConfig;
use anyhow::{Context, Result};
use ipnet::IpNet;
use orlop_cni::{Attach, Config, PodNetwork};
use orlop_cri::network::{NetworkError, NetworkRequest, Protocol, SandboxNetwork};
use orlop_net::nft::{Batch, NftSocket};
use orlop_net::rtnl::{Rtnl, ignore_missing};
use orlop_overlay::NetConf;
use std::net::IpAddr;
use tonic::async_trait;

/// What VXLAN adds to every packet over IPv4.
const ENCAPSULATION: u32 = 50;

/// How the names of all our nftables tables begin.
const OUR_TABLES: &str = "orlop-";

/// [`PodNetwork`] as a [`SandboxNetwork`].
#[derive(Debug)]
pub struct BuiltIn(PodNetwork);

impl BuiltIn {
    /// A joined node's addresses come later, from its Node object; a standalone one has them configured.
    pub async fn open(config: &NodeConfig, joined: bool) -> Result<Self> {
        let cluster = if joined { vec![cluster_network(config)?] } else { Vec::new() };
        let section = &config.network;
        let settings = Config {
            bridge: section.bridge.clone(),
            mtu: Some(mtu(config, joined).await),
            masquerade_outside: section.masquerade.then_some(cluster.clone()),
            ..Config::node(config.runtime.root.join("network"), cluster)
        };
        let network = PodNetwork::open(settings).context("open the pod network")?;
        if !joined {
            let cidr = parse_cidr("network.podCIDR", &section.pod_cidr)?;
            network.set_pod_cidrs(&[cidr]).await.context("set the pods' addresses")?;
        }
        Ok(Self(network))
    }
}

impl BuiltIn {
    /// Takes away what pod network, overlay and proxy keep in the kernel between pods: interfaces and rules.
    pub async fn remove(config: &NodeConfig) -> Result<()> {
        let rtnl = Rtnl::open().context("open a route socket")?;
        for name in [config.network.bridge.clone(), format!("flannel.{}", config.overlay.vni)] {
            ignore_missing(rtnl.delete_link_by_name(&name).await)
                .with_context(|| format!("remove interface {name}"))?;
        }
        let mut rules = NftSocket::open().context("open an nftables socket")?;
        let mut batch = Batch::default();
        for found in rules.tables().context("list nftables tables")? {
            if found.table.name.starts_with(OUR_TABLES) {
                batch.destroy_table(&found.table);
            }
        }
        rules.commit(&batch).context("remove our nftables tables")?;
        match std::fs::remove_dir_all(config.runtime.root.join("network")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).context("remove the leases")
            }
            _ => Ok(()),
        }
    }
}

fn parse_cidr(key: &str, text: &str) -> Result<IpNet> {
    text.parse().with_context(|| format!("{key}: {text:?} is no network such as 10.85.0.0/24"))
}

fn cluster_network(config: &NodeConfig) -> Result<IpNet> {
    parse_cidr("overlay.network", &config.overlay.network)
}

/// The pods' MTU: configured, or what fits through the interface that packets leave by.
async fn mtu(config: &NodeConfig, joined: bool) -> u32 {
    const USUAL: u32 = 1500;
    if config.network.mtu != 0 {
        return config.network.mtu;
    }
    if joined && config.overlay.enabled && config.overlay.mtu != 0 {
        return config.overlay.mtu;
    }
    let below = underlay_mtu().await.unwrap_or(USUAL);
    if joined && config.overlay.enabled && !config.overlay.direct_routing {
        below - ENCAPSULATION
    } else {
        below
    }
}

async fn underlay_mtu() -> Option<u32> {
    let rtnl = Rtnl::open().ok()?;
    let default = rtnl.routes().await.ok()?.into_iter().find(|route| route.dst.prefix_len() == 0)?;
    Some(rtnl.link_by_index(default.dev).await.ok()??.mtu)
}

/// The overlay as the configuration file describes it.
pub fn overlay_config(config: &NodeConfig) -> Result<orlop_overlay::Config> {
    let section = &config.overlay;
    let IpNet::V4(network) = cluster_network(config)? else {
        anyhow::bail!("overlay.network: {} is not IPv4, which is all the overlay carries", section.network);
    };
    let net_conf = NetConf {
        network: network.trunc(),
        vni: section.vni,
        port: section.port,
        mtu: (section.mtu != 0).then_some(section.mtu),
        direct_routing: section.direct_routing,
        learning: false,
        gbp: false,
    };
    Ok(orlop_overlay::Config {
        public_ip: config.node_ip,
        iface: (!section.interface.is_empty()).then(|| section.interface.clone()),
        ..orlop_overlay::Config::new(net_conf)
    })
}

fn failed(error: &orlop_cni::NetworkError) -> NetworkError {
    // The whole chain: what went wrong below is what a person needs.
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(below) = cause {
        text = format!("{text}: {below}");
        cause = below.source();
    }
    NetworkError(text)
}

#[async_trait]
impl SandboxNetwork for BuiltIn {
    async fn attach(&self, request: &NetworkRequest) -> Result<Vec<IpAddr>, NetworkError> {
        let mut attach = Attach::new(&request.sandbox_id, &request.netns);
        attach.port_mappings = request
            .port_mappings
            .iter()
            .map(|mapping| orlop_cni::PortMapping {
                host_ip: mapping.host_ip,
                host_port: mapping.host_port,
                container_port: mapping.container_port,
                protocol: match mapping.protocol {
                    Protocol::Tcp => orlop_cni::Protocol::Tcp,
                    Protocol::Udp => orlop_cni::Protocol::Udp,
                    Protocol::Sctp => orlop_cni::Protocol::Sctp,
                },
            })
            .collect();
        Ok(self.0.attach(&attach).await.map_err(|e| failed(&e))?.ips())
    }

    async fn detach(&self, request: &NetworkRequest) -> Result<(), NetworkError> {
        self.0.detach(&request.sandbox_id).await.map_err(|e| failed(&e))
    }

    async fn status(&self) -> Result<(), NetworkError> {
        self.0.status().await.map_err(|e| failed(&e))
    }

    async fn retain(&self, sandbox_ids: &[String]) -> Result<(), NetworkError> {
        self.0.retain(sandbox_ids).await.map_err(|e| failed(&e))
    }

    async fn set_pod_cidrs(&self, cidrs: &str) -> Result<(), NetworkError> {
        let parsed: Result<Vec<IpNet>, _> = cidrs.split(',').map(|cidr| cidr.trim().parse()).collect();
        let parsed = parsed.map_err(|e| NetworkError(format!("pod CIDRs {cidrs:?}: {e}")))?;
        self.0.set_pod_cidrs(&parsed).await.map_err(|e| failed(&e))
    }
}
