//! One layer: from a compressed byte stream to a verified directory.
//!
//! ```text
//! bytes ─> hash, count ─> decompress ─> hash ══ bounded channel ══> tar members ─> files
//!          (blob digest)                (diffID)                     (tarstream)    (apply)
//! ```
//! A layer directory holds only that layer in the form overlayfs expects of a lower directory.

mod apply;
mod tarstream;
pub(crate) mod tree;
mod unpack;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

pub(crate) use apply::{Applied, Applier, DirectoryMeta};
pub(crate) use unpack::{Expected, decompress, unpack};

use crate::digest::Digest;

/// Why a layer could not be unpacked.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    #[error("the archive is malformed: {0}")]
    Malformed(&'static str),
    #[error("the archive exceeds a limit: {0}")]
    Limit(&'static str),
    #[error("entry {} would leave the layer", path.display())]
    Escape { path: PathBuf },
    #[error("entry {} is a hard link to {}, which is not in this layer", path.display(), target.display())]
    MissingLinkTarget { path: PathBuf, target: PathBuf },
    #[error("entry {}: {reason}", path.display())]
    Entry { path: PathBuf, reason: &'static str },
    #[error("cannot {operation} {}: {cause}", path.display())]
    Io { operation: &'static str, path: PathBuf, cause: Arc<io::Error> },
    #[error("cannot read the layer: {0}")]
    Source(Arc<io::Error>),
    #[error("cannot decompress the layer: {0}")]
    Decompress(Arc<io::Error>),
    #[error("the {what} is damaged: expected {expected}, got {actual}")]
    DigestMismatch { what: &'static str, expected: Digest, actual: Digest },
    #[error("the blob is damaged: expected {expected} bytes, got {actual}")]
    SizeMismatch { expected: u64, actual: u64 },
    #[error("a thread of the unpacker ended unexpectedly")]
    Worker,
}

impl LayerError {
    /// Whether this node's file system is at fault, not the image.
    pub(crate) fn is_io(&self) -> bool {
        matches!(self, Self::Io { .. } | Self::Source(_) | Self::Worker)
    }

    pub(crate) fn io(operation: &'static str, path: impl Into<PathBuf>, cause: impl Into<io::Error>) -> Self {
        Self::Io { operation, path: path.into(), cause: Arc::new(cause.into()) }
    }
}
