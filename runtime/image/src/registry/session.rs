//! One pull's conversation with a registry and its mirrors: requests, retries, redirects, tokens.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, LOCATION, RANGE, RETRY_AFTER, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde::Deserialize;

use super::auth::{Credentials, encode};
use super::hosts::{Host, hosts_for};
use super::token::AuthState;
use super::transport::{Body, SendError, Transport, root_cause};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::manifest::ACCEPTED;
use crate::reference::{Reference, Target};

pub(super) const AGENT: &str = concat!("orlop/", env!("CARGO_PKG_VERSION"));
const MAX_MANIFEST: usize = 4 << 20;
const MAX_REDIRECTS: usize = 8;
/// How long to wait and how often to try; a value, so that tests need not wait.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timing {
    /// Until the head of a response.
    pub(crate) response: Duration,
    /// Between two pieces of a body.
    pub(crate) stall: Duration,
    pub(crate) first_delay: Duration,
    pub(crate) longest_delay: Duration,
    /// Attempts at a request that the registry or the network broke off.
    pub(crate) attempts: u32,
    /// Attempts at a host that cannot be connected to: the kubelet tries again anyway.
    pub(crate) connect_attempts: u32,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            response: Duration::from_secs(60),
            stall: Duration::from_secs(60),
            first_delay: Duration::from_millis(200),
            longest_delay: Duration::from_secs(10),
            attempts: 5,
            connect_attempts: 2,
        }
    }
}

impl Timing {
    /// Doubles from the first delay; `after` is what the registry asked for.
    pub(super) fn delay(&self, attempt: u32, after: Option<Duration>) -> Duration {
        let doubled = self.first_delay.saturating_mul(1 << attempt.min(10));
        after.unwrap_or(doubled).min(self.longest_delay)
    }
}

pub(super) struct Peer {
    pub(super) host: Host,
    pub(super) transport: Transport,
    pub(super) credentials: Credentials,
    pub(super) auth: tokio::sync::Mutex<AuthState>,
}

pub(crate) struct Session {
    pub(super) reference: Reference,
    pub(super) peers: Vec<Peer>,
    pub(super) timing: Timing,
}

/// A manifest as received, its bytes matching its digest.
#[derive(Debug)]
pub(crate) struct RawManifest {
    pub(crate) digest: Digest,
    pub(crate) bytes: Bytes,
}

#[derive(Deserialize)]
struct ErrorBody {
    errors: Vec<ErrorItem>,
}

#[derive(Deserialize)]
struct ErrorItem {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

impl Session {
    pub(crate) fn new(
        reference: &Reference,
        config: Option<&std::path::Path>,
        auth: Option<&crate::Auth>,
        timing: Timing,
    ) -> Result<Self, ImageError> {
        let peers = hosts_for(config, reference.domain())?.into_iter().map(|host| {
            // Mirrors have secrets of their own (`header`); the pod's are for the registry it names.
            let credentials = match host.origin {
                true => Credentials::for_domain(auth, reference.domain()),
                false => Credentials::Anonymous,
            };
            Peer { transport: Transport::new(&host), host, credentials, auth: tokio::sync::Mutex::default() }
        });
        Ok(Self { reference: reference.clone(), peers: peers.collect(), timing })
    }

    /// The digest the reference's target has now, without fetching it; nothing if the registry doesn't tell.
    pub(crate) async fn head(&self) -> Result<Option<Digest>, ImageError> {
        let path = format!("manifests/{}", self.reference.target());
        let (_, response) = self.first_peer(Method::HEAD, &path, self.resolving()).await?;
        let digest = response.headers().get("docker-content-digest");
        Ok(digest.and_then(|value| value.to_str().ok()?.parse().ok()))
    }

    fn resolving(&self) -> fn(&Host) -> bool {
        match self.reference.target() {
            Target::Tag(_) => |host| host.resolve,
            Target::Digest(_) => |host| host.pull,
        }
    }

    pub(crate) async fn manifest(&self) -> Result<RawManifest, ImageError> {
        let bytes = self
            .small(&format!("manifests/{}", self.reference.target()), self.resolving(), MAX_MANIFEST)
            .await?;
        let digest = match self.reference.target() {
            Target::Digest(digest) => self.verified(digest, &bytes)?,
            Target::Tag(_) => Digest::of(&bytes),
        };
        Ok(RawManifest { digest, bytes })
    }

    pub(crate) async fn manifest_by_digest(&self, digest: &Digest) -> Result<RawManifest, ImageError> {
        let bytes = self.small(&format!("manifests/{digest}"), |host| host.pull, MAX_MANIFEST).await?;
        Ok(RawManifest { digest: self.verified(digest, &bytes)?, bytes })
    }

    /// A blob small enough for memory.
    pub(crate) async fn small_blob(&self, digest: &Digest, limit: usize) -> Result<Bytes, ImageError> {
        let bytes = self.small(&format!("blobs/{digest}"), |host| host.pull, limit).await?;
        self.verified(digest, &bytes)?;
        Ok(bytes)
    }

    fn verified(&self, digest: &Digest, bytes: &[u8]) -> Result<Digest, ImageError> {
        if digest.matches(bytes) {
            return Ok(digest.clone());
        }
        Err(ImageError::DigestMismatch {
            object: self.reference.to_string(),
            expected: digest.to_string(),
            actual: Digest::of(bytes).to_string(),
        })
    }

    /// Fetches a small object whole; a body that breaks off is fetched again.
    async fn small(&self, path: &str, usable: fn(&Host) -> bool, limit: usize) -> Result<Bytes, ImageError> {
        let mut attempt = 0;
        loop {
            let (peer, response) = self.first_peer(Method::GET, path, usable).await?;
            attempt += 1;
            match tokio::time::timeout(self.timing.response, collect(response, limit)).await {
                Ok(Ok(bytes)) => return Ok(bytes),
                Ok(Err(Some(_))) | Err(_) if attempt < self.timing.attempts => {
                    tokio::time::sleep(self.timing.delay(attempt, None)).await;
                }
                Ok(Err(None)) => {
                    return Err(ImageError::InvalidResponse {
                        registry: peer.host.authority.to_string(),
                        object: self.object(path),
                        reason: format!("it is larger than {limit} bytes"),
                    });
                }
                Ok(Err(Some(cause))) => return Err(self.unavailable(peer, path, cause)),
                Err(_) => return Err(self.unavailable(peer, path, "the response stalled".to_owned())),
            }
        }
    }

    /// Asks the hosts in order until one answers; the last one's answer counts if none does.
    async fn first_peer(
        &self,
        method: Method,
        path: &str,
        usable: fn(&Host) -> bool,
    ) -> Result<(&Peer, Response<Incoming>), ImageError> {
        let mut last = None;
        for peer in self.peers.iter().filter(|peer| usable(&peer.host)) {
            if let Some(error) = last.replace(match self.request(peer, &method, path, None).await {
                Ok(response) => return Ok((peer, response)),
                Err(error) => error,
            }) {
                tracing::info!(reference = %self.reference, %error, "mirror not used");
            }
        }
        Err(last.unwrap_or_else(|| ImageError::HostsConfig {
            path: self.reference.domain().into(),
            reason: "no host has the capability to resolve or pull".to_owned(),
        }))
    }

    /// One request to one host, with authentication, redirects and retries. Answers only with success.
    pub(super) async fn request(
        &self,
        peer: &Peer,
        method: &Method,
        path: &str,
        range: Option<u64>,
    ) -> Result<Response<Incoming>, ImageError> {
        let mut attempt = 0;
        let mut reauthorized = false;
        let mut method = method.clone();
        loop {
            attempt += 1;
            let authorization = self.authorization(peer).await?;
            let sent = self.follow(peer, &method, path, range, authorization.as_ref()).await;
            let response = match sent {
                Ok(response) => response,
                Err(SendError::Setup(error)) => return Err(error),
                Err(SendError::Failed { connecting, cause }) => {
                    let limit = if connecting { self.timing.connect_attempts } else { self.timing.attempts };
                    if attempt >= limit {
                        return Err(self.unavailable(peer, path, cause));
                    }
                    tokio::time::sleep(self.timing.delay(attempt, None)).await;
                    continue;
                }
            };
            let status = response.status();
            match status {
                _ if status.is_success() => return Ok(response),
                StatusCode::UNAUTHORIZED if !reauthorized => {
                    reauthorized = true;
                    self.answer_challenge(peer, path, &response, authorization.as_ref()).await?;
                }
                StatusCode::METHOD_NOT_ALLOWED if method == Method::HEAD => method = Method::GET,
                StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS
                    if attempt < self.timing.attempts =>
                {
                    tokio::time::sleep(self.timing.delay(attempt, retry_after(response.headers()))).await;
                }
                _ if status.is_server_error() && attempt < self.timing.attempts => {
                    tokio::time::sleep(self.timing.delay(attempt, retry_after(response.headers()))).await;
                }
                _ => return Err(self.refusal(peer, path, response).await),
            }
        }
    }

    /// Sends, following redirects. Secrets stay with the host they are for.
    async fn follow(
        &self,
        peer: &Peer,
        method: &Method,
        path: &str,
        range: Option<u64>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response<Incoming>, SendError> {
        let mut uri = self.uri(peer, path);
        let failed = |cause: String| SendError::Failed { connecting: false, cause };
        for _ in 0..MAX_REDIRECTS {
            let home =
                uri.authority() == Some(&peer.host.authority) && uri.scheme() == Some(&peer.host.scheme);
            let mut request = Request::builder().method(method).uri(&uri).body(Body::default());
            let request = request.as_mut().map_err(|cause| failed(cause.to_string()))?;
            let headers = request.headers_mut();
            headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
            headers.insert(
                ACCEPT,
                HeaderValue::from_static(if path.starts_with("manifests/") { ACCEPTED } else { "*/*" }),
            );
            headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
            if let Some(offset) = range {
                let value = HeaderValue::try_from(format!("bytes={offset}-"));
                headers.insert(RANGE, value.expect("digits are a valid header value"));
            }
            if home {
                headers.extend(peer.host.headers.clone());
                if let Some(authorization) = authorization {
                    headers.insert(AUTHORIZATION, authorization.clone());
                }
            }
            let request = std::mem::take(request);
            let sent = tokio::time::timeout(self.timing.response, peer.transport.send(request)).await;
            let response = sent.map_err(|_| failed("no response in time".to_owned()))??;
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let location = location.ok_or_else(|| failed("a redirect leads nowhere".to_owned()))?;
            uri =
                resolve(&uri, location).ok_or_else(|| failed(format!("a redirect leads to {location:?}")))?;
        }
        Err(failed(format!("it was redirected {MAX_REDIRECTS} times")))
    }

    fn uri(&self, peer: &Peer, path: &str) -> Uri {
        let host = &peer.host;
        let query =
            if host.origin { String::new() } else { format!("?ns={}", encode(self.reference.domain())) };
        let path = format!("{}/{}/{path}{query}", host.prefix, self.reference.path());
        Uri::builder()
            .scheme(host.scheme.clone())
            .authority(host.authority.clone())
            .path_and_query(path)
            .build()
            .expect("host, repository, tag and digest were checked when they were parsed")
    }

    fn object(&self, path: &str) -> String {
        match path.split_once('/') {
            Some(("manifests", what)) if what.contains(':') => format!("{}@{what}", self.reference.path()),
            Some(("manifests", what)) => format!("{}:{what}", self.reference.path()),
            Some(("blobs", what)) => format!("blob {what} of {}", self.reference.path()),
            _ => path.to_owned(),
        }
    }

    pub(super) fn unauthorized(&self, peer: &Peer, path: &str, reason: String) -> ImageError {
        ImageError::Unauthorized {
            registry: peer.host.authority.to_string(),
            object: self.object(path),
            reason,
        }
    }

    pub(super) fn unavailable(&self, peer: &Peer, path: &str, cause: String) -> ImageError {
        let remedy = if cause.contains("certificate") {
            "add its CA to hosts.toml (ca = \"…\")"
        } else if cause.contains("corrupt message") || cause.contains("InvalidContentType") {
            "it does not speak TLS: name it with http:// in hosts.toml"
        } else {
            "check that it runs, the name or address, and the network on the way"
        };
        let registry = peer.host.authority.to_string();
        ImageError::RegistryUnavailable { registry, object: self.object(path), cause, remedy }
    }

    /// Turns a response that is no success into an error.
    pub(super) async fn refusal(&self, peer: &Peer, path: &str, response: Response<Incoming>) -> ImageError {
        let status = response.status();
        let registry = peer.host.authority.to_string();
        let body = tokio::time::timeout(self.timing.response, collect(response, 16 << 10)).await;
        let detail = match body {
            Ok(Ok(bytes)) => error_detail(&bytes),
            _ => String::new(),
        };
        let detail = if detail.is_empty() { status.to_string() } else { detail };
        match status {
            StatusCode::NOT_FOUND => ImageError::NotInRegistry { registry, object: self.object(path) },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => self.unauthorized(peer, path, detail),
            _ if status.is_server_error() || matches!(status.as_u16(), 408 | 429) => {
                self.unavailable(peer, path, format!("it answers {status}: {detail}"))
            }
            _ => ImageError::RegistryRefused {
                registry,
                object: self.object(path),
                status: status.as_u16(),
                detail,
            },
        }
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok().map(Duration::from_secs)
}

/// A body up to `limit` bytes: `Err(None)` if there is more, `Err(Some(cause))` if it broke off.
pub(super) async fn collect(response: Response<Incoming>, limit: usize) -> Result<Bytes, Option<String>> {
    let mut body = response.into_body();
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Some(root_cause(&error)))?;
        if let Ok(data) = frame.into_data() {
            if whole.len() + data.len() > limit {
                return Err(None);
            }
            whole.extend_from_slice(&data);
        }
    }
    Ok(whole.freeze())
}

/// The registry's own words, made safe to print.
fn error_detail(body: &[u8]) -> String {
    let text = match serde_json::from_slice::<ErrorBody>(body) {
        Ok(parsed) => {
            let words = parsed.errors.into_iter().map(|item| match item.message.is_empty() {
                true => item.code,
                false => item.message,
            });
            words.collect::<Vec<_>>().join("; ")
        }
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}

fn resolve(base: &Uri, location: &str) -> Option<Uri> {
    let target = match location.parse::<Uri>().ok()? {
        absolute if absolute.authority().is_some() && absolute.scheme().is_some() => absolute,
        _ if location.starts_with("//") => format!("{}:{location}", base.scheme_str()?).parse().ok()?,
        _ if location.starts_with('/') => {
            format!("{}://{}{location}", base.scheme_str()?, base.authority()?).parse().ok()?
        }
        _ => return None,
    };
    matches!(target.scheme_str(), Some("http" | "https")).then_some(target)
}
