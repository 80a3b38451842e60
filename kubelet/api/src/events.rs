//! Kubernetes Events. Recording never blocks and never fails: events go into a bounded queue, a task posts them.
//!
//! Repeats of an event raise the count of the one that is there. Two limits protect the API server: a rate for the node, and
//! a small allowance for each object, so that one pod in trouble cannot drown the others' events.

use crate::backoff::chance;
use crate::client::{Client, Patch};
use crate::error::ApiError;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

const QUEUE: usize = 1000;
/// Events about one object: this many at once …
const OBJECT_BURST: f64 = 25.0;
/// … and one more in this time.
const OBJECT_REFILL: Duration = Duration::from_secs(300);
/// A repeat after this time is a new event.
const REPEAT_WINDOW: Duration = Duration::from_secs(600);
/// How often a server that is away is tried for one event.
const TRIES: u32 = 12;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventKind {
    Normal,
    Warning,
}

impl EventKind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

/// `eventRecordQPS` and `eventBurst`. A rate of 0 means no limit.
#[derive(Debug, Clone, Copy)]
pub struct EventLimits {
    pub per_second: u32,
    pub burst: u32,
}

/// Takes events. Clones share the queue.
#[derive(Debug, Clone)]
pub struct EventRecorder {
    queue: mpsc::Sender<Record>,
    lost: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Record {
    about: ObjectReference,
    kind: EventKind,
    reason: String,
    message: String,
    at: Timestamp,
}

impl EventRecorder {
    /// Starts the task that posts; it ends when the last recorder is gone.
    #[must_use]
    pub fn start(client: Client, component: &str, host: &str, limits: EventLimits) -> Self {
        let (queue, records) = mpsc::channel(QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        let poster = Poster {
            client,
            component: component.to_owned(),
            host: host.to_owned(),
            correlator: Correlator::default(),
            limits,
            lost: Arc::clone(&lost),
        };
        tokio::spawn(poster.run(records));
        Self { queue, lost }
    }

    /// One that forgets everything, for a node without an API server.
    #[must_use]
    pub fn silent() -> Self {
        Self { queue: mpsc::channel(1).0, lost: Arc::default() }
    }

    /// Notes an event. When too many wait already it is counted as lost.
    pub fn event(&self, about: &ObjectReference, kind: EventKind, reason: &str, message: &str) {
        let record = Record {
            about: about.clone(),
            kind,
            reason: reason.to_owned(),
            message: message.chars().take(1024).collect(),
            at: Timestamp::now(),
        };
        if let Err(mpsc::error::TrySendError::Full(_)) = self.queue.try_send(record) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

struct Poster {
    client: Client,
    component: String,
    host: String,
    correlator: Correlator,
    limits: EventLimits,
    lost: Arc<AtomicU64>,
}

impl Poster {
    async fn run(mut self, mut records: mpsc::Receiver<Record>) {
        let mut rate = Bucket::full(f64::from(self.limits.burst), Instant::now());
        while let Some(record) = records.recv().await {
            let lost = self.lost.swap(0, Ordering::Relaxed);
            if lost > 0 {
                tracing::warn!(lost, "events were lost because the API server took none for too long");
            }
            let Some(plan) = self.correlator.plan(&record, Instant::now()) else { continue };
            if self.limits.per_second > 0 {
                let per_token = Duration::from_secs(1) / self.limits.per_second;
                while !rate.take(Instant::now(), f64::from(self.limits.burst), per_token) {
                    tokio::time::sleep(per_token).await;
                }
            }
            self.post(&record, plan).await;
        }
    }

    async fn post(&mut self, record: &Record, mut plan: Plan) {
        for _ in 0..TRIES {
            let result = match &plan {
                Plan::Create { name } => self.create(record, name).await,
                Plan::Repeat { name, count } => self.repeat(record, name, *count).await,
            };
            match result {
                Ok(()) => return,
                // The server has forgotten the earlier one.
                Err(error) if error.is_not_found() && matches!(plan, Plan::Repeat { .. }) => {
                    plan = Plan::Create { name: self.correlator.renew(record) };
                }
                Err(ApiError::Unreachable { .. }) => {
                    let longest = Duration::from_secs(10);
                    tokio::time::sleep(Duration::from_secs(1).mul_f64(0.5 + chance())).await;
                    self.client.wait_reachable(longest).await;
                }
                Err(ApiError::Status { code: 429 | 500..=599, .. }) => {
                    tokio::time::sleep(Duration::from_secs(5).mul_f64(0.5 + chance())).await;
                }
                Err(error) => {
                    // A namespace that is being deleted takes no events; that is no news.
                    tracing::debug!(reason = %record.reason, %error, "event not accepted");
                    return;
                }
            }
        }
        tracing::warn!(reason = %record.reason, message = %record.message, "event given up");
    }

    async fn create(&self, record: &Record, name: &str) -> Result<(), ApiError> {
        let namespace = namespace(&record.about);
        let time = record.at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let event = json!({
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": record.about,
            "reason": record.reason,
            "message": record.message,
            "type": record.kind.as_str(),
            "source": {"component": self.component, "host": self.host},
            "reportingComponent": self.component,
            "reportingInstance": self.host,
            "firstTimestamp": time,
            "lastTimestamp": time,
            "count": 1,
        });
        self.client.create::<_, Value>(&format!("/api/v1/namespaces/{namespace}/events"), &event).await?;
        Ok(())
    }

    async fn repeat(&self, record: &Record, name: &str, count: u32) -> Result<(), ApiError> {
        let path = format!("/api/v1/namespaces/{}/events/{name}", namespace(&record.about));
        let time = record.at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let change = json!({"count": count, "lastTimestamp": time});
        self.client.patch::<_, Value>(&path, Patch::Strategic, &change).await?;
        Ok(())
    }
}

fn namespace(about: &ObjectReference) -> &str {
    about.namespace.as_deref().filter(|namespace| !namespace.is_empty()).unwrap_or("default")
}

/// What to do with an event.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    Create { name: String },
    Repeat { name: String, count: u32 },
}

#[derive(Debug, PartialEq, Eq, Hash, Clone)]
struct ObjectKey(String, String, String, String);

impl ObjectKey {
    fn new(about: &ObjectReference) -> Self {
        let part = |text: &Option<String>| text.clone().unwrap_or_default();
        Self(part(&about.kind), part(&about.namespace), part(&about.name), part(&about.uid))
    }
}

type EventKey = (ObjectKey, Option<String>, EventKind, String, String);

#[derive(Debug)]
struct Seen {
    name: String,
    count: u32,
    last: Instant,
}

/// Remembers what was said, to count repeats and to stop those who say too much. Time is an argument.
#[derive(Debug, Default)]
struct Correlator {
    seen: HashMap<EventKey, Seen>,
    allowance: HashMap<ObjectKey, Bucket>,
}

impl Correlator {
    fn key(record: &Record) -> EventKey {
        (
            ObjectKey::new(&record.about),
            record.about.field_path.clone(),
            record.kind,
            record.reason.clone(),
            record.message.clone(),
        )
    }

    fn plan(&mut self, record: &Record, now: Instant) -> Option<Plan> {
        self.forget(now);
        let key = Self::key(record);
        let bucket = self.allowance.entry(key.0.clone()).or_insert_with(|| Bucket::full(OBJECT_BURST, now));
        if !bucket.take(now, OBJECT_BURST, OBJECT_REFILL) {
            return None;
        }
        if let Some(seen) = self.seen.get_mut(&key) {
            seen.count += 1;
            seen.last = now;
            return Some(Plan::Repeat { name: seen.name.clone(), count: seen.count });
        }
        let name = event_name(record);
        self.seen.insert(key, Seen { name: name.clone(), count: 1, last: now });
        Some(Plan::Create { name })
    }

    /// A fresh name for an event that the server no longer has.
    fn renew(&mut self, record: &Record) -> String {
        let name = event_name(record);
        if let Some(seen) = self.seen.get_mut(&Self::key(record)) {
            seen.name.clone_from(&name);
            seen.count = 1;
        }
        name
    }

    fn forget(&mut self, now: Instant) {
        self.seen.retain(|_, seen| now.duration_since(seen.last) < REPEAT_WINDOW);
        self.allowance.retain(|_, bucket| !bucket.is_full(now, OBJECT_BURST, OBJECT_REFILL));
    }
}

fn event_name(record: &Record) -> String {
    let object = record.about.name.as_deref().unwrap_or("unknown");
    format!("{object}.{:x}", record.at.as_nanosecond())
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    fn full(burst: f64, now: Instant) -> Self {
        Self { tokens: burst, at: now }
    }

    fn level(&self, now: Instant, burst: f64, refill: Duration) -> f64 {
        (self.tokens + now.duration_since(self.at).as_secs_f64() / refill.as_secs_f64()).min(burst)
    }

    fn is_full(&self, now: Instant, burst: f64, refill: Duration) -> bool {
        self.level(now, burst, refill) >= burst
    }

    fn take(&mut self, now: Instant, burst: f64, refill: Duration) -> bool {
        self.tokens = self.level(now, burst, refill);
        self.at = now;
        let enough = self.tokens >= 1.0;
        if enough {
            self.tokens -= 1.0;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str, message: &str) -> Record {
        Record {
            about: ObjectReference { name: Some(name.to_owned()), ..ObjectReference::default() },
            kind: EventKind::Normal,
            reason: "Pulled".to_owned(),
            message: message.to_owned(),
            at: Timestamp::now(),
        }
    }

    #[test]
    fn a_repeat_raises_the_count_of_the_event_that_is_there() {
        let (mut correlator, now) = (Correlator::default(), Instant::now());
        let Some(Plan::Create { name }) = correlator.plan(&record("a", "x"), now) else { panic!("no event") };
        let repeat = correlator.plan(&record("a", "x"), now + Duration::from_secs(60));
        assert_eq!(repeat, Some(Plan::Repeat { name, count: 2 }));
        assert!(matches!(correlator.plan(&record("a", "y"), now), Some(Plan::Create { .. })));
    }

    #[test]
    fn an_old_event_is_not_repeated_but_made_anew() {
        let (mut correlator, now) = (Correlator::default(), Instant::now());
        correlator.plan(&record("a", "x"), now);
        let later = now + REPEAT_WINDOW;
        assert!(matches!(correlator.plan(&record("a", "x"), later), Some(Plan::Create { .. })));
    }

    #[test]
    fn one_noisy_object_is_silenced_and_the_others_are_not() {
        let (mut correlator, now) = (Correlator::default(), Instant::now());
        let accepted =
            (0..100).filter(|i| correlator.plan(&record("a", &i.to_string()), now).is_some()).count();
        assert_eq!(accepted, 25);
        assert!(correlator.plan(&record("b", "x"), now).is_some());
        assert!(correlator.plan(&record("a", "later"), now + OBJECT_REFILL).is_some());
    }

    #[tokio::test]
    async fn recording_never_blocks_even_without_a_server() {
        let recorder = EventRecorder::silent();
        for _ in 0..5000 {
            recorder.event(&ObjectReference::default(), EventKind::Warning, "Failed", "x");
        }
    }
}
