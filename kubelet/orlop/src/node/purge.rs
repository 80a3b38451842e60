//! `orlop purge`: takes away everything of ours that outlives the agent.

use super::network::BuiltIn;
use super::runtime::LocalRuntime;
use crate::config::{MissingControllers, NodeConfig};
use anyhow::{Context, Result, bail};
use orlop_kubelet::cri::Cri;
use orlop_proto::cri::{ListPodSandboxRequest, RemovePodSandboxRequest, StopPodSandboxRequest};

/// Stops and removes every pod, then what pods and network left in the kernel and on disk. Goes on after a failure and
/// reports all of them.
pub async fn run(mut config: NodeConfig) -> Result<()> {
    // No limit matters to what is about to go.
    config.runtime.missing_controllers = Some(MissingControllers::Warn);
    let config = &config;
    let mut failed = Vec::new();
    let mut note = |what: &str, result: Result<()>| {
        if let Err(error) = result {
            failed.push(format!("{what}: {error:#}"));
        }
    };
    note("pods", pods(config).await);
    note("network", network(config).await);
    note("volumes", volumes());
    note("cgroups", cgroups(config));
    if !failed.is_empty() {
        bail!("not everything could be taken away:\n  {}", failed.join("\n  "));
    }
    Ok(())
}

async fn pods(config: &NodeConfig) -> Result<()> {
    let network = super::pod_network(config, config.kubeconfig.is_some()).await?;
    let runtime = LocalRuntime::open(&config.runtime, network).await?;
    let cri = Cri::new(runtime.service.runtime_server(), runtime.service.image_server());
    let mut client = cri.runtime();
    let sandboxes = client.list_pod_sandbox(ListPodSandboxRequest::default()).await?.into_inner().items;
    let mut failed = Vec::new();
    for sandbox in sandboxes {
        let name = sandbox.metadata.map(|m| format!("{}/{}", m.namespace, m.name)).unwrap_or_default();
        let id = sandbox.id;
        let stopped =
            client.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: id.clone() }).await.map(drop);
        let removed =
            client.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: id }).await.map(drop);
        if let Err(status) = stopped.and(removed) {
            failed.push(format!("{name}: {}", status.message()));
        }
    }
    runtime.close().await;
    if !failed.is_empty() {
        bail!("{}", failed.join("; "));
    }
    Ok(())
}

async fn network(config: &NodeConfig) -> Result<()> {
    if config.runtime.cni_conf_dir.is_none() {
        BuiltIn::remove(config).await?;
    }
    Ok(())
}

fn volumes() -> Result<()> {
    let pods = std::path::Path::new("/var/lib/kubelet/pods");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("read the mount table")?;
    let mut below: Vec<&str> = mounts
        .lines()
        .filter_map(|line| line.split_whitespace().nth(4))
        .filter(|point| std::path::Path::new(point).starts_with(pods))
        .collect();
    // Deepest first.
    below.sort_by_key(|point| std::cmp::Reverse(point.len()));
    for point in below {
        rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH)
            .with_context(|| format!("unmount {point}"))?;
    }
    match std::fs::remove_dir_all(pods) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context("remove the pods' folders")
        }
        _ => Ok(()),
    }
}

fn cgroups(config: &NodeConfig) -> Result<()> {
    fn remove(folder: &std::path::Path) -> std::io::Result<()> {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                remove(&entry.path())?;
            }
        }
        std::fs::remove_dir(folder)
    }
    let kubepods = config.runtime.cgroup_root.join("kubepods");
    match remove(&kubepods) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", kubepods.display()))
        }
        _ => Ok(()),
    }
}
