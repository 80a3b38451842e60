//! The expressions of a rule, typed; each becomes one entry of the kernel's expression list.
//!
//! Registers are the sixteen 32-bit slots; an IPv4 address takes one, an IPv6 address four, every other field one. A
//! concatenated lookup key is simply fields loaded into adjacent slots.

use super::attr::Writer;
use super::value::Value;
use ipnet::IpNet;
use std::net::IpAddr;

/// A 32-bit register slot, 0 to 15.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Reg(pub u8);

impl Reg {
    const fn id(self) -> u32 {
        // The first eight numbers are the verdict register and the four 128-bit ones.
        8 + self.0 as u32
    }
}

/// Where a packet goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Verdict {
    Accept,
    Drop,
    Continue,
    Return,
    Jump(String),
    Goto(String),
}

impl Verdict {
    pub(super) fn encode(&self, w: &mut Writer) {
        let (code, chain) = match self {
            Self::Drop => (0i32, None),
            Self::Accept => (1, None),
            Self::Continue => (-1, None),
            Self::Jump(chain) => (-3, Some(chain)),
            Self::Goto(chain) => (-4, Some(chain)),
            Self::Return => (-5, None),
        };
        w.nest(2, |w| {
            w.bytes(1, &code.to_be_bytes());
            if let Some(chain) = chain {
                w.string(2, chain);
            }
        });
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PayloadBase {
    Link,
    Network,
    Transport,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MetaKey {
    Protocol,
    Mark,
    Iif,
    Oif,
    IifName,
    OifName,
    NfProto,
    L4Proto,
    PktType,
}

impl MetaKey {
    const fn id(self) -> u32 {
        match self {
            Self::Protocol => 1,
            Self::Mark => 3,
            Self::Iif => 4,
            Self::Oif => 5,
            Self::IifName => 6,
            Self::OifName => 7,
            Self::NfProto => 15,
            Self::L4Proto => 16,
            Self::PktType => 19,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CtKey {
    State,
    Direction,
    Status,
    Mark,
    Protocol,
    ProtoSrc,
    ProtoDst,
    SrcIp,
    DstIp,
    SrcIp6,
    DstIp6,
}

impl CtKey {
    const fn id(self) -> u32 {
        match self {
            Self::State => 0,
            Self::Direction => 1,
            Self::Status => 2,
            Self::Mark => 3,
            Self::Protocol => 10,
            Self::ProtoSrc => 11,
            Self::ProtoDst => 12,
            Self::SrcIp => 19,
            Self::DstIp => 20,
            Self::SrcIp6 => 21,
            Self::DstIp6 => 22,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CtDirection {
    Original,
    Reply,
}

/// Bits of [`CtKey::State`].
pub mod ct_state {
    pub const INVALID: u32 = 1;
    pub const ESTABLISHED: u32 = 2;
    pub const RELATED: u32 = 4;
    pub const NEW: u32 = 8;
    pub const UNTRACKED: u32 = 64;
}

/// Bits of [`CtKey::Status`].
pub mod ct_status {
    pub const SNAT: u32 = 1 << 4;
    pub const DNAT: u32 = 1 << 5;
}

/// Flags of nat, masquerade and redirect.
pub mod nat_flags {
    pub const RANDOM: u32 = 4;
    pub const PERSISTENT: u32 = 8;
    pub const FULLY_RANDOM: u32 = 16;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CmpOp {
    Eq,
    Neq,
    Lt,
    Lte,
    Gt,
    Gte,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NatKind {
    Snat,
    Dnat,
}

/// The address family a nat expression translates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IpFamily {
    V4,
    V6,
}

impl IpFamily {
    #[must_use]
    pub const fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// The netfilter protocol number, which is also that of [`MetaKey::NfProto`].
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FibResult {
    Oif,
    OifName,
    /// The kind of address, a `RTN_*` number: see [`RTN_LOCAL`].
    AddrType,
}

/// What [`FibResult::AddrType`] yields for an address of this machine.
pub const RTN_LOCAL: u32 = 2;

/// Flags of a fib lookup.
pub mod fib_flags {
    pub const SADDR: u32 = 1;
    pub const DADDR: u32 = 2;
    pub const MARK: u32 = 4;
    pub const IIF: u32 = 8;
    pub const OIF: u32 = 16;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NumgenKind {
    Incremental,
    Random,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DynsetOp {
    Add,
    Update,
    Delete,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LimitKind {
    Packets,
    Bytes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RejectKind {
    TcpReset,
    /// ICMP or ICMPv6 "no route", for tables of the inet family.
    NoRoute,
    /// ICMP or ICMPv6 "port unreachable", for tables of the inet family.
    PortUnreachable,
    HostUnreachable,
    AdminProhibited,
    /// An ICMP (or ICMPv6) "unreachable" of this code, for tables of the ip (or ip6) family.
    Icmp {
        code: u8,
    },
}

impl RejectKind {
    /// "Port unreachable" for tables of a single family.
    #[must_use]
    pub const fn port_unreachable(family: IpFamily) -> Self {
        match family {
            IpFamily::V4 => Self::Icmp { code: 3 },
            IpFamily::V6 => Self::Icmp { code: 4 },
        }
    }
}

/// One expression.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Expr {
    Payload {
        base: PayloadBase,
        offset: u32,
        len: u32,
        dreg: Reg,
    },
    Meta {
        key: MetaKey,
        dreg: Reg,
    },
    MetaSet {
        key: MetaKey,
        sreg: Reg,
    },
    Ct {
        key: CtKey,
        direction: Option<CtDirection>,
        dreg: Reg,
    },
    CtSet {
        key: CtKey,
        sreg: Reg,
    },
    Cmp {
        op: CmpOp,
        sreg: Reg,
        value: Value,
    },
    Range {
        inverted: bool,
        sreg: Reg,
        from: Value,
        to: Value,
    },
    Bitwise {
        sreg: Reg,
        dreg: Reg,
        mask: Value,
        xor: Value,
    },
    /// Membership in a set.
    Lookup {
        set: String,
        sreg: Reg,
        inverted: bool,
    },
    /// The data of a map, into registers.
    LookupMap {
        map: String,
        sreg: Reg,
        dreg: Reg,
    },
    /// Goes where a verdict map says.
    LookupVerdict {
        map: String,
        sreg: Reg,
    },
    Load {
        dreg: Reg,
        value: Value,
    },
    Verdict(Verdict),
    Nat {
        kind: NatKind,
        family: IpFamily,
        addr: Option<Reg>,
        port: Option<Reg>,
        flags: u32,
    },
    Masquerade {
        flags: u32,
    },
    /// To this machine, at the port in the register if there is one.
    Redirect {
        port: Option<Reg>,
        flags: u32,
    },
    Fib {
        flags: u32,
        result: FibResult,
        dreg: Reg,
    },
    /// A number from `offset` to `offset + modulus - 1`.
    Numgen {
        kind: NumgenKind,
        modulus: u32,
        offset: u32,
        dreg: Reg,
    },
    /// Adds to, or refreshes in, a set or map from the packet path.
    Dynset {
        set: String,
        op: DynsetOp,
        key: Reg,
        data: Option<Reg>,
        timeout_ms: Option<u64>,
    },
    Counter,
    Limit {
        kind: LimitKind,
        rate: u64,
        per_seconds: u64,
        burst: u32,
        over: bool,
    },
    Reject(RejectKind),
    NoTrack,
}

impl Expr {
    #[must_use]
    pub const fn payload(base: PayloadBase, offset: u32, len: u32, dreg: Reg) -> Self {
        Self::Payload { base, offset, len, dreg }
    }

    #[must_use]
    pub const fn saddr(family: IpFamily, dreg: Reg) -> Self {
        match family {
            IpFamily::V4 => Self::payload(PayloadBase::Network, 12, 4, dreg),
            IpFamily::V6 => Self::payload(PayloadBase::Network, 8, 16, dreg),
        }
    }

    #[must_use]
    pub const fn daddr(family: IpFamily, dreg: Reg) -> Self {
        match family {
            IpFamily::V4 => Self::payload(PayloadBase::Network, 16, 4, dreg),
            IpFamily::V6 => Self::payload(PayloadBase::Network, 24, 16, dreg),
        }
    }

    #[must_use]
    pub const fn sport(dreg: Reg) -> Self {
        Self::payload(PayloadBase::Transport, 0, 2, dreg)
    }

    #[must_use]
    pub const fn dport(dreg: Reg) -> Self {
        Self::payload(PayloadBase::Transport, 2, 2, dreg)
    }

    #[must_use]
    pub const fn meta(key: MetaKey, dreg: Reg) -> Self {
        Self::Meta { key, dreg }
    }

    #[must_use]
    pub const fn ct(key: CtKey, dreg: Reg) -> Self {
        Self::Ct { key, direction: None, dreg }
    }

    #[must_use]
    pub const fn eq(sreg: Reg, value: Value) -> Self {
        Self::Cmp { op: CmpOp::Eq, sreg, value }
    }

    #[must_use]
    pub const fn ne(sreg: Reg, value: Value) -> Self {
        Self::Cmp { op: CmpOp::Neq, sreg, value }
    }

    /// Keeps the bits of `mask`.
    #[must_use]
    pub fn and(reg: Reg, mask: Value) -> Self {
        let xor = Value::raw(&vec![0; mask.as_bytes().len()]);
        Self::Bitwise { sreg: reg, dreg: reg, mask, xor }
    }

    pub(super) fn encode(&self, w: &mut Writer) {
        w.nest(1, |w| {
            w.string(1, self.name());
            w.nest(2, |w| self.encode_data(w));
        });
    }

    const fn name(&self) -> &'static str {
        match self {
            Self::Payload { .. } => "payload",
            Self::Meta { .. } | Self::MetaSet { .. } => "meta",
            Self::Ct { .. } | Self::CtSet { .. } => "ct",
            Self::Cmp { .. } => "cmp",
            Self::Range { .. } => "range",
            Self::Bitwise { .. } => "bitwise",
            Self::Lookup { .. } | Self::LookupMap { .. } | Self::LookupVerdict { .. } => "lookup",
            Self::Load { .. } | Self::Verdict(_) => "immediate",
            Self::Nat { .. } => "nat",
            Self::Masquerade { .. } => "masq",
            Self::Redirect { .. } => "redir",
            Self::Fib { .. } => "fib",
            Self::Numgen { .. } => "numgen",
            Self::Dynset { .. } => "dynset",
            Self::Counter => "counter",
            Self::Limit { .. } => "limit",
            Self::Reject(_) => "reject",
            Self::NoTrack => "notrack",
        }
    }

    /// Loads, comparisons and lookups here, what changes a packet in [`Self::encode_action`].
    fn encode_data(&self, w: &mut Writer) {
        match self {
            Self::Payload { base, offset, len, dreg } => {
                w.be32(1, dreg.id());
                w.be32(2, *base as u32);
                w.be32(3, *offset);
                w.be32(4, *len);
            }
            Self::Meta { key, dreg } => {
                w.be32(1, dreg.id());
                w.be32(2, key.id());
            }
            Self::Ct { key, direction, dreg } => {
                w.be32(1, dreg.id());
                w.be32(2, key.id());
                if let Some(direction) = direction {
                    w.u8(3, *direction as u8);
                }
            }
            Self::Cmp { op, sreg, value } => {
                w.be32(1, sreg.id());
                w.be32(2, *op as u32);
                data(w, 3, value);
            }
            Self::Range { inverted, sreg, from, to } => {
                w.be32(1, sreg.id());
                w.be32(2, u32::from(*inverted));
                data(w, 3, from);
                data(w, 4, to);
            }
            Self::Bitwise { sreg, dreg, mask, xor } => {
                w.be32(1, sreg.id());
                w.be32(2, dreg.id());
                w.be32(3, u32::try_from(mask.as_bytes().len()).unwrap_or(u32::MAX));
                data(w, 4, mask);
                data(w, 5, xor);
            }
            Self::Lookup { set, sreg, inverted } => {
                w.string(1, set);
                w.be32(2, sreg.id());
                if *inverted {
                    w.be32(5, 1);
                }
            }
            Self::LookupMap { map, sreg, dreg } => {
                w.string(1, map);
                w.be32(2, sreg.id());
                w.be32(3, dreg.id());
            }
            Self::LookupVerdict { map, sreg } => {
                w.string(1, map);
                w.be32(2, sreg.id());
                w.be32(3, 0);
            }
            Self::Fib { flags, result, dreg } => {
                w.be32(1, dreg.id());
                w.be32(2, *result as u32 + 1);
                w.be32(3, *flags);
            }
            Self::Numgen { kind, modulus, offset, dreg } => {
                w.be32(1, dreg.id());
                w.be32(2, *modulus);
                w.be32(3, *kind as u32);
                w.be32(4, *offset);
            }
            action => action.encode_action(w),
        }
    }

    fn encode_action(&self, w: &mut Writer) {
        match self {
            Self::MetaSet { key, sreg } => {
                w.be32(2, key.id());
                w.be32(3, sreg.id());
            }
            Self::CtSet { key, sreg } => {
                w.be32(2, key.id());
                w.be32(4, sreg.id());
            }
            Self::Load { dreg, value } => {
                w.be32(1, dreg.id());
                data(w, 2, value);
            }
            Self::Verdict(verdict) => {
                w.be32(1, 0);
                w.nest(2, |w| verdict.encode(w));
            }
            Self::Nat { kind, family, addr, port, flags } => {
                w.be32(1, *kind as u32);
                w.be32(2, u32::from(family.number()));
                if let Some(reg) = addr {
                    w.be32(3, reg.id());
                }
                if let Some(reg) = port {
                    w.be32(5, reg.id());
                }
                if *flags != 0 {
                    w.be32(7, *flags);
                }
            }
            Self::Masquerade { flags } if *flags != 0 => w.be32(1, *flags),
            Self::Redirect { port, flags } => {
                if let Some(reg) = port {
                    w.be32(1, reg.id());
                }
                if *flags != 0 {
                    w.be32(3, *flags);
                }
            }
            Self::Dynset { set, op, key, data, timeout_ms } => {
                w.string(1, set);
                w.be32(3, *op as u32);
                w.be32(4, key.id());
                if let Some(reg) = data {
                    w.be32(5, reg.id());
                }
                if let Some(timeout) = timeout_ms {
                    w.be64(6, *timeout);
                }
            }
            Self::Counter => {
                w.be64(1, 0);
                w.be64(2, 0);
            }
            Self::Limit { kind, rate, per_seconds, burst, over } => {
                w.be64(1, *rate);
                w.be64(2, *per_seconds);
                w.be32(3, *burst);
                w.be32(4, *kind as u32);
                w.be32(5, u32::from(*over));
            }
            Self::Reject(kind) => encode_reject(*kind, w),
            _ => {}
        }
    }
}

fn encode_reject(kind: RejectKind, w: &mut Writer) {
    let (kind, code) = match kind {
        RejectKind::TcpReset => (1, None),
        RejectKind::NoRoute => (2, Some(0)),
        RejectKind::PortUnreachable => (2, Some(1)),
        RejectKind::HostUnreachable => (2, Some(2)),
        RejectKind::AdminProhibited => (2, Some(3)),
        RejectKind::Icmp { code } => (0, Some(code)),
    };
    w.be32(1, kind);
    if let Some(code) = code {
        w.u8(2, code);
    }
}

pub(super) fn data(w: &mut Writer, kind: u16, value: &Value) {
    w.nest(kind, |w| w.bytes(1, value.as_bytes()));
}

/// Common matches as lists of expressions. All work in slot 0 and up and leave nothing there for later expressions.
pub mod matches {
    use super::{
        CmpOp, CtKey, Expr, FibResult, IpAddr, IpFamily, IpNet, MetaKey, RTN_LOCAL, Reg, Value, fib_flags,
    };

    const R: Reg = Reg(0);

    /// In tables of the inet family every look at an address needs this first.
    #[must_use]
    pub fn family(family: IpFamily) -> Vec<Expr> {
        vec![Expr::meta(MetaKey::NfProto, R), Expr::eq(R, Value::new().proto(family.number()))]
    }

    #[must_use]
    pub fn l4proto(number: u8) -> Vec<Expr> {
        vec![Expr::meta(MetaKey::L4Proto, R), Expr::eq(R, Value::new().proto(number))]
    }

    #[must_use]
    pub fn iifname(name: &str) -> Vec<Expr> {
        vec![Expr::meta(MetaKey::IifName, R), Expr::eq(R, Value::new().ifname(name))]
    }

    #[must_use]
    pub fn oifname(name: &str) -> Vec<Expr> {
        vec![Expr::meta(MetaKey::OifName, R), Expr::eq(R, Value::new().ifname(name))]
    }

    #[must_use]
    pub fn dport(port: u16) -> Vec<Expr> {
        vec![Expr::dport(R), Expr::eq(R, Value::new().port(port))]
    }

    #[must_use]
    pub fn saddr(net: IpNet) -> Vec<Expr> {
        address(Expr::saddr(IpFamily::of(net.addr()), R), net, CmpOp::Eq)
    }

    #[must_use]
    pub fn saddr_not(net: IpNet) -> Vec<Expr> {
        address(Expr::saddr(IpFamily::of(net.addr()), R), net, CmpOp::Neq)
    }

    #[must_use]
    pub fn daddr(net: IpNet) -> Vec<Expr> {
        address(Expr::daddr(IpFamily::of(net.addr()), R), net, CmpOp::Eq)
    }

    #[must_use]
    pub fn daddr_not(net: IpNet) -> Vec<Expr> {
        address(Expr::daddr(IpFamily::of(net.addr()), R), net, CmpOp::Neq)
    }

    fn address(load: Expr, net: IpNet, op: CmpOp) -> Vec<Expr> {
        let mut exprs = vec![load];
        if net.prefix_len() < net.max_prefix_len() {
            exprs.push(Expr::and(R, Value::of_ip(net.netmask())));
        }
        exprs.push(Expr::Cmp { op, sreg: R, value: Value::of_ip(net.network()) });
        exprs
    }

    /// True when any of the bits is set, such as those of [`super::ct_state`].
    #[must_use]
    pub fn ct_bits(key: CtKey, bits: u32) -> Vec<Expr> {
        vec![Expr::ct(key, R), Expr::and(R, Value::of_u32(bits)), Expr::ne(R, Value::of_u32(0))]
    }

    #[must_use]
    pub fn mark(value: u32, mask: u32) -> Vec<Expr> {
        vec![
            Expr::meta(MetaKey::Mark, R),
            Expr::and(R, Value::of_u32(mask)),
            Expr::eq(R, Value::of_u32(value)),
        ]
    }

    /// The destination is an address of this machine.
    #[must_use]
    pub fn daddr_is_local() -> Vec<Expr> {
        fib_local(fib_flags::DADDR)
    }

    #[must_use]
    pub fn saddr_is_local() -> Vec<Expr> {
        fib_local(fib_flags::SADDR)
    }

    fn fib_local(flags: u32) -> Vec<Expr> {
        vec![Expr::Fib { flags, result: FibResult::AddrType, dreg: R }, Expr::eq(R, Value::of_u32(RTN_LOCAL))]
    }

    /// Sets bits of the packet mark and keeps the others.
    #[must_use]
    pub fn set_mark_bits(bits: u32) -> Vec<Expr> {
        vec![
            Expr::meta(MetaKey::Mark, R),
            Expr::Bitwise { sreg: R, dreg: R, mask: Value::of_u32(!bits), xor: Value::of_u32(bits) },
            Expr::MetaSet { key: MetaKey::Mark, sreg: R },
        ]
    }

    /// Loads an address into slots.
    #[must_use]
    pub fn load_address(dreg: Reg, ip: IpAddr) -> Vec<Expr> {
        vec![Expr::Load { dreg, value: Value::of_ip(ip) }]
    }
}
