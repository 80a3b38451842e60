//! Directories and tmpfs mounts that hold volumes. What is mounted already is kept, so a restart of ours changes nothing.

use crate::volumes::atomic;
use crate::volumes::error::VolumeCause;
use crate::volumes::ownership::{self, Ownership};
use crate::volumes::payload::Payload;
use crate::volumes::plan::{EmptyDir, Files, Medium};
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;
use std::ffi::CString;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

const OPEN_TO_ALL: u32 = 0o777;

impl EmptyDir {
    pub(super) fn set_up(&self, path: &Path) -> Result<(), VolumeCause> {
        make_directory(path)?;
        if let Medium::Memory(size) = self.medium {
            mount_tmpfs(path, size, MountFlags::empty())
                .map_err(VolumeCause::file("mount tmpfs at", path))?;
        }
        // Against the umask. A pod may have narrowed it since; only what we have just made is touched.
        open_to_all(path).map_err(VolumeCause::file("set mode of", path))?;
        if let Some(group) = self.fs_group {
            ownership::share_with_group(path, group)
                .map_err(VolumeCause::file("give group access to", path))?;
        }
        Ok(())
    }
}

impl Files {
    pub(super) fn write(&self, path: &Path, payload: &Payload) -> Result<(), VolumeCause> {
        make_directory(path)?;
        if self.in_memory {
            let flags = MountFlags::NOSUID | MountFlags::NODEV;
            mount_tmpfs(path, None, flags).map_err(VolumeCause::file("mount tmpfs at", path))?;
        }
        open_to_all(path).map_err(VolumeCause::file("set mode of", path))?;
        if let Ownership { fs_group: Some(group), .. } = self.ownership {
            ownership::share_with_group(path, group)
                .map_err(VolumeCause::file("give group access to", path))?;
        }
        atomic::write(path, payload, self.ownership).map_err(VolumeCause::file("write files of", path))
    }
}

/// The pod's own directories are closed to everybody but root; containers reach volumes through their mounts.
fn make_directory(path: &Path) -> Result<(), VolumeCause> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o750);
    builder.create(path).map_err(VolumeCause::file("create directory", path))
}

fn open_to_all(path: &Path) -> io::Result<()> {
    let mode = path.symlink_metadata()?.mode() & 0o7777;
    // 0750 is what `make_directory` leaves: the directory is new.
    if mode == 0o750 {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(OPEN_TO_ALL))?;
    }
    Ok(())
}

/// Mounts a tmpfs unless something is mounted there already.
fn mount_tmpfs(path: &Path, size: Option<u64>, flags: MountFlags) -> io::Result<()> {
    if is_mount_point(path)? {
        return Ok(());
    }
    let mut options = vec!["mode=1777".to_owned()];
    options.extend(size.map(|bytes| format!("size={bytes}")));
    let mount = |options: &[String]| {
        let data = CString::new(options.join(",")).map_err(|_| Errno::INVAL)?;
        rustix::mount::mount("tmpfs", path, "tmpfs", flags, data.as_c_str())
    };
    let mut unswapped = options.clone();
    unswapped.push("noswap".to_owned());
    match mount(&unswapped) {
        // Kernels before 6.4 know no such option.
        Err(Errno::INVAL) => Ok(mount(&options)?),
        other => Ok(other?),
    }
}

/// Whether a mount begins exactly here.
pub(super) fn is_mount_point(path: &Path) -> io::Result<bool> {
    let stat = rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty())?;
    Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}
