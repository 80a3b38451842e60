//! The conditions that a kubelet owns. Others in the same list belong to their writers and are left alone.

use super::phase::find;
use super::whole_seconds;
use crate::pods::machine::{PodMachine, is_sidecar};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{PodCondition, PodStatus};

/// The types of conditions only we write.
pub const OWNED_CONDITIONS: [&str; 5] =
    ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];

#[must_use]
pub fn is_owned(condition: &str) -> bool {
    OWNED_CONDITIONS.contains(&condition)
}

/// A condition's status with its reason and message.
struct Finding {
    is_true: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Finding {
    fn yes() -> Self {
        Self { is_true: true, reason: None, message: None }
    }

    fn no(reason: &'static str, message: Option<String>) -> Self {
        Self { is_true: false, reason: Some(reason), message }
    }
}

/// Every init container has done its part, or a main container has run, which comes after.
pub(super) fn is_initialized(machine: &PodMachine, status: &PodStatus) -> bool {
    incomplete_init(machine, status).is_empty()
}

fn incomplete_init(machine: &PodMachine, status: &PodStatus) -> Vec<String> {
    let ran = |name: &str| {
        let one = find(status.container_statuses.as_deref(), name);
        one.is_some_and(|one| one.container_id.as_ref().is_some_and(|id| !id.is_empty()))
    };
    if let Some(live) = machine.runtime.live_sandbox() {
        if machine.spec().containers.iter().any(|c| machine.runtime.latest_in(&live.id, &c.name).is_some()) {
            return Vec::new();
        }
    } else if machine.spec().containers.iter().any(|container| ran(&container.name)) {
        return Vec::new();
    }
    let done = |container: &&k8s_openapi::api::core::v1::Container| {
        let one = find(status.init_container_statuses.as_deref(), &container.name);
        let Some(one) = one else { return false };
        if is_sidecar(container) {
            return one.started == Some(true);
        }
        one.state.as_ref().and_then(|state| state.terminated.as_ref()).is_some_and(|end| end.exit_code == 0)
    };
    let spec = machine.spec();
    spec.init_containers.iter().flatten().filter(|c| !done(c)).map(|c| c.name.clone()).collect()
}

pub(super) fn compute(machine: &PodMachine, status: &PodStatus, now: Timestamp) -> Vec<PodCondition> {
    let containers_ready = containers_ready(machine, status);
    let ready = ready(machine, &containers_ready);
    let findings = [
        ("PodReadyToStartContainers", ready_to_start(machine)),
        ("Initialized", initialized(machine, status)),
        ("Ready", ready),
        ("ContainersReady", containers_ready),
        ("PodScheduled", Finding::yes()),
    ];
    findings.into_iter().map(|(type_, finding)| condition(machine, type_, finding, now)).collect()
}

fn condition(machine: &PodMachine, type_: &str, finding: Finding, now: Timestamp) -> PodCondition {
    let status = if finding.is_true { "True" } else { "False" };
    let prior = machine.prior.conditions.iter().flatten().find(|prior| prior.type_ == type_);
    let since =
        prior.filter(|prior| prior.status == status).and_then(|prior| prior.last_transition_time.clone());
    PodCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: finding.reason.map(ToOwned::to_owned),
        message: finding.message,
        last_probe_time: None,
        last_transition_time: Some(since.unwrap_or_else(|| whole_seconds(now))),
        observed_generation: machine.pod.metadata.generation,
    }
}

fn ready_to_start(machine: &PodMachine) -> Finding {
    let live = machine.runtime.live_sandbox();
    let has_network =
        live.is_some_and(|sandbox| !sandbox.ips.is_empty() || machine.spec().host_network == Some(true));
    Finding { is_true: has_network, reason: None, message: None }
}

fn initialized(machine: &PodMachine, status: &PodStatus) -> Finding {
    let incomplete = incomplete_init(machine, status);
    if incomplete.is_empty() {
        let reason = (status.phase.as_deref() == Some("Succeeded")).then_some("PodCompleted");
        return Finding { is_true: true, reason, message: None };
    }
    let message = format!("containers with incomplete status: [{}]", incomplete.join(" "));
    Finding::no("ContainersNotInitialized", Some(message))
}

fn containers_ready(machine: &PodMachine, status: &PodStatus) -> Finding {
    match status.phase.as_deref() {
        Some("Succeeded") => return Finding::no("PodCompleted", None),
        Some("Failed") => return Finding::no("PodFailed", None),
        _ => {}
    }
    let spec = machine.spec();
    let sidecars = spec.init_containers.iter().flatten().filter(|c| is_sidecar(c));
    let side = sidecars.map(|c| (c, status.init_container_statuses.as_deref()));
    let mains = spec.containers.iter().map(|c| (c, status.container_statuses.as_deref()));
    let unready: Vec<&str> = side
        .chain(mains)
        .filter(|(container, list)| !find(*list, &container.name).is_some_and(|one| one.ready))
        .map(|(container, _)| container.name.as_str())
        .collect();
    if unready.is_empty() {
        return Finding::yes();
    }
    Finding::no(
        "ContainersNotReady",
        Some(format!("containers with unready status: [{}]", unready.join(" "))),
    )
}

/// Ready is what the containers say and what everyone named as a readiness gate says.
fn ready(machine: &PodMachine, containers: &Finding) -> Finding {
    if !containers.is_true {
        let mut told = Finding::no(containers.reason.unwrap_or("ContainersNotReady"), None);
        told.message.clone_from(&containers.message);
        return told;
    }
    let told = machine.pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    let mut missing = Vec::new();
    for gate in machine.spec().readiness_gates.iter().flatten() {
        let found = told.into_iter().flatten().find(|condition| condition.type_ == gate.condition_type);
        match found {
            None => missing.push(format!("readiness gate \"{}\" has no condition", gate.condition_type)),
            Some(condition) if condition.status != "True" => missing.push(format!(
                "readiness gate \"{}\" is {}, not True",
                gate.condition_type, condition.status
            )),
            Some(_) => {}
        }
    }
    if missing.is_empty() {
        return Finding::yes();
    }
    Finding::no("ReadinessGatesNotReady", Some(missing.join(", ")))
}
