//! Named network namespaces and the commands that run in them.

use crate::process::run;
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;

/// A network namespace pinned under `/run/netns`. Dropping it removes it, and with it every interface inside.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    pub fn create(name: &str) -> Result<Self> {
        remove(name);
        run(Command::new("ip").args(["netns", "add", name]))
            .context("create a network namespace (are you root?)")?;
        let netns = Self { name: name.to_owned() };
        netns.ip(&["link", "set", "lo", "up"])?;
        Ok(netns)
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// A command that will run here. `nsenter` and not `ip netns exec`, which would remount `/sys` and hide the cgroups.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    pub fn ip(&self, arguments: &[&str]) -> Result<String> {
        run(Command::new("ip").args(["-n", &self.name]).args(arguments))
    }

    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        run(self.command("sh").args(["-c", "printf %s \"$1\" > \"$2\"", "sysctl", value, &path]))?;
        Ok(())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// Removes a namespace by name, whether or not it exists.
pub fn remove(name: &str) {
    drop(run(Command::new("ip").args(["netns", "delete", name])));
}
