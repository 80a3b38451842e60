//! What an operator says: flannel's `net-conf.json`, and which of the machine's addresses to use.

use ipnet::Ipv4Net;
use serde::Deserialize;
use std::net::IpAddr;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot decode the network configuration")]
    Decode(#[source] serde_json::Error),
    #[error("the network configuration has no Network (such as 10.244.0.0/16); overlays are IPv4 only")]
    NoNetwork,
    #[error("overlay backend {0:?} is not supported (Backend.Type must be vxlan)")]
    Backend(String),
    #[error("the network configuration has no Backend.Type, which means udp to flannel; write vxlan")]
    NoBackend,
    #[error("VXLAN network identifier {0} is not between 1 and 16777215")]
    Vni(u32),
}

#[derive(Debug, Deserialize)]
struct NetConfFile {
    #[serde(rename = "Network")]
    network: Option<Ipv4Net>,
    #[serde(rename = "EnableIPv4", default = "yes")]
    enable_ipv4: bool,
    #[serde(rename = "Backend", default)]
    backend: BackendFile,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct BackendFile {
    r#type: Option<String>,
    #[serde(rename = "VNI")]
    vni: Option<u32>,
    port: u16,
    #[serde(rename = "MTU")]
    mtu: Option<u32>,
    direct_routing: bool,
    learning: bool,
    #[serde(rename = "GBP")]
    gbp: bool,
}

const fn yes() -> bool {
    true
}

/// The kernel's own port for VXLAN, which flannel's nodes use too.
const DEFAULT_PORT: u16 = 8472;

/// The cluster-wide part: all nodes must agree on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConf {
    pub network: Ipv4Net,
    pub vni: u32,
    pub port: u16,
    /// Of the overlay device; the underlay's minus the encapsulation if absent.
    pub mtu: Option<u32>,
    /// Peers on our own link get their packets without encapsulation.
    pub direct_routing: bool,
    pub learning: bool,
    pub gbp: bool,
}

impl NetConf {
    /// # Errors
    /// [`ConfigError`]
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        let file: NetConfFile = serde_json::from_str(json).map_err(ConfigError::Decode)?;
        let backend = file.backend;
        match backend.r#type.as_deref() {
            Some("vxlan") => {}
            Some(other) => return Err(ConfigError::Backend(other.to_owned())),
            None => return Err(ConfigError::NoBackend),
        }
        let vni = backend.vni.unwrap_or(1);
        if vni == 0 || vni >= 1 << 24 {
            return Err(ConfigError::Vni(vni));
        }
        Ok(Self {
            network: file.network.filter(|_| file.enable_ipv4).ok_or(ConfigError::NoNetwork)?.trunc(),
            vni,
            port: if backend.port == 0 { DEFAULT_PORT } else { backend.port },
            mtu: backend.mtu.filter(|mtu| *mtu != 0),
            direct_routing: backend.direct_routing,
            learning: backend.learning,
            gbp: backend.gbp,
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub net_conf: NetConf,
    /// The address peers send to; that of the interface if absent.
    pub public_ip: Option<IpAddr>,
    /// Name of the interface that carries the packets; where the default route points if absent.
    pub iface: Option<String>,
    pub subnet_file: PathBuf,
    pub ip_masq: bool,
}

impl Config {
    #[must_use]
    pub fn new(net_conf: NetConf) -> Self {
        Self {
            net_conf,
            public_ip: None,
            iface: None,
            subnet_file: PathBuf::from("/run/flannel/subnet.env"),
            ip_masq: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_of_flannel_is_understood() {
        let conf = NetConf::parse(
            r#"{"Network": "10.244.0.0/16", "EnableNFTables": false, "Backend": {"Type": "vxlan"}}"#,
        )
        .unwrap();
        assert_eq!((conf.vni, conf.port, conf.mtu, conf.direct_routing), (1, 8472, None, false));
        assert_eq!(conf.network, "10.244.0.0/16".parse().unwrap());
    }

    #[test]
    fn what_would_not_interoperate_is_refused() {
        let parse = |text: &str| NetConf::parse(text).unwrap_err();
        assert!(matches!(parse(r#"{"Network": "10.0.0.0/8"}"#), ConfigError::NoBackend));
        assert!(matches!(
            parse(r#"{"Network": "10.0.0.0/8", "Backend": {"Type": "host-gw"}}"#),
            ConfigError::Backend(_)
        ));
        assert!(matches!(parse(r#"{"Backend": {"Type": "vxlan"}}"#), ConfigError::NoNetwork));
        assert!(matches!(
            parse(r#"{"Network": "10.0.0.0/8", "Backend": {"Type": "vxlan", "VNI": 16777216}}"#),
            ConfigError::Vni(_)
        ));
        assert!(matches!(parse("nonsense"), ConfigError::Decode(_)));
    }
}
