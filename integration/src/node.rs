//! One node of the lab: an orlop agent with its keeper in network, mount and cgroup namespaces of their own.

use crate::netns::Netns;
use crate::peers::ours;
use crate::process::{Background, run};
use crate::wait;
use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Prepares a node's view of the machine and then waits to be killed: everything that runs on the node enters the
/// namespaces of this process. `$1` is the cgroup, `$2` the node's folder.
const HOLDER: &str = r#"
set -eu
mount --make-rprivate /
while mountpoint -q /sys/fs/cgroup; do umount -R -l /sys/fs/cgroup; done
mount -t cgroup2 none /sys/fs/cgroup
mount --bind "$2/run" /run
mount --bind "$2/var-lib" /var/lib
mount --bind "$2/var-log" /var/log
mount --make-rshared /
exec sleep infinity
"#;

/// A machine of the lab.
#[derive(Debug)]
pub struct Node {
    name: String,
    address: String,
    folder: PathBuf,
    cgroup: PathBuf,
    netns: Netns,
    holder: Option<Background>,
    keeper: Option<Background>,
    agent: Option<Background>,
}

impl Node {
    /// Makes the namespaces; nothing of orlop runs yet.
    pub fn create(name: &str, address: &str, netns: Netns, folder: &Path, cgroup: &Path) -> Result<Self> {
        for part in ["run", "var-lib", "var-log", "etc"] {
            std::fs::create_dir_all(folder.join(part))?;
        }
        std::fs::create_dir_all(cgroup).with_context(|| format!("make cgroup {}", cgroup.display()))?;
        let mut command = netns.command("sh");
        command.args([
            "-c",
            "echo $$ > \"$1/cgroup.procs\"; exec unshare --mount --cgroup sh -c \"$3\" holder \"$1\" \"$2\"",
            "enter",
        ]);
        command.arg(cgroup).arg(folder).arg(HOLDER);
        let mut holder = Background::spawn("holder", &folder.join("holder.log"), command)?;
        wait::until("the node's namespaces", Duration::from_secs(10), || {
            holder.check_alive()?;
            let name = std::fs::read_to_string(format!("/proc/{}/comm", holder.pid()))?;
            if name.trim() == "sleep" { Ok(()) } else { bail!("holder is still {}", name.trim()) }
        })?;
        Ok(Self {
            name: name.to_owned(),
            address: address.to_owned(),
            folder: folder.to_owned(),
            cgroup: cgroup.to_owned(),
            netns,
            holder: Some(holder),
            keeper: None,
            agent: None,
        })
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where the node's `/run`, `/var/lib`, `/var/log` and `etc` lie on the machine.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    #[must_use]
    pub fn config_path(&self) -> PathBuf {
        self.folder.join("etc/config.yaml")
    }

    /// The node's cgroup, as the machine sees it.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// The process whose namespaces are the node.
    pub fn holder_pid(&self) -> Result<u32> {
        Ok(self.holder.as_ref().context("the node has been purged")?.pid())
    }

    /// A command that will run on the node.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.holder_pid()?.to_string(), "--mount", "--net", "--cgroup", "--"])
            .arg(program);
        Ok(command)
    }

    /// `orlop` with these arguments, run on the node to its end.
    pub fn orlop(&self, arguments: &[&str]) -> Result<String> {
        run(self.command(ours("orlop")?)?.args(arguments))
    }

    /// Starts keeper and agent as systemd would: each in a cgroup of its own below the node's.
    pub fn start(&mut self) -> Result<()> {
        self.start_keeper()?;
        self.start_agent()
    }

    pub fn start_keeper(&mut self) -> Result<()> {
        let mut keeper = self.service(&ours("orlop-keeper")?, "keeper", &[])?;
        let socket = self.folder.join("run/orlop/keeper.sock");
        wait::until("the keeper's socket", Duration::from_secs(10), || {
            keeper.check_alive()?;
            if socket.exists() { Ok(()) } else { bail!("{} is not there", socket.display()) }
        })?;
        self.keeper = Some(keeper);
        Ok(())
    }

    pub fn start_agent(&mut self) -> Result<()> {
        let config = self.config_path().display().to_string();
        self.agent = Some(self.service(&ours("orlop")?, "agent", &["node", "--config", &config])?);
        Ok(())
    }

    /// Starts a program on the node in a cgroup of its own; its log is named after the cgroup.
    pub fn service(&self, program: &Path, cgroup: &str, arguments: &[&str]) -> Result<Background> {
        let mut command = self.command("sh")?;
        command.env("ORLOP_MISSING_CONTROLLERS", "warn");
        command.args([
            "-c",
            "mkdir -p /sys/fs/cgroup/$0 && echo $$ > /sys/fs/cgroup/$0/cgroup.procs && exec \"$@\"",
            cgroup,
        ]);
        command.arg(program).args(arguments);
        Background::spawn(cgroup, &self.folder.join(format!("{cgroup}.log")), command)
    }

    pub fn agent(&mut self) -> Result<&mut Background> {
        self.agent.as_mut().context("the agent is not running")
    }

    pub fn keeper(&mut self) -> Result<&mut Background> {
        self.keeper.as_mut().context("the keeper is not running")
    }

    /// `kill -9` of the agent: the nearest thing to a crash.
    pub fn crash_agent(&mut self) -> Result<()> {
        self.agent.take().context("the agent is not running")?.kill()
    }

    pub fn stop_agent(&mut self) -> Result<bool> {
        self.agent.take().context("the agent is not running")?.stop(Duration::from_secs(10))
    }

    /// What runs and what lies around below the node's cgroup: relative paths, deepest last.
    pub fn cgroups(&self) -> Vec<String> {
        let mut found = Vec::new();
        list_cgroups(&self.cgroup, &self.cgroup, &mut found);
        found
    }

    /// Tells every process of the node to die, containers included.
    fn kill_everything(&mut self) {
        // The file is absent when the cgroup is; then nothing runs.
        drop(std::fs::write(self.cgroup.join("cgroup.kill"), "1"));
        for process in [self.agent.take(), self.keeper.take(), self.holder.take()].into_iter().flatten() {
            drop(process.signal(Signal::SIGKILL));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill_everything();
        remove_cgroup(&self.cgroup);
    }
}

fn list_cgroups(root: &Path, at: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(at).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            if let Ok(relative) = entry.path().strip_prefix(root) {
                found.push(relative.display().to_string());
            }
            list_cgroups(root, &entry.path(), found);
        }
    }
}

/// Removes a cgroup and all below it, waiting for dying processes to go.
pub fn remove_cgroup(path: &Path) {
    let mut all = Vec::new();
    list_cgroups(path, path, &mut all);
    for below in all.iter().rev() {
        drop(wait::until("remove cgroup", Duration::from_secs(5), || {
            Ok(std::fs::remove_dir(path.join(below))?)
        }));
    }
    if path.exists() {
        drop(wait::until("remove cgroup", Duration::from_secs(5), || Ok(std::fs::remove_dir(path)?)));
    }
}
