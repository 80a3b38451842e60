//! Host devices that a container may see.

use super::SpecError;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};
use orlop_proto::cri::Device;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// A device node as it is to appear, and what may be done with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DeviceNode {
    pub(crate) path: PathBuf,
    pub(crate) kind: LinuxDeviceType,
    pub(crate) major: i64,
    pub(crate) minor: i64,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) access: String,
}

impl DeviceNode {
    pub(crate) fn to_oci(&self) -> LinuxDevice {
        let mut device = LinuxDevice::default();
        device
            .set_path(self.path.clone())
            .set_typ(self.kind)
            .set_major(self.major)
            .set_minor(self.minor)
            .set_file_mode(Some(self.mode))
            .set_uid(Some(self.uid))
            .set_gid(Some(self.gid));
        device
    }

    pub(crate) fn rule(&self) -> LinuxDeviceCgroup {
        let mut rule = LinuxDeviceCgroup::default();
        rule.set_allow(true)
            .set_typ(Some(self.kind))
            .set_major(Some(self.major))
            .set_minor(Some(self.minor))
            .set_access(Some(self.access.clone()));
        rule
    }
}

fn node(host: &Path, container: &Path, access: &str) -> io::Result<Option<DeviceNode>> {
    let metadata = fs::metadata(host)?;
    let kind = if metadata.file_type().is_char_device() {
        LinuxDeviceType::C
    } else if metadata.file_type().is_block_device() {
        LinuxDeviceType::B
    } else {
        return Ok(None);
    };
    Ok(Some(DeviceNode {
        path: container.to_owned(),
        kind,
        major: i64::from(rustix::fs::major(metadata.rdev())),
        minor: i64::from(rustix::fs::minor(metadata.rdev())),
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        access: access.to_owned(),
    }))
}

/// The nodes behind the devices of a container's configuration. A directory stands for every device below it.
pub(crate) fn resolve(devices: &[Device]) -> Result<Vec<DeviceNode>, SpecError> {
    let mut nodes = Vec::new();
    for device in devices {
        let host = Path::new(&device.host_path);
        let container = Path::new(if device.container_path.is_empty() {
            &device.host_path
        } else {
            &device.container_path
        });
        let access = if device.permissions.is_empty() { "rwm" } else { &device.permissions };
        if access.chars().any(|c| !"rwm".contains(c)) {
            return Err(SpecError::Invalid {
                field: "device permissions",
                reason: format!("{access:?} holds more than r, w and m"),
            });
        }
        let error = |source| SpecError::Device { path: host.to_owned(), source };
        let before = nodes.len();
        if fs::metadata(host).map_err(error)?.is_dir() {
            walk(host, container, access, &mut nodes).map_err(error)?;
        } else {
            nodes.extend(node(host, container, access).map_err(error)?);
        }
        if nodes.len() == before {
            return Err(SpecError::NotADevice(host.to_owned()));
        }
    }
    Ok(nodes)
}

fn walk(host: &Path, container: &Path, access: &str, nodes: &mut Vec<DeviceNode>) -> io::Result<()> {
    for entry in fs::read_dir(host)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let target = container.join(entry.file_name());
        if kind.is_dir() {
            walk(&entry.path(), &target, access, nodes)?;
        } else if kind.is_char_device() || kind.is_block_device() {
            nodes.extend(node(&entry.path(), &target, access)?);
        }
    }
    Ok(())
}

/// Every device of the host, for a privileged container. What belongs to one terminal session or is made by the
/// runtime itself is left out.
pub(crate) fn all_of_host() -> Result<Vec<DeviceNode>, SpecError> {
    const OWN: [&str; 5] = ["pts", "shm", "mqueue", "fd", "console"];
    let dev = Path::new("/dev");
    let error = |source| SpecError::Device { path: dev.to_owned(), source };
    let names: BTreeSet<PathBuf> = fs::read_dir(dev)
        .map_err(error)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| path.file_name().is_none_or(|n| !OWN.iter().any(|own| n == *own)))
        .collect();
    let mut nodes = Vec::new();
    for path in names {
        // Devices come and go while we look: one that is gone is not wanted.
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        if metadata.is_dir() {
            let _ = walk(&path, &path, "rwm", &mut nodes);
        } else if let (false, Ok(found)) = (metadata.is_symlink(), node(&path, &path, "rwm")) {
            nodes.extend(found);
        }
    }
    Ok(nodes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(host: &str, permissions: &str) -> Device {
        Device { host_path: host.into(), container_path: "/dev/x".into(), permissions: permissions.into() }
    }

    #[test]
    fn a_device_keeps_its_numbers_under_another_name() {
        let nodes = resolve(&[device("/dev/null", "rw")]).unwrap();
        assert_eq!((nodes[0].major, nodes[0].minor, nodes[0].kind), (1, 3, LinuxDeviceType::C));
        assert_eq!(nodes[0].path, Path::new("/dev/x"));
        assert_eq!(nodes[0].rule().access().as_deref(), Some("rw"));
    }

    #[test]
    fn what_is_no_device_is_refused() {
        assert!(matches!(resolve(&[device("/etc/passwd", "")]), Err(SpecError::NotADevice(_))));
        assert!(matches!(resolve(&[device("/dev/nothing-here", "")]), Err(SpecError::Device { .. })));
        assert!(matches!(resolve(&[device("/dev/null", "rx")]), Err(SpecError::Invalid { .. })));
    }

    #[test]
    fn a_privileged_container_sees_the_hosts_devices_once_each() {
        let nodes = all_of_host().unwrap();
        assert!(nodes.iter().any(|n| n.path == Path::new("/dev/null")));
        assert!(!nodes.iter().any(|n| n.path.starts_with("/dev/pts")));
        let unique: BTreeSet<_> = nodes.iter().map(|n| &n.path).collect();
        assert_eq!(unique.len(), nodes.len());
    }
}
