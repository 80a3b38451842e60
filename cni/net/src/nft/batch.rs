//! A transaction as data: what is to change, in order. The kernel takes all of it or nothing.
//!
//! Order matters within a batch as in an `nft -f` file: chains before rules and verdicts that name them, sets before
//! rules that look into them; for removal the other way round.

use super::attr::{MAX_PAYLOAD, Writer};
use super::expr::data;
use super::object::{
    BaseChain, Chain, ChainType, Element, ElementData, Hook, Policy, RangeEnd, Rule, Set, SetData, Table,
};
use super::value::{FieldType, byte_order, type_id, type_length};
use std::fmt;

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    AddTable {
        table: Table,
        comment: Option<String>,
    },
    DeleteTable {
        table: Table,
    },
    AddChain {
        table: Table,
        chain: Chain,
    },
    /// Removes the rules of a chain.
    FlushChain {
        table: Table,
        chain: String,
    },
    DeleteChain {
        table: Table,
        chain: String,
    },
    AddRule {
        table: Table,
        chain: String,
        rule: Rule,
    },
    /// Before all other rules of the chain.
    InsertRule {
        table: Table,
        chain: String,
        rule: Rule,
    },
    DeleteRule {
        table: Table,
        chain: String,
        handle: u64,
    },
    AddSet {
        table: Table,
        set: Set,
    },
    DeleteSet {
        table: Table,
        set: String,
    },
    AddElements {
        table: Table,
        set: String,
        elements: Vec<Element>,
    },
    DeleteElements {
        table: Table,
        set: String,
        elements: Vec<Element>,
    },
    FlushSet {
        table: Table,
        set: String,
    },
}

/// What an operation does to which object, for messages.
impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddTable { table, .. } => write!(f, "add table {table}"),
            Self::DeleteTable { table } => write!(f, "delete table {table}"),
            Self::AddChain { table, chain } => write!(f, "add chain {table} {}", chain.name),
            Self::FlushChain { table, chain } => write!(f, "flush chain {table} {chain}"),
            Self::DeleteChain { table, chain } => write!(f, "delete chain {table} {chain}"),
            Self::AddRule { table, chain, rule } => write!(f, "add rule {table} {chain}{}", CommentOf(rule)),
            Self::InsertRule { table, chain, rule } => {
                write!(f, "insert rule {table} {chain}{}", CommentOf(rule))
            }
            Self::DeleteRule { table, chain, handle } => {
                write!(f, "delete rule {table} {chain} handle {handle}")
            }
            Self::AddSet { table, set } => write!(f, "add set {table} {}", set.name),
            Self::DeleteSet { table, set } => write!(f, "delete set {table} {set}"),
            Self::AddElements { table, set, .. } => write!(f, "add element {table} {set}"),
            Self::DeleteElements { table, set, .. } => write!(f, "delete element {table} {set}"),
            Self::FlushSet { table, set } => write!(f, "flush set {table} {set}"),
        }
    }
}

struct CommentOf<'a>(&'a Rule);

impl fmt::Display for CommentOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.comment.as_ref().map_or(Ok(()), |comment| write!(f, " {comment:?}"))
    }
}

impl Op {
    /// The elements the operation carries, for messages about one of them.
    pub(super) fn elements(&self) -> &[Element] {
        match self {
            Self::AddElements { elements, .. } | Self::DeleteElements { elements, .. } => elements,
            _ => &[],
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    pub ops: Vec<Op>,
}

impl Batch {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// No error if the table exists.
    pub fn add_table(&mut self, table: &Table) {
        self.ops.push(Op::AddTable { table: table.clone(), comment: None });
    }

    /// As [`Self::add_table`]; the comment is kept when the table is made, not when it exists already.
    pub fn add_table_with_comment(&mut self, table: &Table, comment: &str) {
        self.ops.push(Op::AddTable { table: table.clone(), comment: Some(comment.to_owned()) });
    }

    /// With all that is in it; an error if it does not exist.
    pub fn delete_table(&mut self, table: &Table) {
        self.ops.push(Op::DeleteTable { table: table.clone() });
    }

    /// As [`Self::delete_table`], but no error if the table does not exist (by adding it first: the kernel's own
    /// "destroy" is newer than the oldest kernel we run on).
    pub fn destroy_table(&mut self, table: &Table) {
        self.add_table(table);
        self.delete_table(table);
    }

    /// No error if the same chain exists.
    pub fn add_chain(&mut self, table: &Table, chain: Chain) {
        self.ops.push(Op::AddChain { table: table.clone(), chain });
    }

    pub fn flush_chain(&mut self, table: &Table, chain: &str) {
        self.ops.push(Op::FlushChain { table: table.clone(), chain: chain.to_owned() });
    }

    /// An error if something refers to it; flush it first if it has rules.
    pub fn delete_chain(&mut self, table: &Table, chain: &str) {
        self.ops.push(Op::DeleteChain { table: table.clone(), chain: chain.to_owned() });
    }

    /// Removes a regular chain and its rules; no error if it does not exist.
    pub fn destroy_chain(&mut self, table: &Table, chain: &str) {
        self.add_chain(table, Chain::regular(chain));
        self.flush_chain(table, chain);
        self.delete_chain(table, chain);
    }

    /// Appends.
    pub fn add_rule(&mut self, table: &Table, chain: &str, rule: Rule) {
        self.ops.push(Op::AddRule { table: table.clone(), chain: chain.to_owned(), rule });
    }

    pub fn insert_rule(&mut self, table: &Table, chain: &str, rule: Rule) {
        self.ops.push(Op::InsertRule { table: table.clone(), chain: chain.to_owned(), rule });
    }

    pub fn delete_rule(&mut self, table: &Table, chain: &str, handle: u64) {
        self.ops.push(Op::DeleteRule { table: table.clone(), chain: chain.to_owned(), handle });
    }

    /// No error if the same set exists.
    pub fn add_set(&mut self, table: &Table, set: Set) {
        self.ops.push(Op::AddSet { table: table.clone(), set });
    }

    pub fn delete_set(&mut self, table: &Table, set: &str) {
        self.ops.push(Op::DeleteSet { table: table.clone(), set: set.to_owned() });
    }

    /// Removes a set; no error if it does not exist. An existing set of this name must be of the same make.
    pub fn destroy_set(&mut self, table: &Table, set: &Set) {
        self.add_set(table, set.clone());
        self.delete_set(table, &set.name);
    }

    /// No error if the same element exists; one with the same key and other data is an error.
    pub fn add_elements(&mut self, table: &Table, set: &str, elements: Vec<Element>) {
        if !elements.is_empty() {
            self.ops.push(Op::AddElements { table: table.clone(), set: set.to_owned(), elements });
        }
    }

    /// An error if one does not exist.
    pub fn delete_elements(&mut self, table: &Table, set: &str, elements: Vec<Element>) {
        if !elements.is_empty() {
            self.ops.push(Op::DeleteElements { table: table.clone(), set: set.to_owned(), elements });
        }
    }

    pub fn flush_set(&mut self, table: &Table, set: &str) {
        self.ops.push(Op::FlushSet { table: table.clone(), set: set.to_owned() });
    }
}

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;

pub(super) const NEWTABLE: u16 = 0;
pub(super) const GETTABLE: u16 = 1;
pub(super) const DELTABLE: u16 = 2;
pub(super) const NEWCHAIN: u16 = 3;
pub(super) const GETCHAIN: u16 = 4;
pub(super) const DELCHAIN: u16 = 5;
pub(super) const NEWRULE: u16 = 6;
pub(super) const GETRULE: u16 = 7;
pub(super) const DELRULE: u16 = 8;
pub(super) const NEWSET: u16 = 9;
pub(super) const GETSET: u16 = 10;
pub(super) const DELSET: u16 = 11;
pub(super) const NEWSETELEM: u16 = 12;
pub(super) const GETSETELEM: u16 = 13;
pub(super) const DELSETELEM: u16 = 14;

pub(super) const NLM_F_REQUEST: u16 = 1;
pub(super) const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;

/// The message type of an nftables message.
pub(super) const fn message_kind(kind: u16) -> u16 {
    (NFNL_SUBSYS_NFTABLES << 8) | kind
}

/// The header every netfilter message begins with.
pub(super) fn header(w: &mut Writer, family: u8, resource: u16) {
    w.raw(&[family, 0]);
    w.raw(&resource.to_be_bytes());
}

/// Where a message of the encoded batch came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Origin {
    pub(super) op: usize,
    /// Index of the first element the message carries.
    pub(super) first_element: usize,
    /// Where the message lies in the encoded batch.
    pub(super) offset: usize,
}

/// The messages of a batch; message `i` has sequence number `first_seq + i`, the opening one being number 0.
#[derive(Debug)]
pub(super) struct Encoded {
    pub(super) bytes: Vec<u8>,
    pub(super) first_seq: u32,
    pub(super) origins: Vec<Origin>,
}

pub(super) struct Encoder {
    w: Writer,
    first_seq: u32,
    origins: Vec<Origin>,
    sets: u32,
}

impl Encoder {
    pub(super) fn encode(batch: &Batch, first_seq: u32) -> Encoded {
        let mut encoder = Self { w: Writer::new(), first_seq, origins: Vec::new(), sets: 0 };
        encoder.w.message(NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, first_seq, |w| {
            header(w, 0, NFNL_SUBSYS_NFTABLES);
        });
        for (index, op) in batch.ops.iter().enumerate() {
            encoder.op(index, op);
        }
        let seq = encoder.next_seq();
        encoder.w.message(NFNL_MSG_BATCH_END, NLM_F_REQUEST, seq, |w| header(w, 0, NFNL_SUBSYS_NFTABLES));
        Encoded { bytes: encoder.w.into_bytes(), first_seq, origins: encoder.origins }
    }

    fn next_seq(&self) -> u32 {
        let count = u32::try_from(self.origins.len()).unwrap_or(u32::MAX);
        self.first_seq.wrapping_add(1).wrapping_add(count)
    }

    fn message(
        &mut self,
        (op, first_element): (usize, usize),
        table: &Table,
        kind: u16,
        flags: u16,
        body: impl FnOnce(&mut Writer),
    ) {
        let seq = self.next_seq();
        self.origins.push(Origin { op, first_element, offset: self.w.len() });
        self.w.message(message_kind(kind), NLM_F_REQUEST | flags, seq, |w| {
            header(w, table.family.number(), 0);
            w.string(1, &table.name);
            body(w);
        });
    }

    fn op(&mut self, index: usize, op: &Op) {
        let at = (index, 0);
        match op {
            Op::AddTable { table, comment } => self.message(at, table, NEWTABLE, NLM_F_CREATE, |w| {
                w.be32(2, 0);
                if let Some(comment) = comment {
                    w.bytes(6, &text_userdata(0, comment));
                }
            }),
            Op::DeleteTable { table } => self.message(at, table, DELTABLE, 0, |_| {}),
            Op::AddChain { table, chain } => {
                self.message(at, table, NEWCHAIN, NLM_F_CREATE, |w| encode_chain(w, chain));
            }
            Op::DeleteChain { table, chain } => self.message(at, table, DELCHAIN, 0, |w| w.string(3, chain)),
            Op::FlushChain { table, chain } => self.message(at, table, DELRULE, 0, |w| w.string(2, chain)),
            Op::AddRule { table, chain, rule } => {
                let flags = NLM_F_CREATE | NLM_F_APPEND;
                self.message(at, table, NEWRULE, flags, |w| encode_rule(w, chain, rule));
            }
            Op::InsertRule { table, chain, rule } => {
                self.message(at, table, NEWRULE, NLM_F_CREATE, |w| encode_rule(w, chain, rule));
            }
            Op::DeleteRule { table, chain, handle } => self.message(at, table, DELRULE, 0, |w| {
                w.string(2, chain);
                w.be64(3, *handle);
            }),
            Op::AddSet { table, set } => {
                self.sets += 1;
                let id = self.sets;
                self.message(at, table, NEWSET, NLM_F_CREATE, |w| encode_set(w, set, id));
            }
            Op::DeleteSet { table, set } => self.message(at, table, DELSET, 0, |w| w.string(2, set)),
            Op::FlushSet { table, set } => self.message(at, table, DELSETELEM, 0, |w| w.string(2, set)),
            Op::AddElements { table, set, elements } => {
                self.elements(index, (table, set), NEWSETELEM, NLM_F_CREATE, elements);
            }
            Op::DeleteElements { table, set, elements } => {
                self.elements(index, (table, set), DELSETELEM, 0, elements);
            }
        }
    }

    fn elements(&mut self, op: usize, (table, set): (&Table, &str), kind: u16, flags: u16, all: &[Element]) {
        let mut first = 0;
        while first < all.len() {
            let count = elements_that_fit(&all[first..]);
            self.message((op, first), table, kind, flags, |w| {
                w.string(2, set);
                w.nest(3, |w| {
                    for element in &all[first..first + count] {
                        encode_element(w, element);
                    }
                });
            });
            first += count;
        }
    }
}

/// An upper bound of what an element takes, so that a list of them stays below the limit of an attribute.
fn elements_that_fit(elements: &[Element]) -> usize {
    let mut size = 0;
    for (index, element) in elements.iter().enumerate() {
        let key = element.key.as_bytes().len() + 12;
        let data = match &element.data {
            None => 0,
            Some(ElementData::Value(value)) => value.as_bytes().len() + 12,
            Some(ElementData::Verdict(_)) => 288,
        };
        size += 2 * key + data + 40;
        if size > MAX_PAYLOAD {
            return index.max(1);
        }
    }
    elements.len()
}

fn encode_chain(w: &mut Writer, chain: &Chain) {
    w.string(3, &chain.name);
    let Some(BaseChain { kind, hook, priority, policy }) = chain.base else { return };
    w.nest(4, |w| {
        w.be32(1, hook_number(hook));
        w.bytes(2, &priority.to_be_bytes());
    });
    w.be32(5, u32::from(matches!(policy, Policy::Accept)));
    w.string(7, ChainType::name(kind));
}

const fn hook_number(hook: Hook) -> u32 {
    match hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        Hook::Postrouting => 4,
    }
}

fn encode_rule(w: &mut Writer, chain: &str, rule: &Rule) {
    w.string(2, chain);
    w.nest(4, |w| {
        for expr in &rule.exprs {
            expr.encode(w);
        }
    });
    if let Some(comment) = &rule.comment {
        w.bytes(7, &text_userdata(0, comment));
    }
}

/// `nft`'s own format of attached data: type, length, value; texts end in NUL and have at most 128 bytes with it.
fn text_userdata(kind: u8, text: &str) -> Vec<u8> {
    let mut end = text.len().min(120);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut out = vec![kind, u8::try_from(end + 1).unwrap_or(u8::MAX)];
    out.extend_from_slice(&text.as_bytes()[..end]);
    out.push(0);
    out
}

const SET_INTERVAL: u32 = 0x4;
const SET_MAP: u32 = 0x8;
const SET_TIMEOUT: u32 = 0x10;
const SET_EVAL: u32 = 0x20;
const SET_CONCAT: u32 = 0x80;
const DATA_VERDICT: u32 = 0xffff_ff00;

fn encode_set(w: &mut Writer, set: &Set, id: u32) {
    let ranges_of_fields = set.interval && set.key.len() > 1;
    let flags = [
        (set.interval, SET_INTERVAL),
        (set.data != SetData::None, SET_MAP),
        (set.timeout_ms.is_some(), SET_TIMEOUT),
        (set.dynamic, SET_EVAL),
        (ranges_of_fields, SET_CONCAT),
    ];
    w.string(2, &set.name);
    w.be32(3, flags.iter().filter(|(on, _)| *on).map(|(_, bit)| bit).sum());
    w.be32(4, type_id(&set.key));
    w.be32(5, type_length(&set.key));
    match &set.data {
        SetData::None => {}
        SetData::Verdict => {
            w.be32(6, DATA_VERDICT);
            w.be32(7, 0);
        }
        SetData::Fields(fields) => {
            w.be32(6, type_id(fields));
            w.be32(7, type_length(fields));
        }
    }
    if ranges_of_fields || set.size != 0 {
        w.nest(9, |w| encode_set_description(w, set, ranges_of_fields));
    }
    w.be32(10, id);
    if let Some(timeout) = set.timeout_ms.filter(|t| *t != 0) {
        w.be64(11, timeout);
    }
    w.bytes(13, &set_userdata(set));
}

fn encode_set_description(w: &mut Writer, set: &Set, ranges_of_fields: bool) {
    if set.size != 0 {
        w.be32(1, set.size);
    }
    if ranges_of_fields {
        w.nest(2, |w| {
            for field in &set.key {
                w.nest(1, |w| w.be32(1, FieldType::length(*field)));
            }
        });
    }
}

/// Without the byte orders `nft` prints keys in host order backwards.
fn set_userdata(set: &Set) -> Vec<u8> {
    let mut out = vec![0, 4];
    out.extend_from_slice(&byte_order(&set.key).to_ne_bytes());
    if let SetData::Fields(fields) = &set.data {
        out.extend_from_slice(&[1, 4]);
        out.extend_from_slice(&byte_order(fields).to_ne_bytes());
    }
    if let Some(comment) = &set.comment {
        out.extend_from_slice(&text_userdata(7, comment));
    }
    out
}

const ELEMENT_INTERVAL_END: u32 = 1;

fn encode_element(w: &mut Writer, element: &Element) {
    w.nest(1, |w| {
        data(w, 1, &element.key);
        match &element.data {
            None => {}
            Some(ElementData::Value(value)) => data(w, 2, value),
            Some(ElementData::Verdict(verdict)) => w.nest(2, |w| verdict.encode(w)),
        }
        if let Some(timeout) = element.timeout_ms {
            w.be64(4, timeout);
        }
        if let Some(RangeEnd::Fields(last)) = &element.end {
            data(w, 10, last);
        }
    });
    if let Some(RangeEnd::Single(last)) = &element.end
        && let Some(end) = last.successor()
    {
        w.nest(1, |w| {
            data(w, 1, &end);
            w.be32(3, ELEMENT_INTERVAL_END);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::attr::{Attributes, Messages};
    use super::super::object::Family;
    use super::super::value::Value;
    use super::*;

    #[test]
    fn elements_are_split_below_the_limit_of_an_attribute_and_none_is_lost() {
        let table = Table::new(Family::Ip, "t");
        let mut batch = Batch::new();
        let elements: Vec<_> =
            (0..50_000).map(|i| Element::new(Value::of_u32(i)).data(Value::of_u32(i))).collect();
        batch.add_elements(&table, "m", elements);
        let encoded = Encoder::encode(&batch, 1);
        let mut seen = 0;
        for message in Messages::new(&encoded.bytes).filter(|m| m.kind == message_kind(NEWSETELEM)) {
            let list = Attributes::find(&message.payload[4..], 3).unwrap();
            seen += Attributes::new(list).count();
        }
        assert_eq!(seen, 50_000);
        assert!(encoded.origins.len() > 10);
    }

    #[test]
    fn a_range_up_to_the_last_address_has_no_end_element() {
        let mut w = Writer::new();
        encode_element(&mut w, &Element::net("0.0.0.0/0".parse().unwrap()));
        let bytes = w.into_bytes();
        assert_eq!(Attributes::new(&bytes).count(), 1);
    }

    #[test]
    fn an_operation_says_what_it_does_to_which_object() {
        let op = Op::DeleteSet { table: Table::new(Family::Ip6, "proxy"), set: "endpoints".into() };
        assert_eq!(op.to_string(), "delete set ip6 proxy endpoints");
    }
}
