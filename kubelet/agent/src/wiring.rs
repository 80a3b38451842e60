//! Lays the pod code's seams on the modules that do the work: podspec, volumes, hooks, probes, objects, events.

use crate::config::Config;
use crate::cri::Cri;
use crate::hooks::{self, HookTarget};
use crate::node::Machine;
use crate::objects::Objects;
use crate::pods::directory::PodDirectory;
use crate::pods::events::{Echo, EventSink, Events, PodEvent, Severity};
use crate::pods::parts::{
    ContainerKind, ContainerRequest, PartError, PodParts, ProbeKind, ProbeOutcome, ProbeTarget, SandboxPlan,
};
use crate::podspec::quantity::Amount;
use crate::podspec::{self, CgroupDriver, ContainerInputs, Facts, SharedFacts};
use crate::probes::{self, Outcome, ProbeEvent, Prober, Transition};
use crate::volumes::{MountedVolumes, Volumes};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Node, ObjectReference, Pod};
use k8s_openapi::api::node::v1::RuntimeClass;
use orlop_api::Client;
use orlop_api::events::{EventKind, EventRecorder};
use orlop_proto::cri;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};

/// A hook that runs longer has hung; a shorter limit is set by whoever waits for it.
const HOOK_LIMIT: Duration = Duration::from_secs(3600);

/// The real neighbours of the pod code.
pub(crate) struct Parts {
    /// None in standalone mode.
    pub(crate) api: Option<Client>,
    pub(crate) facts: SharedFacts,
    pub(crate) objects: Objects,
    pub(crate) volumes: Volumes,
    pub(crate) prober: Prober,
    pub(crate) cri: Cri,
    pub(crate) events: Events,
    pub(crate) directory: PodDirectory,
    /// What is mounted for each pod, between its mounting and its unmounting.
    pub(crate) mounted: Mutex<HashMap<String, Arc<MountedVolumes>>>,
}

impl Parts {
    fn facts(&self) -> Arc<Facts> {
        Arc::clone(&self.facts.borrow())
    }

    fn mounted(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<MountedVolumes>>> {
        self.mounted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The runtime handler of a RuntimeClass. A pod without one has the default handler.
    async fn handler(&self, class: &str) -> Result<String, PartError> {
        if class.is_empty() {
            return Ok(String::new());
        }
        let Some(api) = &self.api else {
            let message =
                format!("RuntimeClass {class:?} cannot be looked up on a node without an API server");
            return Err(failed("FailedCreatePodSandBox", &message));
        };
        let path = format!("/apis/node.k8s.io/v1/runtimeclasses/{class}");
        let found: RuntimeClass =
            api.get(&path).await.map_err(|error| failed("FailedCreatePodSandBox", &error))?;
        Ok(found.handler)
    }

    async fn container(&self, request: ContainerRequest) -> Result<cri::ContainerConfig, PartError> {
        let uid = podspec::uid(&request.pod);
        let mounted = self.mounted().get(uid).cloned().unwrap_or_default();
        let ephemeral = request.pod.spec.iter().flat_map(|spec| spec.ephemeral_containers.iter().flatten());
        let target = ephemeral
            .filter(|one| one.name == request.container.name)
            .find_map(|one| one.target_container_name.as_deref())
            .and_then(|name| self.directory.running_container(uid, name));
        let inputs = ContainerInputs {
            pod: &request.pod,
            container: &request.container,
            kind: match request.kind {
                ContainerKind::Init => podspec::ContainerKind::Init,
                ContainerKind::Main => podspec::ContainerKind::Main,
                ContainerKind::Ephemeral => podspec::ContainerKind::Ephemeral,
            },
            attempt: request.attempt,
            image: &request.image,
            image_ref: &request.image_ref,
            pod_ips: &request.pod_ips,
            mounted: &mounted,
            target_id: target.as_deref(),
        };
        podspec::container_config(&self.facts(), &self.objects, inputs)
            .await
            .map_err(|error| PartError { reason: error.reason().to_owned(), message: error.to_string() })
    }
}

fn failed(reason: &str, error: &impl ToString) -> PartError {
    PartError { reason: reason.to_owned(), message: error.to_string() }
}

impl PodParts for Parts {
    fn sandbox_config<'a>(
        &'a self,
        pod: &'a Arc<Pod>,
        attempt: u32,
    ) -> BoxFuture<'a, Result<SandboxPlan, PartError>> {
        async move {
            let spec = podspec::sandbox_spec(&self.facts(), pod, attempt).await;
            let spec = spec.map_err(|error| failed("FailedCreatePodSandBox", &error))?;
            for warning in spec.warnings {
                self.events.emit(pod, PodEvent::warning(warning.reason, warning.message));
            }
            let class = pod.spec.as_ref().and_then(|spec| spec.runtime_class_name.as_deref());
            let runtime_handler = self.handler(class.unwrap_or_default()).await?;
            Ok(SandboxPlan { config: spec.config, runtime_handler })
        }
        .boxed()
    }

    fn container_config(
        &self,
        request: ContainerRequest,
    ) -> BoxFuture<'_, Result<cri::ContainerConfig, PartError>> {
        self.container(request).boxed()
    }

    fn mount<'a>(&'a self, pod: &'a Arc<Pod>) -> BoxFuture<'a, Result<(), PartError>> {
        async move {
            self.objects.register(pod);
            let mounted = self.volumes.mount(pod).await.map_err(|error| failed(error.reason(), &error))?;
            self.mounted().insert(podspec::uid(pod).to_owned(), Arc::new(mounted));
            Ok(())
        }
        .boxed()
    }

    fn unmount<'a>(&'a self, pod_uid: &'a str) -> BoxFuture<'a, Result<(), PartError>> {
        async move {
            self.volumes.unmount(pod_uid).await.map_err(|error| failed(error.reason(), &error))?;
            self.objects.unregister(pod_uid);
            self.mounted().remove(pod_uid);
            Ok(())
        }
        .boxed()
    }

    fn remove<'a>(&'a self, pod_uid: &'a str) -> BoxFuture<'a, Result<(), PartError>> {
        async move {
            self.volumes.remove(pod_uid).await.map_err(|error| failed(error.reason(), &error))?;
            self.objects.unregister(pod_uid);
            self.mounted().remove(pod_uid);
            Ok(())
        }
        .boxed()
    }

    fn hook<'a>(
        &'a self,
        pod: &'a Arc<Pod>,
        container: &'a Container,
        container_id: &'a str,
        handler: &'a LifecycleHandler,
    ) -> BoxFuture<'a, Result<(), PartError>> {
        async move {
            let pod_ip = self.directory.pod_ip(podspec::uid(pod));
            let target = HookTarget { pod, container, container_id, pod_ip };
            hooks::run(&self.cri, target, handler, HOOK_LIMIT)
                .await
                .map_err(|error| failed("PostStartHookError", &error))
        }
        .boxed()
    }

    fn start_probes(&self, target: ProbeTarget) {
        let ProbeTarget { pod, container, container_id, pod_ip, seed, running_for } = target;
        let pod_ip = pod_ip.or_else(|| self.facts().host_ips.first().copied());
        let seed = probes::Seed { started: seed.started, ready: seed.ready, running_for };
        self.prober.start(&pod, &container, &container_id, pod_ip, seed);
    }

    fn stop_probes(&self, container_id: &str) {
        self.prober.stop(container_id);
    }

    fn terminate_probes(&self, pod_uid: &str) {
        self.prober.terminating(pod_uid);
    }
}

/// Takes the prober's findings to the pods' tasks, and tells of failures.
pub(crate) async fn relay_probes(
    mut findings: mpsc::UnboundedReceiver<ProbeEvent>,
    outcomes: mpsc::Sender<ProbeOutcome>,
    directory: PodDirectory,
    events: Events,
) {
    while let Some(finding) = findings.recv().await {
        if let (Some(message), Some(pod)) = (finding.message(), directory.by_uid(&finding.pod_uid)) {
            let is_warning = matches!(finding.outcome, Outcome::Warning { .. });
            let reason = if is_warning { "ProbeWarning" } else { "Unhealthy" };
            events.emit(&pod, PodEvent::warning(reason, message).of_container(&pod, &finding.container));
        }
        let Some(transition) = finding.transition else { continue };
        let outcome = ProbeOutcome {
            pod_uid: finding.pod_uid,
            container: finding.container,
            container_id: finding.container_id,
            kind: match finding.kind {
                probes::ProbeKind::Startup => ProbeKind::Startup,
                probes::ProbeKind::Liveness => ProbeKind::Liveness,
                probes::ProbeKind::Readiness => ProbeKind::Readiness,
            },
            healthy: matches!(transition, Transition::Started | Transition::Ready),
            grace_seconds: match transition {
                Transition::Kill { grace_seconds } => grace_seconds,
                Transition::Started | Transition::Ready | Transition::NotReady => None,
            },
        };
        if outcomes.send(outcome).await.is_err() {
            return;
        }
    }
}

/// Pods' events as events of the API, and in our log.
pub(crate) struct Recorder {
    pub(crate) recorder: EventRecorder,
    pub(crate) echo: Echo,
}

impl EventSink for Recorder {
    fn emit(&self, pod: &Pod, event: PodEvent) {
        self.echo.tell(pod, &event, Instant::now());
        let about = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            uid: pod.metadata.uid.clone(),
            resource_version: pod.metadata.resource_version.clone(),
            field_path: event.field_path,
        };
        let kind = match event.severity {
            Severity::Normal => EventKind::Normal,
            Severity::Warning => EventKind::Warning,
        };
        self.recorder.event(&about, kind, event.reason, &event.message);
    }
}

/// What pods' specifications depend on, followed as the Node changes.
pub(crate) fn follow_facts(config: Arc<Config>, mut node: watch::Receiver<Option<Arc<Node>>>) -> SharedFacts {
    let memory = Machine::read(Path::new("/"), &config.settings.root_dir).map_or(0, |machine| machine.memory);
    let first = facts(&config, node.borrow_and_update().as_deref(), memory);
    let (publish, facts_now) = watch::channel(Arc::new(first));
    tokio::spawn(async move {
        while node.changed().await.is_ok() {
            let fresh = facts(&config, node.borrow_and_update().as_deref(), memory);
            if publish.send(Arc::new(fresh)).is_err() {
                return;
            }
        }
    });
    facts_now
}

fn facts(config: &Config, node: Option<&Node>, memory: u64) -> Facts {
    let raw = &config.raw;
    let status = node.and_then(|node| node.status.as_ref());
    let addresses = status.and_then(|status| status.addresses.as_ref()).into_iter().flatten();
    let mut host_ips: Vec<_> =
        addresses.filter(|a| a.type_ == "InternalIP").filter_map(|a| a.address.parse().ok()).collect();
    if host_ips.is_empty() {
        host_ips.clone_from(&config.node_ips);
    }
    let allocatable: BTreeMap<String, Amount> = status
        .and_then(|status| status.allocatable.as_ref())
        .into_iter()
        .flatten()
        .filter_map(|(name, quantity)| Some((name.clone(), Amount::try_from(quantity).ok()?)))
        .collect();
    let handlers = status.and_then(|status| status.runtime_handlers.as_ref()).into_iter().flatten();
    let recursive = handlers.filter(|handler| {
        handler.features.as_ref().is_some_and(|features| features.recursive_read_only_mounts == Some(true))
    });
    Facts {
        hostname: config.hostname.clone(),
        host_ips,
        root_dir: config.settings.root_dir.clone(),
        pod_logs_dir: config.settings.pod_logs_dir.clone(),
        cluster_domain: raw.cluster_domain.clone(),
        cluster_dns: raw.cluster_dns.iter().filter_map(|address| address.parse().ok()).collect(),
        resolv_conf: (!raw.resolv_conf.is_empty()).then(|| raw.resolv_conf.clone().into()),
        cgroup_driver: if raw.cgroup_driver == "systemd" {
            CgroupDriver::Systemd
        } else {
            CgroupDriver::Cgroupfs
        },
        cgroup_root: config.settings.cgroup_root.clone(),
        memory_capacity: memory,
        allocatable,
        hugepage_sizes: podspec::facts::hugepage_sizes(Path::new("/sys/kernel/mm/hugepages")),
        seccomp_default: raw.seccomp_default,
        cpu_cfs_quota: raw.cpu_cfs_quota,
        cpu_cfs_period_us: u32::try_from(raw.cpu_cfs_quota_period.0.as_micros()).unwrap_or(100_000),
        single_process_oom_kill: raw.single_process_oom_kill == Some(true),
        swap_accounting: false,
        recursive_read_only_handlers: recursive
            .map(|handler| handler.name.clone().unwrap_or_default())
            .collect(),
        ..Facts::new(&config.node_name)
    }
}
