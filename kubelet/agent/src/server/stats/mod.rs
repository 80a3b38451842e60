//! Figures about the node, its pods and containers, gathered at the moment somebody asks.
//!
//! ```text
//! runtime (CRI) ──┐
//! host (/proc) ───┼─> collect ─> Summary ─┬─> /stats/summary
//! cgroup ─────────┤                       └─> resource: /metrics/resource
//! storage (disk) ─┘
//! runtime, cgroup, host ───────────────────> cadvisor: /metrics/cadvisor
//! pod directory, requests, own process ────> kubelet:  /metrics
//! prober ──────────────────────────────────> probes:   /metrics/probes
//! ```
//!
//! Nothing is sampled in the background. The only thing remembered from one question to the next is a CPU reading per
//! running container, for the rate since then. A figure that cannot be had is left out: no missing controller, file or
//! optional call of the runtime makes an answer fail.

mod cadvisor;
mod cgroup;
mod collect;
mod convert;
mod exposition;
mod host;
mod kubelet;
mod model;
mod network;
mod requests;
mod resource;
mod runtime;
mod sample;
mod storage;

#[cfg(test)]
mod fake_runtime;
#[cfg(test)]
mod tests;

pub(super) use requests::Door;

use super::Parts;
use super::body::{Body, full, json};
use exposition::{Exposition, Metric};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response};
use jiff::Timestamp;
use requests::Requests;
use sample::Samples;
use std::path::PathBuf;

/// What is remembered between questions, and where the host is looked at.
#[derive(Debug)]
pub struct Statistics {
    /// `/` but for tests.
    root: PathBuf,
    samples: Samples,
    pub(super) requests: Requests,
}

impl Default for Statistics {
    fn default() -> Self {
        Self::below(PathBuf::from("/"))
    }
}

impl Statistics {
    fn below(root: PathBuf) -> Self {
        Self { root, samples: Samples::default(), requests: Requests::default() }
    }
}

/// How much of a summary is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    CpuAndMemory,
    Everything,
}

/// Nanoseconds since 1970, as the runtime counts.
fn now() -> i64 {
    i64::try_from(Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}

pub(super) async fn summary(parts: &Parts, extent: Extent) -> Result<Response<Body>, tonic::Status> {
    Ok(json(&Box::pin(collect::summary(parts, extent, now())).await?))
}

pub(super) fn metrics(parts: &Parts) -> Response<Body> {
    exposed(&kubelet::metrics(parts, now()))
}

pub(super) async fn resource_metrics(parts: &Parts) -> Result<Response<Body>, tonic::Status> {
    let summary = Box::pin(collect::summary(parts, Extent::CpuAndMemory, now())).await;
    if let Err(error) = &summary {
        tracing::warn!(%error, "the container runtime gives no figures for /metrics/resource");
    }
    Ok(exposed(&resource::metrics(summary.ok().as_ref())))
}

pub(super) async fn container_metrics(parts: &Parts) -> Result<Response<Body>, tonic::Status> {
    let pods = Box::pin(runtime::pods(parts)).await?;
    Ok(exposed(&cadvisor::metrics(parts, &pods, now())))
}

pub(super) fn probe_metrics(parts: &Parts) -> Response<Body> {
    const PROBES: Metric =
        Metric::counter("prober_probe_total", "Probes of containers so far, by kind and result.");
    let mut out = Exposition::default();
    for count in parts.prober.counts() {
        let Some(pod) = parts.pods.by_uid(&count.pod_uid) else { continue };
        let (name, namespace, uid) = crate::pods::labels::identity(&pod);
        let kind = count.kind.to_string();
        for (result, number) in
            [("successful", count.successful), ("failed", count.failed), ("unknown", count.unknown)]
        {
            if number == 0 {
                continue;
            }
            let labels = [
                ("container", count.container.as_str()),
                ("namespace", namespace),
                ("pod", name),
                ("pod_uid", uid),
                ("probe_type", &kind),
                ("result", result),
            ];
            out.add(&PROBES, &labels, exposition::number(number), None);
        }
    }
    exposed(&out)
}

fn exposed(metrics: &Exposition) -> Response<Body> {
    let mut response = Response::new(full(metrics.to_string()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(exposition::CONTENT_TYPE));
    response
}
