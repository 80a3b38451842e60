//! Containers on their way down, and what is left of the dead.

use super::{Action, Goal, KillRequest, Killing, PodMachine};
use crate::pods::events::PodEvent;
use crate::pods::runtime_state::ContainerRecord;
use jiff::Timestamp;
use std::collections::HashSet;
use std::sync::Arc;

impl PodMachine {
    /// Kills a container unless that is being done already; a shorter grace hurries a kill under way.
    pub(super) fn kill(
        &mut self,
        record: &ContainerRecord,
        until: Timestamp,
        why: String,
        now: Timestamp,
        out: &mut Vec<Action>,
    ) {
        let grace_seconds = until.duration_since(now).as_secs().max(0);
        let known = self.killing.get(&record.id).copied();
        let hurry = match known {
            Some(Killing { retry: Some(retry), .. }) if retry > now => {
                self.wake_at(retry);
                return;
            }
            Some(Killing { until: earlier, retry: None }) if earlier <= until => return,
            Some(Killing { retry: None, .. }) => true,
            Some(_) => false,
            None => {
                let event = PodEvent::normal("Killing", why).of_container(&self.pod, &record.name);
                out.push(Action::Report(event, Arc::clone(&self.pod)));
                false
            }
        };
        self.killing.insert(record.id.clone(), Killing { until, retry: None });
        let request = KillRequest { record: record.clone(), grace_seconds, hurry };
        out.push(Action::Kill(Box::new(request)));
    }

    /// Forgets dead containers but the newest of each name, and sandboxes that nothing refers to.
    pub(super) fn collect_garbage(&mut self, out: &mut Vec<Action>) {
        if self.inspecting
            || self.inspect_again
            || !self.observed
            || matches!(&self.goal, Goal::Stop(s) if s.purge.is_busy())
        {
            return;
        }
        let mut kept = HashSet::new();
        let mut dead = Vec::new();
        for record in &self.runtime.containers {
            if record.has_exited() && !kept.insert(record.name.clone()) {
                dead.push(record.clone());
            }
        }
        let doomed: HashSet<&str> = dead.iter().map(|record| record.id.as_str()).collect();
        let used: HashSet<&str> = self
            .runtime
            .containers
            .iter()
            .filter(|record| !doomed.contains(record.id.as_str()))
            .map(|record| record.sandbox_id.as_str())
            .collect();
        let empty: Vec<String> = self
            .runtime
            .sandboxes
            .iter()
            .skip(1)
            .filter(|sandbox| !sandbox.ready && !used.contains(sandbox.id.as_str()))
            .map(|sandbox| sandbox.id.clone())
            .collect();
        self.remove(dead, empty, out);
    }

    pub(super) fn remove(
        &mut self,
        containers: Vec<ContainerRecord>,
        sandboxes: Vec<String>,
        out: &mut Vec<Action>,
    ) {
        let removing = &mut self.removing;
        let containers: Vec<_> = containers.into_iter().filter(|c| removing.insert(c.id.clone())).collect();
        let sandboxes: Vec<_> = sandboxes.into_iter().filter(|id| removing.insert(id.clone())).collect();
        if !containers.is_empty() || !sandboxes.is_empty() {
            out.push(Action::Remove { containers, sandboxes });
        }
    }
}
