//! What a pod is called. Pods that reach this crate's inner parts always have a name, a namespace and a uid; an absent
//! one reads as empty.

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

#[must_use]
pub fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

#[must_use]
pub fn pod_name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

#[must_use]
pub fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or("default")
}

/// Name of the pod's directory below `/var/log/pods`.
#[must_use]
pub fn pod_log_dir_name(pod: &Pod) -> String {
    format!("{}_{}_{}", namespace(pod), pod_name(pod), uid(pod))
}

/// `name_namespace(uid)`, as messages of the kubelet have it.
pub(crate) fn described(pod: &Pod) -> String {
    format!("{}_{}({})", pod_name(pod), namespace(pod), uid(pod))
}

pub(crate) fn spec(pod: &Pod) -> Option<&PodSpec> {
    pod.spec.as_ref()
}

pub(crate) fn host_network(pod: &Pod) -> bool {
    spec(pod).and_then(|spec| spec.host_network).unwrap_or(false)
}

/// Regular and init containers.
pub(crate) fn containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    let spec = spec(pod);
    let init = spec.and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default();
    init.iter().chain(spec.map(|spec| spec.containers.as_slice()).unwrap_or_default())
}

pub(crate) fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}
