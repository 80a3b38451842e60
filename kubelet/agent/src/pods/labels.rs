//! The names under which a pod's facts travel through the runtime: labels, annotations, log paths, the container hash.
//!
//! Everything the kubelet must know again after its own restart is written here at creation and read back from the
//! runtime, so these names and formats never change. They are the ones of the stock kubelet: its tools (crictl, log
//! collectors, cAdvisor) look for them.

use k8s_openapi::api::core::v1::{Container, Pod};
use std::collections::{BTreeMap, HashMap};

pub const POD_NAME: &str = "io.kubernetes.pod.name";
pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub const POD_UID: &str = "io.kubernetes.pod.uid";
pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";

pub const CONTAINER_HASH: &str = "io.kubernetes.container.hash";
pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
pub const MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
pub const MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
pub const PORTS: &str = "io.kubernetes.container.ports";
pub const PRE_STOP: &str = "io.kubernetes.container.preStopHandler";
pub const DELETION_GRACE: &str = "io.kubernetes.pod.deletionGracePeriod";
pub const TERMINATION_GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";

pub const CONFIG_SOURCE: &str = "kubernetes.io/config.source";
pub const CONFIG_HASH: &str = "kubernetes.io/config.hash";
pub const CONFIG_SEEN: &str = "kubernetes.io/config.seen";
pub const CONFIG_MIRROR: &str = "kubernetes.io/config.mirror";

/// Name, namespace and UID of a pod as borrowed words; absent ones are empty.
#[must_use]
pub fn identity(pod: &Pod) -> (&str, &str, &str) {
    let meta = &pod.metadata;
    (
        meta.name.as_deref().unwrap_or_default(),
        meta.namespace.as_deref().unwrap_or("default"),
        meta.uid.as_deref().unwrap_or_default(),
    )
}

/// Whether a UID is a plain file name, and short enough to be part of one: directories and cgroups are named by it.
#[must_use]
pub fn is_plain_uid(uid: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    !uid.is_empty() && uid.len() <= 128 && !uid.starts_with('.') && uid.bytes().all(is_plain)
}

/// `name_namespace`, by which a static pod and its mirror are the same.
#[must_use]
pub fn full_name(pod: &Pod) -> String {
    let (name, namespace, _) = identity(pod);
    format!("{name}_{namespace}")
}

/// The labels every container of a pod carries.
#[must_use]
pub fn container_labels(pod: &Pod, container: &str) -> HashMap<String, String> {
    let mut labels = pod_labels(pod);
    labels.insert(CONTAINER_NAME.to_owned(), container.to_owned());
    labels
}

/// The labels every sandbox of a pod carries beside the pod's own.
#[must_use]
pub fn pod_labels(pod: &Pod) -> HashMap<String, String> {
    let (name, namespace, uid) = identity(pod);
    HashMap::from([
        (POD_NAME.to_owned(), name.to_owned()),
        (POD_NAMESPACE.to_owned(), namespace.to_owned()),
        (POD_UID.to_owned(), uid.to_owned()),
    ])
}

/// The annotations a container carries so that it can be stopped and reported on without its pod's specification.
#[must_use]
pub fn container_annotations(pod: &Pod, container: &Container, attempt: u32) -> HashMap<String, String> {
    let mut notes = HashMap::from([
        (CONTAINER_HASH.to_owned(), container_hash(container)),
        (RESTART_COUNT.to_owned(), attempt.to_string()),
        (
            MESSAGE_PATH.to_owned(),
            container.termination_message_path.clone().unwrap_or_else(|| "/dev/termination-log".to_owned()),
        ),
        (
            MESSAGE_POLICY.to_owned(),
            container.termination_message_policy.clone().unwrap_or_else(|| "File".to_owned()),
        ),
    ]);
    if let Some(seconds) = pod.metadata.deletion_grace_period_seconds {
        notes.insert(DELETION_GRACE.to_owned(), seconds.to_string());
    }
    if let Some(seconds) = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds) {
        notes.insert(TERMINATION_GRACE.to_owned(), seconds.to_string());
    }
    if let Some(hook) = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref()) {
        notes.insert(PRE_STOP.to_owned(), json(hook));
    }
    if let Some(ports) = container.ports.as_ref().filter(|ports| !ports.is_empty()) {
        notes.insert(PORTS.to_owned(), json(ports));
    }
    notes
}

/// What of a container cannot change without a new container: its name and image, FNV-1a hashed.
#[must_use]
pub fn container_hash(container: &Container) -> String {
    let fields: BTreeMap<&str, &str> = BTreeMap::from([
        ("image", container.image.as_deref().unwrap_or_default()),
        ("name", &container.name),
    ]);
    let text = serde_json::to_string(&fields).expect("two strings always serialise");
    format!("{:x}", fnv32a(text.as_bytes()))
}

fn fnv32a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// The directory of a pod's logs below the log root.
#[must_use]
pub fn log_directory(pod: &Pod) -> String {
    let (name, namespace, uid) = identity(pod);
    format!("{namespace}_{name}_{uid}")
}

/// A container's log file below its pod's log directory.
#[must_use]
pub fn log_path(container: &str, attempt: u32) -> String {
    format!("{container}/{attempt}.log")
}

/// The name of a container's link below `/var/log/containers`, cut so that any file system accepts it.
#[must_use]
pub fn log_link(pod_name: &str, namespace: &str, container: &str, id: &str) -> String {
    const LONGEST: usize = 255;
    let suffix = format!("_{namespace}_{container}-{id}.log");
    let room = LONGEST.saturating_sub(suffix.len());
    let cut = pod_name.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= room).last();
    format!("{}{suffix}", &pod_name[..cut.unwrap_or(0)])
}

/// Objects of the API serialise without failing: their keys are strings and their numbers finite.
fn json<T: serde::Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_containers_hash_changes_with_its_image_and_nothing_else() {
        let one = Container { name: "a".into(), image: Some("x:1".into()), ..Container::default() };
        let tty = Container { tty: Some(true), ..one.clone() };
        let two = Container { image: Some("x:2".into()), ..one.clone() };
        assert_eq!(container_hash(&one), container_hash(&tty));
        assert_ne!(container_hash(&one), container_hash(&two));
    }

    #[test]
    fn fnv_agrees_with_its_published_vectors() {
        assert_eq!(fnv32a(b""), 0x811c_9dc5);
        assert_eq!(fnv32a(b"foobar"), 0xbf9c_f968);
    }

    #[test]
    fn a_log_link_never_exceeds_a_file_names_length() {
        let id = "f".repeat(64);
        let link = log_link(&"p".repeat(253), "ns", "c", &id);
        assert_eq!(link.len(), 255);
        assert!(link.ends_with(&format!("_ns_c-{id}.log")));
    }
}
