//! Why a pod or container cannot be described to the runtime.

use crate::objects::ObjectError;
use crate::podspec::quantity::QuantityError;
use std::io;
use std::path::PathBuf;

/// A specification that cannot be turned into a runtime's configuration.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error("configmap {name:?} not found")]
    ConfigMapMissing { name: String },
    #[error("secret {name:?} not found")]
    SecretMissing { name: String },
    #[error("couldn't find key {key} in ConfigMap {namespace}/{name}")]
    ConfigMapKeyMissing { namespace: String, name: String, key: String },
    #[error("couldn't find key {key} in Secret {namespace}/{name}")]
    SecretKeyMissing { namespace: String, name: String, key: String },
    #[error("value of key {key} in Secret {namespace}/{name} is not text")]
    SecretNotText { namespace: String, name: String, key: String },
    #[error(transparent)]
    Object(#[from] ObjectError),
    #[error("services have not yet been read at least once, cannot construct envvars")]
    ServicesUnread,
    #[error("environment variable {name:?}: {source}")]
    Variable {
        name: String,
        #[source]
        source: FieldError,
    },
    #[error("environment variable {name:?}: reading a value from a file (fileKeyRef) is not supported yet")]
    FileKeyRef { name: String },
    #[error("container has runAsNonRoot and image will run as root (pod: {pod:?}, container: {container})")]
    ImageRunsAsRoot { pod: String, container: String },
    #[error("container's runAsUser breaks non-root policy (pod: {pod:?}, container: {container})")]
    UserBreaksPolicy { pod: String, container: String },
    #[error(
        "container has runAsNonRoot and image has non-numeric user ({user}), cannot verify user is non-root (pod: {pod:?}, container: {container})"
    )]
    ImageUserNotNumeric { pod: String, container: String, user: String },
    #[error("seccompProfile of type Localhost names no usable profile {profile:?}")]
    SeccompProfile { profile: String },
    #[error("unknown {field} {value:?}")]
    UnknownValue { field: &'static str, value: String },
    #[error("user namespaces (hostUsers: false) are not supported yet; pod cannot start")]
    UserNamespace,
    #[error("block volumes (volumeDevices) are not supported yet; container {container:?} cannot start")]
    VolumeDevices { container: String },
    #[error("volume {volume:?} of volumeMount {path:?} is not mounted")]
    VolumeNotMounted { volume: String, path: String },
    #[error("sub path {sub_path:?} of volume {volume:?}: {cause}")]
    SubPath { volume: String, sub_path: String, cause: String },
    #[error("cannot use sub path {sub_path:?} of volume {volume:?}")]
    SubPathIo {
        volume: String,
        sub_path: String,
        #[source]
        source: io::Error,
    },
    #[error("volumeMount {path:?} wants recursiveReadOnly: {cause}")]
    RecursiveReadOnly { path: String, cause: &'static str },
    #[error("resource {resource:?} of container {container:?}: {source}")]
    Resource {
        container: String,
        resource: String,
        #[source]
        source: QuantityError,
    },
    #[error("hostname {name:?} with its domain is longer than 64 characters, the kernel's limit")]
    HostnameTooLong { name: String },
    #[error("cannot {operation} {path}", path = path.display())]
    File {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl SpecError {
    /// The word for `state.waiting.reason`.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        "CreateContainerConfigError"
    }

    /// The same specification may work later without anybody changing the pod.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Object(_)
            | Self::ServicesUnread
            | Self::ConfigMapMissing { .. }
            | Self::SecretMissing { .. }
            | Self::ConfigMapKeyMissing { .. }
            | Self::SecretKeyMissing { .. }
            | Self::File { .. }
            | Self::SubPathIo { .. } => true,
            Self::SecretNotText { .. }
            | Self::Variable { .. }
            | Self::FileKeyRef { .. }
            | Self::ImageRunsAsRoot { .. }
            | Self::UserBreaksPolicy { .. }
            | Self::ImageUserNotNumeric { .. }
            | Self::SeccompProfile { .. }
            | Self::UnknownValue { .. }
            | Self::UserNamespace
            | Self::VolumeDevices { .. }
            | Self::VolumeNotMounted { .. }
            | Self::SubPath { .. }
            | Self::RecursiveReadOnly { .. }
            | Self::Resource { .. }
            | Self::HostnameTooLong { .. } => false,
        }
    }

    pub(crate) fn file(operation: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { operation, path, source }
    }
}

/// A field of the pod, or a resource of a container, that cannot be read as text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FieldError {
    #[error("unsupported fieldPath: {path}")]
    Field { path: String },
    #[error("unsupported container resource: {resource}")]
    Resource { resource: String },
    #[error("container {container} not found")]
    Container { container: String },
    #[error("value is missing or has no known form")]
    Empty,
    #[error("{0}")]
    Quantity(QuantityError),
}
