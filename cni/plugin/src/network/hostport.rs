//! Host ports: connections to a port of this machine go to a pod.
//!
//! One nftables table, whose rules never change. A port is one map element; two pods that want the same port make the
//! kernel refuse the second. Only connections to addresses of this machine are looked up. What comes from loopback or
//! from a pod of this machine is masqueraded on its way back in, because its answer would not pass here otherwise.

use super::{NetworkError, PortMapping, Protocol};
use ipnet::IpNet;
use orlop_net::nft::{
    Batch, Chain, ChainType, Element, ElementData, Expr, Family, FieldType, Hook, IpFamily, MetaKey, NatKind,
    NftSocket, Reg, Rule, Set, Table, Value, Verdict, matches, priority,
};
use std::net::IpAddr;

/// The mark of connections that need masquerading; the bit is the one CNI's own port mapper uses.
const MARK: u32 = 0x2000;
/// Kept with the table; another one there means rules of another release.
const VERSION: &str = "host ports, version 1";

pub(super) fn table() -> Table {
    Table::new(Family::Inet, "orlop-hostport")
}

const fn suffix(family: IpFamily) -> &'static str {
    match family {
        IpFamily::V4 => "4",
        IpFamily::V6 => "6",
    }
}

const fn address_type(family: IpFamily) -> FieldType {
    match family {
        IpFamily::V4 => FieldType::Ipv4Addr,
        IpFamily::V6 => FieldType::Ipv6Addr,
    }
}

/// The number of register slots of an address.
const fn slots(family: IpFamily) -> u8 {
    match family {
        IpFamily::V4 => 1,
        IpFamily::V6 => 4,
    }
}

fn name(map: &str, family: IpFamily) -> String {
    format!("{map}{}", suffix(family))
}

/// The rules, unless the table has them already.
pub(super) fn ensure_table(nft: &mut NftSocket) -> Result<(), NetworkError> {
    let table = table();
    let existing = nft.tables()?.into_iter().find(|info| info.table == table);
    if existing.is_some_and(|info| info.comment.as_deref() == Some(VERSION)) {
        return Ok(());
    }
    Ok(nft.commit(&rules(&table))?)
}

fn rules(table: &Table) -> Batch {
    let mut batch = Batch::new();
    batch.destroy_table(table);
    batch.add_table_with_comment(table, VERSION);
    for family in [IpFamily::V4, IpFamily::V6] {
        let address = address_type(family);
        let port = [FieldType::InetProto, FieldType::InetService];
        let with_ip = [address, FieldType::InetProto, FieldType::InetService];
        let target = [address, FieldType::InetService];
        batch.add_set(table, Set::map(name("ports", family), &port, &target));
        batch.add_set(table, Set::map(name("ip-ports", family), &with_ip, &target));
        batch.add_set(table, Set::new(name("local-sources", family), &[address]).interval());
    }
    batch.add_chain(table, Chain::base("prerouting", ChainType::Nat, Hook::Prerouting, priority::DSTNAT));
    batch.add_chain(table, Chain::base("output", ChainType::Nat, Hook::Output, priority::DSTNAT));
    batch.add_chain(table, Chain::base("postrouting", ChainType::Nat, Hook::Postrouting, priority::SRCNAT));
    batch.add_chain(table, Chain::base("guard", ChainType::Filter, Hook::Prerouting, priority::RAW));
    batch.add_set(table, Set::new("bridges", &[FieldType::IfName]));
    batch.add_chain(table, Chain::regular("ports"));
    for hook in ["prerouting", "output"] {
        let to_us = Rule::new().with(matches::daddr_is_local()).verdict(Verdict::Jump("ports".to_owned()));
        batch.add_rule(table, hook, to_us);
    }
    for family in [IpFamily::V4, IpFamily::V6] {
        for (map, with_ip) in [("ip-ports", true), ("ports", false)] {
            for local_source in [true, false] {
                batch.add_rule(table, "ports", translation(family, map, with_ip, local_source));
            }
        }
    }
    let marked = Rule::new().with(matches::mark(MARK, MARK)).expr(Expr::Masquerade { flags: 0 });
    batch.add_rule(table, "postrouting", marked);
    batch.add_rule(table, "guard", guard());
    batch
}

/// Looks a port up and goes there; for local sources after marking.
fn translation(family: IpFamily, map: &str, with_ip: bool, local_source: bool) -> Rule {
    let mut key = 0;
    let mut rule = Rule::new().with(matches::family(family));
    if local_source {
        rule = rule.expr(Expr::saddr(family, Reg(0))).expr(Expr::Lookup {
            set: name("local-sources", family),
            sreg: Reg(0),
            inverted: false,
        });
    }
    if with_ip {
        rule = rule.expr(Expr::daddr(family, Reg(key)));
        key += slots(family);
    }
    rule = rule
        .expr(Expr::meta(MetaKey::L4Proto, Reg(key)))
        .expr(Expr::dport(Reg(key + 1)))
        .expr(Expr::LookupMap { map: name(map, family), sreg: Reg(0), dreg: Reg(8) });
    if local_source {
        rule = rule.with(matches::set_mark_bits(MARK));
    }
    rule.expr(Expr::Nat {
        kind: NatKind::Dnat,
        family,
        addr: Some(Reg(8)),
        port: Some(Reg(8 + slots(family))),
        flags: 0,
    })
}

/// The bridges accept loopback addresses so that 127.0.0.1 works; pods must not profit from it.
fn guard() -> Rule {
    let loopback = IpNet::V4(ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::new(127, 0, 0, 0), 8));
    Rule::new()
        .expr(Expr::meta(MetaKey::IifName, Reg(0)))
        .expr(Expr::Lookup { set: "bridges".to_owned(), sreg: Reg(0), inverted: false })
        .with(matches::family(IpFamily::V4))
        .with(matches::daddr(loopback))
        .verdict(Verdict::Drop)
}

/// Makes the table know a bridge and the addresses of its pods.
pub(super) fn add_network(nft: &mut NftSocket, bridge: &str, subnets: &[IpNet]) -> Result<(), NetworkError> {
    let table = table();
    let mut batch = Batch::new();
    batch.add_elements(&table, "bridges", vec![Element::new(Value::new().ifname(bridge))]);
    let loopback = ["127.0.0.0/8", "::1/128"].iter().filter_map(|net| net.parse().ok());
    for net in loopback.chain(subnets.iter().copied()) {
        let set = name("local-sources", IpFamily::of(net.addr()));
        batch.add_elements(&table, &set, vec![Element::net(net)]);
    }
    Ok(nft.commit(&batch)?)
}

const fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

/// The map element of a port for a pod address, if they are of one family.
fn element(port: &PortMapping, pod: IpAddr) -> Option<(String, Element)> {
    let family = IpFamily::of(pod);
    let target = Value::of_ip(pod).port(port.container_port);
    let protocol = protocol_number(port.protocol);
    match port.host_ip.filter(|ip| !ip.is_unspecified()) {
        None => {
            // 0.0.0.0 and :: mean every address of their own family.
            let same = port.host_ip.is_none_or(|ip| IpFamily::of(ip) == family);
            let key = Value::new().proto(protocol).port(port.host_port);
            same.then(|| (name("ports", family), Element::new(key).data(target)))
        }
        Some(ip) if IpFamily::of(ip) == family => {
            let key = Value::of_ip(ip).proto(protocol).port(port.host_port);
            Some((name("ip-ports", family), Element::new(key).data(target)))
        }
        Some(_) => None,
    }
}

fn elements<'a>(
    ports: &'a [PortMapping],
    pods: &'a [IpAddr],
) -> impl Iterator<Item = (String, Element)> + 'a {
    ports.iter().flat_map(move |port| pods.iter().filter_map(move |pod| element(port, *pod)))
}

/// All or none.
pub(super) fn add(nft: &mut NftSocket, ports: &[PortMapping], pods: &[IpAddr]) -> Result<(), NetworkError> {
    let table = table();
    let mut batch = Batch::new();
    for (map, element) in elements(ports, pods) {
        batch.add_elements(&table, &map, vec![element]);
    }
    nft.commit(&batch).map_err(|error| {
        if error.is_exists() {
            NetworkError::PortTaken { ports: describe(ports), source: error }
        } else {
            error.into()
        }
    })
}

fn describe(ports: &[PortMapping]) -> String {
    let texts: Vec<String> = ports.iter().map(ToString::to_string).collect();
    texts.join(", ")
}

/// Those that still lead to these pods; what is gone, or another pod's by now, is left alone.
pub(super) fn remove(
    nft: &mut NftSocket,
    ports: &[PortMapping],
    pods: &[IpAddr],
) -> Result<(), NetworkError> {
    let wanted: Vec<(String, Element)> = elements(ports, pods).collect();
    remove_if(nft, |map, element| {
        wanted.iter().any(|(m, e)| m == map && e.key == element.key && e.data == element.data)
    })
}

/// All ports that lead to none of these pods.
pub(super) fn retain(nft: &mut NftSocket, subnets: &[IpNet], pods: &[IpAddr]) -> Result<(), NetworkError> {
    remove_if(nft, |_, element| {
        let target = target(element);
        target.is_some_and(|ip| subnets.iter().any(|net| net.contains(&ip)) && !pods.contains(&ip))
    })
}

fn target(element: &Element) -> Option<IpAddr> {
    let Some(ElementData::Value(value)) = &element.data else { return None };
    match value.as_bytes() {
        bytes @ [_, _, _, _, _, _, _, _] => <[u8; 4]>::try_from(&bytes[..4]).ok().map(IpAddr::from),
        bytes => <[u8; 16]>::try_from(bytes.get(..16)?).ok().map(IpAddr::from),
    }
}

fn remove_if(nft: &mut NftSocket, doomed: impl Fn(&str, &Element) -> bool) -> Result<(), NetworkError> {
    let table = table();
    let mut batch = Batch::new();
    for family in [IpFamily::V4, IpFamily::V6] {
        for map in [name("ports", family), name("ip-ports", family)] {
            let found = match nft.elements(&table, &map) {
                Ok(found) => found,
                // Without the table there is nothing to remove.
                Err(error) if error.is_not_found() => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let doomed: Vec<Element> = found.into_iter().filter(|element| doomed(&map, element)).collect();
            batch.delete_elements(&table, &map, doomed);
        }
    }
    Ok(nft.commit(&batch)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(host_ip: Option<&str>) -> PortMapping {
        PortMapping {
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
            host_port: 8080,
            container_port: 80,
            protocol: Protocol::Tcp,
        }
    }

    #[test]
    fn a_port_becomes_an_element_of_the_map_for_its_address_and_family() {
        let pod4: IpAddr = "10.0.0.2".parse().unwrap();
        let pod6: IpAddr = "fd00::2".parse().unwrap();
        let map = |host_ip, pod| element(&port(host_ip), pod).map(|(map, _)| map);
        assert_eq!(map(None, pod4).as_deref(), Some("ports4"));
        assert_eq!(map(None, pod6).as_deref(), Some("ports6"));
        assert_eq!(map(Some("0.0.0.0"), pod4).as_deref(), Some("ports4"));
        assert_eq!(map(Some("0.0.0.0"), pod6), None);
        assert_eq!(map(Some("192.0.2.1"), pod4).as_deref(), Some("ip-ports4"));
        assert_eq!(map(Some("192.0.2.1"), pod6), None);
    }

    #[test]
    fn the_target_of_an_element_is_read_back() {
        for pod in ["10.0.0.2", "fd00::2"] {
            let pod: IpAddr = pod.parse().unwrap();
            assert_eq!(target(&element(&port(None), pod).unwrap().1), Some(pod));
        }
    }
}
