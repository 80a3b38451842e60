//! Processes that end: containers, execs, orphans.

use super::containers::Container;
use super::poller::GONE;
use super::{Daemon, sys};
use crate::protocol::{Answer, Event, Exit, Phase};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use rustix::process::{WaitId, WaitIdOptions};
use std::os::fd::BorrowedFd;

/// What is reported when nobody can say how a process ended.
const UNKNOWN_CODE: i32 = 255;
/// How long an init that is not our child may take to be reaped by whoever has it.
const REAP_PATIENCE: i64 = 2_000_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    Code(i32),
    /// Not our child, and not reaped yet by its parent: its code may still become known.
    Unreaped,
    Running,
}

/// Reaps a process that may have ended.
pub(super) fn reap(pidfd: BorrowedFd<'_>) -> Ended {
    match rustix::process::waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
        Ok(Some(status)) => Ended::Code(match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => code,
            (None, Some(signal)) => 128 + signal,
            (None, None) => UNKNOWN_CODE,
        }),
        Ok(None) => Ended::Running,
        Err(_) => {
            sys::exit_status_of_stranger(pidfd).map_or(Ended::Unreaped, |status| Ended::Code(decode(status)))
        }
    }
}

/// A wait status as the kernel packs it: the code in the second byte, the signal in the low seven bits.
fn decode(status: i32) -> i32 {
    match status & 0x7f {
        0 => (status >> 8) & 0xff,
        signal => 128 + signal,
    }
}

impl Daemon {
    pub(super) fn init_ended(&mut self, id: &str) {
        use std::os::fd::AsFd;
        let Some(container) = self.containers.existing.get_mut(id) else { return };
        let Some(pidfd) = &container.pidfd else { return };
        match reap(pidfd.as_fd()) {
            Ended::Code(code) => self.finish(id, code, None),
            Ended::Running => {}
            Ended::Unreaped if container.unreaped_until.is_none() => {
                container.unreaped_until = Some(sys::now() + REAP_PATIENCE);
                // From now on only the reaping wakes us.
                let _ = self.poller.change(pidfd, GONE);
            }
            // Woken again: it has been reaped, and this kernel does not tell how it ended.
            Ended::Unreaped => self.finish(id, UNKNOWN_CODE, Some(UNKNOWN_REASON)),
        }
    }

    pub(super) fn expire_unreaped(&mut self, now: i64) {
        let due: Vec<String> = self
            .containers
            .existing
            .iter()
            .filter(|(_, c)| c.unreaped_until.is_some_and(|at| at <= now))
            .map(|(id, _)| id.clone())
            .collect();
        for id in due {
            self.finish(&id, UNKNOWN_CODE, Some(UNKNOWN_REASON));
        }
    }

    /// A container whose init is known to have ended while no keeper watched it.
    pub(super) fn finish_unwatched(&mut self, id: &str) {
        self.finish(id, UNKNOWN_CODE, Some("it ended while no keeper ran"));
    }

    /// Output first, then the record, then the event.
    fn finish(&mut self, id: &str, code: i32, note: Option<&str>) {
        let Some(container) = self.containers.existing.get_mut(id) else { return };
        container.unreaped_until = None;
        if let Some(pidfd) = container.pidfd.take() {
            drop(self.poller.release(pidfd));
        }
        container.drain_output(&mut self.poller, &mut self.buffer);
        container.copies.close(&mut self.poller, |_| true);
        container.streams.stdin = None;
        let exit = Exit { code, oom_killed: oom_killed(container), finished_at: sys::now() };
        container.record.phase = Phase::Exited;
        container.record.exit = Some(exit.clone());
        container.record.exit_note = note.map(str::to_owned);
        if let Some(reason) = note {
            tracing::warn!(container = id, reason, "exit code is unknown, reported as {UNKNOWN_CODE}");
        }
        if let Err(error) = self.store.save(&container.record) {
            tracing::error!(%error, "exit code is kept in memory only");
        }
        for name in ["pidfd", "stdin"] {
            self.fdstore.remove(id, name);
        }
        let waiting = std::mem::take(&mut container.deletes);
        self.announce(&Event::ContainerExited { id: id.to_owned(), exit });
        if !waiting.is_empty() {
            let outcome = self.remove_container(id);
            for reply in waiting {
                self.reply(reply, outcome.clone().map(|()| (Answer::Done, Vec::new())));
            }
        }
    }

    /// Reaps what has been orphaned to us. Not while the OCI library sets something up: its helpers are our children
    /// too, and it waits for them itself.
    pub(super) fn reap_orphans(&mut self) {
        while self.containers.settled() {
            let peek = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
            let pid = match waitid(Id::All, peek) {
                Ok(WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _)) => pid,
                _ => return,
            };
            match self.owner_of(pid.as_raw().cast_unsigned()) {
                Some((id, None)) => self.init_ended(&id),
                Some((id, Some(exec))) => self.exec_ended(&id, &exec),
                None => {
                    let _ = waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG);
                }
            }
        }
    }

    /// Whose init or exec a process is.
    fn owner_of(&self, pid: u32) -> Option<(String, Option<String>)> {
        self.containers.existing.iter().find_map(|(id, container)| {
            if container.pidfd.is_some() && container.record.pid == pid {
                return Some((id.clone(), None));
            }
            let exec = container.execs.iter().find(|(_, exec)| exec.running_pid() == Some(pid));
            exec.map(|(exec_id, _)| (id.clone(), Some(exec_id.clone())))
        })
    }
}

const UNKNOWN_REASON: &str = "it is not a child of this keeper, and the kernel does not tell how it ended";

/// Without a memory controller there is no such count, and no such kill either.
pub(super) fn oom_killed(container: &Container) -> bool {
    let events = container.oci.as_ref().and_then(|oci| oci.cgroup().events().ok());
    events.is_some_and(|events| events.oom_kill > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_status_becomes_an_exit_code() {
        assert_eq!(decode(3 << 8), 3);
        assert_eq!(decode(9), 137);
        // The bit for a core dump is no part of the signal.
        assert_eq!(decode(0x80 | 11), 139);
    }
}
