//! Keeps the contents of mounted volumes up to date: woken by changes of objects and by tokens that are due.

use crate::objects::{ObjectKey, references};
use crate::podspec::{namespace, pod_name};
use crate::volumes::Inner;
use jiff::{SignedDuration, Timestamp};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::{self, error::RecvError};

/// After a failed renewal, and as the least time between two renewals of one pod.
const RETRY: SignedDuration = SignedDuration::from_secs(30);

enum Wake {
    Changed(ObjectKey),
    /// Changes were missed.
    Everything,
    Due,
    NewPod,
}

/// Runs until aborted.
pub(super) async fn keep_fresh(inner: Arc<Inner>, mut changes: broadcast::Receiver<ObjectKey>) {
    loop {
        let wake = tokio::select! {
            change = changes.recv() => match change {
                Ok(key) => Wake::Changed(key),
                Err(RecvError::Lagged(_)) => Wake::Everything,
                Err(RecvError::Closed) => return,
            },
            () = sleep_until(inner.next_due()) => Wake::Due,
            () = inner.woken.notified() => Wake::NewPod,
        };
        match wake {
            Wake::NewPod => {}
            Wake::Due => inner.refresh_due(Timestamp::now()).await,
            Wake::Changed(key) => inner.refresh(Some(&key)).await,
            Wake::Everything => inner.refresh(None).await,
        }
    }
}

async fn sleep_until(due: Option<Timestamp>) {
    match due {
        None => std::future::pending().await,
        Some(due) => {
            let wait = due.duration_since(Timestamp::now());
            tokio::time::sleep(Duration::try_from(wait).unwrap_or_default()).await;
        }
    }
}

impl Inner {
    fn next_due(&self) -> Option<Timestamp> {
        self.pods().values().filter_map(|pod| pod.due()).min()
    }

    async fn refresh_due(&self, now: Timestamp) {
        let due: Vec<String> = self
            .pods()
            .iter()
            .filter(|(_, pod)| pod.due().is_some_and(|due| due <= now))
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in due {
            self.refresh_pod(&uid, None).await;
        }
    }

    /// Refreshes the pods that refer to the object, or all.
    async fn refresh(&self, key: Option<&ObjectKey>) {
        let uids: Vec<String> = self.pods().keys().cloned().collect();
        for uid in uids {
            self.refresh_pod(&uid, key).await;
        }
    }

    async fn refresh_pod(&self, uid: &str, key: Option<&ObjectKey>) {
        let Some(state) = self.pods().get(uid).cloned() else { return };
        let current = state.current.lock().await;
        let Some(pod) = current.as_ref() else { return };
        if key.is_some_and(|key| !references(pod).contains(key)) {
            return;
        }
        let soonest = Timestamp::now().checked_add(RETRY).unwrap_or(Timestamp::MAX);
        match self.apply(pod).await {
            Ok((_, due)) => state.set_due(due.map(|due| due.max(soonest))),
            Err(error) => {
                let (namespace, name) = (namespace(pod), pod_name(pod));
                tracing::warn!(%error, namespace, pod = name, "volume contents stay as they were");
                state.set_due(state.due().map(|due| due.max(soonest)));
            }
        }
    }
}
