//! Whether a pod may begin here. The scheduler has chosen; this is the node's own last word.

use super::machine::Verdict;
use k8s_openapi::api::core::v1::{Node, NodeSelectorRequirement, NodeSelectorTerm, Pod};
use std::collections::{BTreeMap, HashSet};

/// What the node has to say about a pod.
#[derive(Debug, Clone, Copy)]
pub struct Admission<'a> {
    pub node: Option<&'a Node>,
    pub max_pods: usize,
}

impl Admission<'_> {
    /// `active` are the pods that run or will run here, without the one in question.
    pub fn admit(&self, pod: &Pod, active: &[&Pod]) -> Result<(), Verdict> {
        let Some(spec) = pod.spec.as_ref() else { return Ok(()) };
        let selected_os = spec.node_selector.as_ref().and_then(|labels| labels.get("kubernetes.io/os"));
        if let Some(os) = selected_os.filter(|os| *os != "linux") {
            let why = format!("the pod selects nodes with operating system {os}, and this one runs linux");
            return Err(reject("PodOSSelectorNodeLabelDoesNotMatch", &why));
        }
        if let Some(os) = spec.os.as_ref().filter(|os| os.name != "linux") {
            let why = format!("the pod is made for operating system {}, and this node runs linux", os.name);
            return Err(reject("PodOSNotSupported", &why));
        }
        if active.len() >= self.max_pods {
            let why = format!(
                "the node has no room for another pod: {} of at most {} run here",
                active.len(),
                self.max_pods
            );
            return Err(reject("OutOfpods", &why));
        }
        if self.node.is_some_and(|node| !selects(pod, node)) {
            return Err(reject(
                "NodeAffinity",
                "the node's labels do not fit the pod's node selector or affinity",
            ));
        }
        let taken: HashSet<HostPort<'_>> = active.iter().flat_map(|pod| host_ports(pod)).collect();
        for port in host_ports(pod) {
            if taken.iter().any(|other| other.conflicts(&port)) {
                let why = format!("host port {}/{} is in use by another pod", port.number, port.protocol);
                return Err(reject("NodePorts", &why));
            }
        }
        Ok(())
    }
}

fn reject(reason: &str, why: &str) -> Verdict {
    Verdict { reason: reason.to_owned(), message: format!("Pod was rejected: {why}"), rejected: true }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct HostPort<'a> {
    number: i32,
    protocol: &'a str,
    ip: &'a str,
}

impl HostPort<'_> {
    fn conflicts(&self, other: &HostPort<'_>) -> bool {
        let same_address = self.ip == other.ip || self.is_everywhere() || other.is_everywhere();
        self.number == other.number && self.protocol == other.protocol && same_address
    }

    fn is_everywhere(&self) -> bool {
        matches!(self.ip, "" | "0.0.0.0" | "::")
    }
}

fn host_ports(pod: &Pod) -> Vec<HostPort<'_>> {
    let Some(spec) = pod.spec.as_ref() else { return Vec::new() };
    let sidecars =
        spec.init_containers.iter().flatten().filter(|init| init.restart_policy.as_deref() == Some("Always"));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    ports
        .filter_map(|port| {
            let number = port.host_port.filter(|number| *number > 0)?;
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            Some(HostPort { number, protocol, ip: port.host_ip.as_deref().unwrap_or_default() })
        })
        .collect()
}

/// Node selector and required node affinity.
fn selects(pod: &Pod, node: &Node) -> bool {
    let empty = BTreeMap::new();
    let node_labels = node.metadata.labels.as_ref().unwrap_or(&empty);
    let name = node.metadata.name.as_deref().unwrap_or_default();
    let Some(spec) = pod.spec.as_ref() else { return true };
    let by_selector =
        spec.node_selector.iter().flatten().all(|(key, value)| node_labels.get(key) == Some(value));
    let required = spec
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    let by_affinity = required
        .is_none_or(|required| required.node_selector_terms.iter().any(|term| fits(term, node_labels, name)));
    by_selector && by_affinity
}

/// An empty term fits nothing.
fn fits(term: &NodeSelectorTerm, node_labels: &BTreeMap<String, String>, name: &str) -> bool {
    let by_label = term.match_expressions.iter().flatten();
    let by_field = term.match_fields.iter().flatten();
    let count = by_label.clone().count() + by_field.clone().count();
    count > 0
        && by_label.clone().all(|one| holds(one, node_labels.get(&one.key).map(String::as_str)))
        && by_field.clone().all(|one| one.key == "metadata.name" && holds(one, Some(name)))
}

fn holds(one: &NodeSelectorRequirement, found: Option<&str>) -> bool {
    let values = || one.values.iter().flatten();
    let listed = found.is_some_and(|found| values().any(|value| value == found));
    let compare = |greater: bool| {
        let (Some(found), Some(bound)) = (found, values().next()) else { return false };
        match (found.parse::<i64>(), bound.parse::<i64>()) {
            (Ok(found), Ok(bound)) => {
                if greater {
                    found > bound
                } else {
                    found < bound
                }
            }
            _ => false,
        }
    };
    match one.operator.as_str() {
        "In" => listed,
        "NotIn" => !listed,
        "Exists" => found.is_some(),
        "DoesNotExist" => found.is_none(),
        "Gt" => compare(true),
        "Lt" => compare(false),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(spec: Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"uid": "u"}, "spec": spec})).unwrap()
    }

    fn node() -> Node {
        serde_json::from_value(json!({"metadata": {"name": "me", "labels": {"zone": "a", "size": "5"}}}))
            .unwrap()
    }

    fn verdict(spec: Value, active: &[&Pod]) -> Option<String> {
        let node = node();
        let admission = Admission { node: Some(&node), max_pods: 2 };
        admission.admit(&pod(spec), active).err().map(|verdict| verdict.reason)
    }

    fn with_port(port: Value) -> Value {
        json!({"containers": [{"name": "c", "ports": [port]}]})
    }

    #[test]
    fn a_host_port_is_given_once_per_address_and_protocol() {
        let holder = pod(with_port(json!({"containerPort": 80, "hostPort": 80, "hostIP": "10.0.0.1"})));
        let try_port = |port| verdict(with_port(port), &[&holder]);
        assert_eq!(try_port(json!({"containerPort": 80, "hostPort": 80})).as_deref(), Some("NodePorts"));
        assert_eq!(try_port(json!({"containerPort": 80, "hostPort": 80, "hostIP": "10.0.0.2"})), None);
        assert_eq!(try_port(json!({"containerPort": 80, "hostPort": 80, "protocol": "UDP"})), None);
        assert_eq!(try_port(json!({"containerPort": 80})), None);
    }

    #[test]
    fn a_full_node_takes_no_more_pods() {
        let other = pod(json!({"containers": []}));
        assert_eq!(verdict(json!({"containers": []}), &[&other]), None);
        assert_eq!(verdict(json!({"containers": []}), &[&other, &other]).as_deref(), Some("OutOfpods"));
    }

    #[test]
    fn selector_affinity_and_operating_system_must_fit() {
        let affinity = |expression: Value| {
            json!({"containers": [], "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution":
                {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}}}})
        };
        for (spec, expected) in [
            (json!({"containers": [], "nodeSelector": {"zone": "a"}}), None),
            (json!({"containers": [], "nodeSelector": {"zone": "b"}}), Some("NodeAffinity")),
            (affinity(json!({"key": "size", "operator": "Gt", "values": ["4"]})), None),
            (affinity(json!({"key": "size", "operator": "Lt", "values": ["4"]})), Some("NodeAffinity")),
            (affinity(json!({"key": "zone", "operator": "NotIn", "values": ["a"]})), Some("NodeAffinity")),
            (json!({"containers": [], "os": {"name": "windows"}}), Some("PodOSNotSupported")),
        ] {
            assert_eq!(verdict(spec.clone(), &[]).as_deref(), expected, "{spec}");
        }
    }
}
