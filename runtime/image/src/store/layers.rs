//! Layers on their way into the store: staging, commit, leases.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::index::LayerRecord;
use super::{Store, VERSION, create_dir, durable, lock};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::layer::{Applied, LayerError, tree};

/// Keeps one layer from being collected.
#[derive(Debug)]
pub(crate) struct Lease {
    store: Arc<Store>,
    number: u64,
}

impl Lease {
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.store.layout.layer(self.number).join("fs")
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut index = self.store.index();
        if let Some(count) = index.leases.get_mut(&self.number) {
            *count -= 1;
            if *count == 0 {
                index.leases.remove(&self.number);
            }
        }
    }
}

/// A temporary directory of the store; dropping it discards it.
#[derive(Debug)]
pub(crate) struct Workspace {
    store: Arc<Store>,
    number: u64,
    directory: PathBuf,
    /// It has become part of the store.
    kept: bool,
}

/// A layer being unpacked, or unpacked and not yet committed.
#[derive(Debug)]
pub(crate) struct Staged {
    workspace: Workspace,
    diff_id: Digest,
}

impl Staged {
    pub(crate) fn fs(&self) -> PathBuf {
        self.workspace.fs()
    }

    pub(crate) fn scratch(&self) -> PathBuf {
        self.workspace.scratch()
    }
}

impl Workspace {
    pub(crate) fn fs(&self) -> PathBuf {
        self.directory.join("fs")
    }

    pub(crate) fn scratch(&self) -> PathBuf {
        self.directory.join("scratch")
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let target = self.store.layout.trash().join(format!("staged-{}", self.number));
        if let Err(cause) = std::fs::rename(&self.directory, &target) {
            // It stays in tmp/, which the next open discards.
            tracing::debug!(directory = %self.directory.display(), %cause, "unfinished layer not moved to the trash");
        }
        self.store.sweep_in_background();
    }
}

impl Store {
    /// Finds a layer and keeps it from being collected.
    pub(crate) fn lease_layer(self: &Arc<Self>, diff_id: &Digest, base: &str) -> Option<Lease> {
        let mut index = self.index();
        let number = index.layer(diff_id, base)?;
        *index.leases.entry(number).or_default() += 1;
        Some(Lease { store: Arc::clone(self), number })
    }

    /// Leases all of a known image's layers, bottom first; nothing if the image is not (or no longer) known.
    pub(crate) fn lease_image(self: &Arc<Self>, id: &Digest) -> Option<Vec<Lease>> {
        let mut index = self.index();
        let numbers = index.images.get(id)?.record.layers.clone();
        for number in &numbers {
            *index.leases.entry(*number).or_default() += 1;
        }
        drop(index);
        Some(numbers.into_iter().map(|number| Lease { store: Arc::clone(self), number }).collect())
    }

    /// A directory for unfinished work, on the store's file system.
    pub(crate) fn workspace(self: &Arc<Self>) -> Result<Workspace, ImageError> {
        let number = self.next_number();
        let directory = self.layout.tmp().join(number.to_string());
        let workspace = Workspace { store: Arc::clone(self), number, directory, kept: false };
        create_dir(&workspace.fs())?;
        create_dir(&workspace.scratch())?;
        Ok(workspace)
    }

    pub(crate) fn stage_layer(self: &Arc<Self>, diff_id: &Digest) -> Result<Staged, ImageError> {
        Ok(Staged { workspace: self.workspace()?, diff_id: diff_id.clone() })
    }

    /// Makes an unpacked layer part of the store. `below` are the layers it lies on, bottom first; they matter only if
    /// the layer left directories undescribed.
    pub(crate) fn commit_layer(
        self: &Arc<Self>,
        mut staged: Staged,
        applied: &Applied,
        base: &str,
        below: &[&Lease],
    ) -> Result<Lease, ImageError> {
        let fs = staged.fs();
        let layer_error = |cause| ImageError::Layer { layer: staged.diff_id.to_string(), cause };
        for path in &applied.implied {
            inherit(&fs, path, below).map_err(layer_error)?;
        }
        std::fs::remove_dir(staged.scratch()).map_err(ImageError::store("remove", &staged.scratch()))?;
        let root = tree::open_directory(&fs).map_err(ImageError::store("open", &fs))?;
        rustix::fs::syncfs(root.as_fd()).map_err(|cause| ImageError::store("sync", &fs)(cause.into()))?;
        let (usage, size) = tree::measure(&fs).map_err(ImageError::store("measure", &fs))?;
        let record = LayerRecord {
            version: VERSION,
            diff_id: staged.diff_id.clone(),
            base: if applied.implied.is_empty() { None } else { Some(base.to_owned()) },
            root: applied.root,
            usage,
            size,
        };
        let _writer = lock(&self.writer);
        let mut number = staged.workspace.number;
        let mut index = self.index();
        if let Some(existing) = index.layer(&staged.diff_id, base) {
            // Someone else was faster; this copy goes to the trash.
            number = existing;
        } else {
            drop(index);
            durable::write_json(&staged.workspace.directory.join("layer.json"), &record)?;
            let target = self.layout.layer(number);
            std::fs::rename(&staged.workspace.directory, &target)
                .map_err(ImageError::store("commit", &target))?;
            staged.workspace.kept = true;
            durable::sync_directory(&self.layout.layers())?;
            index = self.index();
            index.layers.insert(number, record);
        }
        *index.leases.entry(number).or_default() += 1;
        drop(index);
        Ok(Lease { store: Arc::clone(self), number })
    }
}

/// Gives an undescribed directory the attributes it has in the layers below.
fn inherit(fs: &Path, path: &Path, below: &[&Lease]) -> Result<(), LayerError> {
    let open = |root: &Path| -> Result<_, Errno> {
        let root =
            tree::open_directory(root).map_err(|cause| Errno::from_io_error(&cause).unwrap_or(Errno::IO))?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(
            &root,
            path,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        )
    };
    for lower in below.iter().rev() {
        let found = match open(&lower.path()) {
            Ok(found) => found,
            Err(Errno::NOENT) => continue,
            // Something else than directories on the way: the path starts anew in this layer.
            Err(Errno::NOTDIR | Errno::LOOP) => break,
            Err(cause) => return Err(LayerError::io("examine", path, cause)),
        };
        let stat = rustix::fs::fstat(&found).map_err(|cause| LayerError::io("examine", path, cause))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            break;
        }
        let target = fs.join(path);
        let own = open(fs).map_err(|cause| LayerError::io("open", path, cause))?;
        let at = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&own));
        let time = |seconds, nanos| Timespec { tv_sec: seconds, tv_nsec: i64::try_from(nanos).unwrap_or(0) };
        let times = Timestamps {
            last_access: time(stat.st_atime, stat.st_atime_nsec),
            last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
        };
        let cwd = rustix::fs::CWD;
        return rustix::fs::chownat(
            cwd,
            &at,
            Some(Uid::from_raw(stat.st_uid)),
            Some(Gid::from_raw(stat.st_gid)),
            AtFlags::empty(),
        )
        .and_then(|()| rustix::fs::chmodat(cwd, &at, Mode::from_raw_mode(stat.st_mode), AtFlags::empty()))
        .and_then(|()| rustix::fs::utimensat(cwd, &at, &times, AtFlags::empty()))
        .map_err(|cause| LayerError::io("set attributes of", target, cause));
    }
    Ok(())
}
