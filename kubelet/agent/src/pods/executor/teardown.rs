//! Leaves nothing behind: volumes, cgroup, containers, sandboxes, logs, directories.

use super::{Executor, blocking};
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
        let pod = Arc::clone(pod);
        let logs = blocking(move || remove_directory(&logs::pod_directory(&context.settings, &pod)));
        failures.extend(logs.await.err());
        failures.extend(self.services.parts.remove(&self.uid).await.err().map(|error| error.message));
        // The runtime removes its own cgroups with the containers, so the pod's can only now be known to be gone.
        let context = Arc::clone(&self.services.context);
        let uid = Arc::clone(&self.uid);
        failures.extend(blocking(move || cgroups::remove(&context.settings, &uid)).await.err());
        if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
    }
}

fn remove_directory(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io::Error::new(error.kind(), format!("remove {}: {error}", path.display())))
        }
        _ => Ok(()),
    }
}
