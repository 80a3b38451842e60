//! The node's configuration file: one YAML document, every key optional. `systemd/config.yaml` is the commented sample,
//! and a test holds the two together.

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Everything `orlop node` can be told.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NodeConfig {
    /// The Node object's name; the host's name when empty.
    pub node_name: String,
    /// The address other nodes reach this one at; that of the default route's interface when absent.
    #[serde(rename = "nodeIP")]
    pub node_ip: Option<IpAddr>,
    /// How the API server is reached. Absent: standalone, only static pods run.
    pub kubeconfig: Option<PathBuf>,
    /// Used once, to ask for the certificate that `kubeconfig` will hold.
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// A `KubeletConfiguration` (kubelet.config.k8s.io/v1beta1), or the part of it that differs from the defaults.
    pub kubelet: serde_json::Map<String, serde_json::Value>,
    pub runtime: RuntimeSection,
    pub network: NetworkSection,
    pub overlay: OverlaySection,
    pub proxy: ProxySection,
}

/// The container runtime.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RuntimeSection {
    /// Where the CRI is served.
    pub listen: String,
    /// Images, writable layers and records that outlive a reboot.
    pub root: PathBuf,
    /// What does not.
    pub state: PathBuf,
    pub keeper_socket: PathBuf,
    pub cgroup_root: PathBuf,
    /// `refuse` or `warn`: what to do when the cgroup v2 tree lacks a controller that a limit needs.
    pub missing_controllers: Option<MissingControllers>,
    /// Folder of containerd's `hosts.toml` files.
    pub registry_config_dir: Option<PathBuf>,
    pub max_concurrent_downloads: usize,
    /// OCI layouts and docker archives found here are imported at the start of the node.
    pub preload_dir: Option<PathBuf>,
    /// Run CNI plugins from here instead of the built-in pod network.
    pub cni_conf_dir: Option<PathBuf>,
    pub cni_bin_dir: PathBuf,
}

impl Default for RuntimeSection {
    fn default() -> Self {
        Self {
            listen: "unix:///run/orlop/cri.sock".into(),
            root: "/var/lib/orlop".into(),
            state: "/run/orlop".into(),
            keeper_socket: "/run/orlop/keeper.sock".into(),
            cgroup_root: "/sys/fs/cgroup".into(),
            missing_controllers: None,
            registry_config_dir: Some("/etc/containerd/certs.d".into()),
            max_concurrent_downloads: 3,
            preload_dir: None,
            cni_conf_dir: None,
            cni_bin_dir: "/opt/cni/bin".into(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MissingControllers {
    Refuse,
    Warn,
}

/// The built-in pod network.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NetworkSection {
    pub bridge: String,
    /// Of the pods' interfaces; 0 follows the overlay or the node's own interface.
    pub mtu: u32,
    /// The pods' addresses on a standalone node. A joined node takes them from its Node object.
    #[serde(rename = "podCIDR")]
    pub pod_cidr: String,
    /// Hide pods behind the node's address when they leave the cluster.
    pub masquerade: bool,
}

impl Default for NetworkSection {
    fn default() -> Self {
        Self { bridge: "orlop0".into(), mtu: 0, pod_cidr: "10.85.0.0/24".into(), masquerade: true }
    }
}

/// The overlay between nodes.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct OverlaySection {
    pub enabled: bool,
    /// All pods' addresses, of every node.
    pub network: String,
    pub vni: u32,
    pub port: u16,
    pub mtu: u32,
    /// Route without encapsulation to nodes on the same link.
    pub direct_routing: bool,
    /// The interface that carries the overlay; the default route's when empty.
    pub interface: String,
}

impl Default for OverlaySection {
    fn default() -> Self {
        Self {
            enabled: true,
            network: "10.244.0.0/16".into(),
            vni: 1,
            port: 8472,
            mtu: 0,
            direct_routing: false,
            interface: String::new(),
        }
    }
}

/// The service proxy.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProxySection {
    pub enabled: bool,
    /// Source addresses outside it are hidden behind the node's when they use a service's cluster address.
    #[serde(rename = "clusterCIDR")]
    pub cluster_cidr: String,
    /// Local addresses that answer node ports; the node's own when empty.
    pub node_port_addresses: Vec<String>,
}

impl Default for ProxySection {
    fn default() -> Self {
        Self { enabled: true, cluster_cidr: String::new(), node_port_addresses: Vec::new() }
    }
}

impl NodeConfig {
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| {
            format!("read the configuration {}: give another file with --config", path.display())
        })?;
        Self::parse(&text).with_context(|| format!("configuration {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        // A file of comments only is a node with every default.
        if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
            return Ok(Self::default());
        }
        let config: Self = serde_saphyr::from_str(text).map_err(|e| anyhow::anyhow!("{e}"))?;
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> Result<()> {
        let mut wrong = Vec::new();
        if self.bootstrap_kubeconfig.is_some() && self.kubeconfig.is_none() {
            wrong.push(
                "bootstrapKubeconfig needs kubeconfig: the file that the joined node's credentials go to"
                    .to_owned(),
            );
        }
        if !self.runtime.listen.starts_with("unix:///") {
            wrong.push(format!(
                "runtime.listen {:?} must be unix:// and an absolute path",
                self.runtime.listen
            ));
        }
        if self.network.bridge.is_empty() || self.network.bridge.len() > 15 {
            wrong.push(format!("network.bridge {:?} must have 1 to 15 characters", self.network.bridge));
        }
        if self.overlay.vni == 0 || self.overlay.vni >= 1 << 24 {
            wrong.push(format!("overlay.vni {} must lie between 1 and 16777215", self.overlay.vni));
        }
        if !wrong.is_empty() {
            bail!("{}", wrong.join("; "));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_at_all_is_a_standalone_node_with_defaults() -> Result<()> {
        let config = NodeConfig::parse("# only a comment\n")?;
        assert!(config.kubeconfig.is_none() && config.overlay.enabled);
        assert_eq!(config.runtime.listen, "unix:///run/orlop/cri.sock");
        Ok(())
    }

    #[test]
    fn an_unknown_key_is_named() {
        let message = format!("{:#}", NodeConfig::parse("nodeNmae: a\n").unwrap_err());
        assert!(message.contains("nodeNmae"), "{message}");
    }

    #[test]
    fn every_wrong_value_is_reported_at_once() {
        let text = "bootstrapKubeconfig: /a\nruntime: {listen: tcp://x}\noverlay: {vni: 0}\n";
        let message = NodeConfig::parse(text).unwrap_err().to_string();
        for part in ["bootstrapKubeconfig", "runtime.listen", "overlay.vni"] {
            assert!(message.contains(part), "{message}");
        }
    }

    /// Uncommented, every key of the sample must be one we know, with its default as its value.
    #[test]
    fn the_sample_names_every_key_with_its_default() -> Result<()> {
        let sample = include_str!("../../../systemd/config.yaml");
        let keys: String = sample
            .lines()
            .filter_map(|line| line.strip_prefix('#'))
            .filter(|line| !line.starts_with(' ') || line.starts_with("  "))
            .filter(|line| !line.is_empty())
            .map(|line| format!("{line}\n"))
            .collect();
        let config = NodeConfig::parse(&keys).context(keys)?;
        assert_eq!(format!("{:?}", config.network), format!("{:?}", NetworkSection::default()));
        assert_eq!(format!("{:?}", config.overlay), format!("{:?}", OverlaySection::default()));
        assert_eq!(format!("{:?}", config.proxy), format!("{:?}", ProxySection::default()));
        assert_eq!(config.runtime.root, RuntimeSection::default().root);
        Ok(())
    }
}
