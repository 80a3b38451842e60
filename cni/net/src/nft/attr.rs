//! Netlink messages and attributes as bytes: writing into one buffer, reading without copies.
//!
//! A transaction of a service proxy has tens of thousands of elements, so everything is appended to a single buffer and
//! lengths are patched in afterwards. Attribute payloads are at most [`MAX_PAYLOAD`] bytes; who writes lists splits them.

/// The 16-bit length of an attribute includes its four-byte header.
pub(crate) const MAX_PAYLOAD: usize = u16::MAX as usize - 4;

const NESTED: u16 = 1 << 15;
const TYPE_MASK: u16 = 0x3fff;
const NLMSG_HEADER: usize = 16;

/// A buffer that holds any number of netlink messages.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    buf: Vec<u8>,
}

impl Writer {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.buf
    }

    pub(crate) fn len(&self) -> usize {
        self.buf.len()
    }

    fn align(&mut self) {
        self.buf.resize(self.buf.len().next_multiple_of(4), 0);
    }

    /// One netlink message whose payload is written by `body`.
    pub(crate) fn message(&mut self, kind: u16, flags: u16, seq: u32, body: impl FnOnce(&mut Self)) {
        let start = self.buf.len();
        self.buf.extend_from_slice(&[0; 4]);
        self.buf.extend_from_slice(&kind.to_ne_bytes());
        self.buf.extend_from_slice(&flags.to_ne_bytes());
        self.buf.extend_from_slice(&seq.to_ne_bytes());
        self.buf.extend_from_slice(&[0; 4]);
        body(self);
        self.align();
        let length = u32::try_from(self.buf.len() - start).expect("a netlink message is far below 4 GiB");
        self.buf[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }

    pub(crate) fn bytes(&mut self, kind: u16, payload: &[u8]) {
        self.attribute(kind, |w| w.raw(payload));
    }

    /// A string with its terminating NUL, as the kernel wants names.
    pub(crate) fn string(&mut self, kind: u16, text: &str) {
        self.attribute(kind, |w| {
            w.raw(text.as_bytes());
            w.raw(&[0]);
        });
    }

    pub(crate) fn u8(&mut self, kind: u16, value: u8) {
        self.bytes(kind, &[value]);
    }

    pub(crate) fn be32(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(crate) fn be64(&mut self, kind: u16, value: u64) {
        self.bytes(kind, &value.to_be_bytes());
    }

    pub(crate) fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        self.attribute(kind | NESTED, body);
    }

    fn attribute(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        let start = self.buf.len();
        self.buf.extend_from_slice(&[0, 0]);
        self.buf.extend_from_slice(&kind.to_ne_bytes());
        body(self);
        let length =
            u16::try_from(self.buf.len() - start).expect("lists are split below 64 KiB by the callers");
        self.buf[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.align();
    }
}

/// The attributes of one level; stops quietly at the first malformed header.
#[derive(Debug, Clone)]
pub(crate) struct Attributes<'a> {
    rest: &'a [u8],
}

impl<'a> Attributes<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The payload of the first attribute of this kind.
    pub(crate) fn find(bytes: &'a [u8], kind: u16) -> Option<&'a [u8]> {
        Self::new(bytes).find(|(k, _)| *k == kind).map(|(_, payload)| payload)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(u16::from_ne_bytes(self.rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(self.rest.get(2..4)?.try_into().ok()?) & TYPE_MASK;
        let payload = self.rest.get(4..length)?;
        self.rest = self.rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    }
}

/// One received netlink message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Received<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) seq: u32,
    pub(crate) payload: &'a [u8],
}

/// The messages of a datagram.
#[derive(Debug)]
pub(crate) struct Messages<'a> {
    rest: &'a [u8],
}

impl<'a> Messages<'a> {
    pub(crate) fn new(datagram: &'a [u8]) -> Self {
        Self { rest: datagram }
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Received<'a>;

    fn next(&mut self) -> Option<Received<'a>> {
        let header = self.rest.get(..NLMSG_HEADER)?;
        let length = usize::try_from(read_u32(header)?).ok()?;
        let payload = self.rest.get(NLMSG_HEADER..length)?;
        self.rest = self.rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Received {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            seq: read_u32(&header[8..])?,
            payload,
        })
    }
}

/// Host byte order.
pub(crate) fn read_u32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

pub(crate) fn read_be32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?))
}

pub(crate) fn read_be64(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(..8)?.try_into().ok()?))
}

/// A name without its terminating NUL.
pub(crate) fn read_string(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut w = Writer::new();
        w.message(7, 1, 42, |w| {
            w.raw(&[1, 0, 0, 0]);
            w.string(1, "abc");
            w.nest(2, |w| w.be32(3, 9));
        });
        let bytes = w.into_bytes();
        let message = Messages::new(&bytes).next().unwrap();
        assert_eq!((message.kind, message.flags, message.seq), (7, 1, 42));
        let body = &message.payload[4..];
        assert_eq!(read_string(Attributes::find(body, 1).unwrap()), "abc");
        let nested = Attributes::find(body, 2).unwrap();
        assert_eq!(read_be32(Attributes::find(nested, 3).unwrap()), Some(9));
    }

    proptest::proptest! {
        #[test]
        fn reading_arbitrary_bytes_ends_without_panic(bytes: Vec<u8>) {
            for message in Messages::new(&bytes) {
                for (_, payload) in Attributes::new(message.payload) {
                    let _ = Attributes::new(payload).count();
                    let _ = read_string(payload);
                }
            }
        }
    }
}
