//! The service proxy of this node: its settings, and the node's addresses as it must know them.

use crate::config::NodeConfig;
use anyhow::Result;
use orlop_api::Client;
use orlop_proxy::config::{node_port_addresses, parse_networks};
use orlop_proxy::{Proxy, ProxyConfig};
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Where load balancers ask whether this node serves.
const HEALTHZ: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 10256);
const FIRST_DELAY: Duration = Duration::from_millis(500);
const LONGEST_DELAY: Duration = Duration::from_secs(30);

/// The proxy as the configuration file describes it; the addresses come later.
pub fn settings(config: &NodeConfig, node_name: &str) -> Result<ProxyConfig> {
    let section = &config.proxy;
    Ok(ProxyConfig {
        node_name: node_name.to_owned(),
        cluster_cidr: parse_networks("proxy.clusterCIDR", section.cluster_cidr.split(','))?,
        node_port_addresses: node_port_addresses(&section.node_port_addresses)?,
        healthz: Some(HEALTHZ),
        ..ProxyConfig::default()
    })
}

/// Waits until the Node object tells the node's addresses, then keeps services going.
pub(super) async fn run(client: Client, settings: ProxyConfig, stop: CancellationToken) -> Result<()> {
    let node_ips = node_addresses(&client, &settings.node_name).await;
    Ok(Box::pin(Proxy::run(client, ProxyConfig { node_ips, ..settings }, stop)).await?)
}

/// The addresses in the Node object, the primary one first. Waits until there are some: node ports and the choice of
/// families depend on them.
pub async fn node_addresses(client: &Client, node: &str) -> Vec<IpAddr> {
    let mut delay = FIRST_DELAY;
    loop {
        match client.get::<Value>(&format!("/api/v1/nodes/{node}")).await {
            Ok(object) => {
                let found = addresses(&object);
                if !found.is_empty() {
                    return found;
                }
                tracing::info!(
                    node,
                    "the Node object has no address yet, waiting for the kubelet to report one"
                );
            }
            Err(error) => tracing::warn!(node, %error, "cannot read the Node object, trying again"),
        }
        tokio::time::sleep(delay).await;
        delay = (delay * 2).min(LONGEST_DELAY);
    }
}

/// Internal addresses, or else external ones.
fn addresses(node: &Value) -> Vec<IpAddr> {
    let of_type = |wanted: &str| -> Vec<IpAddr> {
        let all = node["status"]["addresses"].as_array().into_iter().flatten();
        all.filter(|address| address["type"] == wanted)
            .filter_map(|address| address["address"].as_str()?.parse().ok())
            .collect()
    };
    Some(of_type("InternalIP")).filter(|found| !found.is_empty()).unwrap_or_else(|| of_type("ExternalIP"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn internal_addresses_go_before_external_ones_and_names_are_none() {
        let mut node = json!({"status": {"addresses": [
            {"type": "Hostname", "address": "a"},
            {"type": "ExternalIP", "address": "198.51.100.1"},
            {"type": "InternalIP", "address": "10.0.0.1"},
            {"type": "InternalIP", "address": "fd00::1"},
        ]}});
        assert_eq!(addresses(&node), ["10.0.0.1", "fd00::1"].map(|ip| ip.parse::<IpAddr>().unwrap()));
        node["status"]["addresses"].as_array_mut().unwrap().truncate(2);
        assert_eq!(addresses(&node), ["198.51.100.1".parse::<IpAddr>().unwrap()]);
        assert!(addresses(&json!({})).is_empty());
    }

    #[test]
    fn wrong_networks_are_named_by_their_key() {
        let mut config = NodeConfig::default();
        assert!(settings(&config, "a").unwrap().cluster_cidr.is_empty());
        config.proxy.cluster_cidr = "10.0.0.0".into();
        let message = settings(&config, "a").unwrap_err().to_string();
        assert!(message.contains("proxy.clusterCIDR"), "{message}");
    }
}
