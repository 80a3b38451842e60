//! Addresses of links.

use super::{Rtnl, RtnlError};
use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use std::net::IpAddr;

impl Rtnl {
    /// The addresses of a link, each with the length of its prefix.
    ///
    /// # Errors
    /// [`RtnlError`]
    pub async fn addresses(&self, index: u32) -> Result<Vec<IpNet>, RtnlError> {
        let messages: Vec<AddressMessage> =
            self.handle.address().get().set_link_index_filter(index).execute().try_collect().await.map_err(
                |error| RtnlError::new(|| format!("list addresses of link with index {index}"), error),
            )?;
        Ok(messages.iter().filter_map(local_address).collect())
    }

    /// An IPv6 address is usable at once: duplicate address detection would keep a pod waiting for a second.
    ///
    /// # Errors
    /// [`RtnlError`]; an address that is there already with the same prefix is not one.
    pub async fn add_address(&self, index: u32, address: IpNet) -> Result<(), RtnlError> {
        let mut request = self.handle.address().add(index, address.addr(), address.prefix_len()).replace();
        if address.addr().is_ipv6() {
            let message = request.message_mut();
            message.header.flags = AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        let added = request.execute().await;
        added.map_err(|error| {
            RtnlError::new(|| format!("add address {address} to link with index {index}"), error)
        })
    }

    /// # Errors
    /// [`RtnlError`]; [`super::ignore_missing`] makes it idempotent.
    pub async fn delete_address(&self, index: u32, address: IpNet) -> Result<(), RtnlError> {
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.prefix_len = address.prefix_len();
        message.header.scope = AddressScope::Universe;
        message.header.family = match address.addr() {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        message.attributes.push(AddressAttribute::Local(address.addr()));
        let deleted = self.handle.address().del(message).execute().await;
        deleted.map_err(|error| {
            RtnlError::new(|| format!("delete address {address} of link with index {index}"), error)
        })
    }
}

/// IPv4 links carry their own address as "local" (the other is a peer's), IPv6 ones as "address".
fn local_address(message: &AddressMessage) -> Option<IpNet> {
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => address = Some(*ip),
            AddressAttribute::Address(ip) if address.is_none() => address = Some(*ip),
            _ => {}
        }
    }
    IpNet::new(address?, message.header.prefix_len).ok()
}
