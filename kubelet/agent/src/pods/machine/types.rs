//! What goes into the state machine, what comes out of it, and the pieces of its state.

use crate::pods::backoff::Backoff;
use crate::pods::events::PodEvent;
use crate::pods::parts::{ContainerKind, ProbeOutcome, ProbeTarget};
use crate::pods::runtime_state::{ContainerRecord, PodRuntime, SandboxRecord};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod};
use orlop_proto::cri;
use std::sync::Arc;

/// Where a pod's specification comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Api,
    File,
}

/// What the pod is to become.
#[derive(Debug, Clone, PartialEq)]
pub enum Goal {
    Run,
    Stop(Stopping),
}

/// A pod on its way down.
#[derive(Debug, Clone, PartialEq)]
pub struct Stopping {
    /// When the grace of everything in the pod ends.
    pub until: Timestamp,
    /// All its containers ended by themselves.
    pub finished: bool,
    /// Its API object carries a deletion timestamp.
    pub deleted: bool,
    /// Its API object, or its manifest, exists no more.
    pub gone: bool,
    pub verdict: Option<Verdict>,
    pub teardown: Stage,
    pub purge: Stage,
    pub delete_asked: bool,
    /// The prober knows that the pod is on its way down.
    pub probes_told: bool,
}

impl Stopping {
    #[must_use]
    pub fn new(until: Timestamp) -> Self {
        Self {
            until,
            finished: false,
            deleted: false,
            gone: false,
            verdict: None,
            teardown: Stage::Idle,
            purge: Stage::Idle,
            delete_asked: false,
            probes_told: false,
        }
    }
}

/// The kubelet's own decision that a pod has failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub reason: String,
    pub message: String,
    /// It was never let in: no container of it has run.
    pub rejected: bool,
}

impl Verdict {
    #[must_use]
    pub fn deadline_exceeded() -> Self {
        Self {
            reason: "DeadlineExceeded".to_owned(),
            message: "Pod was active on the node longer than the specified deadline".to_owned(),
            rejected: false,
        }
    }
}

/// A piece of work that is done once, or tried again after a failure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    Idle,
    Busy { failures: u32 },
    Done,
    Failed { retry: Timestamp, failures: u32, message: String },
}

impl Stage {
    pub(super) fn begin(&mut self) {
        *self = Self::Busy { failures: self.failures() };
    }

    pub(super) fn failures(&self) -> u32 {
        match self {
            Self::Busy { failures } | Self::Failed { failures, .. } => *failures,
            Self::Idle | Self::Done => 0,
        }
    }

    #[must_use]
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Busy { .. })
    }
}

/// What is being done for a container right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    Idle,
    Pulling,
    Starting,
}

/// What we know of one container of the specification beyond what the runtime tells.
#[derive(Debug, Clone)]
pub struct Track {
    pub work: Work,
    /// Pulled and waiting for its container.
    pub image: Option<PulledImage>,
    /// Why it does not run.
    pub blocked: Option<Blocked>,
    pub crash: Backoff,
    pub pull: Backoff,
    pub start_failures: u32,
    /// Whose health `started` and `ready` tell.
    pub health_of: String,
    pub started: bool,
    pub ready: bool,
    pub has_readiness: bool,
    pub probed: bool,
    /// The back-off after the container that ended then has been told.
    pub told_backoff: Option<Timestamp>,
}

impl Track {
    #[must_use]
    pub fn new(crash: Backoff) -> Self {
        let pull = Backoff::new(SignedDuration::from_secs(10), SignedDuration::from_secs(300));
        Self {
            work: Work::Idle,
            image: None,
            blocked: None,
            crash,
            pull,
            start_failures: 0,
            health_of: String::new(),
            started: false,
            ready: false,
            has_readiness: false,
            probed: false,
            told_backoff: None,
        }
    }
}

/// Why a container waits, and until when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocked {
    pub failure: StartFailure,
    pub since: Timestamp,
    pub until: Timestamp,
}

impl Blocked {
    #[must_use]
    pub fn new(failure: StartFailure, since: Timestamp, until: Timestamp) -> Self {
        Self { failure, since, until }
    }
}

/// The waiting reason and message of a container that could not be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartFailure {
    pub reason: String,
    pub message: String,
}

/// An image that is on this machine.
#[derive(Debug, Clone, PartialEq)]
pub struct PulledImage {
    pub image: cri::Image,
    pub image_ref: String,
}

/// What is to be done. Each action that has a result answers with the event named beside it.
#[derive(Debug, Clone)]
pub enum Action {
    /// `Observed` or `ObservationFailed`.
    Inspect {
        epoch: u64,
    },
    /// Cgroup and directories: `HostPrepared`.
    PrepareHost,
    /// `Mounted`.
    Mount,
    /// `SandboxCreated`.
    CreateSandbox {
        attempt: u32,
    },
    /// `SandboxStopped`.
    StopSandbox {
        id: String,
    },
    /// `ImageReady`.
    EnsureImage {
        container: Box<Container>,
    },
    /// `ContainerStarted`.
    StartContainer(Box<StartRequest>),
    /// `ContainerKilled`.
    Kill(Box<KillRequest>),
    /// Dead containers and then dead sandboxes: `Removals`.
    Remove {
        containers: Vec<ContainerRecord>,
        sandboxes: Vec<String>,
    },
    StartProbes(Box<ProbeTarget>),
    StopProbes {
        container_id: String,
    },
    /// All but readiness probes of the whole pod.
    TerminateProbes,
    /// Volumes and cgroup: `TornDown`.
    TearDown,
    /// The API object, after its final status: `ApiDeleted`.
    DeleteFromApi,
    /// All containers, sandboxes, logs and directories: `Purged`.
    Purge {
        containers: Vec<ContainerRecord>,
        sandboxes: Vec<String>,
    },
    Report(PodEvent, Arc<Pod>),
}

#[derive(Debug, Clone)]
pub struct StartRequest {
    pub container: Container,
    pub kind: ContainerKind,
    pub attempt: u32,
    pub image: PulledImage,
    pub sandbox: SandboxRecord,
}

#[derive(Debug, Clone, PartialEq)]
pub struct KillRequest {
    pub record: ContainerRecord,
    /// Seconds for the preStop hook and the container's own ending together.
    pub grace_seconds: i64,
    /// A kill of this container is under way: only the remaining time becomes shorter.
    pub hurry: bool,
}

/// What happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// A moment the machine had asked to be woken at.
    Tick,
    /// Something happened in the runtime, or it is time for an audit.
    Look,
    Updated(Arc<Pod>),
    /// The source has the pod no more.
    Removed,
    /// The kubelet decided that the pod must end.
    Stop(Verdict),
    Observed {
        epoch: u64,
        runtime: PodRuntime,
    },
    ObservationFailed,
    HostPrepared(Result<(), String>),
    Mounted(Result<(), String>),
    SandboxCreated(Result<SandboxRecord, String>),
    SandboxStopped {
        id: String,
        result: Result<(), String>,
    },
    ImageReady {
        container: String,
        result: Result<PulledImage, StartFailure>,
    },
    ContainerStarted {
        container: String,
        result: Result<ContainerRecord, StartFailure>,
    },
    ContainerKilled {
        id: String,
        result: Result<ContainerRecord, String>,
    },
    Removals {
        ids: Vec<String>,
    },
    Probe(ProbeOutcome),
    TornDown(Result<(), String>),
    ApiDeleted,
    Purged(Result<(), String>),
}
