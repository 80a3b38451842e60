//! Containers: created, started, hooked, killed, removed.

use super::Executor;
use crate::pods::events::PodEvent;
use crate::pods::machine::{Event, KillRequest, StartFailure, StartRequest};
use crate::pods::parts::ContainerRequest;
use crate::pods::runtime_state::{ContainerRecord, RunState};
use crate::pods::{labels, logs};
use k8s_openapi::api::core::v1::{Container, Pod};
use orlop_proto::cri;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// However little of the grace is left, a container gets this long between the polite signal and the last one.
const LEAST_GRACE_SECONDS: i64 = 2;

impl Executor {
    /// Makes and starts a container and runs its postStart hook. The record tells its state after all that.
    pub(super) async fn start_container(
        &self,
        pod: &Arc<Pod>,
        request: StartRequest,
    ) -> Result<ContainerRecord, StartFailure> {
        let name = request.container.name.clone();
        let id = self.create(pod, &request).await.inspect_err(|failure| {
            self.report(pod, &name, PodEvent::warning("Failed", format!("Error: {}", failure.message)));
        })?;
        self.report(pod, &name, PodEvent::normal("Created", "Container created"));
        let (pod_name, namespace, _) = labels::identity(pod);
        let attempt = request.attempt;
        tracing::info!(pod = pod_name, namespace, container = name, id, attempt, "container created");
        if let Err(error) = self.services.runtime.start_container(&id).await {
            let failure = fail("RunContainerError", error.words());
            self.report(pod, &name, PodEvent::warning("Failed", format!("Error: {}", failure.message)));
            return Err(failure);
        }
        self.report(pod, &name, PodEvent::normal("Started", "Container started"));
        tracing::info!(pod = pod_name, namespace, container = name, id, attempt, "container started");
        self.link_log(pod, &request, &id);
        self.post_start(pod, &request.container, &id).await?;
        self.record(&request.sandbox.id, &id).await.map_err(|message| fail("RunContainerError", message))
    }

    async fn create(&self, pod: &Arc<Pod>, request: &StartRequest) -> Result<String, StartFailure> {
        let services = &self.services;
        let container = &request.container;
        let host_network = pod.spec.as_ref().is_some_and(|spec| spec.host_network == Some(true));
        let pod_ips = if host_network { services.context.host_ips() } else { request.sandbox.ips.clone() };
        let config = services
            .parts
            .container_config(ContainerRequest {
                pod: Arc::clone(pod),
                container: container.clone(),
                kind: request.kind,
                attempt: request.attempt,
                image: request.image.image.clone(),
                image_ref: request.image.image_ref.clone(),
                pod_ips,
            })
            .await
            .map_err(|error| {
                let reason =
                    if error.reason.is_empty() { "CreateContainerConfigError" } else { &error.reason };
                fail(reason, error.message.clone())
            })?;
        let plan = services.parts.sandbox_config(pod, request.sandbox.attempt).await;
        let plan = plan.map_err(|error| fail("CreateContainerConfigError", error.message))?;
        let sandbox_config = self.complete_sandbox(plan.config, pod, request.sandbox.attempt);
        let directory = logs::pod_directory(&services.context.settings, pod).join(&container.name);
        logs::make_directory(&directory).map_err(|error| {
            fail("CreateContainerError", format!("create log directory {}: {error}", directory.display()))
        })?;
        let config = complete_container(config, pod, request);
        let made = services.runtime.create_container(&request.sandbox.id, config, sandbox_config).await;
        made.map_err(|error| fail("CreateContainerError", error.words()))
    }

    fn link_log(&self, pod: &Pod, request: &StartRequest, id: &str) {
        let settings = &self.services.context.settings;
        let name = &request.container.name;
        let log = logs::pod_directory(settings, pod).join(labels::log_path(name, request.attempt));
        if let Err(error) = logs::link(settings, pod, name, id, &log) {
            tracing::warn!(container = name, %error, "log collectors will not find this container's log");
        }
    }

    async fn post_start(&self, pod: &Arc<Pod>, container: &Container, id: &str) -> Result<(), StartFailure> {
        let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.post_start.as_ref());
        let Some(hook) = hook else { return Ok(()) };
        let Err(error) = self.services.parts.hook(pod, container, id, hook).await else { return Ok(()) };
        self.report(pod, &container.name, PodEvent::warning("FailedPostStartHook", error.message.clone()));
        let message = format!("Container {} failed its postStart hook and will be killed", container.name);
        self.report(pod, &container.name, PodEvent::normal("Killing", message));
        let grace = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
        if let Err(stop) = self.services.runtime.stop_container(id, grace.max(LEAST_GRACE_SECONDS)).await {
            tracing::warn!(container = %container.name, error = %stop, "container with a failed postStart hook still runs");
        }
        Err(fail("PostStartHookError", error.message))
    }

    /// Runs the preStop hook and stops the container, both within the grace. The record tells how it ended.
    pub(super) async fn kill_container(
        &self,
        pod: &Arc<Pod>,
        request: KillRequest,
    ) -> Result<ContainerRecord, String> {
        let record = request.record;
        let begin = Instant::now();
        if !request.hurry && request.grace_seconds > 0 {
            self.pre_stop(pod, &record, request.grace_seconds).await;
        }
        let spent = i64::try_from(begin.elapsed().as_secs()).unwrap_or(i64::MAX);
        let left = request.grace_seconds.saturating_sub(spent).max(LEAST_GRACE_SECONDS);
        self.services.runtime.stop_container(&record.id, left).await.map_err(|error| {
            tracing::warn!(pod_uid = %self.uid, container = %record.name, %error, "container not stopped, will be tried again");
            error.to_string()
        })?;
        match self.record(&record.sandbox_id, &record.id).await {
            Ok(ended) => Ok(ended),
            // Gone altogether: how it ended will not be known any more.
            Err(_) => Ok(ContainerRecord {
                state: RunState::Exited,
                exit_code: 137,
                reason: "ContainerStatusUnknown".to_owned(),
                ..record
            }),
        }
    }

    async fn pre_stop(&self, pod: &Arc<Pod>, record: &ContainerRecord, grace_seconds: i64) {
        let spec = pod.spec.as_ref();
        let all = spec
            .into_iter()
            .flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
        let Some(container) = all.into_iter().find(|container| container.name == record.name) else { return };
        let hook = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref());
        let Some(hook) = hook.filter(|_| record.state == RunState::Running) else { return };
        let limit = Duration::from_secs(grace_seconds.unsigned_abs());
        let run = self.services.parts.hook(pod, container, &record.id, hook);
        let message = match tokio::time::timeout(limit, run).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.message,
            Err(_) => format!("preStop hook did not end within the grace period of {grace_seconds} s"),
        };
        self.report(pod, &record.name, PodEvent::warning("FailedPreStopHook", message));
    }

    async fn record(&self, sandbox: &str, id: &str) -> Result<ContainerRecord, String> {
        let found = self.services.runtime.container(sandbox, id).await.map_err(|error| error.to_string())?;
        let mut record =
            found.ok_or_else(|| format!("the runtime shows container {id} without its labels"))?;
        self.complete(&mut record).await;
        Ok(record)
    }

    /// Removes dead containers, their logs and links, and then dead sandboxes.
    pub(super) async fn remove(&self, containers: Vec<ContainerRecord>, sandboxes: Vec<String>) -> Event {
        let mut ids = Vec::new();
        for record in containers {
            match self.services.runtime.remove_container(&record.id).await {
                Ok(()) => {
                    let log = (!record.log_path.is_empty()).then(|| PathBuf::from(&record.log_path));
                    logs::remove_container(&self.services.context.settings, &record.id, log.as_deref());
                }
                Err(error) => tracing::warn!(pod_uid = %self.uid, %error, "dead container stays for now"),
            }
            ids.push(record.id);
        }
        for id in sandboxes {
            if let Err(error) = self.services.runtime.remove_sandbox(&id).await {
                tracing::warn!(pod_uid = %self.uid, %error, "dead sandbox stays for now");
            }
            ids.push(id);
        }
        Event::Removals { ids }
    }
}

fn fail(reason: &str, message: impl Into<String>) -> StartFailure {
    StartFailure { reason: reason.to_owned(), message: message.into() }
}

/// Writes into a container's configuration what we need to know again after a restart of our own.
fn complete_container(
    mut config: cri::ContainerConfig,
    pod: &Pod,
    request: &StartRequest,
) -> cri::ContainerConfig {
    let container = &request.container;
    config.metadata = Some(cri::ContainerMetadata { name: container.name.clone(), attempt: request.attempt });
    config.labels.extend(labels::container_labels(pod, &container.name));
    config.annotations.extend(labels::container_annotations(pod, container, request.attempt));
    config.log_path = labels::log_path(&container.name, request.attempt);
    if config.image.is_none() {
        config.image = Some(cri::ImageSpec {
            image: request.image.image_ref.clone(),
            user_specified_image: container.image.clone().unwrap_or_default(),
            ..cri::ImageSpec::default()
        });
    }
    config
}
