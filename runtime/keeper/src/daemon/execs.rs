//! Processes run in containers by clients.
//!
//! Each runs in a cgroup of its own below the container's: the only way to be sure that killing an exec also kills what
//! it has detached. The cgroup enables no controllers, so limits and accounting stay the container's; a container sees
//! it as a subdirectory of its own cgroup, and it goes with the last process of the exec.

use super::clients::{Outcome, ReplyTo};
use super::containers::Container;
use super::exits::{Ended, oom_killed, reap};
use super::poller::{READ, Target, Token, Watched};
use super::spawn::{null_device, with_open_files};
use super::{Daemon, sys};
use crate::protocol::{Answer, Event, ExecCall, Exit, Failure, Phase};
use orlop_oci::{ExecProgress, ExecRequest, StartingExec, Stdio};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Ended execs that nobody fetched, per container; more means that their agent is gone, and the oldest go.
const MAX_ENDED: usize = 64;

#[derive(Debug)]
pub(super) struct Exec {
    pub(super) stage: Stage,
    /// Name of its cgroup below the container's.
    pub(super) cgroup: PathBuf,
    pub(super) waiters: Vec<ReplyTo>,
}

#[derive(Debug)]
pub(super) enum Stage {
    Starting { starting: StartingExec, token: Token, reply: ReplyTo },
    Running { pid: u32, pidfd: Watched },
    Ended(Exit),
}

impl Exec {
    pub(super) fn is_starting(&self) -> bool {
        matches!(self.stage, Stage::Starting { .. })
    }

    pub(super) fn running_pid(&self) -> Option<u32> {
        match &self.stage {
            Stage::Running { pid, .. } => Some(*pid),
            _ => None,
        }
    }
}

impl Daemon {
    /// Answers only failures; success is answered when the program runs.
    pub(super) fn exec(
        &mut self,
        reply: ReplyTo,
        call: ExecCall,
        passed: Vec<OwnedFd>,
    ) -> Result<(), Failure> {
        let (id, exec_id) = (call.process.container.clone(), call.process.exec_id.clone());
        let open_files = self.open_files;
        let container = self.container(&id)?;
        if container.record.phase != Phase::Running {
            return Err(Failure::Refused(format!("container {id} is not running")));
        }
        if container.execs.contains_key(&exec_id) {
            return Err(Failure::Refused(format!("container {id} has an exec {exec_id} already")));
        }
        let Some(oci) = &container.oci else {
            return Err(Failure::Refused(format!("the runtime's state of container {id} is lost")));
        };
        let stdio = if call.process.tty { Stdio::Terminal } else { passed_streams(&call, passed)? };
        let mut process = (*call.process.process).clone();
        process.set_terminal(Some(call.process.tty));
        with_open_files(&mut process, open_files);
        let cgroup = PathBuf::from(format!("orlop-exec-{}-{}", reply.client, reply.request));
        let mut request = ExecRequest::new(&process);
        request.stdio = stdio;
        request.sub_cgroup = Some(&cgroup);
        let dir = oci.cgroup().dir().join(&cgroup);
        std::fs::create_dir(&dir).map_err(|e| {
            Failure::Refused(format!("cannot make cgroup {} for exec {exec_id}: {e}", dir.display()))
        })?;
        let starting = oci.exec(request).map_err(|e| {
            remove_cgroup(container, &cgroup);
            refused(&e)
        })?;
        let target = Target::StartingExec(id.clone(), exec_id.clone());
        let token = self
            .poller
            .watch_borrowed(starting.as_fd(), READ, target)
            .map_err(|e| Failure::Refused(format!("cannot watch exec {exec_id}: {e}")))?;
        let exec = Exec { stage: Stage::Starting { starting, token, reply }, cgroup, waiters: Vec::new() };
        if let Some(container) = self.containers.existing.get_mut(&id) {
            container.execs.insert(exec_id.clone(), exec);
        }
        self.advance_exec(&id, &exec_id);
        Ok(())
    }

    pub(super) fn advance_exec(&mut self, id: &str, exec_id: &str) {
        let Some(container) = self.containers.existing.get_mut(id) else { return };
        let Some(Exec { stage: Stage::Starting { .. }, .. }) = container.execs.get(exec_id) else { return };
        let Some(mut exec) = container.execs.remove(exec_id) else { return };
        let Stage::Starting { mut starting, token, reply } = exec.stage else { return };
        self.poller.forget(token, starting.as_fd());
        let outcome = match starting.advance() {
            Ok(ExecProgress::Pending) => {
                let target = Target::StartingExec(id.to_owned(), exec_id.to_owned());
                match self.poller.watch_borrowed(starting.as_fd(), READ, target) {
                    Ok(token) => {
                        exec.stage = Stage::Starting { starting, token, reply };
                        container.execs.insert(exec_id.to_owned(), exec);
                        return;
                    }
                    Err(error) => Err(Failure::Refused(format!("cannot watch exec {exec_id}: {error}"))),
                }
            }
            Ok(ExecProgress::Running(process)) => {
                let target = Target::Exec(id.to_owned(), exec_id.to_owned());
                match self.poller.watch(process.pidfd, READ, target) {
                    Ok(pidfd) => {
                        exec.stage = Stage::Running { pid: process.pid, pidfd };
                        container.execs.insert(exec_id.to_owned(), exec);
                        let console = process.console;
                        Ok((
                            Answer::Exec { pid: process.pid, console: console.is_some() },
                            Vec::from_iter(console),
                        ))
                    }
                    Err(error) => {
                        let _ = sys::kill(process.pid, libc::SIGKILL);
                        Err(Failure::Refused(format!("cannot watch exec {exec_id}: {error}")))
                    }
                }
            }
            Err(error) => {
                remove_cgroup(container, &exec.cgroup);
                Err(refused(&error))
            }
        };
        self.reply(reply, outcome);
        // Orphans were left alone while this went on.
        self.reap_orphans();
    }

    pub(super) fn exec_ended(&mut self, id: &str, exec_id: &str) {
        let Some(container) = self.containers.existing.get_mut(id) else { return };
        let oom_killed = oom_killed(container);
        let Some(exec) = container.execs.get_mut(exec_id) else { return };
        let Stage::Running { pidfd, .. } = &exec.stage else { return };
        let code = match reap(pidfd.as_fd()) {
            Ended::Code(code) => code,
            Ended::Running => return,
            // Adopted from a keeper that died; its agent has lost it too.
            Ended::Unreaped => 255,
        };
        let exit = Exit { code, oom_killed, finished_at: sys::now() };
        let stage = std::mem::replace(&mut exec.stage, Stage::Ended(exit.clone()));
        if let Stage::Running { pidfd, .. } = stage {
            drop(self.poller.release(pidfd));
        }
        let waiters = std::mem::take(&mut exec.waiters);
        let cgroup = exec.cgroup.clone();
        remove_cgroup(container, &cgroup);
        forget_oldest(container);
        for waiter in waiters {
            self.reply(waiter, Ok((Answer::Exit(exit.clone()), Vec::new())));
        }
        let (container, exec_id) = (id.to_owned(), exec_id.to_owned());
        self.announce(&Event::ExecExited { container, exec_id, exit });
    }

    /// `None` when the answer comes later.
    pub(super) fn wait_exec(&mut self, reply: ReplyTo, id: &str, exec_id: &str) -> Option<Outcome> {
        let exec = match self.container(id) {
            Ok(container) => container.execs.get_mut(exec_id),
            Err(failure) => return Some(Err(failure)),
        };
        match exec {
            None => Some(Err(Failure::Refused(format!("container {id} has no exec {exec_id}")))),
            Some(Exec { stage: Stage::Ended(exit), .. }) => {
                Some(Ok((Answer::Exit(exit.clone()), Vec::new())))
            }
            Some(exec) => {
                exec.waiters.push(reply);
                None
            }
        }
    }

    pub(super) fn acknowledge_exec(&mut self, id: &str, exec_id: &str) {
        if let Some(container) = self.containers.existing.get_mut(id)
            && let Some(Exec { stage: Stage::Ended(_), cgroup, .. }) = container.execs.get(exec_id)
        {
            let cgroup = cgroup.clone();
            container.execs.remove(exec_id);
            remove_cgroup(container, &cgroup);
        }
    }

    /// The container goes, and its execs with it: whoever waits for one is told so.
    pub(super) fn drop_exec(&mut self, exec: Exec) {
        let mut waiting = exec.waiters;
        match exec.stage {
            Stage::Starting { starting, token, reply } => {
                self.poller.forget(token, starting.as_fd());
                waiting.push(reply);
            }
            Stage::Running { pidfd, .. } => {
                let pidfd = self.poller.release(pidfd);
                let exit = match reap(pidfd.as_fd()) {
                    Ended::Code(code) => Exit { code, oom_killed: false, finished_at: sys::now() },
                    _ => Exit { code: 128 + libc::SIGKILL, oom_killed: false, finished_at: sys::now() },
                };
                for waiter in std::mem::take(&mut waiting) {
                    self.reply(waiter, Ok((Answer::Exit(exit.clone()), Vec::new())));
                }
            }
            Stage::Ended(_) => {}
        }
        for waiter in waiting {
            self.reply(waiter, Err(Failure::Refused("the container was deleted".to_owned())));
        }
    }

    /// Also reaches what an ended exec has left behind.
    pub(super) fn kill_exec(&mut self, id: &str, exec_id: &str, signal: i32) -> Result<(), Failure> {
        let container = self.container(id)?;
        let Some(exec) = container.execs.get(exec_id) else { return Ok(()) };
        if let Stage::Starting { starting, .. } = &exec.stage {
            return kill_one(starting.pid(), signal);
        }
        if let Some(pid) = exec.running_pid() {
            kill_one(pid, signal)?;
        }
        let Some(dir) = cgroup_dir(container, &exec.cgroup) else { return Ok(()) };
        if signal == libc::SIGKILL && std::fs::write(dir.join("cgroup.kill"), "1").is_ok() {
            return Ok(());
        }
        for pid in processes_below(&dir) {
            if Some(pid) != exec.running_pid() {
                kill_one(pid, signal)?;
            }
        }
        Ok(())
    }
}

pub(super) fn refused(error: &dyn std::error::Error) -> Failure {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    Failure::Refused(text)
}

/// A process that has ended in the meantime is as good as killed.
pub(super) fn kill_one(pid: u32, signal: i32) -> Result<(), Failure> {
    match sys::kill(pid, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(Failure::Refused(format!("cannot send signal {signal} to process {pid}: {error}"))),
    }
}

fn passed_streams(call: &ExecCall, passed: Vec<OwnedFd>) -> Result<Stdio, Failure> {
    let announced = [call.stdin, call.stdout, call.stderr];
    if announced.iter().filter(|present| **present).count() != passed.len() {
        return Err(Failure::Malformed("the number of streams does not match".to_owned()));
    }
    let mut passed = passed.into_iter();
    let mut take = |present: bool| -> Result<OwnedFd, Failure> {
        match if present { passed.next() } else { None } {
            Some(fd) => Ok(fd),
            None => null_device().map_err(|e| Failure::Refused(format!("cannot open the null device: {e}"))),
        }
    };
    Ok(Stdio::Fds { stdin: take(call.stdin)?, stdout: take(call.stdout)?, stderr: take(call.stderr)? })
}

fn cgroup_dir(container: &Container, name: &Path) -> Option<PathBuf> {
    container.oci.as_ref().map(|oci| oci.cgroup().dir().join(name))
}

/// Fails while processes remain in it; then it goes with the next attempt or with the container.
fn remove_cgroup(container: &Container, name: &Path) {
    if let Some(dir) = cgroup_dir(container, name) {
        let _ = std::fs::remove_dir(dir);
    }
}

fn forget_oldest(container: &mut Container) {
    let mut ended: Vec<(i64, String)> = container
        .execs
        .iter()
        .filter_map(|(id, exec)| match &exec.stage {
            Stage::Ended(exit) => Some((exit.finished_at, id.clone())),
            _ => None,
        })
        .collect();
    if ended.len() > MAX_ENDED {
        ended.sort();
        for (_, id) in ended.drain(..ended.len() - MAX_ENDED) {
            container.execs.remove(&id);
        }
    }
}

/// Processes of a cgroup and of those below it.
fn processes_below(dir: &Path) -> Vec<u32> {
    let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    let mut found: Vec<u32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(processes_below(&entry.path()));
        }
    }
    found
}
