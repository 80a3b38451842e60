//! Replacing the program by another one in the same process, without losing a descriptor, a byte of output or a request.
//!
//! The state goes into a memory file, the descriptors it names stay open across execve, and everything else (processes
//! that are children, signals that are blocked, requests that wait in the sockets) stays because the process stays.

use super::clients::{Client, Clients, ReplyTo};
use super::containers::{Container, Containers};
use super::execs::{Exec, Stage};
use super::fdstore::FdStore;
use super::poller::{Poller, READ, Target, Watched};
use super::{Config, Daemon, DaemonError, READ_BYTES, doing, flags, sys, watch_signals};
use crate::log::{ContainerLog, LogFile, LogState, StreamName};
use crate::protocol::{Answer, Exit, Failure};
use crate::record::{Record, Store};
use rustix::fs::MemfdFlags;
use rustix::io::{Errno, FdFlags};
use serde::{Deserialize, Serialize};
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    #[error("cannot pass on the state: {0}")]
    Save(std::io::Error),
    #[error("cannot execute {path}: {source}")]
    Execute { path: PathBuf, source: Errno },
    #[error("do not know where the program lies; name it in the request")]
    UnknownPath,
    #[error("cannot read the state of the replaced program: {0}")]
    Restore(std::io::Error),
    #[error("the state of the replaced program has version {0}, this one knows {VERSION}")]
    Version(u32),
}

const VERSION: u32 = 1;
/// `<pid>:<path>`: the path of the program on disk, for it may run from a copy.
const PATH_VARIABLE: &str = "ORLOP_KEEPER_PROGRAM";
/// How long set-ups under way and answers not yet read may hold up a re-exec.
const PATIENCE: i64 = 10_000_000_000;

#[derive(Debug)]
pub(super) struct Reexec {
    pub(super) binary: Option<PathBuf>,
    pub(super) reply: Option<ReplyTo>,
    pub(super) asked_at: i64,
}

impl Reexec {
    pub(super) fn new(binary: Option<PathBuf>, reply: Option<ReplyTo>) -> Self {
        Self { binary, reply, asked_at: sys::now() }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    version: u32,
    listener: RawFd,
    lock: RawFd,
    open_files: u64,
    next_client: u64,
    clients: Vec<SavedClient>,
    containers: Vec<SavedContainer>,
    /// Who asked for the re-exec and is answered by the new program.
    reply: Option<ReplyTo>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedClient {
    id: u64,
    fd: RawFd,
    subscribed: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedContainer {
    record: Record,
    pidfd: Option<RawFd>,
    stdout: Option<RawFd>,
    stderr: Option<RawFd>,
    stdin: Option<RawFd>,
    console: Option<RawFd>,
    log: Option<LogState>,
    log_file: Option<RawFd>,
    copies: Vec<(StreamName, RawFd)>,
    execs: Vec<SavedExec>,
    deletes: Vec<ReplyTo>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedExec {
    id: String,
    cgroup: PathBuf,
    waiters: Vec<ReplyTo>,
    running: Option<(u32, RawFd)>,
    ended: Option<Exit>,
}

/// Called before the program may have moved to a copy of itself.
pub(super) fn remember_own_path() {
    if own_path().is_none()
        && let Ok(path) = std::env::current_exe()
    {
        let mut value = OsString::from(format!("{}:", std::process::id()));
        value.push(path);
        sys::set_variable(PATH_VARIABLE, &value);
    }
}

fn own_path() -> Option<PathBuf> {
    let value = std::env::var_os(PATH_VARIABLE)?;
    let prefix = format!("{}:", std::process::id());
    let path = value.as_bytes().strip_prefix(prefix.as_bytes())?;
    Some(PathBuf::from(OsString::from_vec(path.to_vec())))
}

/// Descriptors that stay open across execve.
#[derive(Default)]
struct Kept<'a>(Vec<BorrowedFd<'a>>);

impl<'a> Kept<'a> {
    fn keep(&mut self, fd: &'a impl AsFd) -> RawFd {
        self.0.push(fd.as_fd());
        fd.as_fd().as_raw_fd()
    }

    fn mark(&self, flags: FdFlags) -> Result<(), Errno> {
        self.0.iter().try_for_each(|fd| rustix::io::fcntl_setfd(fd, flags))
    }
}

impl Daemon {
    /// Called once per turn while a re-exec is wanted.
    pub(super) fn try_reexec(&mut self) {
        let Some(reexec) = &self.reexec else { return };
        let late = sys::now() - reexec.asked_at > PATIENCE;
        if !self.containers.settled() {
            if late {
                self.refuse_reexec("a container or exec is still being set up");
            }
            return;
        }
        if !self.clients.idle() && !late {
            return;
        }
        let Err(error) = self.reexec() else { return };
        self.refuse_reexec(&error.to_string());
    }

    fn refuse_reexec(&mut self, reason: &str) {
        tracing::error!(reason, "go on as the same program");
        if let Some(to) = self.reexec.take().and_then(|reexec| reexec.reply) {
            self.reply(to, Err(Failure::Refused(format!("cannot replace the keeper: {reason}"))));
        }
    }

    /// Returns only if it failed, and then nothing has changed.
    fn reexec(&self) -> Result<(), HandoverError> {
        let asked = self.reexec.as_ref().and_then(|reexec| reexec.binary.clone());
        let path = asked.or_else(own_path).ok_or(HandoverError::UnknownPath)?;
        let mut kept = Kept::default();
        let saved = self.save(&mut kept);
        let state = write_state(&saved).map_err(HandoverError::Save)?;
        kept.keep(&state);
        let failed = |source| HandoverError::Execute { path: path.clone(), source };
        kept.mark(FdFlags::empty()).map_err(failed)?;
        let error = execute(&path, state.as_raw_fd());
        kept.mark(FdFlags::CLOEXEC).map_err(failed)?;
        Err(failed(error))
    }

    fn save<'a>(&'a self, kept: &mut Kept<'a>) -> Saved {
        Saved {
            version: VERSION,
            listener: kept.keep(&self.listener),
            lock: kept.keep(&self.lock),
            open_files: self.open_files,
            next_client: self.clients.next_id,
            clients: self
                .clients
                .connected
                .iter()
                .map(|(id, client)| SavedClient {
                    id: *id,
                    fd: kept.keep(&client.socket),
                    subscribed: client.subscribed,
                })
                .collect(),
            containers: self.containers.existing.values().map(|c| save_container(c, kept)).collect(),
            reply: self.reexec.as_ref().and_then(|reexec| reexec.reply),
        }
    }

    /// The other side of [`Daemon::reexec`].
    pub(super) fn restore(config: &Config, state: RawFd) -> Result<Self, DaemonError> {
        let state = sys::adopt_fd(state).map_err(|e| HandoverError::Restore(e.into()))?;
        let saved = read_state(state).map_err(HandoverError::Restore)?;
        if saved.version != VERSION {
            return Err(HandoverError::Version(saved.version).into());
        }
        let adopt = |fd| sys::adopt_fd(fd).map_err(doing("take over a descriptor"));
        let mut poller = Poller::new().map_err(doing("make the poll set"))?;
        let listener = poller
            .watch(adopt(saved.listener)?, READ, Target::Listener)
            .map_err(doing("watch the socket"))?;
        let signals = watch_signals(&mut poller)?;
        let mut daemon = Self {
            config: config.clone(),
            store: Store::open(&config.state)?,
            lock: adopt(saved.lock)?,
            poller,
            signals,
            listener,
            clients: Clients { next_id: saved.next_client, ..Clients::default() },
            containers: Containers::default(),
            fdstore: FdStore::from_environment(),
            open_files: saved.open_files,
            buffer: vec![0; READ_BYTES],
            ending: false,
            reexec: None,
        };
        for client in saved.clients {
            daemon.restore_client(&client);
        }
        for container in saved.containers {
            daemon.restore_container(container);
        }
        // Their signals may have been taken by the program before.
        daemon.reap_orphans();
        if let Some(reply) = saved.reply {
            daemon.reply(reply, Ok((Answer::Done, Vec::new())));
        }
        tracing::info!(containers = daemon.containers.existing.len(), "went on as a new program");
        Ok(daemon)
    }

    fn restore_client(&mut self, saved: &SavedClient) {
        let target = Target::Client(saved.id);
        match sys::adopt_fd(saved.fd).and_then(|fd| self.poller.watch(fd, READ, target)) {
            Ok(socket) => {
                self.clients.connected.insert(saved.id, Client::new(socket, saved.subscribed));
            }
            Err(error) => tracing::error!(%error, client = saved.id, "lost a client"),
        }
    }

    fn restore_container(&mut self, saved: SavedContainer) {
        let id = saved.record.id.clone();
        let oci = self.load_oci(&id);
        let mut container = Container::new(saved.record, oci);
        if let (Some(target), Some(log)) = (&container.record.log, saved.log) {
            let file = LogFile::restore(target, adopt(&id, "log", saved.log_file), log.file);
            container.log = Some(ContainerLog::restore(file, container.record.tty, log));
        }
        container.streams.stdin = adopt(&id, "stdin", saved.stdin);
        let stdout = adopt(&id, "stdout", saved.stdout);
        let stderr = adopt(&id, "stderr", saved.stderr);
        let console = adopt(&id, "console", saved.console);
        let had_ended = stdout.is_none();
        // With a terminal, stdout is a duplicate of its master and is made again.
        let stdout = stdout.filter(|_| console.is_none());
        if let Err(error) = self.watch_streams(&mut container, console, stdout, stderr) {
            tracing::error!(container = %id, %error, "cannot watch the output");
        }
        if had_ended && let Some(ended) = container.streams.stdout.take() {
            drop(self.poller.release(ended));
        }
        for (stream, fd) in saved.copies {
            if let Some(fd) = adopt(&id, "copy", Some(fd))
                && let Err(error) = container.copies.adopt(&mut self.poller, &id, stream, fd)
            {
                tracing::error!(container = %id, %error, "lost an attached client");
            }
        }
        container.pidfd = self.rewatch(&id, "pidfd", saved.pidfd, Target::Init(id.clone()));
        for exec in saved.execs {
            if let Some((exec_id, exec)) = self.restore_exec(&id, exec) {
                container.execs.insert(exec_id, exec);
            }
        }
        container.deletes = saved.deletes;
        self.containers.existing.insert(id, container);
    }

    fn restore_exec(&mut self, id: &str, saved: SavedExec) -> Option<(String, Exec)> {
        let stage = match (saved.ended, saved.running) {
            (Some(exit), _) => Stage::Ended(exit),
            (None, Some((pid, fd))) => {
                let target = Target::Exec(id.to_owned(), saved.id.clone());
                Stage::Running { pid, pidfd: self.rewatch(id, "exec", Some(fd), target)? }
            }
            (None, None) => return None,
        };
        Some((saved.id, Exec { stage, cgroup: saved.cgroup, waiters: saved.waiters }))
    }

    fn rewatch(&mut self, id: &str, what: &str, fd: Option<RawFd>, target: Target) -> Option<Watched> {
        let watched = self.poller.watch(adopt(id, what, fd)?, READ, target);
        watched.inspect_err(|error| tracing::error!(container = id, what, %error, "cannot watch")).ok()
    }
}

/// One descriptor that is lost must not cost the others.
fn adopt(id: &str, what: &str, fd: Option<RawFd>) -> Option<OwnedFd> {
    let adopted = sys::adopt_fd(fd?);
    adopted.inspect_err(|error| tracing::error!(container = id, what, %error, "lost a descriptor")).ok()
}

fn save_container<'a>(container: &'a Container, kept: &mut Kept<'a>) -> SavedContainer {
    let streams = &container.streams;
    let log_file = container.log.as_ref().and_then(|log| log.file().descriptor());
    SavedContainer {
        record: container.record.clone(),
        pidfd: container.pidfd.as_ref().map(|fd| kept.keep(fd)),
        stdout: streams.stdout.as_ref().map(|fd| kept.keep(fd)),
        stderr: streams.stderr.as_ref().map(|fd| kept.keep(fd)),
        stdin: streams.stdin.as_ref().map(|fd| kept.keep(fd)),
        console: streams.console.as_ref().map(|fd| kept.keep(fd)),
        log: container.log.as_ref().map(ContainerLog::state),
        log_file: log_file.map(|fd| {
            kept.0.push(fd);
            fd.as_raw_fd()
        }),
        copies: container.copies.open.iter().map(|copy| (copy.stream, kept.keep(&copy.pipe))).collect(),
        execs: container
            .execs
            .iter()
            .map(|(id, exec)| {
                let (running, ended) = match &exec.stage {
                    Stage::Running { pid, pidfd } => (Some((*pid, kept.keep(pidfd))), None),
                    Stage::Ended(exit) => (None, Some(exit.clone())),
                    // There is none: a re-exec waits for them.
                    Stage::Starting { .. } => (None, None),
                };
                let (cgroup, waiters) = (exec.cgroup.clone(), exec.waiters.clone());
                SavedExec { id: id.clone(), cgroup, waiters, running, ended }
            })
            .collect(),
        deletes: container.deletes.clone(),
    }
}

fn write_state(saved: &Saved) -> std::io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("orlop-keeper-state", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(saved)?)?;
    file.rewind()?;
    Ok(file)
}

fn read_state(state: OwnedFd) -> std::io::Result<Saved> {
    let mut bytes = Vec::new();
    File::from(state).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// The arguments of this program without an earlier hand-over's. Straight execve: the standard library's would unblock
/// signals, which could then end the process before the new program watches for them.
fn execute(path: &std::path::Path, state: RawFd) -> Errno {
    let mut arguments: Vec<OsString> = Vec::new();
    let mut own = std::env::args_os();
    while let Some(argument) = own.next() {
        if argument == flags::RESTORE {
            own.next();
        } else {
            arguments.push(argument);
        }
    }
    arguments.extend([flags::RESTORE.into(), state.to_string().into()]);
    let variables = std::env::vars_os().filter(|(name, _)| name != PATH_VARIABLE);
    let mut environment: Vec<OsString> = variables
        .map(|(mut name, value)| {
            name.push("=");
            name.push(value);
            name
        })
        .collect();
    let mut own = OsString::from(format!("{PATH_VARIABLE}={}:", std::process::id()));
    own.push(path);
    environment.push(own);
    let text = |value: OsString| CString::new(value.into_vec());
    let strings = |values: Vec<OsString>| values.into_iter().map(text).collect::<Result<Vec<_>, _>>();
    let (Ok(path), Ok(arguments), Ok(environment)) =
        (text(path.into()), strings(arguments), strings(environment))
    else {
        return Errno::INVAL;
    };
    match nix::unistd::execve(&path, &arguments, &environment) {
        Ok(never) => match never {},
        Err(error) => Errno::from_raw_os_error(error as i32),
    }
}
