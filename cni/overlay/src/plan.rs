//! What the kernel should hold for a set of peers, and what to do about what it holds: pure functions.
//!
//! For a peer: a permanent neighbour (the base address of its subnet is at its tunnel end's MAC), a forwarding entry (that
//! MAC is at the peer's public address) and a route (its subnet via that base address). The route is added last and
//! removed first, so the kernel never has a packet for which it would have to ask.

use ipnet::{IpNet, Ipv4Net};
use orlop_net::rtnl::{LinkKind, Mac, Vxlan};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

/// The encapsulation: Ethernet, IPv4, UDP and VXLAN headers.
const ENCAPSULATION: u32 = 50;

/// Another node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Peer {
    pub subnet: Ipv4Net,
    pub public_ip: Ipv4Addr,
    pub mac: Mac,
}

/// The link that carries the overlay's packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    pub index: u32,
    pub mtu: u32,
    pub local: Ipv4Addr,
    /// What is on the link itself, without a gateway between.
    pub subnets: Vec<IpNet>,
}

/// This node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Own {
    pub subnet: Ipv4Net,
    pub public_ip: Ipv4Addr,
    pub mac: Mac,
    pub underlay: Underlay,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    pub name: String,
    pub vxlan: Vxlan,
    pub mac: Mac,
    pub mtu: u32,
    pub address: IpNet,
}

/// Where a route leads out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Through {
    Overlay,
    /// [`NetConf::direct_routing`](crate::NetConf::direct_routing)
    Underlay,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerRoute {
    pub dst: Ipv4Net,
    pub via: Ipv4Addr,
    pub through: Through,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entries {
    pub neighbours: BTreeSet<(Ipv4Addr, Mac)>,
    pub fdb: BTreeSet<(Mac, IpAddr)>,
    pub routes: BTreeSet<PeerRoute>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Desired {
    pub device: Device,
    pub entries: Entries,
}

/// The device as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedDevice {
    pub kind: LinkKind,
    pub mac: Option<Mac>,
    pub mtu: u32,
    pub up: bool,
    pub addresses: Vec<IpNet>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    pub device: Option<ObservedDevice>,
    pub entries: Entries,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    DeleteDevice,
    CreateDevice(Box<Device>),
    SetMac(Mac),
    SetMtu(u32),
    SetUp,
    AddAddress(IpNet),
    DeleteAddress(IpNet),
    DeleteRoute(PeerRoute),
    DeleteFdb(Mac, IpAddr),
    DeleteNeighbour(Ipv4Addr, Mac),
    AddNeighbour(Ipv4Addr, Mac),
    AddFdb(Mac, IpAddr),
    AddRoute(PeerRoute),
}

/// `peers` without ourselves. Two that claim one subnet: the lesser public address has it, on every node alike.
#[must_use]
pub fn plan(conf: &crate::NetConf, own: &Own, peers: &BTreeSet<Peer>) -> Desired {
    let device = Device {
        name: format!("flannel.{}", conf.vni),
        vxlan: Vxlan {
            vni: conf.vni,
            port: conf.port,
            underlay: own.underlay.index,
            local: own.underlay.local.into(),
            learning: conf.learning,
            gbp: conf.gbp,
        },
        mac: own.mac,
        mtu: conf.mtu.unwrap_or_else(|| own.underlay.mtu.saturating_sub(ENCAPSULATION)),
        address: IpNet::from(IpAddr::V4(own.subnet.network())),
    };
    let mut entries = Entries::default();
    let mut seen = BTreeSet::new();
    for peer in peers.iter().filter(|peer| conf.network.contains(&peer.subnet) && peer.subnet != own.subnet) {
        if !seen.insert(peer.subnet) {
            continue;
        }
        let public: IpAddr = peer.public_ip.into();
        if conf.direct_routing && own.underlay.subnets.iter().any(|net| net.contains(&public)) {
            let route = PeerRoute { dst: peer.subnet, via: peer.public_ip, through: Through::Underlay };
            entries.routes.insert(route);
            continue;
        }
        let base = peer.subnet.network();
        entries.neighbours.insert((base, peer.mac));
        entries.fdb.insert((peer.mac, public));
        entries.routes.insert(PeerRoute { dst: peer.subnet, via: base, through: Through::Overlay });
    }
    Desired { device, entries }
}

/// What turns the observed into the desired, in this order.
#[must_use]
pub fn diff(desired: &Desired, observed: &Observed) -> Vec<Op> {
    let mut ops = Vec::new();
    let compatible =
        observed.device.as_ref().filter(|device| device.kind == LinkKind::Vxlan(Some(desired.device.vxlan)));
    // With the device the kernel removes its entries, but not the routes by another one.
    let mut present = observed.entries.clone();
    if let Some(device) = compatible {
        device_changes(&desired.device, device, &mut ops);
    } else {
        if observed.device.is_some() {
            ops.push(Op::DeleteDevice);
        }
        ops.push(Op::CreateDevice(Box::new(desired.device.clone())));
        ops.push(Op::AddAddress(desired.device.address));
        present.neighbours.clear();
        present.fdb.clear();
        present.routes.retain(|route| route.through == Through::Underlay);
    }
    entry_changes(&desired.entries, &present, &mut ops);
    ops
}

fn device_changes(desired: &Device, device: &ObservedDevice, ops: &mut Vec<Op>) {
    if device.mac != Some(desired.mac) {
        ops.push(Op::SetMac(desired.mac));
    }
    if device.mtu != desired.mtu {
        ops.push(Op::SetMtu(desired.mtu));
    }
    if !device.up {
        ops.push(Op::SetUp);
    }
    let stale = device.addresses.iter().filter(|net| net.addr().is_ipv4() && **net != desired.address);
    ops.extend(stale.map(|net| Op::DeleteAddress(*net)));
    if !device.addresses.contains(&desired.address) {
        ops.push(Op::AddAddress(desired.address));
    }
}

fn entry_changes(desired: &Entries, present: &Entries, ops: &mut Vec<Op>) {
    // A route that moves to another gateway is replaced in place: between removal and addition packets would be lost.
    let replaced: BTreeSet<Ipv4Net> = desired.routes.iter().map(|route| route.dst).collect();
    let moves = |route: &PeerRoute| {
        replaced.contains(&route.dst)
            && desired.routes.iter().any(|r| r.dst == route.dst && r.through == route.through)
    };
    let gone = present.routes.difference(&desired.routes).filter(|route| !moves(route));
    ops.extend(gone.map(|route| Op::DeleteRoute(*route)));
    // Entries of the same key are replaced, and must not be removed afterwards.
    let fdb_keys: BTreeSet<Mac> = desired.fdb.iter().map(|(mac, _)| *mac).collect();
    let stale = present.fdb.difference(&desired.fdb).filter(|(mac, _)| !fdb_keys.contains(mac));
    ops.extend(stale.map(|(mac, remote)| Op::DeleteFdb(*mac, *remote)));
    let neighbour_keys: BTreeSet<Ipv4Addr> = desired.neighbours.iter().map(|(ip, _)| *ip).collect();
    let stale =
        present.neighbours.difference(&desired.neighbours).filter(|(ip, _)| !neighbour_keys.contains(ip));
    ops.extend(stale.map(|(ip, mac)| Op::DeleteNeighbour(*ip, *mac)));
    let missing = desired.neighbours.difference(&present.neighbours);
    ops.extend(missing.map(|(ip, mac)| Op::AddNeighbour(*ip, *mac)));
    ops.extend(desired.fdb.difference(&present.fdb).map(|(mac, remote)| Op::AddFdb(*mac, *remote)));
    ops.extend(desired.routes.difference(&present.routes).map(|route| Op::AddRoute(*route)));
}

#[cfg(test)]
mod tests;
