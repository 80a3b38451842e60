//! The session keyring: a container gets its own, so that keys of the host's session are not inherited.
#![allow(unsafe_code)]

use super::check;
use std::ffi::CStr;
use std::io;

const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;

pub(crate) fn join_session(name: &CStr) -> io::Result<()> {
    // SAFETY: `name` is a C string that outlives the call.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) }).map(|_| ())
}
