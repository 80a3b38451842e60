//! The node's heartbeat: a Lease in kube-node-lease, renewed every quarter of its duration.

use crate::shutdown::Shutdown;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use orlop_api::backoff::chance;
use orlop_api::{ApiError, Client};
use std::time::Duration;

const COLLECTION: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
const TRIES: u32 = 5;
/// After this many renewals in a row that failed the connection itself is under suspicion.
const SUSPICION: u32 = 2;

/// Keeps the lease of a node.
#[derive(Debug)]
pub(super) struct Heartbeat {
    client: Client,
    node: String,
    duration: Duration,
    /// As the server last showed it.
    held: Option<Box<Lease>>,
}

impl Heartbeat {
    pub(super) fn new(client: &Client, node: &str, duration: Duration, longest_request: Duration) -> Self {
        Self {
            client: client.with_timeout(longest_request.min(duration)),
            node: node.to_owned(),
            duration,
            held: None,
        }
    }

    /// Renews until told to stop. `node_uid` makes the lease go away with its node.
    pub(super) async fn run(mut self, node_uid: Option<String>, shutdown: Shutdown) {
        let pause = self.duration / 4;
        let mut failures = 0;
        loop {
            let Some(result) = shutdown.unless_triggered(Box::pin(self.renew(node_uid.as_deref()))).await
            else {
                return;
            };
            match result {
                Ok(()) => failures = 0,
                Err(error) => {
                    failures += 1;
                    tracing::warn!(%error, failures, "lease not renewed");
                    if failures >= SUSPICION {
                        self.client.drop_connections();
                    }
                    let unreachable = matches!(error, ApiError::Unreachable { .. });
                    if unreachable {
                        // Comes back sooner when the server does.
                        if shutdown.unless_triggered(self.client.wait_reachable(pause)).await.is_none() {
                            return;
                        }
                        // A server that accepts connections and drops them must not be asked in a tight loop.
                        let rest = Duration::from_secs(1).mul_f64(0.5 + chance());
                        if shutdown.unless_triggered(tokio::time::sleep(rest)).await.is_none() {
                            return;
                        }
                        continue;
                    }
                }
            }
            let wait = pause.mul_f64(1.0 + 0.04 * chance());
            if shutdown.unless_triggered(tokio::time::sleep(wait)).await.is_none() {
                return;
            }
        }
    }

    /// One renewal, with the tries that conflicts and busy servers deserve.
    async fn renew(&mut self, node_uid: Option<&str>) -> Result<(), ApiError> {
        let path = format!("{COLLECTION}/{}", self.node);
        let mut last = None;
        for attempt in 0..TRIES {
            if attempt > 0 {
                tokio::time::sleep(Duration::from_millis(100 << attempt)).await;
            }
            let now = Timestamp::now();
            let result: Result<Lease, ApiError> = match &self.held {
                Some(held) => self.client.replace(&path, &self.renewed(held, node_uid, now)).await,
                None => match self.client.get::<Lease>(&path).await {
                    Ok(found) => self.client.replace(&path, &self.renewed(&found, node_uid, now)).await,
                    Err(error) if error.is_not_found() => {
                        self.client.create(COLLECTION, &self.renewed(&self.empty(), node_uid, now)).await
                    }
                    Err(error) => Err(error),
                },
            };
            match result {
                Ok(lease) => {
                    self.held = Some(Box::new(lease));
                    return Ok(());
                }
                Err(error) => {
                    // Somebody else wrote it, or it is gone: look again.
                    if error.code().is_some() {
                        self.held = None;
                    } else {
                        return Err(error);
                    }
                    last = Some(error);
                }
            }
        }
        last.map_or(Ok(()), Err)
    }

    fn empty(&self) -> Lease {
        Lease {
            metadata: ObjectMeta {
                name: Some(self.node.clone()),
                namespace: Some("kube-node-lease".to_owned()),
                ..ObjectMeta::default()
            },
            ..Lease::default()
        }
    }

    fn renewed(&self, lease: &Lease, node_uid: Option<&str>, now: Timestamp) -> Lease {
        let mut lease = lease.clone();
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(self.node.clone()),
            lease_duration_seconds: i32::try_from(self.duration.as_secs()).ok(),
            renew_time: Some(MicroTime(now)),
            ..lease.spec.take().unwrap_or_default()
        });
        if let Some(uid) = node_uid {
            lease.metadata.owner_references = Some(vec![OwnerReference {
                api_version: "v1".to_owned(),
                kind: "Node".to_owned(),
                name: self.node.clone(),
                uid: uid.to_owned(),
                ..OwnerReference::default()
            }]);
        }
        lease
    }
}
