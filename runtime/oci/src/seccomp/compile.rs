//! From the specification's seccomp section to a filter.
//!
//! Per architecture the numbers are grouped into ranges of equal outcome and found by binary search, so that the usual
//! profile of 400 allowed calls costs a system call about seven comparisons.

use super::Error;
use super::arch::{Abi, X32_BIT};
use super::assemble::{self, Condition, JUMP, JUMP_EQ, JUMP_GE, LOAD, RETURN, branch, plain};
use crate::syscall::seccomp::Filter;
use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompFilterFlag as Flag, LinuxSyscall,
};
use std::collections::BTreeMap;

const MAX_INSTRUCTIONS: usize = 4096;
const KILL_PROCESS: u32 = 0x8000_0000;
const ERRNO: u32 = 0x0005_0000;

/// A filter ready to be installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Compiled {
    pub(crate) filter: Vec<Filter>,
    pub(crate) flags: u64,
}

/// What happens to one system call: the rules with conditions in order, then the rest.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Outcome {
    rules: Vec<(Vec<Condition>, u32)>,
    otherwise: Option<u32>,
}

pub(crate) fn compile(seccomp: &LinuxSeccomp) -> Result<Compiled, Error> {
    let native = Abi::native().ok_or(Error::Architecture)?;
    let mut abis = vec![native];
    for arch in seccomp.architectures().iter().flatten() {
        if let Some(abi) = Abi::of(*arch)
            && !abis.contains(&abi)
        {
            abis.push(abi);
        }
    }
    let default = action(seccomp.default_action(), seccomp.default_errno_ret())?;
    let mut filter = vec![plain(LOAD, assemble::ARCH)];
    for abi in abis.iter().filter(|abi| **abi != Abi::X32) {
        let mut table = ranges(&outcomes(seccomp, *abi, default)?, 0, default, seccomp);
        let mut section = vec![plain(LOAD, assemble::NUMBER)];
        if *abi == Abi::X86_64 {
            if abis.contains(&Abi::X32) {
                table.extend(ranges(&outcomes(seccomp, Abi::X32, default)?, X32_BIT, default, seccomp));
            } else {
                section.push(branch(JUMP_GE, X32_BIT, 0, 1));
                section.push(plain(RETURN, KILL_PROCESS));
            }
        }
        section.extend(search(&table));
        let length = u32::try_from(section.len()).map_err(|_| Error::TooLong(section.len()))?;
        filter.push(branch(JUMP_EQ, abi.audit(), 1, 0));
        filter.push(plain(JUMP, length));
        filter.extend(section);
    }
    // An architecture that the profile does not mention.
    filter.push(plain(RETURN, KILL_PROCESS));
    if filter.len() > MAX_INSTRUCTIONS {
        return Err(Error::TooLong(filter.len()));
    }
    Ok(Compiled { filter, flags: flags(seccomp) })
}

fn flags(seccomp: &LinuxSeccomp) -> u64 {
    // TSYNC changes nothing in a process of one thread; WAIT_KILLABLE_RECV belongs to notifications.
    seccomp.flags().iter().flatten().fold(0, |bits, flag| match flag {
        Flag::SeccompFilterFlagLog => bits | 2,
        Flag::SeccompFilterFlagSpecAllow => bits | 4,
        Flag::SeccompFilterFlagTsync | Flag::SeccompFilterFlagWaitKillableRecv => bits,
    })
}

fn action(action: Action, errno: Option<u32>) -> Result<u32, Error> {
    match action {
        Action::ScmpActNotify => Err(Error::Action(action.to_string())),
        _ => Ok(action.as_u32(errno.map(|errno| errno & 0xffff))),
    }
}

fn outcomes(seccomp: &LinuxSeccomp, abi: Abi, default: u32) -> Result<BTreeMap<u32, Outcome>, Error> {
    let mut found: BTreeMap<u32, Outcome> = BTreeMap::new();
    for call in seccomp.syscalls().iter().flatten() {
        let verdict = action(call.action(), call.errno_ret())?;
        let conditions = conditions(call)?;
        for name in call.names() {
            // A name unknown here is a call this architecture, or this kernel generation, does not have.
            let Some(number) = abi.number(name) else { continue };
            let outcome = found.entry(number).or_default();
            if verdict == default {
                continue;
            }
            if conditions.is_empty() {
                outcome.otherwise.get_or_insert(verdict);
            } else {
                outcome.rules.push((conditions.clone(), verdict));
            }
        }
    }
    Ok(found)
}

fn conditions(call: &LinuxSyscall) -> Result<Vec<Condition>, Error> {
    call.args()
        .iter()
        .flatten()
        .map(|arg| {
            let index = u8::try_from(arg.index()).ok().filter(|index| *index < 6);
            Ok(Condition {
                index: index.ok_or_else(|| Error::Argument(arg.index()))?,
                operator: arg.op(),
                value: arg.value(),
                value_two: arg.value_two().unwrap_or_default(),
            })
        })
        .collect()
}

/// Numbers from `start` up to the next range's start share an outcome.
#[derive(Debug)]
struct Range {
    start: u32,
    code: Vec<Filter>,
}

/// The ranges of one table, whose numbers begin at `first`.
fn ranges(numbers: &BTreeMap<u32, Outcome>, first: u32, default: u32, seccomp: &LinuxSeccomp) -> Vec<Range> {
    let mut ranges: Vec<Range> = Vec::new();
    let mut push = |start, code: Vec<Filter>| {
        if ranges.last().is_none_or(|last| last.code != code) {
            ranges.push(Range { start, code });
        }
    };
    let unmentioned = vec![plain(RETURN, default)];
    let mut expected = first;
    for (&number, outcome) in numbers {
        if number > expected {
            push(expected, unmentioned.clone());
        }
        push(number, code(outcome, default));
        expected = number + 1;
    }
    // Calls newer than the profile: a C library that probes for them must see "no such call", not a refusal.
    let denies = !matches!(
        seccomp.default_action(),
        Action::ScmpActAllow | Action::ScmpActLog | Action::ScmpActTrace | Action::ScmpActNotify
    );
    if denies && !numbers.is_empty() {
        push(expected, vec![plain(RETURN, ERRNO | libc::ENOSYS.unsigned_abs())]);
    } else {
        push(expected, unmentioned);
    }
    ranges
}

fn code(outcome: &Outcome, default: u32) -> Vec<Filter> {
    let mut code: Vec<Filter> =
        outcome.rules.iter().flat_map(|(conditions, verdict)| assemble::rule(conditions, *verdict)).collect();
    code.push(plain(RETURN, outcome.otherwise.unwrap_or(default)));
    code
}

/// Binary search: the number is in the accumulator. The long jump is separate because a conditional one reaches only
/// 255 instructions.
fn search(ranges: &[Range]) -> Vec<Filter> {
    let [.., last] = ranges else { return Vec::new() };
    if ranges.len() == 1 {
        return last.code.clone();
    }
    let (left, right) = ranges.split_at(ranges.len() / 2);
    let start = right.first().map_or(0, |range| range.start);
    let (left, right) = (search(left), search(right));
    let distance = u32::try_from(left.len()).unwrap_or(u32::MAX);
    let mut code = vec![branch(JUMP_GE, start, 0, 1), plain(JUMP, distance)];
    code.extend(left);
    code.extend(right);
    code
}

#[cfg(test)]
mod tests {
    use super::assemble::{AND, JUMP_GT};
    use super::*;

    const ALLOW: u32 = 0x7fff_0000;
    const X86_64: u32 = 0xc000_003e;
    const I386: u32 = 0x4000_0003;

    /// Runs a filter the way the kernel would, as far as these opcodes go.
    fn run(filter: &[Filter], arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(number.to_le_bytes());
        data.extend(arch.to_le_bytes());
        data.extend([0; 8]);
        args.iter().for_each(|arg| data.extend(arg.to_le_bytes()));
        let (mut at, mut a) = (0usize, 0u32);
        loop {
            let Filter { code, jump_true, jump_false, value } = filter[at];
            at += 1;
            let taken = match code {
                LOAD => {
                    let at = value as usize;
                    a = u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
                    continue;
                }
                AND => {
                    a &= value;
                    continue;
                }
                JUMP => {
                    at += value as usize;
                    continue;
                }
                RETURN => return value,
                JUMP_EQ => a == value,
                JUMP_GT => a > value,
                JUMP_GE => a >= value,
                other => panic!("opcode {other:#x}"),
            };
            at += usize::from(if taken { jump_true } else { jump_false });
        }
    }

    fn compiled(json: &str) -> Vec<Filter> {
        compile(&serde_json::from_str(json).unwrap()).unwrap().filter
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn calls_are_decided_by_name_and_foreign_architectures_killed() {
        let filter = compiled(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],
                "syscalls":[{"names":["read","write","execve","no_such_call","openat2"],"action":"SCMP_ACT_ALLOW"},
                            {"names":["mount"],"action":"SCMP_ACT_KILL_PROCESS"}]}"#,
        );
        let call = |arch, number| run(&filter, arch, number, [0; 6]);
        assert_eq!(call(X86_64, 0), ALLOW);
        assert_eq!(call(X86_64, 59), ALLOW);
        assert_eq!(call(X86_64, 2), ERRNO | 1, "open is not mentioned");
        assert_eq!(call(X86_64, 165), KILL_PROCESS);
        assert_eq!(call(X86_64, 437), ALLOW);
        assert_eq!(call(X86_64, 438), ERRNO | 38, "newer than the profile");
        assert_eq!(call(I386, 11), ALLOW);
        assert_eq!(call(I386, 59), ERRNO | 1);
        assert_eq!(call(X86_64, X32_BIT), KILL_PROCESS, "x32 is not in the list");
        assert_eq!(call(0xc000_00b7, 0), KILL_PROCESS);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn x32_is_decided_by_its_own_numbers() {
        let filter = compiled(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X32"],
                "syscalls":[{"names":["execve","getpid"],"action":"SCMP_ACT_ALLOW"}]}"#,
        );
        assert_eq!(run(&filter, X86_64, 520 | X32_BIT, [0; 6]), ALLOW);
        assert_eq!(run(&filter, X86_64, 39 | X32_BIT, [0; 6]), ALLOW);
        assert_eq!(run(&filter, X86_64, 59 | X32_BIT, [0; 6]), ERRNO | 1);
        assert_eq!(run(&filter, X86_64, 59, [0; 6]), ALLOW);
        assert_eq!(run(&filter, X86_64, 400, [0; 6]), ERRNO | 38, "newer than the profile");
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn every_operator_compares_all_64_bits() {
        let big = 1u64 << 40 | 5;
        type Holds = fn(u64, u64) -> bool;
        let cases: [(&str, Holds); 6] = [
            ("SCMP_CMP_EQ", |a, b| a == b),
            ("SCMP_CMP_NE", |a, b| a != b),
            ("SCMP_CMP_LT", |a, b| a < b),
            ("SCMP_CMP_LE", |a, b| a <= b),
            ("SCMP_CMP_GT", |a, b| a > b),
            ("SCMP_CMP_GE", |a, b| a >= b),
        ];
        for (operator, expected) in cases {
            let filter = compiled(&format!(
                r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["read"],"action":"SCMP_ACT_ALLOW",
                    "args":[{{"index":1,"value":{big},"op":"{operator}"}}]}}]}}"#
            ));
            for value in [0, 4, 5, 6, 1 << 40, big - 1, big, big + 1, 1 << 41, 1 << 41 | 4, u64::MAX] {
                let allowed = run(&filter, X86_64, 0, [0, value, 0, 0, 0, 0]) == ALLOW;
                assert_eq!(allowed, expected(value, big), "{operator} {value:#x}");
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn conditions_of_a_rule_all_hold_and_rules_are_alternatives() {
        let filter = compiled(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
                {"names":["clone"],"action":"SCMP_ACT_ALLOW",
                 "args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"},
                         {"index":1,"value":7,"op":"SCMP_CMP_EQ"},{"index":1,"value":8,"op":"SCMP_CMP_LT"}]},
                {"names":["clone"],"action":"SCMP_ACT_LOG","args":[{"index":2,"value":9,"op":"SCMP_CMP_EQ"}]}]}"#,
        );
        let clone = |args: [u64; 3]| run(&filter, X86_64, 56, [args[0], args[1], args[2], 0, 0, 0]);
        assert_eq!(clone([17, 7, 0]), ALLOW);
        assert_eq!(clone([0x1000_0000, 7, 0]), ERRNO | 1);
        assert_eq!(clone([17, 6, 0]), ERRNO | 1);
        assert_eq!(clone([0x1000_0000, 0, 9]), 0x7ffc_0000);
    }
}
