//! The device filter: an eBPF program built from the specification's ordered rules.
//!
//! The last matching rule decides, separately for each requested access (read, write, mknod); what no rule mentions is
//! denied. The program therefore walks the rules backwards, strikes off what a rule allows, and stops at a denial.

use super::{Error, MissingControllers};
use crate::syscall::bpf::{self, Insn};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};
use std::fs::File;
use std::io;
use std::path::Path;

const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;
const BLOCK: i32 = 1;
const CHAR: i32 = 2;

/// One rule, parsed. `None` matches everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// Devices every container may use, whatever its rules say: making any node, the standard ones, terminals, TUN.
fn defaults() -> impl Iterator<Item = Rule> {
    let node = |kind, major, minor, access| Rule { allow: true, kind: Some(kind), major, minor, access };
    [
        node(CHAR, None, None, MKNOD),
        node(BLOCK, None, None, MKNOD),
        node(CHAR, Some(1), Some(3), ALL),
        node(CHAR, Some(1), Some(5), ALL),
        node(CHAR, Some(1), Some(7), ALL),
        node(CHAR, Some(1), Some(8), ALL),
        node(CHAR, Some(1), Some(9), ALL),
        node(CHAR, Some(5), Some(0), ALL),
        node(CHAR, Some(5), Some(2), ALL),
        node(CHAR, Some(136), None, ALL),
        node(CHAR, Some(10), Some(200), ALL),
    ]
    .into_iter()
}

fn parse(rule: &LinuxDeviceCgroup) -> Result<Rule, Error> {
    let invalid = |reason: String| Error::Invalid { field: "devices".to_owned(), reason };
    let number = |value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => i32::try_from(value).map(Some).map_err(|_| invalid(format!("device number {value}"))),
    };
    let kind = match rule.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHAR),
        Some(LinuxDeviceType::P) => return Err(invalid("a fifo is no device".to_owned())),
    };
    let mut access = 0;
    for letter in rule.access().as_deref().unwrap_or("rwm").bytes() {
        access |= match letter {
            b'r' => READ,
            b'w' => WRITE,
            b'm' => MKNOD,
            other => return Err(invalid(format!("access {:?}", char::from(other)))),
        };
    }
    Ok(Rule {
        allow: rule.allow(),
        kind,
        major: number(rule.major())?,
        minor: number(rule.minor())?,
        access: if access == 0 { ALL } else { access },
    })
}

// Opcodes of the instruction set (linux/bpf.h, linux/bpf_common.h).
const LOAD_WORD: u8 = 0x61;
const MOVE_IMM: u8 = 0xb7;
const MOVE_REG: u8 = 0xbf;
const AND_IMM: u8 = 0x57;
const SHIFT_RIGHT_IMM: u8 = 0x77;
const JUMP_EQ_IMM: u8 = 0x15;
const JUMP_NE_IMM: u8 = 0x55;
const EXIT: u8 = 0x95;

const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

fn insn(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Insn {
    Insn { code, registers: to | from << 4, offset, immediate }
}

fn answer(value: i32) -> [Insn; 2] {
    [insn(MOVE_IMM, RESULT, 0, 0, value), insn(EXIT, 0, 0, 0, 0)]
}

/// The program for `rules` in the order of the specification.
fn compile(rules: &[Rule]) -> Vec<Insn> {
    let mut program = vec![
        // struct bpf_cgroup_dev_ctx: access << 16 | type, major, minor.
        insn(LOAD_WORD, KIND, CONTEXT, 0, 0),
        insn(MOVE_REG, ACCESS, KIND, 0, 0),
        insn(AND_IMM, KIND, 0, 0, 0xffff),
        insn(SHIFT_RIGHT_IMM, ACCESS, 0, 0, 16),
        insn(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        insn(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut conditions = Vec::new();
        for (register, wanted) in [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)] {
            if let Some(value) = wanted {
                conditions.push((register, value));
            }
        }
        let mut decision = Vec::new();
        if rule.allow {
            decision.push(insn(AND_IMM, ACCESS, 0, 0, !rule.access));
            decision.push(insn(JUMP_NE_IMM, ACCESS, 0, 2, 0));
            decision.extend(answer(1));
        } else {
            decision.push(insn(MOVE_REG, SCRATCH, ACCESS, 0, 0));
            decision.push(insn(AND_IMM, SCRATCH, 0, 0, rule.access));
            decision.push(insn(JUMP_EQ_IMM, SCRATCH, 0, 2, 0));
            decision.extend(answer(0));
        }
        let count = conditions.len();
        for (index, (register, value)) in conditions.into_iter().enumerate() {
            let skip = i16::try_from(count - index - 1 + decision.len()).unwrap_or(i16::MAX);
            program.push(insn(JUMP_NE_IMM, register, 0, skip, value));
        }
        program.append(&mut decision);
    }
    program.extend(answer(0));
    program
}

pub(super) fn apply(
    dir: &Path,
    rules: &[LinuxDeviceCgroup],
    missing: MissingControllers,
) -> Result<(), Error> {
    let mut parsed = rules.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    parsed.extend(defaults());
    match attach(dir, &parsed) {
        Ok(()) => Ok(()),
        // Without CAP_BPF and CAP_NET_ADMIN (in a user namespace, or on a host that withholds them) no filter can be
        // attached. Where the caller accepts missing controllers, the missing filter is one of them.
        Err(source)
            if source.raw_os_error() == Some(libc::EPERM)
                && (missing == MissingControllers::Warn || in_user_namespace()) =>
        {
            tracing::warn!(cgroup = %dir.display(), "device filter skipped: bpf(2) is not permitted here");
            Ok(())
        }
        Err(source) => Err(Error::DeviceFilter { dir: dir.to_owned(), source }),
    }
}

fn attach(dir: &Path, rules: &[Rule]) -> io::Result<()> {
    let cgroup = File::open(dir)?;
    let old = bpf::attached_device_programs(&cgroup)?;
    let program = bpf::load_device_program(&compile(rules))?;
    // The new one first: with several programs attached an access needs the consent of all of them.
    bpf::attach_device_program(&cgroup, &program)?;
    for program in old {
        bpf::detach_device_program(&cgroup, program)?;
    }
    Ok(())
}

fn in_user_namespace() -> bool {
    // The initial namespace maps all ids onto themselves.
    std::fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_ascii_whitespace().collect::<Vec<_>>() != ["0", "0", "4294967295"])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program the way the kernel would, as far as these opcodes go.
    fn run(program: &[Insn], kind: i32, access: i32, major: i32, minor: i32) -> i64 {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0i64; 11];
        let mut at = 0usize;
        for _ in 0..10_000 {
            let step = program[at];
            let (to, from) = (usize::from(step.registers & 15), usize::from(step.registers >> 4));
            let immediate = i64::from(step.immediate);
            let mut jump = false;
            match step.code {
                LOAD_WORD => registers[to] = i64::from(context[usize::try_from(step.offset).unwrap() / 4]),
                MOVE_IMM => registers[to] = immediate,
                MOVE_REG => registers[to] = registers[from],
                AND_IMM => registers[to] &= immediate,
                SHIFT_RIGHT_IMM => registers[to] >>= immediate,
                JUMP_EQ_IMM => jump = registers[to] == immediate,
                JUMP_NE_IMM => jump = registers[to] != immediate,
                EXIT => return registers[0],
                other => panic!("opcode {other:#x}"),
            }
            at += 1 + if jump { usize::try_from(step.offset).unwrap() } else { 0 };
        }
        panic!("no exit");
    }

    fn rules(json: &str) -> Vec<Rule> {
        let rules: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        rules.iter().map(|rule| parse(rule).unwrap()).collect()
    }

    #[test]
    fn nothing_is_allowed_by_default_but_the_standard_devices() {
        let program = compile(&defaults().collect::<Vec<_>>());
        assert_eq!(run(&program, CHAR, READ | WRITE, 1, 3), 1);
        assert_eq!(run(&program, CHAR, READ, 136, 77), 1);
        assert_eq!(run(&program, BLOCK, READ, 8, 0), 0);
        assert_eq!(run(&program, BLOCK, MKNOD, 8, 0), 1);
        assert_eq!(run(&program, BLOCK, MKNOD | READ, 8, 0), 0);
    }

    #[test]
    fn the_last_matching_rule_wins_for_each_access() {
        let program = compile(&rules(
            r#"[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"b","major":8,"minor":0,"access":"r"},
                {"allow":true,"type":"b","major":8,"access":"w"},
                {"allow":false,"type":"b","major":8,"minor":1,"access":"w"}]"#,
        ));
        assert_eq!(run(&program, BLOCK, READ | WRITE, 8, 0), 1, "two rules together");
        assert_eq!(run(&program, BLOCK, WRITE, 8, 1), 0);
        assert_eq!(run(&program, BLOCK, WRITE, 8, 2), 1);
        assert_eq!(run(&program, BLOCK, READ, 8, 2), 0);
        assert_eq!(run(&program, CHAR, READ, 8, 0), 0);
    }

    #[test]
    fn a_privileged_container_may_use_everything() {
        let program = compile(&rules(r#"[{"allow":true,"access":"rwm"}]"#));
        assert_eq!(run(&program, BLOCK, ALL, 253, 17), 1);
    }
}
