//! The netfilter netlink socket: commits batches, decodes refusals, dumps what the kernel holds.

use super::attr::{Attributes, Messages, Received, Writer, read_u32};
use super::batch::{Batch, Encoded, Encoder, NLM_F_DUMP, NLM_F_REQUEST, header, message_kind};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use rustix::io::Errno;
use rustix::net::sockopt;
use std::io;

#[derive(Debug, thiserror::Error)]
pub enum NftError {
    #[error("cannot open a netfilter netlink socket")]
    Open(#[source] io::Error),
    #[error("cannot send {bytes} bytes of nftables messages")]
    Send { bytes: usize, source: io::Error },
    #[error("cannot receive from the netfilter netlink socket")]
    Receive(#[source] io::Error),
    /// `errors` counts the operations the kernel refused; this is the first.
    #[error("nftables refused to {operation}: {errno}{detail}{}", others(*.errors))]
    Refused { operation: String, errno: Errno, detail: String, errors: usize },
    #[error("nftables changed during each of {attempts} dumps of {what}")]
    Unsteady { what: &'static str, attempts: u32 },
}

fn others(errors: usize) -> String {
    if errors > 1 { format!(" (and {} more errors)", errors - 1) } else { String::new() }
}

impl NftError {
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Something a change or a dump refers to does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.errno() == Some(Errno::NOENT)
    }

    /// It exists already, in another form.
    #[must_use]
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(Errno::EXIST)
    }
}

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const DUMP_ATTEMPTS: u32 = 10;
const RECEIVE_BUFFER: usize = 64 * 1024;

/// A connection to nftables in the network namespace in which it was opened. Calls block, in practice for microseconds
/// (a commit of 50,000 elements: a tenth of a second).
#[derive(Debug)]
pub struct NftSocket {
    socket: Socket,
    seq: u32,
    buffer: Vec<u8>,
    send_buffer: usize,
}

impl NftSocket {
    /// In the calling thread's network namespace; see [`crate::netns`] for others.
    ///
    /// # Errors
    /// [`NftError::Open`], as when the kernel has no nftables.
    pub fn open() -> Result<Self, NftError> {
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(NftError::Open)?;
        socket.bind_auto().map_err(NftError::Open)?;
        socket.set_ext_ack(true).map_err(NftError::Open)?;
        // Errors then come without the refused message, which may be 64 KB long.
        socket.set_cap_ack(true).map_err(NftError::Open)?;
        Ok(Self { socket, seq: 1, buffer: vec![0; RECEIVE_BUFFER], send_buffer: 0 })
    }

    /// All of the batch in one transaction.
    ///
    /// # Errors
    /// [`NftError::Refused`] names the first operation that the kernel did not take; nothing has changed then.
    pub fn commit(&mut self, batch: &Batch) -> Result<(), NftError> {
        if batch.is_empty() {
            return Ok(());
        }
        let encoded = Encoder::encode(batch, self.seq);
        let messages = u32::try_from(encoded.origins.len()).unwrap_or(u32::MAX).wrapping_add(2);
        self.seq = self.seq.wrapping_add(messages);
        self.send(&encoded.bytes)?;
        self.collect_refusals(batch, &encoded, messages)
    }

    /// A transaction is one datagram, so the send buffer must hold all of it.
    fn send(&mut self, bytes: &[u8]) -> Result<(), NftError> {
        let failed = |source| NftError::Send { bytes: bytes.len(), source };
        let needed = bytes.len() + bytes.len() / 8 + 32 * 1024;
        if needed > self.send_buffer.max(128 * 1024) {
            sockopt::set_socket_send_buffer_size_force(&self.socket, needed)
                .map_err(|errno| failed(errno.into()))?;
            self.send_buffer = needed;
        }
        loop {
            match self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// The kernel has handled the batch when the send returns, so all answers are already here; success is silence.
    fn collect_refusals(&mut self, batch: &Batch, encoded: &Encoded, messages: u32) -> Result<(), NftError> {
        let mut first = None;
        let mut errors = 0;
        loop {
            let length = match self.socket.recv(&mut &mut self.buffer[..], libc::MSG_DONTWAIT) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // The answers did not fit; those that did have been read, and there were too many to be a success.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) && first.is_some() => continue,
                Err(error) => return Err(NftError::Receive(error)),
            };
            for message in Messages::new(&self.buffer[..length]) {
                let index = message.seq.wrapping_sub(encoded.first_seq);
                let Some((errno, ack)) = refusal(&message).filter(|_| index < messages) else { continue };
                errors += 1;
                if first.is_none() {
                    first = Some((describe(batch, encoded, index, &ack), errno, ack.text));
                }
            }
        }
        first.map_or(Ok(()), |(operation, errno, text)| {
            let detail = if text.is_empty() { String::new() } else { format!(" ({text})") };
            Err(NftError::Refused { operation, errno, detail, errors })
        })
    }

    /// Sends a get request and hands every answer to `each`, from the start if the kernel reports that the ruleset
    /// changed meanwhile (`reset` is called before).
    pub(super) fn dump<T>(
        &mut self,
        what: &'static str,
        (kind, family): (u16, u8),
        body: impl Fn(&mut Writer),
        mut each: impl FnMut(u8, &[u8]) -> Option<T>,
    ) -> Result<Vec<T>, NftError> {
        for _ in 0..DUMP_ATTEMPTS {
            let seq = self.seq;
            self.seq = self.seq.wrapping_add(1);
            let mut w = Writer::new();
            w.message(message_kind(kind), NLM_F_REQUEST | NLM_F_DUMP, seq, |w| {
                header(w, family, 0);
                body(w);
            });
            self.send(&w.into_bytes())?;
            if let Some(items) = self.receive_dump(what, seq, &mut each)? {
                return Ok(items);
            }
        }
        Err(NftError::Unsteady { what, attempts: DUMP_ATTEMPTS })
    }

    fn receive_dump<T>(
        &mut self,
        what: &'static str,
        seq: u32,
        each: &mut impl FnMut(u8, &[u8]) -> Option<T>,
    ) -> Result<Option<Vec<T>>, NftError> {
        let mut items = Vec::new();
        let mut steady = true;
        loop {
            let length = match self.socket.recv(&mut &mut self.buffer[..], 0) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(NftError::Receive(error)),
            };
            for message in Messages::new(&self.buffer[..length]).filter(|m| m.seq == seq) {
                steady &= message.flags & NLM_F_DUMP_INTR == 0;
                if let Some((errno, ack)) = refusal(&message) {
                    let detail = if ack.text.is_empty() { String::new() } else { format!(" ({})", ack.text) };
                    return Err(NftError::Refused {
                        operation: format!("list {what}"),
                        errno,
                        detail,
                        errors: 1,
                    });
                }
                if message.kind == NLMSG_DONE {
                    return Ok(steady.then_some(items));
                }
                if let [family, _, _, _, attributes @ ..] = message.payload {
                    items.extend(each(*family, attributes));
                }
            }
        }
    }
}

/// What the kernel adds to an error number.
#[derive(Debug, Default)]
struct ExtendedAck {
    text: String,
    /// Of the attribute at fault, from the start of the refused message.
    offset: Option<usize>,
}

fn refusal(message: &Received<'_>) -> Option<(Errno, ExtendedAck)> {
    if message.kind != NLMSG_ERROR && message.kind != NLMSG_DONE {
        return None;
    }
    let code = read_u32(message.payload)?.cast_signed();
    if code == 0 {
        return None;
    }
    let mut ack = ExtendedAck::default();
    if message.kind == NLMSG_ERROR && message.flags & NLM_F_ACK_TLVS != 0 {
        let header = message.payload.get(4..20)?;
        let body = if message.flags & NLM_F_CAPPED != 0 { 16 } else { read_u32(header)? as usize };
        let attributes = message.payload.get(4 + body.next_multiple_of(4)..).unwrap_or_default();
        for (kind, payload) in Attributes::new(attributes) {
            match kind {
                1 => ack.text = super::attr::read_string(payload),
                2 => ack.offset = read_u32(payload).and_then(|o| usize::try_from(o).ok()),
                _ => {}
            }
        }
    }
    Some((Errno::from_raw_os_error(code.saturating_neg()), ack))
}

/// Names the operation of a refused message, and the element if the kernel pointed at one.
fn describe(batch: &Batch, encoded: &Encoded, index: u32, ack: &ExtendedAck) -> String {
    let origin =
        usize::try_from(index).ok().and_then(|i| i.checked_sub(1)).and_then(|i| encoded.origins.get(i));
    let Some(origin) = origin else { return "commit the transaction".to_owned() };
    let op = &batch.ops[origin.op];
    let element = ack
        .offset
        .and_then(|offset| element_at(&encoded.bytes[origin.offset..], offset))
        .and_then(|nth| nth_element(&op.elements()[origin.first_element..], nth));
    match element {
        Some(element) => format!("{op} {:?}", element.key),
        None => op.to_string(),
    }
}

/// The number of the list entry that contains the byte at `offset` of the message.
fn element_at(message: &[u8], offset: usize) -> Option<usize> {
    let message = Messages::new(message).next()?;
    let list = Attributes::find(message.payload.get(4..)?, 3)?;
    // Distances within one buffer, counted from the end, which all these slices share up to padding.
    let list_start = list.as_ptr() as usize - message.payload.as_ptr() as usize + 16;
    let within = offset.checked_sub(list_start)?;
    let mut position = 0;
    for (index, (_, payload)) in Attributes::new(list).enumerate() {
        position += (payload.len() + 4).next_multiple_of(4);
        if within < position {
            return Some(index);
        }
    }
    None
}

/// Elements of interval sets are two list entries each.
fn nth_element(elements: &[super::object::Element], nth: usize) -> Option<&super::object::Element> {
    let mut entries = 0;
    elements.iter().find(|element| {
        let twice =
            matches!(&element.end, Some(super::object::RangeEnd::Single(last)) if last.successor().is_some());
        entries += if twice { 2 } else { 1 };
        nth < entries
    })
}
