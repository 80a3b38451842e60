//! Address translation at the edge of the overlay, in an nftables table of its own.
//!
//! Pod to pod is never translated. What leaves the network carries this node's address, and so does what this node sends
//! into the network on behalf of somebody outside, so that the answer comes back here. What a service proxy has marked
//! for masquerading is left to it.

use ipnet::{IpNet, Ipv4Net};
use orlop_net::nft::{
    Batch, Chain, ChainType, Expr, Family, Hook, NftError, NftSocket, Rule, Table, Verdict, matches,
    nat_flags, priority,
};

/// What kube-proxy and its kin put on packets that they will masquerade.
const PROXY_MARK: u32 = 0x4000;

fn table() -> Table {
    Table::new(Family::Ip, "orlop-overlay")
}

/// Replaces the table, in one transaction.
///
/// # Errors
/// [`NftError`]
pub fn apply(nft: &mut NftSocket, network: Ipv4Net, subnet: Ipv4Net) -> Result<(), NftError> {
    nft.commit(&plan(network, subnet))
}

/// # Errors
/// [`NftError`]
pub fn remove(nft: &mut NftSocket) -> Result<(), NftError> {
    let mut batch = Batch::new();
    batch.destroy_table(&table());
    nft.commit(&batch)
}

/// # Errors
/// [`NftError`]
pub fn is_present(nft: &mut NftSocket) -> Result<bool, NftError> {
    nft.has_table(&table())
}

fn plan(network: Ipv4Net, subnet: Ipv4Net) -> Batch {
    let table = table();
    let (network, subnet) = (IpNet::V4(network), IpNet::V4(subnet));
    let multicast = IpNet::V4(Ipv4Net::new_assert(std::net::Ipv4Addr::new(224, 0, 0, 0), 4));
    let leave = |exprs: Vec<Vec<Expr>>| Rule::new().with(exprs.concat()).verdict(Verdict::Return);
    let masquerade = |exprs: Vec<Vec<Expr>>| {
        Rule::new().with(exprs.concat()).expr(Expr::Masquerade { flags: nat_flags::FULLY_RANDOM })
    };
    let mut batch = Batch::new();
    batch.destroy_table(&table);
    batch.add_table(&table);
    batch.add_chain(&table, Chain::base("postrouting", ChainType::Nat, Hook::Postrouting, priority::SRCNAT));
    for rule in [
        leave(vec![matches::mark(PROXY_MARK, PROXY_MARK)]),
        leave(vec![matches::saddr(subnet), matches::daddr(network)]),
        leave(vec![matches::saddr(network), matches::daddr(subnet)]),
        leave(vec![matches::saddr_not(network), matches::daddr(subnet)]),
        masquerade(vec![matches::saddr(network), matches::daddr_not(network), matches::daddr_not(multicast)]),
        masquerade(vec![matches::saddr_not(network), matches::daddr(network)]),
    ] {
        batch.add_rule(&table, "postrouting", rule);
    }
    batch
}
