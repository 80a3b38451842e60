use super::*;
use crate::NetConf;

fn conf(more: &str) -> NetConf {
    NetConf::parse(&format!(r#"{{"Network": "10.244.0.0/16", "Backend": {{"Type": "vxlan"{more}}}}}"#))
        .unwrap()
}

fn own() -> Own {
    Own {
        subnet: "10.244.1.0/24".parse().unwrap(),
        public_ip: "192.0.2.1".parse().unwrap(),
        mac: Mac([2, 0, 0, 0, 0, 1]),
        underlay: Underlay {
            index: 2,
            mtu: 1500,
            local: "192.0.2.1".parse().unwrap(),
            subnets: vec!["192.0.2.0/24".parse().unwrap()],
        },
    }
}

fn peer(n: u8) -> Peer {
    Peer {
        subnet: format!("10.244.{n}.0/24").parse().unwrap(),
        public_ip: Ipv4Addr::new(192, 0, 2, n),
        mac: Mac([2, 0, 0, 0, 0, n]),
    }
}

/// The kernel after a plan has been carried out.
fn as_planned(desired: &Desired) -> Observed {
    Observed {
        device: Some(ObservedDevice {
            kind: LinkKind::Vxlan(Some(desired.device.vxlan)),
            mac: Some(desired.device.mac),
            mtu: desired.device.mtu,
            up: true,
            addresses: vec![desired.device.address],
        }),
        entries: desired.entries.clone(),
    }
}

fn route(n: u8) -> PeerRoute {
    let via = Ipv4Addr::new(10, 244, n, 0);
    PeerRoute { dst: peer(n).subnet, via, through: Through::Overlay }
}

#[test]
fn on_a_fresh_machine_the_route_of_a_peer_comes_last() {
    let desired = plan(&conf(""), &own(), &[peer(2)].into());
    assert_eq!(desired.device.name, "flannel.1");
    assert_eq!(desired.device.mtu, 1450);
    assert_eq!(desired.device.address, "10.244.1.0/32".parse().unwrap());
    assert_eq!(
        diff(&desired, &Observed::default()),
        [
            Op::CreateDevice(Box::new(desired.device.clone())),
            Op::AddAddress(desired.device.address),
            Op::AddNeighbour(Ipv4Addr::new(10, 244, 2, 0), peer(2).mac),
            Op::AddFdb(peer(2).mac, peer(2).public_ip.into()),
            Op::AddRoute(route(2)),
        ]
    );
}

#[test]
fn when_all_is_as_planned_there_is_nothing_to_do() {
    let desired = plan(&conf(""), &own(), &[peer(2), peer(3)].into());
    assert_eq!(diff(&desired, &as_planned(&desired)), []);
}

#[test]
fn a_peer_that_left_is_removed_route_first() {
    let before = plan(&conf(""), &own(), &[peer(2), peer(3)].into());
    let after = plan(&conf(""), &own(), &[peer(3)].into());
    assert_eq!(
        diff(&after, &as_planned(&before)),
        [
            Op::DeleteRoute(route(2)),
            Op::DeleteFdb(peer(2).mac, peer(2).public_ip.into()),
            Op::DeleteNeighbour(Ipv4Addr::new(10, 244, 2, 0), peer(2).mac),
        ]
    );
}

#[test]
fn a_peer_with_a_new_mac_leaves_no_old_forwarding_entry() {
    let before = plan(&conf(""), &own(), &[peer(2)].into());
    let mac = Mac([2, 9, 9, 9, 9, 9]);
    let after = plan(&conf(""), &own(), &[Peer { mac, ..peer(2) }].into());
    assert_eq!(
        diff(&after, &as_planned(&before)),
        [
            Op::DeleteFdb(peer(2).mac, peer(2).public_ip.into()),
            Op::AddNeighbour(Ipv4Addr::new(10, 244, 2, 0), mac),
            Op::AddFdb(mac, peer(2).public_ip.into()),
        ]
    );
}

#[test]
fn a_peer_with_a_new_public_address_has_its_entry_replaced() {
    let before = plan(&conf(""), &own(), &[peer(2)].into());
    let public_ip = Ipv4Addr::new(192, 0, 2, 99);
    let after = plan(&conf(""), &own(), &[Peer { public_ip, ..peer(2) }].into());
    assert_eq!(diff(&after, &as_planned(&before)), [Op::AddFdb(peer(2).mac, public_ip.into())]);
}

#[test]
fn a_peer_with_a_new_subnet_keeps_nothing_of_the_old() {
    let before = plan(&conf(""), &own(), &[peer(2)].into());
    let after = plan(&conf(""), &own(), &[Peer { subnet: peer(7).subnet, ..peer(2) }].into());
    assert_eq!(
        diff(&after, &as_planned(&before)),
        [
            Op::DeleteRoute(route(2)),
            Op::DeleteNeighbour(Ipv4Addr::new(10, 244, 2, 0), peer(2).mac),
            Op::AddNeighbour(Ipv4Addr::new(10, 244, 7, 0), peer(2).mac),
            Op::AddRoute(route(7)),
        ]
    );
}

#[test]
fn an_incompatible_device_is_made_anew_and_all_peers_with_it() {
    let desired = plan(&conf(""), &own(), &[peer(2)].into());
    let mut observed = as_planned(&desired);
    observed.device.as_mut().unwrap().kind = LinkKind::Vxlan(Some(Vxlan { vni: 9, ..desired.device.vxlan }));
    let ops = diff(&desired, &observed);
    assert_eq!(ops[0], Op::DeleteDevice);
    assert_eq!(ops.len(), 6);
}

#[test]
fn a_compatible_device_is_corrected_in_place() {
    let desired = plan(&conf(""), &own(), &BTreeSet::new());
    let mut observed = as_planned(&desired);
    let device = observed.device.as_mut().unwrap();
    let stale = "10.244.9.0/32".parse().unwrap();
    (device.mac, device.mtu, device.up, device.addresses) = (None, 1400, false, vec![stale]);
    assert_eq!(
        diff(&desired, &observed),
        [
            Op::SetMac(own().mac),
            Op::SetMtu(1450),
            Op::SetUp,
            Op::DeleteAddress(stale),
            Op::AddAddress(desired.device.address),
        ]
    );
}

#[test]
fn direct_routing_is_for_peers_on_our_link_only() {
    let far = Peer { public_ip: Ipv4Addr::new(198, 51, 100, 3), ..peer(3) };
    let desired = plan(&conf(r#", "DirectRouting": true"#), &own(), &[peer(2), far].into());
    let through: Vec<Through> = desired.entries.routes.iter().map(|route| route.through).collect();
    assert_eq!(through, [Through::Underlay, Through::Overlay]);
    assert_eq!(desired.entries.fdb.len(), 1);
    // Switching it off moves the route.
    let without = plan(&conf(""), &own(), &[peer(2), far].into());
    let ops = diff(&without, &as_planned(&desired));
    assert_eq!(ops.iter().filter(|op| matches!(op, Op::DeleteRoute(_) | Op::AddRoute(_))).count(), 2);
}

#[test]
fn our_own_subnet_subnets_elsewhere_and_second_claims_are_no_peers() {
    let elsewhere = Peer { subnet: "172.16.0.0/24".parse().unwrap(), ..peer(4) };
    let ours = Peer { subnet: own().subnet, ..peer(5) };
    let claim = Peer { public_ip: Ipv4Addr::new(192, 0, 2, 200), mac: Mac([2; 6]), ..peer(2) };
    let desired = plan(&conf(""), &own(), &[peer(2), claim, elsewhere, ours].into());
    assert_eq!(desired.entries.routes.into_iter().collect::<Vec<_>>(), [route(2)]);
    assert_eq!(desired.entries.fdb.len(), 1);
}
