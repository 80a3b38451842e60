//! Leaves nothing behind: volumes, cgroup, containers, sandboxes, logs, directories.

use super::{Executor, blocking};
use crate::context::Settings;
use crate::pods::runtime_state::ContainerRecord;
use crate::pods::{cgroups, logs};
use k8s_openapi::api::core::v1::Pod;
use std::io;
use std::path::Path;
use std::sync::Arc;

impl Executor {
    pub(super) async fn tear_down(&self) -> Result<(), String> {
        self.services.parts.unmount(&self.uid).await.map_err(|error| error.message)?;
        let context = Arc::clone(&self.services.context);
        let uid = Arc::clone(&self.uid);
        blocking(move || cgroups::remove(&context.settings, &uid)).await
    }

    /// Removes the last traces. All are tried even if one fails.
    pub(super) async fn purge(
        &self,
        pod: &Arc<Pod>,
        containers: Vec<ContainerRecord>,
        sandboxes: Vec<String>,
    ) -> Result<(), String> {
        let runtime = &self.services.runtime;
        let settings = &self.services.context.settings;
        let mut failures = Vec::new();
        for record in &containers {
            failures.extend(runtime.remove_container(&record.id).await.err().map(|error| error.to_string()));
            logs::remove_container(settings, &record.id, None);
        }
        for id in &sandboxes {
            failures.extend(runtime.remove_sandbox(id).await.err().map(|error| error.to_string()));
        }
        let context = Arc::clone(&self.services.context);
        let uid = Arc::clone(&self.uid);
        let pod = Arc::clone(pod);
        let files = blocking(move || {
            remove_directory(&logs::pod_directory(&context.settings, &pod))?;
            remove_pod_directory(&context.settings, &uid)
        });
        failures.extend(files.await.err());
        // The runtime removes its own cgroups with the containers, so the pod's can only now be known to be gone.
        let context = Arc::clone(&self.services.context);
        let uid = Arc::clone(&self.uid);
        failures.extend(blocking(move || cgroups::remove(&context.settings, &uid)).await.err());
        if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
    }
}

/// Removes `<root>/pods/<uid>`, unless something is still mounted in it.
pub(crate) fn remove_pod_directory(settings: &Settings, uid: &str) -> io::Result<()> {
    if uid.is_empty() || uid.contains('/') || uid.starts_with('.') {
        return Err(io::Error::other(format!("not a pod UID: {uid:?}")));
    }
    let directory = settings.root_dir.join("pods").join(uid);
    if !directory.exists() {
        return Ok(());
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    if let Some(mounted) = mounts_below(&mounts, &directory).next() {
        // Removing now would delete what is mounted, not what is ours.
        return Err(io::Error::other(format!(
            "{mounted} is still mounted; unmount it and the directory will be removed"
        )));
    }
    remove_directory(&directory)
}

fn mounts_below<'a>(mountinfo: &'a str, directory: &'a Path) -> impl Iterator<Item = &'a str> {
    mountinfo
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(move |point| Path::new(point).starts_with(directory))
}

fn remove_directory(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io::Error::new(error.kind(), format!("remove {}: {error}", path.display())))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_inside_a_directory_are_found_and_neighbours_are_not() {
        let info = "1 0 0:1 / /var/lib/kubelet/pods/a/volumes/x rw - tmpfs t rw\n\
                    2 0 0:1 / /var/lib/kubelet/pods/ab rw - tmpfs t rw\n";
        let found: Vec<_> = mounts_below(info, Path::new("/var/lib/kubelet/pods/a")).collect();
        assert_eq!(found, ["/var/lib/kubelet/pods/a/volumes/x"]);
    }

    #[test]
    fn a_uid_that_is_a_path_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let settings = Settings { root_dir: root.path().into(), ..Settings::default() };
        assert!(remove_pod_directory(&settings, "../x").is_err());
        assert!(remove_pod_directory(&settings, "").is_err());
    }
}
