//! Which pods something happened to in the runtime.
//!
//! The runtime's event stream tells at once. Where it does not have one, or breaks, all containers are listed each second
//! and compared. Either way the news is only *which* pod; its worker looks for itself.

use super::labels;
use super::runtime_client::RuntimeClient;
use orlop_proto::cri;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;
use tokio::sync::mpsc;

/// News from the runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Touch {
    Pod(String),
    /// Only the container is known.
    Container(String),
    /// News may have been missed.
    All,
}

const RELIST: Duration = Duration::from_secs(1);
/// How long to go on listing before the stream is tried again.
const STREAM_RETRY: Duration = Duration::from_secs(10);
const STREAM_RETRY_UNKNOWN: Duration = Duration::from_secs(600);

/// Reports until the receiver is gone.
pub async fn run(runtime: RuntimeClient, out: mpsc::Sender<Touch>) {
    let mut seen = HashMap::new();
    loop {
        let retry = match runtime.events().await {
            Ok(stream) => {
                tracing::debug!("following the runtime's events");
                if out.send(Touch::All).await.is_err() || !follow(stream, &out).await {
                    return;
                }
                STREAM_RETRY
            }
            Err(super::runtime_client::RuntimeError::Refused {
                code: tonic::Code::Unimplemented, ..
            }) => STREAM_RETRY_UNKNOWN,
            Err(error) => {
                tracing::warn!(%error, "no events from the runtime, its containers are listed each second instead");
                STREAM_RETRY
            }
        };
        let again = tokio::time::Instant::now() + retry;
        while tokio::time::Instant::now() < again {
            match relist(&runtime, &mut seen).await {
                Ok(touched) => {
                    for uid in touched {
                        if out.send(Touch::Pod(uid)).await.is_err() {
                            return;
                        }
                    }
                }
                Err(error) => tracing::warn!(%error, "the runtime's containers cannot be listed"),
            }
            tokio::select! {
                () = tokio::time::sleep(RELIST) => {}
                () = out.closed() => return,
            }
        }
    }
}

/// False when nobody listens any more; true when the stream has ended.
async fn follow(
    mut stream: tonic::Streaming<cri::ContainerEventResponse>,
    out: &mpsc::Sender<Touch>,
) -> bool {
    loop {
        let message = tokio::select! {
            message = stream.message() => message,
            () = out.closed() => return false,
        };
        match message {
            Ok(Some(event)) => {
                if out.send(concerned(&event)).await.is_err() {
                    return false;
                }
            }
            Ok(None) => return true,
            Err(error) => {
                tracing::warn!(%error, "the runtime's event stream broke");
                return true;
            }
        }
    }
}

fn concerned(event: &cri::ContainerEventResponse) -> Touch {
    let of_sandbox = event
        .pod_sandbox_status
        .as_ref()
        .and_then(|status| status.metadata.as_ref())
        .map(|metadata| metadata.uid.clone());
    let of_container = || {
        let labels = event.containers_statuses.first().map(|status| &status.labels)?;
        labels.get(labels::POD_UID).cloned()
    };
    match of_sandbox.filter(|uid| !uid.is_empty()).or_else(of_container) {
        Some(uid) => Touch::Pod(uid),
        None => Touch::Container(event.container_id.clone()),
    }
}

/// The pods whose containers or sandboxes differ from the last list.
async fn relist(
    runtime: &RuntimeClient,
    seen: &mut HashMap<String, u64>,
) -> Result<Vec<String>, super::runtime_client::RuntimeError> {
    let sandboxes = runtime.list_sandboxes(None).await?;
    let containers = runtime.list_containers(None).await?;
    let mut pods: HashMap<String, Vec<(String, i32)>> = HashMap::new();
    let all = sandboxes
        .into_iter()
        .map(|one| (one.labels, one.id, one.state))
        .chain(containers.into_iter().map(|one| (one.labels, one.id, one.state)));
    for (labels, id, state) in all {
        if let Some(uid) = labels.get(labels::POD_UID) {
            pods.entry(uid.clone()).or_default().push((id, state));
        }
    }
    let now: HashMap<String, u64> = pods.into_iter().map(|(uid, parts)| (uid, fingerprint(parts))).collect();
    let mut touched: Vec<String> = now
        .iter()
        .filter(|(uid, print)| seen.get(*uid) != Some(*print))
        .map(|(uid, _)| uid.clone())
        .collect();
    touched.extend(seen.keys().filter(|uid| !now.contains_key(*uid)).cloned());
    *seen = now;
    Ok(touched)
}

fn fingerprint(mut parts: Vec<(String, i32)>) -> u64 {
    parts.sort();
    let mut hasher = DefaultHasher::new();
    parts.hash(&mut hasher);
    hasher.finish()
}
