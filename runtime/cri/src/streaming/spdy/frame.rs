//! SPDY/3.1 frames: eight bytes of head, then the payload. Payloads of data frames are not handled here, they may be
//! large and are carried through.

use bytes::{Buf, BufMut, Bytes, BytesMut};

pub(super) const HEAD: usize = 8;
/// Control frames carry a few short headers; whoever sends more than this means no good.
pub(super) const MAX_CONTROL: usize = 64 << 10;

const VERSION: u16 = 3;
const FIN: u8 = 1;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;

/// Status codes of RST_STREAM.
pub(super) const PROTOCOL_ERROR: u32 = 1;
pub(super) const INVALID_STREAM: u32 = 2;
pub(super) const REFUSED_STREAM: u32 = 3;

/// The head of any frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Head {
    Data { stream: u32, fin: bool, length: usize },
    Control { kind: u16, fin: bool, length: usize },
}

/// A control frame that means something to us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Control {
    SynStream {
        stream: u32,
        fin: bool,
        block: Bytes,
    },
    SynReply {
        stream: u32,
        fin: bool,
        block: Bytes,
    },
    Reset {
        stream: u32,
    },
    Ping {
        id: u32,
    },
    GoAway,
    /// Settings, window updates, priorities: nothing follows from them here.
    Ignored,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum FrameError {
    #[error("SPDY version {0} is not spoken here")]
    Version(u16),
    #[error("a control frame of {0} bytes is too long")]
    TooLong(usize),
    #[error("a control frame of type {0} is too short")]
    TooShort(u16),
}

pub(super) fn parse_head(bytes: [u8; HEAD]) -> Result<Head, FrameError> {
    let mut bytes = &bytes[..];
    let first = bytes.get_u32();
    let rest = bytes.get_u32();
    let [flags, ..] = rest.to_be_bytes();
    let length = (rest & 0x00ff_ffff) as usize;
    let fin = flags & FIN != 0;
    if first >> 31 == 0 {
        return Ok(Head::Data { stream: first, fin, length });
    }
    let [high, low, kind_high, kind_low] = first.to_be_bytes();
    let version = u16::from_be_bytes([high & 0x7f, low]);
    if version != VERSION {
        return Err(FrameError::Version(version));
    }
    if length > MAX_CONTROL {
        return Err(FrameError::TooLong(length));
    }
    Ok(Head::Control { kind: u16::from_be_bytes([kind_high, kind_low]), fin, length })
}

pub(super) fn parse_control(kind: u16, fin: bool, mut payload: Bytes) -> Result<Control, FrameError> {
    let needed = match kind {
        SYN_STREAM => 10,
        SYN_REPLY | PING => 4,
        RST_STREAM | GOAWAY => 8,
        _ => return Ok(Control::Ignored),
    };
    if payload.len() < needed {
        return Err(FrameError::TooShort(kind));
    }
    let first = payload.get_u32();
    let stream = first & 0x7fff_ffff;
    Ok(match kind {
        SYN_STREAM => {
            payload.advance(6);
            Control::SynStream { stream, fin, block: payload }
        }
        SYN_REPLY => Control::SynReply { stream, fin, block: payload },
        RST_STREAM => Control::Reset { stream },
        PING => Control::Ping { id: first },
        _ => Control::GoAway,
    })
}

fn control(kind: u16, flags: u8, length: usize) -> BytesMut {
    let mut frame = BytesMut::with_capacity(HEAD + length);
    frame.put_u16(0x8000 | VERSION);
    frame.put_u16(kind);
    frame.put_u32(u32::from(flags) << 24 | length_field(length));
    frame
}

/// What is written here is bounded by our own buffers, far below the 24 bits of the field.
fn length_field(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX) & 0x00ff_ffff
}

pub(super) fn syn_stream(stream: u32, block: &[u8]) -> Bytes {
    let mut frame = control(SYN_STREAM, 0, 10 + block.len());
    frame.put_u32(stream);
    frame.put_u32(0);
    frame.put_u16(0);
    frame.put_slice(block);
    frame.freeze()
}

pub(super) fn syn_reply(stream: u32, block: &[u8]) -> Bytes {
    let mut frame = control(SYN_REPLY, 0, 4 + block.len());
    frame.put_u32(stream);
    frame.put_slice(block);
    frame.freeze()
}

pub(super) fn reset(stream: u32, status: u32) -> Bytes {
    let mut frame = control(RST_STREAM, 0, 8);
    frame.put_u32(stream);
    frame.put_u32(status);
    frame.freeze()
}

pub(super) fn ping(id: u32) -> Bytes {
    let mut frame = control(PING, 0, 4);
    frame.put_u32(id);
    frame.freeze()
}

pub(super) fn data_head(stream: u32, fin: bool, length: usize) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    let mut rest = &mut head[..];
    rest.put_u32(stream);
    rest.put_u32(if fin { u32::from(FIN) << 24 } else { 0 } | length_field(length));
    head
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reread(frame: &Bytes) -> Control {
        let head = parse_head(frame[..HEAD].try_into().unwrap()).unwrap();
        let Head::Control { kind, fin, length } = head else { panic!("{head:?}") };
        assert_eq!(length, frame.len() - HEAD);
        parse_control(kind, fin, frame.slice(HEAD..)).unwrap()
    }

    #[test]
    fn frames_we_write_are_read_back() {
        let block = Bytes::from_static(b"block");
        assert_eq!(
            reread(&syn_stream(5, &block)),
            Control::SynStream { stream: 5, fin: false, block: block.clone() }
        );
        assert_eq!(reread(&syn_reply(7, &block)), Control::SynReply { stream: 7, fin: false, block });
        assert_eq!(reread(&reset(9, PROTOCOL_ERROR)), Control::Reset { stream: 9 });
        assert_eq!(reread(&ping(3)), Control::Ping { id: 3 });
        assert_eq!(
            parse_head(data_head(11, true, 70_000)).unwrap(),
            Head::Data { stream: 11, fin: true, length: 70_000 }
        );
    }

    #[test]
    fn a_syn_stream_is_laid_out_as_the_specification_draws_it() {
        assert_eq!(
            &syn_stream(1, &[0xaa])[..],
            [0x80, 3, 0, 1, 0, 0, 0, 11, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xaa]
        );
    }

    #[test]
    fn long_control_frames_and_other_versions_are_refused() {
        assert_eq!(parse_head([0x80, 2, 0, 1, 0, 0, 0, 0]), Err(FrameError::Version(2)));
        assert_eq!(parse_head([0x80, 3, 0, 1, 0, 0xff, 0xff, 0xff]), Err(FrameError::TooLong(0xff_ffff)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(head: [u8; 8], payload: Vec<u8>) {
            if let Ok(Head::Control { kind, fin, .. }) = parse_head(head) {
                let _parsed = parse_control(kind, fin, Bytes::from(payload));
            }
        }
    }
}
