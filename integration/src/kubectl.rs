//! The real kubectl, pointed at the lab's API server.

use crate::peers::peer;
use crate::process::run;
use crate::wait;
use anyhow::{Context, Result, bail};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

/// Runs kubectl in the control plane's namespace as the cluster's administrator.
#[derive(Debug, Clone)]
pub struct Kubectl {
    program: PathBuf,
    netns: PathBuf,
    kubeconfig: PathBuf,
}

impl Kubectl {
    pub fn new(netns: PathBuf, kubeconfig: PathBuf) -> Result<Self> {
        Ok(Self { program: peer("kubectl")?, netns, kubeconfig })
    }

    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.netns.display())).arg("--").arg(&self.program);
        command.arg(format!("--kubeconfig={}", self.kubeconfig.display())).args(arguments);
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        run(&mut self.command(arguments))
    }

    /// `kubectl apply` of a manifest, tried again while the API server still sets itself up.
    pub fn apply(&self, manifest: &str) -> Result<()> {
        wait::until("kubectl apply", Duration::from_secs(30), || self.feed(&["apply", "-f", "-"], manifest))
            .map(drop)
    }

    /// Runs kubectl with something on its standard input.
    pub fn feed(&self, arguments: &[&str], input: &str) -> Result<String> {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("start kubectl")?;
        child.stdin.take().context("kubectl has an input")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    pub fn json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let mut all = arguments.to_vec();
        all.extend(["-o", "json"]);
        Ok(serde_json::from_str(&self.run(&all)?)?)
    }

    /// One field of an object, as `-o jsonpath` prints it.
    pub fn field(&self, object: &[&str], path: &str) -> Result<String> {
        let output = format!("jsonpath={path}");
        let mut all = vec!["get"];
        all.extend(object);
        all.extend(["-o", &output]);
        self.run(&all)
    }

    /// Waits until a field has a value.
    pub fn wait_field(&self, object: &[&str], path: &str, want: &str, limit: Duration) -> Result<()> {
        wait::until(&format!("{} {path} = {want}", object.join(" ")), limit, || {
            match self.field(object, path)? {
                value if value == want => Ok(()),
                value => bail!("is {value:?}"),
            }
        })
    }
}
