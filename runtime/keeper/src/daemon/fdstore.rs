//! The service manager's descriptor store: where streams and process handles wait when the keeper dies all the same.
//!
//! Everything here is a courtesy of the manager: messages are sent without waiting and without an answer, and nothing
//! depends on their arrival. Names are `<container>.<what>`.

use super::containers::Container;
use super::sys;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use std::collections::BTreeMap;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

/// What is kept of a container.
const KEPT: [&str; 5] = ["pidfd", "stdout", "stderr", "stdin", "console"];
/// The manager refuses longer names.
const MAX_NAME: usize = 255;
const FIRST_PASSED: i32 = 3;

#[derive(Debug)]
pub(super) struct FdStore {
    /// Absent where no manager listens.
    manager: Option<(OwnedFd, SocketAddrUnix)>,
}

impl FdStore {
    pub(super) fn from_environment() -> Self {
        let connect = || -> Option<(OwnedFd, SocketAddrUnix)> {
            let name = std::env::var_os("NOTIFY_SOCKET")?;
            let address = match name.as_bytes() {
                [b'@', rest @ ..] => SocketAddrUnix::new_abstract_name(rest).ok()?,
                path => SocketAddrUnix::new(path).ok()?,
            };
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket =
                rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None).ok()?;
            Some((socket, address))
        };
        Self { manager: connect() }
    }

    pub(super) fn ready(&self) {
        self.send(&format!("READY=1\nMAINPID={}\n", std::process::id()), None);
    }

    pub(super) fn store(&self, container: &Container) {
        let streams = &container.streams;
        let kept: [Option<BorrowedFd<'_>>; 5] = [
            container.pidfd.as_ref().map(AsFd::as_fd),
            // With a terminal both are duplicates of its master.
            streams.stdout.as_ref().filter(|_| streams.console.is_none()).map(AsFd::as_fd),
            streams.stderr.as_ref().map(AsFd::as_fd),
            streams.stdin.as_ref().map(AsFd::as_fd),
            streams.console.as_ref().map(AsFd::as_fd),
        ];
        for (what, fd) in KEPT.iter().zip(kept) {
            let name = format!("{}.{what}", container.record.id);
            if let Some(fd) = fd
                && name.len() <= MAX_NAME
            {
                // Without FDPOLL=0 the manager would drop a pipe at the writer's end, with output still in it.
                self.send(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n"), Some(fd));
            }
        }
    }

    pub(super) fn remove(&self, id: &str, what: &str) {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={id}.{what}\n"), None);
    }

    pub(super) fn remove_all(&self, id: &str) {
        for what in KEPT {
            self.remove(id, what);
        }
    }

    fn send(&self, text: &str, fd: Option<BorrowedFd<'_>>) {
        let Some((socket, address)) = &self.manager else { return };
        let descriptors = Vec::from_iter(fd);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let slices = [IoSlice::new(text.as_bytes())];
        match rustix::net::sendmsg_addr(socket, address, &slices, &mut ancillary, flags) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => tracing::warn!(%error, "cannot tell the service manager"),
        }
    }
}

/// Takes what the manager kept for us, by container and by name.
pub(super) fn take_passed() -> BTreeMap<(String, String), OwnedFd> {
    let variable = |name: &str| std::env::var(name).ok();
    let for_us = variable("LISTEN_PID").is_some_and(|pid| pid == std::process::id().to_string());
    let count: i32 = variable("LISTEN_FDS").and_then(|n| n.parse().ok()).unwrap_or(0);
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"] {
        sys::remove_variable(name);
    }
    let mut passed = BTreeMap::new();
    if !for_us {
        return passed;
    }
    for (raw, name) in (FIRST_PASSED..FIRST_PASSED.saturating_add(count)).zip(names.split(':')) {
        match (sys::adopt_fd(raw), name.rsplit_once('.')) {
            (Ok(fd), Some((id, what))) => {
                passed.insert((id.to_owned(), what.to_owned()), fd);
            }
            (Ok(_), None) => tracing::warn!(name, "closed a descriptor with an unknown name"),
            (Err(error), _) => tracing::warn!(name, %error, "cannot take over a descriptor"),
        }
    }
    passed
}
