//! The TLS side of :10250: our certificate, and the authority that callers' certificates must come from.

use orlop_api::credentials::CertificateSlot;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

#[derive(Debug, thiserror::Error)]
pub enum TlsSetupError {
    #[error(
        "cannot read the authority of callers' certificates {path}: {cause}; see authentication.x509.clientCAFile"
    )]
    Authority { path: String, cause: String },
    #[error("cannot set TLS up: {0}")]
    Config(String),
}

/// Makes the configuration of each handshake: the file of the authority may be replaced at any time.
#[derive(Debug)]
pub(super) struct TlsSetup {
    certificate: Arc<CertificateSlot>,
    authority: Option<PathBuf>,
    current: Mutex<(Option<SystemTime>, Arc<ServerConfig>)>,
}

impl TlsSetup {
    /// Fails when the authority cannot be read: a server that trusts nobody by accident is of no use.
    pub(super) fn new(
        certificate: Arc<CertificateSlot>,
        authority: Option<PathBuf>,
    ) -> Result<Self, TlsSetupError> {
        let config = build(&certificate, authority.as_deref())?;
        let changed = authority.as_deref().and_then(modified);
        Ok(Self { certificate, authority, current: Mutex::new((changed, config)) })
    }

    /// The configuration for a handshake that begins now.
    pub(super) fn config(&self) -> Arc<ServerConfig> {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = self.authority.as_deref().and_then(modified);
        if changed != current.0 {
            match build(&self.certificate, self.authority.as_deref()) {
                Ok(config) => *current = (changed, config),
                // Half-written, perhaps: the old one is good until the new one is whole.
                Err(error) => tracing::warn!(%error, "keeping the old authority of callers' certificates"),
            }
        }
        current.1.clone()
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}

fn build(
    certificate: &Arc<CertificateSlot>,
    authority: Option<&Path>,
) -> Result<Arc<ServerConfig>, TlsSetupError> {
    let builder = ServerConfig::builder();
    let builder = match authority {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let verifier = WebPkiClientVerifier::builder(Arc::new(roots(path)?))
                .allow_unauthenticated()
                .build()
                .map_err(|e| TlsSetupError::Config(e.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_cert_resolver(certificate.clone());
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

fn roots(path: &Path) -> Result<RootCertStore, TlsSetupError> {
    let failed = |cause: String| TlsSetupError::Authority { path: path.display().to_string(), cause };
    let text = std::fs::read(path).map_err(|e| failed(e.to_string()))?;
    let mut roots = RootCertStore::empty();
    for certificate in orlop_api::tls::certificates(&text).map_err(|e| failed(e.to_string()))? {
        roots.add(certificate).map_err(|e| failed(e.to_string()))?;
    }
    if roots.is_empty() {
        return Err(failed("it holds no certificate".to_owned()));
    }
    Ok(roots)
}
