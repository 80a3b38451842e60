//! The phase of a pod: the one word about all its containers.

use crate::pods::machine::{Goal, PodMachine, is_sidecar, restarts_after};
use crate::pods::parts::ContainerKind;
use k8s_openapi::api::core::v1::{ContainerStatus, PodStatus};

pub(super) struct Decided {
    pub(super) phase: &'static str,
    pub(super) reason: Option<String>,
    pub(super) message: Option<String>,
}

/// The phase, with the reason and message of a decision of our own. A terminal phase stays; a new one is held back while
/// anything of the pod may still run.
pub(super) fn decide(machine: &PodMachine, status: &PodStatus) -> Decided {
    let prior = &machine.prior;
    let kept = |phase| Decided { phase, reason: prior.reason.clone(), message: prior.message.clone() };
    match prior.phase.as_deref() {
        Some("Succeeded") => return kept("Succeeded"),
        Some("Failed") => return kept("Failed"),
        _ => {}
    }
    if let Goal::Stop(stopping) = &machine.goal {
        let verdict = stopping.verdict.as_ref();
        let reason = verdict.map(|verdict| verdict.reason.clone());
        let message = verdict.map(|verdict| verdict.message.clone());
        if !machine.is_quiet() {
            let phase = match prior.phase.as_deref() {
                Some("Running") => "Running",
                _ => "Pending",
            };
            return Decided { phase, reason, message };
        }
        let phase = match (verdict, count(machine, status)) {
            (Some(_), _) => "Failed",
            (None, counted) if counted.all_succeeded() => "Succeeded",
            (None, _) => "Failed",
        };
        return Decided { phase, reason, message };
    }
    Decided { phase: running_phase(machine, status), reason: None, message: None }
}

fn running_phase(machine: &PodMachine, status: &PodStatus) -> &'static str {
    let counted = count(machine, status);
    if !super::conditions::is_initialized(machine, status) || counted.waiting > 0 {
        return "Pending";
    }
    if counted.running > 0 || counted.restarting > 0 {
        return "Running";
    }
    // All have ended for good; the word for it is written when the sandbox has stopped too.
    if counted.succeeded + counted.failed > 0 { "Running" } else { "Pending" }
}

#[derive(Default)]
struct Count {
    running: usize,
    waiting: usize,
    restarting: usize,
    succeeded: usize,
    failed: usize,
}

impl Count {
    fn all_succeeded(&self) -> bool {
        self.succeeded > 0 && self.failed + self.waiting + self.running + self.restarting == 0
    }
}

fn count(machine: &PodMachine, status: &PodStatus) -> Count {
    let mut counted = Count::default();
    for container in &machine.spec().containers {
        let Some(one) = find(status.container_statuses.as_deref(), &container.name) else {
            counted.waiting += 1;
            continue;
        };
        let state = one.state.clone().unwrap_or_default();
        if state.running.is_some() {
            counted.running += 1;
        } else if let Some(end) = state.terminated {
            if matches!(machine.goal, Goal::Run)
                && restarts_after(machine.spec(), container, ContainerKind::Main, end.exit_code)
            {
                counted.restarting += 1;
            } else if end.exit_code == 0 {
                counted.succeeded += 1;
            } else {
                counted.failed += 1;
            }
        } else if one.last_state.as_ref().is_some_and(|last| last.terminated.is_some()) {
            counted.restarting += 1;
        } else {
            counted.waiting += 1;
        }
    }
    if init_failed(machine, status) {
        counted.failed += 1;
    }
    counted
}

fn init_failed(machine: &PodMachine, status: &PodStatus) -> bool {
    machine.spec().init_containers.iter().flatten().filter(|container| !is_sidecar(container)).any(
        |container| {
            let one = find(status.init_container_statuses.as_deref(), &container.name);
            let end = one.and_then(|one| one.state.as_ref()?.terminated.as_ref());
            end.is_some_and(|end| end.exit_code != 0)
        },
    )
}

pub(super) fn find<'a>(list: Option<&'a [ContainerStatus]>, name: &str) -> Option<&'a ContainerStatus> {
    list?.iter().find(|status| status.name == name)
}
