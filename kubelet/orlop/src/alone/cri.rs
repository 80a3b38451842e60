//! `orlop cri`: the container runtime alone, for a stock kubelet, crictl and whatever else speaks CRI v1.
//!
//! As with every other runtime the pod network is that of CNI plugins; until there is a configuration for them the
//! network is reported as not ready, and pods on the host's network run all the same.

use crate::cli::CriArgs;
use crate::config::RuntimeSection;
use crate::node::runtime::{LocalRuntime, conflist};
use crate::node::{ready, stop_on_signals};
use anyhow::{Context, Result, ensure};

/// Serves until told to stop. No container is touched by stopping.
pub async fn run(args: CriArgs) -> Result<()> {
    let section = args.section()?;
    let shutdown = stop_on_signals()?;
    let network = conflist(&args.cni_conf_dir, &args.cni_bin_dir, &section.root)?;
    let runtime = LocalRuntime::open(&section, network).await?;
    runtime.preload().await;
    let serving = runtime.serve(shutdown);
    ready("the container runtime");
    let served = serving.await.context("the CRI server ended")?;
    runtime.close().await;
    Ok(served?)
}

impl CriArgs {
    fn section(&self) -> Result<RuntimeSection> {
        ensure!(
            self.listen.starts_with("unix:///"),
            "--listen {:?}: must be unix:// and an absolute path, such as unix:///run/orlop/cri.sock",
            self.listen
        );
        let defaults = RuntimeSection::default();
        Ok(RuntimeSection {
            listen: self.listen.clone(),
            root: self.root.clone(),
            state: self.state.clone(),
            keeper_socket: self.keeper_socket.clone(),
            cgroup_root: self.cgroup_root.clone(),
            registry_config_dir: self.registry_config_dir.clone().or(defaults.registry_config_dir),
            preload_dir: self.preload_dir.clone(),
            cni_conf_dir: Some(self.cni_conf_dir.clone()),
            cni_bin_dir: self.cni_bin_dir.clone(),
            ..RuntimeSection::default()
        })
    }
}
