//! Two nodes, each a network namespace, on one link: their overlay carries connections, and what is broken is repaired.

#![allow(clippy::unwrap_used)]

use ipnet::IpNet;
use orlop_net::netns::Netns;
use orlop_net::nft::NftSocket;
use orlop_net::rtnl::{Far, Mac, Near, Rtnl};
use orlop_overlay::*;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

fn block_on<F: Future>(namespace: &Netns, work: impl FnOnce() -> F + Send) -> F::Output
where
    F::Output: Send,
{
    namespace
        .run(|| tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work()))
        .unwrap()
}

fn sh(namespace: &Netns, command: &str) -> String {
    namespace
        .run(|| {
            let out = Command::new("sh").args(["-c", command]).output().unwrap();
            String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
        })
        .unwrap()
}

struct TestNode {
    namespace: Netns,
    number: u8,
}

impl TestNode {
    fn config(more: &str) -> Config {
        let json = format!(r#"{{"Network": "10.244.0.0/16", "Backend": {{"Type": "vxlan"{more}}}}}"#);
        Config::new(NetConf::parse(&json).unwrap())
    }

    fn peer(&self) -> Peer {
        let n = self.number;
        Peer {
            subnet: format!("10.244.{n}.0/24").parse().unwrap(),
            public_ip: Ipv4Addr::new(192, 0, 2, n),
            mac: node::derived_mac(&format!("uid-{n}")),
        }
    }

    /// One round; how many changes it took.
    fn reconcile(&self, peers: &[Peer], more: &str) -> usize {
        let own = self.peer();
        block_on(&self.namespace, || async {
            let config = Self::config(more);
            let executor = Executor::new(&config.net_conf).unwrap();
            let underlay = executor.underlay(&config).await.unwrap();
            assert_eq!(underlay.local, own.public_ip);
            let own = Own { subnet: own.subnet, public_ip: own.public_ip, mac: own.mac, underlay };
            let peers: BTreeSet<Peer> = peers.iter().copied().collect();
            let desired = plan(&config.net_conf, &own, &peers);
            let ops = diff(&desired, &executor.observe(&own.underlay).await.unwrap());
            for op in &ops {
                executor.apply(op, &own.underlay).await.unwrap_or_else(|e| panic!("{op:?}: {e}"));
            }
            let again = diff(&desired, &executor.observe(&own.underlay).await.unwrap());
            assert_eq!(again, [], "a second round finds nothing to do");
            ops.len()
        })
    }

    /// The first address of the node's subnet, on a bridge as pods have it.
    fn gateway(&self) -> IpAddr {
        Ipv4Addr::new(10, 244, self.number, 1).into()
    }
}

fn two_nodes() -> (Netns, TestNode, TestNode) {
    let between = Netns::create().expect("these tests need root");
    let nodes = [1, 2].map(|number| TestNode { namespace: Netns::create().unwrap(), number });
    block_on(&between, || async {
        let rtnl = Rtnl::open().unwrap();
        rtnl.add_bridge("lan", Mac([2, 0, 0, 0, 1, 0]), None).await.unwrap();
        let lan = rtnl.link_by_name("lan").await.unwrap().unwrap().index;
        for node in &nodes {
            let near = Near { name: &format!("port{}", node.number), mtu: 1500, bridge: Some(lan) };
            let far = Far { name: "uplink", namespace: &node.namespace, mac: None };
            rtnl.add_veth(&near, &far).await.unwrap();
        }
    });
    for node in &nodes {
        block_on(&node.namespace, || async {
            let rtnl = Rtnl::open().unwrap();
            let lo = rtnl.link_by_name("lo").await.unwrap().unwrap().index;
            rtnl.set_up(lo).await.unwrap();
            let uplink = rtnl.link_by_name("uplink").await.unwrap().unwrap().index;
            rtnl.set_up(uplink).await.unwrap();
            let address: IpNet = format!("192.0.2.{}/24", node.number).parse().unwrap();
            rtnl.add_address(uplink, address).await.unwrap();
            rtnl.add_bridge("cni0", Mac([2, 0, 0, 0, 2, node.number]), None).await.unwrap();
            let cni0 = rtnl.link_by_name("cni0").await.unwrap().unwrap().index;
            rtnl.add_address(cni0, IpNet::new(node.gateway(), 24).unwrap()).await.unwrap();
        });
        sh(&node.namespace, "ip route add default via 192.0.2.254");
    }
    let [one, two] = nodes;
    (between, one, two)
}

/// Whom the server on `to` sees when `from` connects to it.
fn connect(from: &TestNode, to: &TestNode) -> std::io::Result<String> {
    let server = to.gateway();
    let listener = to.namespace.run(|| TcpListener::bind((server, 0)).unwrap()).unwrap();
    let address = SocketAddr::new(server, listener.local_addr().unwrap().port());
    listener.set_nonblocking(true).unwrap();
    from.namespace
        .run(|| {
            let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
            let (mut accepted, peer) = listener.accept()?;
            accepted.write_all(peer.ip().to_string().as_bytes())?;
            drop(accepted);
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })
        .unwrap()
}

#[test]
fn connections_cross_the_overlay_and_every_kind_of_damage_is_repaired() {
    let (_between, one, two) = two_nodes();
    assert!(one.reconcile(&[two.peer()], "") >= 5);
    two.reconcile(&[one.peer()], "");
    assert_eq!(connect(&one, &two).unwrap(), "10.244.1.0");
    assert_eq!(connect(&two, &one).unwrap(), "10.244.2.0");
    let device = sh(&one.namespace, "ip -d link show flannel.1");
    for part in ["vxlan id 1 local 192.0.2.1 dev uplink", "dstport 8472", "nolearning", "mtu 1450"] {
        assert!(device.contains(part), "no {part:?} in {device}");
    }
    for damage in [
        "ip link del flannel.1",
        "ip link set flannel.1 down",
        "ip route del 10.244.2.0/24",
        "bridge fdb del $(bridge fdb show dev flannel.1 | awk '{print $1}') dev flannel.1 dst 192.0.2.2",
        "ip neigh del 10.244.2.0 dev flannel.1",
        "ip addr flush dev flannel.1",
        "ip link del flannel.1; ip link add flannel.1 type vxlan id 1 dstport 4789 dev uplink local 192.0.2.1",
    ] {
        let said = sh(&one.namespace, damage);
        assert_eq!(said, "", "{damage}");
        assert!(connect(&one, &two).is_err(), "{damage} did no damage");
        assert!(one.reconcile(&[two.peer()], "") >= 1, "{damage}");
        assert_eq!(connect(&one, &two).unwrap(), "10.244.1.0", "{damage}");
    }
}

#[test]
fn a_peer_that_leaves_leaves_nothing_and_one_that_changes_is_followed() {
    let (_between, one, two) = two_nodes();
    one.reconcile(&[two.peer()], "");
    let moved = Peer { public_ip: Ipv4Addr::new(192, 0, 2, 77), mac: Mac([2; 6]), ..two.peer() };
    one.reconcile(&[moved], "");
    let state =
        sh(&one.namespace, "bridge fdb show dev flannel.1; ip neigh show dev flannel.1 nud permanent");
    assert!(state.contains("02:02:02:02:02:02 dst 192.0.2.77 self permanent"), "{state}");
    assert!(state.contains("10.244.2.0 lladdr 02:02:02:02:02:02"), "{state}");
    assert!(!state.contains(&two.peer().mac.to_string()), "{state}");
    one.reconcile(&[], "");
    let state = sh(
        &one.namespace,
        "bridge fdb show dev flannel.1; ip neigh show dev flannel.1 nud permanent; ip route",
    );
    assert!(!state.contains("10.244.2.0") && !state.contains("192.0.2.77"), "{state}");
}

#[test]
fn direct_routing_needs_no_device_and_can_be_switched() {
    let (_between, one, two) = two_nodes();
    let direct = r#", "DirectRouting": true"#;
    one.reconcile(&[two.peer()], direct);
    two.reconcile(&[one.peer()], direct);
    let route = |node: &TestNode| sh(&node.namespace, "ip route show 10.244.2.0/24");
    assert!(route(&one).contains("via 192.0.2.2 dev uplink"), "{}", route(&one));
    connect(&one, &two).unwrap();
    one.reconcile(&[two.peer()], "");
    two.reconcile(&[one.peer()], "");
    // The route by the underlay is now somebody else's business only if it is not in our way.
    connect(&one, &two).unwrap();
}

#[test]
fn masquerading_is_one_table_that_comes_and_goes() {
    let (_between, one, _two) = two_nodes();
    one.namespace
        .run(|| {
            let mut nft = NftSocket::open().unwrap();
            for _ in 0..2 {
                masquerade::apply(&mut nft, "10.244.0.0/16".parse().unwrap(), one.peer().subnet).unwrap();
            }
            assert!(masquerade::is_present(&mut nft).unwrap());
        })
        .unwrap();
    let listing = sh(&one.namespace, "nft list table ip orlop-overlay");
    for line in [
        "ip saddr 10.244.1.0/24 ip daddr 10.244.0.0/16 return",
        "ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random",
        "ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random",
    ] {
        assert!(listing.contains(line), "no {line:?} in {listing}");
    }
    one.namespace.run(|| masquerade::remove(&mut NftSocket::open().unwrap()).unwrap()).unwrap();
    assert_eq!(sh(&one.namespace, "nft list ruleset"), "");
}
