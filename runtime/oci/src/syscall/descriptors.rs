//! Closing ranges of descriptors.
#![allow(unsafe_code)]

use super::check;
use std::io;
use std::os::fd::RawFd;

const CLOSE_RANGE_CLOEXEC: libc::c_uint = 4;

fn close_range(first: u32, last: u32, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: closing descriptors touches no memory. Callers are freshly forked children that never again use an
    // owner of a descriptor in the range.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) }).map(|_| ())
}

/// Closes every descriptor from 3 on that is not in `keep`. Only for a freshly forked child: the owners of those
/// descriptors in memory must never be dropped there, which holds because it ends by execve or `_exit`.
pub(crate) fn close_others(keep: &mut [RawFd]) -> io::Result<()> {
    keep.sort_unstable();
    let mut next = 3u32;
    for &fd in keep.iter() {
        let Ok(fd) = u32::try_from(fd) else { continue };
        if fd > next {
            close_range(next, fd - 1, 0)?;
        }
        next = next.max(fd + 1);
    }
    close_range(next, u32::MAX, 0)
}

/// Everything from `first` on disappears at the next execve.
pub(crate) fn cloexec_from(first: u32) -> io::Result<()> {
    close_range(first, u32::MAX, CLOSE_RANGE_CLOEXEC)
}
