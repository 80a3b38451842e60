//! Creating a container: streams, log, and the OCI library's hand-shake.

use super::clients::ReplyTo;
use super::containers::{Container, Creating};
use super::execs::refused;
use super::poller::{READ, Target};
use super::{Daemon, sys};
use crate::log::{ContainerLog, StreamName};
use crate::protocol::{Answer, CreateContainer, Failure, LogTarget};
use crate::record::Record;
use oci_spec::runtime::{PosixRlimitBuilder, PosixRlimitType, Process, Spec};
use orlop_oci::{ContainerId, CreateRequest, Progress, Rootfs, Stdio};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

const MAX_SPEC_BYTES: u64 = 16 << 20;

/// The keeper's ends and the container's.
struct Pipes {
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    stdin: Option<OwnedFd>,
    theirs: Stdio,
}

impl Daemon {
    /// Answers only failures; success is answered when init waits.
    pub(super) fn create(&mut self, reply: ReplyTo, request: &CreateContainer) -> Result<(), Failure> {
        let id = ContainerId::new(request.id.as_str()).map_err(|e| refused(&e))?;
        let known = &self.containers;
        if known.existing.contains_key(id.as_str()) || known.creating.contains_key(id.as_str()) {
            return Err(Failure::Refused(format!("container {id} exists already")));
        }
        let spec = read_spec(&request.bundle, request.tty, self.open_files)?;
        self.store.reserve(id.as_str()).map_err(|e| refused(&e))?;
        let begun = self.begin_create(&id, &spec, request, reply);
        match begun {
            Ok(creating) => {
                self.containers.creating.insert(request.id.clone(), creating);
                self.advance_create(&request.id);
                Ok(())
            }
            Err(failure) => {
                self.clean_up(&request.id, request.log.as_ref());
                Err(failure)
            }
        }
    }

    fn begin_create(
        &mut self,
        id: &ContainerId,
        spec: &Spec,
        request: &CreateContainer,
        reply: ReplyTo,
    ) -> Result<Creating, Failure> {
        let log = request.log.as_ref().map(|target| ContainerLog::open(target, request.tty)).transpose();
        let log = log.map_err(|e| refused(&e))?;
        let pipes = make_pipes(request)
            .map_err(|e| Failure::Refused(format!("cannot make the streams of container {id}: {e}")))?;
        let mut record = Record::new(id.as_str(), sys::now());
        record.log.clone_from(&request.log);
        record.tty = request.tty;
        record.stdin_once = request.stdin_once;
        record.stdout_inode = inode(pipes.stdout.as_ref());
        record.stderr_inode = inode(pipes.stderr.as_ref());
        let oci_root = self.store.oci_root(id.as_str());
        let mut oci = CreateRequest::new(id, &request.bundle, spec, &oci_root);
        oci.cgroup_root = &self.config.cgroup_root;
        oci.stdio = pipes.theirs;
        if let Some(overlay) = &request.rootfs {
            oci.rootfs = Rootfs::Overlay(orlop_oci::Overlay {
                lower: overlay.lower.clone(),
                upper: overlay.upper.clone(),
                work: overlay.work.clone(),
            });
        }
        let starting = orlop_oci::create(oci).map_err(|e| refused(&e))?;
        let token = self
            .poller
            .watch_borrowed(starting.as_fd(), READ, Target::Creating(request.id.clone()))
            .map_err(|e| Failure::Refused(format!("cannot watch container {id}: {e}")))?;
        let (stdout, stderr, stdin) = (pipes.stdout, pipes.stderr, pipes.stdin);
        Ok(Creating { starting, token, record, log, stdout, stderr, stdin, reply })
    }

    pub(super) fn advance_create(&mut self, id: &str) {
        let Some(mut creating) = self.containers.creating.remove(id) else { return };
        self.poller.forget(creating.token, creating.starting.as_fd());
        let reply = creating.reply;
        let outcome = match creating.starting.advance() {
            Ok(Progress::Pending) => {
                let target = Target::Creating(id.to_owned());
                match self.poller.watch_borrowed(creating.starting.as_fd(), READ, target) {
                    Ok(token) => {
                        creating.token = token;
                        self.containers.creating.insert(id.to_owned(), creating);
                        return;
                    }
                    Err(error) => Err(Failure::Refused(format!("cannot watch container {id}: {error}"))),
                }
            }
            Ok(Progress::Created(oci)) => {
                let Creating { record, log, stdout, stderr, stdin, .. } = creating;
                let mut container = Container::new(record, Some(*oci));
                container.log = log;
                container.streams.stdin = stdin;
                self.take_over(container, stdout, stderr).map(|view| (Answer::Container(view), Vec::new()))
            }
            Err(error) => {
                let log = creating.record.log.clone();
                drop(creating);
                self.clean_up(id, log.as_ref());
                Err(refused(&error))
            }
        };
        self.reply(reply, outcome);
        // Orphans were left alone while this went on.
        self.reap_orphans();
    }

    /// Makes a created container one of ours, or removes it.
    fn take_over(
        &mut self,
        mut container: Container,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    ) -> Result<crate::protocol::ContainerView, Failure> {
        let id = container.record.id.clone();
        let console = container.oci.as_mut().and_then(orlop_oci::Container::take_console);
        let pid = container.oci.as_ref().map_or(0, orlop_oci::Container::pid);
        container.record.pid = pid;
        container.record.process_start = process_start(pid).unwrap_or(0);
        let watched = self
            .watch_container(&mut container, console, stdout, stderr)
            .map_err(|e| Failure::Refused(format!("cannot watch container {id}: {e}")))
            .and_then(|()| self.store.save(&container.record).map_err(|e| refused(&e)));
        let (view, log) = (container.record.view(), container.record.log.clone());
        self.fdstore.store(&container);
        self.containers.existing.insert(id.clone(), container);
        if let Err(failure) = watched {
            if let Err(error) = self.remove_container(&id) {
                tracing::error!(container = id, %error, "cannot undo a create");
            }
            self.clean_up(&id, log.as_ref());
            return Err(failure);
        }
        Ok(view)
    }

    fn watch_container(
        &mut self,
        container: &mut Container,
        console: Option<OwnedFd>,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    ) -> Result<(), Errno> {
        let id = container.record.id.clone();
        let pidfd = container.oci.as_ref().and_then(orlop_oci::Container::pidfd).ok_or(Errno::SRCH)?;
        let pidfd = rustix::io::fcntl_dupfd_cloexec(pidfd, 3)?;
        self.watch_streams(container, console, stdout, stderr)?;
        container.pidfd = Some(self.poller.watch(pidfd, READ, Target::Init(id))?);
        Ok(())
    }

    pub(super) fn watch_streams(
        &mut self,
        container: &mut Container,
        console: Option<OwnedFd>,
        stdout: Option<OwnedFd>,
        stderr: Option<OwnedFd>,
    ) -> Result<(), Errno> {
        let id = &container.record.id;
        let stdout = match &console {
            Some(console) => {
                rustix::io::ioctl_fionbio(console, true)?;
                Some(rustix::io::fcntl_dupfd_cloexec(console, 3)?)
            }
            None => stdout,
        };
        container.streams.console = console;
        for (fd, stream, place) in [
            (stdout, StreamName::Stdout, &mut container.streams.stdout),
            (stderr, StreamName::Stderr, &mut container.streams.stderr),
        ] {
            if let Some(fd) = fd {
                rustix::io::ioctl_fionbio(&fd, true)?;
                *place = Some(self.poller.watch(fd, READ, Target::Output(id.clone(), stream))?);
            }
        }
        Ok(())
    }

    /// Ends a create under way; dropping the hand-shake removes what it made.
    pub(super) fn abandon_create(&mut self, id: &str, reason: &str) {
        let Some(creating) = self.containers.creating.remove(id) else { return };
        self.poller.forget(creating.token, creating.starting.as_fd());
        let (reply, log) = (creating.reply, creating.record.log.clone());
        drop(creating);
        self.clean_up(id, log.as_ref());
        self.reply(reply, Err(Failure::Refused(reason.to_owned())));
    }

    /// After a create that failed.
    fn clean_up(&mut self, id: &str, log: Option<&LogTarget>) {
        if let Err(error) = self.store.remove(id) {
            tracing::error!(%error, "cannot undo a create");
        }
        if let Some(log) = log
            && std::fs::metadata(&log.path).is_ok_and(|found| found.len() == 0)
        {
            let _ = std::fs::remove_file(&log.path);
        }
    }
}

fn read_spec(bundle: &Path, tty: bool, open_files: u64) -> Result<Spec, Failure> {
    let path = bundle.join("config.json");
    let read = || -> std::io::Result<Spec> {
        let mut bytes = Vec::new();
        std::fs::File::open(&path)?.take(MAX_SPEC_BYTES).read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    };
    let mut spec = read().map_err(|e| Failure::Refused(format!("cannot read {}: {e}", path.display())))?;
    if let Some(process) = spec.process_mut() {
        process.set_terminal(Some(tty));
        with_open_files(process, open_files);
    }
    Ok(spec)
}

/// The keeper has raised its own limit; a process whose specification sets none shall not inherit that.
pub(super) fn with_open_files(process: &mut Process, soft: u64) {
    let mut limits = process.rlimits().clone().unwrap_or_default();
    if limits.iter().any(|limit| limit.typ() == PosixRlimitType::RlimitNofile) {
        return;
    }
    let hard = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let limit =
        PosixRlimitBuilder::default().typ(PosixRlimitType::RlimitNofile).hard(hard).soft(soft.min(hard));
    // Every field is given, so there is always one.
    limits.extend(limit.build());
    process.set_rlimits(Some(limits));
}

pub(super) fn null_device() -> Result<OwnedFd, Errno> {
    rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

fn make_pipes(request: &CreateContainer) -> Result<Pipes, Errno> {
    if request.tty {
        return Ok(Pipes { stdout: None, stderr: None, stdin: None, theirs: Stdio::Terminal });
    }
    let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC);
    let (stdin, ours) = if request.stdin {
        let (read, write) = pipe()?;
        // Ours alone: the flag belongs to this end.
        rustix::io::ioctl_fionbio(&write, true)?;
        (read, Some(write))
    } else {
        (null_device()?, None)
    };
    let (out_read, stdout) = pipe()?;
    let (err_read, stderr) = pipe()?;
    let theirs = Stdio::Fds { stdin, stdout, stderr };
    Ok(Pipes { stdout: Some(out_read), stderr: Some(err_read), stdin: ours, theirs })
}

fn inode(fd: Option<&OwnedFd>) -> u64 {
    fd.and_then(|fd| rustix::fs::fstat(fd).ok()).map_or(0, |stat| stat.st_ino)
}

/// Field 22 of `/proc/<pid>/stat`, counted after the name, which may contain anything.
pub(super) fn process_start(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}
