//! Reads a tar stream member by member.
//!
//! Header fields are decoded by the `tar` crate; the walk from header to header is ours, because that crate's own
//! iterator reads extension records of any length into memory and splits PAX records at newlines, which breaks binary
//! values (file capabilities among them). Sizes in PAX records take precedence over the header's, as everywhere.

use std::io::{self, ErrorKind, Read};
use std::sync::Arc;

use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

use super::LayerError;

const BLOCK: u64 = 512;
/// Long names, PAX records: real ones are a few kilobytes; an xattr value is at most 64 KiB.
const MAX_EXTENSION: u64 = 1 << 20;
const MAX_PATH: usize = 4096;
const MAX_ENTRY: u64 = 1 << 38;
const MAX_SPARSE_SEGMENTS: usize = 1 << 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Hardlink,
    Symlink,
    Directory,
    Fifo,
    CharDevice,
    BlockDevice,
}

/// A run of data within a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) length: u64,
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) kind: Kind,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds and nanoseconds since the epoch.
    pub(super) mtime: (i64, u32),
    /// The size of the file once written; with `sparse`, larger than its data.
    pub(super) size: u64,
    pub(super) device: (u32, u32),
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: Option<Vec<Segment>>,
}

/// What extension headers said about the member that follows them.
#[derive(Default)]
struct Overrides {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

pub(super) struct TarStream<R> {
    reader: R,
    /// Unread data of the current member, and the padding after it.
    remaining: u64,
    padding: u64,
}

fn source(cause: io::Error) -> LayerError {
    if cause.kind() == ErrorKind::UnexpectedEof {
        LayerError::Malformed("it ends in the middle of an entry")
    } else {
        LayerError::Source(Arc::new(cause))
    }
}

impl<R: Read> TarStream<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader, remaining: 0, padding: 0 }
    }

    /// The next member, or nothing at the end of the archive. What was not read of the last one is skipped.
    pub(super) fn next(&mut self) -> Result<Option<Member>, LayerError> {
        let mut overrides = Overrides::default();
        loop {
            self.skip(self.remaining + self.padding)?;
            (self.remaining, self.padding) = (0, 0);
            let Some(header) = self.header()? else { return Ok(None) };
            let declared = blank_is_zero(&header.as_old().size, header.entry_size())
                .map_err(|_| LayerError::Malformed("a size is not a number"))?;
            match header.entry_type() {
                EntryType::XHeader => pax(&self.extension(declared)?, &mut overrides)?,
                EntryType::GNULongName => overrides.path = Some(c_string(self.extension(declared)?)),
                EntryType::GNULongLink => overrides.link = Some(c_string(self.extension(declared)?)),
                EntryType::XGlobalHeader => drop(self.extension(declared)?),
                _ => return self.member(&header, declared, overrides).map(Some),
            }
        }
    }

    /// Reads data of the current member.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, LayerError> {
        let want = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        let got = loop {
            match self.reader.read(&mut buffer[..want]) {
                Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
                other => break other.map_err(source)?,
            }
        };
        if got == 0 {
            return Err(source(ErrorKind::UnexpectedEof.into()));
        }
        self.remaining -= got as u64;
        Ok(got)
    }

    /// Reads whatever follows the end of the archive, which is part of the layer's digest.
    pub(super) fn drain(mut self) -> Result<(), LayerError> {
        io::copy(&mut self.reader, &mut io::sink()).map(drop).map_err(source)
    }

    /// One header block, or nothing at the end: a zero block, or a clean end of input.
    fn header(&mut self) -> Result<Option<Header>, LayerError> {
        let mut header = Header::new_old();
        let mut filled = 0;
        while filled < header.as_bytes().len() {
            match self.reader.read(&mut header.as_mut_bytes()[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(source(ErrorKind::UnexpectedEof.into())),
                Ok(got) => filled += got,
                Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
                Err(cause) => return Err(source(cause)),
            }
        }
        let bytes = header.as_bytes();
        if bytes.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        // The checksum counts its own field as blanks.
        let sum = bytes[..148].iter().chain(&bytes[156..]).map(|b| u32::from(*b)).sum::<u32>() + 8 * 32;
        if header.cksum().ok() != Some(sum) {
            return Err(LayerError::Malformed("a header's checksum is wrong"));
        }
        Ok(Some(header))
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, LayerError> {
        if size > MAX_EXTENSION {
            return Err(LayerError::Limit("an extension header is larger than 1 MiB"));
        }
        let mut data = Vec::new();
        (&mut self.reader).take(size).read_to_end(&mut data).map_err(source)?;
        if data.len() as u64 != size {
            return Err(source(ErrorKind::UnexpectedEof.into()));
        }
        self.skip(padding(size))?;
        Ok(data)
    }

    fn skip(&mut self, count: u64) -> Result<(), LayerError> {
        let skipped = io::copy(&mut (&mut self.reader).take(count), &mut io::sink()).map_err(source)?;
        if skipped == count { Ok(()) } else { Err(source(ErrorKind::UnexpectedEof.into())) }
    }

    fn member(&mut self, header: &Header, declared: u64, over: Overrides) -> Result<Member, LayerError> {
        let stored = over.size.unwrap_or(declared);
        if stored > MAX_ENTRY {
            return Err(LayerError::Limit("an entry is larger than 256 GiB"));
        }
        let path = over.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let link =
            over.link.or_else(|| header.link_name_bytes().map(|name| name.into_owned())).unwrap_or_default();
        if path.len() > MAX_PATH || link.len() > MAX_PATH {
            return Err(LayerError::Limit("a path is longer than 4096 bytes"));
        }
        let kind = kind(header.entry_type(), &path)?;
        let number = |value: io::Result<u64>, over: Option<u64>| {
            let value = match over {
                Some(value) => value,
                None => value.map_err(|_| LayerError::Malformed("an owner is not a number"))?,
            };
            u32::try_from(value).map_err(|_| LayerError::Limit("an owner's id has more than 32 bits"))
        };
        let device = |value: io::Result<Option<u32>>| value.ok().flatten().unwrap_or(0);
        let seconds = || header.mtime().ok().and_then(|s| i64::try_from(s).ok()).unwrap_or(0);
        let mut member = Member {
            kind,
            mode: blank_is_zero(&header.as_old().mode, header.mode())
                .map_err(|_| LayerError::Malformed("a mode is not a number"))?
                & 0o7777,
            uid: number(blank_is_zero(&header.as_old().uid, header.uid()), over.uid)?,
            gid: number(blank_is_zero(&header.as_old().gid, header.gid()), over.gid)?,
            mtime: over.mtime.unwrap_or_else(|| (seconds(), 0)),
            size: if kind == Kind::File { stored } else { 0 },
            device: (device(header.device_major()), device(header.device_minor())),
            xattrs: over.xattrs,
            sparse: None,
            path,
            link,
        };
        if header.entry_type() == EntryType::GNUSparse {
            self.sparse(header, stored, &mut member)?;
        }
        // Whatever the size field of a link, directory or device says, no data follows it in the stream.
        let follows = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => stored,
            _ => 0,
        };
        (self.remaining, self.padding) = (follows, padding(follows));
        Ok(member)
    }

    /// The map of an old-style GNU sparse file, checked to be ordered and to account for all stored data.
    fn sparse(&mut self, header: &Header, stored: u64, member: &mut Member) -> Result<(), LayerError> {
        const WRONG: LayerError = LayerError::Malformed("a sparse file's map is inconsistent");
        let gnu = header.as_gnu().ok_or(WRONG)?;
        let mut segments = Vec::new();
        let mut add = |blocks: &[GnuSparseHeader]| -> Result<(), LayerError> {
            for block in blocks.iter().filter(|block| !block.is_empty()) {
                let offset = block.offset().map_err(|_| WRONG)?;
                let length = block.length().map_err(|_| WRONG)?;
                segments.push(Segment { offset, length });
            }
            if segments.len() > MAX_SPARSE_SEGMENTS {
                return Err(LayerError::Limit("a sparse file has more than 65536 segments"));
            }
            Ok(())
        };
        add(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut extension = GnuExtSparseHeader::new();
            self.reader.read_exact(extension.as_mut_bytes()).map_err(source)?;
            add(extension.sparse())?;
            more = extension.is_extended();
        }
        let size = gnu.real_size().map_err(|_| WRONG)?;
        let (mut end, mut data) = (0u64, 0u64);
        for segment in &segments {
            if segment.offset < end {
                return Err(WRONG);
            }
            end = segment.offset.checked_add(segment.length).ok_or(WRONG)?;
            data += segment.length;
        }
        if end > size || data != stored {
            return Err(WRONG);
        }
        if size > MAX_ENTRY {
            return Err(LayerError::Limit("an entry is larger than 256 GiB"));
        }
        member.size = size;
        member.sparse = Some(segments);
        Ok(())
    }
}

/// Some writers leave out numbers that are zero.
fn blank_is_zero<T: Default>(field: &[u8], value: io::Result<T>) -> io::Result<T> {
    if field.iter().all(|b| matches!(b, 0 | b' ')) { Ok(T::default()) } else { value }
}

fn padding(size: u64) -> u64 {
    (BLOCK - size % BLOCK) % BLOCK
}

fn kind(entry: EntryType, path: &[u8]) -> Result<Kind, LayerError> {
    Ok(match entry {
        // Archives from before ustar mark a directory only by its trailing slash.
        EntryType::Regular if path.ends_with(b"/") => Kind::Directory,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
        EntryType::Link => Kind::Hardlink,
        EntryType::Symlink => Kind::Symlink,
        EntryType::Directory => Kind::Directory,
        EntryType::Fifo => Kind::Fifo,
        EntryType::Char => Kind::CharDevice,
        EntryType::Block => Kind::BlockDevice,
        _ => return Err(LayerError::Malformed("it has an entry of an unknown type")),
    })
}

fn c_string(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

/// PAX records: `<decimal length of the whole record> <key>=<value>\n`; the length is what delimits them.
fn pax(mut data: &[u8], overrides: &mut Overrides) -> Result<(), LayerError> {
    const WRONG: LayerError = LayerError::Malformed("a PAX record is malformed");
    while !data.is_empty() && data[0] != 0 {
        let blank = data.iter().take(20).position(|b| *b == b' ').ok_or(WRONG)?;
        let length = number(&data[..blank]).and_then(|n| usize::try_from(n).ok()).ok_or(WRONG)?;
        if length <= blank + 1 || length > data.len() || data[length - 1] != b'\n' {
            return Err(WRONG);
        }
        let record = &data[blank + 1..length - 1];
        data = &data[length..];
        let equals = record.iter().position(|b| *b == b'=').ok_or(WRONG)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        match key {
            b"path" => overrides.path = Some(value.to_vec()),
            b"linkpath" => overrides.link = Some(value.to_vec()),
            b"size" => overrides.size = Some(number(value).ok_or(WRONG)?),
            b"uid" => overrides.uid = Some(number(value).ok_or(WRONG)?),
            b"gid" => overrides.gid = Some(number(value).ok_or(WRONG)?),
            b"mtime" => overrides.mtime = Some(pax_time(value).ok_or(WRONG)?),
            _ if key.starts_with(b"GNU.sparse.") => {
                return Err(LayerError::Malformed("PAX sparse files are not supported"));
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    overrides.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
    }
    Ok(())
}

fn number(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// `[-]seconds[.fraction]`, rounded down to nanoseconds.
fn pax_time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let (negative, digits) = match whole.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, whole),
    };
    let seconds = i64::try_from(number(digits.as_bytes())?).ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let nanos = fraction
        .bytes()
        .chain(std::iter::repeat(b'0'))
        .take(9)
        .fold(0u32, |n, b| n * 10 + u32::from(b - b'0'));
    Some(match (negative, nanos) {
        (false, _) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(bytes: &[u8]) -> Result<Vec<Member>, LayerError> {
        let mut stream = TarStream::new(bytes);
        let mut members = Vec::new();
        while let Some(member) = stream.next()? {
            members.push(member);
        }
        Ok(members)
    }

    fn archive_with_pax(records: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_pax_extensions(records.iter().copied()).unwrap();
        let mut header = Header::new_ustar();
        header.set_size(3);
        header.set_mode(0o644);
        header.set_path("short").unwrap();
        header.set_cksum();
        builder.append(&header, &b"abc"[..]).unwrap();
        builder.into_inner().unwrap()
    }

    #[test]
    fn pax_values_may_hold_newlines_and_override_the_header() {
        let members = all(&archive_with_pax(&[
            ("SCHILY.xattr.security.capability", b"a\nb=\0c"),
            ("path", b"long/er"),
            ("mtime", b"12.5"),
            ("uid", b"4000000000"),
        ]))
        .unwrap();
        assert_eq!(members[0].xattrs, [(b"security.capability".to_vec(), b"a\nb=\0c".to_vec())]);
        assert_eq!(members[0].path, b"long/er");
        assert_eq!(members[0].mtime, (12, 500_000_000));
        assert_eq!(members[0].uid, 4_000_000_000);
        assert_eq!(members[0].size, 3);
    }

    #[test]
    fn times_before_the_epoch_round_down() {
        assert_eq!(pax_time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(pax_time(b"-3"), Some((-3, 0)));
        assert_eq!(pax_time(b"x"), None);
    }

    #[test]
    fn a_giant_extension_header_is_refused_before_it_is_read() {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::XHeader);
        header.set_size(1 << 40);
        header.set_cksum();
        assert!(matches!(all(header.as_bytes()), Err(LayerError::Limit(_))));
    }

    #[test]
    fn every_truncation_is_an_error_or_a_shorter_archive_but_never_a_panic() {
        let whole = archive_with_pax(&[("path", b"x"), ("SCHILY.xattr.user.a", b"1")]);
        for cut in 1..whole.len() - 1024 {
            assert!(all(&whole[..cut]).is_err() || cut % 512 == 0, "cut at {cut}");
        }
    }

    proptest! {
        #[test]
        fn flipped_bytes_never_panic(position in 0usize..2048, value: u8) {
            let mut bytes = archive_with_pax(&[("path", b"x"), ("SCHILY.xattr.user.a", b"1")]);
            let position = position % bytes.len();
            bytes[position] = value;
            let _ = all(&bytes);
        }

        #[test]
        fn any_pax_record_is_answered_without_a_panic(data: Vec<u8>) {
            let _ = pax(&data, &mut Overrides::default());
        }
    }
}
