//! Files that change all at once. A reader sees either the old contents or the new:
//!
//! ```text
//! <volume>/..2026_01_31_12_00_00.123456789/   the files
//! <volume>/..data -> ..2026_…                 exchanged by one rename
//! <volume>/name   -> ..data/name              one per top-level name
//! ```
//!
//! A change is planned as a list of actions from what is on disk, then performed in order. After a crash between any two
//! of them the next plan starts from what is there and ends in the same place.

use crate::volumes::ownership::Ownership;
use crate::volumes::payload::{File, Payload};
use jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

const DATA: &str = "..data";
const DATA_NEW: &str = "..data_tmp";
const DIRECTORY_MODE: u32 = 0o755;

/// One operation; all paths are relative to the volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    MakeDirectory {
        path: PathBuf,
        mode: u32,
        group: Option<u32>,
    },
    WriteFile {
        path: PathBuf,
        content: Vec<u8>,
        mode: u32,
        user: Option<u32>,
        group: Option<u32>,
    },
    Link {
        path: PathBuf,
        target: PathBuf,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    /// Whatever is there, with everything below; absent is fine.
    Remove {
        path: PathBuf,
    },
}

/// Whether the volume shows complete contents, of whatever age.
pub(super) fn is_filled(volume: &Path) -> bool {
    volume.join(DATA).is_dir()
}

/// Brings the volume to `payload`.
pub(super) fn write(volume: &Path, payload: &Payload, ownership: Ownership) -> io::Result<()> {
    let actions = plan(volume, payload, ownership, Timestamp::now())?;
    actions.iter().try_for_each(|action| apply(volume, action))
}

/// What has to be done; nothing if the volume is as it should be.
pub(super) fn plan(
    volume: &Path,
    payload: &Payload,
    ownership: Ownership,
    now: Timestamp,
) -> io::Result<Vec<Action>> {
    let present = Present::read(volume)?;
    let mut actions = Vec::new();
    let same = match &present.data {
        Some(data) => matches(&volume.join(data), payload, ownership)?,
        None => false,
    };
    let mut keep = present.data.clone().filter(|_| same);
    if keep.is_none() {
        let fresh = present.unused_name(now);
        actions.extend(contents(&fresh, payload, ownership));
        actions.push(Action::Remove { path: DATA_NEW.into() });
        actions.push(Action::Link { path: DATA_NEW.into(), target: fresh.clone().into() });
        actions.push(Action::Rename { from: DATA_NEW.into(), to: DATA.into() });
        keep = Some(fresh);
    }
    let names: BTreeSet<&OsStr> =
        payload.iter().filter_map(|(path, _)| path.components().next()).map(|c| c.as_os_str()).collect();
    for name in &names {
        let target = Path::new(DATA).join(name);
        if present.links.get(*name) != Some(&target) {
            actions.push(Action::Remove { path: name.into() });
            actions.push(Action::Link { path: name.into(), target });
        }
    }
    // Only links of ours: a directory may be the place of another volume's mount.
    let stale = present
        .links
        .iter()
        .filter(|(name, target)| target.starts_with(DATA) && !names.contains(name.as_os_str()));
    actions.extend(stale.map(|(name, _)| Action::Remove { path: name.into() }));
    let old = present.generations.iter().filter(|name| Some(*name) != keep.as_ref());
    actions.extend(old.map(|name| Action::Remove { path: name.into() }));
    Ok(actions)
}

fn contents(fresh: &OsStr, payload: &Payload, ownership: Ownership) -> Vec<Action> {
    let group = ownership.fs_group;
    let directory = |path: &Path| Action::MakeDirectory {
        path: Path::new(fresh).join(path),
        mode: ownership.directory_mode(DIRECTORY_MODE),
        group,
    };
    let parents: BTreeSet<&Path> = payload.iter().flat_map(|(path, _)| path.ancestors().skip(1)).collect();
    let mut actions = vec![directory(Path::new(""))];
    // A set in order of paths has every directory before what is in it.
    actions.extend(parents.into_iter().filter(|path| !path.as_os_str().is_empty()).map(directory));
    actions.extend(payload.iter().map(|(path, File { content, mode, user })| Action::WriteFile {
        path: Path::new(fresh).join(path),
        content: content.clone(),
        mode: ownership.file_mode(*mode),
        user: *user,
        group,
    }));
    actions
}

/// Performs one action.
pub(super) fn apply(volume: &Path, action: &Action) -> io::Result<()> {
    match action {
        Action::MakeDirectory { path, mode, group } => {
            let path = volume.join(path);
            std::fs::DirBuilder::new().mode(0o700).create(&path)?;
            chown(&path, None, *group)?;
            // Last, and against the umask: changing owners may clear the set-group-ID bit.
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(*mode))
        }
        Action::WriteFile { path, content, mode, user, group } => {
            let mut options = std::fs::OpenOptions::new();
            let mut file = options.write(true).create_new(true).mode(0o600).open(volume.join(path))?;
            file.write_all(content)?;
            std::os::unix::fs::fchown(&file, *user, *group)?;
            file.set_permissions(std::fs::Permissions::from_mode(*mode))
        }
        Action::Link { path, target } => symlink(target, volume.join(path)),
        Action::Rename { from, to } => std::fs::rename(volume.join(from), volume.join(to)),
        Action::Remove { path } => remove(&volume.join(path)),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    let removed = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What a volume's directory holds.
struct Present {
    /// Where `..data` leads, if to a directory of this volume.
    data: Option<OsString>,
    /// Directories of contents, current and left over.
    generations: BTreeSet<OsString>,
    /// Links at the top with their targets.
    links: BTreeMap<OsString, PathBuf>,
}

impl Present {
    fn read(volume: &Path) -> io::Result<Self> {
        let mut present = Self { data: None, generations: BTreeSet::new(), links: BTreeMap::new() };
        for entry in std::fs::read_dir(volume)? {
            let entry = entry?;
            let name = entry.file_name();
            let own = name.as_encoded_bytes().starts_with(b"..");
            let kind = entry.file_type()?;
            if own && kind.is_dir() {
                present.generations.insert(name);
            } else if kind.is_symlink() && !own {
                present.links.insert(name, std::fs::read_link(entry.path())?);
            }
        }
        if let Ok(target) = std::fs::read_link(volume.join(DATA)) {
            present.data = Some(target.into_os_string()).filter(|name| present.generations.contains(name));
        }
        Ok(present)
    }

    fn unused_name(&self, now: Timestamp) -> OsString {
        let base = now.strftime("..%Y_%m_%d_%H_%M_%S.%9f").to_string();
        let mut name = OsString::from(&base);
        let mut number = 0u32;
        while self.generations.contains(&name) {
            number += 1;
            name = OsString::from(format!("{base}{number}"));
        }
        name
    }
}

/// Whether the directory holds exactly the payload, with its modes and owners.
fn matches(dir: &Path, payload: &Payload, ownership: Ownership) -> io::Result<bool> {
    let mut found = 0;
    let mut pending = vec![dir.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                pending.push(entry.path());
            } else {
                found += 1;
            }
        }
    }
    if found != payload.iter().count() {
        return Ok(false);
    }
    for (path, file) in payload.iter() {
        let path = dir.join(path);
        let Ok(metadata) = path.symlink_metadata() else { return Ok(false) };
        let group = ownership.fs_group.is_none_or(|group| group == metadata.gid());
        let user = file.user.is_none_or(|user| user == metadata.uid());
        let mode = metadata.mode() & 0o7777 == ownership.file_mode(file.mode);
        let size = metadata.len() == u64::try_from(file.content.len()).unwrap_or(u64::MAX);
        if !(metadata.is_file() && group && user && mode && size && std::fs::read(&path)? == file.content) {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
#[path = "atomic_tests.rs"]
mod tests;
