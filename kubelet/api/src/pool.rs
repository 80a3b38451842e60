//! Connections to one server: a single HTTP/2 connection for everything, more only when its streams run out; with a server
//! that speaks HTTP/1.1 one connection for each request under way.
//!
//! Invariants: at most one connection is being made at a time, and whoever waited for an attempt that failed shares its
//! error instead of trying again; a connection of an older credential generation takes no new request.

use crate::backoff::chance;
use crate::credentials::Credentials;
use crate::kubeconfig::{Endpoint, ServerConfig};
use crate::tls::{self, Tls, TlsError, Trust};
use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_util::sync::{CancellationToken, DropGuard};

pub(crate) type Body = Full<Bytes>;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection whose peer is silent for this long is asked for a sign of life …
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// … and given up when none comes.
const PING_TIMEOUT: Duration = Duration::from_secs(15);
/// Fewer streams than any server allows: a request queued behind watches that never end would hang.
const STREAMS_PER_CONNECTION: usize = 90;
const IDLE_CONNECTIONS: usize = 4;

/// Why there is no connection.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub(crate) struct ConnectError(String);

/// A connection lent to one request.
pub(crate) enum Connection {
    Shared { sender: http2::SendRequest<Body>, _stream: Arc<()> },
    Own { sender: http1::SendRequest<Body>, epoch: u64 },
}

#[derive(Debug)]
struct Open {
    sender: http2::SendRequest<Body>,
    /// Cloned into every request under way, which counts the streams.
    stream: Arc<()>,
}

#[derive(Debug)]
struct State {
    shared: Vec<Open>,
    idle: Vec<http1::SendRequest<Body>>,
    /// Cancelled to close every connection; replaced then.
    alive: CancellationToken,
    _close_on_drop: DropGuard,
    generation: u64,
    /// Raised with every closing of all connections, so that none comes back from a request.
    epoch: u64,
    failed: Option<(Instant, ConnectError)>,
}

#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) endpoint: Endpoint,
    trust: Trust,
    tls: Option<Tls>,
    pub(crate) credentials: Credentials,
    state: Mutex<State>,
    connecting: tokio::sync::Mutex<()>,
    probing: tokio::sync::Mutex<()>,
    /// Counts successful connects.
    connected: watch::Sender<u64>,
}

impl Pool {
    pub(crate) fn new(config: ServerConfig) -> Result<Self, TlsError> {
        let ServerConfig { endpoint, trust, tls_server_name, credentials } = config;
        let tls = if endpoint.tls {
            Some(Tls::new(&endpoint, tls_server_name.as_deref(), &trust, &credentials)?)
        } else {
            None
        };
        let alive = CancellationToken::new();
        let state = State {
            shared: Vec::new(),
            idle: Vec::new(),
            _close_on_drop: alive.clone().drop_guard(),
            alive,
            generation: credentials.generation(),
            epoch: 0,
            failed: None,
        };
        Ok(Self {
            endpoint,
            trust,
            tls,
            credentials,
            state: Mutex::new(state),
            connecting: tokio::sync::Mutex::new(()),
            probing: tokio::sync::Mutex::new(()),
            connected: watch::Sender::new(0),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = self.credentials.generation();
        if state.generation != generation {
            state.generation = generation;
            close(&mut state);
        }
        state
    }

    /// Closes every connection; requests under way fail and watches start again.
    pub(crate) fn close_all(&self) {
        close(&mut self.state());
    }

    /// A connection for one request.
    pub(crate) async fn checkout(&self) -> Result<Connection, ConnectError> {
        if let Some(ready) = self.ready() {
            return Ok(ready);
        }
        // A handshake's state is large; requests that find a connection shall not carry room for it.
        Box::pin(self.checkout_new()).await
    }

    async fn checkout_new(&self) -> Result<Connection, ConnectError> {
        let waiting_since = Instant::now();
        let _one_at_a_time = self.connecting.lock().await;
        if let Some(ready) = self.ready() {
            return Ok(ready);
        }
        if let Some((at, error)) = &self.state().failed
            && *at > waiting_since
        {
            return Err(error.clone());
        }
        let result = match tokio::time::timeout(CONNECT_TIMEOUT, self.connect()).await {
            Ok(result) => result,
            Err(_) => Err(ConnectError(format!(
                "no answer within {} s: check the address and the network between",
                CONNECT_TIMEOUT.as_secs()
            ))),
        };
        self.state().failed = result.as_ref().err().map(|error| (Instant::now(), error.clone()));
        if result.is_ok() {
            self.connected.send_modify(|count| *count += 1);
        }
        result
    }

    fn ready(&self) -> Option<Connection> {
        let mut state = self.state();
        state.shared.retain(|open| !open.sender.is_closed());
        if let Some(open) =
            state.shared.iter().find(|open| Arc::strong_count(&open.stream) <= STREAMS_PER_CONNECTION)
        {
            return Some(Connection::Shared {
                sender: open.sender.clone(),
                _stream: Arc::clone(&open.stream),
            });
        }
        let epoch = state.epoch;
        while let Some(sender) = state.idle.pop() {
            if !sender.is_closed() {
                return Some(Connection::Own { sender, epoch });
            }
        }
        None
    }

    /// Takes back an HTTP/1.1 connection whose response has been read to its end.
    pub(crate) fn give_back(&self, sender: http1::SendRequest<Body>, epoch: u64) {
        let mut state = self.state();
        if state.epoch == epoch && !sender.is_closed() && state.idle.len() < IDLE_CONNECTIONS {
            state.idle.push(sender);
        }
    }

    async fn connect(&self) -> Result<Connection, ConnectError> {
        let Endpoint { host, port, .. } = &self.endpoint;
        let tcp = TcpStream::connect((host.as_str(), *port)).await.map_err(|error| {
            ConnectError(match error.kind() {
                std::io::ErrorKind::ConnectionRefused => {
                    format!("{host}:{port} refused the connection: the API server is not running there")
                }
                _ => format!("{host}:{port}: {error}"),
            })
        })?;
        // Small requests that wait for their answers gain nothing from being held back.
        if let Err(error) = tcp.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
        let Some(tls) = &self.tls else { return self.open_http1(tcp).await };
        self.credentials.reload_certificate();
        let stream = TlsConnector::from(Arc::clone(&tls.config))
            .connect(tls.name.clone(), tcp)
            .await
            .map_err(|error| ConnectError(tls::explain(&error, &self.endpoint, &self.trust)))?;
        if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
            self.open_http2(stream).await
        } else {
            self.open_http1(stream).await
        }
    }

    async fn open_http2<S>(&self, stream: S) -> Result<Connection, ConnectError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| ConnectError(format!("HTTP/2: {}", chain(&error))))?;
        let stream = Arc::new(());
        let mut state = self.state();
        drive(state.alive.clone(), self.credentials.changes(), connection);
        state.shared.push(Open { sender: sender.clone(), stream: Arc::clone(&stream) });
        Ok(Connection::Shared { sender, _stream: stream })
    }

    async fn open_http1<S>(&self, stream: S) -> Result<Connection, ConnectError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| ConnectError(format!("HTTP/1.1: {}", chain(&error))))?;
        let state = self.state();
        drive(state.alive.clone(), self.credentials.changes(), connection);
        Ok(Connection::Own { sender, epoch: state.epoch })
    }

    /// Waits until the server can be reached again, but no longer than `longest`. However many wait, one of them probes,
    /// about once a second, and a success wakes all.
    pub(crate) async fn wait_reachable(&self, longest: Duration) {
        let mut connected = self.connected.subscribe();
        let probe = async {
            let _one_prober = self.probing.lock().await;
            loop {
                tokio::time::sleep(Duration::from_secs(1).mul_f64(0.75 + 0.25 * chance())).await;
                match self.checkout().await {
                    Ok(Connection::Own { sender, epoch }) => return self.give_back(sender, epoch),
                    Ok(Connection::Shared { .. }) => return,
                    Err(_) => {}
                }
            }
        };
        tokio::select! {
            () = tokio::time::sleep(longest) => {}
            _ = connected.changed() => {}
            () = probe => {}
        }
    }
}

fn close(state: &mut State) {
    state.shared.clear();
    state.idle.clear();
    state.epoch += 1;
    state.alive = CancellationToken::new();
    // Dropping the guard of the former token cancels it, which ends the tasks that drive the old connections.
    state._close_on_drop = state.alive.clone().drop_guard();
}

/// Runs a connection until it ends, is no longer wanted, or speaks for an identity that has been replaced. How it ended is told to the requests on it.
fn drive<F, E>(alive: CancellationToken, mut swapped: watch::Receiver<u64>, connection: F)
where
    F: Future<Output = Result<(), E>> + Send + 'static,
    E: std::fmt::Display + Send,
{
    tokio::spawn(async move {
        tokio::select! {
            () = alive.cancelled() => {}
            _ = swapped.changed() => {}
            result = connection => if let Err(error) = result {
                tracing::debug!(%error, "connection to the API server ended");
            }
        }
    });
}

/// An error with its causes; hyper keeps the telling ones below.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
