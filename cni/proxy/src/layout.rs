//! The table: sets, maps, chains and the rules that lead through them. Their number does not depend on the services.
//!
//! ```text
//! prerouting, output ─> services ─┬─ from pods and the node itself: inside ─> @inside, @node-inside
//!                                 ├─ address . protocol . port ─> @services ──┐
//!                                 └─ of the node: protocol . port ─> @node-ports ┤
//!          ┌────────────────────────────────────────────────────────────────────┘
//!          v  one chain per class and number of endpoints
//!      cluster-3:  slot = random mod 3;  dnat to address . protocol . port . slot  ─> @endpoints
//! ```
//!
//! Filters refuse what was not translated: frontends without endpoints, unused ports of cluster addresses. Sources that
//! must not use a load balancer's address are dropped before translation.

use crate::model::Class;
use ipnet::IpNet;
use orlop_net::nft::{
    Batch, Chain, ChainType, CtKey, DynsetOp, Element, Expr, Family, FieldType, Hook, IpFamily, MetaKey,
    NatKind, NumgenKind, Reg, RejectKind, Rule, Set, Table, Value, Verdict, ct_state, ct_status, matches,
    nat_flags, priority,
};
use std::fmt;

/// What the static part of the rules depends on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// Sources in these are pods; empty: unknown, nobody is a stranger.
    pub pod_networks: Vec<IpNet>,
    /// Addresses of the node that answer node ports; empty: all but loopback.
    pub node_port_networks: Vec<IpNet>,
    pub masquerade_all: bool,
    /// The bit of the packet mark that asks for masquerading.
    pub masquerade_mark: u32,
}

/// Slots of local endpoints begin here where a frontend has two lists.
pub(crate) const LOCAL_SLOTS: u32 = 1 << 20;

/// The most clients whose endpoint is remembered.
const AFFINITY_ENTRIES: u32 = 1 << 18;

/// What the tables are called in every family.
pub const TABLE: &str = "orlop-proxy";

#[must_use]
pub(crate) fn table(family: IpFamily) -> Table {
    let family = match family {
        IpFamily::V4 => Family::Ip,
        IpFamily::V6 => Family::Ip6,
    };
    Table::new(family, TABLE)
}

/// The sets and maps whose elements follow the services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Map {
    Services,
    Inside,
    Endpoints,
    Refused,
    /// Which remembered endpoints are still good.
    Sticky,
    NodePorts,
    NodeInside,
    NodeEndpoints,
    NodeRefused,
    NodeSticky,
    /// Addresses whose unused ports are refused.
    ClusterIps,
    /// Endpoints of this node, as pairs with themselves.
    Hairpin,
    /// Frontends with source ranges.
    Ranged,
    Allowed,
}

impl Map {
    pub(crate) const ALL: [Self; 14] = [
        Self::Services,
        Self::Inside,
        Self::Endpoints,
        Self::Refused,
        Self::Sticky,
        Self::NodePorts,
        Self::NodeInside,
        Self::NodeEndpoints,
        Self::NodeRefused,
        Self::NodeSticky,
        Self::ClusterIps,
        Self::Hairpin,
        Self::Ranged,
        Self::Allowed,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::Inside => "inside",
            Self::Endpoints => "endpoints",
            Self::Refused => "refused",
            Self::Sticky => "sticky",
            Self::NodePorts => "node-ports",
            Self::NodeInside => "node-inside",
            Self::NodeEndpoints => "node-endpoints",
            Self::NodeRefused => "node-refused",
            Self::NodeSticky => "node-sticky",
            Self::ClusterIps => "cluster-ips",
            Self::Hairpin => "hairpin",
            Self::Ranged => "ranged",
            Self::Allowed => "allowed",
        }
    }

    fn set(self, family: IpFamily) -> Set {
        let address = address_type(family);
        let frontend = [address, FieldType::InetProto, FieldType::InetService];
        let node = [FieldType::InetProto, FieldType::InetService];
        let endpoint = [address, FieldType::InetService];
        let name = self.name();
        match self {
            Self::Services | Self::Inside | Self::Refused => Set::verdict_map(name, &frontend),
            Self::NodePorts | Self::NodeInside | Self::NodeRefused => Set::verdict_map(name, &node),
            Self::Endpoints => Set::map(name, &[&frontend[..], &[FieldType::Mark]].concat(), &endpoint),
            Self::NodeEndpoints => Set::map(name, &[&node[..], &[FieldType::Mark]].concat(), &endpoint),
            Self::Sticky => Set::new(name, &[&frontend[..], &endpoint].concat()),
            Self::NodeSticky => Set::new(name, &[&node[..], &endpoint].concat()),
            Self::ClusterIps => Set::new(name, &[address]),
            Self::Hairpin => Set::new(name, &[address, address]),
            Self::Ranged => Set::new(name, &frontend),
            Self::Allowed => Set::new(name, &[&frontend[..], &[address]].concat()).interval(),
        }
    }
}

const fn address_type(family: IpFamily) -> FieldType {
    match family {
        IpFamily::V4 => FieldType::Ipv4Addr,
        IpFamily::V6 => FieldType::Ipv6Addr,
    }
}

/// How the client came to the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Way {
    Class(Class),
    /// From a pod or the node itself to an address with a Local policy for others.
    Inside,
}

/// A chain that sends packets to one of `count` endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Spread {
    pub(crate) family: IpFamilyOrd,
    pub(crate) node_port: bool,
    pub(crate) way: Way,
    pub(crate) count: u32,
    /// Seconds.
    pub(crate) affinity: Option<u32>,
}

/// An address family that can be sorted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum IpFamilyOrd {
    V4,
    V6,
}

impl From<IpFamilyOrd> for IpFamily {
    fn from(family: IpFamilyOrd) -> Self {
        match family {
            IpFamilyOrd::V4 => Self::V4,
            IpFamilyOrd::V6 => Self::V6,
        }
    }
}

/// The chain's name, such as `cluster-3` or `node-external-2-sticky-10800`.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let node = if self.node_port { "node-" } else { "" };
        let way = match self.way {
            Way::Class(Class::Internal) => "cluster",
            Way::Class(Class::External) => "external",
            Way::Class(Class::ExternalLocal) => "local",
            Way::Inside => "inside",
        };
        write!(f, "{node}{way}-{}", self.count)?;
        self.affinity.map_or(Ok(()), |seconds| write!(f, "-sticky-{seconds}"))
    }
}

/// The lookup keys of one address family: which fields go into which registers.
#[derive(Debug, Clone, Copy)]
struct Keys {
    family: IpFamily,
    node_port: bool,
}

impl Keys {
    const fn address_slots(self) -> u8 {
        match self.family {
            IpFamily::V4 => 1,
            IpFamily::V6 => 4,
        }
    }

    /// The first register after the frontend's.
    const fn after(self) -> Reg {
        Reg(if self.node_port { 2 } else { self.address_slots() + 2 })
    }

    /// Registers no key reaches, for what a map yields.
    const fn result(self) -> Reg {
        Reg(match self.family {
            IpFamily::V4 => 8,
            IpFamily::V6 => 10,
        })
    }

    /// (address . ) protocol . port
    fn frontend(self) -> Vec<Expr> {
        let at = if self.node_port { 0 } else { self.address_slots() };
        let address = (!self.node_port).then(|| Expr::daddr(self.family, Reg(0)));
        address.into_iter().chain([Expr::meta(MetaKey::L4Proto, Reg(at)), Expr::dport(Reg(at + 1))]).collect()
    }

    fn client(self) -> Expr {
        Expr::saddr(self.family, self.after())
    }

    fn goes_where(self, map: &str) -> Rule {
        Rule::new().with(self.frontend()).expr(Expr::LookupVerdict { map: map.to_owned(), sreg: Reg(0) })
    }

    /// To the address and port in registers from `at` on.
    const fn dnat(self, at: Reg) -> Expr {
        let port = Reg(at.0 + self.address_slots());
        Expr::Nat { kind: NatKind::Dnat, family: self.family, addr: Some(at), port: Some(port), flags: 0 }
    }
}

/// Writes the static part of one family's table.
#[derive(Debug)]
pub(crate) struct Layout<'a> {
    settings: &'a Settings,
    family: IpFamily,
    table: Table,
}

impl<'a> Layout<'a> {
    pub(crate) fn new(settings: &'a Settings, family: IpFamily) -> Self {
        Self { settings, family, table: table(family) }
    }

    const fn keys(&self) -> Keys {
        Keys { family: self.family, node_port: false }
    }

    const fn node_keys(&self) -> Keys {
        Keys { family: self.family, node_port: true }
    }

    fn networks(&self, networks: &[IpNet]) -> Vec<IpNet> {
        networks.iter().filter(|net| IpFamily::of(net.addr()) == self.family).copied().collect()
    }

    /// Everything but the elements and the chains that spread.
    pub(crate) fn render(&self, batch: &mut Batch) {
        batch.add_table(&self.table);
        for map in Map::ALL {
            batch.add_set(&self.table, map.set(self.family));
        }
        self.affinity_maps(batch);
        self.node_port_networks(batch);
        for chain in
            ["services", "inside", "refuse", "refuse-node-ports", "refuse-unused", "firewall", "reject"]
        {
            batch.add_chain(&self.table, Chain::regular(chain));
        }
        let base = [
            ("prerouting", ChainType::Nat, Hook::Prerouting, priority::DSTNAT),
            ("output", ChainType::Nat, Hook::Output, priority::DSTNAT),
            ("postrouting", ChainType::Nat, Hook::Postrouting, priority::SRCNAT),
            ("firewall-prerouting", ChainType::Filter, Hook::Prerouting, priority::DSTNAT - 10),
            ("firewall-output", ChainType::Filter, Hook::Output, priority::DSTNAT - 10),
            ("filter-input", ChainType::Filter, Hook::Input, priority::FILTER),
            ("filter-forward", ChainType::Filter, Hook::Forward, priority::FILTER),
            ("filter-output", ChainType::Filter, Hook::Output, priority::FILTER),
        ];
        for (name, kind, hook, priority) in base {
            batch.add_chain(&self.table, Chain::base(name, kind, hook, priority));
        }
        self.translation(batch);
        self.masquerading(batch);
        self.filters(batch);
    }

    fn rule(&self, batch: &mut Batch, chain: &str, rule: Rule) {
        batch.add_rule(&self.table, chain, rule);
    }

    fn translation(&self, batch: &mut Batch) {
        for chain in ["prerouting", "output"] {
            self.rule(batch, chain, Rule::new().verdict(Verdict::Jump("services".into())));
        }
        for network in self.networks(&self.settings.pod_networks) {
            let rule = Rule::new().with(matches::saddr(network)).verdict(Verdict::Jump("inside".into()));
            self.rule(batch, "services", rule);
        }
        let own = Rule::new().with(matches::saddr_is_local()).verdict(Verdict::Jump("inside".into()));
        self.rule(batch, "services", own);
        for (chain, map, node_map) in
            [("services", Map::Services, Map::NodePorts), ("inside", Map::Inside, Map::NodeInside)]
        {
            self.rule(batch, chain, self.keys().goes_where(map.name()));
            let node_port = self.node_keys().goes_where(node_map.name());
            let rule = Rule { exprs: [self.to_node(), node_port.exprs].concat(), comment: None };
            self.rule(batch, chain, rule);
        }
    }

    /// The destination is an address of this node that answers node ports.
    fn to_node(&self) -> Vec<Expr> {
        let mut exprs = matches::daddr_is_local();
        if !self.settings.node_port_networks.is_empty() {
            exprs.push(Expr::daddr(self.family, Reg(0)));
            exprs.push(Expr::Lookup { set: "node-addresses".into(), sreg: Reg(0), inverted: false });
        } else if self.family == IpFamily::V4 {
            let loopback = IpNet::new_assert([127, 0, 0, 0].into(), 8);
            exprs.extend(matches::daddr_not(loopback));
        } else {
            let loopback = IpNet::new_assert(std::net::Ipv6Addr::LOCALHOST.into(), 128);
            exprs.extend(matches::daddr_not(loopback));
        }
        exprs
    }

    fn node_port_networks(&self, batch: &mut Batch) {
        if self.settings.node_port_networks.is_empty() {
            return;
        }
        let set = Set::new("node-addresses", &[address_type(self.family)]).interval();
        batch.add_set(&self.table, set);
        let networks = IpNet::aggregate(&self.networks(&self.settings.node_port_networks));
        let elements = networks.into_iter().map(Element::net).collect();
        batch.add_elements(&self.table, "node-addresses", elements);
    }

    fn masquerading(&self, batch: &mut Batch) {
        let bit = self.settings.masquerade_mark;
        let masquerade = Expr::Masquerade { flags: nat_flags::FULLY_RANDOM };
        // The mark goes: a tunnel would hand it on to the packet that carries this one.
        let marked = Rule::new()
            .with(matches::mark(bit, bit))
            .with([
                Expr::meta(MetaKey::Mark, Reg(0)),
                Expr::and(Reg(0), Value::of_u32(!bit)),
                Expr::MetaSet { key: MetaKey::Mark, sreg: Reg(0) },
            ])
            .expr(masquerade.clone());
        self.rule(batch, "postrouting", marked);
        let second = Reg(self.keys().address_slots());
        let hairpin = Rule::new()
            .with(matches::ct_bits(CtKey::Status, ct_status::DNAT))
            .with([Expr::saddr(self.family, Reg(0)), Expr::daddr(self.family, second)])
            .expr(Expr::Lookup { set: Map::Hairpin.name().into(), sreg: Reg(0), inverted: false })
            .expr(masquerade);
        self.rule(batch, "postrouting", hairpin);
    }

    fn filters(&self, batch: &mut Batch) {
        let jumps: [(&str, &[&str]); 5] = [
            ("firewall-prerouting", &["firewall"]),
            ("firewall-output", &["firewall"]),
            ("filter-input", &["refuse-node-ports", "refuse"]),
            ("filter-forward", &["refuse", "refuse-unused"]),
            ("filter-output", &["refuse", "refuse-unused"]),
        ];
        for (hook, chains) in jumps {
            for chain in chains {
                let new = matches::ct_bits(CtKey::State, ct_state::NEW);
                self.rule(batch, hook, Rule::new().with(new).verdict(Verdict::Jump((*chain).into())));
            }
        }
        self.rule(batch, "refuse", self.keys().goes_where(Map::Refused.name()));
        let node_port = self.node_keys().goes_where(Map::NodeRefused.name());
        let rule = Rule { exprs: [self.to_node(), node_port.exprs].concat(), comment: None };
        self.rule(batch, "refuse-node-ports", rule);
        let unused = Rule::new()
            .expr(Expr::daddr(self.family, Reg(0)))
            .expr(Expr::Lookup { set: Map::ClusterIps.name().into(), sreg: Reg(0), inverted: false })
            .verdict(Verdict::Goto("reject".into()));
        self.rule(batch, "refuse-unused", unused);
        let ranged = Rule::new()
            .with(self.keys().frontend())
            .expr(Expr::Lookup { set: Map::Ranged.name().into(), sreg: Reg(0), inverted: false })
            .expr(self.keys().client())
            .expr(Expr::Lookup { set: Map::Allowed.name().into(), sreg: Reg(0), inverted: true })
            .verdict(Verdict::Drop);
        self.rule(batch, "firewall", ranged);
        // To a client on this node an ICMP answer comes while its socket is still busy with sending, and the refusal
        // would wait for the next attempt a second later; a reset is queued.
        let reset = Rule::new().with(matches::l4proto(6)).expr(Expr::Reject(RejectKind::TcpReset));
        self.rule(batch, "reject", reset);
        self.rule(batch, "reject", Rule::new().expr(Expr::Reject(RejectKind::port_unreachable(self.family))));
    }

    fn affinity_maps(&self, batch: &mut Batch) {
        let address = address_type(self.family);
        let endpoint = [address, FieldType::InetService];
        let frontend = [address, FieldType::InetProto, FieldType::InetService, address];
        for (name, key) in [("affinity", &frontend[..]), ("node-affinity", &frontend[1..])] {
            let map = Set::map(name, key, &endpoint).dynamic(Some(0)).size(AFFINITY_ENTRIES);
            batch.add_set(&self.table, map);
        }
    }

    /// Makes a chain that spreads over endpoints.
    pub(crate) fn spread(&self, batch: &mut Batch, spread: &Spread) {
        let name = spread.to_string();
        batch.add_chain(&self.table, Chain::regular(name.clone()));
        if let Some(rule) = self.mark(spread.way) {
            self.rule(batch, &name, rule);
        }
        let keys = Keys { family: self.family, node_port: spread.node_port };
        let map = if spread.node_port { Map::NodeEndpoints } else { Map::Endpoints };
        let offset = if spread.way == Way::Class(Class::ExternalLocal) { LOCAL_SLOTS } else { 0 };
        let slot =
            Expr::Numgen { kind: NumgenKind::Random, modulus: spread.count, offset, dreg: keys.after() };
        let found = Expr::LookupMap { map: map.name().into(), sreg: Reg(0), dreg: keys.result() };
        let mut rule = Rule::new().with(keys.frontend()).expr(slot).expr(found);
        if let Some(seconds) = spread.affinity {
            for rule in remembered(keys, seconds) {
                self.rule(batch, &name, rule);
            }
            rule = rule.with(remember(keys, seconds));
        }
        self.rule(batch, &name, rule.expr(keys.dnat(keys.result())));
    }

    /// Asks for masquerading where answers would not come back through this node, or not as from the service.
    fn mark(&self, way: Way) -> Option<Rule> {
        let strangers = match way {
            Way::Class(Class::External) => Vec::new(),
            Way::Class(Class::Internal) if self.settings.masquerade_all => Vec::new(),
            Way::Class(Class::Internal) => {
                let pods = self.networks(&self.settings.pod_networks);
                if pods.is_empty() {
                    return None;
                }
                pods.into_iter().flat_map(matches::saddr_not).collect()
            }
            Way::Class(Class::ExternalLocal) => return None,
            Way::Inside => matches::saddr_is_local(),
        };
        Some(Rule::new().with(strangers).with(matches::set_mark_bits(self.settings.masquerade_mark)))
    }
}

/// To the endpoint a client had before, if there still is that endpoint.
fn remembered(keys: Keys, seconds: u32) -> [Rule; 2] {
    let affinity = || affinity_map(keys).to_owned();
    let sticky = if keys.node_port { Map::NodeSticky } else { Map::Sticky };
    let known = |dreg| {
        Rule::new().with(keys.frontend()).expr(keys.client()).expr(Expr::LookupMap {
            map: affinity(),
            sreg: Reg(0),
            dreg,
        })
    };
    let refresh = known(keys.result()).expr(Expr::Dynset {
        set: affinity(),
        op: DynsetOp::Update,
        key: Reg(0),
        data: Some(keys.result()),
        timeout_ms: Some(milliseconds(seconds)),
    });
    // The endpoint follows the frontend in the registers, over the client's address: together they are the key.
    let go = known(keys.after())
        .expr(Expr::Lookup { set: sticky.name().into(), sreg: Reg(0), inverted: false })
        .expr(keys.dnat(keys.after()));
    [refresh, go]
}

/// Replaces what was remembered; an update alone would keep the endpoint that is no more.
fn remember(keys: Keys, seconds: u32) -> Vec<Expr> {
    let set = || affinity_map(keys).to_owned();
    // The kernel wants data for every operation on a map, also where it is not looked at.
    let data = Some(keys.result());
    vec![
        keys.client(),
        Expr::Dynset { set: set(), op: DynsetOp::Delete, key: Reg(0), data, timeout_ms: None },
        Expr::Dynset {
            set: set(),
            op: DynsetOp::Add,
            key: Reg(0),
            data,
            timeout_ms: Some(milliseconds(seconds)),
        },
    ]
}

const fn affinity_map(keys: Keys) -> &'static str {
    if keys.node_port { "node-affinity" } else { "affinity" }
}

const fn milliseconds(seconds: u32) -> u64 {
    seconds as u64 * 1000
}
