//! The verbs against the kernel, in network namespaces that end with the test.

#![allow(clippy::unwrap_used)]

use ipnet::IpNet;
use orlop_net::netns::Netns;
use orlop_net::rtnl::*;
use orlop_net::sysctl;
use std::net::IpAddr;

fn in_new_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
    let namespace = Netns::create().expect("these tests need root");
    namespace
        .run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(test());
        })
        .unwrap();
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn a_veth_pair_joins_a_bridge_and_another_namespace() {
    in_new_namespace(|| async {
        let rtnl = Rtnl::open().unwrap();
        let mac = Mac([0x0a, 0x58, 10, 1, 0, 1]);
        rtnl.add_bridge("br-test", mac, Some(1400)).await.unwrap();
        let bridge = rtnl.link_by_name("br-test").await.unwrap().unwrap();
        assert_eq!(
            (bridge.kind, bridge.mac, bridge.mtu, bridge.up),
            (LinkKind::Bridge, Some(mac), 1400, true)
        );
        rtnl.add_address(bridge.index, net("10.1.0.1/24")).await.unwrap();
        rtnl.add_address(bridge.index, net("10.1.0.1/24")).await.unwrap();
        assert_eq!(rtnl.addresses(bridge.index).await.unwrap(), [net("10.1.0.1/24")]);

        let pod = Netns::create().unwrap();
        let far_mac = Mac([0x0a, 0x58, 10, 1, 0, 2]);
        let near = Near { name: "veth-test", mtu: 1400, bridge: Some(bridge.index) };
        let far = Far { name: "eth0", namespace: &pod, mac: Some(far_mac) };
        rtnl.add_veth(&near, &far).await.unwrap();
        let near = rtnl.link_by_name("veth-test").await.unwrap().unwrap();
        assert_eq!(near.controller, Some(bridge.index));
        rtnl.set_hairpin(near.index, true).await.unwrap();

        let inside = Rtnl::open_in(&pod).unwrap();
        let eth0 = inside.link_by_name("eth0").await.unwrap().unwrap();
        assert_eq!(eth0.mac, Some(far_mac));
        inside.set_up(eth0.index).await.unwrap();
        inside.add_address(eth0.index, net("10.1.0.2/32")).await.unwrap();
        inside.replace_route(&Route::new(net("10.1.0.1/32"), eth0.index)).await.unwrap();
        let default = Route::default_via(ip("10.1.0.1"), eth0.index);
        inside.replace_route(&default).await.unwrap();
        assert!(inside.routes().await.unwrap().contains(&default));
        let to = inside.route_to(ip("8.8.8.8")).await.unwrap().unwrap();
        assert_eq!(
            to,
            RouteTo { dev: eth0.index, gateway: Some(ip("10.1.0.1")), source: Some(ip("10.1.0.2")) }
        );

        rtnl.delete_link_by_name("veth-test").await.unwrap();
        assert!(inside.link_by_name("eth0").await.unwrap().is_none());
        let again = rtnl.delete_link_by_name("veth-test").await;
        ignore_missing(again).unwrap();
    });
}

#[test]
fn a_vxlan_device_with_its_peer_entries_reads_back_as_made() {
    in_new_namespace(|| async {
        let rtnl = Rtnl::open().unwrap();
        rtnl.add_bridge("under", Mac([2, 0, 0, 0, 0, 1]), None).await.unwrap();
        let under = rtnl.link_by_name("under").await.unwrap().unwrap();
        rtnl.add_address(under.index, net("192.0.2.1/24")).await.unwrap();
        let spec = Vxlan {
            vni: 1,
            port: 8472,
            underlay: under.index,
            local: ip("192.0.2.1"),
            learning: false,
            gbp: false,
        };
        let mac = Mac([2, 0, 0, 0, 0, 9]);
        rtnl.add_vxlan("flannel.1", &spec, mac, 1450).await.unwrap();
        let device = rtnl.link_by_name("flannel.1").await.unwrap().unwrap();
        assert_eq!((&device.kind, device.mac, device.mtu), (&LinkKind::Vxlan(Some(spec)), Some(mac), 1450));

        let mut monitor = Monitor::open().unwrap();
        let peer_mac = Mac([2, 0, 0, 0, 0, 10]);
        let neighbour = Neighbour { dev: device.index, ip: ip("10.1.1.0"), mac: peer_mac };
        let fdb = FdbEntry { dev: device.index, mac: peer_mac, remote: ip("192.0.2.2") };
        let route = Route::new(net("10.1.1.0/24"), device.index).via(ip("10.1.1.0")).onlink();
        for _ in 0..2 {
            rtnl.replace_neighbour(&neighbour).await.unwrap();
            rtnl.replace_fdb(&fdb).await.unwrap();
            rtnl.replace_route(&route).await.unwrap();
        }
        assert_eq!(rtnl.neighbours(device.index).await.unwrap(), [neighbour]);
        assert_eq!(rtnl.fdb(device.index).await.unwrap(), [fdb]);
        assert!(rtnl.routes().await.unwrap().contains(&route));
        let mut seen = Vec::new();
        while !(seen.contains(&Change::Route) && seen.contains(&Change::Neighbour { link: device.index })) {
            seen.push(monitor.next().await.unwrap());
        }

        rtnl.delete_route(&route).await.unwrap();
        rtnl.delete_fdb(&fdb).await.unwrap();
        rtnl.delete_neighbour(&neighbour).await.unwrap();
        assert!(rtnl.neighbours(device.index).await.unwrap().is_empty());
        assert!(rtnl.fdb(device.index).await.unwrap().is_empty());
        assert!(!rtnl.routes().await.unwrap().contains(&route));
        for result in [
            rtnl.delete_route(&route).await,
            rtnl.delete_fdb(&fdb).await,
            rtnl.delete_neighbour(&neighbour).await,
            rtnl.delete_link_by_name("nothing").await,
        ] {
            ignore_missing(result).unwrap();
        }
        rtnl.delete_link(device.index).await.unwrap();
    });
}

#[test]
fn a_failure_says_what_was_to_be_done_to_what() {
    in_new_namespace(|| async {
        let rtnl = Rtnl::open().unwrap();
        let error = rtnl.add_address(4711, net("10.0.0.1/24")).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot add address 10.0.0.1/24 to link with index 4711: No such device (os error 19)"
        );
        assert!(error.is_not_found());
        assert_eq!(rtnl.route_to(ip("8.8.8.8")).await.unwrap(), None);
    });
}

#[test]
fn a_kernel_setting_comes_back_unless_it_is_kept() {
    in_new_namespace(|| async {
        let key = "net/ipv4/ip_forward";
        let before = sysctl::read(key).unwrap();
        let other = if before == "0" { "1" } else { "0" };
        drop(sysctl::set_with_undo(key, other).unwrap());
        assert_eq!(sysctl::read(key).unwrap(), before);
        sysctl::set(key, other).unwrap();
        assert_eq!(sysctl::read(key).unwrap(), other);
    });
}

#[test]
fn work_in_a_namespace_does_not_move_the_caller_even_when_it_panics() {
    let here = Netns::current().unwrap();
    let other = Netns::create().unwrap();
    assert!(!here.is_same(&other).unwrap());
    assert!(other.run(|| Netns::current().unwrap().is_same(&other).unwrap()).unwrap());
    let outcome: Result<(), _> = other.run(|| panic!("on purpose"));
    assert!(outcome.unwrap_err().to_string().contains("on purpose"));
    assert!(Netns::current().unwrap().is_same(&here).unwrap());
}
