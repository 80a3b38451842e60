//! `orlop kubelet`, or the program called `kubelet`: the kubelet alone, on any CRI endpoint or on the runtime in this
//! process.
//!
//! Which pod network the runtime in this process has: CNI plugins on a node that joins a cluster, as with every kubelet;
//! the built-in network on a standalone node, which has nobody to bring plugins, unless `--cni-conf-dir` names some.

mod file;
pub mod flags;

use crate::config::{NetworkSection, NodeConfig, OverlaySection, ProxySection, RuntimeSection};
use crate::node::{agent, ready, run_with, stop_on_signals};
use anyhow::{Context, Result, ensure};
use flags::Invoked;
use orlop_kubelet::config::{Config, resolve};
use orlop_kubelet::cri::Cri;
use orlop_kubelet::shutdown::Shutdown;
use orlop_proto::cri::VersionRequest;
use std::path::PathBuf;
use std::time::Duration;

const CNI_CONF_DIR: &str = "/etc/cni/net.d";
const RETRY: Duration = Duration::from_secs(2);

/// Runs until told to stop. No container is touched by stopping.
pub async fn run(invoked: Invoked) -> Result<()> {
    for flag in &invoked.without_effect {
        tracing::warn!(flag, "this flag has no effect");
    }
    let file = file::read(invoked.flags.config.as_deref(), invoked.config_dir.as_deref())?;
    // Before anything is opened: what is wrong with the configuration is told at once.
    let resolved = resolve(&invoked.flags, file.clone())?;
    let request = agent::Request { flags: invoked.flags, file, missing_controllers: None };
    let shutdown = stop_on_signals()?;
    let endpoint = resolved.raw.container_runtime_endpoint.as_str();
    if endpoint.is_empty() {
        let config = own_runtime(invoked.runtime, invoked.cni_conf_dir, &resolved);
        return run_with(config, request, shutdown, || ready("the kubelet")).await;
    }
    let cri = foreign_runtime(endpoint, &resolved.raw.image_service_endpoint)?;
    if shutdown.unless_triggered(answers(&cri, endpoint)).await.is_none() {
        return Ok(());
    }
    serve(request, cri, shutdown).await
}

async fn serve(request: agent::Request, cri: Cri, shutdown: Shutdown) -> Result<()> {
    let agent = agent::start(request, cri, &shutdown).await?;
    ready("the kubelet");
    agent.run(shutdown).await;
    Ok(())
}

fn foreign_runtime(runtime: &str, images: &str) -> Result<Cri> {
    let images = if images.is_empty() { runtime } else { images };
    for (flag, endpoint) in [("--container-runtime-endpoint", runtime), ("--image-service-endpoint", images)]
    {
        let path = endpoint.strip_prefix("unix://").unwrap_or(endpoint);
        ensure!(
            path.starts_with('/'),
            "{flag} {endpoint:?}: must be unix:// and an absolute path, such as unix:///run/containerd/containerd.sock"
        );
    }
    Cri::connect(runtime, images).with_context(|| format!("use the container runtime at {runtime}"))
}

/// Waits until the runtime answers: at boot it may come after us.
async fn answers(cri: &Cri, endpoint: &str) {
    loop {
        match cri.runtime().version(VersionRequest::default()).await {
            Ok(version) => {
                let version = version.into_inner();
                tracing::info!(
                    endpoint,
                    name = version.runtime_name,
                    version = version.runtime_version,
                    "container runtime"
                );
                return;
            }
            Err(status) => {
                let error = status.message();
                tracing::warn!(
                    endpoint,
                    error,
                    "the container runtime does not answer, trying again; is it running, and is --container-runtime-endpoint right?"
                );
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// The parts of a node that this kubelet brings along: its runtime, but neither overlay nor proxy.
fn own_runtime(runtime: RuntimeSection, cni_conf_dir: Option<PathBuf>, kubelet: &Config) -> NodeConfig {
    let joined = kubelet.kubeconfig.is_some();
    let mut network = NetworkSection::default();
    if !kubelet.raw.pod_cidr.is_empty() {
        network.pod_cidr.clone_from(&kubelet.raw.pod_cidr);
    }
    NodeConfig {
        node_name: kubelet.node_name.clone(),
        kubeconfig: kubelet.kubeconfig.clone(),
        runtime: RuntimeSection {
            cni_conf_dir: cni_conf_dir.or_else(|| joined.then(|| CNI_CONF_DIR.into())),
            ..runtime
        },
        network,
        overlay: OverlaySection { enabled: false, ..OverlaySection::default() },
        proxy: ProxySection { enabled: false, ..ProxySection::default() },
        ..NodeConfig::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use orlop_kubelet::config::{KubeletConfiguration, KubeletFlags};

    fn config(kubeconfig: Option<&str>, pod_cidr: &str) -> Result<Config> {
        let flags = KubeletFlags {
            kubeconfig: kubeconfig.map(Into::into),
            hostname_override: Some("a".into()),
            ..KubeletFlags::default()
        };
        Ok(resolve(
            &flags,
            KubeletConfiguration { pod_cidr: pod_cidr.into(), ..KubeletConfiguration::default() },
        )?)
    }

    #[test]
    fn a_joined_kubelet_has_cni_plugins_and_a_standalone_one_the_built_in_network() -> Result<()> {
        let joined = own_runtime(RuntimeSection::default(), None, &config(Some("/k"), "")?);
        assert_eq!(joined.runtime.cni_conf_dir, Some(CNI_CONF_DIR.into()));
        assert!(!joined.overlay.enabled && !joined.proxy.enabled);
        let standalone = own_runtime(RuntimeSection::default(), None, &config(None, "10.99.0.0/24")?);
        assert_eq!(
            (standalone.runtime.cni_conf_dir, standalone.network.pod_cidr.as_str()),
            (None, "10.99.0.0/24")
        );
        let told = own_runtime(RuntimeSection::default(), Some("/c".into()), &config(None, "")?);
        assert_eq!(told.runtime.cni_conf_dir, Some("/c".into()));
        Ok(())
    }

    #[test]
    fn an_endpoint_that_is_no_socket_is_refused() {
        for endpoint in ["tcp://1.2.3.4:1", "npipe:////./pipe/x", "containerd.sock"] {
            let message = foreign_runtime(endpoint, "").unwrap_err().to_string();
            assert!(
                message.contains("--container-runtime-endpoint") && message.contains("unix://"),
                "{message}"
            );
        }
        let message = foreign_runtime("unix:///a", "tcp://b").unwrap_err().to_string();
        assert!(message.contains("--image-service-endpoint"), "{message}");
    }
}
