//! What the results of actions and the findings of probes change in a pod's state.

use super::{Action, Blocked, Goal, PodMachine, PulledImage, RETRY_FIRST, StartFailure, Work, retry_delay};
use crate::pods::parts::{ProbeKind, ProbeOutcome};
use crate::pods::runtime_state::{ContainerRecord, PodRuntime};
use jiff::{SignedDuration, Timestamp};
use std::collections::{HashMap, HashSet};

impl PodMachine {
    pub(super) fn observe(&mut self, epoch: u64, fresh: PodRuntime) {
        self.inspecting = false;
        if self.observed && epoch < self.seen_epoch {
            return;
        }
        self.observed = true;
        self.seen_epoch = epoch;
        // What was created after this look began cannot be in it, and is not gone for that.
        let is_gone = |id: &str, born: &HashMap<String, u64>| born.get(id).is_none_or(|born| *born <= epoch);
        let kept: HashSet<&str> = fresh
            .containers
            .iter()
            .map(|c| c.id.as_str())
            .chain(fresh.sandboxes.iter().map(|s| s.id.as_str()))
            .collect();
        let born = &self.born;
        self.runtime.containers.retain(|known| kept.contains(known.id.as_str()) || !is_gone(&known.id, born));
        self.runtime.sandboxes.retain(|known| kept.contains(known.id.as_str()) || !is_gone(&known.id, born));
        for sandbox in fresh.sandboxes {
            self.runtime.merge_sandbox(sandbox);
        }
        for container in fresh.containers {
            self.runtime.merge_container(container);
        }
        let runtime = &self.runtime;
        self.born.retain(|_, born| *born > epoch);
        let exists = |id: &String| {
            runtime.container(id).is_some() || runtime.sandboxes.iter().any(|sandbox| sandbox.id == *id)
        };
        self.killing.retain(|id, _| exists(id));
        self.stopped_sandboxes.retain(exists);
    }

    pub(super) fn image_ready(
        &mut self,
        name: &str,
        result: Result<PulledImage, StartFailure>,
        now: Timestamp,
    ) {
        let track = self.track_mut(name);
        if track.work != Work::Pulling {
            return;
        }
        track.work = Work::Idle;
        match result {
            Ok(image) => {
                track.image = Some(image);
                track.blocked = None;
                track.pull.reset();
            }
            Err(failure) => {
                track.pull.record(now, now);
                let until = track.pull.until(now, now).unwrap_or(now);
                track.blocked = Some(Blocked::new(failure, now, until));
            }
        }
    }

    pub(super) fn container_started(
        &mut self,
        name: &str,
        result: Result<ContainerRecord, StartFailure>,
        now: Timestamp,
    ) {
        let born = self.epoch + 1;
        let track = self.track_mut(name);
        track.work = Work::Idle;
        match result {
            Ok(record) => {
                track.blocked = None;
                track.start_failures = 0;
                self.born.insert(record.id.clone(), born);
                self.runtime.merge_container(record);
            }
            Err(failure) => {
                let wait = retry_delay(track.start_failures);
                track.start_failures = track.start_failures.saturating_add(1);
                track.blocked = Some(Blocked::new(failure, now, now + wait));
            }
        }
        self.look_again();
    }

    pub(super) fn container_killed(
        &mut self,
        id: &str,
        result: Result<ContainerRecord, String>,
        now: Timestamp,
    ) {
        match result {
            Ok(record) if !record.is_running() => {
                self.runtime.merge_container(record);
                self.killing.remove(id);
            }
            // The runtime could not stop it, or says it did and shows it running.
            _ => {
                if let Some(killing) = self.killing.get_mut(id) {
                    killing.retry = Some(now + RETRY_FIRST * 5);
                }
            }
        }
        self.look_again();
    }

    pub(super) fn probe(&mut self, outcome: &ProbeOutcome, now: Timestamp, out: &mut Vec<Action>) {
        let Some(record) = self.runtime.latest(&outcome.container) else { return };
        if record.id != outcome.container_id || !record.is_running() {
            return;
        }
        let record = record.clone();
        let track = self.track_mut(&outcome.container);
        match (outcome.kind, outcome.healthy) {
            (ProbeKind::Readiness, healthy) => track.ready = healthy,
            (ProbeKind::Startup, true) => {
                track.started = true;
                if !track.has_readiness {
                    track.ready = true;
                }
            }
            (ProbeKind::Liveness, true) => {}
            (kind, false) if matches!(self.goal, Goal::Run) => {
                let kind = if kind == ProbeKind::Startup { "startup" } else { "liveness" };
                let why = format!("Container {} failed its {kind} probe and will be restarted", record.name);
                let grace = outcome.grace_seconds.unwrap_or_else(|| self.grace_seconds());
                self.kill(&record, now + SignedDuration::from_secs(grace), why, now, out);
            }
            (_, false) => {}
        }
    }
}
