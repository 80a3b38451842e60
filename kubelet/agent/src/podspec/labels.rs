//! Labels and annotations by which tools, and a kubelet after its restart, recognise sandboxes and containers.

use crate::podspec::identity;
use k8s_openapi::api::core::v1::{Container, Pod};
use std::collections::HashMap;

const POD_NAME: &str = "io.kubernetes.pod.name";
const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
const POD_UID: &str = "io.kubernetes.pod.uid";
const CONTAINER_NAME: &str = "io.kubernetes.container.name";

fn pod_identity(pod: &Pod) -> HashMap<String, String> {
    HashMap::from([
        (POD_NAME.to_owned(), identity::pod_name(pod).to_owned()),
        (POD_NAMESPACE.to_owned(), identity::namespace(pod).to_owned()),
        (POD_UID.to_owned(), identity::uid(pod).to_owned()),
    ])
}

pub(super) fn sandbox_labels(pod: &Pod) -> HashMap<String, String> {
    let mut labels: HashMap<_, _> = pod.metadata.labels.clone().unwrap_or_default().into_iter().collect();
    labels.extend(pod_identity(pod));
    labels
}

pub(super) fn sandbox_annotations(pod: &Pod) -> HashMap<String, String> {
    pod.metadata.annotations.clone().unwrap_or_default().into_iter().collect()
}

pub(super) fn container_labels(pod: &Pod, container: &Container) -> HashMap<String, String> {
    let mut labels = pod_identity(pod);
    labels.insert(CONTAINER_NAME.to_owned(), container.name.clone());
    labels
}

pub(super) fn container_annotations(
    pod: &Pod,
    container: &Container,
    attempt: u32,
) -> Result<HashMap<String, String>, serde_json::Error> {
    let path = container.termination_message_path.clone().unwrap_or_default();
    let policy = container.termination_message_policy.clone().unwrap_or_default();
    let mut annotations = HashMap::from([
        ("io.kubernetes.container.hash".to_owned(), format!("{:x}", container_hash(container))),
        ("io.kubernetes.container.restartCount".to_owned(), attempt.to_string()),
        ("io.kubernetes.container.terminationMessagePath".to_owned(), path),
        ("io.kubernetes.container.terminationMessagePolicy".to_owned(), policy),
    ]);
    let mut add = |name: &str, value: String| annotations.insert(format!("io.kubernetes.{name}"), value);
    if let Some(seconds) = pod.metadata.deletion_grace_period_seconds {
        add("pod.deletionGracePeriod", seconds.to_string());
    }
    if let Some(seconds) = identity::spec(pod).and_then(|spec| spec.termination_grace_period_seconds) {
        add("pod.terminationGracePeriod", seconds.to_string());
    }
    if let Some(hook) = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref()) {
        add("container.preStopHandler", serde_json::to_string(hook)?);
    }
    if let Some(ports) = container.ports.as_ref().filter(|ports| !ports.is_empty()) {
        add("container.ports", serde_json::to_string(ports)?);
    }
    Ok(annotations)
}

/// Changes exactly when a running container has to be replaced: with its name or its image.
#[must_use]
pub fn container_hash(container: &Container) -> u32 {
    const OFFSET: u32 = 0x811c_9dc5;
    const PRIME: u32 = 0x0100_0193;
    let image = container.image.as_deref().unwrap_or_default();
    let json = serde_json::json!({"image": image, "name": container.name}).to_string();
    json.bytes().fold(OFFSET, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_sees_name_and_image_and_nothing_else() {
        let container = |json| serde_json::from_value::<Container>(json).unwrap();
        let base = container_hash(&container(serde_json::json!({"name": "a", "image": "i"})));
        let more = container(serde_json::json!({"name": "a", "image": "i", "args": ["x"]}));
        assert_eq!(container_hash(&more), base);
        assert_ne!(container_hash(&container(serde_json::json!({"name": "a", "image": "j"}))), base);
        assert_ne!(container_hash(&container(serde_json::json!({"name": "b", "image": "i"}))), base);
    }
}
