//! Probes: whether a container has started, is alive, is ready.
//!
//! One task per probe, asleep between its turns. Liveness and readiness wait until the startup probe has succeeded. What
//! a result means is decided by [`ProbeState`], without I/O; what is worth telling goes to the pod as [`ProbeEvent`]s:
//! every crossing of a threshold, and every failure (for its event). Successes that change nothing are not told.

mod counts;
pub(crate) mod exec;
mod grpc;
pub(crate) mod http_client;
mod state;
mod target;
mod worker;

pub(crate) use counts::ProbeCount;
pub(crate) use exec::Ended;
pub use state::{Outcome, ProbeKind, ProbeState, Thresholds, Transition};
pub(crate) use target::HttpTarget;
pub use target::TargetError;

use crate::cri::Cri;
use counts::Counts;
use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// What a probe found, and what follows from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeEvent {
    pub pod_uid: String,
    pub container: String,
    pub container_id: String,
    pub kind: ProbeKind,
    pub outcome: Outcome,
    /// Set when a threshold was crossed.
    pub transition: Option<Transition>,
}

impl ProbeEvent {
    /// The text of the `Unhealthy` or `ProbeWarning` event; `None` for plain successes.
    #[must_use]
    pub fn message(&self) -> Option<String> {
        match &self.outcome {
            Outcome::Success => None,
            Outcome::Warning { message } => Some(format!("{} probe warning: {message}", self.kind)),
            Outcome::Failure { message } => Some(format!("{} probe failed: {message}", self.kind)),
            Outcome::Unknown { message } => {
                Some(format!("{} probe errored and resulted in unknown state: {message}", self.kind))
            }
        }
    }
}

/// What was known of a container before its probes began: after a restart of ours, what was last reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seed {
    pub started: bool,
    pub ready: bool,
    /// How long the container has been running already.
    pub running_for: Duration,
}

/// Runs the probes of all containers. Clones share everything.
#[derive(Clone)]
pub struct Prober {
    inner: Arc<Inner>,
}

struct Inner {
    cri: Cri,
    events: mpsc::UnboundedSender<ProbeEvent>,
    since: Instant,
    /// By container id.
    running: Mutex<BTreeMap<String, Probed>>,
}

struct Probed {
    pod_uid: String,
    container: String,
    tasks: Vec<Task>,
}

struct Task {
    kind: ProbeKind,
    counts: Arc<Counts>,
    handle: AbortHandle,
}

impl Drop for Probed {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.handle.abort();
        }
    }
}

impl fmt::Debug for Prober {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Prober")
    }
}

impl Prober {
    #[must_use]
    pub fn new(cri: Cri, events: mpsc::UnboundedSender<ProbeEvent>) -> Self {
        let running = Mutex::new(BTreeMap::new());
        Self { inner: Arc::new(Inner { cri, events, since: Instant::now(), running }) }
    }

    /// Starts the probes of a container that runs; again for the same container does nothing. A container without a
    /// readiness probe is ready, one without a startup probe has started: no events come for those.
    pub fn start(&self, pod: &Pod, container: &str, container_id: &str, pod_ip: Option<IpAddr>, seed: Seed) {
        let Some(spec) = &pod.spec else { return };
        let mut all = spec.init_containers.iter().flatten().chain(&spec.containers);
        let Some(container) = all.find(|candidate| candidate.name == container) else { return };
        let mut running = self.running();
        if running.contains_key(container_id) {
            return;
        }
        let pod_uid = crate::podspec::uid(pod).to_owned();
        let has_startup = container.startup_probe.is_some();
        let (started, gate) = watch::channel(!has_startup || seed.started);
        let started = Arc::new(started);
        let probes = [
            (ProbeKind::Startup, &container.startup_probe),
            (ProbeKind::Liveness, &container.liveness_probe),
            (ProbeKind::Readiness, &container.readiness_probe),
        ];
        let mut tasks = Vec::new();
        for (kind, probe) in probes {
            let Some(probe) = probe else { continue };
            if kind == ProbeKind::Startup && seed.started {
                continue;
            }
            let counts = Arc::<Counts>::default();
            let job = worker::Job {
                cri: self.inner.cri.clone(),
                events: self.inner.events.clone(),
                pod_uid: pod_uid.clone(),
                container: slim(container),
                container_id: container_id.to_owned(),
                pod_ip,
                kind,
                probe: probe.clone(),
                seed,
                prober_age: self.inner.since.elapsed(),
                started: Arc::clone(&started),
                gate: gate.clone(),
                counts: Arc::clone(&counts),
            };
            tasks.push(Task { kind, counts, handle: tokio::spawn(job.run()).abort_handle() });
        }
        if !tasks.is_empty() {
            let container = container.name.clone();
            running.insert(container_id.to_owned(), Probed { pod_uid, container, tasks });
        }
    }

    /// Ends all probes of a container. Idempotent.
    pub fn stop(&self, container_id: &str) {
        self.running().remove(container_id);
    }

    /// A pod is being terminated: nothing shall be killed for its health any more. Readiness goes on.
    pub fn terminating(&self, pod_uid: &str) {
        for probed in self.running().values_mut().filter(|probed| probed.pod_uid == pod_uid) {
            probed.tasks.retain(|task| {
                let keep = task.kind == ProbeKind::Readiness;
                if !keep {
                    task.handle.abort();
                }
                keep
            });
        }
    }

    /// What the probes of containers that exist have found so far.
    pub(crate) fn counts(&self) -> Vec<ProbeCount> {
        let running = self.running();
        let all = running.values().flat_map(|probed| {
            probed.tasks.iter().map(|task| task.counts.read(&probed.pod_uid, &probed.container, task.kind))
        });
        all.collect()
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<String, Probed>> {
        self.inner.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As much of a container as a probe needs: a task lives as long as its container.
fn slim(container: &Container) -> Container {
    Container { name: container.name.clone(), ports: container.ports.clone(), ..Container::default() }
}

fn seconds(value: Option<i32>, default: u64) -> Duration {
    Duration::from_secs(value.and_then(|value| u64::try_from(value).ok()).unwrap_or(default))
}

fn timeout(probe: &Probe) -> Duration {
    seconds(probe.timeout_seconds, 1).max(Duration::from_secs(1))
}

#[cfg(test)]
pub(crate) mod tests;
