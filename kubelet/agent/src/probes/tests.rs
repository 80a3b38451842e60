//! Probes against servers and a runtime of a few lines, in real but short time.

use super::*;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use orlop_proto::cri::{ExecSyncRequest, ExecSyncResponse};
use prost::Message;
use serde_json::json;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use tokio::net::TcpListener;

/// What a fake command does: exit code and output, or a gRPC status code.
pub(crate) type Command = Arc<dyn Fn(&[String]) -> Result<(i32, &'static str), u32> + Send + Sync>;

/// A runtime that can only run commands.
pub(crate) fn runtime(command: Command) -> Cri {
    let service = tower::service_fn(move |request: Request<tonic::body::Body>| {
        let command = Arc::clone(&command);
        async move {
            assert_eq!(request.uri().path(), "/runtime.v1.RuntimeService/ExecSync");
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let request = ExecSyncRequest::decode(&body[5..]).unwrap();
            let (frames, status) = match command(&request.cmd) {
                Ok((exit_code, output)) => {
                    let response = ExecSyncResponse {
                        stdout: output.as_bytes().to_vec(),
                        exit_code,
                        ..Default::default()
                    };
                    (vec![Ok::<_, Infallible>(Frame::data(framed(&response)))], 0)
                }
                Err(code) => (Vec::new(), code),
            };
            Ok::<_, Infallible>(grpc_response(frames, status))
        }
    });
    Cri::new(service.clone(), service)
}

fn framed(message: &impl Message) -> bytes::Bytes {
    let mut out = vec![0];
    out.extend_from_slice(&u32::try_from(message.encoded_len()).unwrap().to_be_bytes());
    message.encode(&mut out).unwrap();
    out.into()
}

fn grpc_response(
    mut frames: Vec<Result<Frame<bytes::Bytes>, Infallible>>,
    status: u32,
) -> Response<tonic::body::Body> {
    let mut trailers = http::HeaderMap::new();
    trailers.insert("grpc-status", status.into());
    frames.push(Ok(Frame::trailers(trailers)));
    let body = tonic::body::Body::new(StreamBody::new(tokio_stream::iter(frames)));
    Response::builder().header("content-type", "application/grpc").body(body).unwrap()
}

/// Answers each request with what `answer` says.
pub(crate) async fn http_server(
    answer: impl Fn(&Request<Incoming>) -> Response<Full<bytes::Bytes>> + Clone + Send + Sync + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let answer = answer.clone();
            let service = hyper::service::service_fn(move |request| {
                let response = answer(&request);
                async move { Ok::<_, Infallible>(response) }
            });
            tokio::spawn(
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
            );
        }
    });
    address
}

fn response(status: u16) -> Response<Full<bytes::Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}

fn redirect(location: &str) -> Response<Full<bytes::Bytes>> {
    let mut redirect = response(302);
    redirect.headers_mut().insert("location", location.parse().unwrap());
    redirect
}

struct Setup {
    prober: Prober,
    events: mpsc::UnboundedReceiver<ProbeEvent>,
}

impl Setup {
    fn new(command: Command) -> Self {
        let (sender, events) = mpsc::unbounded_channel();
        Self { prober: Prober::new(runtime(command), sender), events }
    }

    fn start(&self, probes: serde_json::Value, seed: Seed) {
        let mut container = json!({"name": "c"});
        container.as_object_mut().unwrap().extend(probes.as_object().unwrap().clone());
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u"},
            "spec": {"containers": [container]}}))
            .unwrap();
        self.prober.start(&pod, "c", "id", Some("127.0.0.1".parse().unwrap()), seed);
    }

    async fn next(&mut self) -> ProbeEvent {
        tokio::time::timeout(Duration::from_secs(20), self.events.recv())
            .await
            .expect("no event came")
            .unwrap()
    }

    async fn quiet(&mut self, time: Duration) -> bool {
        tokio::time::timeout(time, self.events.recv()).await.is_err()
    }
}

fn nothing() -> Command {
    Arc::new(|_| panic!("no command is expected"))
}

#[tokio::test]
async fn http_answers_are_judged_by_their_status() {
    let status = Arc::new(AtomicU16::new(200));
    let told = Arc::clone(&status);
    let address = http_server(move |request| {
        assert_eq!(request.headers()["user-agent"], "kube-probe/1.36");
        assert_eq!(request.headers()["host"], "example.org");
        assert_eq!(request.headers()["accept"], "*/*");
        response(told.load(Ordering::SeqCst))
    })
    .await;
    let mut setup = Setup::new(nothing());
    let probe = json!({"readinessProbe": {"periodSeconds": 1, "failureThreshold": 1, "httpGet": {
        "port": address.port(), "path": "/ready", "httpHeaders": [{"name": "Host", "value": "example.org"}]}}});
    setup.start(probe.clone(), Seed::default());
    setup.start(probe, Seed::default());
    let event = setup.next().await;
    assert_eq!((event.kind, event.transition), (ProbeKind::Readiness, Some(Transition::Ready)));
    status.store(503, Ordering::SeqCst);
    let event = setup.next().await;
    assert_eq!(event.transition, Some(Transition::NotReady));
    assert_eq!(event.message().unwrap(), "Readiness probe failed: HTTP probe failed with statuscode: 503");
    setup.prober.stop("id");
    setup.prober.stop("id");
    while setup.events.try_recv().is_ok() {}
    status.store(200, Ordering::SeqCst);
    assert!(setup.quiet(Duration::from_millis(1500)).await, "a stopped probe spoke");
}

#[tokio::test]
async fn redirects_are_followed_at_the_host_and_left_elsewhere() {
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&requests);
    let address = http_server(move |request| {
        counted.fetch_add(1, Ordering::SeqCst);
        let location = match request.uri().path() {
            "/local" => "ok",
            "/absolute" => {
                return redirect(&format!("http://{}/ok", request.headers()["host"].to_str().unwrap()));
            }
            "/away" => "http://192.0.2.1/",
            "/loop" => "/loop",
            "/ok" => return response(204),
            _ => return response(404),
        };
        redirect(location)
    })
    .await;
    let probe = |path: &str| HttpTarget {
        secure: false,
        address: target::Address { host: "127.0.0.1".into(), port: address.port() },
        path: path.into(),
        headers: Vec::new(),
    };
    for path in ["/local", "/absolute"] {
        let local = http_client::get(&probe(path), "a").await.unwrap();
        assert_eq!((local.status.as_u16(), local.left_redirect), (204, false), "{path}");
    }
    let away = http_client::get(&probe("/away"), "a").await.unwrap();
    assert_eq!((away.status.as_u16(), away.left_redirect), (302, true));
    requests.store(0, Ordering::SeqCst);
    assert!(matches!(http_client::get(&probe("/loop"), "a").await, Err(http_client::HttpError::Redirects)));
    assert_eq!(requests.load(Ordering::SeqCst), 11);
    let secure = HttpTarget { secure: true, ..probe("/ok") };
    assert!(matches!(http_client::get(&secure, "a").await, Err(http_client::HttpError::NotTls)));
}

#[tokio::test]
async fn a_failing_startup_probe_kills_and_nothing_else_speaks_before() {
    let mut setup = Setup::new(Arc::new(|command| {
        assert_eq!(command[0], "startup", "a gated probe ran");
        Ok((1, "not yet"))
    }));
    let exec = |name: &str| {
        json!({"exec": {"command": [name]}, "periodSeconds": 1, "failureThreshold": 2,
        "terminationGracePeriodSeconds": 5})
    };
    setup.start(json!({"startupProbe": exec("startup"), "livenessProbe": exec("liveness")}), Seed::default());
    let first = setup.next().await;
    assert_eq!(
        (first.message().unwrap().as_str(), first.transition),
        ("Startup probe failed: not yet", None)
    );
    assert_eq!(setup.next().await.transition, Some(Transition::Kill { grace_seconds: Some(5) }));
    assert!(setup.quiet(Duration::from_millis(1200)).await);
}

#[tokio::test]
async fn success_of_startup_lets_the_others_begin() {
    let mut setup = Setup::new(Arc::new(|command| Ok((i32::from(command[0] == "liveness"), "dead"))));
    let exec = |name: &str| json!({"exec": {"command": [name]}, "periodSeconds": 1, "failureThreshold": 1});
    setup.start(
        json!({"startupProbe": exec("startup"), "livenessProbe": exec("liveness"), "readinessProbe": exec("ready")}),
        Seed::default(),
    );
    assert_eq!(setup.next().await.transition, Some(Transition::Started));
    let mut rest = [setup.next().await, setup.next().await].map(|event| (event.kind, event.transition));
    rest.sort_by_key(|(kind, _)| *kind);
    let kill = Transition::Kill { grace_seconds: None };
    assert_eq!(rest, [(ProbeKind::Liveness, Some(kill)), (ProbeKind::Readiness, Some(Transition::Ready))]);
}

#[tokio::test]
async fn what_was_ready_before_our_restart_stays_ready_until_it_fails() {
    let mut setup = Setup::new(Arc::new(|_| Ok((0, ""))));
    let seed = Seed { started: true, ready: true, running_for: Duration::from_secs(60) };
    let exec = json!({"exec": {"command": ["x"]}, "periodSeconds": 1});
    setup.start(json!({"startupProbe": exec, "readinessProbe": exec, "livenessProbe": exec}), seed);
    assert!(setup.quiet(Duration::from_millis(2500)).await, "nothing has changed");
}

#[tokio::test]
async fn errors_of_the_runtime_say_nothing_about_the_container() {
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let mut setup = Setup::new(Arc::new(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        Err(13)
    }));
    setup.start(
        json!({"livenessProbe": {"exec": {"command": ["x"]}, "periodSeconds": 60, "failureThreshold": 1}}),
        Seed::default(),
    );
    let event = setup.next().await;
    assert!(matches!(event.outcome, Outcome::Unknown { .. }) && event.transition.is_none());
    assert_eq!(calls.load(Ordering::SeqCst), 3, "an error is tried again at once");
    setup.prober.terminating("u");
    let timed_out = exec::run(&runtime(Arc::new(|_| Err(4))), "id", &[], Duration::from_secs(1)).await;
    assert_eq!(timed_out, Ended::TimedOut);
}

#[tokio::test]
async fn sockets_are_open_or_not() {
    let open = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = open.local_addr().unwrap().port();
    let probe =
        json!({"readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1, "failureThreshold": 1}});
    let mut setup = Setup::new(nothing());
    setup.start(probe, Seed::default());
    assert_eq!(setup.next().await.transition, Some(Transition::Ready));
    drop(open);
    let event = setup.next().await;
    assert_eq!(event.transition, Some(Transition::NotReady));
    let message = event.message().unwrap();
    assert!(
        message.starts_with(&format!("Readiness probe failed: dial tcp 127.0.0.1:{port}: connect: ")),
        "{message}"
    );
}

#[tokio::test]
async fn grpc_services_tell_their_health() {
    let health = Arc::new(AtomicU16::new(1));
    let told = Arc::clone(&health);
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let status = told.load(Ordering::SeqCst);
        async move {
            assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
            let body = request.into_body().collect().await.unwrap().to_bytes();
            // Field 1, a string: the service's name.
            assert_eq!(&body[5..], b"\x0a\x03web");
            // Field 1, a number: the status.
            let message = bytes::Bytes::from(vec![0, 0, 0, 0, 2, 8, u8::try_from(status).unwrap()]);
            Ok::<_, Infallible>(grpc_response(vec![Ok(Frame::data(message))], 0))
        }
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let builder = hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
            tokio::spawn(builder.serve_connection(TokioIo::new(stream), service.clone()));
        }
    });
    let mut setup = Setup::new(nothing());
    setup.start(
        json!({"readinessProbe": {"grpc": {"port": address.port(), "service": "web"}, "periodSeconds": 1,
            "failureThreshold": 1}}),
        Seed::default(),
    );
    assert_eq!(setup.next().await.transition, Some(Transition::Ready));
    health.store(2, Ordering::SeqCst);
    let message = setup.next().await.message().unwrap();
    assert_eq!(message, "Readiness probe failed: service unhealthy (responded with \"NOT_SERVING\")");
}

#[tokio::test]
async fn certificates_are_not_verified_and_silence_is_failure() {
    let key = rcgen::generate_simple_self_signed(vec!["somebody.else".to_owned()]).unwrap();
    let private = rustls::pki_types::PrivateKeyDer::try_from(key.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![key.cert.der().clone()], private)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(stream) = acceptor.accept(stream).await else { continue };
            let answer = |_: Request<Incoming>| async { Ok::<_, Infallible>(response(200)) };
            let service = hyper::service::service_fn(answer);
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        }
    });
    let mut setup = Setup::new(nothing());
    let get = json!({"port": port, "scheme": "HTTPS"});
    setup.start(json!({"readinessProbe": {"httpGet": get, "periodSeconds": 1}}), Seed::default());
    assert_eq!(setup.next().await.transition, Some(Transition::Ready));
    setup.prober.stop("id");

    // Accepts, by its backlog, and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    setup.start(
        json!({"livenessProbe": {"httpGet": {"port": port}, "periodSeconds": 1, "timeoutSeconds": 1, "failureThreshold": 1}}),
        Seed::default(),
    );
    let event = setup.next().await;
    assert_eq!(event.transition, Some(Transition::Kill { grace_seconds: None }));
    assert!(event.message().unwrap().contains("context deadline exceeded"), "{event:?}");
}
