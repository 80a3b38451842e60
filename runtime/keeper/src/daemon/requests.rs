//! What each request does.

use super::clients::{Outcome, ReplyTo};
use super::containers::Container;
use super::execs::{kill_one, refused};
use super::{Daemon, handover, sys};
use crate::log::StreamName;
use crate::protocol::{Answer, Call, ContainerView, Event, Failure, Phase};
use rustix::io::Errno;
use std::os::fd::OwnedFd;

impl Daemon {
    pub(super) fn handle(&mut self, to: ReplyTo, call: Call, descriptors: Vec<OwnedFd>) {
        let done = |result: Result<(), Failure>| Some(result.map(|()| (Answer::Done, Vec::new())));
        let outcome: Option<Outcome> = match call {
            Call::Create(request) => self.create(to, &request).err().map(Err),
            Call::Start { id } => Some(self.start_container(&id).map(|v| (Answer::Container(v), Vec::new()))),
            Call::Kill { id, signal, all } => done(self.kill(&id, signal, all)),
            Call::Delete { id } => self.delete(to, &id).and_then(done),
            Call::List => Some(Ok((Answer::Containers(self.views()), Vec::new()))),
            Call::Exec(exec) => self.exec(to, exec, descriptors).err().map(Err),
            Call::WaitExec { container, exec_id } => self.wait_exec(to, &container, &exec_id),
            Call::AcknowledgeExec { container, exec_id } => {
                self.acknowledge_exec(&container, &exec_id);
                done(Ok(()))
            }
            Call::KillExec { container, exec_id, signal } => {
                done(self.kill_exec(&container, &exec_id, signal))
            }
            Call::Attach { id } => Some(self.attach(&id)),
            Call::ReopenLog { id } => done(self.reopen_log(&id)),
            Call::Acknowledge { id } => done(self.acknowledge(&id)),
            Call::Subscribe => {
                self.subscribe(to.client);
                done(Ok(()))
            }
            Call::Reexec { binary } => {
                self.reexec = Some(handover::Reexec::new(binary, Some(to)));
                None
            }
        };
        if let Some(outcome) = outcome {
            self.reply(to, outcome);
        }
    }

    pub(super) fn container(&mut self, id: &str) -> Result<&mut Container, Failure> {
        self.containers.existing.get_mut(id).ok_or_else(|| Failure::NoSuchContainer(id.to_owned()))
    }

    fn views(&self) -> Vec<ContainerView> {
        self.containers.existing.values().map(|container| container.record.view()).collect()
    }

    /// Starting what runs already succeeds, so that a client may ask again when it lost the answer.
    fn start_container(&mut self, id: &str) -> Result<ContainerView, Failure> {
        let container = self.container(id)?;
        match (container.record.phase, &container.oci) {
            (Phase::Running, _) => return Ok(container.record.view()),
            (Phase::Exited, _) => return Err(Failure::Refused(format!("container {id} has exited"))),
            (Phase::Created, None) => {
                return Err(Failure::Refused(format!("the runtime's state of container {id} is lost")));
            }
            (Phase::Created, Some(oci)) => oci.start().map_err(|e| refused(&e))?,
        }
        container.record.phase = Phase::Running;
        container.record.started_at = sys::now();
        let record = container.record.clone();
        if let Err(error) = self.store.save(&record) {
            tracing::error!(%error, "start is known in memory only");
        }
        Ok(record.view())
    }

    fn kill(&mut self, id: &str, signal: i32, all: bool) -> Result<(), Failure> {
        let container = self.container(id)?;
        let exited = container.record.phase == Phase::Exited;
        let Some(oci) = &container.oci else {
            return if exited { Ok(()) } else { kill_one(container.record.pid, signal) };
        };
        let outcome = match (all, signal) {
            (false, _) if exited => return Ok(()),
            (false, _) => oci.kill(signal),
            (true, libc::SIGKILL) => oci.kill_all(),
            (true, _) => {
                for pid in oci.cgroup().processes().unwrap_or_default() {
                    kill_one(pid, signal)?;
                }
                return Ok(());
            }
        };
        match outcome {
            Err(error) if !error.is_not_running() && !exited => Err(refused(&error)),
            _ => Ok(()),
        }
    }

    /// `None` when the answer comes later, once init has ended.
    fn delete(&mut self, to: ReplyTo, id: &str) -> Option<Result<(), Failure>> {
        if self.containers.creating.contains_key(id) {
            self.abandon_create(id, "the container was deleted while it was being created");
            return Some(Ok(()));
        }
        let Some(container) = self.containers.existing.get_mut(id) else { return Some(Ok(())) };
        if container.pidfd.is_none() {
            return Some(self.remove_container(id));
        }
        let killed = match &container.oci {
            Some(oci) => oci.kill_all().map_err(|e| refused(&e)),
            None => kill_one(container.record.pid, libc::SIGKILL),
        };
        if let Err(failure) = killed {
            return Some(Err(failure));
        }
        container.deletes.push(to);
        None
    }

    /// Forgets a container whose init has ended, and removes all that was made for it.
    pub(super) fn remove_container(&mut self, id: &str) -> Result<(), Failure> {
        let Some(container) = self.containers.existing.get_mut(id) else { return Ok(()) };
        if let Some(oci) = &container.oci {
            oci.delete(true).map_err(|e| refused(&e))?;
        }
        // Descendants that outlived init may have written until they were killed just now.
        container.drain_output(&mut self.poller, &mut self.buffer);
        for stream in [StreamName::Stdout, StreamName::Stderr] {
            container.close_output(&mut self.poller, stream);
        }
        let Some(container) = self.containers.existing.remove(id) else { return Ok(()) };
        for (_, exec) in container.execs {
            self.drop_exec(exec);
        }
        self.fdstore.remove_all(id);
        self.reap_orphans();
        self.store.remove(id).map_err(|e| refused(&e))
    }

    fn acknowledge(&mut self, id: &str) -> Result<(), Failure> {
        let Some(container) = self.containers.existing.get_mut(id) else { return Ok(()) };
        if container.record.phase != Phase::Exited {
            return Err(Failure::Refused(format!("container {id} has not exited")));
        }
        container.record.acknowledged = true;
        let record = container.record.clone();
        self.store.save(&record).map_err(|e| refused(&e))
    }

    fn subscribe(&mut self, client: u64) {
        if let Some(client) = self.clients.connected.get_mut(&client) {
            client.subscribed = true;
        }
        let events: Vec<Event> = self
            .containers
            .existing
            .values()
            .filter(|container| !container.record.acknowledged)
            .filter_map(|container| {
                let exit = container.record.exit.clone()?;
                Some(Event::ContainerExited { id: container.record.id.clone(), exit })
            })
            .collect();
        for event in &events {
            self.announce_to(client, event);
        }
    }

    fn reopen_log(&mut self, id: &str) -> Result<(), Failure> {
        let container = self.container(id)?;
        if container.record.phase == Phase::Exited {
            return Err(Failure::Refused(format!("container {id} has exited")));
        }
        match &mut container.log {
            Some(log) => log.reopen().map_err(|e| refused(&e)),
            None => Ok(()),
        }
    }

    /// Descriptors of the answer: copy of stdout, copy of stderr, stdin, terminal; as far as they exist.
    fn attach(&mut self, id: &str) -> Outcome {
        let Some(container) = self.containers.existing.get_mut(id) else {
            return Err(Failure::NoSuchContainer(id.to_owned()));
        };
        if container.record.phase == Phase::Exited {
            return Err(Failure::Refused(format!("container {id} has exited")));
        }
        let failed = |e: Errno| Failure::Refused(format!("cannot attach to container {id}: {e}"));
        let mut descriptors =
            vec![container.copies.add(&mut self.poller, id, StreamName::Stdout).map_err(failed)?];
        let stderr = !container.record.tty;
        if stderr {
            descriptors.push(container.copies.add(&mut self.poller, id, StreamName::Stderr).map_err(failed)?);
        }
        for stream in [StreamName::Stdout, StreamName::Stderr] {
            let open = match stream {
                StreamName::Stdout => container.streams.stdout.is_some(),
                StreamName::Stderr => container.streams.stderr.is_some(),
            };
            if !open {
                container.copies.close(&mut self.poller, |copy| copy.stream == stream);
            }
        }
        let duplicate = |fd: &OwnedFd| rustix::io::fcntl_dupfd_cloexec(fd, 3);
        let streams = &mut container.streams;
        let stdin = match (&streams.console, &streams.stdin) {
            (Some(console), _) => Some(duplicate(console).map_err(failed)?),
            // The first client takes the pipe with it: when it closes its end, the container reads the end of its input.
            (None, Some(_)) if container.record.stdin_once => streams.stdin.take(),
            (None, Some(stdin)) => Some(duplicate(stdin).map_err(failed)?),
            (None, None) => None,
        };
        let console = streams.console.as_ref().map(duplicate).transpose().map_err(failed)?;
        let answer = Answer::Attached { stdin: stdin.is_some(), stderr, console: console.is_some() };
        if container.record.stdin_once && stdin.is_some() && console.is_none() {
            self.fdstore.remove(id, "stdin");
        }
        descriptors.extend(stdin);
        descriptors.extend(console);
        Ok((answer, descriptors))
    }
}
