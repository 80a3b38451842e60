//! Mirror pods: the API objects by which static pods can be seen. Never run, only shown.
//!
//! A mirror is wrong when it was made from an older manifest or is being deleted; then it is deleted at once and made
//! anew. A mirror without a static pod is deleted. The plan is pure; the task applies it whenever either side changes,
//! and again after failures.

use super::labels;
use k8s_openapi::api::core::v1::{Node, Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use orlop_api::{ApiError, Client};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Both sides by full name.
#[derive(Debug, Clone, Default)]
pub struct View {
    pub wanted: BTreeMap<String, Arc<Pod>>,
    pub existing: BTreeMap<String, Arc<Pod>>,
    /// The API server's mirrors are known, and all static pods are.
    pub complete: bool,
}

/// One change to be made.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    Create(Box<Pod>),
    Delete { namespace: String, name: String, uid: String },
}

/// What makes the mirrors right. Where one must be replaced, only its deletion is in this plan: the API server tells when
/// it is gone.
#[must_use]
pub fn plan(view: &View, node: Option<&Node>) -> Vec<Step> {
    if !view.complete {
        return Vec::new();
    }
    let mut steps = Vec::new();
    for (name, mirror) in &view.existing {
        let is_right = view.wanted.get(name).is_some_and(|pod| hash_of(pod) == mirrored_hash(mirror));
        if !is_right || mirror.metadata.deletion_timestamp.is_some() {
            let (name, namespace, uid) = labels::identity(mirror);
            steps.push(Step::Delete {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
                uid: uid.to_owned(),
            });
        }
    }
    // A mirror is owned by its Node, so there is none before the Node exists.
    let Some(node) = node.filter(|node| node.metadata.uid.is_some()) else { return steps };
    let missing = view.wanted.iter().filter(|(name, _)| !view.existing.contains_key(*name));
    steps.extend(missing.map(|(_, pod)| Step::Create(Box::new(mirror_of(pod, node)))));
    steps
}

fn hash_of(pod: &Pod) -> Option<&String> {
    pod.metadata.annotations.as_ref()?.get(labels::CONFIG_HASH)
}

fn mirrored_hash(mirror: &Pod) -> Option<&String> {
    mirror.metadata.annotations.as_ref()?.get(labels::CONFIG_MIRROR)
}

fn mirror_of(pod: &Pod, node: &Node) -> Pod {
    let mut mirror = Pod { status: None::<PodStatus>, ..pod.clone() };
    let metadata = &mut mirror.metadata;
    let hash = metadata.annotations.as_ref().and_then(|notes| notes.get(labels::CONFIG_HASH)).cloned();
    metadata
        .annotations
        .get_or_insert_default()
        .insert(labels::CONFIG_MIRROR.to_owned(), hash.unwrap_or_default());
    metadata.uid = None;
    metadata.resource_version = None;
    metadata.creation_timestamp = None;
    metadata.owner_references = Some(vec![OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node.metadata.name.clone().unwrap_or_default(),
        uid: node.metadata.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: None,
    }]);
    mirror
}

/// Keeps the mirrors right until `view` is closed.
pub async fn run(
    client: Client,
    mut view: watch::Receiver<View>,
    mut node: watch::Receiver<Option<Arc<Node>>>,
) {
    const RETRY: Duration = Duration::from_secs(5);
    let mut node_alive = true;
    loop {
        let current = view.borrow_and_update().clone();
        let steps = plan(&current, node.borrow_and_update().as_deref());
        let mut failed = false;
        for step in steps {
            failed |= apply(&client, step).await.is_err();
        }
        tokio::select! {
            changed = view.changed() => if changed.is_err() { return },
            changed = node.changed(), if node_alive => node_alive = changed.is_ok(),
            () = tokio::time::sleep(RETRY), if failed => {}
        }
    }
}

async fn apply(client: &Client, step: Step) -> Result<(), ApiError> {
    match step {
        Step::Create(mirror) => {
            let (name, namespace, _) = labels::identity(&mirror);
            let path = format!("/api/v1/namespaces/{namespace}/pods");
            match client.create::<_, Pod>(&path, mirror.as_ref()).await {
                Ok(_) => Ok(()),
                // Made by us a moment ago: the watch will tell.
                Err(error) if error.is_conflict() => Ok(()),
                Err(error) => {
                    tracing::warn!(pod = name, namespace, %error, "static pod cannot be shown in the API, will be tried again; the pod itself is not affected");
                    Err(error)
                }
            }
        }
        Step::Delete { namespace, name, uid } => {
            let path = format!("/api/v1/namespaces/{namespace}/pods/{name}");
            let options = json!({
                "apiVersion": "v1", "kind": "DeleteOptions",
                "gracePeriodSeconds": 0, "preconditions": {"uid": uid},
            });
            match client.delete(&path, &options).await {
                Ok(()) => Ok(()),
                Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
                Err(error) => {
                    tracing::warn!(pod = name, namespace, %error, "outdated mirror pod cannot be deleted, will be tried again");
                    Err(error)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(hash: &str) -> Arc<Pod> {
        Arc::new(
            serde_json::from_value(json!({
                "metadata": {"name": "web-me", "namespace": "n", "uid": hash, "annotations": {labels::CONFIG_HASH: hash}},
                "spec": {"containers": []},
            }))
            .unwrap(),
        )
    }

    fn node() -> Node {
        serde_json::from_value(json!({"metadata": {"name": "me", "uid": "node-uid"}})).unwrap()
    }

    fn mirror(hash: &str) -> Arc<Pod> {
        let mut mirror = mirror_of(&pod(hash), &node());
        mirror.metadata.uid = Some("mirror-uid".into());
        Arc::new(mirror)
    }

    fn view(wanted: Option<Arc<Pod>>, existing: Option<Arc<Pod>>) -> View {
        let by_name =
            |pod: Option<Arc<Pod>>| pod.into_iter().map(|pod| ("web-me_n".to_owned(), pod)).collect();
        View { wanted: by_name(wanted), existing: by_name(existing), complete: true }
    }

    #[test]
    fn a_static_pod_without_a_mirror_gets_one_owned_by_the_node() {
        let steps = plan(&view(Some(pod("h")), None), Some(&node()));
        let [Step::Create(made)] = steps.as_slice() else { panic!("{steps:?}") };
        assert_eq!(made.metadata.annotations.as_ref().unwrap()[labels::CONFIG_MIRROR], "h");
        let owner = &made.metadata.owner_references.as_ref().unwrap()[0];
        assert_eq!(
            (owner.kind.as_str(), owner.uid.as_str(), owner.controller),
            ("Node", "node-uid", Some(true))
        );
        assert_eq!(made.metadata.uid, None);
        assert!(plan(&view(Some(pod("h")), None), None).is_empty(), "not before the Node exists");
    }

    #[test]
    fn a_right_mirror_is_left_alone() {
        assert!(plan(&view(Some(pod("h")), Some(mirror("h"))), Some(&node())).is_empty());
    }

    #[test]
    fn a_mirror_that_is_outdated_orphaned_or_being_deleted_is_deleted() {
        let mut dying = (*mirror("h")).clone();
        dying.metadata.deletion_timestamp =
            Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::UNIX_EPOCH));
        for view in [
            view(Some(pod("new")), Some(mirror("old"))),
            view(None, Some(mirror("h"))),
            view(Some(pod("h")), Some(Arc::new(dying))),
        ] {
            let steps = plan(&view, Some(&node()));
            let expected =
                Step::Delete { namespace: "n".into(), name: "web-me".into(), uid: "mirror-uid".into() };
            assert_eq!(steps, [expected]);
        }
    }

    #[test]
    fn nothing_is_deleted_before_both_sides_are_known() {
        let unknown = View { complete: false, ..view(None, Some(mirror("h"))) };
        assert!(plan(&unknown, Some(&node())).is_empty());
    }
}
