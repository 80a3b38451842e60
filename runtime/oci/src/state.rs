//! What is known about a container on disk.
//!
//! ```text
//! <root>/                0700
//!   <id>/                0711
//!     state.json         this module's `State`, replaced atomically
//!     process.json       the specification's process, the template for exec
//!     seccomp.bpf        the compiled filter, for processes that join later
//!     start              socket on which the created container waits for start; unlinked by start
//! ```

use crate::id::ContainerId;
use crate::seccomp::Compiled;
use crate::syscall::seccomp::Filter;
use oci_spec::runtime::{Hook, Process};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// The newest version of the specification that is implemented.
pub const OCI_VERSION: &str = "1.3.0";

/// A container's status as the OCI specification names it, and `paused`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("make state directory {}", .path.display())]
    Make { path: PathBuf, source: io::Error },
    #[error("write {}", .path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("read {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not a state file of this version", .path.display())]
    Parse { path: PathBuf, source: serde_json::Error },
    #[error("remove state directory {}", .path.display())]
    Remove { path: PathBuf, source: io::Error },
}

/// The record of a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) version: u32,
    pub(crate) id: String,
    pub(crate) pid: u32,
    /// Start time of `pid` in clock ticks: tells it from a later process of the same number.
    pub(crate) started: u64,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: PathBuf,
    /// RFC 3339.
    pub(crate) created: String,
    pub(crate) annotations: HashMap<String, String>,
    pub(crate) cgroup: PathBuf,
    pub(crate) skip_missing_controllers: bool,
    pub(crate) pid_namespace: bool,
    pub(crate) user_namespace: bool,
    /// Set-up is complete.
    pub(crate) ready: bool,
    pub(crate) poststart: Vec<Hook>,
    pub(crate) poststop: Vec<Hook>,
}

pub(crate) const VERSION: u32 = 1;

impl State {
    /// The JSON that hooks read and the `state` command prints.
    pub(crate) fn document(&self, status: Status) -> serde_json::Value {
        let mut document = serde_json::json!({
            "ociVersion": OCI_VERSION,
            "id": self.id,
            "status": status.to_string(),
            "pid": if status == Status::Stopped { 0 } else { self.pid },
            "bundle": self.bundle,
        });
        if !self.annotations.is_empty()
            && let Some(fields) = document.as_object_mut()
        {
            fields.insert("annotations".to_owned(), serde_json::json!(self.annotations));
        }
        document
    }

    pub(crate) fn for_hooks(&self, status: Status) -> Vec<u8> {
        self.document(status).to_string().into_bytes()
    }
}

/// The directory of one container.
#[derive(Debug, Clone)]
pub(crate) struct StateDir {
    path: PathBuf,
}

impl StateDir {
    pub(crate) fn of(root: &Path, id: &ContainerId) -> Self {
        Self { path: root.join(id.as_str()) }
    }

    /// Makes it; `AlreadyExists` is the caller's to interpret.
    pub(crate) fn create(&self) -> io::Result<()> {
        if let Some(root) = self.path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(root)?;
        }
        fs::DirBuilder::new().mode(0o711).create(&self.path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A handle for names below it; keeps socket paths short.
    pub(crate) fn open(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::open(&self.path, flags, Mode::empty())?)
    }

    fn replace(&self, name: &str, content: &[u8]) -> Result<(), Error> {
        let (path, temporary) = (self.path.join(name), self.path.join(format!(".{name}.new")));
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(content)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)
        };
        write().map_err(|source| Error::Write { path: path.clone(), source })
    }

    pub(crate) fn save(&self, state: &State) -> Result<(), Error> {
        let json = serde_json::to_vec(state)
            .map_err(|source| Error::Parse { path: self.path.join("state.json"), source })?;
        self.replace("state.json", &json)
    }

    /// `None` when there is no such container.
    pub(crate) fn load(&self) -> Result<Option<State>, Error> {
        let path = self.path.join("state.json");
        match fs::read(&path) {
            Ok(json) => match serde_json::from_slice::<State>(&json) {
                Ok(state) => Ok(Some(state)),
                Err(source) => Err(Error::Parse { path, source }),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::Read { path, source }),
        }
    }

    pub(crate) fn save_process(&self, process: &Process) -> Result<(), Error> {
        let path = self.path.join("process.json");
        let json = serde_json::to_vec(process).map_err(|source| Error::Parse { path, source })?;
        self.replace("process.json", &json)
    }

    pub(crate) fn load_process(&self) -> Result<Process, Error> {
        let path = self.path.join("process.json");
        let json = fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        serde_json::from_slice(&json).map_err(|source| Error::Parse { path, source })
    }

    /// Flags, then the instructions, little-endian as in memory.
    pub(crate) fn save_seccomp(&self, compiled: &Compiled) -> Result<(), Error> {
        let mut bytes = compiled.flags.to_le_bytes().to_vec();
        for step in &compiled.filter {
            bytes.extend(step.code.to_le_bytes());
            bytes.extend([step.jump_true, step.jump_false]);
            bytes.extend(step.value.to_le_bytes());
        }
        self.replace("seccomp.bpf", &bytes)
    }

    pub(crate) fn load_seccomp(&self) -> Result<Option<Compiled>, Error> {
        let path = self.path.join("seccomp.bpf");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::Read { path, source }),
        };
        let mut words = bytes.chunks_exact(8).filter_map(|word| <[u8; 8]>::try_from(word).ok());
        let flags = words.next().map(u64::from_le_bytes).unwrap_or_default();
        let filter = words.map(|[a, b, jump_true, jump_false, v @ ..]| Filter {
            code: u16::from_le_bytes([a, b]),
            jump_true,
            jump_false,
            value: u32::from_le_bytes(v),
        });
        Ok(Some(Compiled { filter: filter.collect(), flags }))
    }

    /// Removes it with all its files; absence is success.
    pub(crate) fn remove(&self) -> Result<(), Error> {
        match fs::remove_dir_all(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(Error::Remove { path: self.path.clone(), source })
            }
            _ => Ok(()),
        }
    }
}

/// The start time of a process, and `None` for one that is gone or a zombie.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may contain anything; what follows its closing bracket does not. State is field 3, start time 22.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compiled_filter_survives_the_disk() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::of(root.path(), &ContainerId::new("x").unwrap());
        dir.create().unwrap();
        assert_eq!(dir.load_seccomp().unwrap(), None);
        let filter = vec![Filter { code: 0x15, jump_true: 1, jump_false: 2, value: 0xdead_beef }];
        let compiled = Compiled { filter, flags: 6 };
        dir.save_seccomp(&compiled).unwrap();
        assert_eq!(dir.load_seccomp().unwrap(), Some(compiled));
        assert!(dir.load().unwrap().is_none());
        dir.remove().unwrap();
        dir.remove().unwrap();
    }

    #[test]
    fn this_process_has_a_start_time_and_an_impossible_one_has_none() {
        assert!(start_time(std::process::id()).is_some());
        assert_eq!(start_time(u32::MAX), None);
    }
}
