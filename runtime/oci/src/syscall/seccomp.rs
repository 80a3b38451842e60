//! `seccomp(2)`: installing a filter.
#![allow(unsafe_code)]

use super::check;
use std::io;

const SECCOMP_SET_MODE_FILTER: libc::c_uint = 1;

/// One classic BPF instruction, `struct sock_filter`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Filter {
    pub(crate) code: u16,
    pub(crate) jump_true: u8,
    pub(crate) jump_false: u8,
    pub(crate) value: u32,
}

#[repr(C)]
struct Program {
    len: u16,
    filter: *const Filter,
}

pub(crate) fn install(filter: &[Filter], flags: u64) -> io::Result<()> {
    let len = u16::try_from(filter.len()).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?;
    let program = Program { len, filter: filter.as_ptr() };
    // SAFETY: `program` is a sock_fprog whose pointer and length describe `filter`; both live across the call.
    check(unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &raw const program) })
        .map(|_| ())
}
