//! A small API server: answers by a closure, over plain HTTP/1.1 or TLS with HTTP/2, and can be taken away and brought back.

// Each test file uses its part; a failure here may panic like one in a test.
#![allow(dead_code, unreachable_pub, missing_debug_implementations, clippy::unwrap_used)]

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::channel::{Channel, Sender};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use orlop_api::{Client, ServerConfig};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

pub type Body = BoxBody<Bytes, Infallible>;

/// A request as the closure sees it.
#[derive(Debug, Clone)]
pub struct Asked {
    pub method: String,
    /// With the query.
    pub path: String,
    pub token: Option<String>,
    pub content_type: Option<String>,
    pub body: String,
    /// The client certificate's DER.
    pub certificate: Option<Vec<u8>>,
    /// HTTP/2?
    pub h2: bool,
}

type Handler = Arc<dyn Fn(Asked) -> Response<Body> + Send + Sync>;

pub fn json(status: u16, body: serde_json::Value) -> Response<Body> {
    text(status, body.to_string())
}

pub fn text(status: u16, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::new(body.into()).boxed());
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

pub fn status(code: u16, reason: &str, message: &str) -> Response<Body> {
    json(
        code,
        serde_json::json!({"kind": "Status", "code": code, "reason": reason, "message": message, "status": "Failure"}),
    )
}

/// A response whose body is written while the test goes on.
pub fn stream() -> (Sender<Bytes>, Response<Body>) {
    let (sender, body) = Channel::<Bytes>::new(16);
    (sender, Response::new(body.boxed()))
}

pub struct Authority {
    pub pem: String,
    key: KeyPair,
    params: CertificateParams,
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, key, params }
    }

    pub fn issuer(&self) -> Issuer<'_, &KeyPair> {
        Issuer::from_params(&self.params, &self.key)
    }

    /// A certificate for these names, and its key.
    pub fn issue(&self, names: &[&str]) -> (String, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer()).unwrap();
        (certificate.pem(), key)
    }
}

#[derive(Clone)]
pub struct FakeServer {
    pub address: SocketAddr,
    pub connections: Arc<AtomicUsize>,
    pub asked: Arc<Mutex<Vec<Asked>>>,
    handler: Handler,
    tls: Option<TlsAcceptor>,
    running: Arc<Mutex<CancellationToken>>,
}

impl FakeServer {
    pub async fn plain(handler: impl Fn(Asked) -> Response<Body> + Send + Sync + 'static) -> Self {
        Self::start(Arc::new(handler), None).await
    }

    /// Serves a certificate for `names`; takes client certificates of the same authority.
    pub async fn tls(
        authority: &Authority,
        names: &[&str],
        handler: impl Fn(Asked) -> Response<Body> + Send + Sync + 'static,
    ) -> Self {
        let (pem, key) = authority.issue(names);
        let chain = orlop_api::tls::certificates(pem.as_bytes()).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(orlop_api::tls::certificates(authority.pem.as_bytes()).unwrap().remove(0)).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()
            .unwrap();
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Self::start(Arc::new(handler), Some(TlsAcceptor::from(Arc::new(config)))).await
    }

    async fn start(handler: Handler, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            connections: Arc::default(),
            asked: Arc::default(),
            handler,
            tls,
            running: Arc::default(),
        };
        server.serve(listener);
        server
    }

    /// Closes the port and every connection.
    pub fn stop(&self) {
        self.running.lock().unwrap().cancel();
    }

    /// Opens the same port again.
    pub async fn restart(&self) {
        *self.running.lock().unwrap() = CancellationToken::new();
        let listener = loop {
            match TcpListener::bind(self.address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
            }
        };
        self.serve(listener);
    }

    fn serve(&self, listener: TcpListener) {
        let (server, running) = (self.clone(), self.running.lock().unwrap().clone());
        let stop = running.clone();
        tokio::spawn(running.run_until_cancelled_owned(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let server = server.clone();
                tokio::spawn(stop.clone().run_until_cancelled_owned(async move {
                    server.connections.fetch_add(1, Ordering::SeqCst);
                    match &server.tls {
                        None => server.connection(TokioIo::new(tcp), None).await,
                        Some(tls) => {
                            let Ok(stream) = tls.accept(tcp).await else { return };
                            let certificate = stream
                                .get_ref()
                                .1
                                .peer_certificates()
                                .and_then(<[CertificateDer<'_>]>::first)
                                .map(|certificate| certificate.to_vec());
                            server.connection(TokioIo::new(stream), certificate).await;
                        }
                    }
                }));
            }
        }));
    }

    async fn connection<I>(&self, io: I, certificate: Option<Vec<u8>>)
    where
        I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    {
        let service = hyper::service::service_fn(|request: Request<Incoming>| {
            let (server, certificate) = (self.clone(), certificate.clone());
            async move {
                let h2 = request.version() == http::Version::HTTP_2;
                let (parts, body) = request.into_parts();
                let header =
                    |name: &str| parts.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
                let asked = Asked {
                    method: parts.method.to_string(),
                    path: parts.uri.path_and_query().unwrap().to_string(),
                    token: header("authorization"),
                    content_type: header("content-type"),
                    body: String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap(),
                    certificate,
                    h2,
                };
                server.asked.lock().unwrap().push(asked.clone());
                Ok::<_, Infallible>((server.handler)(asked))
            }
        });
        let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(io, service).await;
    }

    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// The paths asked for so far.
    pub fn paths(&self) -> Vec<String> {
        self.asked.lock().unwrap().iter().map(|asked| asked.path.clone()).collect()
    }

    /// A client without credentials.
    pub fn client(&self) -> Client {
        client(&kubeconfig(&self.url(), "insecure-skip-tls-verify: true", "{}"))
    }
}

pub fn kubeconfig(server: &str, cluster: &str, user: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\nclusters:\n- name: c\n  cluster:\n    server: {server}\n    {cluster}\n\
         users:\n- name: u\n  user: {user}\ncontexts:\n- name: x\n  context: {{cluster: c, user: u}}\ncurrent-context: x\n"
    )
}

pub fn client(kubeconfig: &str) -> Client {
    Client::new(ServerConfig::parse(Path::new("/tmp/none/config"), kubeconfig).unwrap()).unwrap()
}
