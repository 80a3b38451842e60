//! Events about pods, as `kubectl describe` shows them.

use k8s_openapi::api::core::v1::Pod;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Whether an event tells of the ordinary course or of trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    Normal,
    Warning,
}

/// One event about a pod or one of its containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodEvent {
    pub severity: Severity,
    pub reason: &'static str,
    pub message: String,
    /// Such as `spec.containers{web}`.
    pub field_path: Option<String>,
}

impl PodEvent {
    #[must_use]
    pub fn normal(reason: &'static str, message: impl Into<String>) -> Self {
        Self { severity: Severity::Normal, reason, message: message.into(), field_path: None }
    }

    #[must_use]
    pub fn warning(reason: &'static str, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, reason, message: message.into(), field_path: None }
    }

    /// The same event, told of one container.
    #[must_use]
    pub fn of_container(mut self, pod: &Pod, container: &str) -> Self {
        self.field_path = Some(container_field_path(pod, container));
        self
    }
}

/// Where in the pod's specification a container stands.
#[must_use]
pub fn container_field_path(pod: &Pod, container: &str) -> String {
    let spec = pod.spec.as_ref();
    let is_init = spec.is_some_and(|spec| spec.init_containers.iter().flatten().any(|c| c.name == container));
    let is_ephemeral =
        spec.is_some_and(|spec| spec.ephemeral_containers.iter().flatten().any(|c| c.name == container));
    let list = match (is_init, is_ephemeral) {
        (true, _) => "initContainers",
        (_, true) => "ephemeralContainers",
        _ => "containers",
    };
    format!("spec.{list}{{{container}}}")
}

/// Receives events and must not block: it queues them, or drops them when it cannot.
pub trait EventSink: Send + Sync {
    fn emit(&self, pod: &Pod, event: PodEvent);
}

/// Where events go. Clones share the sink.
#[derive(Clone)]
pub struct Events(Arc<dyn EventSink>);

impl Events {
    #[must_use]
    pub fn new(sink: Arc<dyn EventSink>) -> Self {
        Self(sink)
    }

    /// Events only in our log: standalone mode.
    #[must_use]
    pub fn log_only() -> Self {
        Self(Arc::new(LogSink))
    }

    pub fn emit(&self, pod: &Pod, event: PodEvent) {
        self.0.emit(pod, event);
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Events")
    }
}

struct LogSink;

impl EventSink for LogSink {
    fn emit(&self, pod: &Pod, event: PodEvent) {
        let (name, namespace, _) = super::labels::identity(pod);
        let PodEvent { severity, reason, message, field_path } = event;
        let part = field_path.unwrap_or_default();
        match severity {
            // These the log tells anyway, with more about them.
            Severity::Normal if matches!(reason, "Created" | "Started") => {
                tracing::debug!(pod = name, namespace, part, reason, "{message}");
            }
            Severity::Normal => tracing::info!(pod = name, namespace, part, reason, "{message}"),
            Severity::Warning => tracing::warn!(pod = name, namespace, part, reason, "{message}"),
        }
    }
}

/// The same trouble of the same pod is worth one line of the log in this time, however often it is told.
const QUIET: Duration = Duration::from_secs(300);
/// More troubles than this at a time are told only to whoever looks closely.
const MOST_TROUBLES: usize = 1024;

/// Events that go to the API are in our own log for whoever looks closely; of trouble the log tells once in a while.
#[derive(Debug, Default)]
pub struct Echo(Mutex<HashMap<Trouble, Instant>>);

/// Of which pod, of what kind, of which part of it.
type Trouble = (String, &'static str, Option<String>);

impl Echo {
    pub fn tell(&self, pod: &Pod, event: &PodEvent, now: Instant) {
        let (name, namespace, _) = super::labels::identity(pod);
        let PodEvent { reason, message, field_path, .. } = event;
        let part = field_path.as_deref().unwrap_or_default();
        if self.is_worth_telling(pod, event, now) {
            tracing::info!(pod = name, namespace, part, reason, "{message}");
        } else {
            tracing::debug!(pod = name, namespace, part, reason, "{message}");
        }
    }

    fn is_worth_telling(&self, pod: &Pod, event: &PodEvent, now: Instant) -> bool {
        if event.severity == Severity::Normal {
            return false;
        }
        let uid = super::labels::identity(pod).2.to_owned();
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() >= MOST_TROUBLES {
            told.retain(|_, at| now.saturating_duration_since(*at) < QUIET);
        }
        if told.len() >= MOST_TROUBLES {
            return false;
        }
        match told.entry((uid, event.reason, event.field_path.clone())) {
            Entry::Occupied(known) if now.saturating_duration_since(*known.get()) < QUIET => false,
            Entry::Occupied(mut known) => {
                known.insert(now);
                true
            }
            Entry::Vacant(place) => {
                place.insert(now);
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_is_told_once_in_a_while_and_the_ordinary_course_not_at_all() {
        let echo = Echo::default();
        let (pod, now) = (Pod::default(), Instant::now());
        let trouble = PodEvent::warning("Unhealthy", "no");
        let told = |event: &PodEvent, after| echo.is_worth_telling(&pod, event, now + after);
        assert!(!told(&PodEvent::normal("Pulled", "yes"), Duration::ZERO));
        assert!(told(&trouble, Duration::ZERO));
        assert!(!told(&trouble, QUIET / 2));
        assert!(told(&PodEvent::warning("FailedMount", "no"), QUIET / 2));
        assert!(told(&trouble, QUIET));
    }
}
