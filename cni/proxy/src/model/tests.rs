use super::*;
use crate::objects::{Endpoint, EndpointPort};

fn place() -> Place {
    Place { node: "us".into(), zone: None }
}

fn map() -> ServiceMap {
    ServiceMap::new(place(), false, vec!["192.0.2.1".parse().unwrap()])
}

fn service(name: &str, ip: &str) -> Service {
    Service {
        key: format!("n/{name}").into(),
        created: "2026-01-01T00:00:00Z".into(),
        cluster_ips: vec![ip.parse().unwrap()],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        ports: vec![ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: None }],
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        affinity: None,
    }
}

fn slice(service: &str, number: u8, ips: &[(&str, &str)]) -> EndpointSlice {
    EndpointSlice {
        key: format!("n/{service}-{number}").into(),
        service: Some(format!("n/{service}").into()),
        endpoints: ips
            .iter()
            .map(|(ip, node)| Endpoint {
                ips: vec![ip.parse().unwrap()],
                ready: true,
                serving: true,
                terminating: false,
                node: Some((*node).into()),
                zone_hints: None,
                node_hints: None,
            })
            .collect(),
        ports: vec![EndpointPort { name: "".into(), protocol: Protocol::Tcp, port: 8080 }],
    }
}

fn at(ip: &str) -> Frontend {
    Frontend::Address { ip: ip.parse().unwrap(), protocol: Protocol::Tcp, port: 80 }
}

fn backends(list: &[&str]) -> Backends {
    list.iter().map(|ip| format!("{ip}:8080").parse().unwrap()).collect()
}

#[test]
fn slices_are_merged_whatever_comes_first() {
    let mut map = map();
    map.apply_slice(slice("a", 2, &[("10.1.0.2", "us"), ("10.1.0.1", "us")]));
    assert!(map.take_changes().is_empty());
    map.apply_service(service("a", "10.96.0.1"));
    map.apply_slice(slice("a", 1, &[("10.1.0.3", "them"), ("10.1.0.1", "us")]));
    let changes = map.take_changes();
    let route = changes[&at("10.96.0.1")].clone().unwrap();
    assert_eq!(route.backends, backends(&["10.1.0.1", "10.1.0.2", "10.1.0.3"]));
    map.delete_slice("n/a-2");
    assert_eq!(
        map.take_changes()[&at("10.96.0.1")].as_ref().unwrap().backends,
        backends(&["10.1.0.1", "10.1.0.3"])
    );
    // The same again is no change.
    map.apply_slice(slice("a", 1, &[("10.1.0.3", "them"), ("10.1.0.1", "us")]));
    map.apply_service(service("a", "10.96.0.1"));
    assert!(!map.is_dirty());
}

#[test]
fn a_slice_that_changes_its_service_leaves_the_old_one() {
    let mut map = map();
    map.apply_service(service("a", "10.96.0.1"));
    map.apply_service(service("b", "10.96.0.2"));
    map.apply_slice(slice("a", 1, &[("10.1.0.1", "us")]));
    map.take_changes();
    map.apply_slice(EndpointSlice { service: Some("n/b".into()), ..slice("a", 1, &[("10.1.0.1", "us")]) });
    let changes = map.take_changes();
    assert!(changes[&at("10.96.0.1")].as_ref().unwrap().backends.is_empty());
    assert_eq!(changes[&at("10.96.0.2")].as_ref().unwrap().backends.len(), 1);
}

#[test]
fn a_new_list_removes_what_is_not_in_it() {
    let mut map = map();
    map.replace_services(vec![service("a", "10.96.0.1"), service("b", "10.96.0.2")]);
    map.replace_slices(vec![slice("b", 1, &[("10.1.0.1", "us")])]);
    map.take_changes();
    map.replace_services(vec![service("b", "10.96.0.2")]);
    map.replace_slices(Vec::new());
    let changes = map.take_changes();
    assert_eq!(changes[&at("10.96.0.1")], None);
    assert!(changes[&at("10.96.0.2")].as_ref().unwrap().backends.is_empty());
}

#[test]
fn local_policies_drop_when_endpoints_are_elsewhere_and_reject_when_there_are_none() {
    let mut map = map();
    let local = Service {
        internal_policy: TrafficPolicy::Local,
        external_policy: TrafficPolicy::Local,
        external_ips: vec!["203.0.113.1".parse().unwrap()],
        ..service("a", "10.96.0.1")
    };
    map.apply_service(local);
    map.apply_slice(slice("a", 1, &[("10.1.0.1", "them")]));
    let changes = map.take_changes();
    let internal = changes[&at("10.96.0.1")].clone().unwrap();
    assert_eq!((internal.backends.len(), internal.refusal), (0, Refusal::Drop));
    let external = changes[&at("203.0.113.1")].clone().unwrap();
    assert_eq!((external.backends.len(), external.inside.len()), (0, 1));
    assert_eq!((external.class, external.refusal), (Class::ExternalLocal, Refusal::Drop));
    map.delete_slice("n/a-1");
    assert_eq!(map.take_changes()[&at("10.96.0.1")].as_ref().unwrap().refusal, Refusal::Reject);
}

#[test]
fn the_older_of_two_claims_wins_whatever_comes_first_and_the_other_inherits() {
    let shared = |name: &str, ip: &str, created: &str| Service {
        created: created.into(),
        external_ips: vec!["203.0.113.1".parse().unwrap()],
        ..service(name, ip)
    };
    let old = shared("old", "10.96.0.1", "2026-01-01T00:00:00Z");
    let new = shared("new", "10.96.0.2", "2026-02-01T00:00:00Z");
    for order in [[&old, &new], [&new, &old]] {
        let mut map = map();
        map.apply_slice(slice("old", 1, &[("10.1.0.1", "us")]));
        map.apply_slice(slice("new", 1, &[("10.1.0.2", "us")]));
        for service in order {
            map.apply_service(service.clone());
            map.take_changes();
        }
        let routes: HashMap<_, _> = map.routes().collect();
        assert_eq!(routes[&at("203.0.113.1")].backends, backends(&["10.1.0.1"]));
        map.delete_service("n/old");
        let changes = map.take_changes();
        assert_eq!(changes[&at("203.0.113.1")].as_ref().unwrap().backends, backends(&["10.1.0.2"]));
    }
    // An external address cannot take over somebody's cluster address, however old its service is.
    let mut map = map();
    map.apply_service(service("victim", "10.96.0.9"));
    let thief = Service { external_ips: vec!["10.96.0.9".parse().unwrap()], ..old };
    map.apply_service(thief);
    map.apply_slice(slice("old", 1, &[("10.1.0.1", "us")]));
    assert!(map.take_changes()[&at("10.96.0.9")].as_ref().unwrap().backends.is_empty());
}

#[test]
fn source_ranges_do_not_overlap_and_one_of_everybody_is_none() {
    let map = map();
    let balanced = |ranges: &[&str]| Service {
        source_ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
        ..service("a", "10.96.0.1")
    };
    let address = "203.0.113.5".parse().unwrap();
    let sources = |ranges: &[&str]| -> Vec<String> {
        map.sources(&balanced(ranges), address).iter().map(ToString::to_string).collect()
    };
    assert_eq!(sources(&["10.0.0.0/8", "10.1.0.0/16"]), ["10.0.0.0/8"]);
    assert_eq!(sources(&["192.0.2.0/24"]), ["192.0.2.0/24", "203.0.113.5/32"]);
    assert!(sources(&["10.0.0.0/8", "0.0.0.0/0"]).is_empty());
    assert!(sources(&[]).is_empty());
    // Only IPv6 clients are allowed: no IPv4 client is.
    assert_eq!(sources(&["fd00::/8"]), ["203.0.113.5/32"]);
}

#[test]
fn addresses_of_a_family_that_is_off_are_left_out() {
    let dual = || Service {
        cluster_ips: vec!["10.96.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
        ports: vec![ServicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: Some(30_000),
        }],
        ..service("a", "10.96.0.1")
    };
    let frontends = |ipv6| {
        let mut map = ServiceMap::new(place(), ipv6, Vec::new());
        map.apply_service(dual());
        map.take_changes().len()
    };
    assert_eq!((frontends(false), frontends(true)), (2, 4));
}
