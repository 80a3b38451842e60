//! What the proxy is told: [`ProxyConfig`] for programs, and the file that kube-proxy reads for people.
//!
//! As kube-proxy we refuse keys that do not exist. Keys that exist there and have no effect here are accepted and named in
//! [`KubeProxyConfiguration::without_effect`], so that a caller can say so.

use crate::layout::Settings;
use ipnet::IpNet;
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot understand the kube-proxy configuration: {0}")]
    Decode(String),
    #[error("the kube-proxy configuration is a {kind} of {version}, not a KubeProxyConfiguration of {GROUP}")]
    Kind { kind: String, version: String },
    #[error("proxy mode {0:?} is not supported (only nftables): remove `mode` or set it to nftables")]
    Mode(String),
    #[error("{key}: {value:?} is not {expected}")]
    Value { key: &'static str, value: String, expected: &'static str },
    #[error("detectLocalMode {0:?} is not supported: use ClusterCIDR with clusterCIDR")]
    DetectLocal(String),
}

const GROUP: &str = "kubeproxy.config.k8s.io/v1alpha1";

/// Which addresses of the node answer node ports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The node's addresses, [`ProxyConfig::node_ips`]; all but loopback if there are none.
    #[default]
    Primary,
    /// All but loopback.
    All,
    /// Those in any of these networks.
    Networks(Vec<IpNet>),
}

/// How to run the proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyConfig {
    pub node_name: String,
    /// Of the node, the primary one first. IPv6 services are served if one of them is of that family.
    pub node_ips: Vec<IpAddr>,
    /// Where pods live, per family. Others that use a cluster address are masqueraded; empty: nobody is.
    pub cluster_cidr: Vec<IpNet>,
    pub node_port_addresses: NodePortAddresses,
    pub masquerade_all: bool,
    /// 0 to 31.
    pub masquerade_bit: u8,
    /// The first change is applied at once, those that follow within this time together.
    pub min_sync_period: Duration,
    /// How often to look whether the kernel still holds what was written.
    pub audit_period: Duration,
    /// Where to serve `/healthz` and `/livez`.
    pub healthz: Option<SocketAddr>,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            node_name: String::new(),
            node_ips: Vec::new(),
            cluster_cidr: Vec::new(),
            node_port_addresses: NodePortAddresses::Primary,
            masquerade_all: false,
            masquerade_bit: 14,
            min_sync_period: Duration::from_millis(30),
            audit_period: Duration::from_secs(3600),
            healthz: None,
        }
    }
}

impl ProxyConfig {
    pub(crate) fn ipv6(&self) -> bool {
        self.node_ips.iter().any(IpAddr::is_ipv6)
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings {
            pod_networks: self.cluster_cidr.clone(),
            node_port_networks: match &self.node_port_addresses {
                NodePortAddresses::Primary => self.node_ips.iter().copied().map(IpNet::from).collect(),
                NodePortAddresses::All => Vec::new(),
                NodePortAddresses::Networks(networks) => networks.clone(),
            },
            masquerade_all: self.masquerade_all,
            masquerade_mark: 1 << (self.masquerade_bit & 31),
        }
    }
}

/// The configuration file of kube-proxy, as far as it has an effect here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubeProxyConfiguration {
    pub kubeconfig: Option<PathBuf>,
    pub hostname_override: Option<String>,
    /// The address of the node, unless it is unspecified.
    pub bind_address: Option<IpAddr>,
    pub cluster_cidr: Vec<IpNet>,
    pub node_port_addresses: NodePortAddresses,
    pub masquerade_all: bool,
    pub masquerade_bit: u8,
    pub healthz: Option<SocketAddr>,
    /// Keys of the file that kube-proxy knows and that change nothing here.
    pub without_effect: Vec<&'static str>,
}

impl KubeProxyConfiguration {
    /// # Errors
    /// [`ConfigError`], also for keys that kube-proxy does not know.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let file: File =
            serde_saphyr::from_str(text).map_err(|error| ConfigError::Decode(error.to_string()))?;
        if file.kind != "KubeProxyConfiguration" || file.api_version != GROUP {
            return Err(ConfigError::Kind { kind: file.kind, version: file.api_version });
        }
        if !matches!(file.mode.as_str(), "" | "nftables") {
            return Err(ConfigError::Mode(file.mode));
        }
        if !matches!(file.detect_local_mode.as_str(), "" | "ClusterCIDR") {
            return Err(ConfigError::DetectLocal(file.detect_local_mode));
        }
        let nftables = file.nftables.as_ref();
        let bit = nftables.and_then(|section| section.masquerade_bit).unwrap_or(14);
        let masquerade_bit = u8::try_from(bit)
            .ok()
            .filter(|bit| *bit < 32)
            .ok_or_else(|| value("nftables.masqueradeBit", &bit.to_string(), "a number from 0 to 31"))?;
        let bind: Option<IpAddr> = parsed("bindAddress", &file.bind_address, "an address")?;
        Ok(Self {
            kubeconfig: file
                .client_connection
                .as_ref()
                .map(|connection| connection.kubeconfig.as_str())
                .filter(|path| !path.is_empty())
                .map(PathBuf::from),
            hostname_override: Some(file.hostname_override.clone()).filter(|name| !name.is_empty()),
            bind_address: bind.filter(|ip| !ip.is_unspecified()),
            cluster_cidr: parse_networks("clusterCIDR", file.cluster_cidr.split(','))?,
            node_port_addresses: node_port_addresses(
                file.node_port_addresses.as_deref().unwrap_or_default(),
            )?,
            masquerade_all: nftables.and_then(|section| section.masquerade_all).unwrap_or(false),
            masquerade_bit,
            healthz: healthz(file.healthz_bind_address.as_deref())?,
            without_effect: file.without_effect(),
        })
    }

    /// For this node.
    #[must_use]
    pub fn proxy_config(&self, node_name: String, node_ips: Vec<IpAddr>) -> ProxyConfig {
        ProxyConfig {
            node_name,
            node_ips: self.bind_address.map_or(node_ips, |ip| vec![ip]),
            cluster_cidr: self.cluster_cidr.clone(),
            node_port_addresses: self.node_port_addresses.clone(),
            masquerade_all: self.masquerade_all,
            masquerade_bit: self.masquerade_bit,
            healthz: self.healthz,
            ..ProxyConfig::default()
        }
    }
}

fn value(key: &'static str, value: &str, expected: &'static str) -> ConfigError {
    ConfigError::Value { key, value: value.to_owned(), expected }
}

fn parsed<T: std::str::FromStr>(
    key: &'static str,
    text: &str,
    expected: &'static str,
) -> Result<Option<T>, ConfigError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| value(key, text, expected))
}

/// Networks from texts; empty texts are none.
///
/// # Errors
/// [`ConfigError::Value`]
pub fn parse_networks<'a>(
    key: &'static str,
    texts: impl IntoIterator<Item = &'a str>,
) -> Result<Vec<IpNet>, ConfigError> {
    let parse = |text: &str| parsed(key, text.trim(), "a network such as 10.244.0.0/16");
    texts.into_iter().filter_map(|text| parse(text).transpose()).collect()
}

/// From kube-proxy's list: nothing and `primary` are the node's addresses, else networks. A network of all addresses
/// stands for every address of the node.
///
/// # Errors
/// [`ConfigError::Value`]
pub fn node_port_addresses(texts: &[String]) -> Result<NodePortAddresses, ConfigError> {
    match texts {
        [] => Ok(NodePortAddresses::Primary),
        [only] if only == "primary" => Ok(NodePortAddresses::Primary),
        texts => {
            let networks = parse_networks("nodePortAddresses", texts.iter().map(String::as_str))?;
            Ok(NodePortAddresses::Networks(networks))
        }
    }
}

/// An address without a port gets kube-proxy's; an empty text turns the server off.
fn healthz(text: Option<&str>) -> Result<Option<SocketAddr>, ConfigError> {
    const PORT: u16 = 10256;
    match text {
        None => Ok(Some(SocketAddr::new(IpAddr::from([0, 0, 0, 0]), PORT))),
        Some("") => Ok(None),
        Some(text) => text
            .parse()
            .or_else(|_| text.parse().map(|ip| SocketAddr::new(ip, PORT)))
            .map(Some)
            .map_err(|_| value("healthzBindAddress", text, "an address and port")),
    }
}

/// All keys that kube-proxy knows.
#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct File {
    kind: String,
    api_version: String,
    mode: String,
    hostname_override: String,
    bind_address: String,
    #[serde(rename = "clusterCIDR")]
    cluster_cidr: String,
    detect_local_mode: String,
    node_port_addresses: Option<Vec<String>>,
    healthz_bind_address: Option<String>,
    client_connection: Option<ClientConnection>,
    nftables: Option<Nftables>,
    metrics_bind_address: Option<IgnoredAny>,
    bind_address_hard_fail: Option<IgnoredAny>,
    enable_profiling: Option<IgnoredAny>,
    show_hidden_metrics_for_version: Option<IgnoredAny>,
    feature_gates: Option<IgnoredAny>,
    logging: Option<IgnoredAny>,
    config_sync_period: Option<IgnoredAny>,
    oom_score_adj: Option<IgnoredAny>,
    port_range: Option<IgnoredAny>,
    detect_local: Option<IgnoredAny>,
    iptables: Option<IgnoredAny>,
    ipvs: Option<IgnoredAny>,
    conntrack: Option<IgnoredAny>,
    winkernel: Option<IgnoredAny>,
    windows_run_as_service: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct ClientConnection {
    kubeconfig: String,
    accept_content_types: Option<IgnoredAny>,
    content_type: Option<IgnoredAny>,
    qps: Option<IgnoredAny>,
    burst: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Nftables {
    masquerade_bit: Option<i64>,
    masquerade_all: Option<bool>,
    sync_period: Option<IgnoredAny>,
    min_sync_period: Option<IgnoredAny>,
}

impl File {
    fn without_effect(&self) -> Vec<&'static str> {
        let client = self.client_connection.as_ref();
        let nftables = self.nftables.as_ref();
        let given = [
            ("metricsBindAddress", self.metrics_bind_address),
            ("bindAddressHardFail", self.bind_address_hard_fail),
            ("enableProfiling", self.enable_profiling),
            ("showHiddenMetricsForVersion", self.show_hidden_metrics_for_version),
            ("featureGates", self.feature_gates),
            ("logging", self.logging),
            ("configSyncPeriod", self.config_sync_period),
            ("oomScoreAdj", self.oom_score_adj),
            ("portRange", self.port_range),
            ("detectLocal", self.detect_local),
            ("iptables", self.iptables),
            ("ipvs", self.ipvs),
            ("conntrack", self.conntrack),
            ("winkernel", self.winkernel),
            ("windowsRunAsService", self.windows_run_as_service),
            ("clientConnection.acceptContentTypes", client.and_then(|c| c.accept_content_types)),
            ("clientConnection.contentType", client.and_then(|c| c.content_type)),
            ("clientConnection.qps", client.and_then(|c| c.qps)),
            ("clientConnection.burst", client.and_then(|c| c.burst)),
            ("nftables.syncPeriod", nftables.and_then(|n| n.sync_period)),
            ("nftables.minSyncPeriod", nftables.and_then(|n| n.min_sync_period)),
        ];
        given.into_iter().filter(|(_, value)| value.is_some()).map(|(key, _)| key).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<KubeProxyConfiguration, ConfigError> {
        KubeProxyConfiguration::parse(&format!(
            "kind: KubeProxyConfiguration\napiVersion: kubeproxy.config.k8s.io/v1alpha1\n{body}"
        ))
    }

    #[test]
    fn a_file_as_kubeadm_writes_it_is_understood() {
        let config = parse(
            "mode: nftables\nclusterCIDR: 10.244.0.0/16,fd00::/56\nhostnameOverride: \"\"\nbindAddress: 0.0.0.0\n\
             clientConnection:\n  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf\n  qps: 0\n\
             nftables:\n  masqueradeBit: 15\n  masqueradeAll: true\n  syncPeriod: 0s\n\
             nodePortAddresses: null\nconntrack:\n  min: null\n  maxPerCore: 32768\nhealthzBindAddress: \"\"\n",
        )
        .unwrap();
        assert_eq!(
            config.kubeconfig.as_deref().unwrap().to_str(),
            Some("/var/lib/kube-proxy/kubeconfig.conf")
        );
        assert_eq!(config.cluster_cidr.len(), 2);
        assert_eq!((config.masquerade_bit, config.masquerade_all), (15, true));
        assert_eq!((config.bind_address, config.healthz), (None, None));
        assert_eq!(config.node_port_addresses, NodePortAddresses::Primary);
        assert_eq!(config.without_effect, ["conntrack", "clientConnection.qps", "nftables.syncPeriod"]);
        let ours = config.proxy_config("a".into(), vec!["192.0.2.1".parse().unwrap()]);
        assert_eq!(ours.settings().masquerade_mark, 0x8000);
        assert_eq!(ours.settings().node_port_networks, ["192.0.2.1/32".parse().unwrap()]);
    }

    #[test]
    fn unknown_keys_modes_and_values_are_refused_by_name() {
        let refused = |body: &str, part: &str| {
            let error = parse(body).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        refused("clusterCidr: 10.0.0.0/8\n", "clusterCidr");
        refused("mode: iptables\n", "only nftables");
        refused("clusterCIDR: 10.0.0.0\n", "clusterCIDR");
        refused("detectLocalMode: NodeCIDR\n", "NodeCIDR");
        refused("nftables:\n  masqueradeBit: 40\n", "masqueradeBit");
        refused("nodePortAddresses: [primary, 10.0.0.0/8]\n", "nodePortAddresses");
        assert!(matches!(KubeProxyConfiguration::parse("kind: Pod\n"), Err(ConfigError::Kind { .. })));
    }

    #[test]
    fn health_has_a_default_port() {
        let with = |text: &str| parse(&format!("healthzBindAddress: {text}\n")).unwrap().healthz;
        assert_eq!(parse("").unwrap().healthz, Some("0.0.0.0:10256".parse().unwrap()));
        assert_eq!(with("127.0.0.1"), Some("127.0.0.1:10256".parse().unwrap()));
        assert_eq!(with("127.0.0.1:99"), Some("127.0.0.1:99".parse().unwrap()));
    }
}
