//! Pod sandboxes: namespaces, files and network that a pod's containers share.

pub(crate) mod files;
pub(crate) mod lifecycle;
pub(crate) mod namespaces;
pub(crate) mod status;

use crate::network::{NetworkRequest, PortMapping, Protocol};
use crate::record::Wire;
use crate::spec::SpecError;
use files::SandboxDir;
use orlop_proto::cri::{self, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::Mutex;

pub(crate) const RECORD_VERSION: u32 = 1;

/// ```text
/// Creating ──> Ready ──> NotReady ──> (removed)
///     └────────────────────^  when its creation could not be undone
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    Creating,
    Ready,
    NotReady,
}

/// What is known about a sandbox on disk, at `<root>/cri/sandboxes/<id>.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) version: u32,
    pub(crate) id: String,
    pub(crate) created_at: i64,
    /// A sandbox of an earlier boot has neither namespaces nor processes any more.
    pub(crate) boot_id: String,
    pub(crate) phase: Phase,
    pub(crate) runtime_handler: String,
    pub(crate) addresses: Vec<IpAddr>,
    /// Whether the network has to be asked to let go of it.
    pub(crate) attached: bool,
    pub(crate) config: Wire<PodSandboxConfig>,
}

impl Record {
    pub(crate) fn config(&self) -> &PodSandboxConfig {
        &self.config.0
    }

    pub(crate) fn metadata(&self) -> PodSandboxMetadata {
        self.config().metadata.clone().unwrap_or_default()
    }

    pub(crate) fn namespaces(&self) -> NamespaceOption {
        let linux = self.config().linux.as_ref();
        linux
            .and_then(|l| l.security_context.as_ref())
            .and_then(|s| s.namespace_options.clone())
            .unwrap_or_default()
    }

    pub(crate) fn host_network(&self) -> bool {
        self.namespaces().network() == NamespaceMode::Node
    }

    /// Whether the sandbox has a process of its own.
    pub(crate) fn has_pause(&self) -> bool {
        self.namespaces().pid() == NamespaceMode::Pod
    }

    pub(crate) fn network_request(&self, dir: &SandboxDir) -> Result<NetworkRequest, SpecError> {
        let metadata = self.metadata();
        Ok(NetworkRequest {
            sandbox_id: self.id.clone(),
            netns: dir.namespace("net"),
            pod_name: metadata.name,
            pod_namespace: metadata.namespace,
            pod_uid: metadata.uid,
            port_mappings: port_mappings(&self.config().port_mappings)?,
            annotations: self.config().annotations.clone().into_iter().collect(),
            cgroup_parent: self.config().linux.as_ref().map(|l| l.cgroup_parent.clone()).unwrap_or_default(),
        })
    }
}

/// Mappings without a host port ask for nothing.
pub(crate) fn port_mappings(mappings: &[cri::PortMapping]) -> Result<Vec<PortMapping>, SpecError> {
    let port = |value: i32| {
        u16::try_from(value)
            .map_err(|_| SpecError::Invalid { field: "port mapping", reason: format!("{value} is no port") })
    };
    let mut result = Vec::new();
    for mapping in mappings.iter().filter(|m| m.host_port != 0) {
        let host_ip = match mapping.host_ip.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| SpecError::Invalid {
                field: "port mapping host_ip",
                reason: format!("{text:?} is no address"),
            })?),
        };
        result.push(PortMapping {
            host_ip,
            host_port: port(mapping.host_port)?,
            container_port: port(mapping.container_port)?,
            protocol: match mapping.protocol() {
                cri::Protocol::Tcp => Protocol::Tcp,
                cri::Protocol::Udp => Protocol::Udp,
                cri::Protocol::Sctp => Protocol::Sctp,
            },
        });
    }
    Ok(result)
}

/// A sandbox as the running service holds it.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) id: String,
    pub(crate) dir: SandboxDir,
    /// One of run, stop, remove at a time.
    pub(crate) operation: Mutex<()>,
    pub(crate) pause_pid: AtomicU32,
    pub(crate) cpu_sample: std::sync::Mutex<Option<crate::stats::CpuSample>>,
    record: RwLock<Arc<Record>>,
}

impl Sandbox {
    pub(crate) fn new(record: Record, state: &std::path::Path) -> Self {
        Self {
            id: record.id.clone(),
            dir: SandboxDir(directory(state, &record.id)),
            operation: Mutex::new(()),
            pause_pid: AtomicU32::new(0),
            cpu_sample: std::sync::Mutex::default(),
            record: RwLock::new(Arc::new(record)),
        }
    }

    pub(crate) fn record(&self) -> Arc<Record> {
        self.record.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn replace(&self, record: Record) {
        *self.record.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(record);
    }

    pub(crate) fn pause_pid(&self) -> Option<u32> {
        Some(self.pause_pid.load(Ordering::Acquire)).filter(|pid| *pid != 0)
    }

    /// The network namespace, or nothing when it is the host's.
    pub(crate) fn netns(&self) -> Option<PathBuf> {
        (!self.record().host_network()).then(|| self.dir.namespace("net"))
    }
}

pub(crate) fn directory(state: &std::path::Path, id: &str) -> PathBuf {
    state.join("sandboxes").join(id)
}

/// What makes a sandbox unique among those alive.
pub(crate) fn name(metadata: &PodSandboxMetadata) -> String {
    format!("{}_{}_{}_{}", metadata.name, metadata.namespace, metadata.uid, metadata.attempt)
}
