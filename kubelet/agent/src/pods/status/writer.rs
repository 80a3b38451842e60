//! Brings statuses to the API server: per pod in order, only the newest, again and again until the server has it.
//!
//! One task per pod. It owns what the server is believed to hold; whatever comes in while a write is under way is merged
//! into the next one. A pod's API object is deleted only after its final status has been written. For a static pod the
//! object is its mirror, which may be missing or replaced at any time: its UID is watched, not assumed.

use super::patch;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use orlop_api::client::Patch;
use orlop_api::{ApiError, Client};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_LONGEST: Duration = Duration::from_secs(10);
/// After an answer that will hardly change by asking again.
const RETRY_REFUSED: Duration = Duration::from_secs(30);

/// What the server shall hold.
#[derive(Debug, Clone, Default)]
pub struct Desired {
    pub status: Option<Arc<PodStatus>>,
    /// After the status: the object shall go.
    pub delete: bool,
}

/// Where a pod's status goes.
#[derive(Debug)]
pub struct Target {
    pub namespace: String,
    pub name: String,
    /// The object's UID; none while it does not exist.
    pub uid: watch::Receiver<Option<String>>,
}

/// Writes until `desired` is closed or the object is deleted. `deleted` is called when the object is known to be gone
/// after deletion was wanted. `held` is the status the server had when the pod was first seen.
pub async fn run(
    client: Client,
    mut target: Target,
    mut desired: watch::Receiver<Desired>,
    held: Option<PodStatus>,
    deleted: impl FnOnce() + Send,
) {
    let first_uid = target.uid.borrow().clone();
    let mut written: Option<(String, Value)> = first_uid.zip(held.as_ref().map(patch::owned));
    let mut retry = RETRY_FIRST;
    loop {
        let want = desired.borrow_and_update().clone();
        let uid = target.uid.borrow_and_update().clone();
        match bring(&client, &target, uid.as_deref(), &want, &mut written).await {
            Ok(Progress::Gone) if want.delete => {
                deleted();
                return;
            }
            Ok(Progress::Gone | Progress::Settled) => {
                retry = RETRY_FIRST;
                // The object's creation may be told before or after its status is wanted.
                tokio::select! {
                    changed = desired.changed() => if changed.is_err() { return },
                    changed = target.uid.changed() => if changed.is_err() && desired.changed().await.is_err() { return },
                }
            }
            Err(error) => {
                let wait = if error.is_retryable() { retry } else { RETRY_REFUSED };
                tracing::warn!(pod = %target.name, namespace = %target.namespace, %error, "pod status not written, will be tried again");
                retry = (retry * 2).min(RETRY_LONGEST);
                tokio::time::sleep(wait).await;
                if desired.has_changed().is_err() && !want.delete {
                    return;
                }
            }
        }
    }
}

enum Progress {
    /// The server holds what is wanted.
    Settled,
    /// There is no such object (any more).
    Gone,
}

async fn bring(
    client: &Client,
    target: &Target,
    uid: Option<&str>,
    want: &Desired,
    written: &mut Option<(String, Value)>,
) -> Result<Progress, ApiError> {
    let Some(uid) = uid else { return Ok(Progress::Gone) };
    let path = format!("/api/v1/namespaces/{}/pods/{}", target.namespace, target.name);
    if let Some(status) = &want.status {
        let owned = patch::owned(status);
        let is_written = written.as_ref().is_some_and(|(of, value)| of == uid && *value == owned);
        if !is_written {
            let body = patch::body(uid, status);
            let answer: Result<Pod, ApiError> =
                client.patch(&format!("{path}/status"), Patch::Strategic, &body).await;
            match answer {
                Ok(_) => *written = Some((uid.to_owned(), owned)),
                Err(error) => return gone_or(error, client, &path, uid).await,
            }
        }
    }
    if want.delete {
        let options = json!({
            "apiVersion": "v1", "kind": "DeleteOptions",
            "gracePeriodSeconds": 0, "preconditions": {"uid": uid},
        });
        return match client.delete(&path, &options).await {
            Ok(()) => Ok(Progress::Gone),
            Err(error) => gone_or(error, client, &path, uid).await,
        };
    }
    Ok(Progress::Settled)
}

/// Whether an error means that the object is gone. A conflict means so only if another object has the name by now; else
/// somebody wrote at the same time, and the same is to be tried again.
async fn gone_or(error: ApiError, client: &Client, path: &str, uid: &str) -> Result<Progress, ApiError> {
    if error.is_not_found() {
        return Ok(Progress::Gone);
    }
    if !error.is_conflict() {
        return Err(error);
    }
    match client.get::<Pod>(path).await {
        Ok(pod) if pod.metadata.uid.as_deref() == Some(uid) => Err(error),
        Ok(_) => Ok(Progress::Gone),
        Err(other) if other.is_not_found() => Ok(Progress::Gone),
        Err(other) => Err(other),
    }
}

#[cfg(test)]
#[path = "writer_tests.rs"]
mod tests;
