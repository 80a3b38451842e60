//! The status of a pod, computed from its state machine. Pure: the same state gives the same status.

mod conditions;
mod container;
pub mod patch;
pub mod persist;
mod phase;
#[cfg(test)]
mod tests;
pub mod writer;

pub use conditions::{OWNED_CONDITIONS, is_owned};

use super::labels;
use super::machine::{Goal, PodMachine, as_container};
use super::parts::ContainerKind;
use crate::podspec;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, ContainerStatus, HostIP, PodIP, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use std::net::IpAddr;

/// What a status needs beside the pod's own state.
#[derive(Debug, Clone, Copy)]
pub struct NodeFacts<'a> {
    pub host_ips: &'a [IpAddr],
    /// Prefix of container ids, such as `containerd`.
    pub runtime_name: &'a str,
}

/// Times in the API have whole seconds.
fn whole_seconds(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
}

/// The status to report now.
#[must_use]
pub fn compute(machine: &PodMachine, node: NodeFacts<'_>, now: Timestamp) -> PodStatus {
    let prior = &machine.prior;
    let mut status = PodStatus {
        start_time: Some(prior.start_time.clone().unwrap_or_else(|| whole_seconds(machine.first_seen))),
        qos_class: Some(podspec::qos(&machine.pod).to_string()),
        observed_generation: machine.pod.metadata.generation,
        nominated_node_name: prior.nominated_node_name.clone(),
        resize: None,
        ..PodStatus::default()
    };
    set_addresses(&mut status, machine, node);
    if !machine.is_rejected() {
        set_containers(&mut status, machine, node);
    }
    let decided = phase::decide(machine, &status);
    status.phase = Some(decided.phase.to_owned());
    status.reason = decided.reason;
    status.message = decided.message;
    status.conditions = Some(conditions::compute(machine, &status, now));
    status
}

fn set_containers(status: &mut PodStatus, machine: &PodMachine, node: NodeFacts<'_>) {
    let spec = machine.spec();
    let one = |container: &Container, kind| container::status(machine, node, container, kind);
    let some = |list: Vec<ContainerStatus>| (!list.is_empty()).then_some(list);
    status.init_container_statuses =
        some(spec.init_containers.iter().flatten().map(|c| one(c, ContainerKind::Init)).collect());
    status.container_statuses = some(spec.containers.iter().map(|c| one(c, ContainerKind::Main)).collect());
    status.ephemeral_container_statuses = some(
        spec.ephemeral_containers
            .iter()
            .flatten()
            .map(|c| one(&as_container(c), ContainerKind::Ephemeral))
            .collect(),
    );
    for list in
        [&mut status.container_statuses, &mut status.ephemeral_container_statuses].into_iter().flatten()
    {
        list.sort_by(|a, b| a.name.cmp(&b.name));
    }
    // Only now is it known whether the pod was initialised, and with that, what a container that never ran means.
    if machine.is_torn_down() && conditions::is_initialized(machine, status) {
        for lost in status.container_statuses.iter_mut().flatten() {
            container::close(lost);
        }
    }
}

fn set_addresses(status: &mut PodStatus, machine: &PodMachine, node: NodeFacts<'_>) {
    let prior = &machine.prior;
    let hosts = || node.host_ips.iter().map(ToString::to_string);
    status.host_ip = hosts().next().or_else(|| prior.host_ip.clone());
    status.host_ips = if node.host_ips.is_empty() {
        prior.host_ips.clone()
    } else {
        Some(hosts().map(|ip| HostIP { ip }).collect())
    };
    if matches!(&machine.goal, Goal::Stop(_)) && machine.is_rejected() {
        return;
    }
    let live = machine.runtime.live_sandbox();
    let pod_ips: Vec<String> = if machine.spec().host_network == Some(true) {
        live.map(|_| hosts().collect()).unwrap_or_default()
    } else {
        live.map(|sandbox| sandbox.ips.iter().map(ToString::to_string).collect()).unwrap_or_default()
    };
    if pod_ips.is_empty() {
        status.pod_ip.clone_from(&prior.pod_ip);
        status.pod_ips.clone_from(&prior.pod_ips);
    } else {
        status.pod_ip = pod_ips.first().cloned();
        status.pod_ips = Some(pod_ips.into_iter().map(|ip| PodIP { ip }).collect());
    }
}

/// `name_namespace(uid)`, as messages name a pod.
#[must_use]
pub fn pod_words(machine: &PodMachine) -> String {
    let (name, namespace, uid) = labels::identity(&machine.pod);
    format!("{name}_{namespace}({uid})")
}
