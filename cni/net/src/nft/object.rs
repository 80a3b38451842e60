//! Tables, chains, rules, sets and elements as values.

use super::expr::{Expr, Verdict};
use super::value::{FieldType, Value};
use ipnet::IpNet;
use std::fmt;
use std::sync::Arc;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    Inet,
    Ip,
    Ip6,
    Bridge,
    Netdev,
}

impl Family {
    pub(super) const fn number(self) -> u8 {
        match self {
            Self::Inet => 1,
            Self::Ip => 2,
            Self::Netdev => 5,
            Self::Bridge => 7,
            Self::Ip6 => 10,
        }
    }

    pub(super) const fn from_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Inet),
            2 => Some(Self::Ip),
            5 => Some(Self::Netdev),
            7 => Some(Self::Bridge),
            10 => Some(Self::Ip6),
            _ => None,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inet => "inet",
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
            Self::Bridge => "bridge",
            Self::Netdev => "netdev",
        })
    }
}

/// The identity of a table.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Table {
    pub family: Family,
    pub name: Arc<str>,
}

impl Table {
    #[must_use]
    pub fn new(family: Family, name: &str) -> Self {
        Self { family, name: name.into() }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family, self.name)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChainType {
    Filter,
    Nat,
    Route,
}

impl ChainType {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
            Self::Route => "route",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

/// Priorities by the names `nft` gives them.
pub mod priority {
    pub const RAW: i32 = -300;
    pub const MANGLE: i32 = -150;
    pub const DSTNAT: i32 = -100;
    pub const FILTER: i32 = 0;
    pub const SECURITY: i32 = 50;
    pub const SRCNAT: i32 = 100;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Policy {
    Accept,
    Drop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BaseChain {
    pub kind: ChainType,
    pub hook: Hook,
    pub priority: i32,
    pub policy: Policy,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Chain {
    pub name: String,
    pub base: Option<BaseChain>,
}

impl Chain {
    #[must_use]
    pub fn regular(name: impl Into<String>) -> Self {
        Self { name: name.into(), base: None }
    }

    /// A chain that the kernel calls at a hook; its policy is accept.
    #[must_use]
    pub fn base(name: impl Into<String>, kind: ChainType, hook: Hook, priority: i32) -> Self {
        Self { name: name.into(), base: Some(BaseChain { kind, hook, priority, policy: Policy::Accept }) }
    }

    #[must_use]
    pub fn policy(mut self, policy: Policy) -> Self {
        if let Some(base) = &mut self.base {
            base.policy = policy;
        }
        self
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Rule {
    pub exprs: Vec<Expr>,
    /// Listed by `nft` and returned by dumps; cut at 120 bytes.
    pub comment: Option<String>,
}

impl Rule {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    #[must_use]
    pub fn with(mut self, exprs: impl IntoIterator<Item = Expr>) -> Self {
        self.exprs.extend(exprs);
        self
    }

    #[must_use]
    pub fn expr(mut self, expr: Expr) -> Self {
        self.exprs.push(expr);
        self
    }

    #[must_use]
    pub fn verdict(self, verdict: Verdict) -> Self {
        self.expr(Expr::Verdict(verdict))
    }

    #[must_use]
    pub fn comment(mut self, comment: impl Into<String>) -> Self {
        self.comment = Some(comment.into());
        self
    }
}

/// What a set maps its keys to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum SetData {
    None,
    Fields(Vec<FieldType>),
    Verdict,
}

/// A named set, map or verdict map.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Set {
    pub name: String,
    pub key: Vec<FieldType>,
    pub data: SetData,
    /// Keys are ranges.
    pub interval: bool,
    /// The packet path adds to it ([`Expr::Dynset`]).
    pub dynamic: bool,
    /// Elements may expire; this is what those without a timeout of their own get (0: they stay).
    pub timeout_ms: Option<u64>,
    /// The most elements the set takes; 0 is the kernel's default.
    pub size: u32,
    pub comment: Option<String>,
}

impl Set {
    #[must_use]
    pub fn new(name: impl Into<String>, key: &[FieldType]) -> Self {
        Self {
            name: name.into(),
            key: key.to_vec(),
            data: SetData::None,
            interval: false,
            dynamic: false,
            timeout_ms: None,
            size: 0,
            comment: None,
        }
    }

    #[must_use]
    pub fn map(name: impl Into<String>, key: &[FieldType], data: &[FieldType]) -> Self {
        Self { data: SetData::Fields(data.to_vec()), ..Self::new(name, key) }
    }

    #[must_use]
    pub fn verdict_map(name: impl Into<String>, key: &[FieldType]) -> Self {
        Self { data: SetData::Verdict, ..Self::new(name, key) }
    }

    #[must_use]
    pub fn interval(mut self) -> Self {
        self.interval = true;
        self
    }

    #[must_use]
    pub fn dynamic(mut self, timeout_ms: Option<u64>) -> Self {
        self.dynamic = true;
        self.timeout_ms = timeout_ms;
        self
    }

    #[must_use]
    pub fn size(mut self, size: u32) -> Self {
        self.size = size;
        self
    }

    #[must_use]
    pub fn comment(mut self, comment: impl Into<String>) -> Self {
        self.comment = Some(comment.into());
        self
    }
}

/// The far end of an element that is a range.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum RangeEnd {
    /// In interval sets of one field: the kernel keeps two elements, start and end.
    Single(Value),
    /// In interval sets of several fields: the last value of each field, in one element.
    Fields(Value),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ElementData {
    Value(Value),
    Verdict(Verdict),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Element {
    pub key: Value,
    /// Inclusive.
    pub end: Option<RangeEnd>,
    pub data: Option<ElementData>,
    pub timeout_ms: Option<u64>,
}

impl Element {
    #[must_use]
    pub fn new(key: Value) -> Self {
        Self { key, end: None, data: None, timeout_ms: None }
    }

    /// For interval sets with one field.
    #[must_use]
    pub fn net(net: IpNet) -> Self {
        Self {
            end: Some(RangeEnd::Single(Value::of_ip(net.broadcast()))),
            ..Self::new(Value::of_ip(net.network()))
        }
    }

    /// For interval sets with several fields: first and last value of each.
    #[must_use]
    pub fn range(first: Value, last: Value) -> Self {
        Self { end: Some(RangeEnd::Fields(last)), ..Self::new(first) }
    }

    #[must_use]
    pub fn data(mut self, data: Value) -> Self {
        self.data = Some(ElementData::Value(data));
        self
    }

    #[must_use]
    pub fn verdict(mut self, verdict: Verdict) -> Self {
        self.data = Some(ElementData::Verdict(verdict));
        self
    }

    #[must_use]
    pub fn timeout_ms(mut self, timeout: u64) -> Self {
        self.timeout_ms = Some(timeout);
        self
    }
}
