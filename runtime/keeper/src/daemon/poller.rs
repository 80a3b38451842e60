//! The poll set, and what each wake-up is about.
//!
//! The kernel keeps a registration as long as any duplicate of the descriptor lives, and terminals and pipes are handed
//! out to clients: so a registration is always taken back explicitly, and a late event for a token that is gone means
//! nothing.

use crate::log::StreamName;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

pub(super) const READ: EventFlags = EventFlags::IN;
/// Only what cannot be masked: the other side has gone.
pub(super) const GONE: EventFlags = EventFlags::empty();

/// Events fetched at once; more come with the next wake-up.
const BATCH: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    Listener,
    Signals,
    Client(u64),
    /// A container being set up.
    Creating(String),
    /// A container's init has ended.
    Init(String),
    Output(String, StreamName),
    /// The reader of a copy of the output has gone.
    Copy(String, u64),
    StartingExec(String, String),
    Exec(String, String),
}

/// A registration; the descriptor belongs to somebody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token(u64);

/// A descriptor in the poll set. Give it back with [`Poller::release`].
#[derive(Debug)]
pub(super) struct Watched {
    fd: OwnedFd,
    token: Token,
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[derive(Debug)]
pub(super) struct Poller {
    epoll: OwnedFd,
    targets: HashMap<u64, Target>,
    next: u64,
}

impl Poller {
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)?, targets: HashMap::new(), next: 0 })
    }

    pub(super) fn watch(&mut self, fd: OwnedFd, flags: EventFlags, target: Target) -> Result<Watched, Errno> {
        let token = self.watch_borrowed(fd.as_fd(), flags, target)?;
        Ok(Watched { fd, token })
    }

    pub(super) fn watch_borrowed(
        &mut self,
        fd: BorrowedFd<'_>,
        flags: EventFlags,
        target: Target,
    ) -> Result<Token, Errno> {
        self.next += 1;
        epoll::add(&self.epoll, fd, EventData::new_u64(self.next), flags)?;
        self.targets.insert(self.next, target);
        Ok(Token(self.next))
    }

    pub(super) fn change(&self, watched: &Watched, flags: EventFlags) -> Result<(), Errno> {
        epoll::modify(&self.epoll, &watched.fd, EventData::new_u64(watched.token.0), flags)
    }

    pub(super) fn release(&mut self, watched: Watched) -> OwnedFd {
        self.forget(watched.token, watched.fd.as_fd());
        watched.fd
    }

    pub(super) fn forget(&mut self, token: Token, fd: BorrowedFd<'_>) {
        self.targets.remove(&token.0);
        // Fails only for what is not registered, which is what is wanted.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Appends what is ready. `timeout` in nanoseconds; `None` waits for ever.
    pub(super) fn wait(&mut self, ready: &mut Vec<Target>, timeout: Option<i64>) -> Result<(), Errno> {
        let timeout = timeout.map(|ns| {
            let ns = ns.max(0);
            Timespec { tv_sec: ns / 1_000_000_000, tv_nsec: ns % 1_000_000_000 }
        });
        let mut buffer = [MaybeUninit::<Event>::uninit(); BATCH];
        let events = match epoll::wait(&self.epoll, &mut buffer, timeout.as_ref()) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(error),
        };
        for event in events {
            let data = event.data;
            ready.extend(self.targets.get(&data.u64()).cloned());
        }
        Ok(())
    }
}
