//! The one unsafe step of the client: registering a descriptor with the asynchronous runtime.
#![allow(unsafe_code)]

use std::os::fd::OwnedFd;
use tokio::io::unix::AsyncFd;

pub(super) fn register(socket: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is a valid descriptor, and nothing here replaces or closes it while the AsyncFd owns it.
    unsafe { AsyncFd::register(socket) }.map_err(Into::into)
}
