//! An API server of a few lines: lists and watches the pods it is given, notes what it is told, and can be away.

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch};
use orlop_api::{Client, ServerConfig};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::Duration;

type Pods = Arc<Mutex<BTreeMap<String, Value>>>;

/// One of its lives. What was watched in an earlier one is too old to go on from.
#[derive(Clone)]
struct Life {
    number: usize,
    pods: Pods,
}

/// What it holds outlives its being away.
pub(super) struct Api {
    pods: Pods,
    address: SocketAddr,
    lives: usize,
    running: Option<tokio::runtime::Runtime>,
}

async fn list(State(life): State<Life>, Query(query): Query<HashMap<String, String>>) -> Response {
    let version = life.number.to_string();
    if query.contains_key("watch") {
        if query.get("resourceVersion") != Some(&version) {
            let status = json!({"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"});
            return (StatusCode::GONE, status.to_string()).into_response();
        }
        let silence = futures_util::stream::pending::<Result<Vec<u8>, Infallible>>();
        return axum::body::Body::from_stream(silence).into_response();
    }
    let items: Vec<Value> = life.pods.lock().unwrap().values().cloned().collect();
    json!({"metadata": {"resourceVersion": version}, "items": items}).to_string().into_response()
}

async fn told(State(life): State<Life>, Path(name): Path<String>, body: Bytes) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap();
    let mut pods = life.pods.lock().unwrap();
    match pods.get_mut(&name) {
        Some(pod) => {
            pod["status"] = body["status"].clone();
            pod.to_string().into_response()
        }
        None => {
            let status = json!({"code": 404, "reason": "NotFound", "message": "no such pod"});
            (StatusCode::NOT_FOUND, status.to_string()).into_response()
        }
    }
}

impl Api {
    pub(super) fn new() -> Self {
        // The port stays ours while the server is away, because nobody else knows of it.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut api = Self { pods: Pods::default(), address, lives: 0, running: None };
        api.come_back();
        api
    }

    pub(super) fn client(&self) -> Client {
        let text = format!(
            "clusters: [{{name: c, cluster: {{server: \"http://{}\"}}}}]\n\
             contexts: [{{name: x, context: {{cluster: c}}}}]\ncurrent-context: x\n",
            self.address
        );
        Client::new(ServerConfig::parse(std::path::Path::new("/x"), &text).unwrap()).unwrap()
    }

    pub(super) fn put(&self, name: &str, uid: &str, spec: Value) {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "spec": spec,
            "metadata": {"name": name, "namespace": "default", "uid": uid},
        });
        self.pods.lock().unwrap().insert(name.to_owned(), pod);
    }

    pub(super) fn take(&self, name: &str) {
        self.pods.lock().unwrap().remove(name);
    }

    pub(super) fn phase(&self, name: &str) -> String {
        let pods = self.pods.lock().unwrap();
        pods.get(name).and_then(|pod| pod["status"]["phase"].as_str()).unwrap_or_default().to_owned()
    }

    pub(super) fn go_away(&mut self) {
        self.running.take().expect("it is there").shutdown_timeout(Duration::from_secs(5));
    }

    pub(super) fn come_back(&mut self) {
        self.lives += 1;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let router = Router::new()
            .route("/api/v1/pods", get(list))
            .route("/api/v1/namespaces/default/pods/{name}/status", patch(told))
            .with_state(Life { number: self.lives, pods: Arc::clone(&self.pods) });
        let address = self.address;
        let listener = runtime.block_on(tokio::net::TcpListener::bind(address)).unwrap();
        runtime.spawn(async move { axum::serve(listener, router).await.unwrap() });
        self.running = Some(runtime);
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.shutdown_background();
        }
    }
}
