//! The stream behind `GetContainerEvents`: every subscriber gets every event, and a slow one loses events rather than
//! holding anybody up.

use crate::container::Container;
use crate::runtime::Runtime;
use crate::sandbox::Sandbox;
use orlop_proto::cri::{ContainerEventResponse, ContainerEventType};

/// How far a subscriber may fall behind.
pub(crate) const BACKLOG: usize = 1024;

#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Created,
    Started,
    Stopped,
    Deleted,
}

impl Kind {
    fn to_cri(self) -> ContainerEventType {
        match self {
            Self::Created => ContainerEventType::ContainerCreatedEvent,
            Self::Started => ContainerEventType::ContainerStartedEvent,
            Self::Stopped => ContainerEventType::ContainerStoppedEvent,
            Self::Deleted => ContainerEventType::ContainerDeletedEvent,
        }
    }
}

impl Runtime {
    pub(crate) fn emit_sandbox(&self, kind: Kind, sandbox: &Sandbox) {
        self.emit(kind, &sandbox.id, Some(sandbox));
    }

    pub(crate) fn emit_container(&self, kind: Kind, container: &Container) {
        let sandbox = self.store.sandbox(&container.sandbox_id);
        self.emit(kind, &container.id, sandbox.as_deref());
    }

    fn emit(&self, kind: Kind, id: &str, sandbox: Option<&Sandbox>) {
        if self.events.receiver_count() == 0 {
            return;
        }
        let statuses = sandbox.map(|s| self.store.containers_of(&s.id)).unwrap_or_default();
        // Sending fails when the last subscriber has just left, which is no concern of ours.
        let _ = self.events.send(ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind.to_cri() as i32,
            created_at: crate::runtime::now(),
            pod_sandbox_status: sandbox.map(Sandbox::status),
            containers_statuses: statuses.iter().map(|c| c.status()).collect(),
        });
    }
}
