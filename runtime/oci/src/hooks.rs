//! Hooks: programs run at points of a container's life with its state on standard input.
//!
//! Standard streams are files in memory, so that neither a hook that does not read nor one that writes much can block
//! the runtime.

use oci_spec::runtime::Hook;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("hook {} must have an absolute path", .0.display())]
    Relative(PathBuf),
    #[error("hook {} must have a timeout greater than zero", .0.display())]
    Timeout(PathBuf),
    #[error("error running {point} hook {}", .path.display())]
    Run { point: &'static str, path: PathBuf, source: io::Error },
    #[error("error running {point} hook {}: {status}{output}", .path.display())]
    Failed { point: &'static str, path: PathBuf, status: String, output: String },
    #[error("error running {point} hook {}: timed out after {seconds} s", .path.display())]
    TimedOut { point: &'static str, path: PathBuf, seconds: i64 },
}

pub(crate) fn validate(hooks: &[Hook]) -> Result<(), Error> {
    for hook in hooks {
        if !hook.path().is_absolute() {
            return Err(Error::Relative(hook.path().clone()));
        }
        if hook.timeout().is_some_and(|seconds| seconds <= 0) {
            return Err(Error::Timeout(hook.path().clone()));
        }
    }
    Ok(())
}

/// A hook that runs. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct Running {
    point: &'static str,
    path: PathBuf,
    seconds: Option<i64>,
    started: Instant,
    child: Child,
    pidfd: OwnedFd,
    output: File,
}

fn memory_file(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("hook", MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
}

impl Running {
    /// `default_env` is what a hook without an environment gets; the runtime's own is never inherited.
    pub(crate) fn start(
        point: &'static str,
        hook: &Hook,
        state: &[u8],
        default_env: &[String],
    ) -> Result<Self, Error> {
        let path = hook.path().clone();
        let fail = |source| Error::Run { point, path: path.clone(), source };
        let mut command = Command::new(&path);
        if let Some((name, rest)) = hook.args().as_deref().and_then(<[String]>::split_first) {
            command.arg0(name).args(rest);
        }
        command.env_clear();
        for entry in hook.env().as_deref().unwrap_or(default_env) {
            let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
            command.env(key, value);
        }
        let output = memory_file(b"").map_err(fail)?;
        command.stdin(memory_file(state).map_err(fail)?);
        command.stdout(output.try_clone().map_err(fail)?);
        command.stderr(output.try_clone().map_err(fail)?);
        let mut child = command.spawn().map_err(fail)?;
        let pid = Pid::from_child(&child);
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(errno) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(fail(errno.into()));
            }
        };
        Ok(Self { point, path, seconds: hook.timeout(), started: Instant::now(), child, pidfd, output })
    }

    /// What is left of the time limit.
    pub(crate) fn remaining(&self) -> Option<Duration> {
        let limit = Duration::from_secs(self.seconds?.unsigned_abs());
        Some(limit.saturating_sub(self.started.elapsed()))
    }

    /// `Ok(true)` once it has succeeded, `Ok(false)` while it runs.
    pub(crate) fn check(&mut self) -> Result<bool, Error> {
        let fail = |path: &PathBuf, point, source| Error::Run { point, path: path.clone(), source };
        let status = self.child.try_wait().map_err(|source| fail(&self.path, self.point, source))?;
        let Some(status) = status else {
            return match (self.remaining(), self.seconds) {
                (Some(Duration::ZERO), Some(seconds)) => {
                    Err(Error::TimedOut { point: self.point, path: self.path.clone(), seconds })
                }
                _ => Ok(false),
            };
        };
        if status.success() {
            return Ok(true);
        }
        let mut text = Vec::new();
        let _ = self.output.rewind().and_then(|()| (&mut self.output).take(4096).read_to_end(&mut text));
        let text = String::from_utf8_lossy(&text).trim().to_owned();
        Err(Error::Failed {
            point: self.point,
            path: self.path.clone(),
            status: status.to_string(),
            output: if text.is_empty() { text } else { format!(", output: {text}") },
        })
    }

    fn wait(mut self) -> Result<(), Error> {
        while !self.check()? {
            let mut poll = [PollFd::new(&self.pidfd, PollFlags::IN)];
            let timeout = self.remaining().map(|left| Timespec {
                tv_sec: left.as_secs().cast_signed(),
                tv_nsec: left.subsec_nanos().into(),
            });
            match rustix::event::poll(&mut poll, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => {
                    return Err(Error::Run {
                        point: self.point,
                        path: self.path.clone(),
                        source: errno.into(),
                    });
                }
            }
        }
        Ok(())
    }
}

impl AsFd for Running {
    /// Readable when the hook has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both do nothing if it was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs hooks one after the other, blocking.
pub(crate) fn run(
    point: &'static str,
    hooks: &[Hook],
    state: &[u8],
    default_env: &[String],
) -> Result<(), Error> {
    hooks.iter().try_for_each(|hook| Running::start(point, hook, state, default_env)?.wait())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(script: &str, timeout: Option<i64>) -> Hook {
        let args = ["sh", "-c", script];
        serde_json::from_value(serde_json::json!({"path": "/bin/sh", "args": args, "timeout": timeout}))
            .unwrap()
    }

    #[test]
    fn a_hook_gets_the_state_and_its_failure_tells_what_it_said() {
        run("prestart", &[hook("grep -q '\"id\":\"x\"'", None)], br#"{"id":"x"}"#, &[]).unwrap();
        let error = run("prestart", &[hook("echo broken >&2; exit 3", None)], b"{}", &[]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("exit status: 3") && text.contains("broken"), "{text}");
    }

    #[test]
    fn a_hook_past_its_timeout_is_killed() {
        let started = Instant::now();
        let error = run("prestart", &[hook("exec sleep 60", Some(1))], b"{}", &[]).unwrap_err();
        assert!(matches!(error, Error::TimedOut { seconds: 1, .. }), "{error}");
        assert!(started.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn the_runtimes_environment_is_not_inherited() {
        run("prestart", &[hook("test -z \"$HOME$CARGO\"", None)], b"{}", &[]).unwrap();
        run("startContainer", &[hook("test \"$A\" = b", None)], b"{}", &["A=b".to_owned()]).unwrap();
    }
}
