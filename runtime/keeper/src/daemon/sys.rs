//! System calls that no library here offers safely, and the clock.
#![allow(unsafe_code)]

use rustix::io::Errno;
use std::ffi::OsStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{SystemTime, UNIX_EPOCH};

/// Nanoseconds since the epoch.
pub(super) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Takes over a descriptor that an earlier program, or the service manager, left open for this one.
pub(super) fn adopt_fd(raw: RawFd) -> Result<OwnedFd, Errno> {
    if raw < 0 {
        return Err(Errno::BADF);
    }
    // SAFETY: the borrow lives for this call only; a number that is not open is refused by the kernel.
    let borrowed = unsafe { BorrowedFd::borrow_raw(raw) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: the number is open (just asked) and named in the hand-over, so nothing else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// Any signal number, the real-time ones included.
pub(super) fn kill(pid: u32, signal: i32) -> Result<(), Errno> {
    let Ok(pid) = i32::try_from(pid) else { return Err(Errno::SRCH) };
    if pid <= 0 {
        return Err(Errno::SRCH);
    }
    // SAFETY: takes no pointers; a positive number names one process.
    if unsafe { libc::kill(pid, signal) } == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error().raw_os_error().map_or(Errno::INVAL, Errno::from_raw_os_error))
}

/// The wait status of a process that ended without being our child (Linux 6.15, once its parent has reaped it).
pub(super) fn exit_status_of_stranger(pidfd: BorrowedFd<'_>) -> Option<i32> {
    // SAFETY: the structure is plain numbers, for which zero is valid.
    let mut info: libc::pidfd_info = unsafe { std::mem::zeroed() };
    info.mask = u64::from(libc::PIDFD_INFO_EXIT);
    // SAFETY: the request's size is that of the structure, which outlives the call.
    let asked = unsafe { libc::ioctl(pidfd.as_raw_fd(), libc::PIDFD_GET_INFO as _, &raw mut info) };
    (asked == 0 && info.mask & u64::from(libc::PIDFD_INFO_EXIT) != 0).then_some(info.exit_code)
}

/// Environment variables are how the path of the program survives a re-exec.
pub(super) fn set_variable(name: &str, value: &OsStr) {
    // SAFETY: the program has one thread.
    unsafe { std::env::set_var(name, value) };
}

pub(super) fn remove_variable(name: &str) {
    // SAFETY: the program has one thread.
    unsafe { std::env::remove_var(name) };
}
