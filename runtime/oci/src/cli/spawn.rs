//! The commands that start processes: create, run, exec.

use super::args::{Opt, Parsed};
use super::{Error, Global, foreground};
use crate::request::Stdio;
use crate::syscall::socket;
use crate::{CreateRequest, ExecRequest};
use oci_spec::runtime::{Process, Spec};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

const CREATE: &[Opt] = &[
    Opt(&["bundle", "b"], true),
    Opt(&["console-socket"], true),
    Opt(&["pidfd-socket"], true),
    Opt(&["pid-file"], true),
    Opt(&["no-pivot"], false),
    Opt(&["no-new-keyring"], false),
    Opt(&["preserve-fds"], true),
    Opt(&["detach", "d"], false),
    Opt(&["keep"], false),
    Opt(&["no-subreaper"], false),
    Opt(&["no-mount-fallback"], false),
];

const EXEC: &[Opt] = &[
    Opt(&["process", "p"], true),
    Opt(&["detach", "d"], false),
    Opt(&["pid-file"], true),
    Opt(&["console-socket"], true),
    Opt(&["pidfd-socket"], true),
    Opt(&["cwd"], true),
    Opt(&["env", "e"], true),
    Opt(&["tty", "t"], false),
    Opt(&["user", "u"], true),
    Opt(&["additional-gids", "g"], true),
    Opt(&["process-label"], true),
    Opt(&["apparmor"], true),
    Opt(&["no-new-privs"], false),
    Opt(&["cap", "c"], true),
    Opt(&["preserve-fds"], true),
    Opt(&["cgroup"], true),
    Opt(&["ignore-paused"], false),
    Opt(&["no-subreaper"], false),
];

fn load_spec(bundle: &Path) -> Result<Spec, Error> {
    let path = bundle.join("config.json");
    let text = fs::read(&path).map_err(|source| Error::File { what: "open", path: path.clone(), source })?;
    serde_json::from_slice(&text).map_err(|source| Error::Json { path, source })
}

/// Sends the terminal's master to whoever listens on the console socket.
fn send_console(path: &Path, master: OwnedFd) -> Result<(), Error> {
    let send = || -> io::Result<()> {
        let connection = std::os::unix::net::UnixStream::connect(path)?;
        socket::send(&connection, b"/dev/ptmx", &[master.as_fd()])
    };
    send().map_err(|source| Error::File {
        what: "send the terminal to the console socket",
        path: path.into(),
        source,
    })
}

fn write_pid_file(path: &str, pid: u32) -> Result<(), Error> {
    let path = PathBuf::from(path);
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let temporary = path.with_file_name(format!(".{name}"));
    let write = || {
        fs::write(&temporary, pid.to_string())?;
        fs::rename(&temporary, &path)
    };
    write().map_err(|source| Error::File { what: "write the pid file", path: path.clone(), source })
}

/// Checks that terminal and console socket fit together.
fn check_console(terminal: bool, socket: Option<&Path>, detached: bool) -> Result<(), Error> {
    match (terminal, socket, detached) {
        (true, None, true) => {
            Err(Error::Usage("cannot allocate tty if the runtime will detach without setting console socket"))
        }
        (false, Some(_), _) | (true, Some(_), false) => {
            Err(Error::Usage("cannot use console socket if the runtime will not detach or allocate tty"))
        }
        _ => Ok(()),
    }
}

/// How many descriptors from 3 on are kept: those of socket activation, then --preserve-fds.
fn preserved(parsed: &Parsed, process: &mut Process) -> Result<u32, Error> {
    let listen: u32 = std::env::var("LISTEN_FDS").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    if listen > 0 {
        let mut env = process.env().clone().unwrap_or_default();
        env.extend([format!("LISTEN_FDS={listen}"), "LISTEN_PID=1".to_owned()]);
        process.set_env(Some(env));
    }
    Ok(listen + parsed.number("preserve-fds")?.unwrap_or(0))
}

struct Prepared {
    parsed: Parsed,
    bundle: PathBuf,
    spec: Spec,
    terminal: bool,
    preserve_fds: u32,
}

fn prepare(args: &[String], always_detached: bool) -> Result<Prepared, Error> {
    let parsed = Parsed::parse(args, CREATE)?;
    if parsed.get("pidfd-socket").is_some() {
        return Err(Error::Unsupported("--pidfd-socket"));
    }
    let given = PathBuf::from(parsed.get("bundle").unwrap_or("."));
    let bundle = given.canonicalize().map_err(|source| Error::File {
        what: "open the bundle",
        path: given,
        source,
    })?;
    let mut spec = load_spec(&bundle)?;
    let mut process = spec.process().clone().ok_or(crate::Error::Spec("process is missing"))?;
    let terminal = process.terminal().unwrap_or(false);
    let detached = always_detached || parsed.is_set("detach");
    check_console(terminal, parsed.get("console-socket").map(Path::new), detached)?;
    let preserve_fds = preserved(&parsed, &mut process)?;
    spec.set_process(Some(process));
    Ok(Prepared { parsed, bundle, spec, terminal, preserve_fds })
}

/// Creates the container and writes its pid file; a console goes to the console socket if there is one.
fn make(global: &Global, prepared: &Prepared) -> Result<crate::Container, Error> {
    let Prepared { parsed, bundle, spec, terminal, preserve_fds } = prepared;
    let id = global.id(parsed.rest.first())?;
    let mut request = CreateRequest::new(&id, bundle, spec, &global.root);
    request.stdio = if *terminal { Stdio::Terminal } else { Stdio::Inherit };
    request.cgroup_root = &global.cgroup_root;
    request.no_pivot = parsed.is_set("no-pivot");
    request.no_new_keyring = parsed.is_set("no-new-keyring");
    request.preserve_fds = *preserve_fds;
    let mut container = crate::create(request)?.wait()?;
    let mut hand_over = || -> Result<(), Error> {
        if let Some(socket) = parsed.get("console-socket")
            && let Some(master) = container.take_console()
        {
            send_console(Path::new(socket), master)?;
        }
        if let Some(path) = parsed.get("pid-file") {
            write_pid_file(path, container.pid())?;
        }
        Ok(())
    };
    let handed = hand_over();
    handed.inspect_err(|_| {
        // Nothing may be left of a create that failed, however late.
        let _ = container.delete(true);
    })?;
    Ok(container)
}

pub(super) fn create(global: &Global, args: &[String]) -> Result<u8, Error> {
    make(global, &prepare(args, true)?)?;
    Ok(0)
}

pub(super) fn run(global: &Global, args: &[String]) -> Result<u8, Error> {
    let prepared = prepare(args, false)?;
    let detached = prepared.parsed.is_set("detach");
    let signals = if detached { None } else { Some(foreground::Signals::block()?) };
    let mut container = make(global, &prepared)?;
    if let Err(error) = container.start() {
        let _ = container.delete(true);
        return Err(error.into());
    }
    let Some(signals) = signals else { return Ok(0) };
    let console = container.take_console();
    let code = match container.pidfd() {
        Some(pidfd) => foreground::follow(pidfd, console, &signals)?,
        None => 255,
    };
    if !prepared.parsed.is_set("keep") {
        container.delete(true)?;
    }
    Ok(code)
}

/// The process of an exec: from a file, or the container's own changed by flags.
fn exec_process(parsed: &Parsed, container: &crate::Container) -> Result<Process, Error> {
    if let Some(path) = parsed.get("process") {
        let path = PathBuf::from(path);
        let text =
            fs::read(&path).map_err(|source| Error::File { what: "open", path: path.clone(), source })?;
        return serde_json::from_slice(&text).map_err(|source| Error::Json { path, source });
    }
    let mut process = container.process()?;
    let args = parsed.rest.get(1..).unwrap_or_default().to_vec();
    process.set_args(Some(args)).set_terminal(Some(parsed.is_set("tty")));
    if let Some(cwd) = parsed.get("cwd") {
        process.set_cwd(cwd.into());
    }
    let mut env = process.env().clone().unwrap_or_default();
    env.extend(parsed.all("env").iter().cloned());
    process.set_env(Some(env));
    if let Some(user) = parsed.get("user") {
        let (uid, gid) = user.split_once(':').unwrap_or((user, ""));
        let number = |text: &str| text.parse().map_err(|_| Error::Usage("--user takes numbers: uid[:gid]"));
        process.user_mut().set_uid(number(uid)?);
        if !gid.is_empty() {
            process.user_mut().set_gid(number(gid)?);
        }
    }
    if !parsed.all("additional-gids").is_empty() {
        let gids =
            parsed.all("additional-gids").iter().map(|gid| gid.parse()).collect::<Result<Vec<u32>, _>>();
        let gids = gids.map_err(|_| Error::Usage("--additional-gids takes numbers"))?;
        process.user_mut().set_additional_gids(Some(gids));
    }
    if parsed.is_set("no-new-privs") {
        process.set_no_new_privileges(Some(true));
    }
    add_capabilities(&mut process, parsed.all("cap"))?;
    Ok(process)
}

fn add_capabilities(process: &mut Process, names: &[String]) -> Result<(), Error> {
    if names.is_empty() {
        return Ok(());
    }
    let mut added = oci_spec::runtime::Capabilities::new();
    for name in names {
        let cap: oci_spec::runtime::Capability = serde_json::from_value(serde_json::json!(name))
            .map_err(|_| Error::Usage("--cap takes the name of a capability"))?;
        added.insert(cap);
    }
    let mut caps = process.capabilities().clone().unwrap_or_default();
    let join = |set: &Option<oci_spec::runtime::Capabilities>| {
        Some(set.iter().flatten().chain(&added).copied().collect())
    };
    caps.set_bounding(join(caps.bounding()));
    caps.set_effective(join(caps.effective()));
    caps.set_permitted(join(caps.permitted()));
    process.set_capabilities(Some(caps));
    Ok(())
}

pub(super) fn exec(global: &Global, args: &[String]) -> Result<u8, Error> {
    let parsed = Parsed::parse(args, EXEC)?;
    if parsed.get("pidfd-socket").is_some() {
        return Err(Error::Unsupported("--pidfd-socket"));
    }
    let container = global.container(parsed.rest.first())?;
    let mut process = exec_process(&parsed, &container)?;
    if parsed.is_set("tty") {
        process.set_terminal(Some(true));
    }
    let terminal = process.terminal().unwrap_or(false);
    let detached = parsed.is_set("detach");
    let console_socket = parsed.get("console-socket").map(Path::new);
    check_console(terminal, console_socket, detached)?;
    let preserve_fds = preserved(&parsed, &mut process)?;
    let mut request = ExecRequest::new(&process);
    request.stdio = if terminal { Stdio::Terminal } else { Stdio::Inherit };
    // `controllers:path` is a form for cgroup v1; v2 has one hierarchy.
    request.sub_cgroup =
        parsed.get("cgroup").map(|path| path.rsplit(':').next().unwrap_or(path)).map(Path::new);
    request.ignore_paused = parsed.is_set("ignore-paused");
    request.preserve_fds = preserve_fds;
    let signals = if detached { None } else { Some(foreground::Signals::block()?) };
    let mut running = container.exec(request)?.wait()?;
    if let Some(path) = parsed.get("pid-file") {
        write_pid_file(path, running.pid)?;
    }
    if let Some(socket) = console_socket
        && let Some(master) = running.console.take()
    {
        send_console(socket, master)?;
    }
    match signals {
        Some(signals) => foreground::follow(running.pidfd.as_fd(), running.console, &signals),
        None => Ok(0),
    }
}
