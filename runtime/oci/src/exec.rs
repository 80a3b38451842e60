//! Running one more process inside a container, in the same non-blocking shape as creating one.
//!
//! The process is forked by the caller straight into the container's cgroup and PID namespace (the caller's own
//! children are redirected there for the moment of the fork), so it is the caller's child without a helper between
//! them; it joins the other namespaces itself by init's pidfd.

use crate::Error;
use crate::cgroup::Cgroup;
use crate::channel::{self, Child, Message, Parent, chain};
use crate::console;
use crate::create::{how_it_ended, reap, set_oom_score, wait_readable};
use crate::init::{self, shed, warn};
use crate::inroot::Root;
use crate::namespaces::{ChildrenIn, Join};
use crate::process::{self, Launch};
use crate::request::{ExecRequest, Stdio};
use crate::seccomp::Compiled;
use crate::syscall::clone::{Forked, exit_now, fork};
use oci_spec::runtime::{LinuxNamespaceType as Type, Process};
use rustix::thread::ThreadNameSpaceType;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// The container to join.
#[derive(Debug)]
pub(crate) struct Target<'a> {
    pub(crate) init: &'a OwnedFd,
    pub(crate) init_pid: u32,
    pub(crate) cgroup: &'a Cgroup,
    pub(crate) filter: Option<Compiled>,
    pub(crate) user_namespace: bool,
}

/// A process on its way into a container. Dropped before it is finished, it is killed and reaped.
#[derive(Debug)]
pub struct StartingExec {
    channel: Parent,
    pid: u32,
    pidfd: Option<OwnedFd>,
    console: Option<OwnedFd>,
    executing: bool,
}

#[derive(Debug)]
pub enum ExecProgress {
    Pending,
    /// The program runs.
    Running(ExecProcess),
}

/// A process that runs in a container; a child of the caller.
#[derive(Debug)]
pub struct ExecProcess {
    pub pid: u32,
    pub pidfd: OwnedFd,
    /// The terminal's master, if one was asked for.
    pub console: Option<OwnedFd>,
}

pub(crate) fn spawn(target: &Target<'_>, request: ExecRequest<'_>) -> Result<StartingExec, Error> {
    process::validate(request.process)?;
    if request.process.terminal().unwrap_or(false) != matches!(request.stdio, Stdio::Terminal) {
        return Err(Error::Spec("process.terminal and the standard streams given do not agree"));
    }
    let cgroup = match request.sub_cgroup {
        Some(below) => Cgroup::open(target.cgroup.dir(), below)?,
        None => target.cgroup.clone(),
    };
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let cgroup = rustix::fs::open(cgroup.dir(), flags, rustix::fs::Mode::empty())
        .map_err(Error::system("open the container's cgroup"))?;
    let (parent, child) = channel::pair().map_err(Error::system("make a socket pair"))?;
    let pid_namespace = Join::new(Type::Pid, format!("/proc/{}/ns/pid", target.init_pid).into())
        .map_err(|_| Error::NotRunning)?;
    let elsewhere = ChildrenIn::enter(&pid_namespace)?;
    let forked = fork(0, Some(cgroup.as_fd()), false);
    match forked.map_err(Error::system("make a process in the container (clone3)"))? {
        Forked::Child => run(target, &request, &child),
        Forked::Parent { pid, pidfd } => {
            drop(elsewhere);
            let starting =
                StartingExec { channel: parent, pid, pidfd: Some(pidfd), console: None, executing: false };
            if let Some(adjustment) = request.process.oom_score_adj() {
                set_oom_score(pid, adjustment)?;
            }
            if target.user_namespace {
                let raw = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
                let limits = request.process.rlimits().as_deref().unwrap_or_default();
                process::set_limits(raw, limits, &mut |text| tracing::warn!(pid, "{text}"))?;
            }
            Ok(starting)
        }
    }
}

/// In the child, up to the program.
fn run(target: &Target<'_>, request: &ExecRequest<'_>, channel: &Child) -> ! {
    let go = || -> Result<init::Error, init::Error> {
        let launch = prepare(target, request, channel)?;
        channel.send(&Message::Executing).map_err(|source| init::Error::Step("report", source))?;
        launch.seal()?;
        Ok(launch.execute().into())
    };
    let (Ok(error) | Err(error)) = go();
    let _ = channel.send(&Message::Failed(chain(&error)));
    exit_now(255)
}

fn prepare<'a>(
    target: &'a Target<'_>,
    request: &'a ExecRequest<'_>,
    channel: &Child,
) -> Result<Launch<'a>, init::Error> {
    let fail = |step| move |errno: rustix::io::Errno| init::Error::Step(step, errno.into());
    let mut keep = vec![channel.as_fd().as_raw_fd(), target.init.as_raw_fd()];
    shed(&mut keep, &request.stdio, request.preserve_fds)?;
    // All at once: the kernel then judges the permission for each by the user namespace joined with them.
    let mut all = ThreadNameSpaceType::MOUNT
        | ThreadNameSpaceType::CONTROL_GROUP
        | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
        | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
        | ThreadNameSpaceType::NETWORK;
    if target.user_namespace {
        all |= ThreadNameSpaceType::USER;
    }
    rustix::thread::move_into_thread_name_spaces(target.init.as_fd(), all)
        .map_err(fail("join the container's namespaces"))?;
    if target.user_namespace {
        let root = (nix::unistd::Uid::from_raw(0), nix::unistd::Gid::from_raw(0));
        let become_root = || -> nix::Result<()> {
            nix::unistd::setresgid(root.1, root.1, root.1)?;
            nix::unistd::setresuid(root.0, root.0, root.0)
        };
        become_root().map_err(|e| init::Error::Step("become root of the user namespace", e.into()))?;
    }
    rustix::process::setsid().map_err(fail("start a session"))?;
    set_stdio(request.process, &request.stdio, channel)?;
    let own_limits = !target.user_namespace;
    let mut warnings = |text| warn(channel, text);
    Ok(Launch::become_user(
        request.process,
        target.filter.as_ref(),
        request.preserve_fds,
        own_limits,
        &mut warnings,
    )?)
}

fn set_stdio(process: &Process, stdio: &Stdio, channel: &Child) -> Result<(), init::Error> {
    match stdio {
        Stdio::Inherit => Ok(()),
        Stdio::Fds { stdin, stdout, stderr } => console::set_stdio(&[stdin, stdout, stderr])
            .map_err(|source| init::Error::Step("set the standard streams", source)),
        Stdio::Terminal => {
            let root =
                Root::open(Path::new("/")).map_err(|source| init::Error::Step("open the root", source))?;
            let size = process.console_size().map(|size| (size.height(), size.width()));
            let terminal = console::allocate(&root, size, process.user().uid())?;
            channel
                .send_with(&Message::Console, terminal.master.as_fd())
                .map_err(|source| init::Error::Step("hand over the terminal", source))?;
            Ok(console::adopt(terminal.slave)?)
        }
    }
}

impl StartingExec {
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Does every step that can be done without waiting. After an error, drop it.
    pub fn advance(&mut self) -> Result<ExecProgress, Error> {
        loop {
            let received = match self.channel.receive(false) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(ExecProgress::Pending),
                other => other.map_err(Error::system("hear from the process"))?,
            };
            match received {
                Some((Message::Failed(text), _)) => return Err(Error::Init(text)),
                Some((Message::Warning(text), _)) => tracing::warn!(pid = self.pid, "{text}"),
                Some((Message::Console, mut fds)) => self.console = fds.pop(),
                Some((Message::Executing, _)) => self.executing = true,
                Some(_) => {}
                // The channel closes at execve.
                None => return self.finished(),
            }
        }
    }

    fn finished(&mut self) -> Result<ExecProgress, Error> {
        let pidfd = self.pidfd.take().ok_or(Error::NotRunning)?;
        if !self.executing {
            let ended = how_it_ended(&pidfd);
            self.pidfd = Some(pidfd);
            return Err(Error::Died(ended));
        }
        Ok(ExecProgress::Running(ExecProcess { pid: self.pid, pidfd, console: self.console.take() }))
    }

    /// Drives the set-up to its end, blocking.
    pub fn wait(mut self) -> Result<ExecProcess, Error> {
        loop {
            match self.advance()? {
                ExecProgress::Running(process) => return Ok(process),
                ExecProgress::Pending => wait_readable(&self.channel)?,
            }
        }
    }
}

impl AsFd for StartingExec {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Drop for StartingExec {
    fn drop(&mut self) {
        if let Some(pidfd) = self.pidfd.take() {
            let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
            reap(&pidfd);
        }
    }
}
