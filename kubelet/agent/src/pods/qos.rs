//! Quality-of-service class of a pod: what its requests and limits of CPU and memory say about it.

use crate::pods::quantity;
use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use std::fmt;

/// Who is squeezed first when the node runs short: best effort, then burstable, then guaranteed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Qos {
    BestEffort,
    Burstable,
    Guaranteed,
}

impl fmt::Display for Qos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BestEffort => "BestEffort",
            Self::Burstable => "Burstable",
            Self::Guaranteed => "Guaranteed",
        })
    }
}

/// The class of a pod. Once the API server has written one into the status, that one holds.
#[must_use]
pub fn qos_class(pod: &Pod) -> Qos {
    match pod.status.as_ref().and_then(|status| status.qos_class.as_deref()) {
        Some("Guaranteed") => return Qos::Guaranteed,
        Some("Burstable") => return Qos::Burstable,
        Some("BestEffort") => return Qos::BestEffort,
        _ => {}
    }
    let Some(spec) = pod.spec.as_ref() else { return Qos::BestEffort };
    if let Some(resources) = spec.resources.as_ref().filter(|resources| !is_empty(resources)) {
        return if is_guaranteed(resources) { Qos::Guaranteed } else { Qos::Burstable };
    }
    let all: Vec<&Container> = spec.init_containers.iter().flatten().chain(spec.containers.iter()).collect();
    let resources: Vec<ResourceRequirements> =
        all.iter().map(|container| container.resources.clone().unwrap_or_default()).collect();
    if resources.iter().all(is_empty) {
        Qos::BestEffort
    } else if resources.iter().all(is_guaranteed) {
        Qos::Guaranteed
    } else {
        Qos::Burstable
    }
}

const COUNTED: [&str; 2] = ["cpu", "memory"];

fn is_empty(resources: &ResourceRequirements) -> bool {
    COUNTED.iter().all(|name| request(resources, name).is_none() && limit(resources, name).is_none())
}

/// Both resources limited, and no request below its limit.
fn is_guaranteed(resources: &ResourceRequirements) -> bool {
    COUNTED.iter().all(|name| match (request(resources, name), limit(resources, name)) {
        (None, Some(_)) => true,
        (Some(request), Some(limit)) => request == limit,
        _ => false,
    })
}

/// A request in thousandths of the unit; zero counts as none.
#[must_use]
pub fn request(resources: &ResourceRequirements, name: &str) -> Option<i128> {
    resources.requests.as_ref()?.get(name).and_then(quantity::milli).filter(|value| *value > 0)
}

/// A limit in thousandths of the unit; zero counts as none.
#[must_use]
pub fn limit(resources: &ResourceRequirements, name: &str) -> Option<i128> {
    resources.limits.as_ref()?.get(name).and_then(quantity::milli).filter(|value| *value > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(containers: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"spec": {"containers": containers}})).unwrap()
    }

    #[test]
    fn a_pod_without_requests_and_limits_is_best_effort() {
        assert_eq!(qos_class(&pod(json!([{"name": "a"}]))), Qos::BestEffort);
    }

    #[test]
    fn limits_of_both_resources_on_every_container_make_a_pod_guaranteed() {
        let limits = json!({"limits": {"cpu": "1", "memory": "1Gi"}});
        let equal = json!({"limits": {"cpu": "500m", "memory": "1Gi"}, "requests": {"cpu": "0.5", "memory": "1024Mi"}});
        let both = pod(json!([{"name": "a", "resources": limits}, {"name": "b", "resources": equal}]));
        assert_eq!(qos_class(&both), Qos::Guaranteed);
        let one = pod(json!([{"name": "a", "resources": limits}, {"name": "b"}]));
        assert_eq!(qos_class(&one), Qos::Burstable);
    }

    #[test]
    fn a_request_below_its_limit_makes_a_pod_burstable() {
        let low = json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "100m"}});
        assert_eq!(qos_class(&pod(json!([{"name": "a", "resources": low}]))), Qos::Burstable);
    }
}
