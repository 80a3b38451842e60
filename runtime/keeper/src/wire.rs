//! Packets of the keeper's socket: JSON in one `SOCK_SEQPACKET` message, descriptors beside it.
//!
//! A packet that begins with `{` is the JSON itself. A packet that begins with `@` says that the JSON lies in the first
//! descriptor, a memory file: that lifts the kernel's bound on the size of a packet without framing, and bounds what
//! the keeper reads at once. Nothing here blocks; a full socket is [`WireError::WouldBlock`].

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Larger messages travel in a memory file.
const INLINE_BYTES: usize = 32 << 10;
/// Nothing that agent and keeper say is larger than this.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Three streams and the memory file.
const MAX_DESCRIPTORS: usize = 4;
const IN_MEMORY_FILE: &[u8] = b"@";

#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("socket is not ready")]
    WouldBlock,
    #[error("peer closed the connection")]
    Closed,
    #[error("message of {0} bytes exceeds {MAX_MESSAGE_BYTES}")]
    TooLarge(u64),
    #[error("message has no valid content: {0}")]
    Malformed(String),
    #[error("cannot use the socket: {0}")]
    Socket(#[from] Errno),
}

/// One message, encoded, with its descriptors, ready to be sent as often as the socket refuses it.
#[derive(Debug)]
pub struct Packet {
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Packet {
    pub fn encode<T: Serialize>(message: &T, descriptors: Vec<OwnedFd>) -> Result<Self, WireError> {
        let bytes = serde_json::to_vec(message).map_err(|e| WireError::Malformed(e.to_string()))?;
        if bytes.len() > MAX_MESSAGE_BYTES {
            return Err(WireError::TooLarge(bytes.len() as u64));
        }
        if bytes.len() <= INLINE_BYTES {
            return Ok(Self { bytes, descriptors });
        }
        let mut all = vec![memory_file(&bytes)?];
        all.extend(descriptors);
        Ok(Self { bytes: IN_MEMORY_FILE.to_vec(), descriptors: all })
    }

    /// How much this packet holds in memory while it waits.
    pub fn weight(&self) -> usize {
        self.bytes.len() + self.descriptors.len() * 1024
    }

    pub fn send(&self, socket: BorrowedFd<'_>) -> Result<(), WireError> {
        let borrowed: Vec<BorrowedFd<'_>> = self.descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(WireError::Malformed("too many descriptors".to_owned()));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match rustix::net::sendmsg(socket, &[IoSlice::new(&self.bytes)], &mut ancillary, flags) {
            Ok(_) => Ok(()),
            // Too many descriptors in flight passes like a full socket does.
            Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS | Errno::TOOMANYREFS) => {
                Err(WireError::WouldBlock)
            }
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => Err(WireError::Closed),
            Err(e) => Err(WireError::Socket(e)),
        }
    }
}

/// A received message, not yet decoded: a malformed one must not end the connection.
#[derive(Debug)]
pub struct Received {
    bytes: Vec<u8>,
    pub descriptors: Vec<OwnedFd>,
}

impl Received {
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, WireError> {
        serde_json::from_slice(&self.bytes).map_err(|e| WireError::Malformed(e.to_string()))
    }

    /// The request's id, as far as one can be made out in a message that does not decode.
    pub fn id_at_least(&self) -> u64 {
        #[derive(serde::Deserialize)]
        struct OnlyId {
            id: u64,
        }
        serde_json::from_slice::<OnlyId>(&self.bytes).map_or(0, |only| only.id)
    }
}

/// Takes one packet from the socket.
pub fn receive(socket: BorrowedFd<'_>) -> Result<Received, WireError> {
    let mut buffer = vec![0_u8; INLINE_BYTES + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received =
        match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut buffer)], &mut ancillary, flags) {
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return Err(WireError::WouldBlock),
            Err(Errno::CONNRESET) => return Err(WireError::Closed),
            Err(e) => return Err(WireError::Socket(e)),
        };
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            descriptors.extend(fds);
        }
    }
    if received.bytes == 0 {
        return Err(WireError::Closed);
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Ok(Received { bytes: Vec::new(), descriptors: Vec::new() });
    }
    buffer.truncate(received.bytes);
    if buffer == IN_MEMORY_FILE {
        // What cannot be read decodes to nothing, and is answered as malformed.
        buffer = if descriptors.is_empty() {
            Vec::new()
        } else {
            read_memory_file(&descriptors.remove(0)).unwrap_or_default()
        };
    }
    Ok(Received { bytes: buffer, descriptors })
}

fn memory_file(bytes: &[u8]) -> Result<OwnedFd, WireError> {
    let file = rustix::fs::memfd_create("orlop-message", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut rest = bytes;
    while !rest.is_empty() {
        let written = rustix::io::write(&file, rest)?;
        rest = &rest[written..];
    }
    rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(file)
}

/// Reads only sealed memory files: any other descriptor could block the reader or change under it.
fn read_memory_file(file: &OwnedFd) -> Result<Vec<u8>, WireError> {
    let seals = rustix::fs::fcntl_get_seals(file)?;
    if !seals.contains(SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW) {
        return Err(WireError::Malformed("memory file is not sealed".to_owned()));
    }
    let size = u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(u64::MAX);
    let length = usize::try_from(size).unwrap_or(usize::MAX);
    if length > MAX_MESSAGE_BYTES {
        return Err(WireError::TooLarge(size));
    }
    let mut bytes = vec![0_u8; length];
    let mut filled = 0;
    while filled < length {
        let count = rustix::io::pread(file, &mut bytes[filled..], filled as u64)?;
        if count == 0 {
            return Err(WireError::Malformed("memory file ended early".to_owned()));
        }
        filled += count;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Answer, Call, Failure, FromKeeper, Request};
    use proptest::prelude::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::os::fd::AsRawFd;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
    }

    #[test]
    fn a_request_and_its_descriptors_arrive_as_sent() {
        let (left, right) = pair();
        let (read_end, write_end) = rustix::pipe::pipe().unwrap();
        let request = Request { id: 7, call: Call::Attach { id: "c".to_owned() } };
        Packet::encode(&request, vec![read_end]).unwrap().send(left.as_fd()).unwrap();
        let mut received = receive(right.as_fd()).unwrap();
        let decoded: Request = received.decode().unwrap();
        assert_eq!(decoded.id, 7);
        assert!(matches!(decoded.call, Call::Attach { id } if id == "c"));
        rustix::io::write(&write_end, b"x").unwrap();
        let passed = received.descriptors.remove(0);
        assert_eq!(rustix::io::read(&passed, &mut [0; 4]).unwrap(), 1);
        let flags = rustix::io::fcntl_getfd(&passed).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC), "descriptor {} leaks", passed.as_raw_fd());
    }

    #[test]
    fn a_message_beyond_the_inline_size_travels_in_a_memory_file() {
        let (left, right) = pair();
        let text = "x".repeat(1 << 20);
        let reply = FromKeeper::Reply { id: 1, result: Err(Failure::Refused(text)) };
        Packet::encode(&reply, Vec::new()).unwrap().send(left.as_fd()).unwrap();
        let received = receive(right.as_fd()).unwrap();
        assert!(received.descriptors.is_empty());
        assert_eq!(received.decode::<FromKeeper>().unwrap(), reply);
    }

    #[test]
    fn a_message_beyond_the_bound_is_not_sent() {
        let reply = FromKeeper::Reply { id: 1, result: Err(Failure::Refused("x".repeat(MAX_MESSAGE_BYTES))) };
        assert!(matches!(Packet::encode(&reply, Vec::new()), Err(WireError::TooLarge(_))));
    }

    #[test]
    fn a_descriptor_that_is_no_sealed_memory_file_is_not_read() {
        let (left, right) = pair();
        let (read_end, _write_end) = rustix::pipe::pipe().unwrap();
        Packet { bytes: IN_MEMORY_FILE.to_vec(), descriptors: vec![read_end] }.send(left.as_fd()).unwrap();
        let received = receive(right.as_fd()).unwrap();
        assert!(received.decode::<Request>().is_err());
    }

    #[test]
    fn an_oversized_packet_is_malformed_and_the_next_one_is_read() {
        let (left, right) = pair();
        Packet { bytes: vec![b'{'; INLINE_BYTES * 2], descriptors: Vec::new() }.send(left.as_fd()).unwrap();
        let good = FromKeeper::Reply { id: 3, result: Ok(Answer::Done) };
        Packet::encode(&good, Vec::new()).unwrap().send(left.as_fd()).unwrap();
        assert!(receive(right.as_fd()).unwrap().decode::<FromKeeper>().is_err());
        assert_eq!(receive(right.as_fd()).unwrap().decode::<FromKeeper>().unwrap(), good);
    }

    #[test]
    fn the_id_of_an_unknown_request_is_still_found() {
        let received =
            Received { bytes: br#"{"id":9,"call":{"dance":{}}}"#.to_vec(), descriptors: Vec::new() };
        assert!(received.decode::<Request>().is_err());
        assert_eq!(received.id_at_least(), 9);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 1..2000)) {
            let (left, right) = pair();
            Packet { bytes, descriptors: Vec::new() }.send(left.as_fd()).unwrap();
            let received = receive(right.as_fd()).unwrap();
            let _ = received.decode::<Request>();
            let _ = received.id_at_least();
        }

        #[test]
        fn mutilated_requests_never_panic(cut in 0_usize..200, at in 0_usize..200, with in any::<u8>()) {
            let request = Request { id: 7, call: Call::Kill { id: "c".to_owned(), signal: 9, all: true } };
            let mut bytes = serde_json::to_vec(&request).unwrap();
            bytes.truncate(cut.max(1));
            if let Some(byte) = bytes.get_mut(at) {
                *byte = with;
            }
            let received = Received { bytes, descriptors: Vec::new() };
            let _ = received.decode::<Request>();
            let _ = received.id_at_least();
        }
    }
}
