//! Bridges, veth pairs, VXLAN devices, and what they have in common.

use super::{Rtnl, RtnlError};
use futures_util::TryStreamExt;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::{LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan};
use std::fmt;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::str::FromStr;

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an Ethernet address (six hexadecimal bytes separated by colons)")]
pub struct InvalidMac(String);

impl FromStr for Mac {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, InvalidMac> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            *byte = parts
                .next()
                .filter(|part| part.len() == 2)
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(|| InvalidMac(text.to_owned()))?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(InvalidMac(text.to_owned())),
        }
    }
}

/// What makes two VXLAN devices interchangeable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vxlan {
    pub vni: u32,
    pub port: u16,
    /// Index of the device that carries the packets.
    pub underlay: u32,
    pub local: IpAddr,
    pub learning: bool,
    pub gbp: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// A real device, or loopback.
    Physical,
    Bridge,
    Veth,
    /// Without a local address it was not made by us.
    Vxlan(Option<Vxlan>),
    Other(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub kind: LinkKind,
    pub mac: Option<Mac>,
    pub mtu: u32,
    /// Set up by an administrator; says nothing about carrier.
    pub up: bool,
    /// The bridge it is a port of.
    pub controller: Option<u32>,
}

impl Link {
    fn parse(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            kind: LinkKind::Physical,
            mac: None,
            mtu: 0,
            up: message.header.flags.contains(LinkFlags::Up),
            controller: None,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().ok().map(Mac),
                LinkAttribute::Controller(index) => link.controller = Some(*index),
                LinkAttribute::LinkInfo(infos) => link.kind = parse_kind(infos),
                _ => {}
            }
        }
        link
    }
}

fn parse_kind(infos: &[LinkInfo]) -> LinkKind {
    let mut kind = LinkKind::Physical;
    for info in infos {
        match info {
            LinkInfo::Kind(InfoKind::Bridge) => kind = LinkKind::Bridge,
            LinkInfo::Kind(InfoKind::Veth) => kind = LinkKind::Veth,
            LinkInfo::Kind(InfoKind::Vxlan) => kind = LinkKind::Vxlan(None),
            LinkInfo::Kind(other) => kind = LinkKind::Other(other.to_string()),
            LinkInfo::Data(InfoData::Vxlan(data)) => kind = LinkKind::Vxlan(parse_vxlan(data)),
            _ => {}
        }
    }
    kind
}

fn parse_vxlan(data: &[InfoVxlan]) -> Option<Vxlan> {
    let (mut vni, mut port, mut underlay, mut local) = (0, 0, 0, None);
    let (mut learning, mut gbp) = (false, false);
    for info in data {
        match info {
            InfoVxlan::Id(value) => vni = *value,
            InfoVxlan::Port(value) => port = *value,
            InfoVxlan::Link(value) => underlay = *value,
            InfoVxlan::Local(value) => local = Some(IpAddr::V4(*value)),
            InfoVxlan::Local6(value) => local = Some(IpAddr::V6(*value)),
            InfoVxlan::Learning(value) => learning = *value,
            InfoVxlan::Gbp => gbp = true,
            _ => {}
        }
    }
    Some(Vxlan { vni, port, underlay, local: local?, learning, gbp })
}

impl Rtnl {
    async fn link(
        &self,
        by: impl FnOnce(rtnetlink::LinkGetRequest) -> rtnetlink::LinkGetRequest,
        name: &str,
    ) -> Result<Option<Link>, RtnlError> {
        let mut links = Box::pin(by(self.handle.link().get()).execute());
        match links.try_next().await {
            Ok(message) => Ok(message.as_ref().map(Link::parse)),
            Err(error) => match RtnlError::new(|| format!("look up link {name}"), error) {
                error if error.is_not_found() => Ok(None),
                error => Err(error),
            },
        }
    }

    /// # Errors
    /// [`RtnlError`]; a link that does not exist is not one.
    pub async fn link_by_name(&self, name: &str) -> Result<Option<Link>, RtnlError> {
        self.link(|request| request.match_name(name), name).await
    }

    /// # Errors
    /// [`RtnlError`]; a link that does not exist is not one.
    pub async fn link_by_index(&self, index: u32) -> Result<Option<Link>, RtnlError> {
        self.link(|request| request.match_index(index), &format!("with index {index}")).await
    }

    /// # Errors
    /// [`RtnlError`]
    pub async fn links(&self) -> Result<Vec<Link>, RtnlError> {
        let links = self.handle.link().get().execute();
        links
            .map_ok(|message| Link::parse(&message))
            .try_collect()
            .await
            .map_err(|error| RtnlError::new(|| "list links".to_owned(), error))
    }

    async fn new_link(&self, message: LinkMessage, name: &str) -> Result<(), RtnlError> {
        let added = self.handle.link().add(message).execute().await;
        added.map_err(|error| RtnlError::new(|| format!("create link {name}"), error))
    }

    async fn change_link(&self, message: LinkMessage, change: &str) -> Result<(), RtnlError> {
        let index = message.header.index;
        let changed = self.handle.link().change(message).execute().await;
        changed.map_err(|error| RtnlError::new(|| format!("{change} of link with index {index}"), error))
    }

    /// A bridge that is up. With a fixed address: one that inherits the lowest of its ports changes with every pod.
    ///
    /// # Errors
    /// [`RtnlError`]
    pub async fn add_bridge(&self, name: &str, mac: Mac, mtu: Option<u32>) -> Result<(), RtnlError> {
        let mut builder = LinkBridge::new(name).address(mac.0.to_vec());
        if let Some(mtu) = mtu {
            builder = builder.mtu(mtu);
        }
        self.new_link(builder.build(), name).await
    }

    /// A pair whose near end is up, perhaps as the port of a bridge, and whose far end lies in another namespace, down:
    /// the kernel cannot open it before the pair is complete.
    ///
    /// # Errors
    /// [`RtnlError`]
    pub async fn add_veth(&self, near: &Near<'_>, far: &Far<'_, impl AsFd>) -> Result<(), RtnlError> {
        let mut peer =
            LinkUnspec::new_with_name(far.name).mtu(near.mtu).setns_by_fd(far.namespace.as_fd().as_raw_fd());
        if let Some(mac) = far.mac {
            peer = peer.address(mac.0.to_vec());
        }
        let mut builder = LinkVeth::new(near.name, far.name)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build())))
            .mtu(near.mtu)
            .up();
        if let Some(bridge) = near.bridge {
            builder = builder.controller(bridge);
        }
        self.new_link(builder.build(), near.name).await
    }

    /// A VXLAN device that is up.
    ///
    /// # Errors
    /// [`RtnlError`]
    pub async fn add_vxlan(&self, name: &str, vxlan: &Vxlan, mac: Mac, mtu: u32) -> Result<(), RtnlError> {
        let mut builder = LinkVxlan::new(name, vxlan.vni)
            .port(vxlan.port)
            .dev(vxlan.underlay)
            .learning(vxlan.learning)
            .address(mac.0.to_vec())
            .mtu(mtu)
            .up();
        builder = match vxlan.local {
            IpAddr::V4(local) => builder.local(local),
            IpAddr::V6(local) => builder.local6(local),
        };
        if vxlan.gbp {
            builder = builder.gbp();
        }
        self.new_link(builder.build(), name).await
    }

    /// # Errors
    /// [`RtnlError`]; [`super::ignore_missing`] makes it idempotent.
    pub async fn delete_link(&self, index: u32) -> Result<(), RtnlError> {
        let deleted = self.handle.link().del(index).execute().await;
        deleted.map_err(|error| RtnlError::new(|| format!("delete link with index {index}"), error))
    }

    /// # Errors
    /// [`RtnlError`]; [`super::ignore_missing`] makes it idempotent.
    pub async fn delete_link_by_name(&self, name: &str) -> Result<(), RtnlError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let deleted = self.handle.link().del_with_message(message).execute().await;
        deleted.map_err(|error| RtnlError::new(|| format!("delete link {name}"), error))
    }

    /// # Errors
    /// [`RtnlError`]
    pub async fn set_up(&self, index: u32) -> Result<(), RtnlError> {
        self.change_link(unspec(index).up().build(), "set the state").await
    }

    /// # Errors
    /// [`RtnlError`]
    pub async fn set_mtu(&self, index: u32, mtu: u32) -> Result<(), RtnlError> {
        self.change_link(unspec(index).mtu(mtu).build(), "set the MTU").await
    }

    /// # Errors
    /// [`RtnlError`]
    pub async fn set_mac(&self, index: u32, mac: Mac) -> Result<(), RtnlError> {
        self.change_link(unspec(index).address(mac.0.to_vec()).build(), "set the address").await
    }

    /// Lets a bridge send a frame back out of the port it came in by, as a pod reaching itself through a service needs.
    ///
    /// # Errors
    /// [`RtnlError`]
    pub async fn set_hairpin(&self, port: u32, on: bool) -> Result<(), RtnlError> {
        self.change_link(LinkBridgePort::new(port).hairpin(on).build(), "set the hairpin mode").await
    }
}

fn unspec(index: u32) -> LinkMessageBuilder<LinkUnspec> {
    LinkUnspec::new_with_index(index)
}

/// The end of a veth pair in the namespace of the connection.
#[derive(Debug, Clone, Copy)]
pub struct Near<'a> {
    pub name: &'a str,
    pub mtu: u32,
    pub bridge: Option<u32>,
}

/// The other end.
#[derive(Debug, Clone, Copy)]
pub struct Far<'a, Fd> {
    pub name: &'a str,
    pub namespace: &'a Fd,
    pub mac: Option<Mac>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ethernet_address_is_six_bytes_of_two_digits() {
        assert_eq!("0a:00:ff:1b:2c:3d".parse(), Ok(Mac([10, 0, 255, 27, 44, 61])));
        assert_eq!(Mac([10, 0, 255, 27, 44, 61]).to_string(), "0a:00:ff:1b:2c:3d");
        for bad in ["", "0a:00:ff:1b:2c", "0a:00:ff:1b:2c:3d:4e", "a:0:ff:1b:2c:3d", "0a:00:ff:1b:2c:xx"] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }
}
