//! The node manager between a small API server and a small runtime: registration, status, lease, and what a restart of the
//! agent must not change.

#![allow(clippy::unwrap_used)]

use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch, post};
use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use orlop_api::events::EventRecorder;
use orlop_api::{Client, ServerConfig};
use orlop_kubelet::config::{Config, GoDuration, KubeletConfiguration, KubeletFlags, resolve};
use orlop_kubelet::cri::Cri;
use orlop_kubelet::node::{NodeHandle, NodeManager};
use orlop_kubelet::shutdown::Shutdown;
use orlop_proto::cri;
use prost::Message;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tonic::body::Body;

/// What the API server holds, and every Ready status it was ever told.
#[derive(Default)]
struct Cluster {
    node: Option<Value>,
    lease: Option<Value>,
    readiness: Vec<String>,
}

struct Json(Value);

impl IntoResponse for Json {
    fn into_response(self) -> Response {
        self.0.to_string().into_response()
    }
}

type Shared = Arc<Mutex<Cluster>>;

fn ready(node: &Value) -> Option<String> {
    let conditions = node["status"]["conditions"].as_array()?;
    Some(conditions.iter().find(|c| c["type"] == "Ready")?["status"].as_str()?.to_owned())
}

/// As the server merges: objects by key, conditions by type, everything else replaced.
fn merge(old: &mut Value, new: Value, key: &str) {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            for (key, value) in new {
                merge(old.entry(&key).or_insert(Value::Null), value, &key);
            }
        }
        (Value::Array(old), Value::Array(new)) if key == "conditions" => {
            for condition in new {
                old.retain(|c| c["type"] != condition["type"]);
                old.push(condition);
            }
        }
        (old, new) => *old = new,
    }
}

async fn create_node(State(cluster): State<Shared>, body: Bytes) -> Response {
    let mut node: Value = serde_json::from_slice(&body).unwrap();
    let mut cluster = cluster.lock().unwrap();
    if cluster.node.is_some() {
        let status = json!({"code": 409, "reason": "AlreadyExists", "message": "there already"});
        return (StatusCode::CONFLICT, Json(status)).into_response();
    }
    node["metadata"]["uid"] = "uid-1".into();
    node["spec"]["podCIDR"] = "10.244.3.0/24".into();
    cluster.readiness.extend(ready(&node));
    cluster.node = Some(node.clone());
    (StatusCode::CREATED, Json(node)).into_response()
}

async fn patch_node(State(cluster): State<Shared>, body: Bytes) -> Json {
    let mut cluster = cluster.lock().unwrap();
    let mut node = cluster.node.clone().unwrap();
    merge(&mut node, serde_json::from_slice(&body).unwrap(), "");
    cluster.readiness.extend(ready(&node));
    cluster.node = Some(node.clone());
    Json(node)
}

async fn nodes(State(cluster): State<Shared>, Query(query): Query<HashMap<String, String>>) -> Response {
    if query.contains_key("watch") {
        let silence = futures_util::stream::pending::<Result<Vec<u8>, Infallible>>();
        return axum::body::Body::from_stream(silence).into_response();
    }
    let items: Vec<_> = cluster.lock().unwrap().node.clone().into_iter().collect();
    Json(json!({"metadata": {"resourceVersion": "1"}, "items": items})).into_response()
}

async fn node(State(cluster): State<Shared>) -> Json {
    Json(cluster.lock().unwrap().node.clone().unwrap())
}

async fn lease(State(cluster): State<Shared>) -> Response {
    match cluster.lock().unwrap().lease.clone() {
        Some(lease) => Json(lease).into_response(),
        None => (StatusCode::NOT_FOUND, Json(json!({"code": 404, "reason": "NotFound"}))).into_response(),
    }
}

async fn put_lease(State(cluster): State<Shared>, body: Bytes) -> Json {
    let lease: Value = serde_json::from_slice(&body).unwrap();
    cluster.lock().unwrap().lease = Some(lease.clone());
    Json(lease)
}

async fn serve(cluster: &Shared) -> Client {
    const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
    let router = Router::new()
        .route("/api/v1/nodes", post(create_node).get(nodes))
        .route("/api/v1/nodes/node-a", get(node).patch(patch_node))
        .route("/api/v1/nodes/node-a/status", patch(patch_node))
        .route(LEASES, post(put_lease))
        .route(&format!("{LEASES}/node-a"), get(lease).put(put_lease))
        .with_state(Arc::clone(cluster));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    let text = format!(
        "clusters: [{{name: c, cluster: {{server: \"http://{address}\"}}}}]\n\
         contexts: [{{name: x, context: {{cluster: c}}}}]\ncurrent-context: x\n"
    );
    Client::new(ServerConfig::parse(std::path::Path::new("/x"), &text).unwrap()).unwrap()
}

/// A runtime whose network can be switched off.
#[derive(Clone, Default)]
struct Runtime {
    no_network: Arc<AtomicBool>,
    pod_cidr: Arc<Mutex<String>>,
}

fn reply(message: &impl Message) -> http::Response<Body> {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.encoded_len()).unwrap());
    message.encode(&mut frame).unwrap();
    let mut trailers = http::HeaderMap::new();
    trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
    let body = Full::new(frame.freeze()).with_trailers(async { Some(Ok(trailers)) });
    http::Response::builder().header("content-type", "application/grpc").body(Body::new(body)).unwrap()
}

impl Runtime {
    fn cri(&self) -> Cri {
        let runtime = self.clone();
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let runtime = runtime.clone();
            async move { Ok::<_, Infallible>(runtime.answer(request).await) }
        });
        Cri::new(service.clone(), service)
    }

    async fn answer(&self, request: http::Request<Body>) -> http::Response<Body> {
        let condition = |kind: &str, status| cri::RuntimeCondition {
            r#type: kind.to_owned(),
            status,
            ..Default::default()
        };
        match request.uri().path() {
            "/runtime.v1.RuntimeService/Status" => {
                let network = !self.no_network.load(Ordering::SeqCst);
                let conditions = vec![condition("RuntimeReady", true), condition("NetworkReady", network)];
                let status = Some(cri::RuntimeStatus { conditions });
                reply(&cri::StatusResponse { status, ..Default::default() })
            }
            "/runtime.v1.RuntimeService/Version" => reply(&cri::VersionResponse {
                runtime_name: "fake".to_owned(),
                runtime_version: "1".to_owned(),
                ..Default::default()
            }),
            "/runtime.v1.RuntimeService/UpdateRuntimeConfig" => {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let told = cri::UpdateRuntimeConfigRequest::decode(&body[5..]).unwrap();
                let network = told.runtime_config.unwrap().network_config.unwrap();
                *self.pod_cidr.lock().unwrap() = network.pod_cidr;
                reply(&cri::UpdateRuntimeConfigResponse::default())
            }
            "/runtime.v1.ImageService/ListImages" => reply(&cri::ListImagesResponse::default()),
            other => panic!("unexpected call of {other}"),
        }
    }
}

fn config() -> Arc<Config> {
    let flags = KubeletFlags {
        hostname_override: Some("node-a".to_owned()),
        node_ip: Some("10.0.0.7".to_owned()),
        ..KubeletFlags::default()
    };
    let file = KubeletConfiguration {
        node_status_update_frequency: GoDuration::from_millis(200),
        ..KubeletConfiguration::default()
    };
    Arc::new(resolve(&flags, file).unwrap())
}

/// One life of the agent.
struct Agent {
    shutdown: Shutdown,
    handle: NodeHandle,
    task: tokio::task::JoinHandle<()>,
}

impl Agent {
    fn start(client: &Client, runtime: &Runtime) -> Self {
        let (manager, _node) =
            NodeManager::new(config(), Some(client.clone()), runtime.cri(), EventRecorder::silent());
        let (shutdown, handle) = (Shutdown::new(), manager.handle());
        let task = tokio::spawn(manager.run(shutdown.clone()));
        Self { shutdown, handle, task }
    }

    async fn stop(self) {
        self.shutdown.trigger();
        self.task.await.unwrap();
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not within 10 s: {what}");
}

fn is(cluster: &Shared, wanted: &str) -> bool {
    cluster.lock().unwrap().node.as_ref().and_then(ready).as_deref() == Some(wanted)
}

#[tokio::test]
async fn a_node_registers_reports_and_renews_and_passes_on_its_pod_addresses() {
    let (cluster, runtime) = (Shared::default(), Runtime::default());
    let client = serve(&cluster).await;
    let agent = Agent::start(&client, &runtime);
    until("the node is ready", || is(&cluster, "True")).await;
    until("the lease is there", || cluster.lock().unwrap().lease.is_some()).await;
    until("the runtime knows the addresses", || *runtime.pod_cidr.lock().unwrap() == "10.244.3.0/24").await;
    {
        let cluster = cluster.lock().unwrap();
        let (node, lease) = (cluster.node.as_ref().unwrap(), cluster.lease.as_ref().unwrap());
        assert_eq!(node["metadata"]["labels"]["kubernetes.io/hostname"], "node-a");
        assert_eq!(node["status"]["addresses"][0], json!({"type": "InternalIP", "address": "10.0.0.7"}));
        assert_eq!(node["status"]["nodeInfo"]["containerRuntimeVersion"], "fake://1");
        assert_eq!(lease["spec"]["holderIdentity"], "node-a");
        assert_eq!(lease["spec"]["leaseDurationSeconds"], 40);
        assert_eq!(lease["metadata"]["ownerReferences"][0]["uid"], "uid-1");
    }
    agent.stop().await;
}

#[tokio::test]
async fn a_restart_of_the_agent_does_not_flip_readiness() {
    let (cluster, runtime) = (Shared::default(), Runtime::default());
    let client = serve(&cluster).await;
    let first = Agent::start(&client, &runtime);
    until("the node is ready", || is(&cluster, "True")).await;
    first.stop().await;
    // The network of the new agent needs a moment.
    runtime.no_network.store(true, Ordering::SeqCst);
    let second = Agent::start(&client, &runtime);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    runtime.no_network.store(false, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let told = cluster.lock().unwrap().readiness.clone();
    assert!(!told.is_empty() && told.iter().all(|status| status == "True"), "{told:?}");
    second.stop().await;
}

#[tokio::test]
async fn a_fresh_node_without_a_network_is_not_ready_until_it_has_one() {
    let (cluster, runtime) = (Shared::default(), Runtime::default());
    runtime.no_network.store(true, Ordering::SeqCst);
    let client = serve(&cluster).await;
    let agent = Agent::start(&client, &runtime);
    until("the node is not ready", || is(&cluster, "False")).await;
    runtime.no_network.store(false, Ordering::SeqCst);
    until("the node is ready", || is(&cluster, "True")).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_removed_label_comes_back() {
    let (cluster, runtime) = (Shared::default(), Runtime::default());
    runtime.no_network.store(true, Ordering::SeqCst);
    let client = serve(&cluster).await;
    let agent = Agent::start(&client, &runtime);
    until("the node is there", || is(&cluster, "False")).await;
    {
        let mut cluster = cluster.lock().unwrap();
        let labels = &mut cluster.node.as_mut().unwrap()["metadata"]["labels"];
        labels.as_object_mut().unwrap().remove("kubernetes.io/os");
    }
    // The server's next answer shows the manager that the label is gone.
    runtime.no_network.store(false, Ordering::SeqCst);
    agent.handle.refresh();
    let label = || {
        let cluster = cluster.lock().unwrap();
        cluster.node.as_ref().unwrap()["metadata"]["labels"]["kubernetes.io/os"].clone()
    };
    until("the label is back", || label() == "linux").await;
    agent.stop().await;
}
