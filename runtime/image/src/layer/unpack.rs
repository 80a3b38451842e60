//! Verifies, decompresses and writes a layer in one pass.
//!
//! Hashing and decompression run on the calling thread, writing files on a second one, with a few buffers between
//! them: a single large layer then uses two cores, and no more than a megabyte is in flight.

use std::io::{self, BufRead, BufReader, Chain, Cursor, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use flate2::bufread::MultiGzDecoder;

use super::{Applied, Applier, LayerError};
use crate::digest::{Digest, Hasher};

const PIECE: usize = 128 * 1024;
const PIECES: usize = 6;
/// Decoder memory one layer may ask for: 64 MiB covers every level below zstd's last `--ultra` ones.
const ZSTD_WINDOW_LOG: u32 = 26;

/// What the bytes must turn out to be.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    /// Digest and size of the blob as transferred; unknown for a layer inside a docker archive.
    pub(crate) blob: Option<(Digest, u64)>,
    /// Digest of the uncompressed archive.
    pub(crate) diff_id: Digest,
}

/// Unpacks `source` into the directory `root`. Nothing about `root` may be trusted unless this returns `Ok`.
pub(crate) fn unpack(
    source: impl Read + Send,
    expected: &Expected,
    root: &Path,
    scratch: &Path,
) -> Result<Applied, LayerError> {
    let mut source = Metered::new(source, expected.blob.clone());
    let result = decompress_and_apply(&mut source, expected, root, scratch);
    // Garbage in the blob shows up as an archive error first; only its digest tells a damaged transfer from a bad
    // image. A fault of this node needs no such answer.
    match result {
        Err(error) if error.is_io() => Err(error),
        result => {
            source.finish()?;
            result
        }
    }
}

fn decompress_and_apply(
    source: &mut (impl Read + Send),
    expected: &Expected,
    root: &Path,
    scratch: &Path,
) -> Result<Applied, LayerError> {
    let applier_paths = (root, scratch);
    let (full, pieces) = sync_channel::<Vec<u8>>(PIECES);
    let (recycle, empty) = channel::<Vec<u8>>();
    std::thread::scope(|scope| {
        let writer = std::thread::Builder::new()
            .name("layer-writer".to_owned())
            .spawn_scoped(scope, move || {
                let reader = Pieces { pieces, recycle, current: Vec::new(), position: 0 };
                Applier::new(applier_paths.0, applier_paths.1)?.apply(reader)
            })
            .map_err(|cause| LayerError::Source(Arc::new(cause)))?;
        let read = feed(source, expected.diff_id.algorithm(), full, &empty);
        let written = writer.join().map_err(|_| LayerError::Worker)?;
        match (read, written) {
            // The reader's own failure is the cause of the writer's early end of input.
            (Err(error), _) | (Ok(_), Err(error)) => Err(error),
            (Ok(None), Ok(_)) => Err(LayerError::Worker),
            (Ok(Some(actual)), Ok(applied)) if actual == expected.diff_id => Ok(applied),
            (Ok(Some(actual)), Ok(_)) => Err(LayerError::DigestMismatch {
                what: "uncompressed layer",
                expected: expected.diff_id.clone(),
                actual,
            }),
        }
    })
}

/// Decompresses all of `source` into the channel. Nothing if the other side has stopped listening.
fn feed(
    source: &mut (impl Read + Send),
    algorithm: crate::digest::Algorithm,
    full: SyncSender<Vec<u8>>,
    empty: &Receiver<Vec<u8>>,
) -> Result<Option<Digest>, LayerError> {
    let mut archive = decompress(source).map_err(read_error)?;
    let mut hasher = Hasher::new(algorithm);
    loop {
        let mut piece = empty.try_recv().unwrap_or_default();
        piece.resize(PIECE, 0);
        let mut filled = 0;
        while filled < PIECE {
            match archive.read(&mut piece[filled..]) {
                Ok(0) => break,
                Ok(got) => filled += got,
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
                Err(cause) => return Err(read_error(cause)),
            }
        }
        if filled == 0 {
            return Ok(Some(hasher.finish()));
        }
        piece.truncate(filled);
        hasher.update(&piece);
        if full.send(piece).is_err() {
            return Ok(None);
        }
    }
}

/// Errors of the source come through the decoder; those the decoder makes are of these kinds.
fn read_error(cause: io::Error) -> LayerError {
    match cause.kind() {
        io::ErrorKind::InvalidData
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::UnexpectedEof
        | io::ErrorKind::Other => LayerError::Decompress(Arc::new(cause)),
        _ => LayerError::Source(Arc::new(cause)),
    }
}

type Peeked<R> = Chain<Cursor<Vec<u8>>, BufReader<R>>;

/// Gzip, zstd or nothing, told by the first bytes: media types are not always right, and archives have none.
pub(crate) fn decompress<'a, R: Read + Send + 'a>(source: R) -> io::Result<Box<dyn Read + Send + 'a>> {
    let mut source = BufReader::with_capacity(PIECE, source);
    let mut magic = Vec::with_capacity(4);
    (&mut source).take(4).read_to_end(&mut magic)?;
    let (gzip, zstd) = (magic.starts_with(&[0x1f, 0x8b]), magic == [0x28, 0xb5, 0x2f, 0xfd]);
    let whole: Peeked<R> = Cursor::new(magic).chain(source);
    if gzip {
        return Ok(Box::new(MultiGzDecoder::new(whole)));
    }
    if zstd {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(whole)?;
        decoder.window_log_max(ZSTD_WINDOW_LOG)?;
        return Ok(Box::new(decoder));
    }
    Ok(Box::new(ReadBuffered(whole)))
}

struct ReadBuffered<R>(R);

impl<R: BufRead> Read for ReadBuffered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

/// Counts and hashes what passes, and refuses more than was announced.
struct Metered<R> {
    inner: R,
    expected: Option<(Digest, u64)>,
    hasher: Option<Hasher>,
    count: u64,
}

impl<R: Read> Metered<R> {
    fn new(inner: R, expected: Option<(Digest, u64)>) -> Self {
        let hasher = expected.as_ref().map(|(digest, _)| Hasher::new(digest.algorithm()));
        Self { inner, expected, hasher, count: 0 }
    }

    /// Reads to the end and compares.
    fn finish(mut self) -> Result<(), LayerError> {
        if self.expected.is_none() {
            return Ok(());
        }
        io::copy(&mut self, &mut io::sink()).map_err(|cause| match cause.kind() {
            io::ErrorKind::InvalidData => LayerError::SizeMismatch {
                expected: self.expected.as_ref().map_or(0, |(_, size)| *size),
                actual: self.count,
            },
            _ => LayerError::Source(Arc::new(cause)),
        })?;
        let (Some((digest, size)), Some(hasher)) = (self.expected, self.hasher) else { return Ok(()) };
        if self.count != size {
            return Err(LayerError::SizeMismatch { expected: size, actual: self.count });
        }
        let actual = hasher.finish();
        if actual != digest {
            return Err(LayerError::DigestMismatch { what: "blob", expected: digest, actual });
        }
        Ok(())
    }
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.count += got as u64;
        if let Some((_, size)) = &self.expected
            && self.count > *size
        {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the blob is longer than announced"));
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..got]);
        }
        Ok(got)
    }
}

/// The receiving end of the channel as a reader; used buffers go back to the sender.
struct Pieces {
    pieces: Receiver<Vec<u8>>,
    recycle: Sender<Vec<u8>>,
    current: Vec<u8>,
    position: usize,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.position == self.current.len() {
            match self.pieces.recv() {
                Ok(next) => {
                    let used = std::mem::replace(&mut self.current, next);
                    // The sender may have finished already; then the buffer is simply freed.
                    let _ = self.recycle.send(used);
                    self.position = 0;
                }
                Err(_) => return Ok(0),
            }
        }
        let count = buffer.len().min(self.current.len() - self.position);
        buffer[..count].copy_from_slice(&self.current[self.position..self.position + count]);
        self.position += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn archive() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(300_000);
        header.set_mode(0o644);
        builder.append_data(&mut header, "big", &vec![7u8; 300_000][..]).unwrap();
        builder.into_inner().unwrap()
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn run(blob: &[u8], expected: &Expected) -> Result<std::path::PathBuf, LayerError> {
        let base = tempfile::tempdir().unwrap().keep();
        std::fs::create_dir(base.join("fs")).unwrap();
        std::fs::create_dir(base.join("scratch")).unwrap();
        let result = unpack(blob, expected, &base.join("fs"), &base.join("scratch"));
        let size = std::fs::metadata(base.join("fs/big")).map(|m| m.len()).ok();
        std::fs::remove_dir_all(&base).unwrap();
        result.map(|_| {
            assert_eq!(size, Some(300_000));
            base
        })
    }

    #[test]
    fn plain_gzip_several_members_and_zstd_unpack_alike() {
        let tar = archive();
        let members = [gzip(&tar[..1000]), gzip(&tar[1000..])].concat();
        let zstd = zstd::stream::encode_all(&tar[..], 3).unwrap();
        for blob in [tar.clone(), gzip(&tar), members, zstd] {
            let expected =
                Expected { blob: Some((Digest::of(&blob), blob.len() as u64)), diff_id: Digest::of(&tar) };
            run(&blob, &expected).unwrap();
        }
    }

    #[test]
    fn a_damaged_blob_is_told_from_a_wrong_diff_id() {
        let tar = archive();
        let mut blob = gzip(&tar);
        let good = Digest::of(&blob);
        let size = blob.len() as u64;
        let wrong = Expected { blob: Some((good.clone(), size)), diff_id: Digest::of(b"other") };
        assert!(matches!(
            run(&blob, &wrong),
            Err(LayerError::DigestMismatch { what: "uncompressed layer", .. })
        ));
        let middle = blob.len() / 2;
        blob[middle] ^= 0xff;
        let expected = Expected { blob: Some((good, size)), diff_id: Digest::of(&tar) };
        assert!(matches!(run(&blob, &expected), Err(LayerError::DigestMismatch { what: "blob", .. })));
    }

    #[test]
    fn more_or_fewer_bytes_than_announced_are_refused() {
        let tar = archive();
        let blob = gzip(&tar);
        for size in [blob.len() as u64 - 1, blob.len() as u64 + 1] {
            let expected = Expected { blob: Some((Digest::of(&blob), size)), diff_id: Digest::of(&tar) };
            assert!(matches!(run(&blob, &expected), Err(LayerError::SizeMismatch { .. })), "{size}");
        }
    }

    #[test]
    fn a_truncated_layer_never_counts() {
        let tar = archive();
        let blob = gzip(&tar);
        let expected = Expected { blob: None, diff_id: Digest::of(&tar) };
        for cut in [0, 1, 3, 20, blob.len() / 2, blob.len() - 1] {
            assert!(run(&blob[..cut], &expected).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn a_zstd_window_beyond_the_limit_is_refused() {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(27).unwrap();
        encoder.long_distance_matching(true).unwrap();
        encoder.write_all(&archive()).unwrap();
        let blob = encoder.finish().unwrap();
        let expected = Expected { blob: None, diff_id: Digest::of(&archive()) };
        assert!(matches!(run(&blob, &expected), Err(LayerError::Decompress(_))));
    }
}
