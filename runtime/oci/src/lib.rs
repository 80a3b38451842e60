//! An OCI runtime as a library: containers made by `clone3` straight into their final cgroup, set up by a state machine
//! that never blocks its caller, and run without a process of ours beside them.
//!
//! ```text
//! create(CreateRequest) -> Starting --advance()--> Created(Container) --start()--> running --delete()--> gone
//! Container::exec(ExecRequest) -> StartingExec --advance()--> Running(ExecProcess)
//! ```
//!
//! The caller must be single-threaded (the child continues with ordinary code after a fork) and is the parent of every
//! process made here. [`exe::protect`] belongs at the top of its `main`.

mod capabilities;
pub mod cgroup;
mod channel;
pub mod cli;
mod console;
pub mod container;
pub mod create;
mod devices;
pub mod error;
pub mod exe;
pub mod exec;
mod hooks;
pub mod id;
mod init;
mod inroot;
mod mounts;
mod namespaces;
mod process;
pub mod request;
mod rootfs;
mod seccomp;
pub mod state;
mod syscall;
mod sysctl;

pub use container::Container;
pub use create::{Progress, Starting, create};
pub use error::Error;
pub use exec::{ExecProcess, ExecProgress, StartingExec};
pub use id::ContainerId;
pub use request::{CreateRequest, ExecRequest, Overlay, Rootfs, Stdio};
pub use state::Status;
