//! From facts to a status: pure, with the time as an argument.

use super::KUBELET_VERSION;
use super::facts::{Facts, Health, ImageFacts};
use crate::podspec::quantity::Amount;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, NodeCondition, NodeDaemonEndpoints, NodeStatus, NodeSwapStatus,
    NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use std::collections::BTreeMap;

/// Names per image; the rest would only make the object larger.
const NAMES_PER_IMAGE: usize = 5;

/// The status that follows from the facts. `previous` is what the API server holds: transition times go on from there, and
/// what is not ours is kept.
#[must_use]
pub fn node_status(facts: &Facts, previous: &NodeStatus, now: Timestamp) -> NodeStatus {
    let (capacity, allocatable) = resources(facts, previous);
    NodeStatus {
        addresses: Some(facts.addresses.clone()),
        capacity: Some(capacity),
        allocatable: Some(allocatable),
        conditions: Some(conditions(facts, previous, now)),
        daemon_endpoints: Some(NodeDaemonEndpoints {
            kubelet_endpoint: (facts.port != 0).then(|| DaemonEndpoint { port: i32::from(facts.port) }),
        }),
        node_info: Some(node_info(facts)),
        images: Some(images(&facts.images, facts.max_images)),
        runtime_handlers: (!facts.runtime.handlers.is_empty()).then(|| facts.runtime.handlers.clone()),
        features: facts.runtime.features.clone(),
        declared_features: (!facts.declared_features.is_empty()).then(|| facts.declared_features.clone()),
        ..previous.clone()
    }
}

type Resources = BTreeMap<String, Quantity>;

fn resources(facts: &Facts, previous: &NodeStatus) -> (Resources, Resources) {
    let machine = &facts.machine;
    let mut capacity = foreign(previous.capacity.as_ref());
    let mut allocatable = foreign(previous.allocatable.as_ref());
    let mut put = |name: &str, all: String, left: String| {
        capacity.insert(name.to_owned(), Quantity(all));
        allocatable.insert(name.to_owned(), Quantity(left));
    };
    let cpu = Amount::from_units(i64::from(machine.cpus));
    put("cpu", cpu_text(cpu), cpu_text(not_negative(cpu - facts.reserved.cpu)));

    let memory = bytes(machine.memory);
    let huge = machine.hugepages.values().fold(Amount::ZERO, |sum, size| sum + bytes(*size));
    let left = memory - facts.reserved.memory - facts.reserved.memory_threshold.of(memory) - huge;
    put("memory", bytes_text(memory), bytes_text(not_negative(left)));

    for (size, total) in &machine.hugepages {
        let total = bytes(*total);
        put(&format!("hugepages-{}", size_text(*size)), size_amount(total), size_amount(total));
    }
    if let Some(storage) = machine.storage {
        let storage = bytes(storage);
        let left = storage - facts.reserved.ephemeral_storage - facts.reserved.storage_threshold.of(storage);
        put("ephemeral-storage", bytes_text(storage), not_negative(left).value().to_string());
    }
    let pods = match facts.pods_per_core {
        0 => facts.max_pods,
        per_core => facts.max_pods.min(per_core.saturating_mul(machine.cpus) as usize),
    };
    put("pods", pods.to_string(), pods.to_string());
    (capacity, allocatable)
}

/// Resources that device plugins and others have added bear a domain in their name.
fn foreign(previous: Option<&Resources>) -> Resources {
    previous
        .into_iter()
        .flatten()
        .filter(|(name, _)| name.contains('/'))
        .map(|(name, amount)| (name.clone(), amount.clone()))
        .collect()
}

fn bytes(count: u64) -> Amount {
    Amount::from_units(i64::try_from(count).unwrap_or(i64::MAX))
}

fn not_negative(amount: Amount) -> Amount {
    amount.max(Amount::ZERO)
}

fn cpu_text(amount: Amount) -> String {
    let milli = amount.milli();
    if milli % 1000 == 0 { (milli / 1000).to_string() } else { format!("{milli}m") }
}

fn bytes_text(amount: Amount) -> String {
    let value = amount.value();
    if value % 1024 == 0 && value != 0 { format!("{}Ki", value / 1024) } else { value.to_string() }
}

/// In the largest binary unit that leaves nothing over.
fn size_text(size: u64) -> String {
    [(1u64 << 40, "Ti"), (1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")]
        .into_iter()
        .find(|(unit, _)| size >= *unit && size.is_multiple_of(*unit))
        .map_or_else(|| size.to_string(), |(unit, name)| format!("{}{name}", size / unit))
}

fn size_amount(amount: Amount) -> String {
    size_text(u64::try_from(amount.value()).unwrap_or_default())
}

fn node_info(facts: &Facts) -> NodeSystemInfo {
    let machine = &facts.machine;
    NodeSystemInfo {
        architecture: machine.architecture.clone(),
        boot_id: machine.boot_id.clone(),
        container_runtime_version: facts.runtime.version.clone(),
        kernel_version: machine.kernel_version.clone(),
        kube_proxy_version: String::new(),
        kubelet_version: KUBELET_VERSION.to_owned(),
        machine_id: machine.machine_id.clone(),
        operating_system: "linux".to_owned(),
        os_image: machine.os_image.clone(),
        swap: (machine.swap > 0)
            .then(|| NodeSwapStatus { capacity: Some(i64::try_from(machine.swap).unwrap_or(i64::MAX)) }),
        system_uuid: machine.system_uuid.clone(),
    }
}

/// The largest first: the scheduler prefers nodes that need not pull them.
fn images(all: &[ImageFacts], most: Option<usize>) -> Vec<ContainerImage> {
    let mut sorted: Vec<&ImageFacts> = all.iter().collect();
    sorted
        .sort_by(|a, b| b.size.cmp(&a.size).then_with(|| (&a.digests, &a.tags).cmp(&(&b.digests, &b.tags))));
    sorted
        .into_iter()
        .take(most.unwrap_or(usize::MAX))
        .map(|image| ContainerImage {
            names: Some(image.digests.iter().chain(&image.tags).take(NAMES_PER_IMAGE).cloned().collect()),
            size_bytes: Some(i64::try_from(image.size).unwrap_or(i64::MAX)),
        })
        .collect()
}

fn conditions(facts: &Facts, previous: &NodeStatus, now: Timestamp) -> Vec<NodeCondition> {
    let pressure = |kind: &str, under: bool, [yes, yes_text, no, no_text]: [&str; 4]| {
        let (status, reason, message) = if under { ("True", yes, yes_text) } else { ("False", no, no_text) };
        condition(previous, now, kind, status, reason, message)
    };
    let mut ours = vec![
        pressure(
            "MemoryPressure",
            facts.pressure.memory,
            [
                "KubeletHasInsufficientMemory",
                "kubelet has insufficient memory available",
                "KubeletHasSufficientMemory",
                "kubelet has sufficient memory available",
            ],
        ),
        pressure(
            "DiskPressure",
            facts.pressure.disk,
            [
                "KubeletHasDiskPressure",
                "kubelet has disk pressure",
                "KubeletHasNoDiskPressure",
                "kubelet has no disk pressure",
            ],
        ),
        pressure(
            "PIDPressure",
            facts.pressure.pid,
            [
                "KubeletHasInsufficientPID",
                "kubelet has insufficient PID available",
                "KubeletHasSufficientPID",
                "kubelet has sufficient PID available",
            ],
        ),
        ready(facts, previous, now),
    ];
    // The order that others see should not change under them: theirs stay where they were, in front.
    let others = previous.conditions.iter().flatten().filter(|c| !ours.iter().any(|o| o.type_ == c.type_));
    let mut all: Vec<_> = others.cloned().collect();
    all.append(&mut ours);
    all
}

fn ready(facts: &Facts, previous: &NodeStatus, now: Timestamp) -> NodeCondition {
    let mut problems = match &facts.health {
        Health::Unknown => {
            if let Some(last) = find(previous, "Ready") {
                return NodeCondition { last_heartbeat_time: Some(Time(now)), ..last.clone() };
            }
            vec!["container runtime status check may not have completed yet".to_owned()]
        }
        Health::Ready => Vec::new(),
        Health::NotReady(problems) => problems.clone(),
    };
    if facts.machine.storage.is_none() {
        problems.push("missing node capacity for resources: ephemeral-storage".to_owned());
    }
    if problems.is_empty() {
        condition(previous, now, "Ready", "True", "KubeletReady", "kubelet is posting ready status")
    } else {
        let message = format!("[{}]", problems.join(", "));
        let message = if problems.len() == 1 { problems.remove(0) } else { message };
        condition(previous, now, "Ready", "False", "KubeletNotReady", &message)
    }
}

fn find<'a>(status: &'a NodeStatus, kind: &str) -> Option<&'a NodeCondition> {
    status.conditions.iter().flatten().find(|condition| condition.type_ == kind)
}

/// A condition whose transition time moves only when its status does.
fn condition(
    previous: &NodeStatus,
    now: Timestamp,
    kind: &str,
    status: &str,
    reason: &str,
    message: &str,
) -> NodeCondition {
    let since = find(previous, kind)
        .filter(|last| last.status == status)
        .and_then(|last| last.last_transition_time.clone());
    NodeCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_heartbeat_time: Some(Time(now)),
        last_transition_time: Some(since.unwrap_or(Time(now))),
    }
}

#[cfg(test)]
#[path = "status_tests.rs"]
pub(super) mod tests;
