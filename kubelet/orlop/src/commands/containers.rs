//! `orlop ps` and `orlop pods`.

use super::{CONTAINER_NAME, NodeSocket, POD_NAME, POD_NAMESPACE, table};
use anyhow::Result;
use orlop_proto::cri::{
    Container, ContainerState, ListContainersRequest, ListPodSandboxRequest, PodSandboxState,
    PodSandboxStatusRequest,
};
use std::collections::HashMap;
use std::time::SystemTime;

pub async fn ps(mut node: NodeSocket, all: bool) -> Result<()> {
    let mut containers =
        node.runtime.list_containers(ListContainersRequest::default()).await?.into_inner().containers;
    containers.sort_by_key(|c| -c.created_at);
    let rows: Vec<Vec<String>> = containers
        .iter()
        .filter(|c| all || c.state == ContainerState::ContainerRunning as i32)
        .map(|c| {
            vec![
                short(&c.id),
                label(c, POD_NAMESPACE),
                label(c, POD_NAME),
                label(c, CONTAINER_NAME),
                container_state(c.state).to_owned(),
                c.metadata.as_ref().map_or(0, |m| m.attempt).to_string(),
                table::age(c.created_at, SystemTime::now()),
                c.image.as_ref().map(|i| i.user_specified_image.clone()).unwrap_or_default(),
            ]
        })
        .collect();
    table::print(&["ID", "NAMESPACE", "POD", "CONTAINER", "STATE", "RESTARTS", "AGE", "IMAGE"], &rows);
    Ok(())
}

pub async fn pods(mut node: NodeSocket, all: bool) -> Result<()> {
    let mut sandboxes =
        node.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await?.into_inner().items;
    sandboxes.sort_by_key(|s| -s.created_at);
    let containers =
        node.runtime.list_containers(ListContainersRequest::default()).await?.into_inner().containers;
    let mut running: HashMap<&str, (usize, usize)> = HashMap::new();
    for container in &containers {
        let count = running.entry(&container.pod_sandbox_id).or_default();
        count.0 += usize::from(container.state == ContainerState::ContainerRunning as i32);
        count.1 += 1;
    }
    let mut rows = Vec::new();
    for sandbox in sandboxes {
        let ready = sandbox.state == PodSandboxState::SandboxReady as i32;
        if !all && !ready {
            continue;
        }
        let request = PodSandboxStatusRequest { pod_sandbox_id: sandbox.id.clone(), verbose: false };
        let status = node.runtime.pod_sandbox_status(request).await?.into_inner().status.unwrap_or_default();
        let metadata = sandbox.metadata.unwrap_or_default();
        let (up, of) = running.get(sandbox.id.as_str()).copied().unwrap_or_default();
        rows.push(vec![
            short(&sandbox.id),
            metadata.namespace,
            metadata.name,
            status.network.map(|n| n.ip).filter(|ip| !ip.is_empty()).unwrap_or_else(|| "host".to_owned()),
            format!("{up}/{of}"),
            if ready { "ready" } else { "not ready" }.to_owned(),
            table::age(sandbox.created_at, SystemTime::now()),
        ]);
    }
    table::print(&["ID", "NAMESPACE", "POD", "IP", "RUNNING", "STATE", "AGE"], &rows);
    Ok(())
}

fn short(id: &str) -> String {
    id.chars().take(13).collect()
}

fn label(container: &Container, key: &str) -> String {
    container.labels.get(key).cloned().unwrap_or_else(|| "-".to_owned())
}

fn container_state(state: i32) -> &'static str {
    match ContainerState::try_from(state) {
        Ok(ContainerState::ContainerCreated) => "created",
        Ok(ContainerState::ContainerRunning) => "running",
        Ok(ContainerState::ContainerExited) => "exited",
        Ok(ContainerState::ContainerUnknown) | Err(_) => "unknown",
    }
}
