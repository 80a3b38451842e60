//! What other parts of the kubelet may know of pods: the list with current statuses, and where a container is found.

use super::labels;
use super::runtime_state::{PodRuntime, RunState};
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

/// Clones are the same directory.
#[derive(Debug, Clone, Default)]
pub struct PodDirectory(Arc<RwLock<BTreeMap<String, Entry>>>);

#[derive(Debug, Clone)]
struct Entry {
    pod: Arc<Pod>,
    runtime: PodRuntime,
}

/// Which pod is meant. A UID, where given, must agree.
#[derive(Debug, Clone, Copy)]
pub struct PodKey<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    pub uid: Option<&'a str>,
}

/// A container that exists in the runtime.
#[derive(Debug, Clone)]
pub struct ContainerHandle {
    pub pod: Arc<Pod>,
    pub container_id: String,
    pub sandbox_id: String,
    pub state: RunState,
    pub log_path: PathBuf,
    pub attempt: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    #[error("pod \"{name}\" not found in namespace \"{namespace}\" on this node")]
    NoPod { namespace: String, name: String },
    #[error("container \"{container}\" is not in pod \"{name}\"")]
    NoContainer { name: String, container: String },
    #[error("container \"{container}\" in pod \"{name}\" is waiting to start: {reason}")]
    NotStarted { name: String, container: String, reason: String },
    #[error("previous terminated container \"{container}\" in pod \"{name}\" not found")]
    NoPrevious { name: String, container: String },
    #[error("pod \"{name}\" has no sandbox at the moment")]
    NoSandbox { name: String },
}

impl PodDirectory {
    /// All pods of this node with their statuses as last computed, whatever their source.
    #[must_use]
    pub fn list(&self) -> Vec<Arc<Pod>> {
        self.read(|entries| entries.values().map(|entry| Arc::clone(&entry.pod)).collect())
    }

    pub fn pod(&self, key: PodKey<'_>) -> Result<Arc<Pod>, LookupError> {
        self.find(key, |entry| Arc::clone(&entry.pod))
    }

    #[must_use]
    pub fn by_uid(&self, uid: &str) -> Option<Arc<Pod>> {
        self.read(|entries| entries.get(uid).map(|entry| Arc::clone(&entry.pod)))
    }

    /// A pod's address in its live sandbox, or in the host's network the node's.
    #[must_use]
    pub fn pod_ip(&self, uid: &str) -> Option<IpAddr> {
        self.read(|entries| {
            let entry = entries.get(uid)?;
            let own = entry.runtime.live_sandbox().and_then(|sandbox| sandbox.ips.first().copied());
            own.or_else(|| entry.pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok())
        })
    }

    /// The id of the running container of that name.
    #[must_use]
    pub fn running_container(&self, uid: &str, name: &str) -> Option<String> {
        self.read(|entries| {
            let record = entries.get(uid)?.runtime.latest(name)?;
            record.is_running().then(|| record.id.clone())
        })
    }

    /// The newest container of that name, or with `previous` the newest finished one before it.
    pub fn container(
        &self,
        key: PodKey<'_>,
        container: &str,
        previous: bool,
    ) -> Result<ContainerHandle, LookupError> {
        self.find(key, |entry| entry.container(container, previous))?
    }

    /// The live sandbox of a pod.
    pub fn sandbox(&self, key: PodKey<'_>) -> Result<String, LookupError> {
        self.find(key, |entry| entry.runtime.live_sandbox().map(|sandbox| sandbox.id.clone()))?
            .ok_or_else(|| LookupError::NoSandbox { name: key.name.to_owned() })
    }

    /// The UID of the pod that has this container or sandbox.
    #[must_use]
    pub fn owner_of(&self, id: &str) -> Option<String> {
        self.read(|entries| {
            let has = |entry: &Entry| {
                entry.runtime.container(id).is_some() || entry.runtime.sandboxes.iter().any(|s| s.id == id)
            };
            entries.iter().find(|(_, entry)| has(entry)).map(|(uid, _)| uid.clone())
        })
    }

    /// Looks at every pod and what it has in the runtime.
    pub(crate) fn visit(&self, mut look: impl FnMut(&Pod, &PodRuntime)) {
        self.read(|entries| entries.values().for_each(|entry| look(&entry.pod, &entry.runtime)));
    }

    /// Gives the pod as it is shown from now on.
    pub(crate) fn publish(&self, pod: &Pod, status: &PodStatus, runtime: &PodRuntime) -> Arc<Pod> {
        let mut status = status.clone();
        let foreign = pod.status.iter().flat_map(|told| told.conditions.iter().flatten());
        let foreign = foreign.filter(|condition| !super::status::is_owned(&condition.type_)).cloned();
        status.conditions.get_or_insert_default().extend(foreign);
        let shown = Pod { metadata: pod.metadata.clone(), spec: pod.spec.clone(), status: Some(status) };
        let uid = labels::identity(pod).2.to_owned();
        let shown = Arc::new(shown);
        let entry = Entry { pod: Arc::clone(&shown), runtime: runtime.clone() };
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(uid, entry);
        shown
    }

    pub(super) fn forget(&self, uid: &str) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    fn read<T>(&self, look: impl FnOnce(&BTreeMap<String, Entry>) -> T) -> T {
        look(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn find<T>(&self, key: PodKey<'_>, look: impl FnOnce(&Entry) -> T) -> Result<T, LookupError> {
        self.read(|entries| {
            let fits = |(uid, entry): &(&String, &Entry)| {
                let (name, namespace, _) = labels::identity(&entry.pod);
                let mirror =
                    entry.pod.metadata.annotations.as_ref().and_then(|notes| notes.get(labels::CONFIG_HASH));
                let uid_fits =
                    key.uid.is_none_or(|wanted| wanted == *uid || mirror.is_some_and(|hash| hash == wanted));
                name == key.name && namespace == key.namespace && uid_fits
            };
            let found = entries.iter().find(fits).map(|(_, entry)| look(entry));
            found.ok_or_else(|| LookupError::NoPod {
                namespace: key.namespace.to_owned(),
                name: key.name.to_owned(),
            })
        })
    }
}

impl Entry {
    fn container(&self, container: &str, previous: bool) -> Result<ContainerHandle, LookupError> {
        let name = labels::identity(&self.pod).0.to_owned();
        let words = || (name.clone(), container.to_owned());
        let latest = self.runtime.latest(container);
        let record = if previous {
            // Between an end and the restart the one that ended is the previous one.
            let resting = latest.filter(|latest| latest.has_exited() && self.is_waiting(container).is_some());
            let before = || latest.and_then(|latest| self.runtime.previous(latest));
            let (name, container) = words();
            resting.or_else(before).ok_or(LookupError::NoPrevious { name, container })?
        } else {
            match latest {
                Some(record) => record,
                None if self.is_specified(container) => {
                    let reason = self.is_waiting(container).unwrap_or_else(|| "ContainerCreating".to_owned());
                    let (name, container) = words();
                    return Err(LookupError::NotStarted { name, container, reason });
                }
                None => {
                    let (name, container) = words();
                    return Err(LookupError::NoContainer { name, container });
                }
            }
        };
        Ok(ContainerHandle {
            pod: Arc::clone(&self.pod),
            container_id: record.id.clone(),
            sandbox_id: record.sandbox_id.clone(),
            state: record.state,
            log_path: PathBuf::from(&record.log_path),
            attempt: record.attempt,
        })
    }

    fn is_specified(&self, container: &str) -> bool {
        let Some(spec) = self.pod.spec.as_ref() else { return false };
        spec.containers.iter().chain(spec.init_containers.iter().flatten()).any(|c| c.name == container)
            || spec.ephemeral_containers.iter().flatten().any(|c| c.name == container)
    }

    fn is_waiting(&self, container: &str) -> Option<String> {
        let status = self.pod.status.as_ref()?;
        let lists = [
            &status.container_statuses,
            &status.init_container_statuses,
            &status.ephemeral_container_statuses,
        ];
        let found = lists.into_iter().flatten().flatten().find(|one| one.name == container)?;
        found.state.as_ref()?.waiting.as_ref()?.reason.clone()
    }
}
