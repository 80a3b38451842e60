//! The machine and the programs that a run's figures belong to.

use crate::peers::{ours, peer};
use crate::process::run;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Kernel, processors and memory.
#[must_use]
pub fn describe() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    json!({
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "architecture": std::env::consts::ARCH,
        "cores": std::thread::available_parallelism().map(usize::from).ok(),
        "processor": field(&read("/proc/cpuinfo"), "model name"),
        "memory": field(&read("/proc/meminfo"), "MemTotal"),
    })
}

/// The load average over one minute: above about half a core, something else ran beside the benchmark.
#[must_use]
pub fn load() -> Option<f64> {
    std::fs::read_to_string("/proc/loadavg").ok()?.split_whitespace().next()?.parse().ok()
}

/// What the programs call themselves; null where one is missing or does not say.
#[must_use]
pub fn versions() -> Value {
    let first_line = |path: anyhow::Result<PathBuf>, arguments: &[&str]| -> Option<String> {
        let text = run(Command::new(path.ok()?).args(arguments)).ok()?;
        text.lines().next().map(|line| line.trim().to_owned())
    };
    json!({
        "orlop": first_line(ours("orlop"), &["--version"]),
        "orlop_built_in": ours("orlop").ok().and_then(|path| path.parent().map(Path::to_path_buf)),
        "containerd": first_line(peer("containerd"), &["--version"]),
        "runc": first_line(peer("runc"), &["--version"]),
        "crun": first_line(Ok("/usr/bin/crun".into()), &["--version"]),
        "cni_plugins": plugin_version(),
        "kubelet": first_line(peer("kubelet"), &["--version"]),
        "kubernetes": first_line(peer("kube-apiserver"), &["--version"]),
    })
}

/// A CNI plugin says its version only when it is started without a command, on its standard error.
fn plugin_version() -> Option<String> {
    let output = Command::new(peer("bridge").ok()?).env_remove("CNI_COMMAND").output().ok()?;
    let text =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    text.lines().find(|line| line.contains("lugin")).map(|line| line.trim().to_owned())
}
