//! Header blocks: name-value pairs, compressed by one deflate stream per direction that begins with a dictionary the
//! protocol prescribes.

use super::frame::MAX_CONTROL;
use bytes::{Buf, BufMut, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use std::sync::LazyLock;

/// Names and values of a block. Several values of one name stand in one string, separated by NUL, as on the wire.
pub(crate) type Headers = Vec<(String, String)>;

/// The first part of the dictionary: words, each behind its length.
const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language \
    accept-ranges age allow authorization cache-control connection content-base content-encoding content-language \
    content-length content-location content-md5 content-range content-type date etag expect expires from host if-match \
    if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma \
    proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade \
    user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie \
    keep-alive origin";

/// The second part: plain text.
const TEXT: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
    203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden\
    404 Not Found500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept \
    Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,\
    application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdch\
    charset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

static DICTIONARY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut dictionary = Vec::new();
    for word in WORDS.split_whitespace() {
        let word = word.replace('_', " ");
        dictionary.put_u32(u32::try_from(word.len()).unwrap_or(0));
        dictionary.put_slice(word.as_bytes());
    }
    dictionary.put_slice(TEXT.as_bytes());
    dictionary
});

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum HeaderError {
    #[error("a header block does not decompress: {0}")]
    Compression(String),
    #[error("a header block is longer than {MAX_CONTROL} bytes")]
    TooLong,
    #[error("a header block ends in the middle of a header")]
    Truncated,
    #[error("a header is not text")]
    NotText,
}

/// Compresses our blocks, in the order they are sent.
#[derive(Debug)]
pub(super) struct Encoder(Compress);

impl Encoder {
    pub(super) fn new() -> Result<Self, HeaderError> {
        let mut compress = Compress::new(Compression::fast(), true);
        compress.set_dictionary(&DICTIONARY).map_err(|e| HeaderError::Compression(e.to_string()))?;
        Ok(Self(compress))
    }

    pub(super) fn encode(&mut self, headers: &Headers) -> Result<Vec<u8>, HeaderError> {
        let mut plain = BytesMut::new();
        let length = |text: usize| u32::try_from(text).map_err(|_| HeaderError::TooLong);
        plain.put_u32(length(headers.len())?);
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            plain.put_u32(length(text.len())?);
            plain.put_slice(text.as_bytes());
        }
        let mut block = Vec::with_capacity(plain.len() + 64);
        loop {
            let before = self.0.total_in();
            self.0
                .compress_vec(&plain, &mut block, FlushCompress::Sync)
                .map_err(|e| HeaderError::Compression(e.to_string()))?;
            plain.advance(usize::try_from(self.0.total_in() - before).unwrap_or(usize::MAX));
            // A sync flush is complete when it leaves room in the output.
            if plain.is_empty() && block.len() < block.capacity() {
                return Ok(block);
            }
            block.reserve(256);
        }
    }
}

/// Decompresses the peer's blocks, in the order they came.
#[derive(Debug)]
pub(super) struct Decoder(Decompress);

impl Decoder {
    pub(super) fn new() -> Self {
        Self(Decompress::new(true))
    }

    pub(super) fn decode(&mut self, mut block: &[u8]) -> Result<Headers, HeaderError> {
        let mut plain = Vec::with_capacity(1024);
        while !block.is_empty() || plain.len() == plain.capacity() {
            if plain.len() >= MAX_CONTROL {
                return Err(HeaderError::TooLong);
            }
            plain.reserve(1024);
            let (consumed, produced) = (self.0.total_in(), plain.len());
            match self.0.decompress_vec(block, &mut plain, FlushDecompress::Sync) {
                Ok(Status::StreamEnd) => break,
                Ok(Status::Ok | Status::BufError) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0
                        .set_dictionary(&DICTIONARY)
                        .map_err(|e| HeaderError::Compression(e.to_string()))?;
                }
                Err(error) => return Err(HeaderError::Compression(error.to_string())),
            }
            let consumed = usize::try_from(self.0.total_in() - consumed).unwrap_or(usize::MAX);
            if consumed == 0 && plain.len() == produced && block.is_empty() {
                break;
            }
            block = block.get(consumed..).unwrap_or_default();
        }
        parse(&plain)
    }
}

fn parse(mut plain: &[u8]) -> Result<Headers, HeaderError> {
    let number = |plain: &mut &[u8]| plain.try_get_u32().map_err(|_| HeaderError::Truncated);
    let count = number(&mut plain)? as usize;
    let mut headers = Vec::with_capacity(count.min(64));
    let text = |plain: &mut &[u8]| -> Result<String, HeaderError> {
        let length = number(plain)? as usize;
        let (text, rest) = plain.split_at_checked(length).ok_or(HeaderError::Truncated)?;
        *plain = rest;
        String::from_utf8(text.to_vec()).map_err(|_| HeaderError::NotText)
    };
    for _ in 0..count {
        headers.push((text(&mut plain)?.to_ascii_lowercase(), text(&mut plain)?));
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_dictionary_is_the_one_the_protocol_prescribes() {
        assert_eq!(DICTIONARY.len(), 1423);
        // Adler-32 of the dictionary, as it stands in the head of every SPDY/3 header stream.
        let mut encoder = Encoder::new().unwrap();
        let block = encoder.encode(&vec![("a".into(), "b".into())]).unwrap();
        assert_eq!(block[2..6], [0xe3, 0xc6, 0xa7, 0xc2]);
    }

    #[test]
    fn blocks_survive_the_wire_in_order() {
        let (mut encoder, mut decoder) = (Encoder::new().unwrap(), Decoder::new());
        for kind in ["error", "stdin", "stdout", "a-value-that-is-new"] {
            let headers =
                vec![("streamtype".to_owned(), kind.to_owned()), ("port".to_owned(), "80".to_owned())];
            let block = encoder.encode(&headers).unwrap();
            assert_eq!(decoder.decode(&block).unwrap(), headers);
        }
    }

    #[test]
    fn a_bomb_is_refused() {
        let mut encoder = Encoder::new().unwrap();
        let block = encoder.encode(&vec![("a".into(), "b".repeat(1 << 20))]).unwrap();
        assert!(block.len() < MAX_CONTROL);
        assert_eq!(Decoder::new().decode(&block), Err(HeaderError::TooLong));
    }

    proptest! {
        #[test]
        fn any_headers_survive(names in proptest::collection::vec("[a-z-]{1,20}", 0..8), value in ".{0,200}") {
            let headers: Headers = names.into_iter().map(|n| (n, value.clone())).collect();
            let block = Encoder::new().unwrap().encode(&headers).unwrap();
            prop_assert_eq!(Decoder::new().decode(&block).unwrap(), headers);
        }

        #[test]
        fn no_bytes_make_it_panic(block: Vec<u8>) {
            let _refused = Decoder::new().decode(&block);
            let _refused = parse(&block);
        }
    }
}
