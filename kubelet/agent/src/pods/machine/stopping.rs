//! How a pod ends: containers, sandboxes, volumes and cgroup, API object, remains; each only after the one before.

use super::containers::is_sidecar;
use super::{Action, Goal, Origin, PodMachine, Stage, Work};
use crate::pods::runtime_state::ContainerRecord;
use jiff::Timestamp;
use std::collections::HashSet;

impl PodMachine {
    pub(super) fn plan_stop(&mut self, now: Timestamp, out: &mut Vec<Action>) {
        let Goal::Stop(stopping) = &self.goal else { return };
        let until = stopping.until;
        self.probe_readiness_only(now, out);
        let is_down = self.stop_all_containers(until, now, "", out);
        if !is_down || self.any_starting() || self.is_busy_outside() {
            return;
        }
        if !self.stop_sandboxes(|_| true, now, out) {
            return;
        }
        if !self.advance_stopping(now, out, |stopping| &mut stopping.teardown, || Action::TearDown) {
            return;
        }
        let is_api = self.origin == Origin::Api;
        let Goal::Stop(stopping) = &mut self.goal else { return };
        if !stopping.deleted && !stopping.gone {
            return;
        }
        if is_api && !stopping.gone {
            // The exit codes are kept in the runtime until the API server has them.
            if !std::mem::replace(&mut stopping.delete_asked, true) {
                out.push(Action::DeleteFromApi);
            }
            return;
        }
        let containers = self.runtime.containers.clone();
        let sandboxes: Vec<String> =
            self.runtime.sandboxes.iter().map(|sandbox| sandbox.id.clone()).collect();
        self.advance_stopping(
            now,
            out,
            |stopping| &mut stopping.purge,
            || Action::Purge { containers, sandboxes },
        );
    }

    fn advance_stopping(
        &mut self,
        now: Timestamp,
        out: &mut Vec<Action>,
        stage: impl Fn(&mut super::Stopping) -> &mut Stage,
        action: impl FnOnce() -> Action,
    ) -> bool {
        let Goal::Stop(stopping) = &mut self.goal else { return false };
        match stage(stopping) {
            Stage::Done => return true,
            Stage::Busy { .. } => {}
            Stage::Failed { retry, .. } if *retry > now => {
                let retry = *retry;
                self.wake_at(retry);
            }
            due => {
                due.begin();
                out.push(action());
            }
        }
        false
    }

    /// Kills whatever runs: plain containers at once, then sidecars from the last to the first. True when none runs.
    pub(super) fn stop_all_containers(
        &mut self,
        until: Timestamp,
        now: Timestamp,
        why: &str,
        out: &mut Vec<Action>,
    ) -> bool {
        let sidecars: Vec<String> = self
            .spec()
            .init_containers
            .iter()
            .flatten()
            .filter(|c| is_sidecar(c))
            .map(|c| c.name.clone())
            .collect();
        let running: Vec<ContainerRecord> =
            self.runtime.containers.iter().filter(|record| record.is_running()).cloned().collect();
        if running.is_empty() {
            return true;
        }
        let message = |record: &ContainerRecord| {
            if why.is_empty() { format!("Stopping container {}", record.name) } else { why.to_owned() }
        };
        let (side, plain): (Vec<_>, Vec<_>) = running.into_iter().partition(|r| sidecars.contains(&r.name));
        if plain.is_empty() {
            let place = |record: &ContainerRecord| sidecars.iter().position(|name| *name == record.name);
            if let Some(last) = side.iter().max_by_key(|record| place(record)) {
                self.kill(last, until, message(last), now, out);
            }
        }
        for record in &plain {
            self.kill(record, until, message(record), now, out);
        }
        false
    }

    /// Stops the chosen sandboxes; true when all of them are.
    pub(super) fn stop_sandboxes(
        &mut self,
        chosen: impl Fn(&str) -> bool,
        now: Timestamp,
        out: &mut Vec<Action>,
    ) -> bool {
        let ids: HashSet<String> =
            self.runtime.sandboxes.iter().map(|sandbox| sandbox.id.clone()).filter(|id| chosen(id)).collect();
        let mut all_stopped = true;
        for id in ids {
            if self.stopped_sandboxes.contains(&id) {
                continue;
            }
            all_stopped = false;
            match self.stopping_sandboxes.get(&id) {
                Some(None) => {}
                Some(Some(retry)) if *retry > now => {
                    let retry = *retry;
                    self.wake_at(retry);
                }
                _ => {
                    self.stopping_sandboxes.insert(id.clone(), None);
                    out.push(Action::StopSandbox { id });
                }
            }
        }
        all_stopped
    }

    /// A container is being created right now: it will exist in a moment, and has to be waited for.
    pub(super) fn any_starting(&self) -> bool {
        self.tracks.values().any(|track| track.work == Work::Starting)
    }

    fn is_busy_outside(&self) -> bool {
        self.sandbox.is_busy() || self.volumes.is_busy() || self.host.is_busy()
    }

    /// Whoever goes on serving while it ends must be seen to: readiness is followed to the last, but nothing is killed
    /// for its health any more.
    fn probe_readiness_only(&mut self, now: Timestamp, out: &mut Vec<Action>) {
        let before = out.len();
        self.follow_health(now, out);
        let has_begun_some = out[before..].iter().any(|action| matches!(action, Action::StartProbes(_)));
        let Goal::Stop(stopping) = &mut self.goal else { return };
        if !std::mem::replace(&mut stopping.probes_told, true) || has_begun_some {
            out.push(Action::TerminateProbes);
        }
    }
}
