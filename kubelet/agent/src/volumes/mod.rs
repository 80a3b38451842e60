//! Volumes: what a pod's containers find at their mount paths.
//!
//! A pod's volumes are first a plan (`plan`: which kind, which sources), then contents (`payload`), then a list of file
//! operations that one executor performs (`atomic`), or a mount (`mounting`). Layout, as every tool expects it:
//!
//! ```text
//! <root>/pods/<uid>/volumes/kubernetes.io~<kind>/<name>/    one volume
//!                   volume-subpaths/<volume>/<container>/   binds of parts of volumes (made by podspec)
//!                   containers/<name>/<attempt>             termination messages (made by podspec)
//!                   etc-hosts
//! ```
//!
//! [`Volumes::mount`] is idempotent and cheap when nothing has changed; nothing about a mounted volume is kept in files
//! of ours, the disk and the kernel's mount table say it all.

mod atomic;
mod error;
mod host_path;
mod mounting;
mod ownership;
mod payload;
mod plan;
mod refresh;
mod teardown;
pub(crate) mod worker;

pub use error::{VolumeCause, VolumeError};

use crate::objects::Objects;
use crate::podspec::{Facts, SharedFacts, namespace, pod_name, uid};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use plan::{Kind, VolumePlan};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

/// How long one step below a file system may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// After contents could not be had and old ones stayed.
const LOOK_AGAIN: SignedDuration = SignedDuration::from_secs(30);

/// One volume, ready for containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountedVolume {
    pub path: PathBuf,
    /// Containers may only read it, whatever their mounts say.
    pub read_only: bool,
}

/// A pod's volumes by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountedVolumes {
    volumes: BTreeMap<String, MountedVolume>,
}

impl MountedVolumes {
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&MountedVolume> {
        self.volumes.get(name)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &MountedVolume)> {
        self.volumes.iter().map(|(name, volume)| (name.as_str(), volume))
    }

    pub fn insert(&mut self, name: &str, volume: MountedVolume) {
        self.volumes.insert(name.to_owned(), volume);
    }
}

/// All volumes of this node. Clones share everything.
#[derive(Clone)]
pub struct Volumes {
    inner: Arc<Inner>,
    /// Ends the refreshing task with the last clone.
    _refresh: Arc<Refresh>,
}

struct Refresh(AbortHandle);

impl Drop for Refresh {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Inner {
    facts: SharedFacts,
    objects: Objects,
    pods: Mutex<BTreeMap<String, Arc<PodVolumes>>>,
    /// A pod came whose tokens may be due before anything else.
    woken: Notify,
}

/// A pod whose volumes are mounted, and what they are to show.
struct PodVolumes {
    /// One at a time per pod: mount, refresh, unmount. `None` after unmounting.
    current: tokio::sync::Mutex<Option<Arc<Pod>>>,
    /// When its first token is due.
    due: Mutex<Option<Timestamp>>,
}

impl fmt::Debug for Volumes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Volumes")
    }
}

impl Volumes {
    /// Must be called within a tokio runtime: contents are kept up to date by a task.
    #[must_use]
    pub fn new(facts: SharedFacts, objects: Objects) -> Self {
        let changes = objects.changes();
        let pods = Mutex::new(BTreeMap::new());
        let inner = Arc::new(Inner { facts, objects, pods, woken: Notify::new() });
        let task = tokio::spawn(refresh::keep_fresh(Arc::clone(&inner), changes));
        Self { inner, _refresh: Arc::new(Refresh(task.abort_handle())) }
    }

    /// Makes all volumes of the pod ready, with contents of this moment. Also brings a changed pod's downward API files
    /// up to date.
    pub async fn mount(&self, pod: &Pod) -> Result<MountedVolumes, VolumeError> {
        let state = self.inner.state(uid(pod));
        let mut current = state.current.lock().await;
        let pod = Arc::new(pod.clone());
        let (mounted, due) = self.inner.apply(&pod).await?;
        *current = Some(pod);
        drop(current);
        state.set_due(due);
        self.inner.woken.notify_one();
        Ok(mounted)
    }

    /// Takes away the pod's volumes and sub path binds. Its containers must have ended. Idempotent.
    pub async fn unmount(&self, pod_uid: &str) -> Result<(), VolumeError> {
        self.tear_down(pod_uid, teardown::volumes).await
    }

    /// Takes away the pod's volumes and the rest of its directory: hosts file, termination messages.
    pub async fn remove(&self, pod_uid: &str) -> Result<(), VolumeError> {
        self.tear_down(pod_uid, teardown::everything).await
    }

    async fn tear_down(
        &self,
        pod_uid: &str,
        how: fn(&std::path::Path) -> std::io::Result<()>,
    ) -> Result<(), VolumeError> {
        let fail = |source| VolumeError::Teardown { pod_uid: pod_uid.to_owned(), source };
        // A uid comes from the API or from a directory's name; as a path it must not lead elsewhere.
        if pod_uid.is_empty() || pod_uid.contains('/') || pod_uid.starts_with('.') {
            return Err(fail(std::io::ErrorKind::InvalidInput.into()));
        }
        let state = self.inner.state(pod_uid);
        let mut current = state.current.lock().await;
        *current = None;
        state.set_due(None);
        let dir = self.inner.facts().pod_dir(pod_uid);
        let done = worker::run(DEADLINE, move || how(&dir)).await;
        done.map_err(|error| fail(error.into()))?.map_err(fail)?;
        self.inner.pods().remove(pod_uid);
        Ok(())
    }
}

impl PodVolumes {
    fn due(&self) -> Option<Timestamp> {
        *self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_due(&self, due: Option<Timestamp>) {
        *self.due.lock().unwrap_or_else(PoisonError::into_inner) = due;
    }
}

impl Inner {
    fn facts(&self) -> Arc<Facts> {
        Arc::clone(&self.facts.borrow())
    }

    fn pods(&self) -> MutexGuard<'_, BTreeMap<String, Arc<PodVolumes>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self, pod_uid: &str) -> Arc<PodVolumes> {
        let fresh = || Arc::new(PodVolumes { current: tokio::sync::Mutex::new(None), due: Mutex::new(None) });
        Arc::clone(self.pods().entry(pod_uid.to_owned()).or_insert_with(fresh))
    }

    /// Brings the pod's volumes to what it and its objects say, and tells when the first token is due.
    async fn apply(&self, pod: &Arc<Pod>) -> Result<(MountedVolumes, Option<Timestamp>), VolumeError> {
        let facts = self.facts();
        let plans = plan::volumes(&facts, pod)?;
        let mut mounted = MountedVolumes::default();
        let mut due: Option<Timestamp> = None;
        for plan in plans {
            let VolumePlan { name, path, kind } = plan;
            let volume = MountedVolume { path: path.clone(), read_only: kind.read_only() };
            let fail = |cause: VolumeCause| VolumeError::setup(&name, cause);
            match kind {
                Kind::Files(files) => {
                    let (payload, renew_at) = match payload::build(&self.objects, &facts, pod, &files).await {
                        // The API server is away, and an earlier life of ours has filled the volume: as after any
                        // refresh that fails, what is there stays.
                        Err(cause @ VolumeCause::Object(_)) if atomic::is_filled(&path) => {
                            let (namespace, pod) = (namespace(pod), pod_name(pod));
                            tracing::warn!(namespace, pod, volume = name, error = %cause, "volume contents stay as an earlier run left them, and are looked for again");
                            let again = Timestamp::now().checked_add(LOOK_AGAIN).unwrap_or(Timestamp::MAX);
                            due = [due, Some(again)].into_iter().flatten().min();
                            mounted.insert(&name, volume);
                            continue;
                        }
                        built => built.map_err(fail)?,
                    };
                    due = [due, renew_at].into_iter().flatten().min();
                    let work = worker::run(DEADLINE, move || files.write(&path, &payload));
                    work.await.map_err(|error| fail(error.into()))?.map_err(fail)?;
                }
                Kind::EmptyDir(empty_dir) => {
                    let work = worker::run(DEADLINE, move || empty_dir.set_up(&path));
                    work.await.map_err(|error| fail(error.into()))?.map_err(fail)?;
                }
                Kind::HostPath(check) => {
                    let work = worker::run(DEADLINE, move || host_path::check(&path, check));
                    work.await.map_err(|error| fail(error.into()))?.map_err(fail)?;
                }
            }
            mounted.insert(&name, volume);
        }
        Ok((mounted, due))
    }
}

#[cfg(test)]
pub(crate) use tests::in_private_mounts;
#[cfg(test)]
mod tests;
