//! Requests to the API server.

use crate::credentials::Credentials;
use crate::error::ApiError;
use crate::kubeconfig::{KubeconfigError, ServerConfig};
use crate::pool::{Body, Connection, Pool, chain};
use crate::tls::TlsError;
use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, RETRY_AFTER, USER_AGENT};
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Long enough for a large list from a busy server.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// The largest answer that is read into memory; the server's own limit for an object is far below.
const LARGEST_ANSWER: usize = 64 << 20;
const AGENT: &str = concat!("orlop/", env!("CARGO_PKG_VERSION"));
const JSON: &str = "application/json";

/// How a PATCH body is to be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patch {
    Strategic,
    Merge,
    Json,
}

impl Patch {
    fn content_type(self) -> &'static str {
        match self {
            Self::Strategic => "application/strategic-merge-patch+json",
            Self::Merge => "application/merge-patch+json",
            Self::Json => "application/json-patch+json",
        }
    }
}

/// A client cannot be made from this configuration.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(transparent)]
    Kubeconfig(#[from] KubeconfigError),
    #[error("connection to {server}: {source}")]
    Tls { server: String, source: TlsError },
}

/// A connection to one API server. Clones share it and its credentials.
#[derive(Debug, Clone)]
pub struct Client {
    pool: Arc<Pool>,
    timeout: Duration,
}

/// What a request is, apart from its body.
#[derive(Clone, Copy)]
struct Call<'a> {
    method: &'static str,
    path: &'a str,
    content_type: &'static str,
}

/// An answer whose body is still to be read.
pub(crate) struct Answer {
    response: Response<Incoming>,
    /// Keeps the connection's stream counted, or the connection itself, until the body is read.
    connection: Connection,
    path: String,
    server: String,
    method: &'static str,
}

/// Paths are absolute and carry their query, such as `/api/v1/nodes/a/status?fieldManager=orlop`.
impl Client {
    /// Connects at the first request.
    pub fn new(config: ServerConfig) -> Result<Self, ClientError> {
        let server = config.server().to_owned();
        let pool = Pool::new(config).map_err(|source| ClientError::Tls { server, source })?;
        Ok(Self { pool: Arc::new(pool), timeout: DEFAULT_TIMEOUT })
    }

    pub fn from_kubeconfig(file: &Path) -> Result<Self, ClientError> {
        Self::new(ServerConfig::load(file)?)
    }

    /// The same client with another limit on the duration of a request (watches have none).
    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { pool: Arc::clone(&self.pool), timeout }
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        self.json(Call { method: "GET", path, content_type: JSON }, Bytes::new()).await
    }

    /// An answer that is not JSON, such as `/healthz`.
    pub async fn get_text(&self, path: &str) -> Result<String, ApiError> {
        let body = self.bytes(Call { method: "GET", path, content_type: JSON }, Bytes::new()).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// The bytes of an answer, for callers that decode it in parts.
    pub(crate) async fn get_bytes(&self, path: &str) -> Result<Bytes, ApiError> {
        self.bytes(Call { method: "GET", path, content_type: JSON }, Bytes::new()).await
    }

    pub async fn create<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ApiError> {
        let call = Call { method: "POST", path, content_type: JSON };
        self.json(call, encode(call, body)?).await
    }

    pub async fn replace<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ApiError> {
        let call = Call { method: "PUT", path, content_type: JSON };
        self.json(call, encode(call, body)?).await
    }

    pub async fn patch<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        path: &str,
        kind: Patch,
        body: &B,
    ) -> Result<T, ApiError> {
        let call = Call { method: "PATCH", path, content_type: kind.content_type() };
        self.json(call, encode(call, body)?).await
    }

    /// `options` is a `DeleteOptions` object or `()` for none.
    pub async fn delete<B: Serialize + Sync>(&self, path: &str, options: &B) -> Result<(), ApiError> {
        let call = Call { method: "DELETE", path, content_type: JSON };
        let body = encode(call, options)?;
        let body = if &body[..] == b"null" { Bytes::new() } else { body };
        self.bytes(call, body).await.map(drop)
    }

    /// The server's address, for messages.
    #[must_use]
    pub fn server(&self) -> &str {
        &self.pool.endpoint.url
    }

    /// Our identity towards this server.
    #[must_use]
    pub fn credentials(&self) -> &Credentials {
        &self.pool.credentials
    }

    /// Closes every connection, for a caller that has reason to believe they lead nowhere. Watches start again.
    pub fn drop_connections(&self) {
        self.pool.close_all();
    }

    /// Waits until the server accepts connections again, but no longer than `longest`.
    pub async fn wait_reachable(&self, longest: Duration) {
        self.pool.wait_reachable(longest).await;
    }

    /// Starts a GET whose body goes on for as long as both sides like.
    pub(crate) async fn stream(&self, path: &str) -> Result<Answer, ApiError> {
        let call = Call { method: "GET", path, content_type: JSON };
        let answer = self.timed(call, self.send(call, Bytes::new())).await?;
        if answer.response.status().is_success() {
            return Ok(answer);
        }
        let status = answer.response.status();
        let retry_after = retry_after(&answer.response);
        let body = self.timed(call, answer.read(&self.pool)).await?;
        Err(self.refusal(call, status, retry_after, &body))
    }

    async fn json<T: DeserializeOwned>(&self, call: Call<'_>, body: Bytes) -> Result<T, ApiError> {
        let answer = self.bytes(call, body).await?;
        serde_json::from_slice(&answer).map_err(|error| call.malformed(error.to_string()))
    }

    async fn bytes(&self, call: Call<'_>, body: Bytes) -> Result<Bytes, ApiError> {
        self.timed(call, async {
            let answer = self.send(call, body).await?;
            let status = answer.response.status();
            let retry_after = retry_after(&answer.response);
            let body = answer.read(&self.pool).await?;
            if status.is_success() { Ok(body) } else { Err(self.refusal(call, status, retry_after, &body)) }
        })
        .await
    }

    async fn timed<T>(
        &self,
        call: Call<'_>,
        work: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        match tokio::time::timeout(self.timeout, work).await {
            Ok(result) => result,
            Err(_) => {
                Err(self.unreachable(call, format!("no answer within {:.1} s", self.timeout.as_secs_f64())))
            }
        }
    }

    /// Sends a request. A refusal of our credentials is answered once by reading them again; a connection that turns
    /// out to be closed is replaced once.
    async fn send(&self, call: Call<'_>, body: Bytes) -> Result<Answer, ApiError> {
        let mut retried = false;
        loop {
            let answer = self.send_once(call, body.clone()).await?;
            let refused = answer.response.status() == StatusCode::UNAUTHORIZED;
            if refused && !retried && self.pool.credentials.reload() {
                retried = true;
                continue;
            }
            return Ok(answer);
        }
    }

    async fn send_once(&self, call: Call<'_>, body: Bytes) -> Result<Answer, ApiError> {
        let mut stale = 0;
        loop {
            let mut connection =
                self.pool.checkout().await.map_err(|error| self.unreachable(call, error.to_string()))?;
            let request = self.request(call, body.clone(), &connection)?;
            let result = match &mut connection {
                Connection::Shared { sender, .. } => sender.try_send_request(request).await,
                Connection::Own { sender, .. } => {
                    // One that lay idle may have been closed meanwhile; the pool will find another.
                    if sender.ready().await.is_err() && stale < 2 {
                        stale += 1;
                        continue;
                    }
                    sender.try_send_request(request).await
                }
            };
            match result {
                Ok(response) => {
                    return Ok(Answer {
                        response,
                        connection,
                        path: call.path.to_owned(),
                        server: self.server().to_owned(),
                        method: call.method,
                    });
                }
                Err(mut failed) => {
                    // Unsent requests may be repeated whatever they are, sent ones only if they change nothing.
                    let unsent = failed.take_message().is_some();
                    let repeatable = unsent || call.method == "GET";
                    if repeatable && stale < 2 && !failed.error().is_user() {
                        stale += 1;
                        continue;
                    }
                    return Err(self.unreachable(call, chain(failed.error())));
                }
            }
        }
    }

    fn request(
        &self,
        call: Call<'_>,
        body: Bytes,
        connection: &Connection,
    ) -> Result<Request<Body>, ApiError> {
        let endpoint = &self.pool.endpoint;
        let method = Method::from_bytes(call.method.as_bytes()).unwrap_or(Method::GET);
        let mut builder = Request::builder().method(method).header(ACCEPT, JSON).header(USER_AGENT, AGENT);
        builder = match connection {
            Connection::Shared { .. } => {
                let scheme = if endpoint.tls { "https" } else { "http" };
                builder
                    .version(Version::HTTP_2)
                    .uri(format!("{scheme}://{}{}{}", endpoint.authority, endpoint.prefix, call.path))
            }
            Connection::Own { .. } => builder
                .uri(format!("{}{}", endpoint.prefix, call.path))
                .header(HOST, endpoint.authority.as_str()),
        };
        if !body.is_empty() {
            builder = builder.header(CONTENT_TYPE, call.content_type);
        }
        if let Some(token) = self.pool.credentials.token() {
            let mut value = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| {
                self.unreachable(call, "the bearer token holds characters that cannot be sent".to_owned())
            })?;
            value.set_sensitive(true);
            builder = builder.header(AUTHORIZATION, value);
        }
        builder.body(Body::new(body)).map_err(|error| call.malformed(format!("not a valid request: {error}")))
    }

    fn unreachable(&self, call: Call<'_>, cause: String) -> ApiError {
        ApiError::Unreachable {
            method: call.method,
            path: call.path.to_owned(),
            server: self.server().to_owned(),
            cause,
        }
    }

    fn refusal(&self, call: Call<'_>, status: StatusCode, retry_after: Option<u32>, body: &[u8]) -> ApiError {
        let told: StatusObject = serde_json::from_slice(body).unwrap_or_default();
        let mut message = if told.message.is_empty() {
            let text = String::from_utf8_lossy(body);
            text.trim().chars().take(300).collect()
        } else {
            told.message
        };
        if status == StatusCode::UNAUTHORIZED {
            message = format!("{message}: {}", self.pool.credentials.explain_refusal());
        }
        ApiError::Status {
            method: call.method,
            path: call.path.to_owned(),
            code: status.as_u16(),
            reason: if told.reason.is_empty() {
                status.canonical_reason().unwrap_or_default().to_owned()
            } else {
                told.reason
            },
            message,
            retry_after: retry_after.or(told.details.retry_after_seconds),
        }
    }
}

impl Call<'_> {
    fn malformed(&self, cause: String) -> ApiError {
        ApiError::Malformed { method: self.method, path: self.path.to_owned(), cause }
    }
}

fn encode<B: Serialize>(call: Call<'_>, body: &B) -> Result<Bytes, ApiError> {
    serde_json::to_vec(body)
        .map(Bytes::from)
        .map_err(|error| call.malformed(format!("the request's own body cannot be encoded: {error}")))
}

fn retry_after(response: &Response<Incoming>) -> Option<u32> {
    response.headers().get(RETRY_AFTER)?.to_str().ok()?.parse().ok()
}

impl Answer {
    /// The next piece of the body, or none at its end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        loop {
            match self.response.body_mut().frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                Some(Err(error)) => {
                    return Err(ApiError::Unreachable {
                        method: self.method,
                        path: self.path.clone(),
                        server: self.server.clone(),
                        cause: format!("the connection broke: {}", chain(&error)),
                    });
                }
            }
        }
    }

    async fn read(mut self, pool: &Pool) -> Result<Bytes, ApiError> {
        let mut all = BytesMut::new();
        let mut first = None;
        while let Some(piece) = self.next().await? {
            if all.len() + piece.len() > LARGEST_ANSWER {
                let cause = format!("it is larger than {} MiB", LARGEST_ANSWER >> 20);
                return Err(ApiError::Malformed { method: self.method, path: self.path, cause });
            }
            match first {
                None if all.is_empty() => first = Some(piece),
                _ => {
                    if let Some(first) = first.take() {
                        all.extend_from_slice(&first);
                    }
                    all.extend_from_slice(&piece);
                }
            }
        }
        if let Connection::Own { sender, epoch } = self.connection {
            pool.give_back(sender, epoch);
        }
        // Most answers come in one piece and need no copy.
        Ok(first.unwrap_or_else(|| all.freeze()))
    }
}

/// The parts of the server's `Status` object that matter.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct StatusObject {
    pub(crate) message: String,
    pub(crate) reason: String,
    pub(crate) code: u16,
    pub(crate) details: StatusDetails,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct StatusDetails {
    pub(crate) retry_after_seconds: Option<u32>,
}
