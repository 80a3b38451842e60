//! A container that exists: created, running, paused or stopped.

use crate::Error;
use crate::cgroup::{self, Cgroup, MissingControllers};
use crate::channel::{Message, Parent, chain};
use crate::exec::{self, StartingExec};
use crate::hooks;
use crate::id::ContainerId;
use crate::request::ExecRequest;
use crate::state::{State, StateDir, Status, start_time};
use crate::syscall::{signals, socket};
use oci_spec::runtime::{LinuxResources, Process};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long pause, and a forced delete, wait for the kernel.
const PATIENCE: Duration = Duration::from_secs(10);

/// A handle to a container. Dropping it leaves the container alone.
#[derive(Debug)]
pub struct Container {
    id: ContainerId,
    state: State,
    dir: StateDir,
    cgroup: Cgroup,
    pidfd: Option<OwnedFd>,
    console: Option<OwnedFd>,
}

impl Container {
    pub(crate) fn assemble(
        state: State,
        dir: StateDir,
        pidfd: Option<OwnedFd>,
        console: Option<OwnedFd>,
    ) -> Result<Self, Error> {
        let id = ContainerId::new(state.id.clone())?;
        let cgroup = Cgroup::at(state.cgroup.clone());
        Ok(Self { id, state, dir, cgroup, pidfd, console })
    }

    /// Finds a container by its state; works from any process.
    pub fn load(state_root: &Path, id: &ContainerId) -> Result<Self, Error> {
        let dir = StateDir::of(state_root, id);
        let state = dir.load()?.ok_or_else(|| Error::NotExist(id.clone()))?;
        let raw = i32::try_from(state.pid).ok().and_then(Pid::from_raw);
        let pidfd = raw.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        // Opened first and compared afterwards: the number cannot have changed hands in between.
        let same = start_time(state.pid) == Some(state.started);
        Self::assemble(state, dir, pidfd.filter(|_| same), None)
    }

    pub fn id(&self) -> &ContainerId {
        &self.id
    }

    /// Init's process id in the PID namespace of the runtime that created it.
    pub fn pid(&self) -> u32 {
        self.state.pid
    }

    /// Readable once init has exited; `None` when it had already gone at [`Container::load`].
    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// The terminal's master, once, after a create with [`crate::Stdio::Terminal`].
    pub fn take_console(&mut self) -> Option<OwnedFd> {
        self.console.take()
    }

    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    pub fn bundle(&self) -> &Path {
        &self.state.bundle
    }

    pub fn rootfs(&self) -> &Path {
        &self.state.rootfs
    }

    /// When it was created, RFC 3339.
    pub fn created(&self) -> &str {
        &self.state.created
    }

    /// The specification's process, a template for [`Container::exec`].
    pub fn process(&self) -> Result<Process, Error> {
        Ok(self.dir.load_process()?)
    }

    /// The OCI state document.
    pub fn document(&self) -> Result<serde_json::Value, Error> {
        Ok(self.state.document(self.status()?))
    }

    pub fn status(&self) -> Result<Status, Error> {
        if self.pidfd.is_none() || start_time(self.state.pid) != Some(self.state.started) {
            return Ok(Status::Stopped);
        }
        if !self.state.ready {
            return Ok(Status::Creating);
        }
        if self.cgroup.freezing()? {
            return Ok(Status::Paused);
        }
        let waiting = self.dir.path().join("start").exists();
        Ok(if waiting { Status::Created } else { Status::Running })
    }

    /// Lets the created container run its program. Returns when the program has been executed, or with the reason why
    /// it could not be. Blocks only for `startContainer` and `poststart` hooks.
    pub fn start(&self) -> Result<(), Error> {
        let refuse = || match self.status() {
            Ok(status) => Error::NotCreated(status),
            Err(error) => error,
        };
        let connection = self.connect().map_err(|_| refuse())?;
        // The name is taken off by exactly one starter.
        match std::fs::remove_file(self.dir.path().join("start")) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NotCreated(Status::Running));
            }
            Err(source) => return Err(Error::System { step: "take the start socket", source }),
        }
        socket::send(&connection, b"+", &[]).map_err(|_| Error::NotRunning)?;
        let answers = Parent::new(connection);
        let mut executing = false;
        while let Some((message, _)) = answers.receive(true).map_err(Error::system("hear from init"))? {
            match message {
                Message::Executing => executing = true,
                Message::Failed(text) => return Err(Error::Init(text)),
                _ => {}
            }
        }
        if !executing {
            return Err(Error::Died(
                self.pidfd.as_ref().map(crate::create::how_it_ended).unwrap_or_default(),
            ));
        }
        let started =
            hooks::run("poststart", &self.state.poststart, &self.state.for_hooks(Status::Running), &[]);
        started.map_err(|error| {
            let _ = self.kill_all();
            error.into()
        })
    }

    fn connect(&self) -> io::Result<OwnedFd> {
        let dir = self.dir.open()?;
        let address = rustix::net::SocketAddrUnix::new(format!("/proc/self/fd/{}/start", dir.as_raw_fd()))?;
        let connection = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::net::connect(&connection, &address)?;
        Ok(connection)
    }

    /// Sends a signal to init. SIGKILL reaches every process of a container that shares its PID namespace with others,
    /// as no kernel would end them with init.
    pub fn kill(&self, signal: i32) -> Result<(), Error> {
        let pidfd = self.pidfd.as_ref().ok_or(Error::NotRunning)?;
        if self.status()? == Status::Stopped {
            return Err(Error::NotRunning);
        }
        if signal == libc::SIGKILL && !self.state.pid_namespace {
            return self.kill_all();
        }
        match signals::send(pidfd, signal) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Err(Error::NotRunning),
            Err(source) => return Err(Error::System { step: "send the signal", source }),
        }
        // Frozen, it would keep the signal until it is resumed.
        if signal == libc::SIGKILL && self.cgroup.freezing().unwrap_or(false) {
            self.cgroup.thaw()?;
        }
        Ok(())
    }

    /// SIGKILL to every process of the container.
    pub fn kill_all(&self) -> Result<(), Error> {
        Ok(self.cgroup.kill()?)
    }

    pub fn pause(&self) -> Result<(), Error> {
        match self.status()? {
            Status::Running | Status::Created => {}
            Status::Stopped => return Err(Error::NotRunning),
            actual => return Err(Error::WrongStatus { actual, wanted: Status::Running }),
        }
        self.cgroup.freeze()?;
        self.await_frozen(true).inspect_err(|_| {
            let _ = self.cgroup.thaw();
        })
    }

    pub fn resume(&self) -> Result<(), Error> {
        match self.status()? {
            Status::Paused => {}
            actual => return Err(Error::WrongStatus { actual, wanted: Status::Paused }),
        }
        self.cgroup.thaw()?;
        self.await_frozen(false)
    }

    fn await_frozen(&self, wanted: bool) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        let file =
            std::fs::File::open(self.cgroup.events_file()).map_err(Error::system("open cgroup.events"))?;
        while self.cgroup.events()?.frozen != wanted {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let wanted = if wanted { "frozen" } else { "thawed" };
                return Err(Error::FreezeTimeout { cgroup: self.cgroup.dir().to_owned(), wanted });
            }
            let mut poll = [PollFd::new(&file, PollFlags::PRI)];
            let tick = left.min(Duration::from_millis(50));
            let timeout = Timespec { tv_sec: 0, tv_nsec: tick.subsec_nanos().into() };
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll, Some(&timeout)))
                .map_err(Error::system("wait for cgroup.events"))?;
        }
        Ok(())
    }

    pub fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        if self.status()? == Status::Stopped {
            return Err(Error::NotRunning);
        }
        Ok(self.cgroup.apply(resources, self.missing_controllers())?)
    }

    fn missing_controllers(&self) -> MissingControllers {
        if self.state.skip_missing_controllers {
            MissingControllers::Warn
        } else {
            MissingControllers::Refuse
        }
    }

    /// Runs one more process. It becomes a child of the caller, which must reap it.
    pub fn exec(&self, request: ExecRequest<'_>) -> Result<StartingExec, Error> {
        match self.status()? {
            Status::Running | Status::Created => {}
            Status::Paused if request.ignore_paused => {}
            status => return Err(Error::ExecRefused(status)),
        }
        let init = self.pidfd.as_ref().ok_or(Error::NotRunning)?;
        let target = exec::Target {
            init,
            init_pid: self.state.pid,
            cgroup: &self.cgroup,
            filter: self.dir.load_seccomp()?,
            user_namespace: self.state.user_namespace,
        };
        exec::spawn(&target, request)
    }

    /// Removes cgroup and state of a stopped container and runs its `poststop` hooks. With `force` it is killed first.
    /// A container that was created and never started is killed without force. Idempotent: what is gone already is no
    /// error. A caller that is init's parent should have reaped it, or will still have to.
    pub fn delete(&self, force: bool) -> Result<(), Error> {
        let status = self.status()?;
        match status {
            Status::Stopped => {}
            Status::Created => self.kill_all()?,
            _ if force => self.kill_all()?,
            _ => return Err(Error::NotStopped { id: self.id.clone(), status }),
        }
        if self.cgroup.exists() {
            // Others than init may be left when the PID namespace is shared.
            self.cgroup.kill()?;
            self.remove_cgroup()?;
        }
        self.dir.remove()?;
        run_poststop(&self.state);
        Ok(())
    }

    /// Killed processes leave the cgroup when they have died, which may take them a moment.
    fn remove_cgroup(&self) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        let mut pause = Duration::from_millis(1);
        loop {
            match self.cgroup.remove() {
                Err(cgroup::Error::Busy(_)) if Instant::now() < deadline => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(50));
                }
                other => return Ok(other?),
            }
        }
    }
}

/// Their failures are told and otherwise ignored, as the specification wants.
pub(crate) fn run_poststop(state: &State) {
    for hook in &state.poststop {
        let document = state.for_hooks(Status::Stopped);
        if let Err(error) = hooks::run("poststop", std::slice::from_ref(hook), &document, &[]) {
            tracing::warn!(id = state.id, error = %chain(&error), "poststop hook");
        }
    }
}
