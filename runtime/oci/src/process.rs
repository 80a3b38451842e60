//! Turning the child into the user's process: limits, identity, privileges, and the program itself.

use crate::capabilities::{self, Sets};
use crate::seccomp::Compiled;
use crate::syscall::{descriptors, scheduling, seccomp};
use oci_spec::runtime::{
    IOPriorityClass, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag, LinuxSchedulerPolicy,
    PosixRlimit, PosixRlimitType, Process, Scheduler,
};
use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags};
use rustix::process::{Pid, Resource, Rlimit};
use std::ffi::CString;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("args must not be empty")]
    NoArgs,
    #[error("process.{0} contains a NUL byte")]
    Nul(&'static str),
    #[error("exec: {0:?}: executable file not found in $PATH")]
    NotInPath(String),
    #[error("exec: {name:?}: stat {name}")]
    Program { name: String, source: io::Error },
    #[error("exec: {0:?}: is a directory")]
    Directory(String),
    #[error("exec: {name:?}")]
    Execute { name: String, source: io::Error },
    #[error("rlimit {0:?} is listed twice")]
    DuplicateLimit(PosixRlimitType),
    #[error("set rlimit {kind:?}")]
    Limit { kind: PosixRlimitType, source: io::Error },
    #[error("change the working directory to {:?}", .cwd.display())]
    Cwd { cwd: PathBuf, source: io::Error },
    #[error("the working directory {:?} is outside the container's root: possible container breakout detected", .0.display())]
    CwdOutside(PathBuf),
    #[error("{step}")]
    Identity { step: &'static str, source: io::Error },
    #[error("set the {0} of the process")]
    Setting(&'static str, #[source] io::Error),
    #[error(transparent)]
    Capabilities(#[from] capabilities::Error),
    #[error("install the seccomp filter")]
    Seccomp { source: io::Error },
}

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}

/// Checks what can be checked before anything is made.
pub(crate) fn validate(process: &Process) -> Result<(), Error> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::NoArgs);
    }
    let mut seen = Vec::new();
    for limit in process.rlimits().iter().flatten() {
        if seen.contains(&limit.typ()) {
            return Err(Error::DuplicateLimit(limit.typ()));
        }
        seen.push(limit.typ());
    }
    if process.args().iter().flatten().any(|arg| arg.contains('\0')) {
        return Err(Error::Nul("args"));
    }
    if process.env().iter().flatten().any(|entry| entry.contains('\0')) {
        return Err(Error::Nul("env"));
    }
    Ok(())
}

/// Sets limits of the process `pid` (of this one with `None`); what may not be raised here is a warning.
pub(crate) fn set_limits(
    pid: Option<Pid>,
    limits: &[PosixRlimit],
    warn: &mut dyn FnMut(String),
) -> Result<(), Error> {
    for limit in limits {
        let finite = |value: u64| (value != u64::MAX).then_some(value);
        let new = Rlimit { current: finite(limit.soft()), maximum: finite(limit.hard()) };
        match rustix::process::prlimit(pid, resource(limit.typ()), new) {
            Ok(_) => {}
            Err(rustix::io::Errno::PERM) => warn(format!(
                "rlimit {:?} left as it is: raising it needs CAP_SYS_RESOURCE, which the runtime does not have",
                limit.typ()
            )),
            Err(errno) => return Err(Error::Limit { kind: limit.typ(), source: errno.into() }),
        }
    }
    Ok(())
}

/// A process on the way to its program. Made by [`Launch::become_user`], ended by [`Launch::execute`].
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    process: &'a Process,
    filter: Option<&'a Compiled>,
    sets: Sets,
    preserve_fds: u32,
    program: PathBuf,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl<'a> Launch<'a> {
    /// Everything up to the point where only the program is missing: the process has the user's identity, limits,
    /// directory and capabilities, and its program has been found.
    pub(crate) fn become_user(
        process: &'a Process,
        filter: Option<&'a Compiled>,
        preserve_fds: u32,
        own_limits: bool,
        warn: &mut dyn FnMut(String),
    ) -> Result<Self, Error> {
        if own_limits {
            set_limits(None, process.rlimits().as_deref().unwrap_or_default(), warn)?;
        }
        schedule(process)?;
        let sets = Sets::new(process.capabilities().as_ref());
        if !sets.ungrantable.is_empty() {
            warn(format!("capabilities that the runtime cannot grant: {}", sets.ungrantable.join(" ")));
        }
        change_identity(process, &sets)?;
        let no_new_privileges = process.no_new_privileges().unwrap_or(false);
        sets.apply(filter.is_some() && !no_new_privileges)?;
        if no_new_privileges {
            rustix::thread::set_no_new_privs(true)
                .map_err(|errno| Error::Setting("no_new_privs", errno.into()))?;
        }
        let env = environment(process);
        let program = find_program(process, &env)?;
        let c_strings = |strings: Vec<String>, what| {
            strings.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>().map_err(|_| Error::Nul(what))
        };
        let args = c_strings(process.args().clone().unwrap_or_default(), "args")?;
        let env = c_strings(env, "env")?;
        Ok(Self { process, filter, sets, preserve_fds, program, args, env })
    }

    /// Everything but execve itself, as late as can be: the filter must not have to allow what the set-up needs.
    pub(crate) fn seal(&self) -> Result<(), Error> {
        descriptors::cloexec_from(3 + self.preserve_fds)
            .map_err(|source| Error::Setting("descriptors", source))?;
        let Some(filter) = self.filter else { return Ok(()) };
        let privileged = !self.process.no_new_privileges().unwrap_or(false);
        if privileged {
            self.sets.raise_admin()?;
        }
        seccomp::install(&filter.filter, filter.flags).map_err(|source| Error::Seccomp { source })?;
        if privileged {
            self.sets.finish()?;
        }
        Ok(())
    }

    /// Returns only if it fails.
    pub(crate) fn execute(&self) -> Error {
        let name = self.process.args().iter().flatten().next().cloned().unwrap_or_default();
        let Ok(program) = CString::new(std::os::unix::ffi::OsStrExt::as_bytes(self.program.as_os_str()))
        else {
            return Error::Nul("args");
        };
        match nix::unistd::execve(&program, &self.args, &self.env) {
            Err(errno) => Error::Execute { name, source: errno.into() },
            Ok(never) => match never {},
        }
    }
}

fn schedule(process: &Process) -> Result<(), Error> {
    if let Some(scheduler) = process.scheduler() {
        scheduling::set_scheduler(sched_attr(scheduler)).map_err(|e| Error::Setting("scheduler", e))?;
    }
    if let Some(priority) = process.io_priority() {
        let class = match priority.class() {
            IOPriorityClass::IoprioClassRt => 1,
            IOPriorityClass::IoprioClassBe => 2,
            IOPriorityClass::IoprioClassIdle => 3,
        };
        let level = u16::try_from(priority.priority()).unwrap_or(7).min(7);
        scheduling::set_io_priority(class, level).map_err(|e| Error::Setting("I/O priority", e))?;
    }
    Ok(())
}

fn sched_attr(scheduler: &Scheduler) -> scheduling::SchedAttr {
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => 0,
        LinuxSchedulerPolicy::SchedFifo => 1,
        LinuxSchedulerPolicy::SchedRr => 2,
        LinuxSchedulerPolicy::SchedBatch => 3,
        LinuxSchedulerPolicy::SchedIso => 4,
        LinuxSchedulerPolicy::SchedIdle => 5,
        LinuxSchedulerPolicy::SchedDeadline => 6,
    };
    let flags = scheduler.flags().iter().flatten().fold(0, |bits, flag| {
        bits | match flag {
            LinuxSchedulerFlag::SchedResetOnFork => 0x01,
            LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
            LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
            LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
            LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
            LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
            LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
        }
    });
    scheduling::SchedAttr {
        size: 0,
        policy,
        flags,
        nice: scheduler.nice().unwrap_or(0),
        priority: scheduler.priority().unwrap_or(0).unsigned_abs(),
        runtime: scheduler.runtime().unwrap_or(0),
        deadline: scheduler.deadline().unwrap_or(0),
        period: scheduler.period().unwrap_or(0),
    }
}

pub(crate) fn set_personality(personality: &LinuxPersonality) -> Result<(), Error> {
    let persona = match personality.domain() {
        LinuxPersonalityDomain::PerLinux32 => nix::sys::personality::Persona::from_bits_retain(8),
        LinuxPersonalityDomain::PerLinux => nix::sys::personality::Persona::empty(),
    };
    nix::sys::personality::set(persona).map(drop).map_err(|errno| Error::Setting("personality", errno.into()))
}

fn change_identity(process: &Process, sets: &Sets) -> Result<(), Error> {
    let user = process.user();
    rustix::process::umask(Mode::from_raw_mode(user.umask().unwrap_or(0o022)));
    // As root first: the directory may be closed to the user. As the user afterwards if root may not (NFS).
    let cwd = process.cwd();
    let early = rustix::process::chdir(cwd);
    crate::console::give_stdio(user.uid());
    sets.bound()?;
    let step = |step: &'static str, result: Result<(), nix::errno::Errno>| {
        result.map_err(|errno| Error::Identity { step, source: errno.into() })
    };
    rustix::thread::set_keep_capabilities(true)
        .map_err(|errno| Error::Identity { step: "keep capabilities", source: errno.into() })?;
    let groups: Vec<_> =
        user.additional_gids().iter().flatten().map(|gid| nix::unistd::Gid::from_raw(*gid)).collect();
    let may_set_groups =
        !std::fs::read_to_string("/proc/self/setgroups").is_ok_and(|text| text.trim() == "deny");
    if may_set_groups {
        step("set the additional groups", nix::unistd::setgroups(&groups))?;
    }
    let (uid, gid) = (nix::unistd::Uid::from_raw(user.uid()), nix::unistd::Gid::from_raw(user.gid()));
    step("set the group", nix::unistd::setresgid(gid, gid, gid))?;
    step("set the user", nix::unistd::setresuid(uid, uid, uid))?;
    if early.is_err() {
        rustix::process::chdir(cwd).map_err(|errno| Error::Cwd { cwd: cwd.clone(), source: errno.into() })?;
    }
    // A directory reached through a leaked descriptor lies outside the root; the kernel says so in its name.
    match rustix::process::getcwd(Vec::new()) {
        Ok(path) if path.as_bytes().starts_with(b"/") => Ok(()),
        _ => Err(Error::CwdOutside(cwd.clone())),
    }
}

/// The environment: the last of several entries of one name counts; HOME is the user's if not given.
fn environment(process: &Process) -> Vec<String> {
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    let mut env: Vec<String> = Vec::new();
    for entry in process.env().iter().flatten() {
        match env.iter().position(|other| name(other) == name(entry)) {
            Some(index) => env[index].clone_from(entry),
            None => env.push(entry.clone()),
        }
    }
    if !env.iter().any(|entry| entry.starts_with("HOME=") && entry.len() > 5) {
        env.retain(|entry| !entry.starts_with("HOME="));
        env.push(format!("HOME={}", home(process.user().uid()).unwrap_or_else(|| "/".to_owned())));
    }
    env
}

/// The user's home in the container's own /etc/passwd, read with care: the image may have put anything there.
fn home(uid: u32) -> Option<String> {
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(i32::try_from(flags.bits()).ok()?)
        .open("/etc/passwd")
        .ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    file.take(1 << 20).read_to_string(&mut text).ok()?;
    text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let home = fields.get(5).filter(|home| !home.is_empty())?;
        (fields.get(2)?.parse() == Ok(uid)).then(|| (*home).to_owned())
    })
}

/// Finds args[0] as the user's process would: by path if it has a slash, else in PATH.
fn find_program(process: &Process, env: &[String]) -> Result<PathBuf, Error> {
    let name = process.args().iter().flatten().next().cloned().unwrap_or_default();
    if name.contains('/') {
        return match executable(Path::new(&name)) {
            Ok(true) => Ok(PathBuf::from(name)),
            Ok(false) => Err(Error::Directory(name)),
            Err(source) if source.kind() == io::ErrorKind::PermissionDenied => {
                Err(Error::Execute { name, source })
            }
            Err(source) => Err(Error::Program { name, source }),
        };
    }
    let path = env.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default();
    let mut refused = None;
    for dir in path.split(':') {
        // An empty element means the current directory.
        let candidate = if dir.is_empty() { Path::new(".").join(&name) } else { Path::new(dir).join(&name) };
        match executable(&candidate) {
            Ok(true) if !name.is_empty() => return Ok(candidate),
            Err(source) if source.kind() == io::ErrorKind::PermissionDenied => refused = Some(source),
            _ => {}
        }
    }
    match refused {
        Some(source) => Err(Error::Execute { name, source }),
        None => Err(Error::NotInPath(name)),
    }
}

/// `Ok(false)` for a directory.
fn executable(path: &Path) -> io::Result<bool> {
    let stat = rustix::fs::statat(CWD, path, AtFlags::empty())?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Ok(false);
    }
    rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(json: serde_json::Value) -> Process {
        let mut full = serde_json::json!({"user": {"uid": 4_000_000, "gid": 0}, "cwd": "/"});
        full.as_object_mut().unwrap().extend(json.as_object().unwrap().clone());
        serde_json::from_value(full).unwrap()
    }

    #[test]
    fn a_missing_program_is_reported_in_the_words_callers_match() {
        let find = |name: &str| {
            let process = process(serde_json::json!({"args": [name]}));
            crate::channel::chain(&find_program(&process, &["PATH=/bin:/usr/bin".to_owned()]).unwrap_err())
        };
        assert_eq!(find("no-such-program"), r#"exec: "no-such-program": executable file not found in $PATH"#);
        assert_eq!(find("/no/such"), r#"exec: "/no/such": stat /no/such: no such file or directory"#);
        assert_eq!(find("/etc/passwd"), r#"exec: "/etc/passwd": permission denied"#);
        assert_eq!(find("/etc"), r#"exec: "/etc": is a directory"#);
    }

    #[test]
    fn the_last_entry_of_a_name_counts_and_home_is_never_missing() {
        let process = process(serde_json::json!({"args": ["x"], "env": ["A=1", "B=2", "A=3"]}));
        assert_eq!(environment(&process), ["A=3", "B=2", "HOME=/"]);
    }

    #[test]
    fn empty_args_and_doubled_limits_are_refused() {
        assert!(matches!(validate(&process(serde_json::json!({"args": []}))), Err(Error::NoArgs)));
        let limit = serde_json::json!({"type": "RLIMIT_NOFILE", "soft": 1, "hard": 1});
        let doubled = process(serde_json::json!({"args": ["x"], "rlimits": [limit, limit]}));
        assert!(matches!(validate(&doubled), Err(Error::DuplicateLimit(_))));
    }
}
