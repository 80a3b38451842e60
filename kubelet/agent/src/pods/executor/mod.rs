//! Carries out what a pod's state machine decided. Each action runs as a task of its own; its result goes back to the
//! pod's worker as an event. Nothing here decides, and nothing here waits for another pod.

mod container;
mod message;
mod sandbox;
mod teardown;

pub(crate) use teardown::remove_pod_directory;

use super::events::PodEvent;
use super::images::ImageManager;
use super::machine::{Action, Event};
use super::parts::PodParts;
use super::runtime_client::RuntimeClient;
use super::runtime_state::{ContainerRecord, PodRuntime};
use crate::context::Context;
use k8s_openapi::api::core::v1::Pod;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::mpsc;

/// What all pods' executors share.
#[derive(Clone)]
pub struct Services {
    pub context: Arc<Context>,
    pub runtime: RuntimeClient,
    pub parts: Arc<dyn PodParts>,
    pub images: Arc<ImageManager>,
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Services")
    }
}

/// One pod's executor. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Executor {
    services: Services,
    uid: Arc<str>,
    results: mpsc::UnboundedSender<Event>,
    /// Containers that have ended, with their termination messages: they are asked for once.
    ended: Arc<Mutex<HashMap<String, ContainerRecord>>>,
}

impl Executor {
    #[must_use]
    pub fn new(services: Services, uid: &str, results: mpsc::UnboundedSender<Event>) -> Self {
        Self { services, uid: uid.into(), results, ended: Arc::default() }
    }

    /// Tells the worker something as if an action had told it.
    pub fn tell(&self, event: Event) {
        self.results.send(event).ok();
    }

    /// Begins an action for the pod as it is specified now.
    pub fn begin(&self, action: Action, pod: Arc<Pod>) {
        match action {
            Action::Report(event, pod) => self.services.context.events.emit(&pod, event),
            Action::StartProbes(target) => self.services.parts.start_probes(*target),
            Action::StopProbes { container_id } => self.services.parts.stop_probes(&container_id),
            // The worker's own business: the status writer does it.
            Action::DeleteFromApi => {}
            action => {
                let this = self.clone();
                tokio::spawn(async move {
                    let event = this.carry_out(action, pod).await;
                    // A worker that has ended needs no result.
                    this.results.send(event).ok();
                });
            }
        }
    }

    async fn carry_out(&self, action: Action, pod: Arc<Pod>) -> Event {
        match action {
            Action::Inspect { epoch } => match self.inspect().await {
                Ok(runtime) => Event::Observed { epoch, runtime },
                Err(error) => {
                    tracing::warn!(pod_uid = %self.uid, %error, "pod cannot be observed, will be tried again");
                    Event::ObservationFailed
                }
            },
            Action::PrepareHost => Event::HostPrepared(self.prepare_host(&pod).await),
            Action::Mount => {
                let mounted = self.services.parts.mount(&pod).await;
                Event::Mounted(mounted.map_err(|error| error.message))
            }
            Action::CreateSandbox { attempt } => {
                Event::SandboxCreated(self.create_sandbox(&pod, attempt).await)
            }
            Action::StopSandbox { id } => {
                let result = self.services.runtime.stop_sandbox(&id).await.map_err(|error| error.to_string());
                Event::SandboxStopped { id, result }
            }
            Action::EnsureImage { container } => {
                let result = self.services.images.ensure(&pod, &container).await;
                Event::ImageReady { container: container.name, result }
            }
            Action::StartContainer(request) => {
                let container = request.container.name.clone();
                let result = self.start_container(&pod, *request).await;
                Event::ContainerStarted { container, result }
            }
            Action::Kill(request) => {
                let id = request.record.id.clone();
                let result = self.kill_container(&pod, *request).await;
                Event::ContainerKilled { id, result }
            }
            Action::Remove { containers, sandboxes } => self.remove(containers, sandboxes).await,
            Action::TearDown => Event::TornDown(self.tear_down().await),
            Action::Purge { containers, sandboxes } => {
                Event::Purged(self.purge(&pod, containers, sandboxes).await)
            }
            Action::Report(..)
            | Action::StartProbes(_)
            | Action::StopProbes { .. }
            | Action::DeleteFromApi => Event::Tick,
        }
    }

    async fn inspect(&self) -> Result<PodRuntime, super::runtime_client::RuntimeError> {
        let known = |id: &str| self.ended().get(id).cloned();
        let mut runtime = self.services.runtime.pod(&self.uid, known).await?;
        for record in &mut runtime.containers {
            self.complete(record).await;
        }
        let present: std::collections::HashSet<String> =
            runtime.containers.iter().map(|c| c.id.clone()).collect();
        self.ended().retain(|id, _| present.contains(id));
        Ok(runtime)
    }

    /// Adds the termination message to a container that has ended, once.
    async fn complete(&self, record: &mut ContainerRecord) {
        if !record.has_exited() || self.ended().contains_key(&record.id) {
            return;
        }
        message::add(record).await;
        self.ended().insert(record.id.clone(), record.clone());
    }

    fn ended(&self) -> std::sync::MutexGuard<'_, HashMap<String, ContainerRecord>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, pod: &Pod, container: &str, event: PodEvent) {
        self.services.context.events.emit(pod, event.of_container(pod, container));
    }
}

/// Runs blocking file work away from the tasks that must not wait, and gives its error as words.
async fn blocking<E: fmt::Display + Send + 'static>(
    work: impl FnOnce() -> Result<(), E> + Send + 'static,
) -> Result<(), String> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(error) => Err(format!("file work ended abnormally: {error}")),
    }
}
