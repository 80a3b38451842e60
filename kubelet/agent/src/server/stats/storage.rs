//! What pods have on disk: sizes of file systems, and of the files below a directory.
//!
//! Counting files takes a system call for each, so it is done only for a full summary, off the asynchronous threads,
//! and ends at a number of files. Volumes of other machines are not touched: they may hang.

use super::model::{Fs, Moment};
use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// So many files are looked at for one summary.
const MOST_FILES: u32 = 200_000;
/// The kinds of volumes whose files lie on this machine.
const LOCAL: [&str; 6] = [
    "kubernetes.io~empty-dir",
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~downward-api",
    "kubernetes.io~projected",
    "kubernetes.io~git-repo",
];

/// Where the files of a pod lie.
#[derive(Debug, Default)]
pub(super) struct PodPaths {
    /// Below the kubelet's directory.
    pub(super) directory: PathBuf,
    /// Each container's directory of logs.
    pub(super) logs: Vec<PathBuf>,
}

/// What lies there.
#[derive(Debug, Default)]
pub(super) struct PodFiles {
    pub(super) logs: Vec<Option<Used>>,
    pub(super) volumes: Vec<VolumeFiles>,
    /// The pod's `/etc/hosts`.
    pub(super) hosts: Option<Used>,
}

#[derive(Debug)]
pub(super) struct VolumeFiles {
    pub(super) name: String,
    pub(super) files: Files,
}

#[derive(Debug)]
pub(super) enum Files {
    /// A file system of its own, such as one in memory.
    Mounted(Fs),
    /// On the file system of the kubelet's directory; nothing if there are too many to count.
    Within(Option<Used>),
}

/// Disk space and files, as `du` counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) bytes: u64,
    pub(super) inodes: u64,
}

impl Used {
    pub(super) fn plus(self, other: Self) -> Self {
        Self { bytes: self.bytes + other.bytes, inodes: self.inodes + other.inodes }
    }
}

/// The size of the file system that a path lies on.
pub(super) fn file_system(path: &Path, now: i64) -> Option<Fs> {
    let stat = rustix::fs::statvfs(path).ok()?;
    let bytes = |blocks: u64| Some(blocks.saturating_mul(stat.f_frsize));
    Some(Fs {
        time: Moment(now),
        available_bytes: bytes(stat.f_bavail),
        capacity_bytes: bytes(stat.f_blocks),
        used_bytes: bytes(stat.f_blocks.saturating_sub(stat.f_bfree)),
        inodes_free: Some(stat.f_ffree),
        inodes: Some(stat.f_files),
        inodes_used: Some(stat.f_files.saturating_sub(stat.f_ffree)),
    })
}

/// Looks at all pods' files. Blocks.
pub(super) fn look(pods: &[PodPaths], now: i64) -> Vec<PodFiles> {
    let mut count = Count { left: MOST_FILES, linked: HashSet::new() };
    pods.iter().map(|pod| look_at(pod, now, &mut count)).collect()
}

fn look_at(pod: &PodPaths, now: i64, count: &mut Count) -> PodFiles {
    let mut volumes = Vec::new();
    for kind in LOCAL {
        let Ok(entries) = fs::read_dir(pod.directory.join("volumes").join(kind)) else { continue };
        for entry in entries.flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            if let Some(files) = volume(&entry.path(), &pod.directory, now, count) {
                volumes.push(VolumeFiles { name, files });
            }
        }
    }
    volumes.sort_by(|one, other| one.name.cmp(&other.name));
    PodFiles {
        logs: pod.logs.iter().map(|directory| count.below(directory)).collect(),
        hosts: count.below(&pod.directory.join("etc-hosts")),
        volumes,
    }
}

fn volume(path: &Path, home: &Path, now: i64, count: &mut Count) -> Option<Files> {
    let own = fs::symlink_metadata(path).ok()?;
    if !own.is_dir() {
        return None;
    }
    if own.dev() == fs::symlink_metadata(home).ok()?.dev() {
        return Some(Files::Within(count.below(path)));
    }
    file_system(path, now).map(Files::Mounted)
}

struct Count {
    left: u32,
    /// Files that have several names are counted once.
    linked: HashSet<(u64, u64)>,
}

impl Count {
    /// Everything at and below a path on its own file system. Nothing if it is not there, or too many.
    fn below(&mut self, path: &Path) -> Option<Used> {
        let top = fs::symlink_metadata(path).ok()?;
        let device = top.dev();
        let mut used = Used::default();
        let mut directories = Vec::new();
        self.add(&top, path, &mut used, &mut directories)?;
        while let Some(directory) = directories.pop() {
            // What vanishes while it is looked at counts for nothing.
            let Ok(entries) = fs::read_dir(&directory) else { continue };
            for entry in entries.flatten() {
                let Ok(metadata) = entry.metadata() else { continue };
                if metadata.dev() == device {
                    self.add(&metadata, &entry.path(), &mut used, &mut directories)?;
                }
            }
        }
        Some(used)
    }

    fn add(
        &mut self,
        file: &fs::Metadata,
        path: &Path,
        used: &mut Used,
        directories: &mut Vec<PathBuf>,
    ) -> Option<()> {
        self.left = self.left.checked_sub(1)?;
        if file.is_dir() {
            directories.push(path.to_owned());
        } else if file.nlink() > 1 && !self.linked.insert((file.dev(), file.ino())) {
            return Some(());
        }
        *used = used.plus(Used { bytes: file.blocks().saturating_mul(512), inodes: 1 });
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_two_names_counts_once_and_too_many_files_count_as_unknown() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("inner");
        fs::create_dir(&inner).unwrap();
        fs::write(inner.join("one"), vec![1; 100_000]).unwrap();
        fs::hard_link(inner.join("one"), folder.path().join("two")).unwrap();
        let mut count = Count { left: 100, linked: HashSet::new() };
        let used = count.below(folder.path()).unwrap();
        assert_eq!(used.inodes, 3);
        assert!((100_000..200_000).contains(&used.bytes), "{used:?}");
        assert_eq!(Count { left: 2, linked: HashSet::new() }.below(folder.path()), None);
        assert_eq!(count.below(&folder.path().join("absent")), None);
    }
}
