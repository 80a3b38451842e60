//! The state machine of one pod. Pure: `step(state, event, now)` gives the next state and what shall be done.
//!
//! ```text
//!              Observed            prepared, mounted            sandbox ready
//!   (unseen) ───────────> Run ────────────────────────> Run ──────────────────> Run ──┐ init containers in order,
//!                          │   host, volumes: Stage       sandbox: Stage         ^     │ then all others; restarts
//!                          │                                    ^ sandbox lost   └─────┘ by policy and back-off
//!                          │                                    └──────────────────┘
//!                          │ deleted, removed, evicted, rejected, deadline, all containers finished
//!                          v
//!                        Stop ──> containers killed ──> sandboxes stopped ──> torn down ──┬──> settled (finished pods
//!                              (mains, then sidecars                  (volumes unmounted, │    stay until deleted)
//!                               in reverse; one grace)                 cgroup removed)    │
//!                                                     over <── purged <── API object deleted
//! ```
//!
//! Invariants:
//! - Nothing is decided before the runtime has been observed once. What exists there is taken as it is, so a restart of
//!   the kubelet restarts nothing.
//! - Never two operations at once on one container, one sandbox, or the pod's volumes. A goal never goes from Stop to Run.
//! - Actions whose result matters leave a mark (`Stage::Busy`, `Work`, `killing`) that only their result event removes.
//! - The containers of a deleted pod are purged only when the API server has its final status, so an exit code survives a
//!   kubelet that dies in between.

mod containers;
mod killing;
mod results;
mod stopping;
#[cfg(test)]
mod tests;
mod types;

pub use containers::{RestartPolicy, as_container, is_sidecar, restarts_after};
pub use types::{
    Action, Blocked, Event, Goal, KillRequest, Origin, PulledImage, Stage, StartFailure, StartRequest,
    Stopping, Track, Verdict, Work,
};

use super::backoff::Backoff;
use super::events::PodEvent;
use super::labels;
use super::runtime_state::PodRuntime;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Pod, PodSpec, PodStatus};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// How long to wait before an operation of the pod itself (sandbox, volumes, cgroup) is tried again.
const RETRY_FIRST: SignedDuration = SignedDuration::from_secs(1);
const RETRY_LONGEST: SignedDuration = SignedDuration::from_secs(20);
const CRASH_FIRST: SignedDuration = SignedDuration::from_secs(10);

/// Everything one pod's task knows.
#[derive(Debug, Clone)]
pub struct PodMachine {
    pub pod: Arc<Pod>,
    pub origin: Origin,
    pub goal: Goal,
    pub runtime: PodRuntime,
    /// The status last known: the API server's at first, then what we computed.
    pub prior: PodStatus,
    pub first_seen: Timestamp,
    pub tracks: BTreeMap<String, Track>,
    pub host: Stage,
    pub volumes: Stage,
    pub sandbox: Stage,
    /// The runtime has been observed at least once.
    pub observed: bool,
    /// When `step` wants to be called again although nothing happens.
    pub wake: Option<Timestamp>,
    longest_backoff: SignedDuration,
    epoch: u64,
    /// The epoch of the newest observation taken in.
    seen_epoch: u64,
    inspecting: bool,
    inspect_again: bool,
    /// After a failed look: when the next may be taken.
    inspect_after: Option<Timestamp>,
    /// In which epoch a container or sandbox became known by the result of its creation.
    born: HashMap<String, u64>,
    killing: HashMap<String, Killing>,
    /// Sandboxes being stopped; with a time, when a failed stop may be repeated.
    stopping_sandboxes: HashMap<String, Option<Timestamp>>,
    stopped_sandboxes: HashSet<String>,
    removing: HashSet<String>,
}

/// A container on its way down. `until` is when its grace ends, `retry` when a failed kill may be repeated.
#[derive(Debug, Clone, Copy)]
struct Killing {
    until: Timestamp,
    retry: Option<Timestamp>,
}

impl PodMachine {
    #[must_use]
    pub fn new(pod: Arc<Pod>, origin: Origin, longest_backoff: SignedDuration, now: Timestamp) -> Self {
        let prior = pod.status.clone().unwrap_or_default();
        Self {
            origin,
            goal: Goal::Run,
            runtime: PodRuntime::default(),
            prior,
            first_seen: now,
            tracks: BTreeMap::new(),
            host: Stage::Idle,
            volumes: Stage::Idle,
            sandbox: Stage::Idle,
            observed: false,
            wake: None,
            longest_backoff,
            epoch: 0,
            seen_epoch: 0,
            inspecting: false,
            inspect_again: true,
            inspect_after: None,
            born: HashMap::new(),
            killing: HashMap::new(),
            stopping_sandboxes: HashMap::new(),
            stopped_sandboxes: HashSet::new(),
            removing: HashSet::new(),
            pod,
        }
    }

    /// # Panics
    /// Never: the store admits only pods with a specification.
    #[must_use]
    pub fn spec(&self) -> &PodSpec {
        static EMPTY: std::sync::OnceLock<PodSpec> = std::sync::OnceLock::new();
        self.pod.spec.as_ref().unwrap_or_else(|| EMPTY.get_or_init(PodSpec::default))
    }

    #[must_use]
    pub fn uid(&self) -> &str {
        labels::identity(&self.pod).2
    }

    /// Nothing is left to do, now or later: the task may end.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(&self.goal, Goal::Stop(stopping) if stopping.purge == Stage::Done)
    }

    /// All that ran has stopped, and nothing can start any more.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        matches!(self.goal, Goal::Stop(_))
            && !self.runtime.any_running()
            && !self.any_starting()
            && self.runtime.sandboxes.iter().all(|sandbox| self.stopped_sandboxes.contains(&sandbox.id))
    }

    /// All that ran has stopped and nothing of it is mounted or limited any more.
    #[must_use]
    pub fn is_torn_down(&self) -> bool {
        matches!(&self.goal, Goal::Stop(stopping) if stopping.teardown == Stage::Done)
    }

    #[must_use]
    pub fn track(&self, name: &str) -> Option<&Track> {
        self.tracks.get(name)
    }

    fn track_mut(&mut self, name: &str) -> &mut Track {
        let longest = self.longest_backoff;
        self.tracks.entry(name.to_owned()).or_insert_with(|| Track::new(Backoff::new(CRASH_FIRST, longest)))
    }

    fn wake_at(&mut self, at: Timestamp) {
        self.wake = Some(self.wake.map_or(at, |earlier| earlier.min(at)));
    }

    fn look_again(&mut self) {
        self.epoch += 1;
        self.inspect_again = true;
    }

    /// Grace of the pod in seconds: its deletion's, or else its specification's.
    fn grace_seconds(&self) -> i64 {
        let asked = self.pod.metadata.deletion_grace_period_seconds;
        asked.or_else(|| self.spec().termination_grace_period_seconds).unwrap_or(30).max(1)
    }
}

/// One step. The returned state replaces the given one; the actions are to be carried out in their order, each on its
/// own, and their results come back as events.
#[must_use]
pub fn step(mut state: PodMachine, event: Event, now: Timestamp) -> (PodMachine, Vec<Action>) {
    let mut out = Vec::new();
    state.apply(event, now, &mut out);
    state.wake = None;
    state.plan(now, &mut out);
    (state, out)
}

impl PodMachine {
    fn apply(&mut self, event: Event, now: Timestamp, out: &mut Vec<Action>) {
        match event {
            Event::Tick => {}
            Event::Look => self.look_again(),
            Event::Updated(pod) => self.update(pod, now),
            Event::Removed => self.begin_stop(now, |stopping| stopping.gone = true),
            Event::Stop(verdict) => self.begin_stop(now, |stopping| {
                stopping.verdict.get_or_insert(verdict);
            }),
            Event::Observed { epoch, runtime } => self.observe(epoch, runtime),
            Event::ObservationFailed => {
                self.inspecting = false;
                self.inspect_again = true;
                self.inspect_after = Some(now + RETRY_FIRST);
            }
            Event::HostPrepared(result) => {
                let failure = settle(&mut self.host, result, now);
                self.report(out, "FailedCreatePodContainer", failure);
            }
            Event::Mounted(result) => {
                let failure = settle(&mut self.volumes, result, now);
                self.report(out, "FailedMount", failure);
            }
            Event::SandboxCreated(result) => {
                let made = result.map(|record| {
                    self.born.insert(record.id.clone(), self.epoch + 1);
                    self.runtime.merge_sandbox(record);
                });
                let failure = settle(&mut self.sandbox, made, now);
                if self.sandbox == Stage::Done {
                    self.sandbox = Stage::Idle;
                }
                self.report(out, "FailedCreatePodSandBox", failure);
                self.look_again();
            }
            Event::SandboxStopped { id, result } => {
                self.stopping_sandboxes.remove(&id);
                match result {
                    Ok(()) => {
                        if let Some(known) = self.runtime.sandboxes.iter_mut().find(|known| known.id == id) {
                            known.ready = false;
                        }
                        self.stopped_sandboxes.insert(id);
                    }
                    Err(message) => {
                        self.report(out, "FailedKillPod", Some(message));
                        self.stopping_sandboxes.insert(id, Some(now + RETRY_FIRST * 5));
                    }
                }
                self.look_again();
            }
            Event::ImageReady { container, result } => self.image_ready(&container, result, now),
            Event::ContainerStarted { container, result } => self.container_started(&container, result, now),
            Event::ContainerKilled { id, result } => self.container_killed(&id, result, now),
            Event::Removals { ids } => {
                for id in ids {
                    self.removing.remove(&id);
                }
                self.look_again();
            }
            Event::Probe(outcome) => self.probe(&outcome, now, out),
            Event::TornDown(result) => {
                self.settle_stopping(result, now, out, |stopping| &mut stopping.teardown)
            }
            Event::Purged(result) => self.settle_stopping(result, now, out, |stopping| &mut stopping.purge),
            Event::ApiDeleted => {
                if let Goal::Stop(stopping) = &mut self.goal {
                    stopping.gone = true;
                }
            }
        }
    }

    fn update(&mut self, pod: Arc<Pod>, now: Timestamp) {
        self.pod = pod;
        if self.pod.metadata.deletion_timestamp.is_some() {
            let grace = self.grace_seconds();
            self.begin_stop(now, |stopping| {
                stopping.deleted = true;
                // A grace period can only become shorter.
                let until = now + SignedDuration::from_secs(grace);
                stopping.until = stopping.until.min(until);
            });
        }
    }

    fn begin_stop(&mut self, now: Timestamp, amend: impl FnOnce(&mut Stopping)) {
        let until = now + SignedDuration::from_secs(self.grace_seconds());
        let mut stopping = match std::mem::replace(&mut self.goal, Goal::Run) {
            Goal::Stop(stopping) => stopping,
            Goal::Run => Stopping::new(until),
        };
        amend(&mut stopping);
        self.goal = Goal::Stop(stopping);
    }

    fn settle_stopping(
        &mut self,
        result: Result<(), String>,
        now: Timestamp,
        out: &mut Vec<Action>,
        stage: impl FnOnce(&mut Stopping) -> &mut Stage,
    ) {
        let Goal::Stop(stopping) = &mut self.goal else { return };
        let failure = settle(stage(stopping), result, now);
        self.report(out, "FailedKillPod", failure);
    }

    fn report(&self, out: &mut Vec<Action>, reason: &'static str, failure: Option<String>) {
        if let Some(message) = failure {
            out.push(Action::Report(PodEvent::warning(reason, message), Arc::clone(&self.pod)));
        }
    }

    fn plan(&mut self, now: Timestamp, out: &mut Vec<Action>) {
        self.plan_inspection(now, out);
        if !self.observed && !self.is_rejected() {
            return;
        }
        if matches!(self.goal, Goal::Run) {
            self.check_end(now);
        }
        match &self.goal {
            Goal::Run => self.plan_run(now, out),
            Goal::Stop(_) => self.plan_stop(now, out),
        }
        self.collect_garbage(out);
    }

    fn plan_inspection(&mut self, now: Timestamp, out: &mut Vec<Action>) {
        if !self.inspect_again || self.inspecting {
            return;
        }
        if let Some(after) = self.inspect_after.filter(|after| *after > now) {
            self.wake_at(after);
            return;
        }
        self.inspect_after = None;
        self.inspect_again = false;
        self.inspecting = true;
        out.push(Action::Inspect { epoch: self.epoch });
    }

    #[must_use]
    pub fn is_rejected(&self) -> bool {
        matches!(&self.goal, Goal::Stop(Stopping { verdict: Some(verdict), .. }) if verdict.rejected)
    }

    /// What ends a pod without anyone asking: an earlier end, and its deadline.
    fn check_end(&mut self, now: Timestamp) {
        if matches!(self.prior.phase.as_deref(), Some("Succeeded" | "Failed")) {
            self.begin_stop(now, |stopping| stopping.finished = true);
            return;
        }
        let Some(limit) = self.spec().active_deadline_seconds else { return };
        let start = self.prior.start_time.as_ref().map_or(self.first_seen, |time| time.0);
        let deadline = start + SignedDuration::from_secs(limit.max(0));
        if deadline <= now {
            self.begin_stop(now, |stopping| stopping.verdict = Some(Verdict::deadline_exceeded()));
        } else {
            self.wake_at(deadline);
        }
    }

    fn plan_run(&mut self, now: Timestamp, out: &mut Vec<Action>) {
        // Before anything that takes time: the first status after a restart must already know who was ready.
        self.follow_health(now, out);
        if !self.advance(now, out, |state| &mut state.host, Action::PrepareHost) {
            return;
        }
        if !self.advance(now, out, |state| &mut state.volumes, Action::Mount) {
            return;
        }
        let survey = self.survey();
        if survey.finished {
            self.begin_stop(now, |stopping| stopping.finished = true);
            self.plan_stop(now, out);
            return;
        }
        if let Some(live) = self.runtime.live_sandbox().map(|sandbox| sandbox.id.clone()) {
            self.stop_older_sandboxes(&live, now, out);
            self.plan_containers(&live, survey, now, out);
        } else {
            self.plan_sandbox(now, out);
        }
    }

    /// Starts a stage that is due; true when it is done.
    fn advance(
        &mut self,
        now: Timestamp,
        out: &mut Vec<Action>,
        stage: impl Fn(&mut Self) -> &mut Stage,
        action: Action,
    ) -> bool {
        match stage(self) {
            Stage::Done => return true,
            Stage::Busy { .. } => {}
            Stage::Failed { retry, .. } if *retry > now => {
                let retry = *retry;
                self.wake_at(retry);
            }
            due => {
                due.begin();
                out.push(action);
            }
        }
        false
    }

    /// Makes a sandbox, after whatever was left of the last one has been stopped.
    fn plan_sandbox(&mut self, now: Timestamp, out: &mut Vec<Action>) {
        let until = now + SignedDuration::from_secs(self.grace_seconds());
        if !self.stop_all_containers(until, now, "Pod sandbox is gone", out) || self.any_starting() {
            return;
        }
        if !self.stop_sandboxes(|_| true, now, out) {
            return;
        }
        let attempt = self.runtime.sandboxes.iter().map(|sandbox| sandbox.attempt + 1).max().unwrap_or(0);
        let is_new = !matches!(self.sandbox, Stage::Busy { .. } | Stage::Failed { .. });
        if attempt > 0 && is_new {
            let message = "Pod sandbox is gone or was replaced; a new one is being made";
            out.push(Action::Report(PodEvent::normal("SandboxChanged", message), Arc::clone(&self.pod)));
        }
        self.advance(now, out, |state| &mut state.sandbox, Action::CreateSandbox { attempt });
    }

    fn stop_older_sandboxes(&mut self, live: &str, now: Timestamp, out: &mut Vec<Action>) {
        self.stop_sandboxes(|id| id != live, now, out);
    }
}

/// Takes in the result of a stage; gives the message of a failure.
fn settle(stage: &mut Stage, result: Result<(), String>, now: Timestamp) -> Option<String> {
    let failures = stage.failures();
    match result {
        Ok(()) => {
            *stage = Stage::Done;
            None
        }
        Err(message) => {
            let retry = now + retry_delay(failures);
            *stage = Stage::Failed { retry, failures: failures.saturating_add(1), message: message.clone() };
            Some(message)
        }
    }
}

fn retry_delay(failures: u32) -> SignedDuration {
    (RETRY_FIRST * 2i32.pow(failures.min(5))).min(RETRY_LONGEST)
}
