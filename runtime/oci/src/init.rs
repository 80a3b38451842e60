//! The container's first process, from the fork to the program.
//!
//! Everything here runs in the child. The runtime's executable is in `/proc/<pid>/exe` of this process until it
//! executes the user's program: the process is therefore not dumpable from its first instruction on, and
//! [`crate::exe::protect`] has made that file unwritable for the case of a program that is `/proc/self/exe` itself.

use crate::channel::{Child, Message, chain};
use crate::console;
use crate::devices::{self, Node};
use crate::hooks;
use crate::inroot::{Make, Root};
use crate::mounts::{self, apply::Context, plan::Planned};
use crate::namespaces::{self, Namespaces};
use crate::process::{self, Launch};
use crate::request::{Rootfs, Stdio};
use crate::rootfs;
use crate::seccomp::Compiled;
use crate::syscall::clone::{Forked, exit_now, fork};
use crate::syscall::{attr, descriptors, keyring, netif, signals};
use crate::sysctl;
use oci_spec::runtime::{Hook, LinuxNamespaceType as Type, Process, Spec};
use rustix::fs::Mode;
use rustix::mount::{MountPropagationFlags, mount_change};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0}")]
    Step(&'static str, #[source] io::Error),
    #[error(transparent)]
    Namespace(#[from] namespaces::Error),
    #[error(transparent)]
    Mount(#[from] mounts::Error),
    #[error(transparent)]
    Rootfs(#[from] rootfs::Error),
    #[error(transparent)]
    Device(#[from] devices::Error),
    #[error(transparent)]
    Console(#[from] console::Error),
    #[error(transparent)]
    Sysctl(#[from] sysctl::Error),
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    #[error(transparent)]
    Process(#[from] process::Error),
}

fn step<T, E: Into<io::Error>>(name: &'static str, result: Result<T, E>) -> Result<T, Error> {
    result.map_err(|source| Error::Step(name, source.into()))
}

/// What init needs to know, computed by the runtime before the fork.
#[derive(Debug)]
pub(crate) struct Init<'a> {
    pub(crate) id: &'a str,
    pub(crate) spec: &'a Spec,
    pub(crate) process: &'a Process,
    pub(crate) root_path: PathBuf,
    pub(crate) rootfs: Rootfs,
    pub(crate) propagation: Option<MountPropagationFlags>,
    pub(crate) namespaces: Namespaces,
    pub(crate) mounts: Vec<Planned>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) filter: Option<Compiled>,
    pub(crate) cgroup: PathBuf,
    pub(crate) stdio: Stdio,
    pub(crate) no_pivot: bool,
    pub(crate) no_new_keyring: bool,
    pub(crate) preserve_fds: u32,
    /// For hooks that run in this process.
    pub(crate) state: Vec<u8>,
}

/// Leaves the runtime behind: its descriptors, signals and umask.
pub(crate) fn shed(keep: &mut Vec<RawFd>, stdio: &Stdio, preserve_fds: u32) -> Result<(), Error> {
    step(
        "make the process not dumpable",
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable),
    )?;
    if let Stdio::Fds { stdin, stdout, stderr } = stdio {
        keep.extend([stdin, stdout, stderr].map(AsRawFd::as_raw_fd));
    }
    keep.extend((3..).take(preserve_fds as usize));
    step("close the runtime's descriptors", descriptors::close_others(keep))?;
    signals::reset();
    rustix::process::umask(Mode::empty());
    Ok(())
}

/// Runs init. Never returns: it becomes the program or exits.
pub(crate) fn run(init: &Init<'_>, channel: Child, listener: OwnedFd) -> ! {
    let launch = match prepare(init, &channel, &listener) {
        Ok(launch) => launch,
        Err(error) => {
            let _ = channel.send(&Message::Failed(chain(&error)));
            exit_now(1);
        }
    };
    if channel.send(&Message::Created).is_err() {
        exit_now(1);
    }
    drop(channel);
    let Ok(starter) = wait_for_start(&listener) else { exit_now(1) };
    drop(listener);
    let error = finish(init, &launch, &starter);
    let _ = starter.send(&Message::Failed(chain(&error)));
    exit_now(1)
}

/// Whoever connects and says a byte starts the container; the connection then carries the outcome.
fn wait_for_start(listener: &OwnedFd) -> io::Result<Child> {
    loop {
        let flags = rustix::net::SocketFlags::CLOEXEC;
        let connection = rustix::io::retry_on_intr(|| rustix::net::accept_with(listener, flags))?;
        let mut byte = [0u8; 1];
        // One that closes without a word came second to the socket's name, or died.
        if matches!(rustix::io::retry_on_intr(|| rustix::io::read(&connection, &mut byte)), Ok(1)) {
            return Ok(Child::new(connection));
        }
    }
}

fn finish(init: &Init<'_>, launch: &Launch<'_>, starter: &Child) -> Error {
    let last = || -> Result<(), Error> {
        let env = init.process.env().clone().unwrap_or_default();
        hooks::run(
            "startContainer",
            hooks_of(init.spec, |hooks| hooks.start_container()),
            &init.state,
            &env,
        )?;
        step("report to start", starter.send(&Message::Executing))?;
        Ok(launch.seal()?)
    };
    match last() {
        Err(error) => error,
        Ok(()) => launch.execute().into(),
    }
}

pub(crate) fn hooks_of(
    spec: &Spec,
    pick: impl Fn(&oci_spec::runtime::Hooks) -> &Option<Vec<Hook>>,
) -> &[Hook] {
    spec.hooks().as_ref().and_then(|hooks| pick_slice(hooks, pick)).unwrap_or_default()
}

fn pick_slice(
    hooks: &oci_spec::runtime::Hooks,
    pick: impl Fn(&oci_spec::runtime::Hooks) -> &Option<Vec<Hook>>,
) -> Option<&[Hook]> {
    pick(hooks).as_deref()
}

fn prepare<'a>(init: &'a Init<'_>, channel: &Child, listener: &OwnedFd) -> Result<Launch<'a>, Error> {
    let mut keep = vec![channel.as_fd().as_raw_fd(), listener.as_raw_fd()];
    keep.extend(init.namespaces.joins.iter().map(|join| join.fd.as_raw_fd()));
    shed(&mut keep, &init.stdio, init.preserve_fds)?;
    enter_namespaces(init, channel)?;
    step("start a session", rustix::process::setsid())?;
    if !init.no_new_keyring
        && let Ok(name) = CString::new(format!("_ses.{}", init.id))
        && let Err(error) = keyring::join_session(&name)
    {
        warn(channel, format!("no session keyring of its own: {error}"));
    }
    if init.namespaces.is_new(Type::Network) {
        step("bring the loopback interface up", netif::loopback_up())?;
    }
    if let Stdio::Fds { stdin, stdout, stderr } = &init.stdio {
        step("set the standard streams", console::set_stdio(&[stdin, stdout, stderr]))?;
    }
    let root = build_root(init, channel)?;
    enter_root(init, &root)?;
    let own_limits = !init.namespaces.has(Type::User);
    let linux = init.spec.linux().as_ref();
    if let Some(personality) = linux.and_then(|linux| linux.personality().as_ref()) {
        process::set_personality(personality)?;
    }
    let mut warnings = |text| warn(channel, text);
    let launch = Launch::become_user(
        init.process,
        init.filter.as_ref(),
        init.preserve_fds,
        own_limits,
        &mut warnings,
    )?;
    Ok(launch)
}

pub(crate) fn warn(channel: &Child, text: String) {
    let _ = channel.send(&Message::Warning(text));
}

fn enter_namespaces(init: &Init<'_>, channel: &Child) -> Result<(), Error> {
    let namespaces = &init.namespaces;
    let others =
        || namespaces.joins.iter().filter(|join| !matches!(join.kind, Type::User | Type::Pid | Type::Mount));
    others().try_for_each(namespaces::Join::enter)?;
    if namespaces.needs_stage() {
        stage(init, channel)?;
    } else if namespaces.is_new(Type::User) {
        step("have the id maps written", channel.ask(&Message::MapIds))?;
        become_namespace_root()?;
    }
    if let Some(mount) = namespaces.joined(Type::Mount) {
        mount.enter()?;
    }
    if namespaces.is_new(Type::Cgroup) {
        namespaces::unshare(Type::Cgroup as u64)?;
    }
    Ok(())
}

fn become_namespace_root() -> Result<(), Error> {
    let root = (nix::unistd::Uid::from_raw(0), nix::unistd::Gid::from_raw(0));
    // Refused where setgroups is denied (maps without privilege); then there are no groups to drop either.
    let _ = nix::unistd::setgroups(&[]);
    step("become root of the user namespace", nix::unistd::setresgid(root.1, root.1, root.1))?;
    step("become root of the user namespace", nix::unistd::setresuid(root.0, root.0, root.0))
}

/// Enters or makes the user namespace first and everything that it shall own after it. A PID namespace is entered by
/// children only, so the rest of the set-up goes on in a child, which is made a sibling: the runtime is its parent.
fn stage(init: &Init<'_>, channel: &Child) -> Result<(), Error> {
    let namespaces = &init.namespaces;
    if let Some(user) = namespaces.joined(Type::User) {
        user.enter()?;
    } else {
        namespaces::unshare(Type::User as u64)?;
        step("have the id maps written", channel.ask(&Message::MapIds))?;
    }
    become_namespace_root()?;
    let flags = namespaces.clone_flags() & !(Type::User as u64);
    let pid_flag = flags & Type::Pid as u64;
    namespaces::unshare(flags & !pid_flag)?;
    match step("make init", fork(pid_flag, None, true))? {
        Forked::Child => {
            step(
                "make the process not dumpable",
                rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable),
            )?;
            Ok(())
        }
        Forked::Parent { pid, pidfd } => {
            let sent = channel.send_with(&Message::Staged { pid }, pidfd.as_fd());
            exit_now(i32::from(sent.is_err()))
        }
    }
}

/// Mounts everything and makes the devices; the host's file system is still in reach.
fn build_root(init: &Init<'_>, channel: &Child) -> Result<Root, Error> {
    let linux = init.spec.linux().as_ref();
    let root = rootfs::mount_root(&init.root_path, &init.rootfs, init.propagation)?;
    let user_ns = init.namespaces.has(Type::User);
    let cgroup_ns = init.namespaces.has(Type::Cgroup);
    let context = Context { cgroup: &init.cgroup, cgroup_ns, user_ns };
    let mut to_seal = Vec::new();
    for mount in &init.mounts {
        to_seal.extend(mounts::apply::apply(&root, mount, context)?);
    }
    let own_dev = !init.mounts.iter().any(|mount| {
        mount.destination == Path::new("/dev") && matches!(mount.kind, mounts::plan::Kind::Bind { .. })
    });
    if own_dev {
        devices::make(&root, &init.nodes, user_ns)?;
        devices::links(&root)?;
    }
    let runtime_hooks =
        !hooks_of(init.spec, |hooks| hooks.create_runtime()).is_empty() || has_prestart(init.spec);
    if runtime_hooks {
        step("have the runtime's hooks run", channel.ask(&Message::RuntimeHooks))?;
    }
    hooks::run("createContainer", hooks_of(init.spec, |hooks| hooks.create_container()), &init.state, &[])?;
    if matches!(init.stdio, Stdio::Terminal) {
        let size = init.process.console_size().map(|size| (size.height(), size.width()));
        let terminal = console::allocate(&root, size, init.process.user().uid())?;
        console::bind_console(&root, &terminal.slave)?;
        step("hand over the terminal", channel.send_with(&Message::Console, terminal.master.as_fd()))?;
        console::adopt(terminal.slave)?;
    }
    step("make the working directory", root.resolve_or_make(init.process.cwd(), Make::Directory, 0o755))?;
    let null = step("open /dev/null", rootfs::open_null())?;
    if let Some(sysctls) = linux.and_then(|linux| linux.sysctl().as_ref()) {
        sysctl::write(&root, sysctls)?;
    }
    if let Some(paths) = linux.and_then(|linux| linux.readonly_paths().as_ref()) {
        rootfs::make_read_only(&root, paths)?;
    }
    if let Some(paths) = linux.and_then(|linux| linux.masked_paths().as_ref()) {
        rootfs::mask(&root, paths, &null)?;
    }
    for mount in to_seal {
        step("make a tmpfs read-only", attr::set(&mount, false, attr::RDONLY, 0))?;
    }
    Ok(root)
}

#[allow(deprecated, reason = "the hook kind is deprecated, not gone")]
pub(crate) fn has_prestart(spec: &Spec) -> bool {
    !hooks_of(spec, |hooks| hooks.prestart()).is_empty()
}

fn enter_root(init: &Init<'_>, root: &Root) -> Result<(), Error> {
    if init.spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false) {
        rootfs::seal(root)?;
    }
    rootfs::pivot(root, init.no_pivot)?;
    if let Some(flags) = init.propagation {
        step("change the propagation of the root", mount_change("/", flags))?;
    }
    if let Some(name) = init.spec.hostname().as_ref().filter(|name| !name.is_empty()) {
        step("set the hostname", rustix::system::sethostname(name.as_bytes()))?;
    }
    if let Some(name) = init.spec.domainname().as_ref().filter(|name| !name.is_empty()) {
        step("set the domainname", rustix::system::setdomainname(name.as_bytes()))?;
    }
    Ok(())
}
