//! Who may read a pod's files: `fsGroup`, and the one user that all containers run as, if there is one.

use k8s_openapi::api::core::v1::Pod;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

const SET_GROUP_ID: u32 = 0o2000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Ownership {
    pub(super) fs_group: Option<u32>,
    pub(super) user: Option<u32>,
}

impl Ownership {
    pub(super) fn of(pod: &Pod) -> Self {
        let Some(spec) = &pod.spec else { return Self::default() };
        let context = spec.security_context.as_ref();
        let of_pod = context.and_then(|context| context.run_as_user);
        let mut users =
            spec.init_containers.iter().flatten().chain(&spec.containers).map(|container| {
                container.security_context.as_ref().and_then(|own| own.run_as_user).or(of_pod)
            });
        let first = users.next().flatten();
        let common = first.filter(|_| users.all(|user| user == first));
        let id = |id: Option<i64>| id.and_then(|id| u32::try_from(id).ok());
        Self { fs_group: id(context.and_then(|context| context.fs_group)), user: id(common) }
    }

    /// A read-only file's mode once its group is allowed to read it.
    pub(super) fn file_mode(self, mode: u32) -> u32 {
        if self.fs_group.is_some() { mode | 0o440 } else { mode }
    }

    pub(super) fn directory_mode(self, mode: u32) -> u32 {
        if self.fs_group.is_some() { mode | 0o550 | SET_GROUP_ID } else { mode }
    }
}

/// Hands a writable directory to a group. What is in it already was made under the same rule.
pub(super) fn share_with_group(dir: &Path, group: u32) -> io::Result<()> {
    let metadata = dir.symlink_metadata()?;
    if metadata.gid() == group && metadata.mode() & SET_GROUP_ID != 0 {
        return Ok(());
    }
    chown(dir, None, Some(group))?;
    let mode = metadata.mode() & 0o7777 | 0o770 | SET_GROUP_ID;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode))
}
