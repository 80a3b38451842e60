//! `orlop node`: the whole worker in one process, put together from its parts.
//!
//! Order of the start: runtime (nothing else works without it), identity, kubelet and its server, then overlay and
//! proxy, which need the API server and may take their time without holding up what runs already.

pub mod agent;
pub mod network;
pub mod proxy;
pub mod purge;
pub mod runtime;
mod supervise;

use crate::config::NodeConfig;
use anyhow::{Context, Result};
use network::BuiltIn;
use orlop_api::Client;
use orlop_cri::network::SandboxNetwork;
use orlop_kubelet::cri::Cri;
use orlop_kubelet::shutdown::Shutdown;
use runtime::LocalRuntime;
use std::sync::Arc;
use supervise::supervise;
use tokio::signal::unix::{SignalKind, signal};

/// Runs until told to stop. No container is touched by stopping.
pub async fn run(config: NodeConfig) -> Result<()> {
    let request = agent::Request::of_node(&config)?;
    let shutdown = stop_on_signals()?;
    run_with(config, request, shutdown, || ready("the node")).await
}

/// As [`run`], for callers that put the kubelet's part together themselves. `started` is called when everything runs.
pub async fn run_with(
    config: NodeConfig,
    request: agent::Request,
    shutdown: Shutdown,
    started: impl FnOnce(),
) -> Result<()> {
    let joined = config.kubeconfig.is_some();
    let network = pod_network(&config, joined).await?;
    let runtime = LocalRuntime::open(&config.runtime, network).await?;
    runtime.preload().await;
    let serving = runtime.serve(shutdown.clone());

    let cri = Cri::new(runtime.service.runtime_server(), runtime.service.image_server());
    let agent = agent::start(request, cri, &shutdown).await?;
    let mut parts = tokio::task::JoinSet::new();
    if let Some(client) = &agent.client {
        network_parts(&config, &agent.node_name, client, &shutdown, &mut parts)?;
    }
    started();
    tokio::select! {
        served = serving => served.context("the CRI server ended")??,
        () = agent.run(shutdown.clone()) => {}
    }
    shutdown.trigger();
    runtime.close().await;
    Ok(())
}

/// The built-in pod network, or conflists if the operator wants plugins.
async fn pod_network(config: &NodeConfig, joined: bool) -> Result<Arc<dyn SandboxNetwork>> {
    if let Some(folder) = &config.runtime.cni_conf_dir {
        return runtime::conflist(folder, &config.runtime.cni_bin_dir, &config.runtime.root);
    }
    Ok(Arc::new(BuiltIn::open(config, joined).await?))
}

/// Overlay and proxy. Each is started again when it fails; neither can take the node down.
fn network_parts(
    config: &NodeConfig,
    node_name: &str,
    client: &Client,
    shutdown: &Shutdown,
    parts: &mut tokio::task::JoinSet<()>,
) -> Result<()> {
    if config.overlay.enabled && config.runtime.cni_conf_dir.is_none() {
        let overlay = network::overlay_config(config)?;
        let (client, node_name, stop) = (client.clone(), node_name.to_owned(), shutdown.clone());
        parts.spawn(supervise("overlay", shutdown.clone(), move || {
            let (overlay, client, node_name, stop) =
                (overlay.clone(), client.clone(), node_name.clone(), stop.clone());
            async move {
                let overlay = orlop_overlay::Overlay::new(overlay);
                Box::pin(overlay.run(client, node_name, async move { stop.triggered().await })).await
            }
        }));
    }
    if config.proxy.enabled {
        let settings = proxy::settings(config, node_name)?;
        let (client, stop) = (client.clone(), shutdown.token());
        parts.spawn(supervise("proxy", shutdown.clone(), move || {
            let running = proxy::run(client.clone(), settings.clone(), stop.clone());
            // The whole chain on one line.
            async move { running.await.map_err(|error| format!("{error:#}")) }
        }));
    }
    Ok(())
}

/// Told to stop by SIGTERM or SIGINT.
pub fn stop_on_signals() -> Result<Shutdown> {
    let shutdown = Shutdown::new();
    let told = shutdown.clone();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("asked to stop");
        told.trigger();
    });
    Ok(shutdown)
}

/// Tells systemd, if it started us, that we are up.
pub fn ready(what: &str) {
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::debug!(%error, "no service manager to tell");
    }
    tracing::info!("{what} is up");
}
