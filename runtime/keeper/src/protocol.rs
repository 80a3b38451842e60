//! What agent and keeper say to each other: one JSON message per packet of a `SOCK_SEQPACKET` socket, descriptors
//! beside it as ancillary data.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The overlay that becomes a container's root. The container's init mounts it inside its own mount namespace, so the
/// host never sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overlay {
    /// Read-only layers, the topmost first.
    pub lower: Vec<PathBuf>,
    /// The writable layer.
    pub upper: PathBuf,
    /// The kernel's scratch directory, on the file system of `upper`.
    pub work: PathBuf,
}

/// Where a container's output goes, in the log format of the CRI.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogTarget {
    pub path: PathBuf,
    /// The file is rotated before it would grow beyond this; 0 means never.
    pub max_bytes: u64,
    /// How many files are kept, the current one included.
    pub max_files: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateContainer {
    pub id: String,
    /// Holds `config.json`; its `root.path` is the mount point of `rootfs`.
    pub bundle: PathBuf,
    pub rootfs: Option<Overlay>,
    pub log: Option<LogTarget>,
    pub tty: bool,
    pub stdin: bool,
    /// Close the container's standard input when the first attached client goes.
    pub stdin_once: bool,
}

/// Run one more process in a container. Its standard streams travel as descriptors beside the message; with `tty` none
/// do, and the reply carries the terminal's master.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecProcess {
    pub container: String,
    pub exec_id: String,
    pub process: Box<oci_spec::runtime::Process>,
    pub tty: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    Created,
    Running,
    Exited,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The process's own code, or 128 plus the signal that ended it.
    pub code: i32,
    /// The container's cgroup counted an out-of-memory kill.
    pub oom_killed: bool,
    /// Nanoseconds since the epoch.
    pub finished_at: i64,
}

/// What the keeper knows about one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerView {
    pub id: String,
    pub phase: Phase,
    /// Init's process id in the keeper's PID namespace; 0 once it has exited.
    pub pid: u32,
    pub created_at: i64,
    /// 0 until started.
    pub started_at: i64,
    pub exit: Option<Exit>,
}

/// What the keeper tells the agent unasked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// Repeated on every new connection until acknowledged.
    ContainerExited {
        id: String,
        exit: Exit,
    },
    ExecExited {
        container: String,
        exec_id: String,
        exit: Exit,
    },
}

/// What the agent asks. `id` is chosen by the agent and comes back with the answer, so many requests can be under way.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Request {
    pub id: u64,
    pub call: Call,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    Create(CreateContainer),
    Start {
        id: String,
    },
    Kill {
        id: String,
        signal: i32,
        all: bool,
    },
    Delete {
        id: String,
    },
    List,
    Exec(ExecCall),
    /// Answered when the process has ended; the keeper keeps the exit until [`Call::AcknowledgeExec`].
    WaitExec {
        container: String,
        exec_id: String,
    },
    AcknowledgeExec {
        container: String,
        exec_id: String,
    },
    KillExec {
        container: String,
        exec_id: String,
        signal: i32,
    },
    Attach {
        id: String,
    },
    ReopenLog {
        id: String,
    },
    Acknowledge {
        id: String,
    },
    /// Send events to this connection from now on, exits that nobody has acknowledged first.
    Subscribe,
    /// Replace the program by the file at `binary` (or by its own path), keeping everything.
    Reexec {
        binary: Option<PathBuf>,
    },
}

/// [`ExecProcess`] and which of its streams travel beside the message, in this order.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecCall {
    pub process: ExecProcess,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

/// One packet from keeper to agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromKeeper {
    Reply { id: u64, result: Result<Answer, Failure> },
    Event(Event),
}

/// A successful answer. Descriptors travel beside it in the order of the fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Done,
    Container(ContainerView),
    Containers(Vec<ContainerView>),
    Exec { pid: u32, console: bool },
    Exit(Exit),
    Attached { stdin: bool, stderr: bool, console: bool },
}

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    #[error("container {0} does not exist")]
    NoSuchContainer(String),
    #[error("{0}")]
    Refused(String),
    #[error("malformed request: {0}")]
    Malformed(String),
}
