//! Routes of the main table.

use super::{Rtnl, RtnlError};
use futures_util::TryStreamExt;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A unicast route of the main table.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Route {
    pub dst: IpNet,
    pub via: Option<IpAddr>,
    /// Index of the link.
    pub dev: u32,
    /// The gateway is reachable on the link although no address of ours says so.
    pub onlink: bool,
    pub metric: Option<u32>,
}

impl Route {
    #[must_use]
    pub fn new(dst: IpNet, dev: u32) -> Self {
        Self { dst, via: None, dev, onlink: false, metric: None }
    }

    #[must_use]
    pub fn via(mut self, gateway: IpAddr) -> Self {
        self.via = Some(gateway);
        self
    }

    #[must_use]
    pub fn onlink(mut self) -> Self {
        self.onlink = true;
        self
    }

    /// To everywhere.
    #[must_use]
    pub fn default_via(gateway: IpAddr, dev: u32) -> Self {
        let everywhere = match gateway {
            IpAddr::V4(_) => IpNet::V4(Ipv4Net::default()),
            IpAddr::V6(_) => IpNet::V6(Ipv6Net::default()),
        };
        Self::new(everywhere, dev).via(gateway)
    }

    fn message(&self) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = family(self.dst.addr());
        message.header.destination_prefix_length = self.dst.prefix_len();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.kind = RouteType::Unicast;
        message.header.scope = if self.via.is_some() || self.dst.addr().is_ipv6() {
            RouteScope::Universe
        } else {
            RouteScope::Link
        };
        if self.onlink {
            message.header.flags = RouteFlags::Onlink;
        }
        if self.dst.prefix_len() > 0 {
            message.attributes.push(RouteAttribute::Destination(self.dst.network().into()));
        }
        message.attributes.push(RouteAttribute::Oif(self.dev));
        message.attributes.extend(self.via.map(|ip| RouteAttribute::Gateway(ip.into())));
        message.attributes.extend(self.metric.map(RouteAttribute::Priority));
        message
    }

    /// `None` for routes with several next hops and for other kinds and tables.
    fn parse(message: &RouteMessage) -> Option<Self> {
        let header = &message.header;
        if header.kind != RouteType::Unicast || header.table != RouteHeader::RT_TABLE_MAIN {
            return None;
        }
        let unspecified: IpAddr = match header.address_family {
            AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
            AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        };
        let (mut dst, mut via, mut dev, mut metric) = (unspecified, None, None, None);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => dst = ip_of(address)?,
                RouteAttribute::Gateway(address) => via = ip_of(address),
                RouteAttribute::Oif(index) => dev = Some(*index),
                RouteAttribute::Priority(value) => metric = Some(*value).filter(|v| *v != 0),
                _ => {}
            }
        }
        Some(Self {
            dst: IpNet::new(dst, header.destination_prefix_length).ok()?,
            via,
            dev: dev?,
            onlink: header.flags.contains(RouteFlags::Onlink),
            metric,
        })
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.dst)?;
        if let Some(gateway) = self.via {
            write!(f, " via {gateway}")?;
        }
        write!(f, " on link with index {}", self.dev)
    }
}

/// How the kernel would send a packet to an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteTo {
    pub dev: u32,
    pub gateway: Option<IpAddr>,
    pub source: Option<IpAddr>,
}

impl Rtnl {
    /// Replaces a route to the same destination with the same metric.
    ///
    /// # Errors
    /// [`RtnlError`]
    pub async fn replace_route(&self, route: &Route) -> Result<(), RtnlError> {
        let added = self.handle.route().add(route.message()).replace().execute().await;
        added.map_err(|error| RtnlError::new(|| format!("add route {route}"), error))
    }

    /// # Errors
    /// [`RtnlError`]; [`super::ignore_missing`] makes it idempotent.
    pub async fn delete_route(&self, route: &Route) -> Result<(), RtnlError> {
        let deleted = self.handle.route().del(route.message()).execute().await;
        deleted.map_err(|error| RtnlError::new(|| format!("delete route {route}"), error))
    }

    /// The unicast routes of the main table, of both families.
    ///
    /// # Errors
    /// [`RtnlError`]
    pub async fn routes(&self) -> Result<Vec<Route>, RtnlError> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut query = RouteMessage::default();
            query.header.address_family = family;
            let found: Vec<RouteMessage> = self
                .handle
                .route()
                .get(query)
                .execute()
                .try_collect()
                .await
                .map_err(|error| RtnlError::new(|| "list routes".to_owned(), error))?;
            routes.extend(found.iter().filter_map(Route::parse));
        }
        Ok(routes)
    }

    /// `None` when there is no route.
    ///
    /// # Errors
    /// [`RtnlError`]
    pub async fn route_to(&self, ip: IpAddr) -> Result<Option<RouteTo>, RtnlError> {
        let mut query = RouteMessage::default();
        query.header.address_family = family(ip);
        query.header.destination_prefix_length = if ip.is_ipv4() { 32 } else { 128 };
        query.attributes.push(RouteAttribute::Destination(ip.into()));
        let mut answers = Box::pin(self.handle.route().get(query).execute());
        let message = match answers.try_next().await {
            Ok(message) => message,
            Err(error) => match RtnlError::new(|| format!("look up the route to {ip}"), error) {
                error if error.errno() == Some(rustix::io::Errno::NETUNREACH) => return Ok(None),
                error => return Err(error),
            },
        };
        Ok(message.and_then(|message| {
            let find = |pick: fn(&RouteAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(pick);
            let dev = message.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            })?;
            let gateway = find(|a| if let RouteAttribute::Gateway(ip) = a { ip_of(ip) } else { None });
            let source = find(|a| if let RouteAttribute::PrefSource(ip) = a { ip_of(ip) } else { None });
            Some(RouteTo { dev, gateway, source })
        }))
    }
}

const fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}
