//! The command line.

use super::Config;
use super::diagnostics::LogFormat;
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

pub(super) const HELP: &str = "\
orlop-keeper: the parent of every container of a node

Spawns containers, holds their standard streams, writes their logs, and keeps their exit codes until the agent has
acknowledged them. It serves one socket, for root.

Usage: orlop-keeper [flags]
       orlop-keeper --purge [flags]

  --socket PATH        where to listen (/run/orlop/keeper.sock)
  --state DIR          records of containers (/run/orlop/keeper)
  --cgroup-root DIR    root of the cgroup v2 tree (/sys/fs/cgroup)
  --log-format FORMAT  of what it says on standard error: text or json (text)
  --purge              kill and delete every container of the state directory and remove what was made; the keeper must
                       have been stopped
  --help, --version

Signals
  SIGHUP   replace the program by what lies at its path now, keeping containers, logs, clients and descriptors.
           This is how it is upgraded.
  SIGTERM  end. Containers go on, in the care of init; unless the service manager keeps the descriptors
           (FileDescriptorStoreMax=), their output has no reader until a keeper starts again, and an exit meanwhile may
           be reported as 255. To end the containers too, stop the keeper and run it with --purge.
";

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum FlagError {
    #[error("unknown argument {0:?}; see --help")]
    Unknown(OsString),
    #[error("{0} needs a value")]
    NoValue(&'static str),
    #[error("{flag} cannot be {value:?}")]
    BadValue { flag: &'static str, value: OsString },
}

#[derive(Debug)]
pub(super) enum Invocation {
    Help,
    Version,
    Run(Run),
}

#[derive(Debug)]
pub(super) struct Run {
    pub(super) config: Config,
    pub(super) log_format: LogFormat,
    pub(super) purge: bool,
    /// The descriptor that holds the state of the program this one replaces.
    pub(super) restore: Option<RawFd>,
}

/// Not for people: how a re-exec names the descriptor with its state.
pub(super) const RESTORE: &str = "--restore-fd";

pub(super) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Invocation, FlagError> {
    let mut run = Run {
        config: Config {
            socket: PathBuf::from("/run/orlop/keeper.sock"),
            state: PathBuf::from("/run/orlop/keeper"),
            cgroup_root: PathBuf::from("/sys/fs/cgroup"),
        },
        log_format: LogFormat::Text,
        purge: false,
        restore: None,
    };
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        let (name, inline) = split(&argument);
        let mut value = |flag: &'static str| {
            inline
                .clone()
                .or_else(|| arguments.next())
                .filter(|v| !v.is_empty())
                .ok_or(FlagError::NoValue(flag))
        };
        match name.as_str() {
            "--help" | "-h" if inline.is_none() => return Ok(Invocation::Help),
            "--version" | "-v" if inline.is_none() => return Ok(Invocation::Version),
            "--purge" if inline.is_none() => run.purge = true,
            "--socket" => run.config.socket = value("--socket")?.into(),
            "--state" => run.config.state = value("--state")?.into(),
            "--cgroup-root" => run.config.cgroup_root = value("--cgroup-root")?.into(),
            "--log-format" => {
                let value = value("--log-format")?;
                run.log_format = match value.to_str() {
                    // The journal takes standard error as it is.
                    Some("text" | "journald") => LogFormat::Text,
                    Some("json") => LogFormat::Json,
                    _ => return Err(FlagError::BadValue { flag: "--log-format", value }),
                };
            }
            RESTORE => {
                let value = value(RESTORE)?;
                let fd = value.to_str().and_then(|v| v.parse().ok());
                run.restore = Some(fd.ok_or(FlagError::BadValue { flag: RESTORE, value })?);
            }
            _ => return Err(FlagError::Unknown(argument)),
        }
    }
    Ok(Invocation::Run(run))
}

fn split(argument: &OsString) -> (String, Option<OsString>) {
    match argument.to_str().and_then(|text| text.split_once('=')) {
        Some((name, value)) => (name.to_owned(), Some(value.into())),
        None => (argument.to_string_lossy().into_owned(), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(arguments: &[&str]) -> Result<Invocation, FlagError> {
        parse(arguments.iter().map(OsString::from))
    }

    #[test]
    fn values_come_after_a_blank_or_an_equals_sign() {
        let Ok(Invocation::Run(run)) = parsed(&["--socket", "/a", "--state=/b", "--log-format=json"]) else {
            panic!("refused");
        };
        assert_eq!(run.config.socket, PathBuf::from("/a"));
        assert_eq!(run.config.state, PathBuf::from("/b"));
        assert_eq!(run.log_format, LogFormat::Json);
        assert_eq!(run.config.cgroup_root, PathBuf::from("/sys/fs/cgroup"));
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(parsed(&["--sockt", "/a"]).unwrap_err(), FlagError::Unknown("--sockt".into()));
        assert_eq!(parsed(&["--socket"]).unwrap_err(), FlagError::NoValue("--socket"));
        assert!(matches!(parsed(&["--log-format", "xml"]), Err(FlagError::BadValue { .. })));
        assert!(matches!(parsed(&["--purge=yes"]), Err(FlagError::Unknown(_))));
    }
}
