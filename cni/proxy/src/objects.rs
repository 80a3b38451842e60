//! The parts of Service, EndpointSlice and Node that the proxy reads, parsed at the edge into compact types.
//!
//! A cluster may have tens of thousands of endpoints, so the wire form is converted object by object while a list is
//! decoded and never kept.

use ipnet::IpNet;
use serde::Deserialize;
use std::net::IpAddr;

/// A transport protocol a service may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// As in the IP header.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// Nothing written means TCP; `None` is a protocol we do not know.
    fn parse(text: Option<&str>) -> Option<Self> {
        match text {
            None | Some("" | "TCP") => Some(Self::Tcp),
            Some("UDP") => Some(Self::Udp),
            Some("SCTP") => Some(Self::Sctp),
            Some(_) => None,
        }
    }
}

/// Which endpoints traffic of one kind may reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrafficPolicy {
    #[default]
    Cluster,
    Local,
}

impl TrafficPolicy {
    fn parse(text: Option<&str>) -> Self {
        if text == Some("Local") { Self::Local } else { Self::Cluster }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    pub name: Box<str>,
    pub protocol: Protocol,
    pub port: u16,
    pub node_port: Option<u16>,
}

/// A Service as the proxy sees it. One without an address in [`Self::cluster_ips`] is not proxied.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "wire::Service")]
pub struct Service {
    /// `namespace/name`
    pub key: Box<str>,
    /// RFC 3339, so older services sort first.
    pub created: Box<str>,
    pub cluster_ips: Vec<IpAddr>,
    pub external_ips: Vec<IpAddr>,
    /// Only those that the node is to answer itself.
    pub load_balancer_ips: Vec<IpAddr>,
    /// Who may use the load balancer addresses; empty is everybody.
    pub source_ranges: Vec<IpNet>,
    pub ports: Vec<ServicePort>,
    pub internal_policy: TrafficPolicy,
    pub external_policy: TrafficPolicy,
    /// Seconds a client stays with its endpoint.
    pub affinity: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub ips: Vec<IpAddr>,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    pub node: Option<Box<str>>,
    /// `None`: no hint of this kind was given.
    pub zone_hints: Option<Box<[Box<str>]>>,
    pub node_hints: Option<Box<[Box<str>]>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointPort {
    pub name: Box<str>,
    pub protocol: Protocol,
    pub port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "wire::EndpointSlice")]
pub struct EndpointSlice {
    /// `namespace/name`
    pub key: Box<str>,
    /// `namespace/name` of its Service, if it has one.
    pub service: Option<Box<str>>,
    pub endpoints: Vec<Endpoint>,
    pub ports: Vec<EndpointPort>,
}

/// Our own node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "wire::Node")]
pub struct Node {
    pub name: Box<str>,
    pub zone: Option<Box<str>>,
    /// The cluster autoscaler is about to remove it.
    pub to_be_deleted: bool,
}

mod wire {
    use super::{Endpoint, EndpointPort, Protocol, ServicePort, TrafficPolicy};
    use serde::Deserialize;
    use std::collections::BTreeMap;
    use std::net::IpAddr;

    #[derive(Deserialize, Default)]
    #[serde(rename_all = "camelCase", default)]
    struct Meta {
        namespace: String,
        name: String,
        creation_timestamp: Option<String>,
        labels: Option<BTreeMap<String, String>>,
    }

    impl Meta {
        fn key(&self) -> Box<str> {
            format!("{}/{}", self.namespace, self.name).into()
        }

        fn label(&self, name: &str) -> Option<&str> {
            self.labels.as_ref()?.get(name).map(String::as_str).filter(|value| !value.is_empty())
        }
    }

    #[derive(Deserialize, Default)]
    #[serde(default)]
    pub(super) struct Service {
        metadata: Meta,
        spec: ServiceSpec,
        status: ServiceStatus,
    }

    #[derive(Deserialize, Default)]
    #[serde(rename_all = "camelCase", default)]
    struct ServiceSpec {
        #[serde(rename = "clusterIP")]
        cluster_ip: Option<String>,
        #[serde(rename = "clusterIPs")]
        cluster_ips: Option<Vec<String>>,
        #[serde(rename = "externalIPs")]
        external_ips: Option<Vec<String>>,
        #[serde(rename = "type")]
        kind: Option<String>,
        ports: Option<Vec<Port>>,
        session_affinity: Option<String>,
        session_affinity_config: Option<AffinityConfig>,
        internal_traffic_policy: Option<String>,
        external_traffic_policy: Option<String>,
        load_balancer_source_ranges: Option<Vec<String>>,
    }

    #[derive(Deserialize, Default)]
    #[serde(rename_all = "camelCase", default)]
    struct AffinityConfig {
        #[serde(rename = "clientIP")]
        client_ip: Option<ClientIp>,
    }

    #[derive(Deserialize, Default)]
    #[serde(rename_all = "camelCase", default)]
    struct ClientIp {
        timeout_seconds: Option<u32>,
    }

    #[derive(Deserialize, Default)]
    #[serde(rename_all = "camelCase", default)]
    struct ServiceStatus {
        load_balancer: Option<LoadBalancer>,
    }

    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct LoadBalancer {
        ingress: Option<Vec<Ingress>>,
    }

    #[derive(Deserialize, Default)]
    #[serde(rename_all = "camelCase", default)]
    struct Ingress {
        ip: Option<String>,
        ip_mode: Option<String>,
    }

    /// A port of a Service or of a slice.
    #[derive(Deserialize, Default)]
    #[serde(rename_all = "camelCase", default)]
    struct Port {
        name: Option<String>,
        protocol: Option<String>,
        port: Option<u16>,
        node_port: Option<u16>,
    }

    const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;

    fn addresses<'a>(texts: impl IntoIterator<Item = &'a String>) -> Vec<IpAddr> {
        texts.into_iter().filter_map(|text| text.parse().ok()).collect()
    }

    impl From<Service> for super::Service {
        fn from(service: Service) -> Self {
            let Service { metadata, spec, status } = service;
            let external_name = spec.kind.as_deref() == Some("ExternalName");
            let listed = spec.cluster_ips.filter(|ips| !ips.is_empty());
            let cluster_ips = listed.unwrap_or_else(|| spec.cluster_ip.into_iter().collect());
            let ingress = status.load_balancer.and_then(|status| status.ingress).unwrap_or_default();
            let vips = ingress.iter().filter(|i| i.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"));
            let affinity = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
                spec.session_affinity_config
                    .and_then(|config| config.client_ip?.timeout_seconds)
                    .unwrap_or(DEFAULT_AFFINITY_SECONDS)
            });
            let ranges = spec.load_balancer_source_ranges.unwrap_or_default();
            Self {
                key: metadata.key(),
                created: metadata.creation_timestamp.unwrap_or_default().into(),
                cluster_ips: if external_name { Vec::new() } else { addresses(&cluster_ips) },
                external_ips: addresses(&spec.external_ips.unwrap_or_default()),
                load_balancer_ips: addresses(vips.filter_map(|ingress| ingress.ip.as_ref())),
                source_ranges: ranges.iter().filter_map(|range| range.trim().parse().ok()).collect(),
                ports: spec.ports.unwrap_or_default().into_iter().filter_map(service_port).collect(),
                internal_policy: TrafficPolicy::parse(spec.internal_traffic_policy.as_deref()),
                external_policy: TrafficPolicy::parse(spec.external_traffic_policy.as_deref()),
                affinity,
            }
        }
    }

    fn service_port(port: Port) -> Option<ServicePort> {
        Some(ServicePort {
            protocol: Protocol::parse(port.protocol.as_deref())?,
            name: port.name.unwrap_or_default().into(),
            port: port.port?,
            node_port: port.node_port.filter(|port| *port != 0),
        })
    }

    #[derive(Deserialize, Default)]
    #[serde(rename_all = "camelCase", default)]
    pub(super) struct EndpointSlice {
        metadata: Meta,
        address_type: Option<String>,
        endpoints: Option<Vec<SliceEndpoint>>,
        ports: Option<Vec<Port>>,
    }

    #[derive(Deserialize, Default)]
    #[serde(rename_all = "camelCase", default)]
    struct SliceEndpoint {
        addresses: Vec<String>,
        conditions: Option<Conditions>,
        node_name: Option<Box<str>>,
        hints: Option<Hints>,
    }

    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Conditions {
        ready: Option<bool>,
        serving: Option<bool>,
        terminating: Option<bool>,
    }

    #[derive(Deserialize, Default)]
    #[serde(rename_all = "camelCase", default)]
    struct Hints {
        for_zones: Option<Vec<Named>>,
        for_nodes: Option<Vec<Named>>,
    }

    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Named {
        name: Box<str>,
    }

    impl From<EndpointSlice> for super::EndpointSlice {
        fn from(slice: EndpointSlice) -> Self {
            let service = slice
                .metadata
                .label("kubernetes.io/service-name")
                .map(|name| format!("{}/{name}", slice.metadata.namespace).into());
            let is_ip = slice.address_type.as_deref() != Some("FQDN");
            let endpoints = slice.endpoints.unwrap_or_default();
            let port = |port: Port| {
                Some(EndpointPort {
                    protocol: Protocol::parse(port.protocol.as_deref())?,
                    name: port.name.unwrap_or_default().into(),
                    port: port.port?,
                })
            };
            Self {
                key: slice.metadata.key(),
                service,
                endpoints: endpoints.into_iter().filter(|_| is_ip).map(endpoint).collect(),
                ports: slice.ports.unwrap_or_default().into_iter().filter_map(port).collect(),
            }
        }
    }

    fn endpoint(endpoint: SliceEndpoint) -> Endpoint {
        let conditions = endpoint.conditions.unwrap_or_default();
        let hints = endpoint.hints.unwrap_or_default();
        let names = |list: Vec<Named>| list.into_iter().map(|named| named.name).collect();
        Endpoint {
            ips: addresses(&endpoint.addresses),
            ready: conditions.ready.unwrap_or(true),
            serving: conditions.serving.unwrap_or(true),
            terminating: conditions.terminating.unwrap_or(false),
            node: endpoint.node_name,
            zone_hints: hints.for_zones.filter(|list| !list.is_empty()).map(names),
            node_hints: hints.for_nodes.filter(|list| !list.is_empty()).map(names),
        }
    }

    #[derive(Deserialize, Default)]
    #[serde(default)]
    pub(super) struct Node {
        metadata: Meta,
        spec: NodeSpec,
    }

    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct NodeSpec {
        taints: Option<Vec<Taint>>,
    }

    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Taint {
        key: String,
    }

    impl From<Node> for super::Node {
        fn from(node: Node) -> Self {
            let taints = node.spec.taints.unwrap_or_default();
            Self {
                zone: node.metadata.label("topology.kubernetes.io/zone").map(Into::into),
                to_be_deleted: taints.iter().any(|taint| taint.key == "ToBeDeletedByClusterAutoscaler"),
                name: node.metadata.name.into(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_external_name_and_a_headless_service_have_no_addresses() {
        for spec in [
            json!({"type": "ExternalName", "clusterIP": "10.0.0.1"}),
            json!({"clusterIP": "None", "clusterIPs": ["None"]}),
            json!({"clusterIP": ""}),
        ] {
            let service: Service =
                serde_json::from_value(json!({"metadata": {"name": "a"}, "spec": spec})).unwrap();
            assert!(service.cluster_ips.is_empty());
        }
    }

    #[test]
    fn only_load_balancer_addresses_that_are_virtual_are_taken() {
        let service: Service = serde_json::from_value(json!({
            "metadata": {"name": "a", "namespace": "b", "labels": null},
            "spec": {"clusterIP": "10.0.0.1", "ports": null, "sessionAffinity": "ClientIP"},
            "status": {"loadBalancer": {"ingress": [
                {"ip": "1.1.1.1"}, {"ip": "1.1.1.2", "ipMode": "VIP"},
                {"ip": "1.1.1.3", "ipMode": "Proxy"}, {"hostname": "lb.example"}]}},
        }))
        .unwrap();
        let expected: Vec<IpAddr> = ["1.1.1.1", "1.1.1.2"].iter().map(|ip| ip.parse().unwrap()).collect();
        assert_eq!(service.load_balancer_ips, expected);
        assert_eq!(service.affinity, Some(10_800));
        assert_eq!(&*service.key, "b/a");
    }

    #[test]
    fn missing_conditions_mean_ready_and_names_of_hosts_are_left_out() {
        let slice = |kind: &str| -> EndpointSlice {
            serde_json::from_value(json!({
                "metadata": {"name": "s", "namespace": "b", "labels": {"kubernetes.io/service-name": "a"}},
                "addressType": kind, "endpoints": [{"addresses": ["10.1.0.1"]}],
                "ports": [{"port": 80}, {"name": "no number"}],
            }))
            .unwrap()
        };
        let ipv4 = slice("IPv4");
        assert_eq!(ipv4.service.as_deref(), Some("b/a"));
        assert!(ipv4.endpoints[0].ready && ipv4.endpoints[0].serving && !ipv4.endpoints[0].terminating);
        assert_eq!(ipv4.ports.len(), 1);
        assert!(slice("FQDN").endpoints.is_empty());
    }
}
