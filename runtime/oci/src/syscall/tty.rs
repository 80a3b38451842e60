//! Making a terminal the controlling one.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

pub(crate) fn set_controlling(terminal: impl AsFd) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer argument.
    if unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
