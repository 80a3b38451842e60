//! Kernel parameters of a container: only those that belong to one of its own namespaces.

use crate::inroot::{self, Root};
use crate::namespaces::Namespaces;
use oci_spec::runtime::LinuxNamespaceType as Type;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("sysctl {0:?} is not in a separate kernel namespace")]
    NotNamespaced(String),
    #[error("sysctl {0:?} conflicts with the hostname of the specification")]
    Hostname(String),
    #[error("sysctl {0:?} is not a valid name")]
    Name(String),
    #[error("write sysctl {key}")]
    Write { key: String, source: io::Error },
}

const IPC: [&str; 8] = ["msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced"];

pub(crate) fn validate(sysctls: &HashMap<String, String>, namespaces: &Namespaces) -> Result<(), Error> {
    for key in sysctls.keys() {
        let dotted = key.replace('/', ".");
        if dotted.split('.').any(str::is_empty) {
            return Err(Error::Name(key.clone()));
        }
        let owner = match dotted.split_once('.') {
            Some(("net", _)) => Type::Network,
            Some(("kernel", "domainname")) => Type::Uts,
            Some(("kernel", "hostname")) => return Err(Error::Hostname(key.clone())),
            Some(("kernel", name)) if IPC.contains(&name) => Type::Ipc,
            Some(("fs", name)) if name.starts_with("mqueue.") => Type::Ipc,
            _ => return Err(Error::NotNamespaced(key.clone())),
        };
        if !namespaces.has(owner) {
            return Err(Error::NotNamespaced(key.clone()));
        }
    }
    Ok(())
}

/// Writes them through a proc of our own making where possible; else through the container's, verified to be one, as
/// what the image shows at /proc may be a trap.
pub(crate) fn write(root: &Root, sysctls: &HashMap<String, String>) -> Result<(), Error> {
    if sysctls.is_empty() {
        return Ok(());
    }
    let fail = |key: &str, source: io::Error| Error::Write { key: key.to_owned(), source };
    let proc = private_proc()
        .or_else(|_| {
            let proc = root.resolve(Path::new("/proc"))?;
            if inroot::fs_magic(&proc)? == inroot::PROC_MAGIC {
                Ok(proc)
            } else {
                Err(rustix::io::Errno::XDEV.into())
            }
        })
        .map_err(|source| fail("(open proc)", source))?;
    for (key, value) in sysctls {
        // A slash in the key is part of the path already; then dots are part of a name (net/ipv4/conf/eth0.1/…).
        let name = if key.contains('/') { key.clone() } else { key.replace('.', "/") };
        let write = || -> io::Result<()> {
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
            let flags = OFlags::WRONLY | OFlags::CLOEXEC;
            let file = rustix::fs::openat2(&proc, format!("sys/{name}"), flags, Mode::empty(), resolve)?;
            rustix::io::write(&file, value.as_bytes())?;
            Ok(())
        };
        write().map_err(|source| fail(key, source))?;
    }
    Ok(())
}

fn private_proc() -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("proc", rustix::mount::FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&context)?;
    Ok(crate::mounts::apply::mount_context(&context, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(key: &str, namespaces: &str) -> Result<(), Error> {
        let namespaces = Namespaces::plan(&serde_json::from_str::<Vec<_>>(namespaces).unwrap()).unwrap();
        validate(&HashMap::from([(key.to_owned(), "1".to_owned())]), &namespaces)
    }

    #[test]
    fn only_what_a_namespace_of_the_container_owns_may_be_set() {
        let own = r#"[{"type":"network"},{"type":"ipc"},{"type":"uts"}]"#;
        for key in ["net.ipv4.ip_forward", "kernel.shmmax", "fs.mqueue.msg_max", "kernel.domainname"] {
            check(key, own).unwrap();
            assert!(matches!(check(key, "[]"), Err(Error::NotNamespaced(_))), "{key}");
        }
        for key in ["kernel.core_pattern", "vm.overcommit_memory", "net..x", "kernel.hostname"] {
            assert!(check(key, own).is_err(), "{key}");
        }
    }
}
