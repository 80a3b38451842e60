//! Permanent neighbours, and the forwarding entries of VXLAN devices.

use super::{Mac, Rtnl, RtnlError};
use futures_util::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use std::net::IpAddr;

/// Who answers for an address on a link, without asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Neighbour {
    pub dev: u32,
    pub ip: IpAddr,
    pub mac: Mac,
}

/// To which machine a VXLAN device sends the frames for an Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FdbEntry {
    pub dev: u32,
    pub mac: Mac,
    pub remote: IpAddr,
}

impl Rtnl {
    /// # Errors
    /// [`RtnlError`]
    pub async fn replace_neighbour(&self, entry: &Neighbour) -> Result<(), RtnlError> {
        let request = self.handle.neighbours().add(entry.dev, entry.ip).link_layer_address(&entry.mac.0);
        let added = request.state(NeighbourState::Permanent).replace().execute().await;
        added
            .map_err(|error| RtnlError::new(|| format!("add neighbour {} at {}", entry.ip, entry.mac), error))
    }

    /// # Errors
    /// [`RtnlError`]; [`super::ignore_missing`] makes it idempotent.
    pub async fn delete_neighbour(&self, entry: &Neighbour) -> Result<(), RtnlError> {
        let mut message = NeighbourMessage::default();
        message.header.family = match entry.ip {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        message.header.ifindex = entry.dev;
        message.attributes.push(NeighbourAttribute::Destination(address(entry.ip)));
        let deleted = self.handle.neighbours().del(message).execute().await;
        deleted.map_err(|error| RtnlError::new(|| format!("delete neighbour {}", entry.ip), error))
    }

    /// The permanent neighbours of a link.
    ///
    /// # Errors
    /// [`RtnlError`]
    pub async fn neighbours(&self, dev: u32) -> Result<Vec<Neighbour>, RtnlError> {
        let found = self.entries(dev, AddressFamily::Unspec).await?;
        Ok(found
            .iter()
            .filter(|message| message.header.state == NeighbourState::Permanent)
            .filter_map(|message| {
                let (mac, ip) = mac_and_ip(message);
                Some(Neighbour { dev, ip: ip?, mac: mac? })
            })
            .collect())
    }

    /// # Errors
    /// [`RtnlError`]
    pub async fn replace_fdb(&self, entry: &FdbEntry) -> Result<(), RtnlError> {
        let request = self.handle.neighbours().add_bridge(entry.dev, &entry.mac.0).destination(entry.remote);
        let request = request.state(NeighbourState::Permanent).flags(NeighbourFlags::Own).replace();
        let added = request.execute().await;
        added.map_err(|error| {
            RtnlError::new(|| format!("add forwarding entry {} to {}", entry.mac, entry.remote), error)
        })
    }

    /// # Errors
    /// [`RtnlError`]; [`super::ignore_missing`] makes it idempotent.
    pub async fn delete_fdb(&self, entry: &FdbEntry) -> Result<(), RtnlError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = entry.dev;
        message.header.flags = NeighbourFlags::Own;
        message.header.state = NeighbourState::Permanent;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(entry.mac.0.to_vec()));
        message.attributes.push(NeighbourAttribute::Destination(address(entry.remote)));
        let deleted = self.handle.neighbours().del(message).execute().await;
        deleted.map_err(|error| {
            RtnlError::new(|| format!("delete forwarding entry {} to {}", entry.mac, entry.remote), error)
        })
    }

    /// The forwarding entries of a VXLAN device that name a machine.
    ///
    /// # Errors
    /// [`RtnlError`]
    pub async fn fdb(&self, dev: u32) -> Result<Vec<FdbEntry>, RtnlError> {
        let found = self.entries(dev, AddressFamily::Bridge).await?;
        Ok(found
            .iter()
            .filter_map(|message| {
                let (mac, remote) = mac_and_ip(message);
                Some(FdbEntry { dev, mac: mac?, remote: remote? })
            })
            .collect())
    }

    async fn entries(&self, dev: u32, family: AddressFamily) -> Result<Vec<NeighbourMessage>, RtnlError> {
        let all = self.handle.neighbours().get().set_address_family(family).execute();
        let mine = all.try_filter(|message| std::future::ready(message.header.ifindex == dev));
        mine.try_collect()
            .await
            .map_err(|error| RtnlError::new(|| format!("list neighbours of link with index {dev}"), error))
    }
}

const fn address(ip: IpAddr) -> NeighbourAddress {
    match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    }
}

fn mac_and_ip(message: &NeighbourMessage) -> (Option<Mac>, Option<IpAddr>) {
    let (mut mac, mut ip) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok().map(Mac),
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ip = Some(IpAddr::V4(*v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ip = Some(IpAddr::V6(*v6)),
            // Bridge entries have no address family of their own to say what the bytes are.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => ip = ip_of_bytes(bytes),
            _ => {}
        }
    }
    (mac, ip)
}

fn ip_of_bytes(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from))
        .ok()
}
