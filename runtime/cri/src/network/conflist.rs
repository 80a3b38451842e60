//! A pod network made of CNI plugins, executed as libcni does (CNI specification 1.1).
//!
//! ```text
//! <conf_dir>/*.conflist   the first by name that can be read is the network; looked at anew for each sandbox
//! <cache_dir>/<id>.json   what was attached: the configuration used and the result, so that a sandbox is detached by
//!                         the plugins that attached it, also after a restart or a change of configuration
//! ```

use super::plugin::{Invocation, PluginError, addresses};
use super::{NetworkError, NetworkRequest, Protocol, SandboxNetwork};
use crate::record::{RecordDir, RecordError};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tonic::async_trait;

const INTERFACE: &str = "eth0";
/// Less than the kubelet waits for a sandbox.
const PLUGIN_TIMEOUT: Duration = Duration::from_secs(120);

#[derive(Debug, thiserror::Error)]
enum ConflistError {
    #[error("no network configuration in {0}: install a CNI plugin, or wait until its pods have written one")]
    NoConfiguration(PathBuf),
    #[error("cannot read network configuration {path}: {reason}")]
    Unreadable { path: PathBuf, reason: String },
    #[error("network configuration {path} is not usable: {reason}")]
    Invalid { path: PathBuf, reason: &'static str },
    #[error("network {network:?}: {source}")]
    Plugin { network: String, source: PluginError },
    #[error(transparent)]
    Cache(#[from] RecordError),
}

impl From<ConflistError> for NetworkError {
    fn from(error: ConflistError) -> Self {
        Self(error.to_string())
    }
}

/// A network configuration list.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct List {
    #[serde(rename = "cniVersion", default)]
    version: String,
    #[serde(default)]
    name: String,
    plugins: Vec<Map<String, Value>>,
}

impl List {
    /// Whether plugins understand what came with a version.
    fn at_least(&self, major: u32, minor: u32) -> bool {
        let mut parts = self.version.split('.').map(|part| part.parse().unwrap_or(0));
        (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) >= (major, minor)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Attachment {
    version: u32,
    sandbox_id: String,
    list: List,
    netns: PathBuf,
    args: String,
    /// Values for the capabilities that plugins may declare.
    capabilities: Map<String, Value>,
    result: Option<Value>,
}

/// The network that a directory of configurations describes.
#[derive(Debug)]
pub struct Conflist {
    conf_dir: PathBuf,
    bin_dirs: Vec<PathBuf>,
    cache: RecordDir,
}

impl Conflist {
    /// `cache_dir` must survive a restart and a reboot.
    pub fn open(conf_dir: PathBuf, bin_dirs: Vec<PathBuf>, cache_dir: PathBuf) -> Result<Self, NetworkError> {
        let cache = RecordDir::open(cache_dir).map_err(ConflistError::from)?;
        Ok(Self { conf_dir, bin_dirs, cache })
    }

    fn load(&self) -> Result<List, ConflistError> {
        let mut paths: Vec<PathBuf> = fs::read_dir(&self.conf_dir)
            .map(|entries| entries.filter_map(Result::ok).map(|e| e.path()).collect())
            .unwrap_or_default();
        let extensions = ["conflist", "conf", "json"];
        paths.retain(|p| p.extension().is_some_and(|e| extensions.iter().any(|known| e == *known)));
        paths.sort();
        let mut first_problem = None;
        for path in paths {
            match read_list(&path) {
                Ok(list) => return Ok(list),
                Err(error) => {
                    first_problem.get_or_insert(error);
                }
            }
        }
        Err(first_problem.unwrap_or_else(|| ConflistError::NoConfiguration(self.conf_dir.clone())))
    }

    fn invocation(&self, attachment: &Attachment) -> Invocation {
        let netns = &attachment.netns;
        let netns = if netns.exists() { netns.to_string_lossy().into_owned() } else { String::new() };
        Invocation {
            container_id: attachment.sandbox_id.clone(),
            netns,
            ifname: INTERFACE.to_owned(),
            args: attachment.args.clone(),
            bin_dirs: self.bin_dirs.clone(),
            timeout: PLUGIN_TIMEOUT,
        }
    }

    async fn add(&self, attachment: &Attachment) -> Result<Option<Value>, ConflistError> {
        let invocation = self.invocation(attachment);
        let mut result = None;
        for plugin in &attachment.list.plugins {
            let config = plugin_config(attachment, plugin, result.as_ref());
            result = invocation
                .run("ADD", &config)
                .await
                .map_err(|source| ConflistError::Plugin { network: attachment.list.name.clone(), source })?;
        }
        Ok(result)
    }

    async fn delete(&self, attachment: &Attachment) -> Result<(), ConflistError> {
        let invocation = self.invocation(attachment);
        let previous = attachment.result.as_ref().filter(|_| attachment.list.at_least(0, 4));
        for plugin in attachment.list.plugins.iter().rev() {
            let config = plugin_config(attachment, plugin, previous);
            invocation
                .run("DEL", &config)
                .await
                .map_err(|source| ConflistError::Plugin { network: attachment.list.name.clone(), source })?;
        }
        Ok(self.cache.remove(&attachment.sandbox_id)?)
    }
}

fn read_list(path: &Path) -> Result<List, ConflistError> {
    let unreadable = |reason: String| ConflistError::Unreadable { path: path.to_owned(), reason };
    let bytes = fs::read(path).map_err(|e| unreadable(e.to_string()))?;
    let value: Map<String, Value> = serde_json::from_slice(&bytes).map_err(|e| unreadable(e.to_string()))?;
    let list = if value.contains_key("plugins") {
        serde_json::from_value(Value::Object(value)).map_err(|e| unreadable(e.to_string()))?
    } else {
        // One plugin alone, as configurations were before lists.
        let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        List { version: text("cniVersion"), name: text("name"), plugins: vec![value] }
    };
    let invalid = |reason| Err(ConflistError::Invalid { path: path.to_owned(), reason });
    if list.plugins.is_empty() {
        return invalid("it lists no plugin");
    }
    if list.name.is_empty() || list.name.contains('/') {
        return invalid("it has no usable name");
    }
    if list.plugins.iter().any(|p| !p.get("type").is_some_and(Value::is_string)) {
        return invalid("a plugin has no type");
    }
    Ok(list)
}

/// A plugin's own configuration, the list's name and version, the values of the capabilities it declares, and what came
/// out before it.
fn plugin_config(
    attachment: &Attachment,
    plugin: &Map<String, Value>,
    previous: Option<&Value>,
) -> Map<String, Value> {
    let mut config = plugin.clone();
    config.insert("name".into(), Value::from(attachment.list.name.clone()));
    config.insert("cniVersion".into(), Value::from(attachment.list.version.clone()));
    let declared = plugin.get("capabilities").and_then(Value::as_object);
    let wanted: Map<String, Value> = declared
        .into_iter()
        .flatten()
        .filter(|(_, enabled)| enabled.as_bool() == Some(true))
        .filter_map(|(name, _)| Some((name.clone(), attachment.capabilities.get(name)?.clone())))
        .collect();
    config.remove("capabilities");
    if !wanted.is_empty() {
        config.insert("runtimeConfig".into(), Value::Object(wanted));
    }
    if let Some(previous) = previous {
        config.insert("prevResult".into(), previous.clone());
    }
    config
}

fn capabilities(request: &NetworkRequest) -> Map<String, Value> {
    let ports: Vec<Value> = request
        .port_mappings
        .iter()
        .map(|mapping| {
            json!({
                "hostPort": mapping.host_port,
                "containerPort": mapping.container_port,
                "protocol": match mapping.protocol {
                    Protocol::Tcp => "tcp",
                    Protocol::Udp => "udp",
                    Protocol::Sctp => "sctp",
                },
                "hostIP": mapping.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
            })
        })
        .collect();
    let mut map = Map::new();
    if !ports.is_empty() {
        map.insert("portMappings".into(), Value::Array(ports));
    }
    if !request.cgroup_parent.is_empty() {
        map.insert("cgroupPath".into(), Value::from(request.cgroup_parent.clone()));
    }
    map.insert("io.kubernetes.cri.pod-annotations".into(), json!(request.annotations));
    if let Some(bandwidth) = bandwidth(request) {
        map.insert("bandwidth".into(), bandwidth);
    }
    map
}

/// Bits per second from the annotations that Kubernetes has for them. What is no quantity asks for nothing.
fn bandwidth(request: &NetworkRequest) -> Option<Value> {
    let rate = |direction: &str| {
        let text = request.annotations.get(&format!("kubernetes.io/{direction}-bandwidth"))?;
        quantity(text)
    };
    let mut map = Map::new();
    for direction in ["ingress", "egress"] {
        if let Some(rate) = rate(direction) {
            map.insert(format!("{direction}Rate"), Value::from(rate));
            map.insert(format!("{direction}Burst"), Value::from(i32::MAX));
        }
    }
    (!map.is_empty()).then_some(Value::Object(map))
}

fn quantity(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..split].parse().ok()?;
    let factor: u64 = match &text[split..] {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        _ => return None,
    };
    number.checked_mul(factor)
}

fn arguments(request: &NetworkRequest) -> String {
    format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={}",
        request.pod_namespace, request.pod_name, request.sandbox_id, request.pod_uid
    )
}

#[async_trait]
impl SandboxNetwork for Conflist {
    async fn attach(&self, request: &NetworkRequest) -> Result<Vec<IpAddr>, NetworkError> {
        let mut attachment = Attachment {
            version: 1,
            sandbox_id: request.sandbox_id.clone(),
            list: self.load()?,
            netns: request.netns.clone(),
            args: arguments(request),
            capabilities: capabilities(request),
            result: None,
        };
        // Before the first plugin runs: after a crash in the middle of it there is somebody to call DEL.
        let save = |attachment: &Attachment| {
            let json = serde_json::to_value(attachment);
            let id = attachment.sandbox_id.clone();
            async move {
                let json = json.map_err(|e| NetworkError(e.to_string()))?;
                self.cache.save(&id, &json).await.map_err(|e| NetworkError(e.to_string()))
            }
        };
        save(&attachment).await?;
        let added = async {
            let result = self.add(&attachment).await?;
            let found = addresses(result.as_ref().unwrap_or(&Value::Null))
                .map_err(|source| ConflistError::Plugin { network: attachment.list.name.clone(), source })?;
            Ok::<_, ConflistError>((result, found))
        };
        match added.await {
            Ok((result, found)) => {
                attachment.result = result;
                save(&attachment).await?;
                Ok(found)
            }
            Err(error) => {
                if let Err(undo) = self.delete(&attachment).await {
                    tracing::warn!(sandbox = %request.sandbox_id, error = %undo, "undoing a failed attachment");
                }
                Err(error.into())
            }
        }
    }

    async fn detach(&self, request: &NetworkRequest) -> Result<(), NetworkError> {
        match self.cache.load::<Attachment>(&request.sandbox_id).map_err(ConflistError::from)? {
            Some(attachment) => Ok(self.delete(&attachment).await?),
            None => Ok(()),
        }
    }

    async fn status(&self) -> Result<(), NetworkError> {
        let list = self.load()?;
        if !list.at_least(1, 1) {
            return Ok(());
        }
        let attachment = Attachment {
            version: 1,
            sandbox_id: String::new(),
            list,
            netns: PathBuf::new(),
            args: String::new(),
            capabilities: Map::new(),
            result: None,
        };
        let invocation = self.invocation(&attachment);
        for plugin in &attachment.list.plugins {
            let config = plugin_config(&attachment, plugin, None);
            invocation
                .run("STATUS", &config)
                .await
                .map_err(|source| ConflistError::Plugin { network: attachment.list.name.clone(), source })?;
        }
        Ok(())
    }

    async fn retain(&self, sandbox_ids: &[String]) -> Result<(), NetworkError> {
        let kept: HashSet<&String> = sandbox_ids.iter().collect();
        let attachments: Vec<Attachment> = self.cache.load_all().map_err(ConflistError::from)?;
        let mut first = Ok(());
        for attachment in attachments.iter().filter(|a| !kept.contains(&a.sandbox_id)) {
            if let Err(error) = self.delete(attachment).await
                && first.is_ok()
            {
                first = Err(error.into());
            }
        }
        first
    }

    /// Plugins that care for the node's range learn of it from the API server.
    async fn set_pod_cidrs(&self, _cidrs: &str) -> Result<(), NetworkError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
