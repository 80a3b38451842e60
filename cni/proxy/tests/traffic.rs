//! Real traffic through the rules, in network namespaces that end with each test.

#![allow(clippy::unwrap_used)]

mod lab;

use lab::*;
use orlop_proxy::ProxyConfig;
use serde_json::json;
use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::time::{Duration, Instant};

const SERVICE: &str = "10.96.0.10";
const AT: &str = "10.96.0.10:80";

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn with_node_ports(policy: &str) -> serde_json::Value {
    let mut spec = spec(SERVICE);
    spec["externalTrafficPolicy"] = policy.into();
    spec["ports"][0]["nodePort"] = 30_080.into();
    spec["ports"][1]["nodePort"] = 30_080.into();
    spec
}

#[test]
fn connections_to_a_cluster_address_are_spread_over_all_endpoints() {
    let mut lab = Lab::new(3);
    lab.api.service("a", spec(SERVICE));
    lab.api.endpoints("a", pods(&[1, 2, 3], "us"));
    lab.start(Lab::config());
    eventually("the service", || tcp(&lab.client, AT).is_ok());
    let mut seen = BTreeSet::new();
    for _ in 0..60 {
        let (pod, peer) = tcp(&lab.client, AT).unwrap();
        seen.insert(pod);
        // The client is outside of the pods' network.
        assert_eq!(peer, address(&format!("10.1.{pod}.1")));
    }
    assert_eq!(seen, BTreeSet::from([1, 2, 3]));
    let seen: BTreeSet<_> = (0..60).map(|_| udp(&udp_socket(&lab.client), AT).unwrap().0).collect();
    assert_eq!(seen, BTreeSet::from([1, 2, 3]));
    // Pods keep their address, also to themselves as long as another pod answers; the node has one of its own.
    for _ in 0..20 {
        let (pod, peer) = tcp(&lab.pods[0], AT).unwrap();
        let expected = if pod == 1 { "10.1.1.1" } else { "10.1.1.2" };
        assert_eq!(peer, address(expected));
    }
    assert!(tcp(&lab.node, AT).is_ok());
}

#[test]
fn a_pod_reaches_itself_through_its_service() {
    let mut lab = Lab::new(1);
    lab.api.service("a", spec(SERVICE));
    lab.api.endpoints("a", pods(&[1], "us"));
    lab.start(Lab::config());
    eventually("the service", || tcp(&lab.client, AT).is_ok());
    let (mut stream, answer) = open(&lab.pods[0], AT).unwrap();
    assert_eq!(answer, (1, address("10.1.1.1")));
    assert!(echoes(&mut stream));
}

#[test]
fn node_ports_answer_outside_clients_pods_and_the_node() {
    let mut lab = Lab::new(2);
    lab.api.service("a", with_node_ports("Cluster"));
    lab.api.endpoints("a", pods(&[1, 2], "us"));
    lab.start(Lab::config());
    let at = format!("{NODE}:30080");
    eventually("the node port", || tcp(&lab.client, &at).is_ok());
    let seen: BTreeSet<_> = (0..40).map(|_| tcp(&lab.client, &at).unwrap().0).collect();
    assert_eq!(seen, BTreeSet::from([1, 2]));
    assert!(udp(&udp_socket(&lab.client), &at).is_ok());
    assert!(tcp(&lab.pods[0], &at).is_ok());
    assert!(tcp(&lab.node, &at).is_ok());
    // Only the node's own address answers: others it has are not the primary one.
    assert_eq!(tcp(&lab.client, "10.1.1.1:30080").unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn without_endpoints_connections_are_refused_at_once_and_come_back_with_them() {
    let mut lab = Lab::new(1);
    lab.api.service("a", with_node_ports("Cluster"));
    lab.start(Lab::config());
    let node_port = format!("{NODE}:30080");
    eventually("the refusal", || lab.ruleset().contains("goto reject"));
    for from in [&lab.client, &lab.pods[0], &lab.node] {
        for to in [AT, &node_port] {
            let started = Instant::now();
            assert_eq!(tcp(from, to).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{to}");
            assert!(started.elapsed() < Duration::from_millis(300));
        }
    }
    lab.api.endpoints("a", pods(&[1], "us"));
    eventually("the endpoint", || tcp(&lab.client, AT).is_ok());
    assert!(tcp(&lab.client, &node_port).is_ok());
    // A port the service does not have.
    let refused = tcp(&lab.client, &format!("{SERVICE}:81")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    lab.api.endpoints("a", json!([]));
    eventually("the refusal", || {
        tcp(&lab.client, AT).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    });
    lab.api.delete_service("a");
    eventually("the removal", || !lab.ruleset().contains(SERVICE));
}

#[test]
fn a_local_policy_keeps_the_source_and_uses_only_endpoints_of_this_node() {
    let mut lab = Lab::new(2);
    lab.api.service("a", with_node_ports("Local"));
    let both: Vec<_> = [pods(&[1], "us"), pods(&[2], "them")]
        .iter()
        .flat_map(|list| list.as_array().unwrap().clone())
        .collect();
    lab.api.endpoints("a", both.into());
    lab.start(Lab::config());
    let at = format!("{NODE}:30080");
    eventually("the node port", || tcp(&lab.client, &at).is_ok());
    for _ in 0..20 {
        assert_eq!(tcp(&lab.client, &at).unwrap(), (1, address("192.0.2.2")));
    }
    // Pods and the node itself reach every endpoint.
    for from in [&lab.pods[0], &lab.node] {
        let seen: BTreeSet<_> = (0..40).map(|_| tcp(from, &at).unwrap().0).collect();
        assert_eq!(seen, BTreeSet::from([1, 2]));
    }
    // None here: dropped, for another node to answer; not refused.
    lab.api.endpoints("a", pods(&[2], "them"));
    eventually("the drop", || tcp(&lab.client, &at).is_err_and(|error| error.kind() == ErrorKind::TimedOut));
    assert_eq!(tcp(&lab.pods[0], &at).unwrap().0, 2);
    let mut local = spec(SERVICE);
    local["internalTrafficPolicy"] = "Local".into();
    lab.api.service("a", local);
    eventually("the drop", || tcp(&lab.pods[0], AT).is_err_and(|error| error.kind() == ErrorKind::TimedOut));
}

#[test]
fn udp_clients_leave_an_endpoint_that_is_gone() {
    let mut lab = Lab::new(2);
    lab.api.service("a", with_node_ports("Cluster"));
    lab.api.endpoints("a", pods(&[1], "us"));
    lab.start(Lab::config());
    eventually("the service", || udp(&udp_socket(&lab.client), AT).is_ok());
    let (client, node_client) = (udp_socket(&lab.client), udp_socket(&lab.client));
    let node_port = format!("{NODE}:30080");
    assert_eq!(udp(&client, AT).unwrap().0, 1);
    assert_eq!(udp(&node_client, &node_port).unwrap().0, 1);
    lab.api.endpoints("a", pods(&[2], "us"));
    eventually("the new endpoint", || udp(&client, AT).is_ok_and(|answer| answer.0 == 2));
    eventually("the new endpoint", || udp(&node_client, &node_port).is_ok_and(|answer| answer.0 == 2));
    lab.api.endpoints("a", json!([]));
    eventually("silence", || udp(&client, AT).is_err());
    lab.api.endpoints("a", pods(&[1], "us"));
    eventually("the endpoint again", || udp(&client, AT).is_ok_and(|answer| answer.0 == 1));
}

#[test]
fn a_restart_writes_all_rules_anew_and_no_connection_notices() {
    let mut lab = Lab::new(2);
    lab.api.service("a", with_node_ports("Cluster"));
    lab.api.endpoints("a", pods(&[1, 2], "us"));
    lab.start(Lab::config());
    eventually("the service", || tcp(&lab.client, AT).is_ok());
    let (mut long, _) = open(&lab.client, AT).unwrap();
    let (mut node, _) = open(&lab.client, &format!("{NODE}:30080")).unwrap();
    let (mut hairpin, _) = open(&lab.pods[0], AT).unwrap();
    lab.stop();
    // Without a proxy rules stay.
    assert!(tcp(&lab.client, AT).is_ok());
    lab.api.service("b", spec("10.96.0.11"));
    lab.api.endpoints("b", pods(&[1], "us"));
    lab.start(Lab::config());
    let started = Instant::now();
    while tcp(&lab.client, "10.96.0.11:80").is_err() {
        assert!(tcp(&lab.client, AT).is_ok(), "a connection failed while the rules were replaced");
        assert!(started.elapsed() < Duration::from_secs(5));
    }
    for stream in [&mut long, &mut node, &mut hairpin] {
        assert!(echoes(stream), "a connection broke");
    }
}

#[test]
fn clients_with_affinity_stay_with_their_endpoint_until_it_is_gone() {
    let mut lab = Lab::new(3);
    let mut sticky = with_node_ports("Cluster");
    sticky["sessionAffinity"] = "ClientIP".into();
    lab.api.service("a", sticky);
    lab.api.endpoints("a", pods(&[1, 2, 3], "us"));
    lab.start(Lab::config());
    let node_port = format!("{NODE}:30080");
    for at in [AT, &node_port] {
        eventually("the service", || tcp(&lab.client, at).is_ok());
        let first = tcp(&lab.client, at).unwrap().0;
        for _ in 0..30 {
            assert_eq!(tcp(&lab.client, at).unwrap().0, first);
        }
        let others: Vec<_> = (1..=3).filter(|i| *i != first).collect();
        lab.api.endpoints("a", pods(&others, "us"));
        eventually("another endpoint", || tcp(&lab.client, at).is_ok_and(|answer| answer.0 != first));
        let second = tcp(&lab.client, at).unwrap().0;
        for _ in 0..30 {
            assert_eq!(tcp(&lab.client, at).unwrap().0, second);
        }
        lab.api.endpoints("a", pods(&[1, 2, 3], "us"));
    }
}

#[test]
fn load_balancer_addresses_answer_allowed_sources_only() {
    let mut lab = Lab::new(1);
    let at = "203.0.113.5:80";
    let balanced = |ranges: serde_json::Value| {
        let mut spec = spec(SERVICE);
        spec["lb"] = "203.0.113.5".into();
        spec["loadBalancerSourceRanges"] = ranges;
        spec
    };
    lab.api.endpoints("a", pods(&[1], "us"));
    lab.api.service("a", balanced(json!(["192.0.2.0/24", "192.0.2.2/32"])));
    lab.start(Lab::config());
    eventually("the balancer's address", || tcp(&lab.client, at).is_ok());
    assert!(tcp(&lab.node, at).is_ok());
    assert_eq!(tcp(&lab.pods[0], at).unwrap_err().kind(), ErrorKind::TimedOut);
    lab.api.service("a", balanced(json!(["10.0.0.0/8"])));
    eventually("the change", || tcp(&lab.client, at).is_err());
    assert!(tcp(&lab.pods[0], at).is_ok());
    assert!(tcp(&lab.client, AT).is_ok());
    lab.api.service("a", balanced(json!(null)));
    eventually("the change", || tcp(&lab.client, at).is_ok());
}

#[test]
fn the_rules_can_be_read_and_cleanup_leaves_other_tables_alone() {
    let mut lab = Lab::new(2);
    lab.node.run(|| run("nft", &["add table ip other; add chain ip other c"])).unwrap();
    lab.api.service("a", with_node_ports("Local"));
    lab.api.endpoints("a", pods(&[1, 2], "us"));
    lab.start(Lab::config());
    eventually("the service", || tcp(&lab.client, AT).is_ok());
    let listing = lab.ruleset();
    println!("{listing}");
    for part in [
        "10.96.0.10 . tcp . 80 : goto cluster-2",
        "10.96.0.10 . tcp . 80 . 0x00000001 : 10.1.2.2 . 8080",
        "udp . 30080 : goto node-local-2",
        "udp . 30080 : goto node-inside-2",
        "vmap @services",
        "masquerade fully-random",
    ] {
        assert!(listing.contains(part), "no {part:?} in\n{listing}");
    }
    lab.stop();
    lab.node.run(|| orlop_proxy::Proxy::cleanup().unwrap()).unwrap();
    let listing = lab.ruleset();
    assert!(listing.contains("table ip other") && !listing.contains("orlop-proxy"), "{listing}");
}

#[test]
fn what_somebody_else_changes_in_the_table_is_put_right() {
    let mut lab = Lab::new(1);
    lab.api.service("a", spec(SERVICE));
    lab.api.endpoints("a", pods(&[1], "us"));
    lab.start(ProxyConfig { audit_period: Duration::from_millis(200), ..Lab::config() });
    eventually("the service", || tcp(&lab.client, AT).is_ok());
    for harm in [
        "delete element ip orlop-proxy services { 10.96.0.10 . tcp . 80 }",
        "add element ip orlop-proxy cluster-ips { 10.96.0.99 }",
        "flush chain ip orlop-proxy postrouting",
        "flush ruleset",
    ] {
        let whole = lab.ruleset();
        lab.node.run(|| run("nft", &[harm])).unwrap();
        assert_ne!(lab.ruleset(), whole);
        eventually(harm, || lab.ruleset() == whole);
    }
    // And what is right is left alone: a table that is written anew has another handle.
    let with_handles = || lab.node.run(|| run("nft", &["-a", "list", "ruleset"])).unwrap();
    let before = with_handles();
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(with_handles(), before);
}

#[test]
fn rules_stay_while_the_api_server_is_away() {
    let mut lab = Lab::new(1);
    lab.api.service("a", spec(SERVICE));
    lab.api.endpoints("a", pods(&[1], "us"));
    lab.api.node("us");
    let healthz = "127.0.0.1:10256";
    lab.start(ProxyConfig { healthz: Some(healthz.parse().unwrap()), ..Lab::config() });
    eventually("the service", || tcp(&lab.client, AT).is_ok());
    let healthy = || {
        let answer = lab.node.run(|| run("curl", &["-si", &format!("http://{healthz}/healthz")])).unwrap();
        answer.contains("200 OK") && answer.contains("lastUpdated")
    };
    eventually("health", healthy);
    let rules = lab.ruleset();
    lab.api.stop();
    std::thread::sleep(Duration::from_millis(500));
    assert!(tcp(&lab.client, AT).is_ok());
    assert_eq!(lab.ruleset(), rules);
}

#[test]
fn both_families_are_served_each_by_its_own_endpoints() {
    let mut lab = Lab::new(2);
    lab.add_ipv6();
    let mut dual = with_node_ports("Cluster");
    dual["clusterIPs"] = json!([SERVICE, "fd00:96::10"]);
    dual["sessionAffinity"] = "ClientIP".into();
    lab.api.service("a", dual);
    lab.api.endpoints("a", pods(&[1], "us"));
    lab.api.ipv6_endpoints("a", json!([{"addresses": ["fd00:1:2::2"], "nodeName": "us"}]));
    let node_ips = vec![address(NODE), address("fd00:c::1")];
    let cluster_cidr = vec!["10.1.0.0/16".parse().unwrap(), "fd00:1::/32".parse().unwrap()];
    lab.start(ProxyConfig { node_ips, cluster_cidr, ..Lab::config() });
    eventually("the service", || tcp(&lab.client, AT).is_ok_and(|answer| answer.0 == 1));
    let masqueraded = (2, address("fd00:1:2::1"));
    for at in ["[fd00:96::10]:80", "[fd00:c::1]:30080"] {
        for _ in 0..3 {
            assert_eq!(tcp(&lab.client, at).unwrap(), masqueraded, "{at}");
        }
    }
    assert_eq!(tcp(&lab.pods[0], "[fd00:96::10]:80").unwrap(), (2, address("fd00:1:1::2")));
    assert_eq!(tcp(&lab.pods[1], "[fd00:96::10]:80").unwrap(), masqueraded);
    lab.api.ipv6_endpoints("a", json!([]));
    eventually("the refusal", || {
        tcp(&lab.client, "[fd00:96::10]:80").is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    });
    assert!(tcp(&lab.client, AT).is_ok());
}
