//! The bridge and the kernel switches around it.

use super::{NetworkError, PodNetwork, RangeSet, State, egress, pod_mac};
use ipnet::IpNet;
use orlop_net::rtnl::{Link, LinkKind};
use orlop_net::sysctl::{self, SysctlError};
use std::path::Path;

impl PodNetwork {
    /// The bridge with its addresses, forwarding and masquerading. Cheap when all of it stands.
    pub(super) async fn ensure_ready(&self, state: &mut State) -> Result<Link, NetworkError> {
        if state.ranges.is_empty() {
            return Err(NetworkError::NoPodCidr);
        }
        let bridge = self.ensure_bridge(state).await?;
        if state.ready == Some(bridge.index) {
            return Ok(bridge);
        }
        let gateways: Vec<IpNet> = state.ranges.iter().flat_map(RangeSet::gateways).collect();
        if self.config.gateway {
            let present = self.rtnl.addresses(bridge.index).await?;
            for gateway in gateways.iter().filter(|gateway| !present.contains(gateway)) {
                self.rtnl.add_address(bridge.index, *gateway).await?;
            }
            // The guard stands before the switch it guards against.
            self.ensure_host_ports(state)?;
            set_switches(&bridge.name, gateways.iter().any(|g| g.addr().is_ipv6()))?;
        }
        if let Some(inside) = &self.config.masquerade_outside {
            let pods: Vec<IpNet> = state.ranges.iter().flat_map(RangeSet::subnets).collect();
            let inside: Vec<IpNet> = inside.iter().chain(&pods).copied().collect();
            egress::apply(&mut state.nft, &self.config.name, &pods, &inside)?;
        }
        state.ready = Some(bridge.index);
        Ok(bridge)
    }

    async fn ensure_bridge(&self, state: &State) -> Result<Link, NetworkError> {
        let name = &self.config.bridge;
        let found = match self.rtnl.link_by_name(name).await? {
            Some(link) => Some(link),
            None => {
                let gateway = state.ranges.iter().flat_map(RangeSet::gateways).next();
                let mac = pod_mac(gateway.ok_or(NetworkError::NoPodCidr)?.addr());
                match self.rtnl.add_bridge(name, mac, self.config.mtu).await {
                    // Another process was faster.
                    Err(error) if error.is_exists() => {}
                    other => other?,
                }
                self.rtnl.link_by_name(name).await?
            }
        };
        let link = found.ok_or_else(|| NetworkError::InterfaceMissing { name: name.clone() })?;
        if link.kind != LinkKind::Bridge {
            return Err(NetworkError::NotABridge { name: name.clone() });
        }
        if !link.up {
            self.rtnl.set_up(link.index).await?;
        }
        Ok(link)
    }
}

fn set_switches(bridge: &str, ipv6: bool) -> Result<(), SysctlError> {
    sysctl::set("net/ipv4/ip_forward", "1")?;
    // For host ports on 127.0.0.1; what pods could do with it is dropped by the host port table's guard.
    sysctl::set(&format!("net/ipv4/conf/{bridge}/route_localnet"), "1")?;
    // Pods would be told to talk to each other past this machine. The kernel obeys whichever of the two says yes.
    sysctl::set("net/ipv4/conf/all/send_redirects", "0")?;
    sysctl::set(&format!("net/ipv4/conf/{bridge}/send_redirects"), "0")?;
    if ipv6 {
        enable_ipv6(bridge)?;
        sysctl::set("net/ipv6/conf/all/forwarding", "1")?;
        sysctl::set(&format!("net/ipv6/conf/{bridge}/accept_ra"), "0")?;
    }
    Ok(())
}

/// In the calling thread's namespace.
pub(super) fn enable_ipv6(link: &str) -> Result<(), SysctlError> {
    if Path::new("/proc/sys/net/ipv6").exists() {
        sysctl::set(&format!("net/ipv6/conf/{link}/disable_ipv6"), "0")?;
        // Until a link-local address has been checked for duplicates, no neighbour can be asked for: a second lost.
        sysctl::set(&format!("net/ipv6/conf/{link}/accept_dad"), "0")?;
        sysctl::set(&format!("net/ipv6/conf/{link}/dad_transmits"), "0")?;
    }
    Ok(())
}
