//! Staying with a process: signals forwarded, the terminal relayed, its exit status returned.

use super::Error;
use crate::syscall::signals;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions};
use rustix::termios::{OptionalActions, Termios};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The signals of this process, taken from their default handling.
#[derive(Debug)]
pub(super) struct Signals(SignalFd);

impl Signals {
    /// Before anything is started, so that none ends this process half-way. Children get a clean mask.
    pub(super) fn block() -> Result<Self, Error> {
        let mut mask = SigSet::all();
        // Faults of our own are not to be forwarded.
        for own in [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGILL, Signal::SIGFPE, Signal::SIGABRT] {
            mask.remove(own);
        }
        let fail = |errno: nix::errno::Errno| Error::Io("take over the signals", errno.into());
        mask.thread_block().map_err(fail)?;
        Ok(Self(SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(fail)?))
    }

    fn next(&self) -> Option<i32> {
        let info = self.0.read_signal().ok().flatten()?;
        i32::try_from(info.ssi_signo).ok()
    }
}

/// Our own terminal in raw mode; restored when dropped.
struct Raw(Option<Termios>);

impl Raw {
    fn enter() -> Self {
        let stdin = rustix::stdio::stdin();
        let Ok(before) = rustix::termios::tcgetattr(stdin) else { return Self(None) };
        let mut raw = before.clone();
        raw.make_raw();
        let _ = rustix::termios::tcsetattr(stdin, OptionalActions::Now, &raw);
        Self(Some(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, before);
        }
    }
}

fn copy_size(master: &OwnedFd) {
    if let Ok(size) = rustix::termios::tcgetwinsize(rustix::stdio::stdin()) {
        let _ = rustix::termios::tcsetwinsize(master, size);
    }
}

/// Waits for a child: its exit code, or 128 plus the signal that ended it.
pub(super) fn follow(
    pidfd: BorrowedFd<'_>,
    console: Option<OwnedFd>,
    signals: &Signals,
) -> Result<u8, Error> {
    let _raw = console.as_ref().map(|_| Raw::enter());
    console.iter().for_each(copy_size);
    let fail = |errno: Errno| Error::Io("wait for the process", errno.into());
    let (mut stdin_open, mut console_open) = (console.is_some(), console.is_some());
    loop {
        let never = PollFlags::empty();
        let master = console.as_ref().map_or(pidfd, AsFd::as_fd);
        let stdin = rustix::stdio::stdin();
        let mut poll = [
            PollFd::from_borrowed_fd(pidfd, PollFlags::IN),
            PollFd::from_borrowed_fd(signals.0.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(
                if console_open { master } else { pidfd },
                if console_open { PollFlags::IN } else { never },
            ),
            PollFd::from_borrowed_fd(
                if stdin_open { stdin } else { pidfd },
                if stdin_open { PollFlags::IN } else { never },
            ),
        ];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll, None)).map_err(fail)?;
        let ready = |index: usize| poll.get(index).is_some_and(|fd| !fd.revents().is_empty());
        let (ended, output, input) = (ready(0), ready(2) && console_open, ready(3) && stdin_open);
        while let Some(signal) = signals.next() {
            if signal == libc::SIGWINCH {
                console.iter().for_each(copy_size);
            }
            if !matches!(signal, libc::SIGCHLD | libc::SIGWINCH | libc::SIGURG | libc::SIGPIPE) {
                let _ = signals::send(pidfd, signal);
            }
        }
        if output {
            console_open = relay(master, rustix::stdio::stdout());
        }
        if input {
            stdin_open = relay(stdin, master);
        }
        // What the process wrote last is relayed before its end is reported.
        if ended && !output {
            return status(pidfd).map_err(fail);
        }
    }
}

/// Whether there may be more.
fn relay(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> bool {
    let mut buffer = [0u8; 8192];
    let Ok(length @ 1..) = rustix::io::retry_on_intr(|| rustix::io::read(from, &mut buffer)) else {
        return false;
    };
    let mut rest = buffer.get(..length).unwrap_or_default();
    while !rest.is_empty() {
        match rustix::io::retry_on_intr(|| rustix::io::write(to, rest)) {
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            Err(_) => return false,
        }
    }
    true
}

fn status(pidfd: BorrowedFd<'_>) -> Result<u8, Errno> {
    let status =
        rustix::io::retry_on_intr(|| rustix::process::waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED))?;
    let code = status.map_or(255, |status| match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 255,
    });
    Ok(u8::try_from(code & 0xff).unwrap_or(255))
}
