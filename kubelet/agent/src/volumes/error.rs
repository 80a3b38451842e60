//! Why a volume is not ready.

use crate::objects::ObjectError;
use crate::podspec::FieldError;
use crate::volumes::worker::WorkError;
use std::io;
use std::path::PathBuf;

/// A failed operation on a pod's volumes. The text is that of the event, with reason [`VolumeError::reason`].
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("MountVolume.SetUp failed for volume {volume:?} : {cause}")]
    Setup { volume: String, cause: VolumeCause },
    #[error("cannot remove the volumes of pod {pod_uid}: {source}")]
    Teardown { pod_uid: String, source: io::Error },
}

impl VolumeError {
    pub(super) fn setup(volume: &str, cause: VolumeCause) -> Self {
        Self::Setup { volume: volume.to_owned(), cause }
    }

    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Setup { .. } => "FailedMount",
            Self::Teardown { .. } => "FailedUnMount",
        }
    }
}

/// What is wrong with one volume.
#[derive(Debug, thiserror::Error)]
pub enum VolumeCause {
    #[error("volume type {kind} is not supported yet by this node agent; pod cannot start")]
    Unsupported { kind: &'static str },
    #[error("the volume names no source; pod cannot start")]
    NoSource,
    #[error("configmap {name:?} not found")]
    ConfigMapMissing { name: String },
    #[error("secret {name:?} not found")]
    SecretMissing { name: String },
    #[error("references non-existent config key: {key}")]
    ConfigMapKeyMissing { key: String },
    #[error("references non-existent secret key: {key}")]
    SecretKeyMissing { key: String },
    #[error("invalid path {path:?}: {cause}")]
    Path { path: String, cause: &'static str },
    #[error("invalid mode {mode} of {path:?}")]
    Mode { path: String, mode: i32 },
    #[error(transparent)]
    Object(#[from] ObjectError),
    #[error("downward API file {path:?}: {source}")]
    Field { path: String, source: FieldError },
    #[error("hostPath type check failed: {path} is not {expected}", path = path.display())]
    HostPathType { path: PathBuf, expected: &'static str },
    #[error("unknown hostPath type {kind:?}")]
    HostPathKind { kind: String },
    #[error("size limit {text:?} is not a quantity")]
    SizeLimit { text: String },
    #[error("cannot {operation} {path}: {source}", path = path.display())]
    File { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("{0}")]
    Hangs(io::Error),
}

impl VolumeCause {
    pub(super) fn file(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { operation, path, source }
    }
}

impl From<WorkError> for VolumeCause {
    fn from(error: WorkError) -> Self {
        Self::Hangs(error.into())
    }
}
