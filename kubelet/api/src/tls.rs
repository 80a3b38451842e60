//! TLS towards the API server: whom to trust, how to read keys, and what a failed handshake means in words.

use crate::credentials::Credentials;
use crate::kubeconfig::Endpoint;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use std::io;
use std::sync::{Arc, LazyLock};

/// One provider for every connection of the process.
static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(aws_lc_rs::default_provider()));

/// Whose signature makes a server's certificate good.
#[derive(Debug, Clone)]
pub(crate) enum Trust {
    Authorities {
        origin: String,
        roots: Vec<CertificateDer<'static>>,
    },
    System,
    /// `insecure-skip-tls-verify`.
    Anyone,
}

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("no PEM certificate in it")]
    NoCertificate,
    #[error("no PEM private key in it")]
    NoKey,
    #[error("not valid PEM: {0}")]
    Pem(pem::Error),
    #[error("the key does not belong to the certificate")]
    Mismatch,
    #[error("the certificate or key cannot be used: {0}")]
    Unusable(rustls::Error),
    #[error("{origin}: certificate cannot be used as an authority: {cause}")]
    Authority { origin: String, cause: rustls::Error },
    #[error("the system has no certificate authorities; name the cluster's in certificate-authority")]
    NoSystemRoots,
    #[error("`{name}` cannot be the name in a certificate; correct tls-server-name or the server's address")]
    ServerName { name: String },
    #[error("cannot set up TLS: {0}")]
    Setup(rustls::Error),
}

/// All certificates of a PEM text; at least one.
pub fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = CertificateDer::pem_slice_iter(text).collect::<Result<Vec<_>, _>>().map_err(TlsError::Pem)?;
    if found.is_empty() { Err(TlsError::NoCertificate) } else { Ok(found) }
}

/// The first private key of a PEM text.
pub fn private_key(text: &[u8]) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(text).map_err(|error| match error {
        pem::Error::NoItemsFound => TlsError::NoKey,
        other => TlsError::Pem(other),
    })
}

/// A certificate chain with the key that belongs to it.
pub fn certified(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<Arc<CertifiedKey>, TlsError> {
    CertifiedKey::from_der(chain, key, &PROVIDER).map(Arc::new).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => TlsError::Mismatch,
        other => TlsError::Unusable(other),
    })
}

/// What a connection needs to know about TLS.
#[derive(Debug, Clone)]
pub(crate) struct Tls {
    pub(crate) config: Arc<ClientConfig>,
    pub(crate) name: ServerName<'static>,
}

impl Tls {
    pub(crate) fn new(
        endpoint: &Endpoint,
        server_name: Option<&str>,
        trust: &Trust,
        credentials: &Credentials,
    ) -> Result<Self, TlsError> {
        let name = server_name.unwrap_or(&endpoint.host);
        let name = ServerName::try_from(name.to_owned())
            .map_err(|_| TlsError::ServerName { name: name.to_owned() })?;
        let builder = ClientConfig::builder_with_provider(Arc::clone(&PROVIDER))
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Setup)?;
        let builder = match trust {
            Trust::Anyone => {
                let algorithms = PROVIDER.signature_verification_algorithms;
                builder.dangerous().with_custom_certificate_verifier(Arc::new(TrustAnyone { algorithms }))
            }
            Trust::System => builder.with_root_certificates(system_roots()?),
            Trust::Authorities { origin, roots } => {
                let mut store = RootCertStore::empty();
                for root in roots {
                    store
                        .add(root.clone())
                        .map_err(|cause| TlsError::Authority { origin: origin.clone(), cause })?;
                }
                builder.with_root_certificates(store)
            }
        };
        let mut config = builder.with_client_cert_resolver(credentials.resolver());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        // A resumed session would go on with the certificate that has just been rotated away.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Self { config: Arc::new(config), name })
    }
}

fn system_roots() -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if store.is_empty() { Err(TlsError::NoSystemRoots) } else { Ok(store) }
}

/// For `insecure-skip-tls-verify`: any certificate will do, but whoever shows it must hold its key.
#[derive(Debug)]
struct TrustAnyone {
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for TrustAnyone {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Says what a failed handshake means and what to do about it.
pub(crate) fn explain(error: &io::Error, endpoint: &Endpoint, trust: &Trust) -> String {
    let url = &endpoint.url;
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
        return if error.kind() == io::ErrorKind::UnexpectedEof {
            format!("{url} closed the connection during the TLS handshake: is this the API server's port?")
        } else {
            format!("TLS handshake: {error}")
        };
    };
    match tls {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => match trust {
            Trust::Authorities { origin, .. } => format!(
                "the certificate of {url} is not signed by the CA in {origin}: put the CA of this cluster there"
            ),
            _ => format!(
                "the certificate of {url} is not signed by an authority this system knows: name the cluster's CA in certificate-authority"
            ),
        },
        rustls::Error::InvalidCertificate(CertificateError::BadSignature) => format!(
            "the certificate of {url} bears the name of a CA that we trust, but another key signed it: the cluster's CA was replaced, update certificate-authority"
        ),
        rustls::Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => format!(
            "the certificate of {url} has expired: renew it on the control plane, or check this node's clock"
        ),
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
        ) => format!("the certificate of {url} is not valid yet: check this node's clock"),
        rustls::Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => format!(
            "the certificate of {url} does not bear the name `{}`: use an address it bears, or set tls-server-name ({tls})",
            endpoint.host
        ),
        rustls::Error::InvalidMessage(_) => {
            format!("{url} does not speak TLS: is this the API server's secure port? ({tls})")
        }
        rustls::Error::AlertReceived(alert) => {
            format!("{url} refused the TLS handshake ({alert:?}): check the client certificate")
        }
        other => format!("TLS handshake with {url}: {other}"),
    }
}
