//! Quality-of-service class, and where the pod's cgroup is.

use crate::podspec::facts::{CgroupDriver, Facts};
use crate::podspec::identity;
use crate::podspec::quantity::Amount;
use k8s_openapi::api::core::v1::{Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use std::collections::BTreeMap;
use std::fmt;

/// How the node treats a pod when resources run short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Qos {
    Guaranteed,
    Burstable,
    BestEffort,
}

impl Qos {
    /// As `status.qosClass` has it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Guaranteed => "Guaranteed",
            Self::Burstable => "Burstable",
            Self::BestEffort => "BestEffort",
        }
    }
}

impl fmt::Display for Qos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A named resource of a list, zero if absent or unreadable: the API server refuses what cannot be parsed.
pub(crate) fn amount(list: Option<&BTreeMap<String, Quantity>>, name: &str) -> Amount {
    list.and_then(|list| list.get(name))
        .and_then(|quantity| Amount::try_from(quantity).ok())
        .unwrap_or(Amount::ZERO)
}

/// A container's request; a limit alone is a request too.
pub(crate) fn request(resources: Option<&ResourceRequirements>, name: &str) -> Amount {
    let Some(resources) = resources else { return Amount::ZERO };
    match resources.requests.as_ref().and_then(|requests| requests.get(name)) {
        Some(_) => amount(resources.requests.as_ref(), name),
        None => amount(resources.limits.as_ref(), name),
    }
}

pub(crate) fn limit(resources: Option<&ResourceRequirements>, name: &str) -> Amount {
    amount(resources.and_then(|resources| resources.limits.as_ref()), name)
}

fn is_stated(resources: &ResourceRequirements) -> bool {
    let names = [&resources.requests, &resources.limits].into_iter().flatten().flat_map(BTreeMap::keys);
    names.into_iter().any(|name| matches!(name.as_str(), "cpu" | "memory") || name.starts_with("hugepages-"))
}

/// The class of a pod. The status wins, since the API server has fixed it there at creation.
#[must_use]
pub fn qos(pod: &Pod) -> Qos {
    match pod.status.as_ref().and_then(|status| status.qos_class.as_deref()) {
        Some("Guaranteed") => return Qos::Guaranteed,
        Some("Burstable") => return Qos::Burstable,
        Some("BestEffort") => return Qos::BestEffort,
        _ => {}
    }
    // Resources of the pod as a whole take the containers' place only if they say something.
    let pod_level = identity::spec(pod).and_then(|spec| spec.resources.as_ref()).filter(|it| is_stated(it));
    let all: Vec<Option<&ResourceRequirements>> = match pod_level {
        Some(resources) => vec![Some(resources)],
        None => identity::containers(pod).map(|container| container.resources.as_ref()).collect(),
    };
    let states = |resources: &Option<&ResourceRequirements>, name| {
        request(*resources, name).is_positive() || limit(*resources, name).is_positive()
    };
    let fixed = |resources: &Option<&ResourceRequirements>, name| {
        let limit = limit(*resources, name);
        limit.is_positive() && request(*resources, name) == limit
    };
    if !all.iter().any(|resources| states(resources, "cpu") || states(resources, "memory")) {
        Qos::BestEffort
    } else if all.iter().all(|resources| fixed(resources, "cpu") && fixed(resources, "memory")) {
        Qos::Guaranteed
    } else {
        Qos::Burstable
    }
}

/// The pod's cgroup as CRI's `cgroup_parent` wants it: a path from the root of the tree, or a slice.
#[must_use]
pub fn cgroup_parent(facts: &Facts, pod: &Pod) -> String {
    let class = match qos(pod) {
        Qos::Guaranteed => None,
        Qos::Burstable => Some("burstable"),
        Qos::BestEffort => Some("besteffort"),
    };
    let uid = identity::uid(pod);
    let root = facts.cgroup_root.trim_matches('/');
    match facts.cgroup_driver {
        CgroupDriver::Cgroupfs => {
            let mut path = String::new();
            for part in [Some(root), Some("kubepods"), class].into_iter().flatten().filter(|p| !p.is_empty())
            {
                path.push('/');
                path.push_str(part);
            }
            format!("{path}/pod{uid}")
        }
        CgroupDriver::Systemd => {
            // A dash separates slices, so it cannot stand in a name.
            let root = root.trim_end_matches(".slice").replace('-', "_").replace('/', "-");
            let pod = format!("pod{}", uid.replace('-', "_"));
            let mut names: Vec<&str> = root.split('-').filter(|name| !name.is_empty()).collect();
            names.push("kubepods");
            names.extend(class);
            names.push(&pod);
            let slices: Vec<String> =
                (1..=names.len()).map(|count| format!("{}.slice", names[..count].join("-"))).collect();
            format!("/{}", slices.join("/"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(containers: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"uid": "a-b"}, "spec": {"containers": containers}}))
            .unwrap()
    }

    #[test]
    fn classes_follow_requests_and_limits() {
        let full = json!({"name": "a", "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}});
        let half = json!({"name": "b", "resources": {"requests": {"cpu": "100m"}, "limits": {"cpu": "1", "memory": "1Gi"}}});
        let none = json!({"name": "c", "resources": {"limits": {"example.com/gpu": "1"}}});
        for (containers, class) in [
            (json!([full]), Qos::Guaranteed),
            (json!([full, half]), Qos::Burstable),
            (json!([full, none]), Qos::Burstable),
            (json!([none]), Qos::BestEffort),
            (json!([{"name": "d", "resources": {"limits": {"cpu": "0"}}}]), Qos::BestEffort),
            (
                json!([{"name": "e", "resources": {"limits": {"cpu": "1000m", "memory": "1Gi"}, "requests": {"cpu": "1", "memory": "1024Mi"}}}]),
                Qos::Guaranteed,
            ),
        ] {
            assert_eq!(qos(&pod(containers.clone())), class, "{containers}");
        }
    }

    #[test]
    fn resources_of_the_pod_as_a_whole_decide_only_if_there_are_any() {
        let full = json!({"limits": {"cpu": "1", "memory": "1Gi"}});
        let with = |resources: serde_json::Value| -> Pod {
            let container = json!({"name": "a", "resources": full});
            serde_json::from_value(json!({"spec": {"resources": resources, "containers": [container]}}))
                .unwrap()
        };
        assert_eq!(qos(&with(json!({}))), Qos::Guaranteed);
        assert_eq!(qos(&with(json!({"requests": {"cpu": "1"}}))), Qos::Burstable);
        assert_eq!(qos(&with(json!({"limits": {"hugepages-2Mi": "2Mi"}}))), Qos::BestEffort);
    }

    #[test]
    fn cgroups_are_spelled_for_each_driver() {
        let burstable = pod(json!([{"name": "a", "resources": {"requests": {"cpu": "1"}}}]));
        let mut facts = Facts::new("n");
        assert_eq!(cgroup_parent(&facts, &burstable), "/kubepods/burstable/poda-b");
        facts.cgroup_root = "/orlop/x".into();
        assert_eq!(cgroup_parent(&facts, &burstable), "/orlop/x/kubepods/burstable/poda-b");
        facts.cgroup_root = "/".into();
        facts.cgroup_driver = CgroupDriver::Systemd;
        assert_eq!(
            cgroup_parent(&facts, &burstable),
            "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-poda_b.slice"
        );
        assert_eq!(
            cgroup_parent(&facts, &pod(json!([]))),
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-poda_b.slice"
        );
    }
}
