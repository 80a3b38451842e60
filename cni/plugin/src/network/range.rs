//! Which addresses may be handed out.

use super::lease::Assigned;
use ipnet::IpNet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    #[error("subnet {0} is too small for a gateway and a pod")]
    TooSmall(IpNet),
    #[error("{address} is not an address of subnet {subnet}")]
    Outside { address: IpAddr, subnet: IpNet },
    #[error("range start {first} lies after range end {last}")]
    Reversed { first: IpAddr, last: IpAddr },
}

/// Addresses from `first` to `last`, without the gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    subnet: IpNet,
    first: IpAddr,
    last: IpAddr,
    gateway: IpAddr,
}

impl Range {
    /// Without limits of its own a range is all of the subnet but its first address, the gateway's, and in IPv4 the
    /// broadcast address.
    ///
    /// # Errors
    /// [`RangeError`]
    pub fn new(
        subnet: IpNet,
        first: Option<IpAddr>,
        last: Option<IpAddr>,
        gateway: Option<IpAddr>,
    ) -> Result<Self, RangeError> {
        let subnet = subnet.trunc();
        if subnet.max_prefix_len() - subnet.prefix_len() < 2 {
            return Err(RangeError::TooSmall(subnet));
        }
        let base = number(subnet.network());
        let end = number(subnet.broadcast()) - u128::from(subnet.addr().is_ipv4());
        let like = subnet.addr();
        let range = Self {
            subnet,
            first: first.unwrap_or_else(|| address(base + 1, like)),
            last: last.unwrap_or_else(|| address(end, like)),
            gateway: gateway.unwrap_or_else(|| address(base + 1, like)),
        };
        for ip in [range.first, range.last] {
            if !subnet.contains(&ip) || number(ip) == base || number(ip) > end {
                return Err(RangeError::Outside { address: ip, subnet });
            }
        }
        if number(range.first) > number(range.last) {
            return Err(RangeError::Reversed { first: range.first, last: range.last });
        }
        Ok(range)
    }

    fn contains(&self, ip: IpAddr) -> bool {
        self.subnet.contains(&ip) && (number(self.first)..=number(self.last)).contains(&number(ip))
    }
}

/// Alternatives, of which a pod gets one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeSet(pub Vec<Range>);

impl RangeSet {
    /// All of a subnet.
    ///
    /// # Errors
    /// [`RangeError::TooSmall`]
    pub fn of(subnet: IpNet) -> Result<Self, RangeError> {
        Ok(Self(vec![Range::new(subnet, None, None, None)?]))
    }

    /// Subnets and their gateways.
    pub fn gateways(&self) -> impl Iterator<Item = IpNet> {
        self.0.iter().filter_map(|range| IpNet::new(range.gateway, range.subnet.prefix_len()).ok())
    }

    pub fn subnets(&self) -> impl Iterator<Item = IpNet> {
        self.0.iter().map(|range| range.subnet)
    }

    pub(super) fn contains(&self, ip: IpAddr) -> bool {
        self.0.iter().any(|range| range.contains(ip))
    }

    pub(super) fn assigned(&self, ip: IpAddr) -> Option<Assigned> {
        let range = self.0.iter().find(|range| range.contains(ip) && range.gateway != ip)?;
        Some(Assigned { address: IpNet::new(ip, range.subnet.prefix_len()).ok()?, gateway: range.gateway })
    }

    /// Every address once, beginning after `last`.
    pub(super) fn after(&self, last: Option<IpAddr>) -> impl Iterator<Item = Assigned> {
        let start =
            last.and_then(|ip| self.0.iter().position(|range| range.contains(ip)).map(|at| (at, number(ip))));
        let (at, split) = start.unwrap_or((0, 0));
        let tail = self.0.get(at).map(|r| (at, (split + 1).max(number(r.first))..=number(r.last)));
        let head = self.0.get(at).map(|r| (at, number(r.first)..=split.min(number(r.last))));
        let others = (at + 1..self.0.len()).chain(0..at);
        let others = others.map(|i| (i, number(self.0[i].first)..=number(self.0[i].last)));
        tail.into_iter().chain(others).chain(head).flat_map(move |(index, numbers)| {
            let range = &self.0[index];
            numbers.map(move |n| address(n, range.gateway)).filter(move |ip| *ip != range.gateway).filter_map(
                move |ip| {
                    let address = IpNet::new(ip, range.subnet.prefix_len()).ok()?;
                    Some(Assigned { address, gateway: range.gateway })
                },
            )
        })
    }
}

impl fmt::Display for RangeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, range) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{} to {} in {}", range.first, range.last, range.subnet)?;
        }
        Ok(())
    }
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(u32::from(ip)),
        IpAddr::V6(ip) => ip.into(),
    }
}

/// Back to an address of the family of `like`.
fn address(number: u128, like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::from(u32::try_from(number).unwrap_or(u32::MAX)).into(),
        IpAddr::V6(_) => Ipv6Addr::from(number).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(set: &RangeSet, last: Option<&str>) -> Vec<String> {
        set.after(last.map(|ip| ip.parse().unwrap())).map(|a| a.address.addr().to_string()).collect()
    }

    #[test]
    fn a_walk_visits_every_address_once_from_anywhere() {
        let set = RangeSet::of("10.0.0.0/29".parse().unwrap()).unwrap();
        assert_eq!(walk(&set, None), ["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"]);
        assert_eq!(
            walk(&set, Some("10.0.0.4")),
            ["10.0.0.5", "10.0.0.6", "10.0.0.2", "10.0.0.3", "10.0.0.4"]
        );
        assert_eq!(walk(&set, Some("10.9.9.9")).len(), 5);
    }

    #[test]
    fn a_set_of_two_ranges_is_one_ring() {
        let range = |first: &str, last: &str| {
            let (first, last) = (first.parse().unwrap(), last.parse().unwrap());
            Range::new("10.0.0.0/24".parse().unwrap(), Some(first), Some(last), None).unwrap()
        };
        let set = RangeSet(vec![range("10.0.0.10", "10.0.0.11"), range("10.0.0.20", "10.0.0.21")]);
        assert_eq!(walk(&set, Some("10.0.0.20")), ["10.0.0.21", "10.0.0.10", "10.0.0.11", "10.0.0.20"]);
        assert_eq!(walk(&set, Some("10.0.0.10")), ["10.0.0.11", "10.0.0.20", "10.0.0.21", "10.0.0.10"]);
    }

    #[test]
    fn impossible_ranges_are_refused() {
        let subnet: IpNet = "10.0.0.0/24".parse().unwrap();
        let at = |text: &str| Some(text.parse::<IpAddr>().unwrap());
        assert!(matches!(
            Range::new("10.0.0.0/31".parse().unwrap(), None, None, None),
            Err(RangeError::TooSmall(_))
        ));
        for outside in ["10.0.1.1", "10.0.0.0", "10.0.0.255"] {
            assert!(
                matches!(Range::new(subnet, at(outside), None, None), Err(RangeError::Outside { .. })),
                "{outside}"
            );
        }
        assert!(matches!(
            Range::new(subnet, at("10.0.0.9"), at("10.0.0.8"), None),
            Err(RangeError::Reversed { .. })
        ));
        let gateway = Range::new(subnet, None, None, at("10.0.0.254")).unwrap();
        let set = RangeSet(vec![gateway]);
        assert!(!walk(&set, None).contains(&"10.0.0.254".to_owned()));
        assert!(walk(&set, None).contains(&"10.0.0.1".to_owned()));
    }

    #[test]
    fn a_large_ipv6_subnet_costs_nothing() {
        let set = RangeSet::of("fd00:1:2::/64".parse().unwrap()).unwrap();
        assert_eq!(set.after(None).next().unwrap().address, "fd00:1:2::2/64".parse().unwrap());
    }
}
