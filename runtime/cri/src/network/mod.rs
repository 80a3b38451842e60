//! What the CRI needs from a pod network, and its two implementations: conflists executed as plugins, and whatever the
//! program that embeds the runtime hands in (in `orlop node` the built-in pod network).

mod conflist;
mod plugin;

pub use conflist::Conflist;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use tonic::async_trait;

/// A sandbox that wants a network.
#[derive(Debug, Clone)]
pub struct NetworkRequest {
    pub sandbox_id: String,
    pub netns: PathBuf,
    pub pod_name: String,
    pub pod_namespace: String,
    pub pod_uid: String,
    pub port_mappings: Vec<PortMapping>,
    pub annotations: BTreeMap<String, String>,
    /// As the kubelet gave it, relative to the cgroup root.
    pub cgroup_parent: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortMapping {
    pub host_ip: Option<IpAddr>,
    pub host_port: u16,
    pub container_port: u16,
    pub protocol: Protocol,
}

#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct NetworkError(pub String);

#[async_trait]
pub trait SandboxNetwork: Send + Sync + std::fmt::Debug {
    /// Connects the sandbox's namespace; the first address is the primary one. A failed call has undone itself.
    async fn attach(&self, request: &NetworkRequest) -> Result<Vec<IpAddr>, NetworkError>;
    /// Disconnects. Idempotent; the namespace may be gone already.
    async fn detach(&self, request: &NetworkRequest) -> Result<(), NetworkError>;
    /// Why pods cannot be connected now, if so: the reason and message of the NetworkReady condition.
    async fn status(&self) -> Result<(), NetworkError>;
    /// Releases everything that belongs to none of these sandboxes; for the start of the agent.
    async fn retain(&self, sandbox_ids: &[String]) -> Result<(), NetworkError>;
    /// The kubelet's `UpdateRuntimeConfig`: the node's pod CIDRs.
    async fn set_pod_cidrs(&self, cidrs: &str) -> Result<(), NetworkError>;
}
