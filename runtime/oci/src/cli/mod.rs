//! The command line of runc on top of the library.

mod args;
mod commands;
mod foreground;
mod info;
mod log;
mod spawn;
mod update;

use crate::id::ContainerId;
use crate::{Container, Error as RuntimeError};
use args::{Opt, Parsed};
use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Args(#[from] args::Error),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Id(#[from] crate::id::InvalidId),
    #[error("{0}")]
    Usage(&'static str),
    #[error("{0:?} is not a command; see --help")]
    Command(String),
    #[error("{0} is not supported yet")]
    Unsupported(&'static str),
    #[error("unknown signal {0:?}")]
    Signal(String),
    #[error("{what} {}", .path.display())]
    File { what: &'static str, path: PathBuf, source: io::Error },
    #[error("parse {}", .path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{0}")]
    Io(&'static str, #[source] io::Error),
    #[error(transparent)]
    Cgroup(#[from] crate::cgroup::Error),
}

/// The options before the command.
#[derive(Debug)]
struct Global {
    root: PathBuf,
    cgroup_root: PathBuf,
    systemd_cgroup: bool,
}

impl Global {
    fn container(&self, id: Option<&String>) -> Result<Container, Error> {
        Ok(Container::load(&self.root, &self.id(id)?)?)
    }

    fn id(&self, id: Option<&String>) -> Result<ContainerId, Error> {
        Ok(ContainerId::new(id.ok_or(Error::Usage("a container ID is required"))?)?)
    }
}

const GLOBAL: &[Opt] = &[
    Opt(&["root"], true),
    Opt(&["log"], true),
    Opt(&["log-format"], true),
    Opt(&["debug"], false),
    Opt(&["systemd-cgroup"], false),
    Opt(&["rootless"], true),
    Opt(&["cgroup-root"], true),
    Opt(&["version", "v"], false),
    Opt(&["help", "h"], false),
];

const HELP: &str = "\
orlop-oci: OCI runtime with the command line of runc

usage: orlop-oci [--root DIR] [--log FILE] [--log-format text|json] [--debug] [--cgroup-root DIR]
                 COMMAND [options] [arguments]

commands:
  create   [-b DIR] [--console-socket S] [--pid-file F] [--no-pivot] [--no-new-keyring] [--preserve-fds N] ID
  start    ID                          run the program of a created container
  run      [create's options] [-d] [--keep] ID
  exec     [-p FILE | flags] [-d] [-t] [--pid-file F] [--console-socket S] ID [COMMAND [ARG...]]
  kill     ID [SIGNAL]                 default TERM
  delete   [-f] ID                     remove a stopped container
  state    ID                          print the OCI state document
  list     [-f table|json] [-q]        containers below --root
  ps       [-f table|json] ID [ps options]
  pause, resume  ID
  update   [-r FILE|-] [limits] ID
  events   [--stats] [--interval T] ID
  features                             what this runtime supports, as JSON
  spec     [-b DIR]                    write a config.json to start from

ORLOP_MISSING_CONTROLLERS=warn runs where the cgroup v2 tree lacks controllers.
";

/// Runs the program; the result is its exit code.
pub fn run(args: &[String]) -> u8 {
    let parsed = match Parsed::parse(args, GLOBAL) {
        Ok(parsed) => parsed,
        Err(error) => {
            eprintln!("{error}");
            return 1;
        }
    };
    if parsed.is_set("version") {
        info::version();
        return 0;
    }
    if parsed.is_set("help") || parsed.rest.is_empty() {
        print!("{HELP}");
        return 0;
    }
    let to_file = match set_up_log(&parsed) {
        Ok(to_file) => to_file,
        Err(error) => {
            eprintln!("{}", crate::channel::chain(&error));
            return 1;
        }
    };
    let global = Global {
        root: root(parsed.get("root")),
        cgroup_root: parsed.get("cgroup-root").unwrap_or(crate::cgroup::DEFAULT_ROOT).into(),
        systemd_cgroup: parsed.is_set("systemd-cgroup"),
    };
    let (command, rest) = parsed.rest.split_first().map_or(("", &[][..]), |(c, r)| (c.as_str(), r));
    match commands::dispatch(&global, command, rest) {
        Ok(code) => code,
        Err(error) => {
            let text = crate::channel::chain(&error);
            tracing::error!("{text}");
            if to_file {
                eprintln!("{text}");
            }
            if command == "exec" { 255 } else { 1 }
        }
    }
}

fn root(given: Option<&str>) -> PathBuf {
    match given {
        Some(root) => PathBuf::from(root),
        None if rustix::process::geteuid().is_root() => PathBuf::from("/run/orlop-oci"),
        None => std::env::var_os("XDG_RUNTIME_DIR")
            .map_or_else(|| PathBuf::from("/run/orlop-oci"), |dir| Path::new(&dir).join("orlop-oci")),
    }
}

/// Whether the log goes to a file.
fn set_up_log(parsed: &Parsed) -> Result<bool, Error> {
    let json = match parsed.get("log-format") {
        None | Some("text" | "") => false,
        Some("json") => true,
        Some(_) => return Err(Error::Usage("--log-format must be text or json")),
    };
    let path = parsed.get("log").filter(|path| !path.is_empty());
    let file = path
        .map(|path| {
            OpenOptions::new().create(true).append(true).open(path).map_err(|source| Error::File {
                what: "open the log",
                path: path.into(),
                source,
            })
        })
        .transpose()?;
    let log = log::Log::new(file, json, parsed.is_set("debug"));
    // Only one subscriber is ever set in this process.
    let _ = tracing::subscriber::set_global_default(log);
    Ok(path.is_some())
}
