//! The built-in pod network: a bridge, an address per pod and family, host ports, masquerading.
//!
//! A pod is a veth pair between its namespace and the bridge. In a *routed* network (what `orlop node` uses) the pod's
//! address stands alone and everything goes through this machine, also to a neighbour on the same bridge: service
//! translation, policy and accounting then see both directions, without br_netfilter. Otherwise pods share the subnet
//! as the reference plugin has it.
//!
//! The MAC address and the host end's name are functions of pod address and sandbox, so nothing has to be remembered to
//! find them again, and an address that is used anew has the same MAC as before in everybody's neighbour table.
//!
//! State: the leases ([`lease`]) and what the kernel holds. The lease is taken first and released last, so whatever
//! exists can be found from it; attaching and detaching are serialised.

mod bridge;
mod egress;
mod hostport;
mod lease;
mod range;

pub use lease::{Assigned, LeaseError};
pub use range::{Range, RangeError, RangeSet};

use ipnet::IpNet;
use lease::{Holder, Lease, Leases};
use orlop_net::netns::{Netns, NetnsError};
use orlop_net::nft::{NftError, NftSocket};
use orlop_net::rtnl::{Far, Link, LinkKind, Mac, Near, Route, Rtnl, RtnlError, ignore_missing};
use orlop_net::sysctl::SysctlError;
use serde::{Deserialize, Serialize};
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use tokio::sync::Mutex;

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("no pod CIDR is known yet (the control plane assigns it to the node)")]
    NoPodCidr,
    #[error("interface name {0:?} is not one (1 to 15 characters, no slash, colon or space)")]
    InterfaceName(String),
    #[error("network name {0:?} cannot be a directory name")]
    NetworkName(String),
    #[error("link {name} exists and is not a bridge (delete it, or configure another bridge name)")]
    NotABridge { name: String },
    #[error("{name} does not exist in the pod's network namespace")]
    InterfaceMissing { name: String },
    #[error("{name} already exists in the pod's network namespace")]
    InterfaceExists { name: String },
    #[error("the pod lacks {what}")]
    Inconsistent { what: String },
    #[error("one of the host ports {ports} belongs to another pod")]
    PortTaken { ports: String, source: NftError },
    #[error("cannot read the identity of this boot")]
    BootId(#[source] std::io::Error),
    #[error(transparent)]
    Range(#[from] RangeError),
    #[error(transparent)]
    Lease(#[from] LeaseError),
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Rtnl(#[from] RtnlError),
    #[error(transparent)]
    Nft(#[from] NftError),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// All addresses of the machine if absent or unspecified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    pub host_port: u16,
    pub container_port: u16,
    pub protocol: Protocol,
}

impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(ip) = self.host_ip {
            write!(f, "{ip}:")?;
        }
        write!(f, "{}/{}", self.host_port, self.protocol)
    }
}

#[derive(Debug, Clone)]
pub struct Config {
    /// Leases lie in a directory of this name.
    pub name: String,
    pub state_dir: PathBuf,
    pub bridge: String,
    /// A pod gets one address of each; see [`PodNetwork::set_pod_cidrs`].
    pub ranges: Vec<RangeSet>,
    /// 1500 if absent.
    pub mtu: Option<u32>,
    pub hairpin: bool,
    /// Pods reach each other only through this machine's routing.
    pub routed: bool,
    /// The bridge has the gateways' addresses.
    pub gateway: bool,
    /// Pods have a default route.
    pub default_route: bool,
    /// Further destinations behind the gateway.
    pub routes: Vec<IpNet>,
    /// Masquerade what goes elsewhere than to these networks (and the pod CIDRs); not at all if absent.
    pub masquerade_outside: Option<Vec<IpNet>>,
}

impl Config {
    /// What `orlop node` uses; `cluster` are the CIDRs in which pod addresses are to be seen as they are.
    #[must_use]
    pub fn node(state_dir: PathBuf, cluster: Vec<IpNet>) -> Self {
        Self {
            name: "orlop".to_owned(),
            state_dir,
            bridge: "orlop0".to_owned(),
            ranges: Vec::new(),
            mtu: None,
            hairpin: true,
            routed: true,
            gateway: true,
            default_route: true,
            routes: Vec::new(),
            masquerade_outside: Some(cluster),
        }
    }
}

/// A sandbox that wants to be connected.
#[derive(Debug, Clone)]
pub struct Attach {
    pub sandbox_id: String,
    pub netns: PathBuf,
    pub ifname: String,
    pub port_mappings: Vec<PortMapping>,
    /// Addresses the pod wants to have, of any range set that contains them.
    pub requested_ips: Vec<IpAddr>,
    pub requested_mac: Option<Mac>,
}

impl Attach {
    #[must_use]
    pub fn new(sandbox_id: impl Into<String>, netns: impl Into<PathBuf>) -> Self {
        Self {
            sandbox_id: sandbox_id.into(),
            netns: netns.into(),
            ifname: "eth0".to_owned(),
            port_mappings: Vec::new(),
            requested_ips: Vec::new(),
            requested_mac: None,
        }
    }
}

/// What a pod got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// In the order of the range sets, with their gateways.
    pub addresses: Vec<Assigned>,
    pub mac: Mac,
    pub mtu: u32,
    pub bridge: Link,
    pub host_interface: String,
    pub host_mac: Option<Mac>,
}

impl Attachment {
    #[must_use]
    pub fn ips(&self) -> Vec<IpAddr> {
        self.addresses.iter().map(|assigned| assigned.address.addr()).collect()
    }
}

#[derive(Debug)]
struct State {
    ranges: Vec<RangeSet>,
    /// Set once the bridge, its addresses and the masquerading stand for these ranges.
    ready: Option<u32>,
    nft: NftSocket,
}

#[derive(Debug)]
pub struct PodNetwork {
    config: Config,
    rtnl: Rtnl,
    leases: Leases,
    state: Mutex<State>,
}

const DEFAULT_MTU: u32 = 1500;

/// All calls belong to the network namespace of the thread that opened the network, and run within a tokio runtime.
impl PodNetwork {
    /// Changes nothing in the kernel yet.
    ///
    /// # Errors
    /// [`NetworkError`]
    pub fn open(config: Config) -> Result<Self, NetworkError> {
        if config.name.is_empty() || config.name.starts_with('.') || config.name.contains('/') {
            return Err(NetworkError::NetworkName(config.name));
        }
        check_interface_name(&config.bridge)?;
        let boot =
            std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(NetworkError::BootId)?;
        let leases = Leases::open(config.state_dir.join(&config.name), boot.trim().to_owned())?;
        let state = State { ranges: config.ranges.clone(), ready: None, nft: NftSocket::open()? };
        Ok(Self { rtnl: Rtnl::open()?, leases, state: Mutex::new(state), config })
    }

    /// The node's pod CIDRs, one per family. Pods that have addresses of former ones keep them.
    ///
    /// # Errors
    /// [`NetworkError`]
    pub async fn set_pod_cidrs(&self, cidrs: &[IpNet]) -> Result<(), NetworkError> {
        let ranges = cidrs.iter().map(|net| RangeSet::of(*net)).collect::<Result<Vec<_>, _>>()?;
        let mut state = self.state.lock().await;
        if state.ranges != ranges {
            state.ranges = ranges;
            state.ready = None;
        }
        if !state.ranges.is_empty() {
            self.ensure_ready(&mut state).await?;
        }
        Ok(())
    }

    /// Connects a sandbox. A failure has undone what was done; if the call is abandoned, call [`Self::detach`].
    ///
    /// # Errors
    /// [`NetworkError`]
    pub async fn attach(&self, attach: &Attach) -> Result<Attachment, NetworkError> {
        check_interface_name(&attach.ifname)?;
        let mut state = self.state.lock().await;
        let bridge = self.ensure_ready(&mut state).await?;
        let namespace = Netns::open(&attach.netns)?;
        let holder =
            Holder { sandbox: &attach.sandbox_id, ifname: &attach.ifname, ports: &attach.port_mappings };
        let addresses = self.leases.acquire(&holder, &state.ranges, &attach.requested_ips)?;
        match self.connect(&mut state, attach, &namespace, bridge, addresses).await {
            Ok(attachment) => Ok(attachment),
            Err(error) => {
                if let Err(undo) = self.disconnect(&mut state, &attach.sandbox_id, Some(&attach.ifname)).await
                {
                    tracing::warn!(sandbox = attach.sandbox_id, error = %undo, "cannot undo a failed attachment");
                }
                Err(error)
            }
        }
    }

    async fn connect(
        &self,
        state: &mut State,
        attach: &Attach,
        namespace: &Netns,
        bridge: Link,
        addresses: Vec<Assigned>,
    ) -> Result<Attachment, NetworkError> {
        let host_interface = host_interface(&attach.sandbox_id, &attach.ifname);
        let mac = attach.requested_mac.unwrap_or_else(|| pod_mac(addresses[0].address.addr()));
        let mtu = self.config.mtu.unwrap_or(DEFAULT_MTU);
        let inside = Rtnl::open_in(namespace)?;
        if inside.link_by_name(&attach.ifname).await?.is_some() {
            return Err(NetworkError::InterfaceExists { name: attach.ifname.clone() });
        }
        let near = Near { name: &host_interface, mtu, bridge: Some(bridge.index) };
        let far = Far { name: &attach.ifname, namespace, mac: Some(mac) };
        self.rtnl.add_veth(&near, &far).await?;
        let host = self.rtnl.link_by_name(&host_interface).await?;
        let host = host.ok_or_else(|| NetworkError::InterfaceMissing { name: host_interface.clone() })?;
        if self.config.hairpin {
            self.rtnl.set_hairpin(host.index, true).await?;
        }
        self.configure_pod(&inside, &attach.ifname, namespace, &addresses).await?;
        if !attach.port_mappings.is_empty() {
            let ips: Vec<IpAddr> = addresses.iter().map(|a| a.address.addr()).collect();
            self.ensure_host_ports(state)?;
            hostport::add(&mut state.nft, &attach.port_mappings, &ips)?;
        }
        Ok(Attachment { addresses, mac, mtu, bridge, host_interface, host_mac: host.mac })
    }

    /// Loopback, addresses and routes of the pod's side.
    async fn configure_pod(
        &self,
        inside: &Rtnl,
        ifname: &str,
        namespace: &Netns,
        addresses: &[Assigned],
    ) -> Result<(), NetworkError> {
        if let Some(lo) = inside.link_by_name("lo").await?.filter(|lo| !lo.up) {
            inside.set_up(lo.index).await?;
        }
        let link = inside.link_by_name(ifname).await?;
        let link = link.ok_or_else(|| NetworkError::InterfaceMissing { name: ifname.to_owned() })?;
        if addresses.iter().any(|a| a.address.addr().is_ipv6()) {
            namespace.run(|| bridge::enable_ipv6(ifname))??;
        }
        inside.set_up(link.index).await?;
        for Assigned { address, gateway } in addresses {
            let own = if self.config.routed { IpNet::from(address.addr()) } else { *address };
            inside.add_address(link.index, own).await?;
            if self.config.routed {
                inside.replace_route(&Route::new(IpNet::from(*gateway), link.index)).await?;
            }
            let same_family = |net: &&IpNet| net.addr().is_ipv4() == gateway.is_ipv4();
            for dst in self.config.routes.iter().filter(same_family) {
                inside.replace_route(&Route::new(*dst, link.index).via(*gateway)).await?;
            }
            if self.config.default_route {
                inside.replace_route(&Route::default_via(*gateway, link.index)).await?;
            }
        }
        Ok(())
    }

    /// Disconnects all interfaces of a sandbox. Idempotent; its namespace may be gone.
    ///
    /// # Errors
    /// [`NetworkError`]; the leases then stay, so that it can be tried again.
    pub async fn detach(&self, sandbox_id: &str) -> Result<(), NetworkError> {
        let mut state = self.state.lock().await;
        self.disconnect(&mut state, sandbox_id, None).await
    }

    /// As [`Self::detach`], one interface only.
    ///
    /// # Errors
    /// [`NetworkError`]
    pub async fn detach_interface(&self, sandbox_id: &str, ifname: &str) -> Result<(), NetworkError> {
        let mut state = self.state.lock().await;
        self.disconnect(&mut state, sandbox_id, Some(ifname)).await
    }

    async fn disconnect(
        &self,
        state: &mut State,
        sandbox: &str,
        ifname: Option<&str>,
    ) -> Result<(), NetworkError> {
        let mut leases = self.leases.of(sandbox)?;
        leases.retain(|lease| ifname.is_none_or(|name| name == lease.ifname));
        self.drop_leases(state, &leases).await
    }

    /// Ports first, so that no connection reaches whoever has the address next; leases last.
    async fn drop_leases(&self, state: &mut State, leases: &[Lease]) -> Result<(), NetworkError> {
        let mut interfaces: HashMap<String, (Vec<IpAddr>, &[PortMapping])> = HashMap::new();
        for lease in leases {
            let name = host_interface(&lease.sandbox, &lease.ifname);
            interfaces.entry(name).or_insert_with(|| (Vec::new(), &lease.ports)).0.push(lease.address);
        }
        for (name, (ips, ports)) in interfaces {
            if !ports.is_empty() {
                hostport::remove(&mut state.nft, ports, &ips)?;
            }
            ignore_missing(self.rtnl.delete_link_by_name(&name).await)?;
        }
        for lease in leases {
            self.leases.release(lease)?;
        }
        Ok(())
    }

    /// Releases everything that belongs to none of these sandboxes, and what belongs to nobody at all.
    ///
    /// # Errors
    /// [`NetworkError`]
    pub async fn retain(&self, sandbox_ids: &[String]) -> Result<(), NetworkError> {
        let live: HashSet<&str> = sandbox_ids.iter().map(String::as_str).collect();
        self.retain_interfaces(|sandbox, _| live.contains(sandbox)).await
    }

    /// As [`Self::retain`], by sandbox and interface name.
    ///
    /// # Errors
    /// [`NetworkError`]
    pub async fn retain_interfaces(&self, is_live: impl Fn(&str, &str) -> bool) -> Result<(), NetworkError> {
        let mut state = self.state.lock().await;
        let (kept, doomed): (Vec<Lease>, Vec<Lease>) =
            self.leases.all()?.into_iter().partition(|lease| is_live(&lease.sandbox, &lease.ifname));
        self.drop_leases(&mut state, &doomed).await?;
        let pods: Vec<IpAddr> = kept.iter().map(|lease| lease.address).collect();
        let subnets: Vec<IpNet> = state.ranges.iter().flat_map(RangeSet::subnets).collect();
        hostport::retain(&mut state.nft, &subnets, &pods)?;
        self.restore_ports(&mut state, &kept)?;
        let Some(bridge) = self.rtnl.link_by_name(&self.config.bridge).await? else { return Ok(()) };
        let expected: HashSet<String> = kept.iter().map(|l| host_interface(&l.sandbox, &l.ifname)).collect();
        for link in self.rtnl.links().await? {
            let ours = link.controller == Some(bridge.index)
                && link.kind == LinkKind::Veth
                && link.name.starts_with(HOST_INTERFACE_PREFIX);
            if ours && !expected.contains(&link.name) {
                ignore_missing(self.rtnl.delete_link(link.index).await)?;
            }
        }
        Ok(())
    }

    /// For the case that somebody flushed the ruleset while we were away.
    fn restore_ports(&self, state: &mut State, leases: &[Lease]) -> Result<(), NetworkError> {
        let with_ports: Vec<&Lease> = leases.iter().filter(|lease| !lease.ports.is_empty()).collect();
        if !with_ports.is_empty() {
            self.ensure_host_ports(state)?;
        }
        for lease in with_ports {
            hostport::add(&mut state.nft, &lease.ports, &[lease.address])?;
        }
        Ok(())
    }

    /// Why no pod can be connected now, if so.
    ///
    /// # Errors
    /// [`NetworkError`]
    pub async fn status(&self) -> Result<(), NetworkError> {
        let mut state = self.state.lock().await;
        self.ensure_ready(&mut state).await?;
        let taken: HashSet<IpAddr> = self.leases.all()?.into_iter().map(|lease| lease.address).collect();
        for set in &state.ranges {
            if set.after(None).all(|assigned| taken.contains(&assigned.address.addr())) {
                return Err(LeaseError::Exhausted { ranges: set.to_string() }.into());
            }
        }
        Ok(())
    }

    /// Compares a connected sandbox with what it was given.
    ///
    /// # Errors
    /// [`NetworkError`]; the first thing that is missing.
    pub async fn check(&self, attach: &Attach, expected: &[IpNet]) -> Result<(), NetworkError> {
        let missing = |what: String| NetworkError::Inconsistent { what };
        let leases = self.leases.of(&attach.sandbox_id)?;
        let inside = Rtnl::open_in(&Netns::open(&attach.netns)?)?;
        let link = inside.link_by_name(&attach.ifname).await?;
        let link = link.ok_or_else(|| NetworkError::InterfaceMissing { name: attach.ifname.clone() })?;
        if !link.up {
            return Err(missing(format!("{}: it is down", attach.ifname)));
        }
        let present = inside.addresses(link.index).await?;
        for address in expected {
            if !leases.iter().any(|l| l.address == address.addr() && l.ifname == attach.ifname) {
                return Err(missing(format!("the lease of {}", address.addr())));
            }
            if !present.iter().any(|a| a.addr() == address.addr()) {
                return Err(missing(format!("address {address} on {}", attach.ifname)));
            }
        }
        if self.config.default_route
            && !inside.routes().await?.iter().any(|r| r.dst.prefix_len() == 0 && r.dev == link.index)
        {
            return Err(missing(format!("a default route on {}", attach.ifname)));
        }
        let host = host_interface(&attach.sandbox_id, &attach.ifname);
        let bridge = self.rtnl.link_by_name(&self.config.bridge).await?.map(|bridge| bridge.index);
        match self.rtnl.link_by_name(&host).await? {
            Some(link) if link.controller == bridge && bridge.is_some() => Ok(()),
            Some(_) => Err(missing(format!("its place on bridge {}", self.config.bridge))),
            None => Err(missing(format!("host interface {host}"))),
        }
    }

    fn ensure_host_ports(&self, state: &mut State) -> Result<(), NetworkError> {
        let subnets: Vec<IpNet> = state.ranges.iter().flat_map(RangeSet::subnets).collect();
        hostport::ensure_table(&mut state.nft)?;
        hostport::add_network(&mut state.nft, &self.config.bridge, &subnets)
    }
}

/// The rules for an interface name are the kernel's.
fn check_interface_name(name: &str) -> Result<(), NetworkError> {
    let forbidden = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if name.is_empty() || name.len() > 15 || name == "." || name == ".." || name.contains(forbidden) {
        return Err(NetworkError::InterfaceName(name.to_owned()));
    }
    Ok(())
}

const HOST_INTERFACE_PREFIX: &str = "veth";

/// The same for the same sandbox and interface in every release: it is how a detach finds what an attach made.
fn host_interface(sandbox: &str, ifname: &str) -> String {
    // FNV-1a, 64 bits.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in sandbox.bytes().chain([0]).chain(ifname.bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    format!("{HOST_INTERFACE_PREFIX}{:010x}", hash >> 24)
}

/// A locally administered MAC address that contains an IPv4 address, or the end of an IPv6 one.
fn pod_mac(ip: IpAddr) -> Mac {
    let [a, b, c, d] = match ip {
        IpAddr::V4(ip) => ip.octets(),
        IpAddr::V6(ip) => {
            let octets = ip.octets();
            [octets[12], octets[13], octets[14], octets[15]]
        }
    };
    Mac([0x0a, 0x58, a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_derive_from_sandbox_and_address() {
        let name = host_interface("0123456789abcdef", "eth0");
        assert_eq!(name, host_interface("0123456789abcdef", "eth0"));
        assert_ne!(name, host_interface("0123456789abcdef", "eth1"));
        assert!(check_interface_name(&name).is_ok());
        assert_eq!(pod_mac("10.244.1.5".parse().unwrap()).to_string(), "0a:58:0a:f4:01:05");
    }

    #[test]
    fn names_the_kernel_refuses_are_refused_first() {
        for bad in ["", ".", "..", "a/b", "a:b", "a b", "sixteen-letters-", "tab\t"] {
            assert!(check_interface_name(bad).is_err(), "{bad:?}");
        }
        assert!(check_interface_name("eth0").is_ok());
    }
}
