//! What leaves the cluster carries an address of this machine; what stays inside keeps the pod's.

use super::NetworkError;
use ipnet::IpNet;
use orlop_net::nft::{
    Batch, Chain, ChainType, Element, Expr, Family, FieldType, Hook, IpFamily, NftSocket, Reg, Rule, Set,
    Table, matches, nat_flags, priority,
};

/// Replaces the table of the network, in one transaction.
pub(super) fn apply(
    nft: &mut NftSocket,
    network: &str,
    pods: &[IpNet],
    inside: &[IpNet],
) -> Result<(), NetworkError> {
    Ok(nft.commit(&plan(&table(network), pods, inside))?)
}

pub(super) fn table(network: &str) -> Table {
    Table::new(Family::Inet, &format!("orlop-egress-{network}"))
}

fn plan(table: &Table, pods: &[IpNet], inside: &[IpNet]) -> Batch {
    let mut batch = Batch::new();
    batch.destroy_table(table);
    batch.add_table(table);
    batch.add_chain(table, Chain::base("postrouting", ChainType::Nat, Hook::Postrouting, priority::SRCNAT));
    for (family, address, suffix, multicast) in [
        (IpFamily::V4, FieldType::Ipv4Addr, "4", "224.0.0.0/4"),
        (IpFamily::V6, FieldType::Ipv6Addr, "6", "ff00::/8"),
    ] {
        let of_family = |nets: &[IpNet]| -> Vec<Element> {
            let nets: Vec<IpNet> =
                nets.iter().filter(|n| IpFamily::of(n.addr()) == family).copied().collect();
            IpNet::aggregate(&nets).into_iter().map(Element::net).collect()
        };
        let pods = of_family(pods);
        if pods.is_empty() {
            continue;
        }
        let (from, to) = (format!("pods{suffix}"), format!("inside{suffix}"));
        batch.add_set(table, Set::new(&from, &[address]).interval());
        batch.add_set(table, Set::new(&to, &[address]).interval());
        batch.add_elements(table, &from, pods);
        let multicast: Option<IpNet> = multicast.parse().ok();
        let inside: Vec<IpNet> = inside.iter().copied().chain(multicast).collect();
        batch.add_elements(table, &to, of_family(&inside));
        let rule = Rule::new()
            .with(matches::family(family))
            .expr(Expr::saddr(family, Reg(0)))
            .expr(Expr::Lookup { set: from, sreg: Reg(0), inverted: false })
            .expr(Expr::daddr(family, Reg(0)))
            .expr(Expr::Lookup { set: to, sreg: Reg(0), inverted: true })
            .expr(Expr::Masquerade { flags: nat_flags::FULLY_RANDOM });
        batch.add_rule(table, "postrouting", rule);
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;
    use orlop_net::nft::Op;

    #[test]
    fn only_families_that_have_pods_get_a_rule() {
        let nets = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect::<Vec<IpNet>>();
        let batch = plan(&table("t"), &nets(&["10.1.0.0/24"]), &nets(&["10.0.0.0/8", "10.1.0.0/24"]));
        let rules = batch.ops.iter().filter(|op| matches!(op, Op::AddRule { .. })).count();
        assert_eq!(rules, 1);
        // A pod CIDR within the cluster's would be an overlapping interval.
        let inside = batch.ops.iter().find_map(|op| match op {
            Op::AddElements { set, elements, .. } if set == "inside4" => Some(elements.len()),
            _ => None,
        });
        assert_eq!(inside, Some(2));
    }
}
