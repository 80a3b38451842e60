//! Copies of a container's output for attached clients.
//!
//! A copy is a pipe that the keeper fills without ever waiting: once it is full its reader is dropped, because the
//! alternatives are to hold back the container or to give the reader output with holes in it.

use super::poller::{GONE, Poller, Target, Watched};
use crate::log::StreamName;
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use std::os::fd::OwnedFd;

/// A reader may lag behind by this much.
const COPY_BYTES: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct Copy {
    pub(super) number: u64,
    pub(super) stream: StreamName,
    pub(super) pipe: Watched,
}

#[derive(Debug, Default)]
pub(super) struct Copies {
    pub(super) open: Vec<Copy>,
    pub(super) next: u64,
}

impl Copies {
    /// Returns the read end of a new copy.
    pub(super) fn add(
        &mut self,
        poller: &mut Poller,
        id: &str,
        stream: StreamName,
    ) -> Result<OwnedFd, Errno> {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // A smaller pipe only drops a slow reader earlier.
        let _ = rustix::pipe::fcntl_setpipe_size(&write, COPY_BYTES);
        self.adopt(poller, id, stream, write)?;
        Ok(read)
    }

    pub(super) fn adopt(
        &mut self,
        poller: &mut Poller,
        id: &str,
        stream: StreamName,
        write: OwnedFd,
    ) -> Result<(), Errno> {
        self.next += 1;
        let pipe = poller.watch(write, GONE, Target::Copy(id.to_owned(), self.next))?;
        self.open.push(Copy { number: self.next, stream, pipe });
        Ok(())
    }

    pub(super) fn write(&mut self, poller: &mut Poller, stream: StreamName, bytes: &[u8]) {
        self.close(poller, |copy| {
            // A partial write means a full pipe: the reader would see a hole.
            copy.stream == stream
                && !matches!(rustix::io::write(&copy.pipe, bytes), Ok(n) if n == bytes.len())
        });
    }

    pub(super) fn close(&mut self, poller: &mut Poller, which: impl Fn(&Copy) -> bool) {
        for copy in self.open.extract_if(.., |copy| which(copy)) {
            drop(poller.release(copy.pipe));
        }
    }
}
