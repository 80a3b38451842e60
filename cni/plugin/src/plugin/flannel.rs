//! The `flannel` type: subnet, MTU and masquerading come from the environment file that the overlay writes.

use super::config::{Delegate, NetConf};
use super::error::{Code, PluginError};
use crate::network::{Config, RangeSet};
use ipnet::IpNet;
use std::path::Path;

const DEFAULT_SUBNET_FILE: &str = "/run/flannel/subnet.env";

/// The content of `subnet.env`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct SubnetEnv {
    networks: Vec<IpNet>,
    subnets: Vec<IpNet>,
    mtu: Option<u32>,
    masquerades: bool,
}

impl SubnetEnv {
    fn parse(text: &str) -> Result<Self, String> {
        let mut env = Self::default();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (key, value) =
                line.split_once('=').ok_or_else(|| format!("line {line:?} is no assignment"))?;
            let wrong = || format!("{key} has the value {value:?}");
            match key {
                "FLANNEL_NETWORK" | "FLANNEL_IPV6_NETWORK" => {
                    for net in value.split(',').filter(|net| !net.is_empty()) {
                        env.networks.push(net.trim().parse().map_err(|_| wrong())?);
                    }
                }
                "FLANNEL_SUBNET" | "FLANNEL_IPV6_SUBNET" if !value.is_empty() => {
                    env.subnets.push(value.parse().map_err(|_| wrong())?);
                }
                "FLANNEL_MTU" => env.mtu = Some(value.parse().map_err(|_| wrong())?),
                "FLANNEL_IPMASQ" => env.masquerades = value.parse().map_err(|_| wrong())?,
                _ => {}
            }
        }
        if env.subnets.is_empty() { Err("it has no FLANNEL_SUBNET".to_owned()) } else { Ok(env) }
    }
}

pub(super) fn network(conf: &NetConf) -> Result<Config, PluginError> {
    let path = conf.subnet_file.as_deref().unwrap_or_else(|| Path::new(DEFAULT_SUBNET_FILE));
    let text = std::fs::read_to_string(path).map_err(|error| {
        let message = format!("cannot read {} (does the overlay run?)", path.display());
        PluginError::new(Code::TryAgainLater, message).details(error)
    })?;
    let env = SubnetEnv::parse(&text).map_err(|cause| {
        PluginError::new(Code::InvalidConfig, format!("cannot understand {}: {cause}", path.display()))
    })?;
    if conf.has_address_keys() {
        return Err(PluginError::new(
            Code::InvalidConfig,
            "ipam must not name subnets: the overlay assigns them",
        ));
    }
    build(conf, &env).map_err(|error| PluginError::new(Code::InvalidConfig, error.to_string()))
}

fn build(conf: &NetConf, env: &SubnetEnv) -> Result<Config, crate::network::RangeError> {
    let none = Delegate::default();
    let keys = conf.delegate.as_ref().unwrap_or(&none);
    let environment = super::verbs::Environment { program: "flannel".to_owned(), ..Default::default() };
    let default_gateway = keys.is_default_gateway.unwrap_or(false);
    let outside = keys.ip_masq.unwrap_or(!env.masquerades);
    Ok(Config {
        ranges: env.subnets.iter().map(|subnet| RangeSet::of(*subnet)).collect::<Result<_, _>>()?,
        mtu: keys.mtu.or(env.mtu),
        hairpin: keys.hairpin_mode.unwrap_or(false),
        gateway: true,
        default_route: default_gateway,
        routes: conf.extra_routes().chain(env.networks.iter().copied()).collect(),
        masquerade_outside: outside.then(|| env.networks.clone()),
        ..conf.teardown(&environment)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_file_of_a_dual_stack_node_is_understood() {
        let env = SubnetEnv::parse(
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_NETWORK=fd00::/48\n\
             FLANNEL_IPV6_SUBNET=fd00:0:0:1::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
        )
        .unwrap();
        assert_eq!(
            (env.networks.len(), env.subnets.len(), env.mtu, env.masquerades),
            (2, 2, Some(1450), true)
        );
    }

    #[test]
    fn a_broken_environment_file_is_refused_with_the_line() {
        assert!(SubnetEnv::parse("").unwrap_err().contains("FLANNEL_SUBNET"));
        assert!(SubnetEnv::parse("FLANNEL_SUBNET=x").unwrap_err().contains("\"x\""));
        assert!(SubnetEnv::parse("nonsense").unwrap_err().contains("nonsense"));
    }
}
