//! The network configuration on standard input, parsed into what the pod network wants to know.

use super::error::{Code, PluginError};
use super::flannel;
use super::verbs::Environment;
use crate::network::{Config, PortMapping, Protocol, Range, RangeSet};
use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;
use std::net::IpAddr;
use std::path::PathBuf;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
pub(super) struct NetConf {
    pub(super) cni_version: String,
    pub(super) name: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) prev_result: Option<Value>,
    pub(super) runtime_config: RuntimeConfig,
    #[serde(rename = "cni.dev/valid-attachments")]
    pub(super) valid_attachments: Option<Vec<ValidAttachment>>,
    pub(super) subnet_file: Option<PathBuf>,
    pub(super) delegate: Option<Delegate>,
    ipam: Ipam,
    #[serde(flatten)]
    bridge: Delegate,
}

/// The bridge's keys; flannel's configuration has them below `delegate`.
#[derive(Debug, Deserialize, Default, Clone)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Delegate {
    pub(super) bridge: Option<String>,
    pub(super) mtu: Option<u32>,
    pub(super) ip_masq: Option<bool>,
    pub(super) hairpin_mode: Option<bool>,
    pub(super) is_gateway: Option<bool>,
    pub(super) is_default_gateway: Option<bool>,
    /// Ours: pods of one bridge reach each other through the host's routing only.
    pub(super) routed: Option<bool>,
    /// Ours: where addresses are remembered.
    pub(super) state_dir: Option<PathBuf>,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Ipam {
    ranges: Vec<Vec<RangeConf>>,
    /// The older form: one range at the top.
    #[serde(flatten)]
    single: RangeConf,
    routes: Vec<RouteConf>,
    data_dir: Option<PathBuf>,
}

#[derive(Debug, Deserialize, Default, Clone)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RangeConf {
    subnet: Option<IpNet>,
    range_start: Option<IpAddr>,
    range_end: Option<IpAddr>,
    gateway: Option<IpAddr>,
}

#[derive(Debug, Deserialize)]
struct RouteConf {
    dst: IpNet,
}

#[derive(Debug, Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RuntimeConfig {
    port_mappings: Vec<PortMappingConf>,
    ip_ranges: Vec<Vec<RangeConf>>,
    ips: Vec<String>,
    pub(super) mac: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PortMappingConf {
    host_port: u16,
    container_port: u16,
    #[serde(default)]
    protocol: String,
    #[serde(default, rename = "hostIP")]
    host_ip: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct ValidAttachment {
    #[serde(rename = "containerID")]
    pub(super) container_id: String,
    pub(super) ifname: String,
}

fn invalid(message: impl Into<String>) -> PluginError {
    PluginError::new(Code::InvalidConfig, message)
}

impl NetConf {
    pub(super) fn parse(stdin: &[u8]) -> Result<Self, PluginError> {
        let conf: Self = serde_json::from_slice(stdin).map_err(|error| {
            PluginError::new(Code::Decode, "cannot decode the network configuration").details(error)
        })?;
        if conf.name.is_empty() {
            return Err(invalid("the network configuration has no name"));
        }
        Ok(conf)
    }

    pub(super) fn is_flannel(&self, environment: &Environment) -> bool {
        self.kind == "flannel" || environment.program == "flannel"
    }

    /// What adding needs; reads flannel's environment file if that is the type.
    pub(super) fn network(&self, environment: &Environment) -> Result<Config, PluginError> {
        if self.is_flannel(environment) {
            return flannel::network(self);
        }
        let keys = &self.bridge;
        let ranges = if self.runtime_config.ip_ranges.is_empty() {
            let single = self.ipam.single.subnet.map(|_| vec![self.ipam.single.clone()]);
            range_sets(single.iter().chain(&self.ipam.ranges))?
        } else {
            range_sets(&self.runtime_config.ip_ranges)?
        };
        if ranges.is_empty() {
            return Err(invalid("ipam has no ranges (as [[{\"subnet\": \"10.1.0.0/24\"}]])"));
        }
        let default_gateway = keys.is_default_gateway.unwrap_or(false);
        let (default_routes, routes): (Vec<IpNet>, Vec<IpNet>) =
            self.ipam.routes.iter().map(|route| route.dst).partition(|dst| dst.prefix_len() == 0);
        Ok(Config {
            ranges,
            mtu: keys.mtu.filter(|mtu| *mtu != 0),
            hairpin: keys.hairpin_mode.unwrap_or(false),
            gateway: keys.is_gateway.unwrap_or(false) || default_gateway,
            default_route: default_gateway || !default_routes.is_empty(),
            routes,
            masquerade_outside: keys.ip_masq.unwrap_or(false).then(Vec::new),
            ..self.teardown(environment)
        })
    }

    /// What everything but adding needs: where the state lies and how the bridge is called.
    pub(super) fn teardown(&self, environment: &Environment) -> Config {
        let flannel = self.is_flannel(environment);
        let delegated = self.delegate.as_ref().filter(|_| flannel);
        let keys = delegated.unwrap_or(&self.bridge);
        let default_dir = || PathBuf::from("/var/lib/orlop/network");
        let state_dir = keys.state_dir.clone().or_else(|| self.bridge.state_dir.clone());
        Config {
            name: self.name.clone(),
            state_dir: state_dir.or_else(|| self.ipam.data_dir.clone()).unwrap_or_else(default_dir),
            bridge: keys.bridge.clone().unwrap_or_else(|| "cni0".to_owned()),
            ranges: Vec::new(),
            mtu: None,
            hairpin: false,
            routed: keys.routed.unwrap_or(false),
            gateway: false,
            default_route: false,
            routes: Vec::new(),
            masquerade_outside: None,
        }
    }

    pub(super) fn has_address_keys(&self) -> bool {
        !self.ipam.ranges.is_empty() || self.ipam.single.subnet.is_some()
    }

    pub(super) fn extra_routes(&self) -> impl Iterator<Item = IpNet> {
        self.ipam.routes.iter().map(|route| route.dst)
    }

    pub(super) fn port_mappings(&self) -> Result<Vec<PortMapping>, PluginError> {
        let asked = self.runtime_config.port_mappings.iter().filter(|mapping| mapping.host_port != 0);
        asked.map(PortMappingConf::parse).collect()
    }

    pub(super) fn requested_ips(&self) -> Result<Vec<IpAddr>, PluginError> {
        let ips = self.runtime_config.ips.iter();
        ips.map(|text| {
            let address = text.split('/').next().unwrap_or_default();
            address.parse().map_err(|_| invalid(format!("requested address {text:?} is not one")))
        })
        .collect()
    }
}

fn range_sets<'a>(sets: impl IntoIterator<Item = &'a Vec<RangeConf>>) -> Result<Vec<RangeSet>, PluginError> {
    let parse = |range: &RangeConf| {
        let subnet = range.subnet.ok_or_else(|| invalid("an address range has no subnet"))?;
        Range::new(subnet, range.range_start, range.range_end, range.gateway)
            .map_err(|error| invalid(error.to_string()))
    };
    sets.into_iter().map(|set| Ok(RangeSet(set.iter().map(parse).collect::<Result<_, _>>()?))).collect()
}

impl PortMappingConf {
    fn parse(&self) -> Result<PortMapping, PluginError> {
        let protocol = match self.protocol.to_ascii_lowercase().as_str() {
            "" | "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            other => return Err(invalid(format!("port mapping has unknown protocol {other:?}"))),
        };
        let host_ip = match self.host_ip.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| invalid(format!("hostIP {text:?} is not an address")))?),
        };
        Ok(PortMapping { host_ip, host_port: self.host_port, container_port: self.container_port, protocol })
    }
}
