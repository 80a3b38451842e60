//! How often each path was asked for, and how long the answer took to begin.

use super::exposition::{Exposition, Metric, number};
use http::Method;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const TOTAL: Metric = Metric::counter("kubelet_http_requests_total", "Requests to the kubelet's HTTP API.");
const TOOK: Metric = Metric::histogram(
    "kubelet_http_requests_duration_seconds",
    "Seconds from a request to the beginning of its answer.",
);
const IN_FLIGHT: Metric =
    Metric::gauge("kubelet_http_inflight_requests", "Requests whose answer has not begun.");

const BOUNDS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// First words of paths that are told apart; whatever else somebody may ask for is one.
const PATHS: [&str; 17] = [
    "attach",
    "checkpoint",
    "configz",
    "containerLogs",
    "debug",
    "exec",
    "flagz",
    "healthz",
    "logs",
    "metrics",
    "pods",
    "portForward",
    "run",
    "runningpods",
    "stats",
    "statusz",
    "spec",
];

/// Through which listener a request came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::server) enum Door {
    Main,
    ReadOnly,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    door: Door,
    method: &'static str,
    path: &'static str,
}

#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    in_flight: u64,
    sum: Duration,
    /// By the first bound that is not exceeded; the last exceeded all.
    buckets: [u64; BOUNDS.len() + 1],
}

#[derive(Debug, Default)]
pub(in crate::server) struct Requests(Mutex<BTreeMap<Key, Counts>>);

/// A request whose answer has not begun. Dropped when it has, or when nobody waits any more.
#[derive(Debug)]
pub(in crate::server) struct Running<'a> {
    requests: &'a Requests,
    key: Key,
    since: Instant,
}

impl Requests {
    pub(in crate::server) fn begin(&self, door: Door, method: &Method, path: &str) -> Running<'_> {
        let key = Key { door, method: method_name(method), path: path_name(path) };
        self.counts().entry(key).or_default().in_flight += 1;
        Running { requests: self, key, since: Instant::now() }
    }

    fn end(&self, key: Key, took: Duration) {
        let mut counts = self.counts();
        let counts = counts.entry(key).or_default();
        counts.in_flight = counts.in_flight.saturating_sub(1);
        counts.sum += took;
        let seconds = took.as_secs_f64();
        let bucket = BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len());
        counts.buckets[bucket] += 1;
    }

    pub(super) fn expose(&self, out: &mut Exposition) {
        for (key, counts) in self.counts().iter() {
            let long = matches!(key.path, "exec" | "attach" | "portForward" | "debug");
            let labels = [
                ("long_running", if long { "true" } else { "false" }),
                ("method", key.method),
                ("path", key.path),
                ("server_type", if key.door == Door::Main { "readwrite" } else { "readonly" }),
            ];
            let ended: u64 = counts.buckets.iter().sum();
            out.add(&TOTAL, &labels, number(ended + counts.in_flight), None);
            out.add(&IN_FLIGHT, &labels, number(counts.in_flight), None);
            out.add_histogram(&TOOK, &labels, &BOUNDS, &counts.buckets, counts.sum.as_secs_f64());
        }
    }

    fn counts(&self) -> MutexGuard<'_, BTreeMap<Key, Counts>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.requests.end(self.key, self.since.elapsed());
    }
}

fn method_name(method: &Method) -> &'static str {
    let known = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"];
    known.into_iter().find(|name| *name == method.as_str()).unwrap_or("other")
}

fn path_name(path: &str) -> &'static str {
    let mut words = path.strip_prefix('/').unwrap_or(path).split('/');
    let first = words.next().unwrap_or_default();
    match (first, words.next()) {
        ("metrics", Some("cadvisor")) => "metrics/cadvisor",
        ("metrics", Some("probes")) => "metrics/probes",
        ("metrics", Some("resource")) => "metrics/resource",
        _ => PATHS.into_iter().find(|known| *known == first).unwrap_or("other"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::exposition::parser::parse;
    use super::*;

    #[test]
    fn a_request_is_in_flight_until_it_is_answered_and_then_counted() {
        let requests = Requests::default();
        let running = requests.begin(Door::Main, &Method::GET, "/exec/ns/pod/main");
        let value = |name: &str| {
            let mut out = Exposition::default();
            requests.expose(&mut out);
            let samples = parse(&out.to_string());
            let found = samples.into_iter().find(|sample| sample.name == name).unwrap();
            assert_eq!(found.labels["path"], "exec");
            assert_eq!(found.labels["long_running"], "true");
            found.value.to_string()
        };
        assert_eq!(value("kubelet_http_inflight_requests"), "1");
        drop(running);
        assert_eq!(value("kubelet_http_inflight_requests"), "0");
        assert_eq!(value("kubelet_http_requests_total"), "1");
        assert_eq!(value("kubelet_http_requests_duration_seconds_count"), "1");
    }

    #[test]
    fn strangers_cannot_make_the_table_of_paths_grow() {
        for path in ["/", "", "/nonsense/1", "/metricsx"] {
            assert_eq!(path_name(path), "other");
        }
        assert_eq!(path_name("/metrics/resource"), "metrics/resource");
        assert_eq!(path_name("/metrics"), "metrics");
        assert_eq!(method_name(&Method::from_bytes(b"MINE").unwrap()), "other");
    }
}
