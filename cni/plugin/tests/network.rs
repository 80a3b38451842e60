//! The pod network against the kernel.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use orlop_cni::*;
use orlop_net::netns::Netns;
use std::net::IpAddr;
use std::path::Path;

fn config(dir: &Path) -> Config {
    Config::node(dir.to_owned(), vec![net("10.1.0.0/16")])
}

fn port(host_ip: Option<&str>, host_port: u16, container_port: u16) -> PortMapping {
    PortMapping { host_ip: host_ip.map(ip), host_port, container_port, protocol: Protocol::Tcp }
}

async fn open(dir: &Path) -> PodNetwork {
    let network = PodNetwork::open(config(dir)).unwrap();
    network.set_pod_cidrs(&[net("10.1.0.0/24")]).await.unwrap();
    network
}

fn attach_to(network: &str, pod: &Netns) -> Attach {
    Attach::new(network, path_of(pod))
}

#[test]
fn pods_reach_each_other_the_node_and_the_outside_and_leave_nothing_behind() {
    let (node, outside) = node_and_outside();
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Netns::create().unwrap(), Netns::create().unwrap());
    let (of_a, of_b) = block_on(&node, || async {
        let network = open(dir.path()).await;
        network.status().await.unwrap();
        let of_a = network.attach(&attach_to("a", &a)).await.unwrap();
        let started = std::time::Instant::now();
        let of_b = network.attach(&attach_to("b", &b)).await.unwrap();
        println!("attached in {:?}", started.elapsed());
        (of_a, of_b)
    });
    assert_eq!((of_a.ips(), of_b.ips()), (vec![ip("10.1.0.2")], vec![ip("10.1.0.3")]));

    let in_a = Server::start(&a, "0.0.0.0:0");
    let in_b = Server::start(&b, "0.0.0.0:0");
    assert_eq!(connect(&a, of_b.ips()[0], in_b.port).unwrap(), "10.1.0.2");
    assert_eq!(connect(&b, of_a.ips()[0], in_a.port).unwrap(), "10.1.0.3");
    assert_eq!(connect(&node, of_a.ips()[0], in_a.port).unwrap(), "10.1.0.1");
    let on_node = Server::start(&node, "0.0.0.0:0");
    assert_eq!(connect(&a, ip("10.1.0.1"), on_node.port).unwrap(), "10.1.0.2");
    let out = Server::start(&outside, "0.0.0.0:0");
    assert_eq!(connect(&a, ip("192.0.2.2"), out.port).unwrap(), "192.0.2.1");
    // A neighbour on the same bridge goes through the node, and stays there.
    assert!(output(&a, "ip", &["route", "get", "10.1.0.3"]).contains("via 10.1.0.1"));
    assert!(!output(&a, "ip", &["-s", "route", "show", "cache"]).contains("redirected"));

    block_on(&node, || async {
        let network = open(dir.path()).await;
        for id in ["a", "b", "a", "never-was"] {
            network.detach(id).await.unwrap();
        }
    });
    assert!(!output(&node, "ip", &["-br", "link"]).contains("veth"));
    assert!(!output(&a, "ip", &["-br", "link"]).contains("eth0"));
    assert!(!dir.path().join("orlop/10.1.0.2").exists());
}

#[test]
fn host_ports_work_from_everywhere_and_vanish_with_the_pod() {
    let (node, outside) = node_and_outside();
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Netns::create().unwrap(), Netns::create().unwrap());
    let in_a = Server::start(&a, "0.0.0.0:80");
    let mut request = attach_to("a", &a);
    request.port_mappings = vec![
        port(None, 8080, in_a.port),
        port(Some("192.0.2.1"), 8081, 80),
        port(Some("127.0.0.1"), 8082, 80),
    ];
    block_on(&node, || async {
        let network = open(dir.path()).await;
        network.attach(&request).await.unwrap();
        network.attach(&attach_to("b", &b)).await.unwrap();
    });
    let node_ip = ip("192.0.2.1");
    assert_eq!(connect(&outside, node_ip, 8080).unwrap(), "192.0.2.2");
    assert_eq!(connect(&outside, node_ip, 8081).unwrap(), "192.0.2.2");
    assert!(connect(&outside, node_ip, 8082).is_err());
    for port in [8080, 8082] {
        assert_eq!(connect(&node, ip("127.0.0.1"), port).unwrap(), "10.1.0.1");
    }
    assert!(connect(&node, ip("127.0.0.1"), 8081).is_err());
    connect(&node, node_ip, 8080).unwrap();
    // Another pod, and the pod itself.
    connect(&b, node_ip, 8080).unwrap();
    connect(&a, node_ip, 8080).unwrap();
    connect(&a, ip("10.1.0.1"), 8080).unwrap();

    // Pods do not reach the node's loopback, although the bridge accepts its addresses: it is the guard that stops them.
    let on_node = Server::start(&node, "0.0.0.0:0");
    let prepare = "echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet; ip link set lo down; \
                   ip route add 127.9.9.9/32 via 10.1.0.1 src 10.1.0.3";
    assert_eq!(output(&b, "sh", &["-c", prepare]), "");
    assert!(connect(&b, ip("127.9.9.9"), on_node.port).is_err());
    assert_eq!(output(&node, "nft", &["flush", "chain", "inet", "orlop-hostport", "guard"]), "");
    assert_eq!(connect(&b, ip("127.9.9.9"), on_node.port).unwrap(), "10.1.0.3");

    block_on(&node, || async {
        let network = open(dir.path()).await;
        let c = Netns::create().unwrap();
        let mut taken = attach_to("c", &c);
        taken.port_mappings = vec![port(None, 8080, 80)];
        let error = network.attach(&taken).await.unwrap_err();
        assert!(matches!(error, NetworkError::PortTaken { .. }), "{error}");
        // The failed attachment has undone itself.
        assert!(!output(&c, "ip", &["-br", "link"]).contains("eth0"));
        assert!(!dir.path().join("orlop/10.1.0.4").exists());
        // The same port on another address of the node is another port.
        network.detach("a").await.unwrap();
    });
    assert!(connect(&outside, node_ip, 8080).is_err());
    let listing = output(&node, "nft", &["list", "table", "inet", "orlop-hostport"]);
    assert!(!listing.contains("10.1.0.2"), "{listing}");
}

#[test]
fn a_restart_keeps_the_living_and_releases_the_rest() {
    let (node, outside) = node_and_outside();
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Netns::create().unwrap(), Netns::create().unwrap());
    let in_a = Server::start(&a, "0.0.0.0:80");
    block_on(&node, || async {
        let network = open(dir.path()).await;
        for (id, pod, host_port) in [("a", &a, 8080), ("b", &b, 8081)] {
            let mut request = attach_to(id, pod);
            request.port_mappings = vec![port(None, host_port, 80)];
            network.attach(&request).await.unwrap();
        }
    });
    // A veth of a crashed attachment, and somebody flushed the rules.
    output(&node, "ip", &["link", "add", "veth0123456789", "type", "veth", "peer", "name", "stray"]);
    output(&node, "ip", &["link", "set", "veth0123456789", "master", "orlop0"]);
    output(&node, "nft", &["flush", "ruleset"]);
    block_on(&node, || async {
        let network = open(dir.path()).await;
        network.retain(&["a".to_owned()]).await.unwrap();
        let again = network.attach(&attach_to("a", &a)).await.unwrap_err();
        assert!(matches!(again, NetworkError::Lease(LeaseError::Duplicate { .. })), "{again}");
    });
    assert_eq!(connect(&outside, ip("192.0.2.1"), 8080).unwrap(), "192.0.2.2");
    assert_eq!(connect(&node, ip("10.1.0.2"), in_a.port).unwrap(), "10.1.0.1");
    let links = output(&node, "ip", &["-br", "link"]);
    assert_eq!(links.matches("veth").count(), 1, "{links}");
    assert!(!output(&b, "ip", &["-br", "link"]).contains("eth0"));
    assert!(!dir.path().join("orlop/10.1.0.3").exists());
}

#[test]
fn both_families_get_addresses_and_connectivity() {
    let (node, _outside) = node_and_outside();
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (Netns::create().unwrap(), Netns::create().unwrap());
    let ips: Vec<IpAddr> = block_on(&node, || async {
        let network = PodNetwork::open(config(dir.path())).unwrap();
        network.set_pod_cidrs(&[net("10.1.0.0/24"), net("fd00:1::/64")]).await.unwrap();
        network.attach(&attach_to("a", &a)).await.unwrap();
        network.attach(&attach_to("b", &b)).await.unwrap().ips()
    });
    assert_eq!(ips, [ip("10.1.0.3"), ip("fd00:1::3")]);
    let in_b = Server::start(&b, "[::]:0");
    assert_eq!(connect(&a, ips[1], in_b.port).unwrap(), "fd00:1::2");
    assert_eq!(connect(&a, ips[0], in_b.port).unwrap(), "::ffff:10.1.0.2");
}

#[test]
fn failures_name_the_cause_and_undo_themselves() {
    let (node, _outside) = node_and_outside();
    let dir = tempfile::tempdir().unwrap();
    let pod = Netns::create().unwrap();
    block_on(&node, || async {
        let network = PodNetwork::open(config(dir.path())).unwrap();
        assert!(matches!(network.status().await, Err(NetworkError::NoPodCidr)));
        assert!(matches!(network.attach(&attach_to("a", &pod)).await, Err(NetworkError::NoPodCidr)));
        network.set_pod_cidrs(&[net("10.1.0.0/30")]).await.unwrap();
        let gone = network.attach(&Attach::new("a", "/proc/self/ns/no-such-thing")).await.unwrap_err();
        assert!(gone.to_string().contains("no-such-thing"), "{gone}");
        let not_a_namespace = network.attach(&Attach::new("a", "/dev/null")).await.unwrap_err();
        assert!(matches!(not_a_namespace, NetworkError::Rtnl(_)), "{not_a_namespace}");

        let attached = network.attach(&attach_to("a", &pod)).await.unwrap();
        let expected: Vec<_> = attached.addresses.iter().map(|a| a.address).collect();
        network.check(&attach_to("a", &pod), &expected).await.unwrap();
        assert!(matches!(network.status().await, Err(NetworkError::Lease(LeaseError::Exhausted { .. }))));
        let mut second = attach_to("b", &pod);
        assert!(matches!(
            network.attach(&second).await,
            Err(NetworkError::Lease(LeaseError::Exhausted { .. }))
        ));
        network.set_pod_cidrs(&[net("10.1.1.0/24")]).await.unwrap();
        let exists = network.attach(&second).await.unwrap_err();
        assert!(matches!(exists, NetworkError::InterfaceExists { .. }), "{exists}");
        second.ifname = "eth1".to_owned();
        network.attach(&second).await.unwrap();

        output(&pod, "ip", &["addr", "flush", "dev", "eth0"]);
        assert!(network.check(&attach_to("a", &pod), &expected).await.is_err());
        network.detach("a").await.unwrap();
        network.detach("b").await.unwrap();
    });
    let left: Vec<_> =
        std::fs::read_dir(dir.path().join("orlop")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_str().unwrap().starts_with("10.")), "{left:?}");
    assert!(!output(&node, "ip", &["-br", "link"]).contains("veth"));
}

#[test]
fn calls_may_be_made_from_tasks_of_a_threaded_runtime() {
    fn movable<T: Send>(_: T) {}
    let (node, _outside) = node_and_outside();
    let dir = tempfile::tempdir().unwrap();
    block_on(&node, || async {
        let network = PodNetwork::open(config(dir.path())).unwrap();
        let attach = Attach::new("a", "/nowhere");
        movable(network.attach(&attach));
        movable(network.detach("a"));
        movable(network.retain(&[]));
        movable(network.status());
        movable(network.set_pod_cidrs(&[]));
    });
}
