//! The kubelet's HTTP API: :10250 with TLS, authentication and authorization; health on loopback; on request a read-only
//! port without either.
//!
//! Every request on :10250 is first identified, then judged by the API server, then answered. Nothing here works when
//! nobody asks: figures are gathered at the moment of the question.

mod attributes;
mod auth;
mod body;
mod certificate;
mod handlers;
mod logs;
mod node_logs;
mod route;
mod stats;
mod stream;
mod tls;

pub use auth::{AccessTtl, AuthConfig};
pub use certificate::{CertificateError, serving_certificate};
pub use stats::Statistics;
pub use tls::TlsSetupError;

use crate::config::Config;
use crate::cri::Cri;
use crate::pods::directory::PodDirectory;
use crate::probes::Prober;
use crate::shutdown::Shutdown;
use attributes::Attributes;
use auth::{Auth, Refusal};
use body::{Body, text};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use orlop_api::Client;
use orlop_api::credentials::CertificateSlot;
use route::Route;
use rustls_pki_types::CertificateDer;
use stats::Door;
use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tls::TlsSetup;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// A client that begins a handshake and does not go on is not waited for longer.
const HANDSHAKE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error(
        "cannot listen on {address} for {purpose}: {cause}; is a kubelet or another orlop running on this node?"
    )]
    Listen { address: SocketAddr, purpose: &'static str, cause: io::Error },
    #[error("{key}: {value:?} is no address to listen on")]
    Address { key: &'static str, value: String },
    #[error(transparent)]
    Tls(#[from] TlsSetupError),
}

/// What the server answers from.
#[derive(Debug)]
pub struct Parts {
    pub config: Arc<Config>,
    pub cri: Cri,
    pub api: Option<Client>,
    pub pods: PodDirectory,
    pub certificate: Arc<CertificateSlot>,
    pub prober: Prober,
    pub statistics: Statistics,
}

/// The listeners, bound: a port that is taken is found out before the node says it is ready.
#[derive(Debug)]
pub struct Server {
    parts: Arc<Parts>,
    auth: Auth,
    tls: TlsSetup,
    main: Option<TcpListener>,
    health: Option<TcpListener>,
    read_only: Option<TcpListener>,
}

impl Server {
    pub async fn bind(parts: Parts) -> Result<Self, ServerError> {
        let raw = &parts.config.raw;
        let address = |key: &'static str, value: &str| {
            value.parse::<IpAddr>().map_err(|_| ServerError::Address { key, value: value.to_owned() })
        };
        let main = if raw.enable_server {
            Some(listen(address("address", &raw.address)?, raw.port, "the kubelet API").await?)
        } else {
            None
        };
        let health = listen_if_set(
            address("healthzBindAddress", &raw.healthz_bind_address)?,
            raw.healthz_port,
            "health",
        )
        .await?;
        let read_only =
            listen_if_set(address("address", &raw.address)?, raw.read_only_port, "the read-only API").await?;
        let authority = Some(&raw.authentication.x509.client_ca_file).filter(|path| !path.is_empty());
        let tls = TlsSetup::new(parts.certificate.clone(), authority.map(PathBuf::from))?;
        let webhook = &raw.authentication.webhook;
        let access = &raw.authorization.webhook;
        let config = AuthConfig {
            anonymous: raw.authentication.anonymous.enabled,
            token_ttl: webhook.enabled.then_some(webhook.cache_ttl.0),
            access: (raw.authorization.mode != "AlwaysAllow").then_some(AccessTtl {
                allowed: access.cache_authorized_ttl.0,
                denied: access.cache_unauthorized_ttl.0,
            }),
        };
        let auth = Auth::new(config, parts.api.clone(), parts.config.node_name.clone());
        Ok(Self { parts: Arc::new(parts), auth, tls, main, health, read_only })
    }

    /// Serves until told to stop. Streams that are open then are broken off.
    pub async fn run(self, shutdown: Shutdown) {
        let mut listeners = JoinSet::new();
        let (auth, tls) = (Arc::new(self.auth), Arc::new(self.tls));
        if let Some(listener) = self.main {
            let parts = self.parts.clone();
            listeners.spawn(accept(listener, move |stream| {
                serve_tls(stream, tls.clone(), parts.clone(), auth.clone())
            }));
        }
        for (listener, only_health) in [(self.health, true), (self.read_only, false)] {
            let Some(listener) = listener else { continue };
            let parts = self.parts.clone();
            listeners.spawn(accept(listener, move |stream| serve_plain(stream, parts.clone(), only_health)));
        }
        shutdown.triggered().await;
    }
}

async fn listen_if_set(
    address: IpAddr,
    port: i32,
    purpose: &'static str,
) -> Result<Option<TcpListener>, ServerError> {
    if port == 0 { Ok(None) } else { listen(address, port, purpose).await.map(Some) }
}

async fn listen(address: IpAddr, port: i32, purpose: &'static str) -> Result<TcpListener, ServerError> {
    let port =
        u16::try_from(port).map_err(|_| ServerError::Address { key: "port", value: port.to_string() })?;
    let address = SocketAddr::new(address, port);
    TcpListener::bind(address).await.map_err(|cause| ServerError::Listen { address, purpose, cause })
}

/// Accepts for ever; the connections end with this task.
async fn accept<F: Future<Output = ()> + Send + 'static>(
    listener: TcpListener,
    serve: impl Fn(TcpStream) -> F,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    // Small interactive pieces should not wait for each other; a refusal costs only speed.
                    let _slow = stream.set_nodelay(true);
                    connections.spawn(serve(stream));
                }
                Err(error) => {
                    tracing::warn!(%error, "the kubelet API cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_ended) = connections.join_next() => {}
        }
    }
}

async fn serve_tls(stream: TcpStream, tls: Arc<TlsSetup>, parts: Arc<Parts>, auth: Arc<Auth>) {
    let handshake = TlsAcceptor::from(tls.config()).accept(stream);
    let stream = match tokio::time::timeout(HANDSHAKE, handshake).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "a TLS handshake failed"),
        Err(_) => return,
    };
    let peer: Option<CertificateDer<'static>> = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .map(|first| first.clone().into_owned());
    let peer = Arc::new(peer);
    let service = service_fn(move |request: Request<Incoming>| {
        let (parts, auth, peer) = (parts.clone(), auth.clone(), peer.clone());
        async move { Ok::<_, Infallible>(guarded(&parts, &auth, peer.as_ref().as_ref(), request).await) }
    });
    let server = auto::Builder::new(TokioExecutor::new());
    let served = server.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
    if let Err(error) = served {
        tracing::debug!(error, "a connection to the kubelet API broke");
    }
}

/// Identifies, judges, answers.
async fn guarded(
    parts: &Parts,
    auth: &Auth,
    certificate: Option<&CertificateDer<'_>>,
    request: Request<Incoming>,
) -> Response<Body> {
    let _counted = parts.statistics.requests.begin(Door::Main, request.method(), request.uri().path());
    let attributes = Attributes::of(request.method(), request.uri().path());
    match auth.check(certificate, request.headers(), &attributes).await {
        Ok(()) => {}
        Err(Refusal::Unknown) => return text(StatusCode::UNAUTHORIZED, "Unauthorized"),
        Err(Refusal::Forbidden(reason)) => return text(StatusCode::FORBIDDEN, reason),
        Err(Refusal::CannotTell(error)) => {
            tracing::warn!(%error, "the API server cannot be asked about a caller");
            return text(StatusCode::INTERNAL_SERVER_ERROR, format!("Authorization error: {error}"));
        }
    }
    let route = Route::of(request.uri().path());
    if route.is_debugging() && !parts.config.raw.enable_debugging_handlers {
        return text(StatusCode::METHOD_NOT_ALLOWED, "Debug endpoints are disabled.");
    }
    handlers::answer(parts, route, request).await
}

/// Serves without asking who it is: health, or on the read-only port what gives nothing away that matters.
async fn serve_plain(stream: TcpStream, parts: Arc<Parts>, only_health: bool) {
    let service = service_fn(move |request: Request<Incoming>| {
        let parts = parts.clone();
        async move {
            let path = request.uri().path();
            let route = Route::of(path);
            let requests = &parts.statistics.requests;
            let _counted = (!only_health).then(|| requests.begin(Door::ReadOnly, request.method(), path));
            let open = if only_health { route == Route::Healthz } else { route.is_read_only() };
            let reads = matches!(*request.method(), Method::GET | Method::HEAD);
            Ok::<_, Infallible>(match (open, reads) {
                (true, true) => handlers::answer(&parts, route, request).await,
                (true, false) => text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed"),
                (false, _) => text(StatusCode::NOT_FOUND, "404 page not found"),
            })
        }
    });
    let served =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection broke");
    }
}
