//! Making, walking, killing and removing cgroup directories.

use super::{Error, files};
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// `relative` below `root`, whether or not it begins with a slash. `..` is refused, not resolved.
pub(super) fn join(root: &Path, relative: &Path) -> Result<PathBuf, Error> {
    let mut dir = root.to_owned();
    for component in relative.components() {
        match component {
            Component::Normal(name) => dir.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(Error::Path(relative.to_owned())),
        }
    }
    Ok(dir)
}

pub(super) fn create(root: &Path, dir: &Path) -> Result<(), Error> {
    if !is_cgroup2(root) {
        return Err(Error::NotCgroup2(root.to_owned()));
    }
    let below = dir.strip_prefix(root).map_err(|_| Error::Path(dir.to_owned()))?;
    let mut current = root.to_owned();
    for component in below.components() {
        enable_controllers(&current)?;
        current.push(component);
        match fs::DirBuilder::new().mode(0o755).create(&current) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::Create { dir: current, source });
            }
            _ => {}
        }
    }
    Ok(())
}

fn is_cgroup2(root: &Path) -> bool {
    const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;
    rustix::fs::statfs(root).is_ok_and(|found| {
        #[allow(
            clippy::unnecessary_cast,
            clippy::useless_conversion,
            reason = "the field's type differs by target"
        )]
        let kind = found.f_type as i64;
        kind == CGROUP2_SUPER_MAGIC
    })
}

/// Hands every controller that `dir` has down to its children. A controller that cannot be enabled here (processes in
/// an inner cgroup, threaded mode) is left out: a limit that needs it fails later by name.
fn enable_controllers(dir: &Path) -> Result<(), Error> {
    let available = files::read(dir, "cgroup.controllers")?;
    let enabled = files::read(dir, "cgroup.subtree_control")?;
    let missing: Vec<&str> = available
        .split_ascii_whitespace()
        .filter(|name| !enabled.split_ascii_whitespace().any(|other| other == *name))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let all = missing.iter().map(|name| format!("+{name}")).collect::<Vec<_>>().join(" ");
    if files::write_raw(dir, "cgroup.subtree_control", &all).is_ok() {
        return Ok(());
    }
    for name in missing {
        if let Err(error) = files::write_raw(dir, "cgroup.subtree_control", &format!("+{name}")) {
            tracing::debug!(controller = name, cgroup = %dir.display(), %error, "controller not enabled");
        }
    }
    Ok(())
}

/// Calls `visit` for `dir` and every cgroup below it, children first.
fn walk(dir: &Path, visit: &mut dyn FnMut(&Path) -> Result<(), Error>) -> Result<(), Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Error::Read { file: dir.to_owned(), source }),
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), visit)?;
        }
    }
    visit(dir)
}

pub(super) fn processes(dir: &Path) -> Result<Vec<u32>, Error> {
    let mut found = Vec::new();
    walk(dir, &mut |dir| {
        match fs::read_to_string(dir.join("cgroup.procs")) {
            Ok(text) => found.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
            // Removed in between (ENOENT, ENODEV), or a threaded cgroup, whose processes its domain lists.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)) => {}
            Err(source) => return Err(Error::Read { file: dir.join("cgroup.procs"), source }),
        }
        Ok(())
    })?;
    Ok(found)
}

pub(super) fn kill(dir: &Path) -> Result<(), Error> {
    match files::write_raw(dir, "cgroup.kill", "1") {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.exists() => return Ok(()),
        // Kernels before 5.14 have no such file.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(Error::Kill { dir: dir.to_owned(), source }),
    }
    // Frozen, the processes cannot fork away from under the loop.
    files::write(dir, "cgroup.freeze", "1")?;
    for pid in processes(dir)? {
        let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else { continue };
        match rustix::process::kill_process(pid, rustix::process::Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => return Err(Error::Kill { dir: dir.to_owned(), source: errno.into() }),
        }
    }
    files::write(dir, "cgroup.freeze", "0")
}

pub(super) fn remove(dir: &Path) -> Result<(), Error> {
    walk(dir, &mut |dir| {
        // A process that has been reaped may count for a moment longer.
        for attempt in 0..5u32 {
            match fs::remove_dir(dir) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    if processes(dir)?.is_empty() {
                        std::thread::sleep(Duration::from_millis(1 << attempt));
                    } else {
                        return Err(Error::Busy(dir.to_owned()));
                    }
                }
                Err(source) => return Err(Error::Remove { dir: dir.to_owned(), source }),
            }
        }
        Err(Error::Busy(dir.to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_path_stays_below_the_root() {
        let root = Path::new("/r");
        assert_eq!(join(root, Path::new("/a/b")).unwrap(), Path::new("/r/a/b"));
        assert_eq!(join(root, Path::new("a/./b")).unwrap(), Path::new("/r/a/b"));
        assert!(matches!(join(root, Path::new("/a/../../b")), Err(Error::Path(_))));
    }
}
