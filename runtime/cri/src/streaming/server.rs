//! The HTTP side: a listener, one-time URLs, the upgrade to SPDY.

use super::session::{self, Session, Wanted};
use super::spdy::{Connection, Role};
use super::tokens::{Pending, Tokens};
use super::{StreamError, StreamIo, StreamTarget, forward};
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use orlop_proto::cri::{AttachRequest, ExecRequest, PortForwardRequest};
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

const PROTOCOL_HEADER: &str = "x-stream-protocol-version";

/// The HTTP server behind the URLs. Dropping it ends its listener and its sessions.
#[derive(Debug)]
pub struct StreamServer {
    address: SocketAddr,
    tokens: Arc<Mutex<Tokens>>,
    _listening: AbortOnDropHandle<()>,
}

impl StreamServer {
    /// Listens on `bind` (port 0 picks one) and serves `target` until dropped.
    pub async fn start(bind: SocketAddr, target: Arc<dyn StreamTarget>) -> io::Result<Self> {
        let listener = TcpListener::bind(bind).await?;
        let address = listener.local_addr()?;
        let tokens = Arc::new(Mutex::new(Tokens::default()));
        let listening = tokio::spawn(listen(listener, tokens.clone(), target));
        Ok(Self { address, tokens, _listening: AbortOnDropHandle::new(listening) })
    }

    /// A URL that runs this request once, within a minute.
    pub fn exec_url(&self, request: ExecRequest) -> Result<String, StreamError> {
        self.url("exec", Pending::Exec(request))
    }

    pub fn attach_url(&self, request: AttachRequest) -> Result<String, StreamError> {
        self.url("attach", Pending::Attach(request))
    }

    pub fn port_forward_url(&self, request: PortForwardRequest) -> Result<String, StreamError> {
        self.url("portforward", Pending::PortForward(request))
    }

    fn url(&self, kind: &str, request: Pending) -> Result<String, StreamError> {
        let token = uuid::Uuid::new_v4().simple().to_string();
        let url = format!("http://{}/{kind}/{token}", self.address);
        lock(&self.tokens).insert(token, request, Instant::now())?;
        Ok(url)
    }
}

fn lock(tokens: &Mutex<Tokens>) -> std::sync::MutexGuard<'_, Tokens> {
    // The map is whole after every single operation, also after one that panicked.
    tokens.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn listen(listener: TcpListener, tokens: Arc<Mutex<Tokens>>, target: Arc<dyn StreamTarget>) {
    // Sessions end with the server.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    // Interactive bytes are small and wanted now; an old kernel that refuses is no reason to refuse too.
                    let _refused = stream.set_nodelay(true);
                    connections.spawn(serve(TokioIo::new(stream), tokens.clone(), target.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "the streaming server cannot accept a connection");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            },
            Some(_ended) = connections.join_next() => {}
        }
    }
}

async fn serve(
    stream: TokioIo<tokio::net::TcpStream>,
    tokens: Arc<Mutex<Tokens>>,
    target: Arc<dyn StreamTarget>,
) {
    let (upgrades, mut upgraded) = tokio::sync::mpsc::channel(1);
    let service = service_fn(move |mut request: Request<Incoming>| {
        let answer = answer(&request, &tokens);
        if let Ok((pending, protocol, _)) = &answer {
            let upgrade = (hyper::upgrade::on(&mut request), pending.clone(), *protocol);
            // One upgrade for each connection: hyper hands it over after this response.
            let _second = upgrades.try_send(upgrade);
        }
        async move { Ok::<_, Infallible>(answer.map_or_else(|refusal| *refusal, |(_, _, response)| response)) }
    });
    let connection =
        hyper::server::conn::http1::Builder::new().serve_connection(stream, service).with_upgrades();
    if connection.await.is_err() {
        return;
    }
    let Ok((upgrade, pending, protocol)) = upgraded.try_recv() else { return };
    match upgrade
        .await
        .map_err(io::Error::other)
        .and_then(|io| Connection::new(Role::Server, TokioIo::new(io)))
    {
        Ok(connection) => stream_session(connection, pending, protocol, target).await,
        Err(error) => tracing::debug!(%error, "a streaming client went before its session began"),
    }
}

type Accepted = (Pending, &'static str, Response<Full<Bytes>>);

/// What to answer, and what to do with the connection afterwards.
fn answer(
    request: &Request<Incoming>,
    tokens: &Mutex<Tokens>,
) -> Result<Accepted, Box<Response<Full<Bytes>>>> {
    let refuse = |status: StatusCode, text: &str| {
        let mut response = Response::new(Full::new(Bytes::from(format!("{text}\n"))));
        *response.status_mut() = status;
        Box::new(response)
    };
    let mut segments = request.uri().path().trim_start_matches('/').splitn(2, '/');
    let (kind, token) = (segments.next().unwrap_or_default(), segments.next().unwrap_or_default());
    let known: &[&'static str] = match kind {
        "exec" | "attach" => &session::PROTOCOLS,
        "portforward" => &forward::PROTOCOLS,
        _ => return Err(refuse(StatusCode::NOT_FOUND, "no such stream")),
    };
    if !asks_for_spdy(request.headers()) {
        return Err(refuse(StatusCode::BAD_REQUEST, "streams need an upgrade to SPDY/3.1"));
    }
    let Some(protocol) = negotiate(request.headers(), known) else {
        return Err(refuse(
            StatusCode::FORBIDDEN,
            &format!("none of the offered protocols is known; known are {known:?}"),
        ));
    };
    let Some(pending) = lock(tokens).take(token, Instant::now()) else {
        return Err(refuse(StatusCode::NOT_FOUND, "this address was used already, or its minute is over"));
    };
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("SPDY/3.1"));
    headers.insert(PROTOCOL_HEADER, HeaderValue::from_static(protocol));
    Ok((pending, protocol, response))
}

fn asks_for_spdy(headers: &HeaderMap) -> bool {
    headers.get(UPGRADE).and_then(|v| v.to_str().ok()).is_some_and(|v| v.eq_ignore_ascii_case("SPDY/3.1"))
}

/// The first version we prefer among those the client offers; one that offers none speaks the oldest.
fn negotiate(headers: &HeaderMap, known: &[&'static str]) -> Option<&'static str> {
    let offered: Vec<&str> = headers
        .get_all(PROTOCOL_HEADER)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .collect();
    if offered.is_empty() {
        return known.last().copied();
    }
    known.iter().find(|version| offered.contains(version)).copied()
}

async fn stream_session(
    connection: Connection,
    pending: Pending,
    protocol: &'static str,
    target: Arc<dyn StreamTarget>,
) {
    match pending {
        Pending::Exec(request) => {
            let wanted = Wanted {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                tty: request.tty,
            };
            with_session(connection, protocol, wanted, async move |io| target.exec(request, io).await).await;
        }
        Pending::Attach(request) => {
            let wanted = Wanted {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                tty: request.tty,
            };
            with_session(connection, protocol, wanted, async move |io| {
                target.attach(request, io).await.map(|()| 0)
            })
            .await;
        }
        Pending::PortForward(request) => forward::serve(connection, request, target).await,
    }
}

async fn with_session(
    connection: Connection,
    protocol: &str,
    wanted: Wanted,
    work: impl AsyncFnOnce(StreamIo) -> Result<i32, StreamError>,
) {
    match Session::open(connection, protocol, wanted).await {
        Some((session, io)) => session.run(work(io)).await,
        None => tracing::debug!("a streaming client did not open its streams in time"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_is_chosen() {
        let mut headers = HeaderMap::new();
        assert_eq!(negotiate(&headers, &session::PROTOCOLS), Some("channel.k8s.io"));
        headers.append(PROTOCOL_HEADER, HeaderValue::from_static("v5.channel.k8s.io"));
        assert_eq!(negotiate(&headers, &session::PROTOCOLS), None);
        headers.append(PROTOCOL_HEADER, HeaderValue::from_static("v3.channel.k8s.io, v4.channel.k8s.io"));
        assert_eq!(negotiate(&headers, &session::PROTOCOLS), Some("v4.channel.k8s.io"));
    }
}
