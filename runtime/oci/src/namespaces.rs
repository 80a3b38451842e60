//! Which namespaces a container gets: new ones, and existing ones joined by path.

use nix::sched::CloneFlags;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType as Type};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::thread::LinkNameSpaceType;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("namespace {0} is listed twice")]
    Duplicate(Type),
    #[error("time namespaces are not supported yet")]
    Time,
    #[error("open namespace {kind} at {}", .path.display())]
    Open { kind: Type, path: PathBuf, source: io::Error },
    #[error("join namespace {kind} at {}", .path.display())]
    Join { kind: Type, path: PathBuf, source: io::Error },
    #[error("make new namespaces")]
    Make { source: io::Error },
}

/// A namespace to join, opened before anything else happens, so that its path is looked up in the caller's view.
#[derive(Debug)]
pub(crate) struct Join {
    pub(crate) kind: Type,
    path: PathBuf,
    pub(crate) fd: OwnedFd,
}

impl Join {
    pub(crate) fn new(kind: Type, path: PathBuf) -> Result<Self, Error> {
        match rustix::fs::openat(
            CWD,
            &path,
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
            Mode::empty(),
        ) {
            Ok(fd) => Ok(Self { kind, path, fd }),
            Err(errno) => Err(Error::Open { kind, path, source: errno.into() }),
        }
    }

    /// The kernel checks that the descriptor is a namespace of this type.
    pub(crate) fn enter(&self) -> Result<(), Error> {
        rustix::thread::move_into_link_name_space(self.fd.as_fd(), Some(link_type(self.kind)))
            .map_err(|errno| Error::Join { kind: self.kind, path: self.path.clone(), source: errno.into() })
    }
}

fn link_type(kind: Type) -> LinkNameSpaceType {
    match kind {
        Type::Mount => LinkNameSpaceType::Mount,
        Type::Cgroup => LinkNameSpaceType::ControlGroup,
        Type::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
        Type::Ipc => LinkNameSpaceType::InterProcessCommunication,
        Type::User => LinkNameSpaceType::User,
        Type::Pid => LinkNameSpaceType::ProcessID,
        Type::Network => LinkNameSpaceType::Network,
        Type::Time => LinkNameSpaceType::Time,
    }
}

/// The plan for a container's namespaces.
#[derive(Debug, Default)]
pub(crate) struct Namespaces {
    new: Vec<Type>,
    pub(crate) joins: Vec<Join>,
}

impl Namespaces {
    pub(crate) fn plan(listed: &[LinuxNamespace]) -> Result<Self, Error> {
        let mut plan = Self::default();
        for namespace in listed {
            let kind = namespace.typ();
            if plan.has(kind) {
                return Err(Error::Duplicate(kind));
            }
            if kind == Type::Time {
                return Err(Error::Time);
            }
            match namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty()) {
                Some(path) => plan.joins.push(Join::new(kind, path.clone())?),
                None => plan.new.push(kind),
            }
        }
        Ok(plan)
    }

    pub(crate) fn is_new(&self, kind: Type) -> bool {
        self.new.contains(&kind)
    }

    pub(crate) fn joined(&self, kind: Type) -> Option<&Join> {
        self.joins.iter().find(|join| join.kind == kind)
    }

    /// Not the caller's own.
    pub(crate) fn has(&self, kind: Type) -> bool {
        self.is_new(kind) || self.joined(kind).is_some()
    }

    /// Another user namespace must be entered before the other new namespaces are made, or it would not own them; and
    /// after the joined ones are joined, which its owner may not be allowed to. A new PID namespace then takes one
    /// more fork.
    pub(crate) fn needs_stage(&self) -> bool {
        self.joined(Type::User).is_some() || (self.is_new(Type::User) && !self.joins.is_empty())
    }

    /// Flags for clone3. The cgroup namespace is not among them: made at the clone it would have the caller's cgroup
    /// as its root, not the container's.
    pub(crate) fn clone_flags(&self) -> u64 {
        self.new.iter().filter(|kind| **kind != Type::Cgroup).fold(0, |flags, kind| flags | *kind as u64)
    }
}

/// Moves the caller into new namespaces; `flags` as for clone.
pub(crate) fn unshare(flags: u64) -> Result<(), Error> {
    let flags = CloneFlags::from_bits_retain(i32::try_from(flags).unwrap_or_default());
    nix::sched::unshare(flags).map_err(|errno| Error::Make { source: errno.into() })
}

/// While it lives, children of this process are born in another PID namespace.
#[derive(Debug)]
pub(crate) struct ChildrenIn {
    own: OwnedFd,
}

impl ChildrenIn {
    pub(crate) fn enter(join: &Join) -> Result<Self, Error> {
        let own = Join::new(Type::Pid, "/proc/self/ns/pid".into())?.fd;
        join.enter()?;
        Ok(Self { own })
    }
}

impl Drop for ChildrenIn {
    fn drop(&mut self) {
        let back =
            rustix::thread::move_into_link_name_space(self.own.as_fd(), Some(LinkNameSpaceType::ProcessID));
        if let Err(error) = back {
            tracing::error!(%error, "cannot return to the runtime's own PID namespace");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<Namespaces, Error> {
        Namespaces::plan(&serde_json::from_str::<Vec<_>>(json).unwrap())
    }

    #[test]
    fn a_type_listed_twice_is_refused() {
        assert!(matches!(plan(r#"[{"type":"pid"},{"type":"pid"}]"#), Err(Error::Duplicate(Type::Pid))));
    }

    #[test]
    fn the_cgroup_namespace_is_not_made_by_the_clone() {
        let namespaces = plan(r#"[{"type":"pid"},{"type":"cgroup"},{"type":"mount"}]"#).unwrap();
        assert_eq!(namespaces.clone_flags(), 0x2000_0000 | 0x0002_0000);
        assert!(namespaces.has(Type::Cgroup));
    }

    #[test]
    fn joining_beside_a_user_namespace_takes_a_stage() {
        assert!(!plan(r#"[{"type":"user"},{"type":"pid"}]"#).unwrap().needs_stage());
        assert!(
            plan(r#"[{"type":"user"},{"type":"network","path":"/proc/self/ns/net"}]"#).unwrap().needs_stage()
        );
        assert!(plan(r#"[{"type":"user","path":"/proc/self/ns/user"}]"#).unwrap().needs_stage());
    }
}
