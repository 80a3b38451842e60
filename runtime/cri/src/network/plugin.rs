//! Executes one CNI plugin: the environment and a configuration in, a result or an error object out.

use serde::Deserialize;
use serde_json::{Map, Value};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

/// As much of a plugin's complaint as a message may carry.
const MAX_TEXT: usize = 2048;

#[derive(Debug, thiserror::Error)]
pub(super) enum PluginError {
    #[error("plugin type {0:?} is not a plain file name")]
    BadType(String),
    #[error("plugin {kind:?} is not in {path}")]
    Missing { kind: String, path: String },
    #[error("cannot execute plugin {program}: {source}")]
    Execute { program: PathBuf, source: io::Error },
    #[error("plugin {kind} did not finish {command} within {seconds} s and was killed")]
    Timeout { kind: String, command: &'static str, seconds: u64 },
    #[error("plugin {kind} failed {command}: {message}")]
    Failed { kind: String, command: &'static str, message: String },
    #[error("plugin {kind} answered {command} with something that is no result: {source}")]
    BadResult { kind: String, command: &'static str, source: serde_json::Error },
    #[error("plugin {kind} gave the address {address:?}, which is none")]
    BadAddress { kind: &'static str, address: String },
}

/// What every plugin of one attachment is told.
#[derive(Debug, Clone)]
pub(super) struct Invocation {
    pub(super) container_id: String,
    /// Empty when the namespace is gone, which a plugin must accept for DEL.
    pub(super) netns: String,
    pub(super) ifname: String,
    pub(super) args: String,
    pub(super) bin_dirs: Vec<PathBuf>,
    pub(super) timeout: Duration,
}

#[derive(Deserialize)]
struct ErrorObject {
    #[serde(default)]
    code: u64,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

impl Invocation {
    fn find(&self, kind: &str) -> Result<PathBuf, PluginError> {
        if kind.is_empty() || kind.contains('/') || kind == ".." || kind == "." {
            return Err(PluginError::BadType(kind.to_owned()));
        }
        let candidates = self.bin_dirs.iter().map(|dir| dir.join(kind));
        candidates
            .into_iter()
            .find(|path| path.is_file())
            .ok_or_else(|| PluginError::Missing { kind: kind.to_owned(), path: self.path() })
    }

    fn path(&self) -> String {
        let dirs: Vec<_> = self.bin_dirs.iter().map(|d| d.to_string_lossy()).collect();
        dirs.join(":")
    }

    /// Runs `command` of the plugin that `config` names. Dropping the future kills the plugin.
    pub(super) async fn run(
        &self,
        command: &'static str,
        config: &Map<String, Value>,
    ) -> Result<Option<Value>, PluginError> {
        let kind = config.get("type").and_then(Value::as_str).unwrap_or_default();
        let program = self.find(kind)?;
        let output = self.execute(command, &program, config);
        let output = match tokio::time::timeout(self.timeout, output).await {
            Ok(output) => output.map_err(|source| PluginError::Execute { program, source })?,
            Err(_) => {
                return Err(PluginError::Timeout {
                    kind: kind.to_owned(),
                    command,
                    seconds: self.timeout.as_secs(),
                });
            }
        };
        if !output.status.success() {
            let message = complaint(&output);
            return Err(PluginError::Failed { kind: kind.to_owned(), command, message });
        }
        if output.stdout.iter().all(u8::is_ascii_whitespace) {
            return Ok(None);
        }
        serde_json::from_slice(&output.stdout).map(Some).map_err(|source| PluginError::BadResult {
            kind: kind.to_owned(),
            command,
            source,
        })
    }

    async fn execute(
        &self,
        command: &'static str,
        program: &Path,
        config: &Map<String, Value>,
    ) -> io::Result<std::process::Output> {
        let mut child = Command::new(program)
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.container_id)
            .env("CNI_NETNS", &self.netns)
            .env("CNI_IFNAME", &self.ifname)
            .env("CNI_ARGS", &self.args)
            .env("CNI_PATH", self.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let input = serde_json::to_vec(config)?;
        let stdin = child.stdin.take();
        let feed = async move {
            if let Some(mut stdin) = stdin {
                // A plugin that does not read its input has its own reasons, and its own exit status.
                let _ = stdin.write_all(&input).await;
            }
        };
        let ((), output) = tokio::join!(feed, child.wait_with_output());
        output
    }
}

/// The error object on standard output if there is one, or else whatever the plugin said.
fn complaint(output: &std::process::Output) -> String {
    let text = match serde_json::from_slice::<ErrorObject>(&output.stdout) {
        Ok(error) if !error.msg.is_empty() && error.details.is_empty() => {
            format!("{} (code {})", error.msg, error.code)
        }
        Ok(error) if !error.msg.is_empty() => {
            format!("{}: {} (code {})", error.msg, error.details, error.code)
        }
        _ => {
            let said = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
            format!("{}: {}", output.status, String::from_utf8_lossy(said).trim())
        }
    };
    text.chars().take(MAX_TEXT).collect()
}

/// The pod's addresses in a result, those of IPv4 first. Addresses on interfaces outside the sandbox are not the pod's.
pub(super) fn addresses(result: &Value) -> Result<Vec<IpAddr>, PluginError> {
    let empty = Vec::new();
    let list = |key: &str| result.get(key).and_then(Value::as_array).unwrap_or(&empty);
    let interfaces = list("interfaces");
    let in_sandbox = |ip: &&Value| {
        let index = ip.get("interface").and_then(Value::as_u64).and_then(|i| usize::try_from(i).ok());
        index.and_then(|i| interfaces.get(i)).is_none_or(|interface| {
            interface.get("sandbox").and_then(Value::as_str).is_some_and(|sandbox| !sandbox.is_empty())
        })
    };
    let mut texts: Vec<String> = list("ips")
        .iter()
        .filter(in_sandbox)
        .filter_map(|ip| ip.get("address").and_then(Value::as_str).map(str::to_owned))
        .collect();
    // The form of results before version 0.3.0.
    for key in ["/ip4/ip", "/ip6/ip"] {
        texts.extend(result.pointer(key).and_then(Value::as_str).map(str::to_owned));
    }
    let mut addresses = Vec::new();
    for text in texts {
        let address = text.split('/').next().unwrap_or_default().parse::<IpAddr>();
        addresses
            .push(address.map_err(|_| PluginError::BadAddress { kind: "chain", address: text.clone() })?);
    }
    addresses.sort_by_key(IpAddr::is_ipv6);
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pods_addresses_are_those_inside_the_sandbox() {
        let result = serde_json::json!({
            "cniVersion": "1.1.0",
            "interfaces": [{"name": "br0"}, {"name": "eth0", "sandbox": "/run/ns"}],
            "ips": [
                {"address": "fd00::4/64", "interface": 1},
                {"address": "10.1.0.4/24", "interface": 1},
                {"address": "10.1.0.1/24", "interface": 0}
            ]
        });
        let found: Vec<_> = addresses(&result).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.1.0.4", "fd00::4"]);
        let old = serde_json::json!({"ip4": {"ip": "10.2.0.1/16"}});
        assert_eq!(addresses(&old).unwrap()[0].to_string(), "10.2.0.1");
        assert!(addresses(&serde_json::json!({"ips": [{"address": "x"}]})).is_err());
    }
}
