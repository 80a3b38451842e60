//! What each path answers, once the caller may ask.

use super::body::{self, Body, json, text};
use super::logs::{self, LogOptions, OptionsError};
use super::route::{Route, Target};
use super::stats::Extent;
use super::{Parts, node_logs, stats, stream};
use crate::pods::directory::{ContainerHandle, LookupError, PodKey};
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};
use orlop_proto::cri::{
    AttachRequest, ContainerState, ContainerStatusRequest, ExecRequest, ExecSyncRequest,
    ListContainersRequest, PortForwardRequest,
};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tokio::sync::mpsc;

/// A refusal: the status and what to tell the caller.
pub(super) struct Refused(StatusCode, String);

type Answer = Result<Response<Body>, Refused>;

impl From<LookupError> for Refused {
    fn from(error: LookupError) -> Self {
        let status = match error {
            LookupError::NoPod { .. } | LookupError::NoContainer { .. } => StatusCode::NOT_FOUND,
            LookupError::NotStarted { .. } | LookupError::NoPrevious { .. } => StatusCode::BAD_REQUEST,
            LookupError::NoSandbox { .. } => StatusCode::CONFLICT,
        };
        Self(status, error.to_string())
    }
}

impl From<tonic::Status> for Refused {
    fn from(status: tonic::Status) -> Self {
        let code = if status.code() == tonic::Code::NotFound {
            StatusCode::NOT_FOUND
        } else {
            StatusCode::INTERNAL_SERVER_ERROR
        };
        Self(code, format!("the container runtime refused: {}", status.message()))
    }
}

impl From<OptionsError> for Refused {
    fn from(error: OptionsError) -> Self {
        let code = match error {
            OptionsError::Query { .. } => StatusCode::BAD_REQUEST,
            OptionsError::Invalid { .. } => StatusCode::UNPROCESSABLE_ENTITY,
        };
        Self(code, error.to_string())
    }
}

/// Answers a request that has been let through.
pub(super) async fn answer(parts: &Parts, route: Route, request: Request<Incoming>) -> Response<Body> {
    let query = query_pairs(request.uri().query().unwrap_or_default());
    let answered = match route {
        Route::Healthz => Ok(text(StatusCode::OK, "ok")),
        Route::Pods => Ok(json(&pod_list(parts))),
        Route::RunningPods => running_pods(parts).await,
        Route::Configz => Ok(json(&json!({"kubeletconfig": parts.config.raw}))),
        Route::Summary => stats::summary(parts, extent(&query)).await.map_err(Into::into),
        Route::Metrics => Ok(stats::metrics(parts)),
        Route::MetricsResource => stats::resource_metrics(parts).await.map_err(Into::into),
        Route::MetricsCadvisor => stats::container_metrics(parts).await.map_err(Into::into),
        Route::MetricsProbes => Ok(stats::probe_metrics(parts)),
        Route::ContainerLogs(target) => container_logs(parts, &target, &query).await,
        Route::Exec(target) => exec(parts, &target, &query, request).await,
        Route::Attach(target) => attach(parts, &target, &query, request).await,
        Route::PortForward(target) => port_forward(parts, &target, &query, request).await,
        Route::Run(target) => run(parts, &target, &query).await,
        Route::NodeLogs(path) => Ok(node_logs::answer(&path).await),
        Route::Unknown => Err(Refused(StatusCode::NOT_FOUND, "404 page not found".to_owned())),
    };
    answered.unwrap_or_else(|Refused(status, reason)| text(status, format!("{reason}\n")))
}

fn query_pairs(query: &str) -> Vec<(String, String)> {
    form_urlencoded::parse(query.as_bytes()).into_owned().collect()
}

fn values<'a>(query: &'a [(String, String)], key: &'a str) -> impl Iterator<Item = &'a str> {
    query.iter().filter(move |(name, _)| name == key).map(|(_, value)| value.as_str())
}

fn extent(query: &[(String, String)]) -> Extent {
    let only = values(query, "only_cpu_and_memory").any(|value| value == "true" || value == "1");
    if only { Extent::CpuAndMemory } else { Extent::Everything }
}

fn is_set(query: &[(String, String)], keys: [&str; 2]) -> bool {
    keys.iter().any(|key| values(query, key).any(|value| value == "1" || value == "true"))
}

fn pod_list(parts: &Parts) -> Value {
    let pods: Vec<_> = parts.pods.list();
    let pods: Vec<&Pod> = pods.iter().map(AsRef::as_ref).collect();
    json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": pods})
}

/// Pods as the runtime has them, whoever asked for them.
async fn running_pods(parts: &Parts) -> Answer {
    use crate::pods::labels::{CONTAINER_NAME, POD_NAME, POD_NAMESPACE, POD_UID};
    let list = parts.cri.runtime().list_containers(ListContainersRequest::default()).await?.into_inner();
    let mut pods: BTreeMap<String, (Value, Vec<Value>)> = BTreeMap::new();
    for container in list.containers {
        if container.state != ContainerState::ContainerRunning as i32 {
            continue;
        }
        let label = |key: &str| container.labels.get(key).cloned().unwrap_or_default();
        let metadata = json!({
            "name": label(POD_NAME), "namespace": label(POD_NAMESPACE), "uid": label(POD_UID), "creationTimestamp": null,
        });
        let image = container.image.as_ref().map(|image| image.image.clone()).unwrap_or_default();
        pods.entry(container.pod_sandbox_id.clone())
            .or_insert_with(|| (metadata, Vec::new()))
            .1
            .push(json!({"name": label(CONTAINER_NAME), "image": image, "resources": {}}));
    }
    let items: Vec<Value> = pods
        .into_values()
        .map(|(metadata, containers)| json!({"metadata": metadata, "spec": {"containers": containers}, "status": {}}))
        .collect();
    Ok(json(&json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})))
}

fn handle(parts: &Parts, target: &Target, previous: bool) -> Result<ContainerHandle, Refused> {
    let key = PodKey { namespace: &target.namespace, name: &target.pod, uid: target.uid.as_deref() };
    Ok(parts.pods.container(key, &target.container, previous)?)
}

async fn container_logs(parts: &Parts, target: &Target, query: &[(String, String)]) -> Answer {
    let pairs = query.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    let mut options = LogOptions::parse(pairs, Timestamp::now())?;
    let container = handle(parts, target, options.previous)?;
    // One that has ended writes nothing more.
    options.follow &= !options.previous;
    let (sender, receiver) = mpsc::channel(8);
    let (cri, id) = (parts.cri.clone(), container.container_id);
    let running = move || {
        let (mut runtime, container_id) = (cri.runtime(), id.clone());
        async move {
            let request = ContainerStatusRequest { container_id, verbose: false };
            let status =
                runtime.container_status(request).await.ok().and_then(|answer| answer.into_inner().status);
            status.is_some_and(|status| status.state == ContainerState::ContainerRunning as i32)
        }
    };
    tokio::spawn(logs::send(container.log_path, options, sender, running));
    let mut response = Response::new(body::stream(receiver));
    let plain = http::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(http::header::CONTENT_TYPE, plain);
    Ok(response)
}

async fn exec(
    parts: &Parts,
    target: &Target,
    query: &[(String, String)],
    request: Request<Incoming>,
) -> Answer {
    let container = handle(parts, target, false)?;
    let cmd: Vec<String> = values(query, "command").map(str::to_owned).collect();
    if cmd.is_empty() {
        return Err(Refused(StatusCode::BAD_REQUEST, "you must specify at least 1 command".to_owned()));
    }
    let tty = is_set(query, ["tty", "tty"]);
    let asked = ExecRequest {
        container_id: container.container_id,
        cmd,
        tty,
        stdin: is_set(query, ["input", "stdin"]),
        stdout: is_set(query, ["output", "stdout"]),
        stderr: is_set(query, ["error", "stderr"]) && !tty,
    };
    require_a_stream(asked.stdin, asked.stdout, asked.stderr)?;
    let url = parts.cri.runtime().exec(asked).await?.into_inner().url;
    Ok(stream::join(request, &url).await)
}

async fn attach(
    parts: &Parts,
    target: &Target,
    query: &[(String, String)],
    request: Request<Incoming>,
) -> Answer {
    let container = handle(parts, target, false)?;
    // Whether there is a terminal was decided when the container was made, not now.
    let tty = container_spec(&container.pod, &target.container).and_then(|c| c.tty).unwrap_or(false);
    let asked = AttachRequest {
        container_id: container.container_id,
        tty,
        stdin: is_set(query, ["input", "stdin"]),
        stdout: is_set(query, ["output", "stdout"]),
        stderr: is_set(query, ["error", "stderr"]) && !tty,
    };
    require_a_stream(asked.stdin, asked.stdout, asked.stderr)?;
    let url = parts.cri.runtime().attach(asked).await?.into_inner().url;
    Ok(stream::join(request, &url).await)
}

fn require_a_stream(stdin: bool, stdout: bool, stderr: bool) -> Result<(), Refused> {
    if stdin || stdout || stderr {
        return Ok(());
    }
    let reason = "you must specify at least 1 of stdin, stdout, stderr";
    Err(Refused(StatusCode::BAD_REQUEST, reason.to_owned()))
}

fn container_spec<'a>(pod: &'a Pod, name: &str) -> Option<&'a Container> {
    let spec = pod.spec.as_ref()?;
    spec.containers.iter().chain(spec.init_containers.iter().flatten()).find(|c| c.name == name)
}

async fn port_forward(
    parts: &Parts,
    target: &Target,
    query: &[(String, String)],
    request: Request<Incoming>,
) -> Answer {
    let key = PodKey { namespace: &target.namespace, name: &target.pod, uid: target.uid.as_deref() };
    let asked = PortForwardRequest {
        pod_sandbox_id: parts.pods.sandbox(key)?,
        port: values(query, "port")
            .flat_map(|ports| ports.split(','))
            .filter_map(|port| port.parse().ok())
            .collect(),
    };
    let url = parts.cri.runtime().port_forward(asked).await?.into_inner().url;
    Ok(stream::join(request, &url).await)
}

async fn run(parts: &Parts, target: &Target, query: &[(String, String)]) -> Answer {
    let container = handle(parts, target, false)?;
    let cmd = values(query, "cmd").next().unwrap_or_default().split_whitespace().map(str::to_owned).collect();
    let asked = ExecSyncRequest { container_id: container.container_id, cmd, timeout: 0 };
    let done = parts.cri.runtime().exec_sync(asked).await?.into_inner();
    let mut output = done.stdout;
    output.extend_from_slice(&done.stderr);
    if done.exit_code != 0 {
        return Err(Refused(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("command ended with {}: {}", done.exit_code, String::from_utf8_lossy(&output)),
        ));
    }
    Ok(text(StatusCode::OK, output))
}
