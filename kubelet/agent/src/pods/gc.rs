//! What pods that nobody knows any more have left on this machine: found in one look, removed piece by piece.
//!
//! A pod's own worker leaves nothing. This is for what a kubelet that was killed, or an older one, could not finish.

use super::executor::{Services, remove_pod_directory};
use super::{cgroups, labels, logs};
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use std::collections::{BTreeMap, HashSet};
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

/// Removes the directories, cgroups, logs and links of pods that are not `known`.
pub async fn sweep(services: &Services, known: HashSet<String>) {
    let settings = services.context.settings.clone();
    let looked = tokio::task::spawn_blocking({
        let (settings, known) = (settings.clone(), known.clone());
        move || {
            for uid in cgroups::existing(&settings).into_iter().filter(|uid| !known.contains(uid)) {
                if let Err(error) = cgroups::remove(&settings, &uid) {
                    tracing::warn!(pod_uid = uid, %error, "cgroup of a pod that is gone stays");
                }
            }
            for entry in std::fs::read_dir(&settings.pod_logs_dir).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                // Only what is named as we name it is ours.
                let uid = (name.matches('_').count() == 2).then(|| name.rsplit('_').next()).flatten();
                if uid.is_some_and(|uid| !known.contains(uid)) {
                    std::fs::remove_dir_all(entry.path()).ok();
                }
            }
            logs::remove_dead_links(&settings.container_links_dir);
            let entries = std::fs::read_dir(settings.root_dir.join("pods")).into_iter().flatten().flatten();
            let uids = entries.filter_map(|entry| entry.file_name().into_string().ok());
            uids.filter(|uid| !known.contains(uid)).collect::<Vec<_>>()
        }
    });
    for uid in looked.await.unwrap_or_default() {
        if let Err(error) = services.parts.unmount(&uid).await {
            tracing::warn!(pod_uid = uid, %error, "volumes of a pod that is gone stay mounted");
            continue;
        }
        let context = Arc::clone(&services.context);
        let removal = {
            let uid = uid.clone();
            tokio::task::spawn_blocking(move || remove_pod_directory(&context.settings, &uid))
        };
        if let Ok(Err(error)) = removal.await {
            tracing::warn!(pod_uid = uid, %error, "directory of a pod that is gone stays");
        }
    }
}
