//! Moving output from containers to their logs and to attached clients.

use super::containers::Container;
use super::poller::Poller;
use super::{Daemon, READ_BYTES, sys};
use crate::log::StreamName;
use rustix::io::Errno;
use std::os::fd::AsFd;

/// What a terminal can hold of output that nobody has read: its own queue and the kernel's buffers before it.
const MAX_TERMINAL_BYTES: usize = 1 << 20;

enum ReadOutcome {
    Bytes(usize),
    Nothing,
    End,
}

impl Daemon {
    pub(super) fn read_output(&mut self, id: &str, stream: StreamName) {
        let Some(container) = self.containers.existing.get_mut(id) else { return };
        if let ReadOutcome::End = container.read(&mut self.poller, &mut self.buffer, stream) {
            container.close_output(&mut self.poller, stream);
            self.fdstore.remove(id, output_name(stream));
        }
    }

    pub(super) fn drop_copy(&mut self, id: &str, number: u64) {
        if let Some(container) = self.containers.existing.get_mut(id) {
            container.copies.close(&mut self.poller, |copy| copy.number == number);
        }
    }
}

pub(super) fn output_name(stream: StreamName) -> &'static str {
    match stream {
        StreamName::Stdout => "stdout",
        StreamName::Stderr => "stderr",
    }
}

impl Container {
    /// Reads once.
    fn read(&mut self, poller: &mut Poller, buffer: &mut [u8], stream: StreamName) -> ReadOutcome {
        let source = match stream {
            StreamName::Stdout => &self.streams.stdout,
            StreamName::Stderr => &self.streams.stderr,
        };
        let Some(source) = source else { return ReadOutcome::End };
        let count = match rustix::io::read(source, &mut *buffer) {
            // A terminal whose other side is closed answers with EIO.
            Ok(0) | Err(Errno::IO) => return ReadOutcome::End,
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return ReadOutcome::Nothing,
            Err(error) => {
                tracing::warn!(container = %self.record.id, %error, "cannot read output");
                return ReadOutcome::End;
            }
        };
        let bytes = &buffer[..count];
        if let Some(log) = &mut self.log {
            log.append(stream, bytes, sys::now());
        }
        self.copies.write(poller, stream, bytes);
        ReadOutcome::Bytes(count)
    }

    pub(super) fn close_output(&mut self, poller: &mut Poller, stream: StreamName) {
        let source = match stream {
            StreamName::Stdout => self.streams.stdout.take(),
            StreamName::Stderr => self.streams.stderr.take(),
        };
        if let Some(source) = source {
            drop(poller.release(source));
        }
        if let Some(log) = &mut self.log {
            log.flush(stream, sys::now());
        }
        self.copies.close(poller, |copy| copy.stream == stream);
    }

    /// Brings into the log what the container had written by now, without waiting for descendants that may hold its
    /// streams open and go on writing.
    pub(super) fn drain_output(&mut self, poller: &mut Poller, buffer: &mut [u8]) {
        for stream in [StreamName::Stdout, StreamName::Stderr] {
            let source = match stream {
                StreamName::Stdout => &self.streams.stdout,
                StreamName::Stderr => &self.streams.stderr,
            };
            let Some(source) = source else { continue };
            let mut left = if self.record.tty {
                MAX_TERMINAL_BYTES
            } else {
                rustix::io::ioctl_fionread(source.as_fd())
                    .map_or(READ_BYTES, |n| usize::try_from(n).unwrap_or(READ_BYTES))
            };
            while left > 0 {
                match self.read(poller, buffer, stream) {
                    ReadOutcome::Bytes(count) => left = left.saturating_sub(count),
                    ReadOutcome::Nothing => break,
                    ReadOutcome::End => {
                        self.close_output(poller, stream);
                        break;
                    }
                }
            }
            if let Some(log) = &mut self.log {
                log.flush(stream, sys::now());
            }
        }
    }
}
