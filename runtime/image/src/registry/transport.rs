//! HTTP/1.1 connections to one host, plain and TLS, with that host's certificates.

use std::error::Error;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::hosts::{Host, TlsFiles};
use crate::error::ImageError;

pub(super) type Body = Full<Bytes>;
type Tls = Client<HttpsConnector<HttpConnector>, Body>;

/// Connections to one host. TLS is set up at the first use of https, so plain registries never load root certificates.
pub(super) struct Transport {
    files: TlsFiles,
    connector: HttpConnector,
    plain: Client<HttpConnector, Body>,
    tls: OnceLock<Result<Tls, ImageError>>,
}

impl Transport {
    pub(super) fn new(host: &Host) -> Self {
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(host.dial_timeout));
        http.set_keepalive(Some(std::time::Duration::from_secs(30)));
        let connector = http;
        let plain = Client::builder(TokioExecutor::new()).build(connector.clone());
        Self { files: host.tls.clone(), connector, plain, tls: OnceLock::new() }
    }

    pub(super) async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, SendError> {
        let sent = if request.uri().scheme_str() == Some("https") {
            let client = self.tls.get_or_init(|| self.tls_client()).as_ref();
            client.map_err(|error| SendError::Setup(error.clone()))?.request(request).await
        } else {
            self.plain.request(request).await
        };
        sent.map_err(|error| SendError::Failed { connecting: error.is_connect(), cause: root_cause(&error) })
    }

    fn tls_client(&self) -> Result<Tls, ImageError> {
        let config = tls_config(&self.files)?;
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(config)
            .https_only()
            .enable_http1()
            .wrap_connector(self.connector.clone());
        Ok(Client::builder(TokioExecutor::new()).build(connector))
    }
}

pub(super) enum SendError {
    /// This node's configuration is at fault.
    Setup(ImageError),
    Failed {
        connecting: bool,
        cause: String,
    },
}

/// The innermost error, in words: hyper's own text stops at "client error (Connect)".
pub(super) fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    match innermost.downcast_ref::<io::Error>().map(io::Error::kind) {
        Some(io::ErrorKind::ConnectionRefused) => "connection refused".to_owned(),
        Some(io::ErrorKind::ConnectionReset) => "connection reset".to_owned(),
        Some(io::ErrorKind::TimedOut) => "connection timed out".to_owned(),
        _ => innermost.to_string(),
    }
}

/// Loaded once: some hundred certificates, the same for every registry.
fn system_roots() -> Arc<RootCertStore> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    let load = || {
        let mut roots = RootCertStore::empty();
        let found = rustls_native_certs::load_native_certs();
        for error in &found.errors {
            tracing::warn!(%error, "cannot load a system root certificate");
        }
        roots.add_parsable_certificates(found.certs);
        Arc::new(roots)
    };
    Arc::clone(ROOTS.get_or_init(load))
}

fn tls_config(files: &TlsFiles) -> Result<ClientConfig, ImageError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |reason: String| ImageError::HostsConfig { path, reason }
    };
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|cause| failed(Path::new(""))(cause.to_string()))?;
    let builder = if files.skip_verify {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(AcceptAnyServer(provider)))
    } else {
        let mut roots = system_roots();
        for path in &files.ca {
            for certificate in certificates(path).map_err(failed(path))? {
                let added = Arc::make_mut(&mut roots).add(certificate);
                added.map_err(|cause| failed(path)(cause.to_string()))?;
            }
        }
        builder.with_root_certificates(roots)
    };
    let Some((certificate, key)) = files.client.first() else { return Ok(builder.with_no_client_auth()) };
    let chain = certificates(certificate).map_err(failed(certificate))?;
    let key_der = PrivateKeyDer::from_pem_file(key).map_err(|cause| failed(key)(cause.to_string()))?;
    builder.with_client_auth_cert(chain, key_der).map_err(|cause| failed(key)(cause.to_string()))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = fs::read(path).map_err(|cause| cause.to_string())?;
    let found = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|cause| cause.to_string())?;
    if found.is_empty() { Err("it holds no PEM certificate".to_owned()) } else { Ok(found) }
}

/// For `skip_verify`: any certificate will do, but the handshake must still be signed by its key.
#[derive(Debug)]
struct AcceptAnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAnyServer {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
