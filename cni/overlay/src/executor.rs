//! Reads what the kernel holds of the overlay, and carries out what a plan says about it.

use crate::config::{Config, NetConf};
use crate::plan::{Entries, Observed, ObservedDevice, Op, PeerRoute, Through, Underlay};
use ipnet::IpNet;
use orlop_net::rtnl::{FdbEntry, Link, LinkKind, Neighbour, Route, Rtnl, RtnlError, ignore_missing};
use orlop_net::sysctl::{self, SysctlError};
use std::net::{IpAddr, Ipv4Addr};

#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    #[error(transparent)]
    Rtnl(#[from] RtnlError),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    #[error("there is no interface {0}")]
    NoInterface(String),
    #[error("there is no IPv4 default route to tell the external interface (name one)")]
    NoDefaultRoute,
    #[error("interface {0} has no IPv4 address")]
    NoAddress(String),
    #[error("device {0} does not exist (it is to be made first)")]
    NoDevice(String),
}

/// Works in the network namespace in which it was made.
#[derive(Debug)]
pub struct Executor {
    rtnl: Rtnl,
    device: String,
    network: ipnet::Ipv4Net,
    direct_routing: bool,
}

impl Executor {
    /// # Errors
    /// [`ExecutorError::Rtnl`]
    pub fn new(conf: &NetConf) -> Result<Self, ExecutorError> {
        Ok(Self {
            rtnl: Rtnl::open()?,
            device: format!("flannel.{}", conf.vni),
            network: conf.network,
            direct_routing: conf.direct_routing,
        })
    }

    /// The link that is to carry the packets: as configured, or the one with the configured address, or that of the
    /// default route.
    ///
    /// # Errors
    /// [`ExecutorError`] when there is none.
    pub async fn underlay(&self, config: &Config) -> Result<Underlay, ExecutorError> {
        let link = match (&config.iface, config.public_ip) {
            (Some(name), _) => self.rtnl.link_by_name(name).await?,
            (None, Some(ip)) => match self.link_with(ip).await? {
                Some(link) => Some(link),
                None => self.default_link().await?,
            },
            (None, None) => self.default_link().await?,
        };
        let named = || config.iface.clone().map_or(ExecutorError::NoDefaultRoute, ExecutorError::NoInterface);
        let link = link.ok_or_else(named)?;
        let subnets = self.rtnl.addresses(link.index).await?;
        let v4 = |net: &IpNet| match net.addr() {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        };
        let configured = config.public_ip.filter(|ip| subnets.iter().any(|net| net.addr() == *ip));
        let local = match configured {
            Some(IpAddr::V4(ip)) => Some(ip),
            _ => subnets.iter().find_map(v4),
        };
        let local = local.ok_or_else(|| ExecutorError::NoAddress(link.name.clone()))?;
        Ok(Underlay { index: link.index, mtu: link.mtu, local, subnets })
    }

    async fn link_with(&self, ip: IpAddr) -> Result<Option<Link>, ExecutorError> {
        for link in self.rtnl.links().await? {
            if self.rtnl.addresses(link.index).await?.iter().any(|net| net.addr() == ip) {
                return Ok(Some(link));
            }
        }
        Ok(None)
    }

    async fn default_link(&self) -> Result<Option<Link>, ExecutorError> {
        let routes = self.rtnl.routes().await?;
        let defaults =
            routes.iter().filter(|route| route.dst.addr().is_ipv4() && route.dst.prefix_len() == 0);
        match defaults.min_by_key(|route| route.metric.unwrap_or(0)) {
            Some(route) => Ok(self.rtnl.link_by_index(route.dev).await?),
            None => Ok(None),
        }
    }

    /// The device's MAC address now, if there is a VXLAN device of our name.
    ///
    /// # Errors
    /// [`ExecutorError`]
    pub async fn present_mac(&self) -> Result<Option<orlop_net::rtnl::Mac>, ExecutorError> {
        let link = self.rtnl.link_by_name(&self.device).await?;
        Ok(link.filter(|link| matches!(link.kind, LinkKind::Vxlan(_))).and_then(|link| link.mac))
    }

    /// # Errors
    /// [`ExecutorError`]
    pub async fn observe(&self, underlay: &Underlay) -> Result<Observed, ExecutorError> {
        let mut observed = Observed::default();
        let device = self.rtnl.link_by_name(&self.device).await?;
        let device_index = device.as_ref().map(|link| link.index);
        if let Some(link) = device {
            let index = link.index;
            observed.device = Some(ObservedDevice {
                addresses: self.rtnl.addresses(index).await?,
                kind: link.kind,
                mac: link.mac,
                mtu: link.mtu,
                up: link.up,
            });
            let neighbours = self.rtnl.neighbours(index).await?;
            observed.entries.neighbours = neighbours
                .iter()
                .filter_map(|entry| match entry.ip {
                    IpAddr::V4(ip) => Some((ip, entry.mac)),
                    IpAddr::V6(_) => None,
                })
                .collect();
            let fdb = self.rtnl.fdb(index).await?;
            observed.entries.fdb = fdb.iter().map(|entry| (entry.mac, entry.remote)).collect();
        }
        self.observe_routes(underlay, device_index, &mut observed.entries).await?;
        Ok(observed)
    }

    /// Of the routes on the underlay, those into the overlay's network through a gateway are ours, if we make such.
    async fn observe_routes(
        &self,
        underlay: &Underlay,
        device: Option<u32>,
        entries: &mut Entries,
    ) -> Result<(), ExecutorError> {
        for route in self.rtnl.routes().await? {
            let (IpNet::V4(dst), Some(IpAddr::V4(via))) = (route.dst, route.via) else { continue };
            let through = if Some(route.dev) == device {
                Through::Overlay
            } else if self.direct_routing && route.dev == underlay.index && self.network.contains(&dst) {
                Through::Underlay
            } else {
                continue;
            };
            entries.routes.insert(PeerRoute { dst, via, through });
        }
        Ok(())
    }

    async fn device_index(&self) -> Result<u32, ExecutorError> {
        let link = self.rtnl.link_by_name(&self.device).await?;
        Ok(link.ok_or_else(|| ExecutorError::NoDevice(self.device.clone()))?.index)
    }

    /// # Errors
    /// [`ExecutorError`]; removing what is gone is not one.
    pub async fn apply(&self, op: &Op, underlay: &Underlay) -> Result<(), ExecutorError> {
        let rtnl = &self.rtnl;
        match op {
            Op::DeleteDevice => ignore_missing(rtnl.delete_link_by_name(&self.device).await)?,
            Op::CreateDevice(device) => {
                rtnl.add_vxlan(&device.name, &device.vxlan, device.mac, device.mtu).await?;
                if sysctl::read("net/ipv6/conf/all/forwarding").is_ok() {
                    sysctl::set(&format!("net/ipv6/conf/{}/accept_ra", device.name), "0")?;
                }
            }
            Op::DeleteRoute(route) => {
                // Without the device its routes are gone too.
                if route.through == Through::Underlay || rtnl.link_by_name(&self.device).await?.is_some() {
                    ignore_missing(rtnl.delete_route(&self.route(route, underlay).await?).await)?;
                }
            }
            Op::AddRoute(route) => rtnl.replace_route(&self.route(route, underlay).await?).await?,
            within => self.apply_to_device(within, self.device_index().await?).await?,
        }
        Ok(())
    }

    async fn apply_to_device(&self, op: &Op, dev: u32) -> Result<(), RtnlError> {
        let rtnl = &self.rtnl;
        let neighbour = |ip: Ipv4Addr, mac| Neighbour { dev, ip: ip.into(), mac };
        match op {
            Op::SetMac(mac) => rtnl.set_mac(dev, *mac).await,
            Op::SetMtu(mtu) => rtnl.set_mtu(dev, *mtu).await,
            Op::SetUp => rtnl.set_up(dev).await,
            Op::AddAddress(address) => rtnl.add_address(dev, *address).await,
            Op::DeleteAddress(address) => ignore_missing(rtnl.delete_address(dev, *address).await),
            Op::AddNeighbour(ip, mac) => rtnl.replace_neighbour(&neighbour(*ip, *mac)).await,
            Op::DeleteNeighbour(ip, mac) => {
                ignore_missing(rtnl.delete_neighbour(&neighbour(*ip, *mac)).await)
            }
            Op::AddFdb(mac, remote) => rtnl.replace_fdb(&FdbEntry { dev, mac: *mac, remote: *remote }).await,
            Op::DeleteFdb(mac, remote) => {
                ignore_missing(rtnl.delete_fdb(&FdbEntry { dev, mac: *mac, remote: *remote }).await)
            }
            Op::DeleteDevice | Op::CreateDevice(_) | Op::DeleteRoute(_) | Op::AddRoute(_) => Ok(()),
        }
    }

    async fn route(&self, route: &PeerRoute, underlay: &Underlay) -> Result<Route, ExecutorError> {
        let via = route.via.into();
        Ok(match route.through {
            Through::Overlay => Route::new(route.dst.into(), self.device_index().await?).via(via).onlink(),
            Through::Underlay => Route::new(route.dst.into(), underlay.index).via(via),
        })
    }
}
