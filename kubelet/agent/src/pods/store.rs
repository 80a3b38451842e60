//! The pods this node shall run, merged from their sources. Pure: a source's news goes in, changes come out.

use super::labels;
use super::machine::Origin;
use k8s_openapi::api::core::v1::Pod;
use orlop_api::watch::WatchEvent;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What a source's news mean for one pod.
#[derive(Debug, Clone)]
pub enum Change {
    Set(Arc<Pod>, Origin),
    Removed { uid: String },
}

/// All sources' pods by UID, and the mirrors of static pods by full name.
#[derive(Debug, Default)]
pub struct Store {
    api: BTreeMap<String, Arc<Pod>>,
    files: BTreeMap<String, Arc<Pod>>,
    mirrors: BTreeMap<String, Arc<Pod>>,
    api_heard: bool,
    files_heard: bool,
}

impl Store {
    /// A source that does not exist counts as heard.
    #[must_use]
    pub fn new(has_api: bool, has_files: bool) -> Self {
        Self { api_heard: !has_api, files_heard: !has_files, ..Self::default() }
    }

    /// Every source has spoken: what no source names now is an orphan.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.api_heard && self.files_heard
    }

    #[must_use]
    pub fn api_heard(&self) -> bool {
        self.api_heard
    }

    #[must_use]
    pub fn contains(&self, uid: &str) -> bool {
        self.api.contains_key(uid) || self.files.contains_key(uid)
    }

    #[must_use]
    pub fn get(&self, uid: &str) -> Option<(Arc<Pod>, Origin)> {
        let from = |pods: &BTreeMap<_, _>, origin| pods.get(uid).map(|pod| (Arc::clone(pod), origin));
        from(&self.files, Origin::File).or_else(|| from(&self.api, Origin::Api))
    }

    pub fn pods(&self) -> impl Iterator<Item = (&Arc<Pod>, Origin)> {
        let files = self.files.values().map(|pod| (pod, Origin::File));
        files.chain(self.api.values().map(|pod| (pod, Origin::Api)))
    }

    /// Static pods by full name.
    #[must_use]
    pub fn static_pods(&self) -> BTreeMap<String, Arc<Pod>> {
        self.files.values().map(|pod| (labels::full_name(pod), Arc::clone(pod))).collect()
    }

    #[must_use]
    pub fn mirrors(&self) -> &BTreeMap<String, Arc<Pod>> {
        &self.mirrors
    }

    /// The API's pods as a former life of this kubelet knew them. They count until the API server has spoken.
    pub fn remember(&mut self, pods: Vec<Pod>) -> Vec<Change> {
        if self.api_heard {
            return Vec::new();
        }
        let plain = pods.into_iter().filter(|pod| is_usable(pod) && !is_mirror(pod)).map(Arc::new).collect();
        replace(&mut self.api, plain, Origin::Api)
    }

    pub fn hear_api(&mut self, news: WatchEvent<Pod>) -> Vec<Change> {
        match news {
            WatchEvent::Listed(pods) => {
                self.api_heard = true;
                let (mirrors, plain): (Vec<_>, Vec<_>) =
                    pods.into_iter().filter(is_usable).map(slim).partition(|pod| is_mirror(pod));
                self.mirrors = mirrors.into_iter().map(|pod| (labels::full_name(&pod), pod)).collect();
                replace(&mut self.api, plain, Origin::Api)
            }
            WatchEvent::Applied(pod) if !is_usable(&pod) => Vec::new(),
            WatchEvent::Applied(pod) if is_mirror(&pod) => {
                self.mirrors.insert(labels::full_name(&pod), slim(pod));
                Vec::new()
            }
            WatchEvent::Applied(pod) => {
                let pod = slim(pod);
                self.api.insert(labels::identity(&pod).2.to_owned(), Arc::clone(&pod));
                vec![Change::Set(pod, Origin::Api)]
            }
            WatchEvent::Deleted(pod) if is_mirror(&pod) => {
                let name = labels::full_name(&pod);
                if self.mirrors.get(&name).is_some_and(|known| known.metadata.uid == pod.metadata.uid) {
                    self.mirrors.remove(&name);
                }
                Vec::new()
            }
            WatchEvent::Deleted(pod) => {
                let uid = labels::identity(&pod).2.to_owned();
                self.api.remove(&uid).map(|_| Change::Removed { uid }).into_iter().collect()
            }
        }
    }

    /// The complete list of static pods.
    pub fn hear_files(&mut self, pods: Vec<Arc<Pod>>) -> Vec<Change> {
        self.files_heard = true;
        replace(&mut self.files, pods, Origin::File)
    }
}

/// A pod without a specification or UID cannot be run or even told apart. A UID becomes part of paths.
fn is_usable(pod: &Pod) -> bool {
    pod.spec.is_some() && labels::is_plain_uid(labels::identity(pod).2)
}

/// Who wrote which field concerns the API server only, and is the largest part of many objects.
fn slim(mut pod: Pod) -> Arc<Pod> {
    pod.metadata.managed_fields = None;
    Arc::new(pod)
}

#[must_use]
pub fn is_mirror(pod: &Pod) -> bool {
    pod.metadata.annotations.as_ref().is_some_and(|notes| notes.contains_key(labels::CONFIG_MIRROR))
}

/// Removals first: a new pod may have the name of an old one. Additions in the order of their creation, so that after a
/// restart the same ones win where not all fit.
fn replace(known: &mut BTreeMap<String, Arc<Pod>>, pods: Vec<Arc<Pod>>, origin: Origin) -> Vec<Change> {
    let fresh: BTreeMap<String, Arc<Pod>> =
        pods.into_iter().map(|pod| (labels::identity(&pod).2.to_owned(), pod)).collect();
    let gone = known.keys().filter(|uid| !fresh.contains_key(*uid));
    let mut changes: Vec<Change> = gone.map(|uid| Change::Removed { uid: uid.clone() }).collect();
    let changed = fresh.iter().filter(|(uid, pod)| known.get(*uid).is_none_or(|old| old != *pod));
    let mut set: Vec<Arc<Pod>> = changed.map(|(_, pod)| Arc::clone(pod)).collect();
    set.sort_by(|a, b| a.metadata.creation_timestamp.cmp(&b.metadata.creation_timestamp));
    changes.extend(set.into_iter().map(|pod| Change::Set(pod, origin)));
    *known = fresh;
    changes
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, uid: &str, mirror: bool) -> Pod {
        let notes = if mirror { json!({"kubernetes.io/config.mirror": "h"}) } else { json!({}) };
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "n", "uid": uid, "annotations": notes},
            "spec": {"containers": []},
        }))
        .unwrap()
    }

    fn words(changes: &[Change]) -> Vec<String> {
        changes
            .iter()
            .map(|change| match change {
                Change::Set(pod, _) => format!("set {}", pod.metadata.uid.as_deref().unwrap()),
                Change::Removed { uid } => format!("removed {uid}"),
            })
            .collect()
    }

    #[test]
    fn a_list_tells_what_came_and_what_went_while_nobody_looked() {
        let mut store = Store::new(true, false);
        store.hear_api(WatchEvent::Listed(vec![pod("a", "1", false), pod("b", "2", false)]));
        let changes = store.hear_api(WatchEvent::Listed(vec![pod("b", "2", false), pod("a", "3", false)]));
        assert_eq!(words(&changes), ["removed 1", "set 3"]);
    }

    #[test]
    fn remembered_pods_count_until_the_api_server_has_spoken() {
        let mut store = Store::new(true, false);
        let changes = store.remember(vec![pod("a", "1", false), pod("b", "2", false), pod("m", "3", true)]);
        assert_eq!(words(&changes), ["set 1", "set 2"]);
        assert!(!store.is_complete(), "a memory is no word of the API server");
        let changes = store.hear_api(WatchEvent::Listed(vec![pod("b", "2", false), pod("a", "4", false)]));
        assert_eq!(words(&changes), ["removed 1", "set 4"]);
        assert!(store.remember(vec![pod("a", "1", false)]).is_empty(), "too late");
    }

    #[test]
    fn a_uid_that_is_a_path_is_no_pod() {
        let mut store = Store::new(true, false);
        for uid in ["", ".", "..", "../x", "a/b", "a\0b", &"u".repeat(200)] {
            let changes = store.hear_api(WatchEvent::Applied(pod("p", uid, false)));
            assert!(changes.is_empty(), "{uid:?}");
        }
    }

    #[test]
    fn mirrors_are_no_pods_to_run() {
        let mut store = Store::new(true, false);
        assert!(store.hear_api(WatchEvent::Listed(vec![pod("m", "1", true)])).is_empty());
        assert!(store.mirrors().contains_key("m_n"));
        store.hear_api(WatchEvent::Deleted(pod("m", "other", true)));
        assert!(store.mirrors().contains_key("m_n"), "an older mirror's deletion is not the newer one's");
        store.hear_api(WatchEvent::Deleted(pod("m", "1", true)));
        assert!(store.mirrors().is_empty());
    }

    #[test]
    fn orphans_exist_only_when_every_source_has_spoken() {
        let mut store = Store::new(true, true);
        store.hear_files(Vec::new());
        assert!(!store.is_complete());
        store.hear_api(WatchEvent::Listed(Vec::new()));
        assert!(store.is_complete());
    }
}
