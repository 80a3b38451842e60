//! What a process on its way into a container and the runtime say to each other: one packet per message.

use crate::syscall::socket;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// From the child.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Message {
    /// The stage made the container's init; its pidfd travels along.
    Staged {
        pid: u32,
    },
    /// Write the id maps of my user namespace.
    MapIds,
    /// Namespaces and mounts are there: run the hooks that belong to the runtime.
    RuntimeHooks,
    /// The terminal's master travels along.
    Console,
    /// Worth telling, not worth failing.
    Warning(String),
    /// Waiting for start.
    Created,
    /// The next thing is execve.
    Executing,
    Failed(String),
}

/// The child's side. Calls block.
#[derive(Debug)]
pub(crate) struct Child {
    socket: OwnedFd,
}

/// The runtime's side. Reading never blocks.
#[derive(Debug)]
pub(crate) struct Parent {
    socket: OwnedFd,
}

pub(crate) fn pair() -> io::Result<(Parent, Child)> {
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    Ok((Parent { socket: ours }, Child { socket: theirs }))
}

fn send(socket: &OwnedFd, message: &Message, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message).map_err(io::Error::other)?;
    socket::send(socket, &bytes, fds)
}

impl Child {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    pub(crate) fn send(&self, message: &Message) -> io::Result<()> {
        send(&self.socket, message, &[])
    }

    pub(crate) fn send_with(&self, message: &Message, fd: BorrowedFd<'_>) -> io::Result<()> {
        send(&self.socket, message, &[fd])
    }

    /// Asks for something and waits until it is done.
    pub(crate) fn ask(&self, message: &Message) -> io::Result<()> {
        self.send(message)?;
        let mut answer = [0u8; 1];
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.socket, &mut answer))? {
            1 => Ok(()),
            // The runtime has given up; it will kill this process.
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

impl AsFd for Child {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Parent {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    pub(crate) fn acknowledge(&self) -> io::Result<()> {
        socket::send(&self.socket, b"+", &[])
    }

    /// `Ok(None)` when the other side is gone; `WouldBlock` when it has nothing to say yet.
    pub(crate) fn receive(&self, blocking: bool) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
        let mut buffer = vec![0u8; 64 * 1024];
        if !blocking {
            let mut poll = [rustix::event::PollFd::new(&self.socket, rustix::event::PollFlags::IN)];
            let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            if rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll, Some(&now)))? == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
        let (length, fds) = match socket::receive(&self.socket, &mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
            other => other?,
        };
        if length == 0 {
            return Ok(None);
        }
        let message =
            serde_json::from_slice(buffer.get(..length).unwrap_or_default()).map_err(io::Error::other)?;
        Ok(Some((message, fds)))
    }
}

impl AsFd for Parent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// An error with all its causes on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&describe(cause));
        source = cause.source();
    }
    text
}

/// Without Rust's "(os error 2)", in the words that callers of runtimes look for.
fn describe(error: &dyn std::error::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error ") {
        Some((words, _)) => words.to_lowercase(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_arrives_with_its_descriptor_and_the_end_is_seen() {
        let (parent, child) = pair().unwrap();
        assert_eq!(parent.receive(false).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let null = std::fs::File::open("/dev/null").unwrap();
        child.send_with(&Message::Console, null.as_fd()).unwrap();
        let (message, fds) = parent.receive(false).unwrap().unwrap();
        assert!(matches!(message, Message::Console));
        assert_eq!(fds.len(), 1);
        drop(child);
        assert!(parent.receive(false).unwrap().is_none());
    }

    #[test]
    fn causes_are_told_in_the_systems_words() {
        let error = crate::mounts::Error::Mount {
            kind: "x".into(),
            destination: "/y".into(),
            step: "attach".into(),
            message: None,
            source: io::Error::from_raw_os_error(libc::ENOENT),
        };
        assert_eq!(chain(&error), "mount x on /y: attach: no such file or directory");
    }
}
