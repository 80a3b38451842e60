//! The task that keeps the Node object true.

use super::collect::Collector;
use super::facts::Facts;
use super::lease::Heartbeat;
use super::patch::{differs, status_patch};
use super::register::{initial_node, metadata_patch, register};
use super::{node_reference, node_status};
use crate::config::Config;
use crate::cri::Cri;
use crate::shutdown::Shutdown;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, NodeStatus};
use orlop_api::backoff::chance;
use orlop_api::client::Patch;
use orlop_api::events::{EventKind, EventRecorder};
use orlop_api::watch::{WatchEvent, WatchRequest, watch as list_watch};
use orlop_api::{ApiError, Client};
use orlop_proto::cri;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// Until the node is ready for the first time it is looked at this often …
const FAST: Duration = Duration::from_millis(100);
/// … but not for longer than this.
const FAST_PATH: Duration = Duration::from_secs(120);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(7);
const TRIES: u32 = 5;

/// How other parts talk to the node manager. Clones share it.
#[derive(Debug, Clone)]
pub struct NodeHandle {
    errors: Arc<Mutex<BTreeMap<String, String>>>,
    wake: Arc<Notify>,
}

impl NodeHandle {
    /// Says that a part of the agent cannot work (`Some`), which makes the node not ready, or that it can again (`None`).
    pub fn set_problem(&self, part: &str, problem: Option<String>) {
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = match problem {
            Some(text) => errors.insert(part.to_owned(), text.clone()).as_deref() != Some(text.as_str()),
            None => errors.remove(part).is_some(),
        };
        drop(errors);
        if changed {
            self.wake.notify_one();
        }
    }

    /// Looks at the node now instead of at the next turn.
    pub fn refresh(&self) {
        self.wake.notify_one();
    }

    fn problems(&self) -> Vec<String> {
        let errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        errors.iter().map(|(part, problem)| format!("{part}: {problem}")).collect()
    }
}

/// Registers the node, reports its status, renews its lease, watches it.
#[derive(Debug)]
pub struct NodeManager {
    config: Arc<Config>,
    /// None: standalone.
    client: Option<Client>,
    cri: Cri,
    events: EventRecorder,
    published: watch::Sender<Option<Arc<Node>>>,
    handle: NodeHandle,
}

impl NodeManager {
    /// The receiver shows the Node as the API server has it; in standalone mode one of our own making.
    #[must_use]
    pub fn new(
        config: Arc<Config>,
        client: Option<Client>,
        cri: Cri,
        events: EventRecorder,
    ) -> (Self, watch::Receiver<Option<Arc<Node>>>) {
        let (published, receiver) = watch::channel(None);
        let handle = NodeHandle { errors: Arc::default(), wake: Arc::default() };
        (Self { config, client, cri, events, published, handle }, receiver)
    }

    #[must_use]
    pub fn handle(&self) -> NodeHandle {
        self.handle.clone()
    }

    /// Runs until told to stop.
    pub async fn run(self, shutdown: Shutdown) {
        let token = shutdown.clone();
        token.unless_triggered(Box::pin(self.work(shutdown))).await;
    }

    async fn work(self, shutdown: Shutdown) {
        let mut collector = Collector::new(self.cri.clone());
        let Some(client) = self.client.clone() else {
            tokio::join!(Box::pin(self.standalone(collector)), Box::pin(self.apply_pod_cidrs()));
            return;
        };
        let node = self.register(&client, &mut collector).await;
        let uid = node.metadata.uid.clone();
        let boot = node.status.as_ref().and_then(|s| s.node_info.as_ref()).map(|i| i.boot_id.clone());
        self.published.send_replace(Some(Arc::new(*node)));
        let heartbeat = Heartbeat::new(
            &client,
            &self.config.node_name,
            self.config.lease_duration,
            self.config.status_update_frequency,
        );
        self.events.event(
            &node_reference(&self.config.node_name),
            EventKind::Normal,
            "Starting",
            "Starting kubelet.",
        );
        tokio::join!(
            Box::pin(heartbeat.run(uid, shutdown)),
            Box::pin(self.follow(&client)),
            Box::pin(self.apply_pod_cidrs()),
            Box::pin(self.report(&client, collector, boot)),
        );
    }

    /// Without an API server the Node is only for ourselves.
    async fn standalone(&self, mut collector: Collector) {
        loop {
            let previous = self.status();
            if let Some(facts) = self.look(&mut collector, &previous).await {
                let status = node_status(&facts, &previous, Timestamp::now());
                let mut node = initial_node(&self.config, status);
                if let Some(spec) = &mut node.spec
                    && !self.config.raw.pod_cidr.is_empty()
                {
                    spec.pod_cidr = Some(self.config.raw.pod_cidr.clone());
                    spec.pod_cidrs = Some(vec![self.config.raw.pod_cidr.clone()]);
                }
                self.published.send_replace(Some(Arc::new(node)));
            }
            self.pause(self.config.status_update_frequency).await;
        }
    }

    async fn pause(&self, longest: Duration) {
        tokio::select! {
            () = tokio::time::sleep(longest) => {}
            () = self.handle.wake.notified() => {}
        }
    }

    fn status(&self) -> NodeStatus {
        self.published.borrow().as_ref().and_then(|node| node.status.clone()).unwrap_or_default()
    }

    async fn look(&self, collector: &mut Collector, previous: &NodeStatus) -> Option<Facts> {
        match Box::pin(collector.collect(&self.config, is_ready(previous), &self.handle.problems())).await {
            Ok(facts) => Some(facts),
            Err(error) => {
                tracing::error!(%error, "the node's state is unknown");
                None
            }
        }
    }

    /// Creates or updates the Node, however long that takes.
    async fn register(&self, client: &Client, collector: &mut Collector) -> Box<Node> {
        let mut delay = FIRST_RETRY;
        loop {
            let empty = NodeStatus::default();
            let status = match self.look(collector, &empty).await {
                Some(facts) => node_status(&facts, &empty, Timestamp::now()),
                None => empty,
            };
            match register(client, &self.config, status).await {
                Ok(node) => return node,
                Err(error) => {
                    tracing::warn!(%error, delay_ms = delay.as_millis(), "node not registered, trying again");
                    if matches!(error, ApiError::Unreachable { .. }) {
                        tokio::time::sleep(delay.min(Duration::from_secs(1))).await;
                        client.wait_reachable(delay).await;
                    } else {
                        tokio::time::sleep(delay).await;
                    }
                    delay = (delay * 2).min(LAST_RETRY);
                }
            }
        }
    }

    /// Publishes every change of the Node.
    async fn follow(&self, client: &Client) {
        let request = WatchRequest {
            path: "/api/v1/nodes".to_owned(),
            field_selector: format!("metadata.name={}", self.config.node_name),
            ..WatchRequest::default()
        };
        let mut events = list_watch::<Node>(client, request);
        while let Some(event) = events.recv().await {
            let node = match event {
                WatchEvent::Listed(nodes) => nodes.into_iter().next(),
                WatchEvent::Applied(node) => Some(node),
                WatchEvent::Deleted(_) => None,
            };
            match node {
                Some(node) => self.publish(node),
                // Whoever deletes a node while it runs takes it out of the cluster; it comes back with a restart.
                None => {
                    tracing::warn!(node = %self.config.node_name, "the Node object was deleted; restart to register again")
                }
            }
        }
    }

    fn publish(&self, mut node: Node) {
        node.metadata.managed_fields = None;
        self.published.send_if_modified(|held| {
            let same = held.as_ref().is_some_and(|held| **held == node);
            if !same {
                *held = Some(Arc::new(node));
            }
            !same
        });
    }

    /// Tells the runtime which addresses this node's pods may have.
    async fn apply_pod_cidrs(&self) {
        let mut receiver = self.published.subscribe();
        let mut applied = None;
        loop {
            let wanted = receiver.borrow_and_update().as_ref().and_then(|node| pod_cidrs(node));
            if let Some(cidrs) = wanted.filter(|cidrs| applied.as_ref() != Some(cidrs)) {
                let config = cri::RuntimeConfig {
                    network_config: Some(cri::NetworkConfig { pod_cidr: cidrs.clone() }),
                };
                let request = cri::UpdateRuntimeConfigRequest { runtime_config: Some(config) };
                match self.cri.runtime().update_runtime_config(request).await {
                    Ok(_) => {
                        tracing::info!(%cidrs, "pod addresses of this node");
                        applied = Some(cidrs);
                        self.handle.refresh();
                    }
                    Err(status) => {
                        tracing::warn!(%cidrs, error = status.message(), "the runtime did not take the pod addresses, trying again");
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        continue;
                    }
                }
            }
            if receiver.changed().await.is_err() {
                return;
            }
        }
    }

    async fn report(&self, client: &Client, mut collector: Collector, last_boot: Option<String>) {
        let started = Instant::now();
        let mut reported: Option<Instant> = None;
        let mut announced: BTreeMap<String, String> = BTreeMap::new();
        let mut last_boot = last_boot.filter(|boot| !boot.is_empty());
        let mut spread = 1.0;
        loop {
            let previous = self.status();
            if let Some(facts) = self.look(&mut collector, &previous).await {
                if let Some(boot) = last_boot.take()
                    && boot != facts.machine.boot_id
                {
                    let text = format!(
                        "Node {} has been rebooted, boot id: {}",
                        self.config.node_name, facts.machine.boot_id
                    );
                    self.events.event(
                        &node_reference(&self.config.node_name),
                        EventKind::Warning,
                        "Rebooted",
                        &text,
                    );
                }
                let status = node_status(&facts, &previous, Timestamp::now());
                let due = reported
                    .is_none_or(|at| at.elapsed() >= self.config.status_report_frequency.mul_f64(spread));
                let changed = differs(&previous, &status);
                if (changed || due) && self.send(client, &previous, &status).await {
                    reported = Some(Instant::now());
                    // Spreads the nodes of a cluster whose status all changed at one moment.
                    spread = if changed { 0.5 + chance() } else { 1.0 };
                    self.announce(&status, &mut announced);
                }
                self.reassert_labels(client).await;
            }
            let fast = started.elapsed() < FAST_PATH && !is_ready(&self.status());
            self.pause(if fast { FAST } else { self.config.status_update_frequency }).await;
        }
    }

    /// True once the server has the status.
    async fn send(&self, client: &Client, previous: &NodeStatus, status: &NodeStatus) -> bool {
        let path = format!("/api/v1/nodes/{}/status", self.config.node_name);
        let Some(patch) = status_patch(previous, status) else { return true };
        for attempt in 1..=TRIES {
            let sent = client.patch::<_, Node>(&path, Patch::Strategic, &patch);
            match Box::pin(sent).await {
                Ok(node) => {
                    self.publish(node);
                    return true;
                }
                Err(error) => {
                    tracing::warn!(%error, attempt, "node status not reported");
                    if !error.is_retryable() {
                        return false;
                    }
                    if matches!(error, ApiError::Unreachable { .. }) {
                        client.wait_reachable(self.config.status_update_frequency).await;
                        // The status may have changed meanwhile: look again.
                        return false;
                    }
                    tokio::time::sleep(FIRST_RETRY * attempt).await;
                }
            }
        }
        false
    }

    /// Somebody may have removed the labels that schedulers rely on.
    async fn reassert_labels(&self, client: &Client) {
        let node = self.published.borrow().clone();
        let Some(patch) = node.and_then(|node| metadata_patch(&self.config, &node)) else { return };
        let path = format!("/api/v1/nodes/{}", self.config.node_name);
        match Box::pin(client.patch::<_, Node>(&path, Patch::Strategic, &patch)).await {
            Ok(node) => self.publish(node),
            Err(error) => tracing::warn!(%error, "labels of the node not restored"),
        }
    }

    /// Tells by events what has changed since the last report.
    fn announce(&self, status: &NodeStatus, announced: &mut BTreeMap<String, String>) {
        for condition in status.conditions.iter().flatten() {
            let before = announced.insert(condition.type_.clone(), condition.status.clone());
            if before.as_ref() == Some(&condition.status) {
                continue;
            }
            let on = condition.status == "True";
            let reason = match (condition.type_.as_str(), on) {
                ("Ready", true) => "NodeReady",
                ("Ready", false) => "NodeNotReady",
                ("MemoryPressure", true) => "NodeHasInsufficientMemory",
                ("MemoryPressure", false) => "NodeHasSufficientMemory",
                ("DiskPressure", true) => "NodeHasDiskPressure",
                ("DiskPressure", false) => "NodeHasNoDiskPressure",
                ("PIDPressure", true) => "NodeHasInsufficientPID",
                ("PIDPressure", false) => "NodeHasSufficientPID",
                _ => continue,
            };
            let name = &self.config.node_name;
            let text = format!("Node {name} status is now: {reason}");
            self.events.event(&node_reference(name), EventKind::Normal, reason, &text);
        }
    }
}

fn is_ready(status: &NodeStatus) -> bool {
    status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}

/// As the runtime wants them: separated by commas.
fn pod_cidrs(node: &Node) -> Option<String> {
    let spec = node.spec.as_ref()?;
    match spec.pod_cidrs.as_deref() {
        Some(all) if !all.is_empty() => Some(all.join(",")),
        _ => spec.pod_cidr.clone().filter(|cidr| !cidr.is_empty()),
    }
}
