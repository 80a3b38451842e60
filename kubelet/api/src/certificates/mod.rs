//! The node's certificates: asked for with a bootstrap token, kept in files, renewed before they expire.

mod bootstrap;
mod request;
mod rotation;
mod store;

pub use bootstrap::Bootstrap;
pub use request::{Purpose, request};
pub use rotation::{Rotation, Sink, rotate_at};
pub use store::{CertificateStore, Pair};

use crate::client::ClientError;
use crate::credentials::PairError;
use crate::error::ApiError;
use crate::tls::TlsError;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("cannot {verb} {}: {source}; check --cert-dir", file.display())]
    File { verb: &'static str, file: PathBuf, source: io::Error },
    #[error("certificate in {}: {cause}; remove the file to have a new one requested", file.display())]
    Content { file: PathBuf, cause: String },
    #[error(transparent)]
    Pair(#[from] PairError),
    #[error("cannot make a key or a request: {0}")]
    Key(#[from] rcgen::Error),
    #[error("certificate request {name}: {source}")]
    Request { name: String, source: Box<ApiError> },
    #[error(
        "certificate request {name} was denied: {reason} {message}; ask whoever approves requests for nodes"
    )]
    Denied { name: String, reason: String, message: String },
    #[error(
        "certificate request {name} failed: {reason} {message}; see the signer in kube-controller-manager"
    )]
    Failed { name: String, reason: String, message: String },
    #[error("certificate request {name} was neither approved nor denied within {} minutes; run `kubectl certificate approve {name}`, or see why nothing approves it", waited.as_secs() / 60)]
    Pending { name: String, waited: Duration },
    #[error("certificate request {name}: the certificate issued is not usable: {cause}")]
    Issued { name: String, cause: TlsError },
    #[error(transparent)]
    Client(Box<ClientError>),
    #[error(
        "no identity: {problem}, and no --bootstrap-kubeconfig is given; give one with a token from `kubeadm token create`, or a kubeconfig that works"
    )]
    NoBootstrap { problem: String },
}

impl From<crate::kubeconfig::KubeconfigError> for CertificateError {
    fn from(error: crate::kubeconfig::KubeconfigError) -> Self {
        Self::Client(Box::new(error.into()))
    }
}

impl From<ClientError> for CertificateError {
    fn from(error: ClientError) -> Self {
        Self::Client(Box::new(error))
    }
}
