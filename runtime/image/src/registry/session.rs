//! One pull's conversation with a registry and its mirrors: requests, retries, redirects, tokens.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_TYPE, LOCATION, RANGE, RETRY_AFTER, USER_AGENT,
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use serde::Deserialize;

use super::auth::{Challenge, Credentials, challenges, encode, sensitive};
use super::hosts::{Host, hosts_for, is_loopback};
use super::transport::{Body, SendError, Transport, root_cause};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::manifest::ACCEPTED;
use crate::reference::{Reference, Target};

const AGENT: &str = concat!("orlop/", env!("CARGO_PKG_VERSION"));
const MAX_MANIFEST: usize = 4 << 20;
const MAX_TOKEN: usize = 1 << 20;
const MAX_REDIRECTS: usize = 8;
/// The token protocol's default lifetime, and what is held back from any.
const TOKEN_LIFETIME: u64 = 60;
const TOKEN_MARGIN: u64 = 5;

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

struct Token {
    header: HeaderValue,
    until: Option<Instant>,
}

#[derive(Default)]
struct AuthState {
    /// What the host last asked for; nothing until its first 401.
    challenge: Option<Challenge>,
    /// By scope.
    tokens: HashMap<String, Token>,
}

pub(super) struct Peer {
    pub(super) host: Host,
    transport: Transport,
    credentials: Credentials,
    auth: tokio::sync::Mutex<AuthState>,
}

pub(crate) struct Session {
    reference: Reference,
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
struct TokenResponse {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
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

    fn scope(&self) -> String {
        format!("repository:{}:pull", self.reference.path())
    }

    /// The header to send now; renews a token that is about to end.
    async fn authorization(&self, peer: &Peer) -> Result<Option<HeaderValue>, ImageError> {
        if let Credentials::Registry(token) = &peer.credentials {
            return Ok(sensitive(&format!("Bearer {token}")));
        }
        let mut auth = peer.auth.lock().await;
        let Some(challenge) = auth.challenge.clone() else { return Ok(None) };
        if challenge.scheme == "basic" {
            return Ok(peer.credentials.basic_header());
        }
        let scope = self.scope();
        match auth.tokens.get(&scope) {
            Some(token) if token.until.is_none_or(|until| Instant::now() < until) => {
                Ok(Some(token.header.clone()))
            }
            _ => {
                let token = self.fetch_token(peer, &challenge).await?;
                let header = token.header.clone();
                auth.tokens.insert(scope, token);
                Ok(Some(header))
            }
        }
    }

    /// Notes what a 401 asks for, so that the next attempt can satisfy it.
    async fn answer_challenge(
        &self,
        peer: &Peer,
        path: &str,
        response: &Response<Incoming>,
        sent: Option<&HeaderValue>,
    ) -> Result<(), ImageError> {
        let offered: Vec<Challenge> = response
            .headers()
            .get_all(http::header::WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(challenges)
            .collect();
        let basic = matches!(peer.credentials, Credentials::Basic { .. });
        let chosen = offered
            .iter()
            .find(|challenge| challenge.scheme == "bearer")
            .or_else(|| offered.iter().find(|challenge| challenge.scheme == "basic" && basic));
        let Some(chosen) = chosen.filter(|_| !matches!(peer.credentials, Credentials::Registry(_))) else {
            let reason = if sent.is_some() { "it rejects the credentials" } else { "it wants credentials" };
            return Err(self.unauthorized(peer, path, reason.to_owned()));
        };
        let mut auth = peer.auth.lock().await;
        // Another request of this pull may have renewed the token meanwhile: only the one that was sent is bad.
        let scope = self.scope();
        if auth.tokens.get(&scope).is_some_and(|token| Some(&token.header) == sent) {
            auth.tokens.remove(&scope);
        }
        auth.challenge = Some(chosen.clone());
        Ok(())
    }

    async fn fetch_token(&self, peer: &Peer, challenge: &Challenge) -> Result<Token, ImageError> {
        let broken = |reason: String| ImageError::InvalidResponse {
            registry: peer.host.authority.to_string(),
            object: "authentication".to_owned(),
            reason,
        };
        let realm = challenge.parameters.get("realm").map_or("", String::as_str);
        let realm_uri: Uri =
            realm.parse().map_err(|_| broken(format!("its token server {realm:?} is not a URL")))?;
        let secure = realm_uri.scheme_str() == Some("https") || is_loopback(realm_uri.host().unwrap_or(""));
        let same_host = realm_uri.host() == Some(peer.host.authority.host())
            && peer.host.scheme == http::uri::Scheme::HTTP;
        if peer.credentials != Credentials::Anonymous && !secure && !same_host {
            return Err(broken(format!("its token server {realm:?} would get the credentials unencrypted")));
        }
        let mut scopes = vec![self.scope()];
        if let Some(asked) = challenge.parameters.get("scope") {
            scopes.extend(
                asked.split(' ').filter(|scope| *scope != scopes[0]).map(str::to_owned).collect::<Vec<_>>(),
            );
        }
        let service = challenge.parameters.get("service").map(String::as_str);
        let request = match &peer.credentials {
            Credentials::Identity(token) => {
                let grant = format!("grant_type=refresh_token&refresh_token={}", encode(token));
                form_request(&realm_uri, &grant, service, &scopes)
            }
            _ => query_request(realm, &peer.credentials, service, &scopes),
        };
        let mut request =
            request.ok_or_else(|| broken(format!("its token server {realm:?} is not a usable URL")))?;
        request.headers_mut().insert(USER_AGENT, HeaderValue::from_static(AGENT));
        let sent = tokio::time::timeout(self.timing.response, peer.transport.send(request)).await;
        let path = format!("a token from {realm}");
        let response = match sent {
            Ok(Ok(response)) => response,
            Ok(Err(SendError::Setup(error))) => return Err(error),
            Ok(Err(SendError::Failed { cause, .. })) => return Err(self.unavailable(peer, &path, cause)),
            Err(_) => return Err(self.unavailable(peer, &path, "no response in time".to_owned())),
        };
        if !response.status().is_success() {
            return Err(self.refusal(peer, &path, response).await);
        }
        let body = collect(response, MAX_TOKEN).await;
        let body =
            body.map_err(|cause| broken(cause.unwrap_or_else(|| "the token is too large".to_owned())))?;
        let parsed: TokenResponse =
            serde_json::from_slice(&body).map_err(|cause| broken(cause.to_string()))?;
        let token = parsed.token.or(parsed.access_token).filter(|token| !token.is_empty());
        let token = token.ok_or_else(|| broken("its token server sent no token".to_owned()))?;
        let header = sensitive(&format!("Bearer {token}"))
            .ok_or_else(|| broken("the token is malformed".to_owned()))?;
        let lifetime = parsed.expires_in.unwrap_or(TOKEN_LIFETIME).max(TOKEN_LIFETIME) - TOKEN_MARGIN;
        Ok(Token { header, until: Instant::now().checked_add(Duration::from_secs(lifetime)) })
    }

    fn object(&self, path: &str) -> String {
        match path.split_once('/') {
            Some(("manifests", what)) if what.contains(':') => format!("{}@{what}", self.reference.path()),
            Some(("manifests", what)) => format!("{}:{what}", self.reference.path()),
            Some(("blobs", what)) => format!("blob {what} of {}", self.reference.path()),
            _ => path.to_owned(),
        }
    }

    fn unauthorized(&self, peer: &Peer, path: &str, reason: String) -> ImageError {
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
    async fn refusal(&self, peer: &Peer, path: &str, response: Response<Incoming>) -> ImageError {
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
async fn collect(response: Response<Incoming>, limit: usize) -> Result<Bytes, Option<String>> {
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

fn query_request(
    realm: &str,
    credentials: &Credentials,
    service: Option<&str>,
    scopes: &[String],
) -> Option<Request<Body>> {
    let mut query: Vec<String> = scopes.iter().map(|scope| format!("scope={}", encode(scope))).collect();
    query.extend(service.map(|service| format!("service={}", encode(service))));
    let separator = if realm.contains('?') { '&' } else { '?' };
    let uri: Uri = format!("{realm}{separator}{}", query.join("&")).parse().ok()?;
    uri.host()?;
    let mut request = Request::get(uri).body(Body::default()).ok()?;
    if let Some(header) = credentials.basic_header() {
        request.headers_mut().insert(AUTHORIZATION, header);
    }
    Some(request)
}

fn form_request(realm: &Uri, grant: &str, service: Option<&str>, scopes: &[String]) -> Option<Request<Body>> {
    realm.host()?;
    let scope = encode(&scopes.join(" "));
    let service = encode(service.unwrap_or_default());
    let form = format!("{grant}&service={service}&scope={scope}&client_id=orlop");
    let request = Request::post(realm).header(CONTENT_TYPE, "application/x-www-form-urlencoded");
    request.body(Body::from(form)).ok()
}
