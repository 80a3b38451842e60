//! Events about pods, as `kubectl describe` shows them.

use k8s_openapi::api::core::v1::Pod;
use std::fmt;
use std::sync::Arc;

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
            Severity::Normal => tracing::info!(pod = name, namespace, part, reason, "{message}"),
            Severity::Warning => tracing::warn!(pod = name, namespace, part, reason, "{message}"),
        }
    }
}
