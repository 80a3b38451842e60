//! Whether rules follow the cluster, told at `/healthz` and `/livez` as kube-proxy does.
//!
//! Load balancers ask `/healthz` whether to send traffic to this node, which is no while the node is being removed;
//! `/livez` is about the proxy alone.

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::routing::get;
use jiff::Timestamp;
use serde_json::json;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A change may wait this long before the proxy counts as unhealthy.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Between attempts to listen.
const LISTEN_AGAIN: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy)]
struct Facts {
    updated: Option<Timestamp>,
    waiting_since: Option<Instant>,
    node_eligible: bool,
}

type Answer = (StatusCode, [(header::HeaderName, &'static str); 1], String);

/// What the loop tells and the server answers. Clones are the same.
#[derive(Debug, Clone)]
pub struct Health {
    facts: Arc<Mutex<Facts>>,
}

impl Default for Health {
    fn default() -> Self {
        let facts = Facts { updated: None, waiting_since: Some(Instant::now()), node_eligible: true };
        Self { facts: Arc::new(Mutex::new(facts)) }
    }
}

impl Health {
    fn change(&self, change: impl FnOnce(&mut Facts)) {
        change(&mut self.facts.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A change waits to be applied.
    pub(crate) fn queued(&self) {
        self.change(|facts| {
            facts.waiting_since.get_or_insert_with(Instant::now);
        });
    }

    /// The rules are what they should be.
    pub(crate) fn updated(&self) {
        self.change(|facts| {
            facts.updated = Some(Timestamp::now());
            facts.waiting_since = None;
        });
    }

    pub(crate) fn node_eligible(&self, eligible: bool) {
        self.change(|facts| facts.node_eligible = eligible);
    }

    /// Whether the rules follow the cluster.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        let facts = *self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        facts.waiting_since.is_none_or(|since| since.elapsed() < LONGEST_WAIT)
    }

    fn answer(&self, about_node: bool) -> Answer {
        let facts = *self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        let healthy = self.is_healthy();
        let good = healthy && (facts.node_eligible || !about_node);
        let updated = facts.updated.unwrap_or(Timestamp::UNIX_EPOCH);
        let mut body = json!({
            "lastUpdated": updated,
            "currentTime": Timestamp::now(),
            "healthy": healthy,
            "status": {"IPv4": {"lastUpdated": updated, "healthy": healthy}},
        });
        if about_node {
            body["nodeEligible"] = facts.node_eligible.into();
        }
        let code = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        (code, [(header::CONTENT_TYPE, "application/json")], body.to_string())
    }

    /// Serves until the future is dropped; an address that is taken is tried again and again.
    pub(crate) async fn serve(self, address: SocketAddr) {
        let routes = Router::new()
            .route("/healthz", get(async |State(health): State<Self>| health.answer(true)))
            .route("/livez", get(async |State(health): State<Self>| health.answer(false)))
            .with_state(self);
        loop {
            match tokio::net::TcpListener::bind(address).await {
                Ok(listener) => {
                    if let Err(error) = axum::serve(listener, routes.clone()).await {
                        tracing::warn!(%address, %error, "the health server ended, starting it again");
                    }
                }
                Err(error) => {
                    tracing::warn!(%address, %error, "cannot serve the proxy's health, trying again");
                }
            }
            tokio::time::sleep(LISTEN_AGAIN).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_is_being_removed_is_alive_but_not_healthy() {
        let health = Health::default();
        health.updated();
        assert_eq!(health.answer(true).0, StatusCode::OK);
        health.node_eligible(false);
        assert_eq!(health.answer(true).0, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(health.answer(false).0, StatusCode::OK);
        let body: serde_json::Value = serde_json::from_str(&health.answer(true).2).unwrap();
        assert!(body["lastUpdated"].as_str().unwrap().ends_with('Z'));
    }

    #[test]
    fn a_change_that_waits_too_long_is_unhealthy_until_it_is_applied() {
        let health = Health::default();
        let long_ago = Instant::now().checked_sub(LONGEST_WAIT).unwrap();
        health.change(|facts| facts.waiting_since = Some(long_ago));
        assert!(!health.is_healthy());
        health.queued();
        assert!(!health.is_healthy());
        health.updated();
        assert!(health.is_healthy());
    }
}
