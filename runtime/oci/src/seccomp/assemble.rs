//! Classic BPF as the kernel takes it for seccomp, and the conditions on arguments.

use crate::syscall::seccomp::Filter;
use oci_spec::runtime::LinuxSeccompOperator as Operator;

// BPF_LD|BPF_W|BPF_ABS and so on (linux/bpf_common.h).
pub(super) const LOAD: u16 = 0x20;
pub(super) const AND: u16 = 0x54;
pub(super) const JUMP: u16 = 0x05;
pub(super) const JUMP_EQ: u16 = 0x15;
pub(super) const JUMP_GT: u16 = 0x25;
pub(super) const JUMP_GE: u16 = 0x35;
pub(super) const RETURN: u16 = 0x06;

/// Offsets in `struct seccomp_data`.
pub(super) const NUMBER: u32 = 0;
pub(super) const ARCH: u32 = 4;
const ARGS: u32 = 16;

pub(super) fn plain(code: u16, value: u32) -> Filter {
    Filter { code, jump_true: 0, jump_false: 0, value }
}

pub(super) fn branch(code: u16, value: u32, jump_true: u8, jump_false: u8) -> Filter {
    Filter { code, jump_true, jump_false, value }
}

/// One comparison of a 64-bit argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) index: u8,
    pub(super) operator: Operator,
    pub(super) value: u64,
    pub(super) value_two: u64,
}

/// Where a comparison leads.
#[derive(Debug, Clone, Copy)]
enum To {
    Next,
    /// The condition holds: on to the one after it.
    Pass,
    /// The whole rule does not match.
    Fail,
}

#[derive(Debug, Clone, Copy)]
enum Draft {
    Plain(Filter),
    Branch(u16, u32, To, To),
}

fn high(value: u64) -> u32 {
    u32::try_from(value >> 32).unwrap_or_default()
}

fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or_default()
}

fn draft(condition: Condition) -> Vec<Draft> {
    use Draft::{Branch, Plain};
    use To::{Fail, Next, Pass};
    let offset = ARGS + 8 * u32::from(condition.index);
    // Both supported architectures are little-endian: the low half comes first.
    let (load_low, load_high) = (Plain(plain(LOAD, offset)), Plain(plain(LOAD, offset + 4)));
    let (upper, lower) = (high(condition.value), low(condition.value));
    match condition.operator {
        Operator::ScmpCmpEq => {
            vec![load_high, Branch(JUMP_EQ, upper, Next, Fail), load_low, Branch(JUMP_EQ, lower, Pass, Fail)]
        }
        Operator::ScmpCmpNe => {
            vec![load_high, Branch(JUMP_EQ, upper, Next, Pass), load_low, Branch(JUMP_EQ, lower, Fail, Pass)]
        }
        Operator::ScmpCmpGt | Operator::ScmpCmpGe => {
            let compare = if condition.operator == Operator::ScmpCmpGt { JUMP_GT } else { JUMP_GE };
            vec![
                load_high,
                Branch(JUMP_GT, upper, Pass, Next),
                Branch(JUMP_EQ, upper, Next, Fail),
                load_low,
                Branch(compare, lower, Pass, Fail),
            ]
        }
        Operator::ScmpCmpLt | Operator::ScmpCmpLe => {
            let compare = if condition.operator == Operator::ScmpCmpLt { JUMP_GE } else { JUMP_GT };
            vec![
                load_high,
                Branch(JUMP_GT, upper, Fail, Next),
                Branch(JUMP_EQ, upper, Next, Pass),
                load_low,
                Branch(compare, lower, Fail, Pass),
            ]
        }
        Operator::ScmpCmpMaskedEq => vec![
            load_high,
            Plain(plain(AND, upper)),
            Branch(JUMP_EQ, high(condition.value_two & condition.value), Next, Fail),
            load_low,
            Plain(plain(AND, lower)),
            Branch(JUMP_EQ, low(condition.value_two & condition.value), Pass, Fail),
        ],
    }
}

/// A rule: when every condition holds, `action` is returned; otherwise execution falls through behind it.
pub(super) fn rule(conditions: &[Condition], action: u32) -> Vec<Filter> {
    let drafts: Vec<Vec<Draft>> = conditions.iter().map(|condition| draft(*condition)).collect();
    let total: usize = drafts.iter().map(Vec::len).sum();
    let mut code = Vec::with_capacity(total + 1);
    let mut end_of_condition = 0;
    for draft in drafts {
        end_of_condition += draft.len();
        for item in draft {
            let next = code.len() + 1;
            // At most six conditions of six instructions: distances fit a byte.
            let distance = |to: To| {
                let target = match to {
                    To::Next => next,
                    To::Pass => end_of_condition,
                    To::Fail => total + 1,
                };
                u8::try_from(target - next).unwrap_or(u8::MAX)
            };
            code.push(match item {
                Draft::Plain(filter) => filter,
                Draft::Branch(op, value, yes, no) => branch(op, value, distance(yes), distance(no)),
            });
        }
    }
    code.push(plain(RETURN, action));
    code
}
