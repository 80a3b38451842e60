//! Carries out what a pod's state machine decided. Each action runs as a task of its own; its result goes back to the
//! pod's worker as an event. Nothing here decides, and nothing here waits for another pod.

mod container;
mod message;
mod sandbox;
mod teardown;

use super::events::PodEvent;
use super::images::ImageManager;
use super::machine::{Action, Event, StartFailure};
use super::parts::PodParts;
use super::runtime_client::RuntimeClient;
use super::runtime_state::{ContainerRecord, PodRuntime};
use crate::context::Context;
use futures_util::FutureExt;
use k8s_openapi::api::core::v1::Pod;
use std::collections::HashMap;
use std::fmt;
use std::panic::AssertUnwindSafe;
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

/// What is told when carrying out an action broke down: the same as of any other failure, so that it is tried again.
enum Breakdown {
    Event(Box<Event>),
    StartContainer(String),
    EnsureImage(String),
}

const BROKE_DOWN: &str =
    "the work broke down for a reason that is in the kubelet's log; it will be tried again";

impl Breakdown {
    fn of(action: &Action) -> Self {
        let failed = || Err(BROKE_DOWN.to_owned());
        let event = match action {
            Action::StartContainer(request) => return Self::StartContainer(request.container.name.clone()),
            Action::EnsureImage { container } => return Self::EnsureImage(container.name.clone()),
            Action::Inspect { .. } => Event::ObservationFailed,
            Action::PrepareHost => Event::HostPrepared(failed()),
            Action::Mount => Event::Mounted(failed()),
            Action::CreateSandbox { .. } => Event::SandboxCreated(Err(BROKE_DOWN.to_owned())),
            Action::StopSandbox { id } => Event::SandboxStopped { id: id.clone(), result: failed() },
            Action::Kill(request) => {
                Event::ContainerKilled { id: request.record.id.clone(), result: Err(BROKE_DOWN.to_owned()) }
            }
            Action::Remove { containers, sandboxes } => Event::Removals {
                ids: containers.iter().map(|c| c.id.clone()).chain(sandboxes.iter().cloned()).collect(),
            },
            Action::TearDown => Event::TornDown(failed()),
            Action::Purge { .. } => Event::Purged(failed()),
            Action::StartProbes(_)
            | Action::StopProbes { .. }
            | Action::TerminateProbes
            | Action::DeleteFromApi
            | Action::Report(..) => Event::Tick,
        };
        Self::Event(Box::new(event))
    }

    fn into_event(self) -> Event {
        let failure =
            |reason: &str| StartFailure { reason: reason.to_owned(), message: BROKE_DOWN.to_owned() };
        match self {
            Self::Event(event) => *event,
            Self::StartContainer(container) => {
                Event::ContainerStarted { container, result: Err(failure("CreateContainerError")) }
            }
            Self::EnsureImage(container) => {
                Event::ImageReady { container, result: Err(failure("ErrImagePull")) }
            }
        }
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
            Action::TerminateProbes => self.services.parts.terminate_probes(&self.uid),
            // The worker's own business: the status writer does it.
            Action::DeleteFromApi => {}
            action => {
                let this = self.clone();
                let breakdown = Breakdown::of(&action);
                tokio::spawn(async move {
                    let work = AssertUnwindSafe(this.carry_out(action, pod)).catch_unwind();
                    // Without a result the machine would wait for one forever.
                    let event = work.await.unwrap_or_else(|_| breakdown.into_event());
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
            | Action::TerminateProbes
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
