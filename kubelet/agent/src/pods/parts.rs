//! What running a pod needs from its neighbours: configurations, volumes, hooks and probes.
//!
//! The pod code decides *when*; these decide *how*. The trait is the seam: composition lays it on the real modules, tests
//! lay it on a few lines of memory.

use futures_util::future::BoxFuture;
use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Pod};
use orlop_proto::cri;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

/// Which of a pod's lists a container stands in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ContainerKind {
    Init,
    Main,
    Ephemeral,
}

/// Why a part could not do its work. `reason` is the CamelCase word shown as the container's waiting reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct PartError {
    pub reason: String,
    pub message: String,
}

/// A sandbox as the runtime shall make it.
#[derive(Debug, Clone)]
pub struct SandboxPlan {
    pub config: cri::PodSandboxConfig,
    /// The handler of the pod's RuntimeClass; empty is the runtime's default.
    pub runtime_handler: String,
}

/// Everything a container's configuration is made from.
#[derive(Debug, Clone)]
pub struct ContainerRequest {
    pub pod: Arc<Pod>,
    pub container: Container,
    pub kind: ContainerKind,
    pub attempt: u32,
    pub image: cri::Image,
    pub image_ref: String,
    pub pod_ips: Vec<IpAddr>,
}

/// What is known of a container's probes before the first of them ran: after a restart of the kubelet, what it had
/// reported before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProbeSeed {
    pub started: bool,
    pub ready: bool,
}

/// A container whose probes shall run.
#[derive(Debug, Clone)]
pub struct ProbeTarget {
    pub pod: Arc<Pod>,
    pub container: String,
    pub container_id: String,
    pub pod_ip: Option<IpAddr>,
    pub seed: ProbeSeed,
    /// How long it runs already.
    pub running_for: Duration,
}

/// The neighbours. Every call may be repeated and must then do no harm.
pub trait PodParts: Send + Sync {
    fn sandbox_config<'a>(
        &'a self,
        pod: &'a Arc<Pod>,
        attempt: u32,
    ) -> BoxFuture<'a, Result<SandboxPlan, PartError>>;

    /// Only after `mount` has succeeded for the pod.
    fn container_config(
        &self,
        request: ContainerRequest,
    ) -> BoxFuture<'_, Result<cri::ContainerConfig, PartError>>;

    fn mount<'a>(&'a self, pod: &'a Arc<Pod>) -> BoxFuture<'a, Result<(), PartError>>;

    /// Only when no container of the pod runs. Knows the pod by its UID, so that orphans can be cleaned too.
    fn unmount<'a>(&'a self, pod_uid: &'a str) -> BoxFuture<'a, Result<(), PartError>>;

    /// Takes away everything of the pod below the kubelet's root: volumes first, then the rest of its directory. Only
    /// when nothing of the pod runs.
    fn remove<'a>(&'a self, pod_uid: &'a str) -> BoxFuture<'a, Result<(), PartError>>;

    fn hook<'a>(
        &'a self,
        pod: &'a Arc<Pod>,
        container: &'a Container,
        container_id: &'a str,
        handler: &'a LifecycleHandler,
    ) -> BoxFuture<'a, Result<(), PartError>>;

    /// Results arrive as `ProbeOutcome`s at the pod's worker.
    fn start_probes(&self, target: ProbeTarget);

    fn stop_probes(&self, container_id: &str);

    /// The pod is on its way down: from now on nothing of it shall be killed for its health, and only readiness is
    /// looked at.
    fn terminate_probes(&self, pod_uid: &str);
}

/// Which probe spoke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeKind {
    Startup,
    Liveness,
    Readiness,
}

/// A probe crossed its success or failure threshold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeOutcome {
    pub pod_uid: String,
    pub container: String,
    pub container_id: String,
    pub kind: ProbeKind,
    pub healthy: bool,
    /// The grace the probe states for a container that is killed because of it; none: the pod's.
    pub grace_seconds: Option<i64>,
}
