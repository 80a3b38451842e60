//! One kind of object: an entry per referenced object, each fed by its own watch, counted by the pods that hold it.

use crate::objects::ObjectError;
use crate::objects::references::{Kind, ObjectKey};
use crate::objects::source::Source;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use orlop_api::watch::WatchEvent;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::AbortHandle;

/// An object kind this store can hold.
pub(super) trait Watched: Send + Sync + Sized + 'static {
    fn watch(source: &dyn Source, namespace: &str, name: &str) -> mpsc::Receiver<WatchEvent<Self>>;
    fn immutable(&self) -> bool;
}

impl Watched for ConfigMap {
    fn watch(source: &dyn Source, namespace: &str, name: &str) -> mpsc::Receiver<WatchEvent<Self>> {
        source.config_map(namespace, name)
    }
    fn immutable(&self) -> bool {
        self.immutable == Some(true)
    }
}

impl Watched for Secret {
    fn watch(source: &dyn Source, namespace: &str, name: &str) -> mpsc::Receiver<WatchEvent<Self>> {
        source.secret(namespace, name)
    }
    fn immutable(&self) -> bool {
        self.immutable == Some(true)
    }
}

/// What is known of an object. `None`: nothing yet. `Some(None)`: it does not exist.
type Slot<T> = Option<Option<Arc<T>>>;

struct Entry<T> {
    pods: BTreeSet<String>,
    slot: watch::Receiver<Slot<T>>,
    task: AbortHandle,
}

impl<T> Drop for Entry<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(super) struct Store<T> {
    kind: Kind,
    source: Arc<dyn Source>,
    changes: broadcast::Sender<ObjectKey>,
    entries: Mutex<BTreeMap<(String, String), Entry<T>>>,
}

impl<T: Watched> Store<T> {
    pub(super) fn new(kind: Kind, source: Arc<dyn Source>, changes: broadcast::Sender<ObjectKey>) -> Self {
        Self { kind, source, changes, entries: Mutex::new(BTreeMap::new()) }
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<(String, String), Entry<T>>> {
        // No code below can panic halfway through a change.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the pod's holds be exactly `keys`.
    pub(super) fn hold<'a>(&self, pod: &str, keys: impl Iterator<Item = &'a ObjectKey>) {
        let wanted: BTreeSet<(String, String)> =
            keys.map(|key| (key.namespace.clone(), key.name.clone())).collect();
        let mut entries = self.entries();
        for (namespace, name) in &wanted {
            entries
                .entry((namespace.clone(), name.clone()))
                .or_insert_with(|| self.start(namespace, name))
                .pods
                .insert(pod.to_owned());
        }
        entries.retain(|key, entry| {
            if !wanted.contains(key) {
                entry.pods.remove(pod);
            }
            !entry.pods.is_empty()
        });
    }

    pub(super) fn release(&self, pod: &str) {
        self.hold(pod, std::iter::empty());
    }

    /// The object. One that no pod holds is read for this call only.
    pub(super) async fn get(
        &self,
        namespace: &str,
        name: &str,
        patience: Duration,
    ) -> Result<Option<Arc<T>>, ObjectError> {
        let held =
            self.entries().get(&(namespace.to_owned(), name.to_owned())).map(|entry| entry.slot.clone());
        let (mut slot, _transient) = match held {
            Some(slot) => (slot, None),
            None => {
                let entry = self.start(namespace, name);
                (entry.slot.clone(), Some(entry))
            }
        };
        let known = async { slot.wait_for(Option::is_some).await.ok().and_then(|slot| slot.clone()) };
        if let Ok(Some(object)) = tokio::time::timeout(patience, known).await {
            return Ok(object);
        }
        let key = ObjectKey { kind: self.kind, namespace: namespace.to_owned(), name: name.to_owned() };
        let cause = tokio::time::timeout(patience, self.source.explain(&key))
            .await
            .unwrap_or_else(|_| {
                "the API server does not answer; its contents are not kept on this node, so what needs them waits for it"
                    .to_owned()
            });
        Err(ObjectError::Unavailable { key, cause })
    }

    fn start(&self, namespace: &str, name: &str) -> Entry<T> {
        let (sender, slot) = watch::channel(None);
        let events = T::watch(self.source.as_ref(), namespace, name);
        let key = ObjectKey { kind: self.kind, namespace: namespace.to_owned(), name: name.to_owned() };
        let task = tokio::spawn(follow(events, sender, self.changes.clone(), key)).abort_handle();
        Entry { pods: BTreeSet::new(), slot, task }
    }
}

/// Applies a watch's events to a slot. Ends when the watch does, leaving the last value readable, or at the first
/// immutable object.
async fn follow<T: Watched>(
    mut events: mpsc::Receiver<WatchEvent<T>>,
    slot: watch::Sender<Slot<T>>,
    changes: broadcast::Sender<ObjectKey>,
    key: ObjectKey,
) {
    while let Some(event) = events.recv().await {
        let object = match event {
            WatchEvent::Listed(mut objects) => objects.pop(),
            WatchEvent::Applied(object) => Some(object),
            WatchEvent::Deleted(_) => None,
        };
        let done = object.as_ref().is_some_and(Watched::immutable);
        slot.send_replace(Some(object.map(Arc::new)));
        // Nobody may be listening; then nobody is to be told.
        let _ = changes.send(key.clone());
        if done {
            break;
        }
    }
    drop(events);
    // The slot's value must outlive its watch.
    slot.closed().await;
}
