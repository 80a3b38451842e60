//! What pods that nobody knows any more have left on this machine: found in one look, removed piece by piece.
//!
//! A pod's own worker leaves nothing. This is for what a kubelet that was killed, or an older one, could not finish.

use super::executor::Services;
use super::{cgroups, labels, logs};
use crate::context::Settings;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Pods that exist in the runtime, made up from their labels: no specification, one second of grace.
pub async fn runtime_pods(
    services: &Services,
) -> Result<BTreeMap<String, Pod>, super::runtime_client::RuntimeError> {
    let sandboxes = services.runtime.list_sandboxes(None).await?;
    let containers = services.runtime.list_containers(None).await?;
    let all = sandboxes.into_iter().map(|one| one.labels).chain(containers.into_iter().map(|one| one.labels));
    let mut pods = BTreeMap::new();
    for found in all {
        let word = |key: &str| found.get(key).filter(|word| !word.is_empty()).cloned();
        let Some(uid) = word(labels::POD_UID) else { continue };
        pods.entry(uid.clone()).or_insert_with(|| {
            let mut pod = Pod::default();
            pod.metadata.name = word(labels::POD_NAME);
            pod.metadata.namespace = word(labels::POD_NAMESPACE);
            pod.metadata.uid = Some(uid);
            pod.spec = Some(PodSpec { termination_grace_period_seconds: Some(1), ..PodSpec::default() });
            pod
        });
    }
    Ok(pods)
}

/// What pods have on this machine, by their UIDs: looked at first, compared with the pods that are known only
/// afterwards. The other way round a pod that comes in between would lose what was just made for it.
#[derive(Debug, Default)]
pub struct Belongings {
    cgroups: Vec<String>,
    logs: Vec<(String, PathBuf)>,
    directories: Vec<String>,
}

impl Belongings {
    /// Leaves only what belongs to nobody.
    #[must_use]
    pub fn without_owner(mut self, is_known: impl Fn(&str) -> bool) -> Self {
        self.cgroups.retain(|uid| !is_known(uid));
        self.logs.retain(|(uid, _)| !is_known(uid));
        self.directories.retain(|uid| !is_known(uid));
        self
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cgroups.is_empty() && self.logs.is_empty() && self.directories.is_empty()
    }
}

/// Looks at everything that lies where pods' things lie.
#[must_use]
pub fn belongings(settings: &Settings) -> Belongings {
    let entries = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten();
    let log_owner = |name: &str| {
        // Only what is named as we name it is ours.
        (name.matches('_').count() == 2).then(|| name.rsplit('_').next().map(ToOwned::to_owned)).flatten()
    };
    Belongings {
        cgroups: cgroups::existing(settings),
        logs: entries(&settings.pod_logs_dir)
            .filter_map(|entry| Some((log_owner(entry.file_name().to_str()?)?, entry.path())))
            .collect(),
        directories: entries(&settings.root_dir.join("pods"))
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect(),
    }
}

/// Removes what belongs to nobody.
pub async fn sweep(services: &Services, ownerless: Belongings) {
    let Belongings { cgroups, logs, directories } = ownerless;
    let context = Arc::clone(&services.context);
    let files = tokio::task::spawn_blocking(move || {
        for uid in cgroups {
            if let Err(error) = cgroups::remove(&context.settings, &uid) {
                tracing::warn!(pod_uid = uid, %error, "cgroup of a pod that is gone stays");
            }
        }
        for (uid, path) in logs {
            if let Err(error) = std::fs::remove_dir_all(&path) {
                tracing::warn!(pod_uid = uid, path = %path.display(), %error, "logs of a pod that is gone stay");
            }
        }
        logs::remove_dead_links(&context.settings.container_links_dir);
    });
    if let Err(error) = files.await {
        tracing::warn!(%error, "sweeping up after pods that are gone ended abnormally");
    }
    for uid in directories {
        match services.parts.remove(&uid).await {
            Ok(()) => tracing::info!(pod_uid = uid, "removed what a pod that is gone had left"),
            Err(error) => tracing::warn!(pod_uid = uid, %error, "directory of a pod that is gone stays"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_named_as_ours_and_has_no_owner_is_swept_up() {
        let root = tempfile::tempdir().unwrap();
        let settings = Settings {
            root_dir: root.path().join("kubelet"),
            pod_logs_dir: root.path().join("logs"),
            cgroup_mount: root.path().join("cgroup"),
            ..Settings::default()
        };
        for path in ["kubelet/pods/a", "kubelet/pods/b", "logs/n_p_a", "logs/n_p_b", "logs/other"] {
            std::fs::create_dir_all(root.path().join(path)).unwrap();
        }
        let left = belongings(&settings).without_owner(|uid| uid == "a");
        assert_eq!(left.directories, ["b"]);
        assert_eq!(left.logs, [("b".to_owned(), root.path().join("logs/n_p_b"))]);
        assert!(left.without_owner(|_| true).is_empty());
    }
}
