//! The program itself: one thread, one poll loop, parent of every container.
//!
//! Invariants:
//! - Nothing blocks the loop: clients, containers and terminals are non-blocking, work per wake-up is bounded.
//! - An exit is on disk before anybody is told of it, and all output that the container had written by then is in its
//!   log before that.
//! - Descriptors leave the poll set before they are closed ([`poller`] says why).
//! - No error of one container, client or file ends the program.

mod adopt;
mod clients;
mod containers;
mod diagnostics;
mod execs;
mod exits;
mod fdstore;
mod flags;
mod handover;
mod output;
mod poller;
mod purge;
mod requests;
mod socket;
mod spawn;
mod streams;
mod sys;

use crate::record::{RecordError, Store};
use clients::Clients;
use containers::Containers;
use fdstore::FdStore;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use poller::{Poller, Target, Watched};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;

/// What one wake-up reads from one stream at most, so that a noisy container does not starve the others.
const READ_BYTES: usize = 64 << 10;
/// Nanoseconds between attempts of what waits for several things at once.
const RETRY: i64 = 100_000_000;

#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error("cannot protect the program against its containers: {0}")]
    Protect(orlop_oci::Error),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("cannot take the lock {path}: {source}; does another orlop-keeper run?")]
    Lock { path: PathBuf, source: Errno },
    #[error(transparent)]
    Socket(#[from] socket::SocketError),
    #[error(transparent)]
    Handover(#[from] handover::HandoverError),
    #[error("cannot {operation}: {source}")]
    System { operation: &'static str, source: Errno },
    #[error("cannot purge {0} of the containers; run it again")]
    Purge(usize),
}

/// Attaches what the program was doing to an error number.
fn doing(operation: &'static str) -> impl FnOnce(Errno) -> DaemonError {
    move |source| DaemonError::System { operation, source }
}

#[derive(Debug, Clone)]
pub struct Config {
    pub socket: PathBuf,
    pub state: PathBuf,
    pub cgroup_root: PathBuf,
}

/// The entry point of the binary.
pub fn main() -> ExitCode {
    let invocation = match flags::parse(std::env::args_os().skip(1)) {
        Ok(flags::Invocation::Help) => return say(flags::HELP),
        Ok(flags::Invocation::Version) => {
            return say(concat!("orlop-keeper ", env!("CARGO_PKG_VERSION"), "\n"));
        }
        Ok(flags::Invocation::Run(run)) => run,
        Err(error) => {
            eprintln!("orlop-keeper: {error}");
            return ExitCode::from(2);
        }
    };
    diagnostics::install(invocation.log_format);
    match run(&invocation) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "orlop-keeper ends");
            ExitCode::FAILURE
        }
    }
}

fn say(text: &str) -> ExitCode {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(run: &flags::Run) -> Result<(), DaemonError> {
    handover::remember_own_path();
    orlop_oci::exe::protect().map_err(DaemonError::Protect)?;
    if run.purge {
        return purge::purge(&run.config);
    }
    let mut daemon = match run.restore {
        Some(fd) => Daemon::restore(&run.config, fd)?,
        None => Daemon::start(&run.config)?,
    };
    daemon.protect_itself();
    daemon.fdstore.ready();
    daemon.serve()
}

/// All state of the program.
#[derive(Debug)]
struct Daemon {
    config: Config,
    store: Store,
    /// Held for life: one keeper per state directory.
    lock: OwnedFd,
    poller: Poller,
    signals: SignalFd,
    listener: Watched,
    clients: Clients,
    containers: Containers,
    fdstore: FdStore,
    /// The soft limit on open files that the program was started with; containers get that one, not the raised one.
    open_files: u64,
    buffer: Vec<u8>,
    /// Set by SIGTERM.
    ending: bool,
    /// A re-exec that was asked for, and by whom.
    reexec: Option<handover::Reexec>,
}

impl Daemon {
    fn start(config: &Config) -> Result<Self, DaemonError> {
        let store = Store::open(&config.state)?;
        let lock = take_lock(&store)?;
        let mut poller = Poller::new().map_err(doing("make the poll set"))?;
        let listener = socket::listen(&config.socket)?;
        let listener =
            poller.watch(listener, poller::READ, Target::Listener).map_err(doing("watch the socket"))?;
        let signals = watch_signals(&mut poller)?;
        let mut daemon = Self {
            config: config.clone(),
            store,
            lock,
            poller,
            signals,
            listener,
            clients: Clients::default(),
            containers: Containers::default(),
            fdstore: FdStore::from_environment(),
            open_files: raise_open_files(),
            buffer: vec![0; READ_BYTES],
            ending: false,
            reexec: None,
        };
        daemon.adopt()?;
        Ok(daemon)
    }

    /// What is not allowed here is worth a line, not a failure: a test host may forbid it.
    fn protect_itself(&self) {
        if let Err(error) = rustix::process::set_child_subreaper(Some(rustix::process::getpid())) {
            tracing::warn!(%error, "cannot become the reaper of orphans");
        }
        if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-999") {
            tracing::warn!(%error, "cannot lower the own out-of-memory score");
        }
    }

    fn serve(&mut self) -> Result<(), DaemonError> {
        let mut ready = Vec::with_capacity(64);
        while !self.ending {
            // Before waiting: a program that has just taken over may owe answers.
            self.flush_clients();
            if self.reexec.is_some() {
                self.try_reexec();
            }
            let deadline = self.containers.next_deadline(sys::now());
            // A re-exec under way is looked at again soon, whatever it waits for.
            let timeout =
                if self.reexec.is_some() { Some(deadline.unwrap_or(RETRY).min(RETRY)) } else { deadline };
            self.poller.wait(&mut ready, timeout).map_err(doing("wait for events"))?;
            for target in ready.drain(..) {
                self.dispatch(&target);
            }
            self.expire_unreaped(sys::now());
        }
        self.flush_clients();
        tracing::info!("orlop-keeper ends; containers go on");
        socket::unlink(&self.config.socket);
        Ok(())
    }

    fn dispatch(&mut self, target: &Target) {
        match target {
            Target::Listener => self.accept_client(),
            Target::Signals => self.take_signals(),
            Target::Client(client) => self.serve_client(*client),
            Target::Creating(id) => self.advance_create(id),
            Target::Init(id) => self.init_ended(id),
            Target::Output(id, stream) => self.read_output(id, *stream),
            Target::Copy(id, copy) => self.drop_copy(id, *copy),
            Target::StartingExec(id, exec) => self.advance_exec(id, exec),
            Target::Exec(id, exec) => self.exec_ended(id, exec),
        }
    }

    fn take_signals(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            match Signal::try_from(info.ssi_signo.cast_signed()) {
                // One that a client waits for must not be replaced by one that nobody does.
                Ok(Signal::SIGHUP) => {
                    self.reexec.get_or_insert_with(|| handover::Reexec::new(None, None));
                }
                Ok(Signal::SIGTERM | Signal::SIGINT) => self.ending = true,
                Ok(Signal::SIGCHLD) => self.reap_orphans(),
                _ => {}
            }
        }
    }
}

fn take_lock(store: &Store) -> Result<OwnedFd, DaemonError> {
    let path = store.root().join("lock");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let take = || -> Result<OwnedFd, Errno> {
        let lock = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        Ok(lock)
    };
    take().map_err(|source| DaemonError::Lock { path: path.clone(), source })
}

/// The signals stay blocked across a re-exec, so that none is lost in between.
fn watch_signals(poller: &mut Poller) -> Result<SignalFd, DaemonError> {
    let wrap = |e: nix::Error| doing("watch signals")(Errno::from_raw_os_error(e as i32));
    let mut set = SigSet::empty();
    for signal in [Signal::SIGHUP, Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
        set.add(signal);
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&set), None).map_err(wrap)?;
    let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(wrap)?;
    poller.watch_borrowed(signals.as_fd(), poller::READ, Target::Signals).map_err(doing("watch signals"))?;
    Ok(signals)
}

/// Six descriptors a container: the usual soft limit of 1024 is soon reached. Returns what it was.
fn raise_open_files() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::warn!(%error, "cannot raise the limit on open files");
    }
    limit.current.unwrap_or(u64::MAX)
}
