//! Creating a container without ever blocking the caller: an explicit state machine that is advanced when its
//! descriptor is readable.
//!
//! ```text
//! create: validate, plan ─ state dir ─ cgroup, limits ─ clone3 ─▶ Starting
//! advance: [Staged] ─ [MapIds] ─ [RuntimeHooks: one process after the other] ─ [Console] ─ Created ─▶ Container
//!          Failed, or the process gone ─▶ undone: killed, reaped, poststop hooks, cgroup, state dir
//! ```

use crate::cgroup::{Cgroup, MissingControllers};
use crate::channel::{self, Message, Parent};
use crate::container::Container;
use crate::hooks::{self, Running};
use crate::init::{self, Init};
use crate::namespaces::{ChildrenIn, Namespaces};
use crate::request::{CreateRequest, Rootfs};
use crate::seccomp;
use crate::state::{State, StateDir, Status};
use crate::syscall::clone::{Forked, fork};
use crate::{Error, devices, mounts, process, rootfs, sysctl};
use oci_spec::runtime::{Hook, LinuxIdMapping, LinuxNamespaceType as Type, LinuxResources, Spec};
use rustix::event::epoll;
use rustix::process::{Pid, WaitId, WaitIdOptions};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Spawns the container's init in its final cgroup and returns at once.
///
/// The calling process must be single-threaded: the child runs ordinary code after a fork. Init becomes a child of the
/// caller, which must reap it (by pidfd or pid; never by waiting for "any child", which would also take hooks).
pub fn create(request: CreateRequest<'_>) -> Result<Starting, Error> {
    let CreateRequest { id, bundle, spec, state_root, cgroup_root, missing_controllers, .. } = request;
    let process = spec.process().as_ref().ok_or(Error::Spec("process is missing"))?;
    let cgroup_path = cgroup_path(spec, id.as_str());
    let plan = plan(request, process, cgroup_root, &cgroup_path)?;
    let dir = StateDir::of(state_root, id);
    dir.create().map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => Error::Exists(id.clone()),
        _ => crate::state::Error::Make { path: dir.path().to_owned(), source }.into(),
    })?;
    let state = State {
        version: crate::state::VERSION,
        id: id.to_string(),
        pid: 0,
        started: 0,
        bundle: bundle.to_owned(),
        rootfs: plan.root_path.clone(),
        created: jiff::Timestamp::now().to_string(),
        annotations: spec.annotations().clone().unwrap_or_default(),
        cgroup: cgroup_root.join(cgroup_path.strip_prefix("/").unwrap_or(&cgroup_path)),
        skip_missing_controllers: missing_controllers == MissingControllers::Warn,
        pid_namespace: plan.namespaces.has(Type::Pid),
        user_namespace: plan.namespaces.has(Type::User),
        ready: false,
        poststart: init::hooks_of(spec, |hooks| hooks.poststart()).to_vec(),
        poststop: init::hooks_of(spec, |hooks| hooks.poststop()).to_vec(),
    };
    // From here on, dropping `undo` removes whatever has been made.
    let mut undo = Undo { dir, state, cgroup: None, pidfd: None, hooks_ran: false, armed: true };
    spawn(plan, &mut undo, cgroup_root, &cgroup_path, missing_controllers)?.finish_setup(spec, undo)
}

/// Checks the specification and computes everything that init needs, before anything is made.
fn plan<'a>(
    request: CreateRequest<'a>,
    process: &'a oci_spec::runtime::Process,
    cgroup_root: &Path,
    cgroup: &Path,
) -> Result<Init<'a>, Error> {
    let CreateRequest { id, bundle, spec, .. } = request;
    if !spec.version().starts_with("1.") {
        return Err(Error::Version(spec.version().clone()));
    }
    process::validate(process)?;
    if !process.cwd().is_absolute() {
        return Err(Error::Spec("process.cwd must be absolute"));
    }
    if process.terminal().unwrap_or(false) != matches!(request.stdio, crate::Stdio::Terminal) {
        return Err(Error::Spec("process.terminal and the standard streams given do not agree"));
    }
    validate_hooks(spec)?;
    let root = spec.root().as_ref().ok_or(Error::Spec("root is missing"))?;
    let path = bundle.join(root.path());
    let root_path = path.canonicalize().map_err(|source| Error::Root { path, source })?;
    if let Rootfs::Overlay(overlay) = &request.rootfs
        && overlay.lower.is_empty()
    {
        return Err(Error::Spec("an overlay needs a lower layer"));
    }
    let linux = spec.linux().as_ref().ok_or(Error::Spec("linux is missing"))?;
    let namespaces = Namespaces::plan(linux.namespaces().as_deref().unwrap_or_default())?;
    if !namespaces.has(Type::Mount) {
        return Err(Error::Spec("a mount namespace is required"));
    }
    if namespaces.is_new(Type::User)
        && (linux.uid_mappings().as_ref().is_none_or(Vec::is_empty)
            || linux.gid_mappings().as_ref().is_none_or(Vec::is_empty))
    {
        return Err(Error::Spec("a new user namespace needs uidMappings and gidMappings"));
    }
    let named = spec.hostname().is_some() || spec.domainname().is_some();
    if named && !namespaces.has(Type::Uts) {
        return Err(Error::Spec("hostname and domainname need a uts namespace"));
    }
    if let Some(sysctls) = linux.sysctl() {
        sysctl::validate(sysctls, &namespaces)?;
    }
    Ok(Init {
        id: id.as_str(),
        spec,
        process,
        root_path,
        propagation: rootfs::propagation(linux.rootfs_propagation().as_deref())?,
        namespaces,
        mounts: mounts::plan::plan(spec.mounts().as_deref().unwrap_or_default(), bundle)?,
        nodes: devices::plan(linux.devices().as_deref().unwrap_or_default())?,
        filter: linux.seccomp().as_ref().map(seccomp::compile).transpose()?,
        cgroup: cgroup_root.join(cgroup.strip_prefix("/").unwrap_or(cgroup)),
        rootfs: request.rootfs,
        stdio: request.stdio,
        no_pivot: request.no_pivot,
        no_new_keyring: request.no_new_keyring,
        preserve_fds: request.preserve_fds,
        state: Vec::new(),
    })
}

#[allow(deprecated, reason = "prestart hooks are deprecated, not gone")]
fn validate_hooks(spec: &Spec) -> Result<(), Error> {
    let Some(all) = spec.hooks() else { return Ok(()) };
    let kinds = [
        all.prestart(),
        all.create_runtime(),
        all.create_container(),
        all.start_container(),
        all.poststart(),
        all.poststop(),
    ];
    for kind in kinds {
        hooks::validate(kind.as_deref().unwrap_or_default())?;
    }
    Ok(())
}

/// `cgroupsPath`, or one of our choosing.
fn cgroup_path(spec: &Spec, id: &str) -> PathBuf {
    let asked = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
    asked.filter(|path| !path.as_os_str().is_empty()).unwrap_or_else(|| Path::new("/orlop").join(id))
}

fn prepare_cgroup(
    spec: &Spec,
    root: &Path,
    path: &Path,
    missing: MissingControllers,
    undo: &mut Undo,
) -> Result<OwnedFd, Error> {
    if let Ok(found) = Cgroup::open(root, path) {
        let processes = found.processes()?.len();
        if processes > 0 {
            return Err(Error::CgroupNotEmpty(processes));
        }
        if found.freezing()? {
            return Err(Error::CgroupFrozen);
        }
    }
    let cgroup = Cgroup::create(root, path)?;
    undo.cgroup = Some(cgroup.clone());
    let none = LinuxResources::default();
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()).unwrap_or(&none);
    cgroup.apply(resources, missing)?;
    if resources.devices().as_ref().is_none_or(Vec::is_empty) {
        cgroup.filter_devices(&[], missing)?;
    }
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    rustix::fs::open(cgroup.dir(), flags, rustix::fs::Mode::empty()).map_err(Error::system("open the cgroup"))
}

/// The socket on which the created container waits. Bound through the directory's descriptor: a socket's path may have
/// only 108 bytes, a state directory's more.
fn listen(dir: &StateDir) -> Result<OwnedFd, Error> {
    let handle = dir.open().map_err(Error::system("open the state directory"))?;
    let bind = || -> rustix::io::Result<OwnedFd> {
        let address =
            rustix::net::SocketAddrUnix::new(format!("/proc/self/fd/{}/start", handle.as_raw_fd()))?;
        let socket = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::net::bind(&socket, &address)?;
        rustix::net::listen(&socket, 8)?;
        Ok(socket)
    };
    bind().map_err(Error::system("make the start socket"))
}

/// A process that has been forked, not yet registered with its epoll.
struct Spawned {
    channel: Parent,
    pid: u32,
    staged: bool,
}

fn spawn(
    mut plan: Init<'_>,
    undo: &mut Undo,
    cgroup_root: &Path,
    cgroup_path: &Path,
    missing: MissingControllers,
) -> Result<Spawned, Error> {
    undo.dir.save_process(plan.process)?;
    if let Some(filter) = &plan.filter {
        undo.dir.save_seccomp(filter)?;
    }
    let cgroup = prepare_cgroup(plan.spec, cgroup_root, cgroup_path, missing, undo)?;
    let listener = listen(&undo.dir)?;
    let (parent, child) = channel::pair().map_err(Error::system("make a socket pair"))?;
    plan.state = undo.state.for_hooks(Status::Creating);
    let staged = plan.namespaces.needs_stage();
    let flags = if staged { 0 } else { plan.namespaces.clone_flags() };
    let elsewhere = plan.namespaces.joined(Type::Pid).map(ChildrenIn::enter).transpose()?;
    let forked = fork(flags, Some(cgroup.as_fd()), false);
    match forked.map_err(Error::system("make the container's first process (clone3)"))? {
        Forked::Child => init::run(&plan, child, listener),
        Forked::Parent { pid, pidfd } => {
            drop(elsewhere);
            undo.pidfd = Some(pidfd);
            if let Some(adjustment) = plan.process.oom_score_adj() {
                set_oom_score(pid, adjustment)?;
            }
            // In a user namespace init may not raise its limits itself.
            if plan.namespaces.has(Type::User) && !staged {
                limit(pid, plan.process)?;
            }
            Ok(Spawned { channel: parent, pid, staged })
        }
    }
}

fn limit(pid: u32, process: &oci_spec::runtime::Process) -> Result<(), Error> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let limits = process.rlimits().as_deref().unwrap_or_default();
    Ok(process::set_limits(raw, limits, &mut |text| tracing::warn!(pid, "{text}"))?)
}

pub(crate) fn set_oom_score(pid: u32, adjustment: i32) -> Result<(), Error> {
    match std::fs::write(format!("/proc/{pid}/oom_score_adj"), adjustment.to_string()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            tracing::warn!(
                pid,
                adjustment,
                "oom_score_adj left as it is: lowering it needs CAP_SYS_RESOURCE"
            );
            Ok(())
        }
        // It has died already; the handshake tells why.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) => Ok(()),
        Err(source) => Err(Error::System { step: "set oom_score_adj", source }),
    }
}

impl Spawned {
    #[allow(deprecated, reason = "prestart hooks are deprecated, not gone")]
    fn finish_setup(self, spec: &Spec, mut undo: Undo) -> Result<Starting, Error> {
        let Self { channel, pid, staged } = self;
        undo.state.pid = pid;
        undo.state.started = crate::state::start_time(pid).unwrap_or_default();
        undo.dir.save(&undo.state)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(Error::system("make an epoll"))?;
        watch(&epoll, &channel)?;
        let mut queue = VecDeque::new();
        queue.extend(
            init::hooks_of(spec, |hooks| hooks.prestart()).iter().cloned().map(|hook| ("prestart", hook)),
        );
        let runtime = init::hooks_of(spec, |hooks| hooks.create_runtime());
        queue.extend(runtime.iter().cloned().map(|hook| ("createRuntime", hook)));
        let maps = |maps: Option<&Option<Vec<LinuxIdMapping>>>| maps.cloned().flatten().unwrap_or_default();
        let linux = spec.linux().as_ref();
        Ok(Starting {
            epoll,
            channel,
            pid,
            stage: None,
            staged,
            undo,
            console: None,
            hooks: queue,
            running: None,
            timer: None,
            uid_map: maps(linux.map(|linux| linux.uid_mappings())),
            gid_map: maps(linux.map(|linux| linux.gid_mappings())),
        })
    }
}

fn watch(epoll: &OwnedFd, fd: impl AsFd) -> Result<(), Error> {
    epoll::add(epoll, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)
        .map_err(Error::system("watch a descriptor"))
}

/// Removes what a failed create has made, in reverse.
#[derive(Debug)]
struct Undo {
    dir: StateDir,
    state: State,
    cgroup: Option<Cgroup>,
    pidfd: Option<OwnedFd>,
    hooks_ran: bool,
    armed: bool,
}

impl Drop for Undo {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        if let Some(pidfd) = &self.pidfd {
            let _ = rustix::process::pidfd_send_signal(pidfd, rustix::process::Signal::KILL);
        }
        if let Some(cgroup) = &self.cgroup
            && let Err(error) = cgroup.kill()
        {
            tracing::warn!(id = self.state.id, error = %channel::chain(&error), "undo of a failed create");
        }
        if let Some(pidfd) = &self.pidfd {
            reap(pidfd);
        }
        if self.hooks_ran {
            crate::container::run_poststop(&self.state);
        }
        if let Some(Err(error)) = self.cgroup.as_ref().map(Cgroup::remove) {
            tracing::warn!(id = self.state.id, error = %channel::chain(&error), "undo of a failed create");
        }
        if let Err(error) = self.dir.remove() {
            tracing::warn!(id = self.state.id, error = %channel::chain(&error), "undo of a failed create");
        }
    }
}

/// Waits for a killed child of ours; somebody else's is left to them.
pub(crate) fn reap(pidfd: &OwnedFd) {
    let _ = rustix::io::retry_on_intr(|| {
        rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)
    });
}

/// How a child ended, for an error message, without waiting.
pub(crate) fn how_it_ended(pidfd: &OwnedFd) -> String {
    let status = rustix::process::waitid(
        WaitId::PidFd(pidfd.as_fd()),
        WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT,
    );
    match status {
        Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, Some(signal)) => format!("signal {signal}"),
            (None, None) => "unknown reason".to_owned(),
        },
        _ => "it closed its channel".to_owned(),
    }
}

/// A container being set up. Dropped before it is finished, it kills what was started and removes every trace.
#[derive(Debug)]
pub struct Starting {
    epoll: OwnedFd,
    channel: Parent,
    pid: u32,
    /// The helper process before init, once init has taken over.
    stage: Option<OwnedFd>,
    staged: bool,
    undo: Undo,
    console: Option<OwnedFd>,
    hooks: VecDeque<(&'static str, Hook)>,
    running: Option<Running>,
    timer: Option<OwnedFd>,
    uid_map: Vec<LinuxIdMapping>,
    gid_map: Vec<LinuxIdMapping>,
}

#[derive(Debug)]
pub enum Progress {
    /// Call [`Starting::advance`] again when the descriptor is readable.
    Pending,
    /// The container waits for [`Container::start`].
    Created(Box<Container>),
}

impl Starting {
    /// The process id of the container's first process. Final when [`Starting::advance`] has returned `Created`: with a
    /// user namespace beside joined ones, init replaces a helper on the way.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Does every step that can be done without waiting. After an error, drop it: nothing of the container is left.
    pub fn advance(&mut self) -> Result<Progress, Error> {
        loop {
            if let Some(running) = &mut self.running {
                if !running.check()? {
                    return Ok(Progress::Pending);
                }
                self.running = None;
                self.timer = None;
                self.next_hook()?;
                continue;
            }
            let received = match self.channel.receive(false) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Progress::Pending),
                other => other.map_err(Error::system("hear from the container's process"))?,
            };
            let Some((message, fds)) = received else {
                let ended = self.undo.pidfd.as_ref().map(how_it_ended).unwrap_or_default();
                return Err(Error::Died(ended));
            };
            match message {
                Message::Created => return self.created(),
                other => self.handle(other, fds)?,
            }
        }
    }

    fn handle(&mut self, message: Message, mut fds: Vec<OwnedFd>) -> Result<(), Error> {
        match message {
            Message::Staged { pid } => {
                self.stage = self.undo.pidfd.take();
                self.undo.pidfd = fds.pop();
                self.pid = pid;
                self.undo.state.pid = pid;
                self.undo.state.started = crate::state::start_time(pid).unwrap_or_default();
                self.undo.dir.save(&self.undo.state)?;
            }
            Message::MapIds => {
                write_map(self.pid, "uid_map", &self.uid_map)?;
                write_map(self.pid, "gid_map", &self.gid_map)?;
                self.acknowledge()?;
            }
            Message::RuntimeHooks => {
                self.undo.hooks_ran = true;
                self.next_hook()?;
            }
            Message::Console => self.console = fds.pop(),
            Message::Warning(text) => tracing::warn!(id = self.undo.state.id, "{text}"),
            Message::Failed(text) => return Err(Error::Init(text)),
            Message::Created | Message::Executing => {}
        }
        Ok(())
    }

    fn acknowledge(&self) -> Result<(), Error> {
        self.channel.acknowledge().map_err(Error::system("answer the container's process"))
    }

    fn next_hook(&mut self) -> Result<(), Error> {
        let Some((point, hook)) = self.hooks.pop_front() else { return self.acknowledge() };
        let running = Running::start(point, &hook, &self.undo.state.for_hooks(Status::Creating), &[])?;
        watch(&self.epoll, &running)?;
        if let Some(left) = running.remaining() {
            use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
            let fail = Error::system::<rustix::io::Errno>;
            let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)
                .map_err(fail("make a timer"))?;
            let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
            let value =
                Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            let when = Itimerspec { it_interval: zero, it_value: value };
            rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::empty(), &when)
                .map_err(fail("set a timer"))?;
            watch(&self.epoll, &timer)?;
            self.timer = Some(timer);
        }
        self.running = Some(running);
        Ok(())
    }

    fn created(&mut self) -> Result<Progress, Error> {
        if let Some(stage) = self.stage.take() {
            reap(&stage);
        }
        if self.staged {
            tracing::debug!(id = self.undo.state.id, pid = self.pid, "init made by a stage");
        }
        self.undo.state.ready = true;
        self.undo.dir.save(&self.undo.state)?;
        self.undo.armed = false;
        let container = Container::assemble(
            self.undo.state.clone(),
            self.undo.dir.clone(),
            self.undo.pidfd.take(),
            self.console.take(),
        )?;
        Ok(Progress::Created(Box::new(container)))
    }

    /// Drives the set-up to its end, blocking.
    pub fn wait(mut self) -> Result<Container, Error> {
        loop {
            match self.advance()? {
                Progress::Created(container) => return Ok(*container),
                Progress::Pending => wait_readable(&self.epoll)?,
            }
        }
    }
}

pub(crate) fn wait_readable(fd: impl AsFd) -> Result<(), Error> {
    let mut poll = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll, None)).map_err(Error::system("wait"))?;
    Ok(())
}

fn write_map(pid: u32, file: &str, maps: &[LinuxIdMapping]) -> Result<(), Error> {
    let lines: String =
        maps.iter().map(|m| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size())).collect();
    std::fs::write(format!("/proc/{pid}/{file}"), lines).map_err(Error::system("write the id maps"))
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(stage) = self.stage.take() {
            reap(&stage);
        }
    }
}

impl AsFd for Starting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
