//! Which containers of a running pod are to be started, restarted, killed or forgotten.

use super::{Action, PodMachine, StartRequest, Track, Work};
use super::{Blocked, StartFailure};
use crate::pods::events::PodEvent;
use crate::pods::labels;
use crate::pods::parts::{ContainerKind, ProbeSeed, ProbeTarget};
use crate::pods::runtime_state::{ContainerRecord, RunState, SandboxRecord};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, ContainerStatus, EphemeralContainer, PodSpec};
use std::sync::Arc;
use std::time::Duration;

/// How long a failed pull is shown as such before it is shown as waiting for the next try.
const SHOW_FAILED_PULL: SignedDuration = SignedDuration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartPolicy {
    Always,
    OnFailure,
    Never,
}

impl RestartPolicy {
    fn parse(text: Option<&str>) -> Option<Self> {
        match text? {
            "Always" => Some(Self::Always),
            "OnFailure" => Some(Self::OnFailure),
            "Never" => Some(Self::Never),
            _ => None,
        }
    }

    #[must_use]
    pub fn of_pod(spec: &PodSpec) -> Self {
        Self::parse(spec.restart_policy.as_deref()).unwrap_or(Self::Always)
    }
}

/// An init container that runs as long as the pod.
#[must_use]
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// Whether a container that ended with this code runs again. Its own rules come first, then its own policy, then the pod's.
#[must_use]
pub fn restarts_after(spec: &PodSpec, container: &Container, kind: ContainerKind, exit_code: i32) -> bool {
    for rule in container.restart_policy_rules.iter().flatten() {
        let Some(codes) = rule.exit_codes.as_ref() else { continue };
        let listed = codes.values.iter().flatten().any(|code| *code == exit_code);
        if listed == (codes.operator == "In") {
            return rule.action == "Restart";
        }
    }
    let own = RestartPolicy::parse(container.restart_policy.as_deref());
    match (own.unwrap_or_else(|| RestartPolicy::of_pod(spec)), kind) {
        (_, ContainerKind::Ephemeral) | (RestartPolicy::Never, _) => false,
        // A plain init container that succeeded has done its work under any policy.
        (_, ContainerKind::Init) if own.is_none() => exit_code != 0,
        (RestartPolicy::Always, _) => true,
        (RestartPolicy::OnFailure, _) => exit_code != 0,
    }
}

/// What the containers of a pod need.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// Everything that decides the pod's end has ended for good.
    pub finished: bool,
    /// To be started as soon as their back-off allows.
    pub wanted: Vec<(Container, ContainerKind)>,
}

impl PodMachine {
    /// The containers whose turn it is, judged by the newest sandbox.
    pub(super) fn survey(&self) -> Survey {
        let spec = self.spec();
        let mains_ended = spec.containers.iter().all(|container| {
            self.ended_code(container)
                .is_some_and(|code| !restarts_after(spec, container, ContainerKind::Main, code))
        });
        if mains_ended && !spec.containers.is_empty() {
            return Survey { finished: true, wanted: Vec::new() };
        }
        let Some(sandbox) = self.runtime.live_sandbox() else {
            // A pod that must not be restarted is not given a second sandbox once something ran in its first.
            let never = RestartPolicy::of_pod(spec) == RestartPolicy::Never;
            let had_sandbox = !self.runtime.sandboxes.is_empty();
            return Survey { finished: never && had_sandbox && self.ran_before(), wanted: Vec::new() };
        };
        let mut survey = Survey::default();
        let sandbox = sandbox.id.clone();
        for container in spec.ephemeral_containers.iter().flatten().map(as_container) {
            if self.runtime.latest(&container.name).is_none() && self.known_before(&container.name).is_none()
            {
                survey.wanted.push((container, ContainerKind::Ephemeral));
            }
        }
        let initialized = self.survey_init(&sandbox, &mut survey);
        if initialized && !survey.finished {
            for container in &spec.containers {
                if self.wants_start(&sandbox, container, ContainerKind::Main) {
                    survey.wanted.push((container.clone(), ContainerKind::Main));
                }
            }
        }
        survey
    }

    /// Adds the init containers that are due; true when all have done their part.
    fn survey_init(&self, sandbox: &str, survey: &mut Survey) -> bool {
        let spec = self.spec();
        let past_init =
            spec.containers.iter().any(|main| self.runtime.latest_in(sandbox, &main.name).is_some());
        for container in spec.init_containers.iter().flatten() {
            let record = self.runtime.latest_in(sandbox, &container.name);
            if is_sidecar(container) {
                if self.wants_start(sandbox, container, ContainerKind::Init) {
                    survey.wanted.push((container.clone(), ContainerKind::Init));
                }
                let is_up = record.is_some_and(|record| record.state == RunState::Running)
                    && self
                        .track(&container.name)
                        .is_some_and(|track| track.started && track.work == Work::Idle);
                if !is_up && !past_init {
                    return false;
                }
                continue;
            }
            if past_init {
                continue;
            }
            match record {
                Some(record) if record.has_exited() && record.exit_code == 0 => {}
                Some(record) if record.has_exited() => {
                    if restarts_after(spec, container, ContainerKind::Init, record.exit_code) {
                        survey.wanted.push((container.clone(), ContainerKind::Init));
                    } else {
                        survey.finished = true;
                    }
                    return false;
                }
                Some(record) if record.is_running() => return false,
                _ => {
                    survey.wanted.push((container.clone(), ContainerKind::Init));
                    return false;
                }
            }
        }
        true
    }

    fn wants_start(&self, sandbox: &str, container: &Container, kind: ContainerKind) -> bool {
        match self.runtime.latest(&container.name) {
            None => match self.known_code(&container.name) {
                Some(code) => restarts_after(self.spec(), container, kind, code),
                None => true,
            },
            Some(record) if record.has_exited() => {
                restarts_after(self.spec(), container, kind, record.exit_code)
                    || (is_sidecar(container) && record.sandbox_id != sandbox)
            }
            Some(record) if record.is_running() => false,
            // Made but never started: the kubelet died in between.
            Some(_) => true,
        }
    }

    /// The code a container has ended with, from the runtime or else from what was once reported.
    fn ended_code(&self, container: &Container) -> Option<i32> {
        match self.runtime.latest(&container.name) {
            Some(record) => record.has_exited().then_some(record.exit_code),
            None => self.known_code(&container.name),
        }
    }

    fn known_code(&self, name: &str) -> Option<i32> {
        Some(self.known_before(name)?.state.as_ref()?.terminated.as_ref()?.exit_code)
    }

    /// The status last reported of a container that has existed.
    #[must_use]
    pub fn known_before(&self, name: &str) -> Option<&ContainerStatus> {
        let all = [
            &self.prior.container_statuses,
            &self.prior.init_container_statuses,
            &self.prior.ephemeral_container_statuses,
        ];
        let mut statuses = all.into_iter().flatten().flatten();
        statuses.find(|status| {
            status.name == name && status.container_id.as_ref().is_some_and(|id| !id.is_empty())
        })
    }

    fn ran_before(&self) -> bool {
        self.spec()
            .containers
            .iter()
            .any(|c| self.runtime.latest(&c.name).is_some_and(|r| r.state != RunState::Created))
    }

    pub(super) fn plan_containers(
        &mut self,
        sandbox_id: &str,
        survey: Survey,
        now: Timestamp,
        out: &mut Vec<Action>,
    ) {
        self.kill_strays(sandbox_id, now, out);
        let Some(sandbox) = self.runtime.live_sandbox().cloned() else { return };
        for (container, kind) in survey.wanted {
            self.plan_start(container, kind, &sandbox, now, out);
        }
    }

    /// Kills what runs but should not: in an older sandbox, unknown to the specification, changed, or lost from sight.
    fn kill_strays(&mut self, sandbox_id: &str, now: Timestamp, out: &mut Vec<Action>) {
        let until = now + SignedDuration::from_secs(self.grace_seconds());
        let mut strays = Vec::new();
        for record in self.runtime.containers.iter().filter(|record| record.is_running()) {
            let name = &record.name;
            let why = if record.sandbox_id != sandbox_id {
                format!("Container {name} is left over from an earlier sandbox")
            } else if record.state == RunState::Unknown {
                format!("The runtime does not know the state of container {name}")
            } else {
                match self.container(name) {
                    None => format!("Container {name} is not in the pod's specification"),
                    Some((container, kind))
                        if kind != ContainerKind::Ephemeral && is_changed(record, &container) =>
                    {
                        format!("Container {name} definition changed, will be restarted")
                    }
                    Some(_) => continue,
                }
            };
            strays.push((record.clone(), why));
        }
        for (record, why) in strays {
            self.kill(&record, until, why, now, out);
        }
    }

    /// Keeps `started` and `ready` about the container that runs now, and its probes running.
    pub(super) fn follow_health(&mut self, now: Timestamp, out: &mut Vec<Action>) {
        let spec = self.spec();
        let all: Vec<Container> =
            spec.init_containers.iter().flatten().chain(&spec.containers).cloned().collect();
        let pod_ip = self.runtime.live_sandbox().and_then(|sandbox| sandbox.ips.first().copied());
        for container in all {
            let running =
                self.runtime.latest(&container.name).filter(|r| r.state == RunState::Running).cloned();
            let known = self.known_before(&container.name).cloned();
            let pod = Arc::clone(&self.pod);
            let track = self.track_mut(&container.name);
            let Some(record) = running else {
                track.started = false;
                track.ready = false;
                if std::mem::take(&mut track.probed) {
                    out.push(Action::StopProbes { container_id: track.health_of.clone() });
                }
                continue;
            };
            if track.health_of == record.id {
                continue;
            }
            if std::mem::take(&mut track.probed) {
                out.push(Action::StopProbes { container_id: track.health_of.clone() });
            }
            let reported = known.filter(|status| ends_with_id(status, &record.id));
            begin_health(track, &container, &record, reported.as_ref());
            track.probed = container.startup_probe.is_some()
                || container.liveness_probe.is_some()
                || container.readiness_probe.is_some();
            if track.probed {
                out.push(Action::StartProbes(Box::new(ProbeTarget {
                    pod,
                    container: container.name.clone(),
                    container_id: record.id,
                    pod_ip,
                    seed: ProbeSeed { started: track.started, ready: track.ready },
                    running_for: Duration::try_from(now.duration_since(record.started_at.unwrap_or(now)))
                        .unwrap_or_default(),
                })));
            }
        }
    }

    fn plan_start(
        &mut self,
        container: Container,
        kind: ContainerKind,
        sandbox: &SandboxRecord,
        now: Timestamp,
        out: &mut Vec<Action>,
    ) {
        let name = container.name.clone();
        let last = self.runtime.latest(&name).cloned();
        if self.track_mut(&name).work != Work::Idle {
            return;
        }
        if let Some(record) = last.as_ref().filter(|record| record.state == RunState::Created) {
            self.remove(vec![record.clone()], Vec::new(), out);
            return;
        }
        let ended = last.as_ref().filter(|record| record.has_exited()).cloned();
        if !self.may_start(&container, ended.as_ref(), now, out) {
            return;
        }
        let attempt = match (&last, self.known_before(&name)) {
            (Some(record), _) => record.attempt + 1,
            (None, Some(status)) => u32::try_from(status.restart_count).unwrap_or(0) + 1,
            (None, None) => 0,
        };
        let track = self.track_mut(&name);
        match track.image.take() {
            None => {
                track.work = Work::Pulling;
                out.push(Action::EnsureImage { container: Box::new(container) });
            }
            Some(image) => {
                track.work = Work::Starting;
                if let Some(ended) = &ended {
                    track.crash.record(ended.ended_at(), now);
                }
                let request = StartRequest { container, kind, attempt, image, sandbox: sandbox.clone() };
                out.push(Action::StartContainer(Box::new(request)));
            }
        }
    }

    /// Whether neither a failed pull, a failed start nor a crash holds the container back.
    fn may_start(
        &mut self,
        container: &Container,
        ended: Option<&ContainerRecord>,
        now: Timestamp,
        out: &mut Vec<Action>,
    ) -> bool {
        let pod = Arc::clone(&self.pod);
        let longest = self.longest_backoff;
        let is_fresh = !self.tracks.contains_key(&container.name)
            || self.tracks.get(&container.name).is_some_and(|track| track.health_of.is_empty());
        let track = self.track_mut(&container.name);
        if let Some(blocked) = &mut track.blocked {
            show_pull_backoff(blocked, container, &pod, now, out);
            let until = blocked.until;
            let shown = (blocked.failure.reason == "ErrImagePull").then(|| blocked.since + SHOW_FAILED_PULL);
            if until > now {
                self.wake_at(shown.filter(|shown| *shown > now).map_or(until, |shown| shown.min(until)));
                return false;
            }
        }
        let Some(ended) = ended else { return true };
        if is_fresh
            && track.told_backoff.is_none()
            && ended.attempt > 0
            && track.crash.delay(ended.ended_at()).is_zero()
        {
            // The first look after our own restart: a crash loop goes on where it was.
            let ran = ended.ended_at().duration_since(ended.started_at.unwrap_or(ended.created_at));
            if ran < longest * 2 {
                track.crash =
                    track.crash.resumed(ended.attempt, ended.started_at.unwrap_or(ended.created_at));
            }
        }
        let Some(until) = track.crash.until(ended.ended_at(), now) else { return true };
        let delay = track.crash.delay(ended.ended_at());
        if track.told_backoff != Some(ended.ended_at()) {
            track.told_backoff = Some(ended.ended_at());
            let (name, namespace, uid) = labels::identity(&pod);
            let target = format!("{} in pod {name}_{namespace}({uid})", container.name);
            let event =
                PodEvent::warning("BackOff", format!("Back-off restarting failed container {target}"));
            out.push(Action::Report(event.of_container(&pod, &container.name), Arc::clone(&pod)));
            track.blocked = Some(Blocked::new(
                StartFailure {
                    reason: "CrashLoopBackOff".to_owned(),
                    message: format!(
                        "back-off {}s restarting failed container={} pod={name}_{namespace}({uid})",
                        delay.as_secs(),
                        container.name
                    ),
                },
                now,
                until,
            ));
        }
        self.wake_at(until);
        false
    }

    /// A container of the specification by its name.
    #[must_use]
    pub fn container(&self, name: &str) -> Option<(Container, ContainerKind)> {
        let spec = self.spec();
        let named = |container: &&Container| container.name == name;
        if let Some(found) = spec.containers.iter().find(named) {
            return Some((found.clone(), ContainerKind::Main));
        }
        if let Some(found) = spec.init_containers.iter().flatten().find(named) {
            return Some((found.clone(), ContainerKind::Init));
        }
        let ephemeral = spec.ephemeral_containers.iter().flatten().find(|container| container.name == name);
        ephemeral.map(|found| (as_container(found), ContainerKind::Ephemeral))
    }
}

fn begin_health(
    track: &mut Track,
    container: &Container,
    record: &ContainerRecord,
    reported: Option<&ContainerStatus>,
) {
    track.health_of.clone_from(&record.id);
    track.has_readiness = container.readiness_probe.is_some();
    let was_started = reported.and_then(|status| status.started);
    let was_ready = reported.map(|status| status.ready);
    track.started = container.startup_probe.is_none() || was_started == Some(true);
    track.ready = if track.has_readiness { was_ready == Some(true) } else { track.started };
    track.blocked = None;
}

/// The id in a status carries the runtime's name in front: `containerd://…`.
fn ends_with_id(status: &ContainerStatus, id: &str) -> bool {
    status.container_id.as_deref().is_some_and(|full| full.rsplit("://").next() == Some(id))
}

fn is_changed(record: &ContainerRecord, container: &Container) -> bool {
    !record.hash.is_empty() && record.hash != labels::container_hash(container)
}

/// After a moment a failed pull is told as waiting for its next try.
fn show_pull_backoff(
    blocked: &mut Blocked,
    container: &Container,
    pod: &Arc<k8s_openapi::api::core::v1::Pod>,
    now: Timestamp,
    out: &mut Vec<Action>,
) {
    if blocked.failure.reason != "ErrImagePull"
        || now < blocked.since + SHOW_FAILED_PULL
        || blocked.until <= now
    {
        return;
    }
    let image = container.image.as_deref().unwrap_or_default();
    let message = format!("Back-off pulling image \"{image}\"");
    let event = PodEvent::normal("BackOff", message.clone()).of_container(pod, &container.name);
    out.push(Action::Report(event, Arc::clone(pod)));
    blocked.failure = StartFailure {
        reason: "ImagePullBackOff".to_owned(),
        message: format!("{message}: {}", blocked.failure.message),
    };
}

/// An ephemeral container has a container's fields but no probes, ports or lifecycle.
#[must_use]
pub fn as_container(ephemeral: &EphemeralContainer) -> Container {
    let it = ephemeral.clone();
    Container {
        args: it.args,
        command: it.command,
        env: it.env,
        env_from: it.env_from,
        image: it.image,
        image_pull_policy: it.image_pull_policy,
        name: it.name,
        resources: it.resources,
        security_context: it.security_context,
        stdin: it.stdin,
        stdin_once: it.stdin_once,
        termination_message_path: it.termination_message_path,
        termination_message_policy: it.termination_message_policy,
        tty: it.tty,
        volume_devices: it.volume_devices,
        volume_mounts: it.volume_mounts,
        working_dir: it.working_dir,
        ..Container::default()
    }
}
