//! Where containers' logs lie, and the links by which log collectors find them.

use super::labels;
use crate::context::Settings;
use k8s_openapi::api::core::v1::Pod;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Makes a directory that everyone may read, and everything above it.
pub fn make_directory(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(path)
}

/// A pod's log directory.
#[must_use]
pub fn pod_directory(settings: &Settings, pod: &Pod) -> PathBuf {
    settings.pod_logs_dir.join(labels::log_directory(pod))
}

/// Points `<links>/<pod>_<namespace>_<container>-<id>.log` at a container's log. An older link of that name is replaced.
pub fn link(settings: &Settings, pod: &Pod, container: &str, id: &str, log: &Path) -> io::Result<()> {
    make_directory(&settings.container_links_dir)?;
    let (name, namespace, _) = labels::identity(pod);
    let link = settings.container_links_dir.join(labels::log_link(name, namespace, container, id));
    match std::fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::os::unix::fs::symlink(log, link)
}

/// Removes the links of a container that is gone, and a log with its rotated pieces.
pub fn remove_container(settings: &Settings, id: &str, log: Option<&Path>) {
    for entry in std::fs::read_dir(&settings.container_links_dir).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().ends_with(&format!("-{id}.log")) {
            std::fs::remove_file(entry.path()).ok();
        }
    }
    let Some((directory, file)) = log.and_then(|log| Some((log.parent()?, log.file_name()?.to_str()?)))
    else {
        return;
    };
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(file) {
            std::fs::remove_file(entry.path()).ok();
        }
    }
}

/// Removes links below `links` that point nowhere.
pub fn remove_dead_links(links: &Path) {
    for entry in std::fs::read_dir(links).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
        if is_link
            && matches!(std::fs::metadata(&path), Err(error) if error.kind() == io::ErrorKind::NotFound)
        {
            std::fs::remove_file(path).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_replaced_and_goes_with_its_container() {
        let root = tempfile::tempdir().unwrap();
        let settings = Settings {
            pod_logs_dir: root.path().join("pods"),
            container_links_dir: root.path().join("containers"),
            ..Settings::default()
        };
        let mut pod = Pod::default();
        pod.metadata.name = Some("p".into());
        let log = root.path().join("pods/0.log");
        make_directory(log.parent().unwrap()).unwrap();
        std::fs::write(&log, "x").unwrap();
        std::fs::write(root.path().join("pods/0.log.20260101-000000.gz"), "x").unwrap();
        link(&settings, &pod, "c", "id1", Path::new("/nowhere")).unwrap();
        link(&settings, &pod, "c", "id1", &log).unwrap();
        let link_path = settings.container_links_dir.join("p_default_c-id1.log");
        assert_eq!(std::fs::read_link(&link_path).unwrap(), log);
        remove_container(&settings, "id1", Some(&log));
        assert!(!link_path.is_symlink() && !log.exists());
        assert_eq!(std::fs::read_dir(root.path().join("pods")).unwrap().count(), 0);
    }

    #[test]
    fn links_that_point_nowhere_are_removed() {
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/nowhere/at/all", root.path().join("dead.log")).unwrap();
        std::os::unix::fs::symlink(root.path(), root.path().join("alive.log")).unwrap();
        remove_dead_links(root.path());
        assert!(!root.path().join("dead.log").is_symlink());
        assert!(root.path().join("alive.log").is_symlink());
    }
}
