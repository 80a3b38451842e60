//! Processes of the lab: started with a log file, ended by their id.

use crate::wait::Hopeless;
use anyhow::{Context, Result, bail};
use std::fs::OpenOptions;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A background process whose output goes to a file. Dropping it kills it.
#[derive(Debug)]
pub struct Background {
    name: String,
    log: PathBuf,
    child: Child,
}

impl Background {
    pub fn spawn(name: &str, log: &Path, mut command: Command) -> Result<Self> {
        let output = OpenOptions::new().create(true).append(true).open(log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("start {name}: {command:?}"))?;
        Ok(Self { name: name.to_owned(), log: log.to_owned(), child })
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Fails with the end of the log when the process has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let end = tail(&self.log, 30);
            return Err(
                Hopeless(format!("{} ended with {status}; its log ends with:\n{end}", self.name)).into()
            );
        }
        Ok(())
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id())?);
        nix::sys::signal::kill(pid, signal).with_context(|| format!("signal {}", self.name))
    }

    /// `SIGKILL`, as a crash would.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// `SIGTERM`, and `SIGKILL` when that is not heeded; says whether the process went by itself.
    pub fn stop(&mut self, patience: Duration) -> Result<bool> {
        if self.child.try_wait()?.is_some() {
            return Ok(true);
        }
        self.signal(nix::sys::signal::Signal::SIGTERM)?;
        let start = Instant::now();
        while start.elapsed() < patience {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.signal() != Some(9));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.kill()?;
        Ok(false)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // Already gone is as good as killed.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The last lines of a file, for error messages.
#[must_use]
pub fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Runs a command to its end and returns its standard output; failure carries both streams.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
