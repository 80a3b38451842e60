//! The status of one container: what it does now, what it did before, and why it does not run.

use super::{NodeFacts, whole_seconds};
use crate::pods::machine::{Goal, PodMachine, restarts_after};
use crate::pods::parts::ContainerKind;
use crate::pods::runtime_state::{ContainerRecord, RunState};
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus, ContainerUser, LinuxContainerUser, VolumeMountStatus,
};

/// Exit code and reason of a container whose end nobody saw.
const LOST_CODE: i32 = 137;
const LOST_REASON: &str = "ContainerStatusUnknown";

pub(super) fn status(
    machine: &PodMachine,
    node: NodeFacts<'_>,
    container: &Container,
    kind: ContainerKind,
) -> ContainerStatus {
    let mut status = ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        started: Some(false),
        ..ContainerStatus::default()
    };
    match machine.runtime.latest(&container.name) {
        Some(record) => from_record(machine, node, container, kind, record, &mut status),
        None => from_memory(machine, container, kind, &mut status),
    }
    status
}

fn from_record(
    machine: &PodMachine,
    node: NodeFacts<'_>,
    container: &Container,
    kind: ContainerKind,
    record: &ContainerRecord,
    status: &mut ContainerStatus,
) {
    let track = machine.track(&container.name);
    status.restart_count = i32::try_from(record.attempt).unwrap_or(i32::MAX);
    status.container_id = Some(format!("{}://{}", node.runtime_name, record.id));
    status.image_id.clone_from(&record.image_ref);
    if !record.image.is_empty() {
        status.image.clone_from(&record.image);
    }
    let before = machine.runtime.previous(record).map(|previous| ended(node, previous));
    match record.state {
        RunState::Running | RunState::Unknown => {
            status.state = Some(ContainerState {
                running: Some(ContainerStateRunning { started_at: record.started_at.map(whole_seconds) }),
                ..ContainerState::default()
            });
            status.last_state = before;
            let is_followed = |of: &&crate::pods::machine::Track| of.health_of == record.id;
            let health = track.filter(is_followed);
            status.started = Some(health.is_some_and(|track| track.started));
            status.ready = match kind {
                ContainerKind::Init if container.restart_policy.is_none() => false,
                ContainerKind::Ephemeral => false,
                _ => health.is_some_and(|track| track.ready),
            };
        }
        RunState::Exited => {
            let this = ended(node, record);
            let restarts = matches!(machine.goal, Goal::Run)
                && restarts_after(machine.spec(), container, kind, record.exit_code);
            match track.and_then(|track| track.blocked.as_ref()).filter(|_| restarts) {
                Some(blocked) => {
                    status.state = Some(waiting(&blocked.failure.reason, &blocked.failure.message));
                    status.last_state = Some(this);
                }
                None => {
                    status.state = Some(this);
                    status.last_state = before;
                }
            }
            status.ready = kind == ContainerKind::Init && record.exit_code == 0;
        }
        RunState::Created => {
            status.state = Some(waiting_reason(machine, container));
            status.last_state = before;
        }
    }
    // Resizing is not done, so what is in force is what is specified.
    status.resources = Some(container.resources.clone().unwrap_or_default());
    status.allocated_resources =
        container.resources.as_ref().and_then(|resources| resources.requests.clone());
    status.volume_mounts = volume_mounts(container);
    status.user = record.user.as_ref().map(|(uid, gid, groups)| ContainerUser {
        linux: Some(LinuxContainerUser { uid: *uid, gid: *gid, supplemental_groups: Some(groups.clone()) }),
    });
}

/// The runtime knows no such container: either it was never made, or it is gone and only our last report tells of it.
fn from_memory(
    machine: &PodMachine,
    container: &Container,
    kind: ContainerKind,
    status: &mut ContainerStatus,
) {
    let Some(known) = machine.known_before(&container.name) else {
        status.state = Some(waiting_reason(machine, container));
        return;
    };
    let was = known.state.clone().unwrap_or_default();
    let stays = match (&machine.goal, &was.terminated) {
        (Goal::Stop(_), Some(_)) => true,
        (Goal::Run, Some(end)) => !restarts_after(machine.spec(), container, kind, end.exit_code),
        (_, None) => false,
    };
    status.clone_from(known);
    status.started = Some(false);
    status.ready = stays && kind == ContainerKind::Init && known.ready;
    if stays {
        return;
    }
    let lost = match &was.terminated {
        Some(_) => was,
        None if was.running.is_some() => lost(was.running.as_ref().and_then(|r| r.started_at.clone())),
        None => known.last_state.clone().unwrap_or_default(),
    };
    match machine.goal {
        Goal::Run => {
            status.last_state = Some(lost);
            status.state = Some(waiting_reason(machine, container));
        }
        Goal::Stop(_) => status.state = Some(lost),
    }
}

/// A container that has not ended although its pod has is taken for lost.
pub(super) fn close(status: &mut ContainerStatus) {
    if status.state.as_ref().is_none_or(|state| state.terminated.is_none()) {
        status.state = Some(lost(None));
        status.ready = false;
        status.started = Some(false);
    }
}

fn lost(started_at: Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Time>) -> ContainerState {
    let terminated = ContainerStateTerminated {
        exit_code: LOST_CODE,
        reason: Some(LOST_REASON.to_owned()),
        message: Some("the runtime no longer knows this container, so how it ended is not known".to_owned()),
        started_at,
        ..ContainerStateTerminated::default()
    };
    ContainerState { terminated: Some(terminated), ..ContainerState::default() }
}

fn ended(node: NodeFacts<'_>, record: &ContainerRecord) -> ContainerState {
    let reason = match (record.reason.as_str(), record.exit_code) {
        ("", 0) => "Completed",
        ("", _) => "Error",
        (told, _) => told,
    };
    let terminated = ContainerStateTerminated {
        container_id: Some(format!("{}://{}", node.runtime_name, record.id)),
        exit_code: record.exit_code,
        finished_at: record.finished_at.map(whole_seconds),
        started_at: record.started_at.map(whole_seconds),
        reason: Some(reason.to_owned()),
        message: (!record.message.is_empty()).then(|| record.message.clone()),
        signal: None,
    };
    ContainerState { terminated: Some(terminated), ..ContainerState::default() }
}

fn waiting(reason: &str, message: &str) -> ContainerState {
    let waiting = ContainerStateWaiting {
        reason: Some(reason.to_owned()),
        message: (!message.is_empty()).then(|| message.to_owned()),
    };
    ContainerState { waiting: Some(waiting), ..ContainerState::default() }
}

fn waiting_reason(machine: &PodMachine, container: &Container) -> ContainerState {
    if let Some(blocked) = machine.track(&container.name).and_then(|track| track.blocked.as_ref()) {
        return waiting(&blocked.failure.reason, &blocked.failure.message);
    }
    let has_init = machine.spec().init_containers.iter().flatten().next().is_some();
    waiting(if has_init { "PodInitializing" } else { "ContainerCreating" }, "")
}

fn volume_mounts(container: &Container) -> Option<Vec<VolumeMountStatus>> {
    let mounts = container.volume_mounts.as_ref().filter(|mounts| !mounts.is_empty())?;
    let one = |mount: &k8s_openapi::api::core::v1::VolumeMount| VolumeMountStatus {
        mount_path: mount.mount_path.clone(),
        name: mount.name.clone(),
        read_only: mount.read_only,
        recursive_read_only: match (mount.read_only, mount.recursive_read_only.as_deref()) {
            (Some(true), Some("Enabled")) => Some("Enabled".to_owned()),
            (Some(true), None | Some("Disabled")) => Some("Disabled".to_owned()),
            _ => None,
        },
        ..VolumeMountStatus::default()
    };
    Some(mounts.iter().map(one).collect())
}
