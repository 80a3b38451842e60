//! Live pods and running containers as the runtime has them, with what it says they use.

use super::cgroup::Group;
use crate::pods::{cgroups, labels};
use crate::podspec::qos as qos_class;
use crate::server::Parts;
use k8s_openapi::api::core::v1::Pod;
use orlop_proto::cri::{
    Container, ContainerFilter, ContainerState, ContainerStateValue, ContainerStats, LinuxPodSandboxStats,
    ListContainerStatsRequest, ListContainersRequest, ListPodSandboxRequest, ListPodSandboxStatsRequest,
    PodSandbox, PodSandboxFilter, PodSandboxState, PodSandboxStateValue, PodSandboxStats,
};
use std::collections::HashMap;
use std::path::PathBuf;
use tonic::{Code, Response, Status};

/// A pod with a live sandbox.
#[derive(Debug)]
pub(super) struct PodUsage {
    pub(super) sandbox: String,
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) uid: String,
    pub(super) created: i64,
    /// None when the kubelet makes no cgroup for it.
    pub(super) cgroup: Option<PodGroup>,
    pub(super) host_network: bool,
    /// Of the pod as a whole; its containers are taken out.
    pub(super) usage: LinuxPodSandboxStats,
    pub(super) containers: Vec<ContainerUsage>,
}

#[derive(Debug)]
pub(super) struct PodGroup {
    /// As it is written below the mount.
    pub(super) path: String,
    pub(super) group: Group,
}

/// The newest running container of its name.
#[derive(Debug)]
pub(super) struct ContainerUsage {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) image: String,
    pub(super) created: i64,
    pub(super) usage: ContainerStats,
}

/// What a runtime answers, nothing if it has no such call.
fn optional<T: Default>(answer: Result<Response<T>, Status>) -> Result<T, Status> {
    match answer {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) if status.code() == Code::Unimplemented => Ok(T::default()),
        Err(status) => Err(status),
    }
}

pub(super) async fn pods(parts: &Parts) -> Result<Vec<PodUsage>, Status> {
    let ready = PodSandboxFilter {
        state: Some(PodSandboxStateValue { state: PodSandboxState::SandboxReady as i32 }),
        ..PodSandboxFilter::default()
    };
    let running = ContainerFilter {
        state: Some(ContainerStateValue { state: ContainerState::ContainerRunning as i32 }),
        ..ContainerFilter::default()
    };
    let (mut first, mut second, mut third) = (parts.cri.runtime(), parts.cri.runtime(), parts.cri.runtime());
    let (sandboxes, containers, stats) = tokio::join!(
        first.list_pod_sandbox(ListPodSandboxRequest { filter: Some(ready) }),
        second.list_containers(ListContainersRequest { filter: Some(running) }),
        third.list_pod_sandbox_stats(ListPodSandboxStatsRequest::default()),
    );
    let containers = newest(containers?.into_inner().containers);
    let mut usage = Usage::of(optional(stats)?.stats);
    if containers.iter().any(|container| !usage.containers.contains_key(&container.id)) {
        let list = parts.cri.runtime().list_container_stats(ListContainerStatsRequest::default()).await;
        usage.take(optional(list)?.stats);
    }
    Ok(assemble(parts, sandboxes?.into_inner().items, containers, usage))
}

/// By id.
#[derive(Default)]
struct Usage {
    sandboxes: HashMap<String, LinuxPodSandboxStats>,
    containers: HashMap<String, ContainerStats>,
}

impl Usage {
    fn of(stats: Vec<PodSandboxStats>) -> Self {
        let mut usage = Self::default();
        for one in stats {
            let (Some(attributes), Some(mut linux)) = (one.attributes, one.linux) else { continue };
            usage.take(std::mem::take(&mut linux.containers));
            usage.sandboxes.insert(attributes.id, linux);
        }
        usage
    }

    fn take(&mut self, stats: Vec<ContainerStats>) {
        for one in stats {
            let Some(id) = one.attributes.as_ref().map(|attributes| attributes.id.clone()) else { continue };
            self.containers.insert(id, one);
        }
    }
}

/// The newest of each name in each sandbox, by name.
fn newest(mut containers: Vec<Container>) -> Vec<Container> {
    let name = |one: &Container| one.labels.get(labels::CONTAINER_NAME).cloned().unwrap_or_default();
    containers.retain(|one| {
        one.state == ContainerState::ContainerRunning as i32
            && one.labels.contains_key(labels::CONTAINER_NAME)
    });
    containers
        .sort_by_cached_key(|one| (one.pod_sandbox_id.clone(), name(one), std::cmp::Reverse(one.created_at)));
    containers.dedup_by_key(|one| (one.pod_sandbox_id.clone(), name(one)));
    containers
}

fn assemble(
    parts: &Parts,
    mut sandboxes: Vec<PodSandbox>,
    containers: Vec<Container>,
    mut usage: Usage,
) -> Vec<PodUsage> {
    let mut inside: HashMap<String, Vec<Container>> = HashMap::new();
    for container in containers {
        inside.entry(container.pod_sandbox_id.clone()).or_default().push(container);
    }
    sandboxes.retain(|one| {
        one.state == PodSandboxState::SandboxReady as i32 && one.labels.contains_key(labels::POD_UID)
    });
    let uid = |one: &PodSandbox| one.labels.get(labels::POD_UID).cloned().unwrap_or_default();
    sandboxes.sort_by_cached_key(|one| (uid(one), std::cmp::Reverse(one.created_at)));
    sandboxes.dedup_by_key(|one| uid(one));
    sandboxes
        .into_iter()
        .filter_map(|sandbox| {
            let known = parts.pods.by_uid(&uid(&sandbox));
            if known.as_deref().is_some_and(has_ended) {
                return None;
            }
            let containers = inside.remove(&sandbox.id).unwrap_or_default();
            Some(one(parts, sandbox, known.as_deref(), containers, &mut usage))
        })
        .collect()
}

fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn one(
    parts: &Parts,
    mut sandbox: PodSandbox,
    known: Option<&Pod>,
    containers: Vec<Container>,
    usage: &mut Usage,
) -> PodUsage {
    let mut label = |key: &str| sandbox.labels.remove(key).unwrap_or_default();
    let (name, namespace, uid) =
        (label(labels::POD_NAME), label(labels::POD_NAMESPACE), label(labels::POD_UID));
    let settings = &parts.config.settings;
    let cgroup = known.filter(|_| settings.cgroups_per_qos).map(|pod| {
        let path = cgroups::pod_path(settings, qos_class(pod), &uid);
        PodGroup { group: Group::at(&settings.cgroup_mount, PathBuf::from(&path)), path }
    });
    let containers = containers.into_iter().map(|mut container| ContainerUsage {
        name: container.labels.remove(labels::CONTAINER_NAME).unwrap_or_default(),
        image: image_name(&mut container),
        created: container.created_at,
        usage: usage.containers.remove(&container.id).unwrap_or_default(),
        id: container.id,
    });
    PodUsage {
        name,
        namespace,
        cgroup,
        created: sandbox.created_at,
        host_network: known.and_then(|pod| pod.spec.as_ref()?.host_network).unwrap_or(false),
        containers: containers.collect(),
        usage: usage.sandboxes.remove(&sandbox.id).unwrap_or_default(),
        uid,
        sandbox: sandbox.id,
    }
}

/// As somebody wrote it, if the runtime still knows.
fn image_name(container: &mut Container) -> String {
    let spec = container.image.take().unwrap_or_default();
    [spec.user_specified_image, spec.image, std::mem::take(&mut container.image_ref)]
        .into_iter()
        .find(|name| !name.is_empty())
        .unwrap_or_default()
}
