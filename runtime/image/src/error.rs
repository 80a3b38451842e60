//! What can go wrong, and what kind of wrong it is.
//!
//! An error ends in a gRPC status or on a person's screen, where only the text survives; so each message carries its
//! cause itself and no `source` repeats it. Errors are `Clone` because every waiter of a shared pull receives the same
//! one.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::layer::LayerError;

/// The class of an [`ImageError`]: what a caller decides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request itself is wrong (reference, key): asking again does not help.
    InvalidArgument,
    /// The image is not on this node, or the registry does not have it.
    NotFound,
    /// The registry wants other credentials.
    Unauthorized,
    /// The registry could not be reached or cannot answer now: the kubelet's `RegistryUnavailable`.
    RegistryUnavailable,
    /// The registry's answer or the image's content is wrong.
    Corrupt,
    /// The image is well-formed but not for this node.
    Unsupported,
    /// This node's own configuration is wrong.
    Configuration,
    /// This node's disk or file system refused.
    Storage,
}

#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    #[error("image reference {reference:?} is not valid: {reason}")]
    InvalidReference { reference: String, reason: String },
    #[error("image {0} is not on this node")]
    NotFound(String),
    #[error("registry {registry} has no {object}: check the name, the tag and that it was pushed")]
    NotInRegistry { registry: String, object: String },
    #[error(
        "registry {registry} refuses {object}: {reason}; check the credentials and that the repository exists"
    )]
    Unauthorized { registry: String, object: String, reason: String },
    #[error("cannot reach registry {registry} for {object}: {cause}; {remedy}")]
    RegistryUnavailable { registry: String, object: String, cause: String, remedy: &'static str },
    #[error("registry {registry} answers {status} to {object}: {detail}")]
    RegistryRefused { registry: String, object: String, status: u16, detail: String },
    #[error("registry {registry} gave an unusable answer for {object}: {reason}")]
    InvalidResponse { registry: String, object: String, reason: String },
    #[error("content of {object} is damaged: expected {expected}, got {actual}")]
    DigestMismatch { object: String, expected: String, actual: String },
    #[error("{object} has no image for {wanted}; it offers {offered}")]
    NoPlatform { object: String, wanted: String, offered: String },
    #[error("{object} cannot be used: {reason}")]
    Unsupported { object: String, reason: String },
    #[error("cannot unpack layer {layer}: {cause}")]
    Layer { layer: String, cause: LayerError },
    #[error("cannot {operation} {}: {cause}", path.display())]
    Store { operation: &'static str, path: PathBuf, cause: Arc<io::Error> },
    #[error("image store {} is in use by another process", path.display())]
    InUse { path: PathBuf },
    #[error("cannot use registry configuration {}: {reason}", path.display())]
    HostsConfig { path: PathBuf, reason: String },
    #[error("cannot import {}: {reason}", path.display())]
    Import { path: PathBuf, reason: String },
    #[error("container key {key:?} is not valid: it must be one plain file name")]
    InvalidKey { key: String },
    #[error("image {image} was removed meanwhile: pull it again")]
    LayersGone { image: String },
    #[error("a worker of the image store ended without an answer: {cause}")]
    Worker { cause: String },
}

impl ImageError {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::InvalidReference { .. } | Self::InvalidKey { .. } => ErrorKind::InvalidArgument,
            Self::NotFound(_) | Self::NotInRegistry { .. } | Self::LayersGone { .. } => ErrorKind::NotFound,
            Self::Unauthorized { .. } => ErrorKind::Unauthorized,
            Self::RegistryUnavailable { .. } => ErrorKind::RegistryUnavailable,
            Self::RegistryRefused { .. }
            | Self::InvalidResponse { .. }
            | Self::DigestMismatch { .. }
            | Self::Import { .. } => ErrorKind::Corrupt,
            Self::NoPlatform { .. } | Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::Layer { cause, .. } if cause.is_io() => ErrorKind::Storage,
            Self::Layer { .. } => ErrorKind::Corrupt,
            Self::HostsConfig { .. } => ErrorKind::Configuration,
            Self::Store { .. } | Self::InUse { .. } | Self::Worker { .. } => ErrorKind::Storage,
        }
    }

    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(self.kind(), ErrorKind::RegistryUnavailable | ErrorKind::Storage)
    }

    pub fn is_not_found(&self) -> bool {
        self.kind() == ErrorKind::NotFound
    }

    pub fn is_unauthorized(&self) -> bool {
        self.kind() == ErrorKind::Unauthorized
    }

    pub fn is_registry_unavailable(&self) -> bool {
        self.kind() == ErrorKind::RegistryUnavailable
    }

    /// For `map_err` on file-system calls.
    pub(crate) fn store(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |cause| Self::Store { operation, path, cause: Arc::new(cause) }
    }
}

/// Runs blocking file work off the async threads; a panic in it becomes an error of this one call.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(cause) => Err(ImageError::Worker { cause: cause.to_string() }),
    }
}
