//! Exec, attach and port-forward: the runtime names an address, and the caller's upgraded connection is joined to it
//! byte for byte. What is spoken inside is between the caller and the runtime.

use super::body::{Body, full, text};
use http::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use http::{HeaderMap, HeaderName, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// The headers that make up the upgrade; nothing else of the caller's is the runtime's business.
const PASSED_ON: [HeaderName; 7] = [
    CONNECTION,
    UPGRADE,
    CONTENT_TYPE,
    HeaderName::from_static("x-stream-protocol-version"),
    HeaderName::from_static("sec-websocket-protocol"),
    HeaderName::from_static("sec-websocket-key"),
    HeaderName::from_static("sec-websocket-version"),
];

/// Why the runtime's address could not be joined to the caller.
#[derive(Debug, thiserror::Error)]
enum JoinError {
    #[error("the runtime answered with an address that is none: {0:?}")]
    Address(String),
    #[error("cannot reach the runtime's streaming server at {address}: {cause}")]
    Unreachable { address: String, cause: std::io::Error },
    #[error("the runtime's streaming server broke off: {0}")]
    Broken(#[from] hyper::Error),
    #[error("cannot ask the runtime's streaming server: {0}")]
    Request(#[from] http::Error),
}

/// Joins the caller to `url` and returns what the runtime answered: 101, or its refusal.
pub(super) async fn join(request: Request<Incoming>, url: &str) -> Response<Body> {
    if !request.headers().contains_key(UPGRADE) {
        return text(StatusCode::BAD_REQUEST, "Upgrade request required");
    }
    match try_join(request, url).await {
        Ok(response) => response,
        Err(error) => {
            tracing::warn!(%error, "a stream could not be opened");
            text(StatusCode::BAD_GATEWAY, error.to_string())
        }
    }
}

async fn try_join(mut request: Request<Incoming>, url: &str) -> Result<Response<Body>, JoinError> {
    let uri: Uri = url.parse().map_err(|_| JoinError::Address(url.to_owned()))?;
    let address = uri.authority().ok_or_else(|| JoinError::Address(url.to_owned()))?.to_string();
    let stream = TcpStream::connect(&address)
        .await
        .map_err(|cause| JoinError::Unreachable { address: address.clone(), cause })?;
    // Small interactive pieces should not wait for each other; a refusal costs only speed.
    let _slow = stream.set_nodelay(true);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection.with_upgrades());

    let mut onward = Request::builder()
        .method(request.method().clone())
        .uri(uri.path_and_query().map_or("/", |path| path.as_str()))
        .header(HOST, address);
    for name in PASSED_ON {
        for value in request.headers().get_all(&name) {
            onward = onward.header(&name, value);
        }
    }
    let mut answer = sender.send_request(onward.body(Empty::<Bytes>::new())?).await?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        let (parts, body) = answer.into_parts();
        let mut refusal = Response::new(full(body.collect().await?.to_bytes()));
        *refusal.status_mut() = parts.status;
        return Ok(refusal);
    }
    let (ours, theirs) = (hyper::upgrade::on(&mut request), hyper::upgrade::on(&mut answer));
    tokio::spawn(async move {
        let (Ok(ours), Ok(theirs)) = (ours.await, theirs.await) else { return };
        let (mut ours, mut theirs) = (TokioIo::new(ours), TokioIo::new(theirs));
        // Each side's end is passed on to the other; how it ended is told inside the stream.
        let _broken = tokio::io::copy_bidirectional(&mut ours, &mut theirs).await;
    });
    let mut response = Response::new(full(Bytes::new()));
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *response.headers_mut() = passed_back(answer.headers());
    Ok(response)
}

fn passed_back(headers: &HeaderMap) -> HeaderMap {
    let accept = HeaderName::from_static("sec-websocket-accept");
    PASSED_ON
        .iter()
        .chain([&accept])
        .flat_map(|name| headers.get_all(name).iter().map(move |value| (name.clone(), value.clone())))
        .collect()
}
