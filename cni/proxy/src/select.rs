//! Which endpoints of a service port get traffic.
//!
//! Ready ones; if there is none, those that still serve while they terminate. Topology hints narrow the cluster's set,
//! never the local one, and only when every usable endpoint carries them.

use crate::objects::{Endpoint, EndpointSlice, Protocol};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

/// Sorted, without duplicates.
pub type Backends = Arc<[SocketAddr]>;

/// What the choice depends on besides the endpoints.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    pub node: Box<str>,
    pub zone: Option<Box<str>>,
}

/// The endpoints of one service port in one address family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// Anywhere in the cluster.
    pub cluster: Backends,
    /// On this node.
    pub local: Backends,
    /// All that still answer: connections to them are not cut.
    pub serving: Backends,
    /// Those that may be on this node, ready or not: they may reach themselves through the service.
    pub here: Backends,
}

type Candidates<'a> = BTreeMap<SocketAddr, &'a Endpoint>;

/// `slices` are those of the service; ports are matched by name and protocol.
pub(crate) fn choose<'a>(
    slices: impl Iterator<Item = &'a EndpointSlice>,
    port_name: &str,
    protocol: Protocol,
    is_ipv4: bool,
    place: &Place,
) -> Choice {
    let mut all = Candidates::new();
    for slice in slices {
        for port in slice.ports.iter().filter(|port| &*port.name == port_name && port.protocol == protocol) {
            for endpoint in &slice.endpoints {
                // Consumers are to use the first address only.
                let Some(ip) = endpoint.ips.first().filter(|ip| ip.is_ipv4() == is_ipv4) else { continue };
                let known = all.entry(SocketAddr::new(*ip, port.port)).or_insert(endpoint);
                if rank(endpoint) > rank(known) {
                    *known = endpoint;
                }
            }
        }
    }
    let is_here = |endpoint: &Endpoint| endpoint.node.as_deref() == Some(&*place.node);
    let usable = usable(all.iter().map(|(address, endpoint)| (*address, *endpoint)));
    let local = self::usable(all.iter().filter(|(_, e)| is_here(e)).map(|(address, e)| (*address, *e)));
    Choice {
        cluster: addresses(&by_topology(usable, place)),
        local: addresses(&local),
        serving: all.iter().filter(|(_, e)| e.ready || e.serving).map(|(address, _)| *address).collect(),
        here: all
            .iter()
            .filter(|(_, e)| e.node.is_none() || is_here(e))
            .map(|(address, _)| *address)
            .collect(),
    }
}

/// An address may be in two slices while it moves between them.
fn rank(endpoint: &Endpoint) -> (bool, bool) {
    (endpoint.ready, endpoint.serving)
}

fn usable<'a>(endpoints: impl Iterator<Item = (SocketAddr, &'a Endpoint)> + Clone) -> Candidates<'a> {
    let ready: Candidates<'a> = endpoints.clone().filter(|(_, e)| e.ready).collect();
    if ready.is_empty() { endpoints.filter(|(_, e)| e.serving && e.terminating).collect() } else { ready }
}

fn by_topology<'a>(usable: Candidates<'a>, place: &Place) -> Candidates<'a> {
    let narrowed = |hints: fn(&Endpoint) -> Option<&[Box<str>]>, wanted: &str| {
        if !usable.values().all(|endpoint| hints(endpoint).is_some()) {
            return None;
        }
        let names_us =
            |e: &Endpoint| hints(e).is_some_and(|names| names.iter().any(|name| **name == *wanted));
        let chosen: Candidates<'a> =
            usable.iter().filter(|(_, e)| names_us(e)).map(|(address, e)| (*address, *e)).collect();
        (!chosen.is_empty()).then_some(chosen)
    };
    let by_node = narrowed(|endpoint| endpoint.node_hints.as_deref(), &place.node);
    let by_zone = || narrowed(|endpoint| endpoint.zone_hints.as_deref(), place.zone.as_deref()?);
    by_node.or_else(by_zone).unwrap_or(usable)
}

fn addresses(candidates: &Candidates<'_>) -> Backends {
    candidates.keys().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::EndpointPort;

    fn endpoint(ip: &str, node: &str) -> Endpoint {
        Endpoint {
            ips: vec![ip.parse().unwrap()],
            ready: true,
            serving: true,
            terminating: false,
            node: Some(node.into()),
            zone_hints: None,
            node_hints: None,
        }
    }

    fn hints(names: &[&str]) -> Option<Box<[Box<str>]>> {
        Some(names.iter().map(|name| (*name).into()).collect())
    }

    fn slice(endpoints: Vec<Endpoint>) -> EndpointSlice {
        EndpointSlice {
            key: "n/s".into(),
            service: Some("n/a".into()),
            endpoints,
            ports: vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port: 80 }],
        }
    }

    fn chosen(slices: &[EndpointSlice]) -> Choice {
        let place = Place { node: "us".into(), zone: Some("z1".into()) };
        choose(slices.iter(), "", Protocol::Tcp, true, &place)
    }

    fn list(addresses: &[&str]) -> Backends {
        addresses.iter().map(|a| format!("{a}:80").parse().unwrap()).collect()
    }

    #[test]
    fn terminating_endpoints_serve_only_when_none_is_ready_in_each_set_for_itself() {
        let ready_elsewhere = endpoint("10.1.1.1", "them");
        let leaving = Endpoint { ready: false, terminating: true, ..endpoint("10.1.0.1", "us") };
        let dead = Endpoint { ready: false, serving: false, ..endpoint("10.1.0.2", "us") };
        let choice = chosen(&[slice(vec![ready_elsewhere, leaving.clone(), dead.clone()])]);
        assert_eq!(choice.cluster, list(&["10.1.1.1"]));
        assert_eq!(choice.local, list(&["10.1.0.1"]));
        assert_eq!(choice.serving, list(&["10.1.0.1", "10.1.1.1"]));
        assert_eq!(chosen(&[slice(vec![leaving, dead])]).cluster, list(&["10.1.0.1"]));
    }

    #[test]
    fn an_address_in_two_slices_counts_once_and_as_ready_if_one_says_so() {
        let moving = Endpoint { ready: false, serving: false, ..endpoint("10.1.0.1", "us") };
        let both = [slice(vec![moving]), slice(vec![endpoint("10.1.0.1", "us")])];
        assert_eq!(chosen(&both).cluster, list(&["10.1.0.1"]));
    }

    #[test]
    fn zone_hints_narrow_only_if_every_endpoint_has_them_and_one_names_our_zone() {
        let here = Endpoint { zone_hints: hints(&["z1"]), ..endpoint("10.1.0.1", "us") };
        let there = Endpoint { zone_hints: hints(&["z2"]), ..endpoint("10.1.1.1", "them") };
        let unhinted = endpoint("10.1.1.2", "them");
        assert_eq!(chosen(&[slice(vec![here.clone(), there.clone()])]).cluster, list(&["10.1.0.1"]));
        assert_eq!(chosen(&[slice(vec![here, there.clone(), unhinted])]).cluster.len(), 3);
        assert_eq!(chosen(&[slice(vec![there])]).cluster, list(&["10.1.1.1"]));
    }

    #[test]
    fn node_hints_come_before_zone_hints_and_local_sets_ignore_both() {
        let ours =
            Endpoint { node_hints: hints(&["us"]), zone_hints: hints(&["z2"]), ..endpoint("10.1.0.1", "us") };
        let other = Endpoint {
            node_hints: hints(&["them"]),
            zone_hints: hints(&["z1"]),
            ..endpoint("10.1.0.2", "us")
        };
        let choice = chosen(&[slice(vec![ours, other])]);
        assert_eq!(choice.cluster, list(&["10.1.0.1"]));
        assert_eq!(choice.local.len(), 2);
    }

    #[test]
    fn ports_are_matched_by_name_protocol_and_family() {
        let slices = [slice(vec![endpoint("10.1.0.1", "us"), endpoint("fd00::1", "us")])];
        let with = |name, protocol, ipv4| {
            choose(slices.iter(), name, protocol, ipv4, &Place::default()).cluster.len()
        };
        assert_eq!(with("", Protocol::Tcp, true), 1);
        assert_eq!(with("", Protocol::Tcp, false), 1);
        assert_eq!(with("http", Protocol::Tcp, true), 0);
        assert_eq!(with("", Protocol::Udp, true), 0);
    }
}
