//! A small HTTP client for probes and hooks: one connection per request, no proxy, no cookies, certificates not verified
//! (the pod is addressed by its IP, which no certificate names).

use crate::probes::target::{Address, HttpTarget, TargetError};
use bytes::Bytes;
use http::header::{ACCEPT, CONNECTION, HOST, HeaderName, HeaderValue, LOCATION, USER_AGENT};
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use std::io;
use std::sync::{Arc, OnceLock};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// What is read of an answer at most.
const MAX_BODY: usize = 10 << 10;
const MAX_REDIRECTS: usize = 10;

/// A request that got no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HttpError {
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error("dial tcp {address}: connect: {source}")]
    Connect { address: String, source: io::Error },
    #[error("server gave HTTP response to HTTPS client")]
    NotTls,
    #[error("tls: {0}")]
    Tls(io::Error),
    #[error("{0}")]
    Exchange(hyper::Error),
    #[error("stopped after {MAX_REDIRECTS} redirects")]
    Redirects,
}

/// An answer's status, and whether a redirect to another host was left where it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) left_redirect: bool,
}

/// Gets the target. Redirects are followed as long as they stay at the host.
pub(crate) async fn get(target: &HttpTarget, agent: &str) -> Result<Answer, HttpError> {
    let mut target = target.clone();
    for _ in 0..=MAX_REDIRECTS {
        let (status, location) = once(&target, agent).await?;
        let followed = matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308);
        let Some(location) = location.filter(|_| followed) else {
            return Ok(Answer { status, left_redirect: false });
        };
        match redirected(&target, &location) {
            Some(next) => target = next,
            None => return Ok(Answer { status, left_redirect: true }),
        }
    }
    Err(HttpError::Redirects)
}

/// Where a redirect leads, if it stays at the host.
fn redirected(from: &HttpTarget, location: &str) -> Option<HttpTarget> {
    let scheme = if from.secure { "https" } else { "http" };
    let absolute = match location {
        _ if location.starts_with("//") => format!("{scheme}:{location}"),
        _ if location.contains("://") => location.to_owned(),
        _ if location.starts_with('/') => {
            return Some(HttpTarget { path: location.to_owned(), ..from.clone() });
        }
        _ => {
            let base = from.path.split('?').next().unwrap_or("/");
            let base = base.rsplit_once('/').map_or("", |(base, _)| base);
            return Some(HttpTarget { path: format!("{base}/{location}"), ..from.clone() });
        }
    };
    let uri: Uri = absolute.parse().ok()?;
    let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
    if host != from.address.host {
        return None;
    }
    let secure = uri.scheme_str() == Some("https");
    let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
    let address = Address { host: host.to_owned(), port };
    Some(HttpTarget { secure, address, path, headers: from.headers.clone() })
}

async fn once(target: &HttpTarget, agent: &str) -> Result<(StatusCode, Option<String>), HttpError> {
    let request = request(target, agent)?;
    let stream = connect(&target.address).await?;
    if !target.secure {
        return exchange(stream, request).await;
    }
    let connector = tokio_rustls::TlsConnector::from(unverified());
    let name = ServerName::try_from(target.address.host.clone())
        .map_err(|_| TargetError::Url { url: target.url() })?;
    match connector.connect(name, stream).await {
        Ok(stream) => exchange(stream, request).await,
        Err(error) if speaks_no_tls(&error) => Err(HttpError::NotTls),
        Err(error) => Err(HttpError::Tls(error)),
    }
}

fn speaks_no_tls(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(inner, Some(rustls::Error::InvalidMessage(_)))
}

pub(crate) async fn connect(address: &Address) -> Result<TcpStream, HttpError> {
    TcpStream::connect((address.host.as_str(), address.port))
        .await
        .map_err(|source| HttpError::Connect { address: address.authority(), source })
}

fn request(target: &HttpTarget, agent: &str) -> Result<Request<Empty<Bytes>>, HttpError> {
    let url = || TargetError::Url { url: target.url() };
    let host = HeaderValue::from_str(&target.address.authority()).map_err(|_| url())?;
    let mut request =
        Request::builder().method(Method::GET).uri(&target.path).body(Empty::new()).map_err(|_| url())?;
    let headers = request.headers_mut();
    headers.insert(HOST, host);
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    if let Ok(agent) = HeaderValue::from_str(agent) {
        headers.insert(USER_AGENT, agent);
    }
    headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
    let mut replaced: Vec<HeaderName> = Vec::new();
    for (name, value) in &target.headers {
        let invalid = || TargetError::Header { name: name.clone() };
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| invalid())?;
        let value = HeaderValue::from_str(value).map_err(|_| invalid())?;
        // Ours are defaults: the first of a name replaces them, an empty one takes them away.
        if !replaced.contains(&name) {
            headers.remove(&name);
            replaced.push(name.clone());
        }
        if !(value.is_empty() && (name == ACCEPT || name == USER_AGENT)) {
            headers.append(name, value);
        }
    }
    Ok(request)
}

async fn exchange<S>(
    stream: S,
    request: Request<Empty<Bytes>>,
) -> Result<(StatusCode, Option<String>), HttpError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(HttpError::Exchange)?;
    // Driven here, not in a task: when the probe's time is up, the connection goes with it.
    let talk = async {
        let response = sender.send_request(request).await.map_err(HttpError::Exchange)?;
        let status = response.status();
        let location = response.headers().get(LOCATION).and_then(|l| l.to_str().ok()).map(str::to_owned);
        // A server that is cut off in the middle of its answer may count that as an error.
        let _ = Limited::new(response.into_body(), MAX_BODY).collect().await;
        Ok((status, location))
    };
    let drive = async {
        // Its outcome is the request's.
        let _ = connection.await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        outcome = talk => outcome,
        () = drive => unreachable!("the driver never ends"),
    }
}

fn unverified() -> Arc<ClientConfig> {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    let config = CONFIG.get_or_init(|| {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = Arc::new(Unverified(Arc::clone(&provider)));
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the provider supports the versions it comes with");
        Arc::new(builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth())
    });
    Arc::clone(config)
}

#[derive(Debug)]
struct Unverified(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
