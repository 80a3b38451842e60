//! The program that holds a shared PID namespace open: a few instructions in an ELF file of our own making.
//!
//! It needs no loader and no library, so the sandbox's root holds nothing else; it cannot be a copy of one of our own
//! programs, which are dynamically linked and far larger. As process 1 it ignores SIGCHLD, which makes the kernel reap
//! the orphans of the pod, and then sleeps for ever. Only SIGKILL ends it: the kernel shields process 1 from signals
//! it has no handler for.
#![allow(unsafe_code)]

use std::arch::global_asm;

/// Where the kernel puts the file in memory.
const BASE: u64 = 0x40_0000;
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

// rt_sigaction(SIGCHLD, {SIG_IGN, SA_RESTORER, 0, 0}, NULL, 8), then pause() for ever.
#[cfg(target_arch = "x86_64")]
global_asm!(
    ".pushsection .rodata.orlop_pause,\"a\"",
    ".global orlop_pause_begin",
    ".global orlop_pause_end",
    "orlop_pause_begin:",
    "mov eax, 13",
    "mov edi, 17",
    "lea rsi, [rip + 2f]",
    "xor edx, edx",
    "mov r10d, 8",
    "syscall",
    "1: mov eax, 34",
    "syscall",
    "jmp 1b",
    ".balign 8",
    "2: .quad 1, 0x04000000, 0, 0",
    "orlop_pause_end:",
    ".popsection",
);

// The same, with ppoll(NULL, 0, NULL, NULL, 0) for the pause that this architecture does not have.
#[cfg(target_arch = "aarch64")]
global_asm!(
    ".pushsection .rodata.orlop_pause,\"a\"",
    ".global orlop_pause_begin",
    ".global orlop_pause_end",
    ".balign 4",
    "orlop_pause_begin:",
    "mov x8, #134",
    "mov x0, #17",
    "adr x1, 2f",
    "mov x2, #0",
    "mov x3, #8",
    "svc #0",
    "1: mov x8, #73",
    "mov x0, #0",
    "mov x1, #0",
    "mov x2, #0",
    "mov x3, #0",
    "mov x4, #0",
    "svc #0",
    "b 1b",
    ".balign 8",
    "2: .quad 1, 0, 0, 0",
    "orlop_pause_end:",
    ".popsection",
);

fn code() -> &'static [u8] {
    unsafe extern "C" {
        static orlop_pause_begin: u8;
        static orlop_pause_end: u8;
    }
    // SAFETY: both symbols are defined above, in this order, in one read-only section; nothing ever writes there, so
    // the bytes between them are a valid slice for the whole life of the program.
    unsafe {
        let begin = &raw const orlop_pause_begin;
        let length = (&raw const orlop_pause_end).offset_from_unsigned(begin);
        std::slice::from_raw_parts(begin, length)
    }
}

/// The file: one header, one segment that holds everything.
pub(crate) fn program() -> Vec<u8> {
    let machine: u16 = if cfg!(target_arch = "aarch64") { 183 } else { 62 };
    let code = code();
    let size = (HEADER + PROGRAM_HEADER + code.len()) as u64;
    let entry = BASE + (HEADER + PROGRAM_HEADER) as u64;
    let mut file = Vec::with_capacity(HEADER + PROGRAM_HEADER + code.len());
    // 64 bits, little-endian, version 1.
    file.extend_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let halves = |file: &mut Vec<u8>, values: &[u16]| {
        values.iter().for_each(|v| file.extend_from_slice(&v.to_le_bytes()))
    };
    let words = |file: &mut Vec<u8>, values: &[u32]| {
        values.iter().for_each(|v| file.extend_from_slice(&v.to_le_bytes()))
    };
    let longs = |file: &mut Vec<u8>, values: &[u64]| {
        values.iter().for_each(|v| file.extend_from_slice(&v.to_le_bytes()))
    };
    // An executable for this machine; where it begins, where its program headers are, no sections.
    halves(&mut file, &[2, machine]);
    words(&mut file, &[1]);
    longs(&mut file, &[entry, HEADER as u64, 0]);
    words(&mut file, &[0]);
    halves(&mut file, &[64, 56, 1, 64, 0, 0]);
    // Load all of it, readable and executable.
    words(&mut file, &[1, 5]);
    longs(&mut file, &[0, BASE, BASE, size, size, 0x1_0000]);
    file.extend_from_slice(code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;
    use std::time::Duration;

    #[test]
    fn the_program_runs_until_it_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pause");
        std::fs::write(&path, program()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = Command::new(&path).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap().trim();
        // SIGCHLD is signal 17, bit 16.
        assert_eq!(u64::from_str_radix(ignored, 16).unwrap() & (1 << 16), 1 << 16);
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn the_file_is_smaller_than_a_page() {
        assert!(program().len() < 512);
    }
}
