//! Containers: what is known about each, on disk and in memory.

pub(crate) mod create;
pub(crate) mod exec;
pub(crate) mod lifecycle;
pub(crate) mod signal;
pub(crate) mod status;
pub(crate) mod update;

use crate::record::Wire;
use crate::spec::user::User;
use crate::stats::CpuSample;
use orlop_image::Usage;
use orlop_proto::cri::{ContainerConfig, ContainerMetadata, PodSandboxMetadata};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex as StdMutex, PoisonError, RwLock};
use std::time::Instant;
use tokio::sync::{Mutex, watch};

pub(crate) const RECORD_VERSION: u32 = 1;

/// ```text
/// Created ──start──> Running ──exit──> Exited ──remove──> (gone)
///    └──────start fails, or the node was rebooted──^
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    Created,
    Running { started_at: i64 },
    Exited(Ended),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ended {
    /// 0 when it never ran.
    pub(crate) started_at: i64,
    pub(crate) finished_at: i64,
    pub(crate) exit_code: i32,
    pub(crate) reason: Reason,
    pub(crate) message: String,
}

/// Why a container is no longer running, in the words that the kubelet shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reason {
    Completed,
    Error,
    OomKilled,
    StartError,
    /// It ended while nobody looked: its exit code is lost.
    Unknown,
}

impl Reason {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "Completed",
            Self::Error => "Error",
            Self::OomKilled => "OOMKilled",
            Self::StartError => "StartError",
            Self::Unknown => "Unknown",
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StoredUser {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

impl From<&User> for StoredUser {
    fn from(user: &User) -> Self {
        Self { uid: user.uid, gid: user.gid, groups: user.groups.clone() }
    }
}

/// What is known about a container on disk, at `<root>/cri/containers/<id>.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) version: u32,
    pub(crate) id: String,
    pub(crate) sandbox_id: String,
    /// Of the sandbox, for the name, which must stay the same when the sandbox is gone.
    pub(crate) name: String,
    pub(crate) created_at: i64,
    pub(crate) boot_id: String,
    pub(crate) phase: Phase,
    pub(crate) image_id: String,
    /// A digest of the image in a registry, or its id when it came from none.
    pub(crate) image_ref: String,
    /// Absolute; empty when nobody wants the output.
    pub(crate) log_path: PathBuf,
    /// Relative to the cgroup root.
    pub(crate) cgroup: PathBuf,
    pub(crate) stop_signal: i32,
    pub(crate) user: StoredUser,
    pub(crate) config: Wire<ContainerConfig>,
}

impl Record {
    pub(crate) fn config(&self) -> &ContainerConfig {
        &self.config.0
    }
}

/// A stop in progress: the soft signal goes out once, a later caller can only shorten the wait.
#[derive(Debug, Default)]
pub(crate) struct Stopping {
    pub(crate) signalled: bool,
    pub(crate) deadline: Option<tokio::time::Instant>,
}

/// A container as the running service holds it.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) sandbox_id: String,
    /// One of start, update, remove at a time. Stopping does not take it: it must get through.
    pub(crate) operation: Mutex<()>,
    /// Held over every change of the record, and over a start from asking the keeper to having the result on disk, so
    /// that an exit is always recorded after the start it belongs to.
    pub(crate) change: Mutex<()>,
    pub(crate) stopping: StdMutex<Stopping>,
    pub(crate) exited: watch::Sender<bool>,
    pub(crate) deadline_changed: tokio::sync::Notify,
    pub(crate) cpu_sample: StdMutex<Option<CpuSample>>,
    pub(crate) layer_usage: StdMutex<Option<(Instant, Usage)>>,
    pid: AtomicU32,
    record: RwLock<Arc<Record>>,
}

impl Container {
    pub(crate) fn new(record: Record) -> Self {
        let exited = matches!(record.phase, Phase::Exited(_));
        Self {
            id: record.id.clone(),
            sandbox_id: record.sandbox_id.clone(),
            operation: Mutex::default(),
            change: Mutex::default(),
            stopping: StdMutex::default(),
            exited: watch::Sender::new(exited),
            deadline_changed: tokio::sync::Notify::new(),
            cpu_sample: StdMutex::default(),
            layer_usage: StdMutex::default(),
            pid: AtomicU32::new(0),
            record: RwLock::new(Arc::new(record)),
        }
    }

    /// Init's process id, while it runs.
    pub(crate) fn pid(&self) -> Option<u32> {
        let pid = self.pid.load(Ordering::Acquire);
        (pid != 0 && self.is_running()).then_some(pid)
    }

    pub(crate) fn set_pid(&self, pid: u32) {
        self.pid.store(pid, Ordering::Release);
    }

    pub(crate) fn record(&self) -> Arc<Record> {
        self.record.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn replace(&self, record: Record) {
        let exited = matches!(record.phase, Phase::Exited(_));
        *self.record.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(record);
        self.exited.send_replace(exited);
    }

    pub(crate) fn is_running(&self) -> bool {
        matches!(self.record().phase, Phase::Running { .. })
    }

    pub(crate) fn state_name(&self) -> &'static str {
        match self.record().phase {
            Phase::Created => "created",
            Phase::Running { .. } => "running",
            Phase::Exited(_) => "exited",
        }
    }
}

/// What makes a container unique.
pub(crate) fn name(metadata: &ContainerMetadata, sandbox: &PodSandboxMetadata) -> String {
    format!("{}_{}_{}_{}_{}", metadata.name, sandbox.name, sandbox.namespace, sandbox.uid, metadata.attempt)
}
