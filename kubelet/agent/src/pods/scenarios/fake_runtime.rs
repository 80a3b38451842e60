//! A container runtime in memory, behind the real CRI wire types. Containers live until a test, or a stop, ends them.

use crate::cri::Cri;
use crate::pods::labels;
use jiff::Timestamp;
use orlop_proto::cri::image_service_server::{ImageService, ImageServiceServer};
use orlop_proto::cri::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use orlop_proto::cri::*;
use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::broadcast;
use tonic::{Request, Response, Status};

#[derive(Debug, Default)]
struct State {
    next: u64,
    sandboxes: BTreeMap<String, PodSandboxStatus>,
    containers: BTreeMap<String, (String, ContainerStatus)>,
    images: BTreeMap<String, Image>,
    /// Images no registry has.
    missing: Vec<String>,
    /// What was asked, in order, as `verb object`.
    calls: Vec<String>,
    /// Containers that end by themselves as soon as they are started, by name, with their exit code.
    exits_at_once: HashMap<String, i32>,
    /// Containers that take no notice of SIGTERM: they end when the grace is over.
    stubborn: Vec<String>,
    /// Lists of all pods get no answer; lists of one pod do.
    hangs_on_lists: bool,
}

/// Clones are the same runtime.
#[derive(Debug, Clone)]
pub(super) struct FakeRuntime {
    state: Arc<Mutex<State>>,
    events: broadcast::Sender<ContainerEventResponse>,
}

impl FakeRuntime {
    pub(super) fn new() -> Self {
        Self { state: Arc::default(), events: broadcast::channel(1024).0 }
    }

    pub(super) fn cri(&self) -> Cri {
        Cri::new(RuntimeServiceServer::new(self.clone()), ImageServiceServer::new(self.clone()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(super) fn calls(&self) -> Vec<String> {
        self.state().calls.clone()
    }

    pub(super) fn count(&self, prefix: &str) -> usize {
        self.state().calls.iter().filter(|call| call.starts_with(prefix)).count()
    }

    pub(super) fn exits_at_once(&self, container: &str, code: i32) {
        self.state().exits_at_once.insert(container.to_owned(), code);
    }

    pub(super) fn is_stubborn(&self, container: &str) {
        self.state().stubborn.push(container.to_owned());
    }

    pub(super) fn hangs_on_lists(&self, hangs: bool) {
        self.state().hangs_on_lists = hangs;
    }

    pub(super) fn lacks_image(&self, image: &str) {
        self.state().missing.push(image.to_owned());
    }

    pub(super) fn has_image_now(&self, image: &str) {
        self.state().missing.retain(|missing| missing != image);
    }

    pub(super) fn is_empty(&self) -> bool {
        let state = self.state();
        state.sandboxes.is_empty() && state.containers.is_empty()
    }

    /// Names of running containers.
    pub(super) fn running(&self) -> Vec<String> {
        let running = ContainerState::ContainerRunning as i32;
        let state = self.state();
        let alive = state.containers.values().filter(|(_, status)| status.state == running);
        alive.map(|(_, status)| status.metadata.as_ref().unwrap().name.clone()).collect()
    }

    /// Ends the running container of that name.
    pub(super) fn exit(&self, name: &str, code: i32) {
        let running = ContainerState::ContainerRunning as i32;
        let id = {
            let state = self.state();
            let mut all = state.containers.iter();
            let found =
                all.find(|(_, (_, s))| s.state == running && s.metadata.as_ref().unwrap().name == name);
            found.unwrap_or_else(|| panic!("{name} does not run")).0.clone()
        };
        self.end(&id, code);
    }

    /// The sandbox dies, and everything in it.
    pub(super) fn lose_sandboxes(&self) {
        let ids: Vec<String> = {
            let mut state = self.state();
            for sandbox in state.sandboxes.values_mut() {
                sandbox.state = PodSandboxState::SandboxNotready as i32;
            }
            state.containers.keys().cloned().collect()
        };
        for id in ids {
            self.end(&id, 137);
        }
    }

    fn end(&self, id: &str, code: i32) {
        let mut state = self.state();
        let Some((_, status)) = state.containers.get_mut(id) else { return };
        if status.state != ContainerState::ContainerRunning as i32 {
            return;
        }
        status.state = ContainerState::ContainerExited as i32;
        status.exit_code = code;
        status.finished_at = nanos();
        status.reason = if code == 0 { "Completed" } else { "Error" }.to_owned();
        let event = ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: ContainerEventType::ContainerStoppedEvent as i32,
            containers_statuses: vec![status.clone()],
            ..ContainerEventResponse::default()
        };
        drop(state);
        self.events.send(event).ok();
    }

    fn id(state: &mut State, kind: &str) -> String {
        state.next += 1;
        format!("{kind}-{}", state.next)
    }
}

fn nanos() -> i64 {
    i64::try_from(Timestamp::now().as_nanosecond()).unwrap()
}

fn not_found(id: &str) -> Status {
    Status::not_found(format!("{id} does not exist"))
}

fn selected(filter: Option<&HashMap<String, String>>, labels: &HashMap<String, String>) -> bool {
    filter.is_none_or(|filter| filter.iter().all(|(key, value)| labels.get(key) == Some(value)))
}

type Answer<T> = Result<Response<T>, Status>;
type Stream<T> = Pin<Box<dyn futures_util::Stream<Item = Result<T, Status>> + Send>>;

/// The methods that a kubelet's pods need are written out; the others refuse.
macro_rules! runtime_service {
    ({ $($written:tt)* } refuse: $($name:ident($request:ty) -> $response:ty;)*) => {
        #[tonic::async_trait]
        impl RuntimeService for FakeRuntime {
            $($written)*
            $(async fn $name(&self, _: Request<$request>) -> Answer<$response> {
                Err(Status::unimplemented(stringify!($name)))
            })*
        }
    };
}

runtime_service! {
    {
        type StreamPodSandboxesStream = Stream<StreamPodSandboxesResponse>;
        type StreamContainersStream = Stream<StreamContainersResponse>;
        type StreamContainerStatsStream = Stream<StreamContainerStatsResponse>;
        type StreamPodSandboxStatsStream = Stream<StreamPodSandboxStatsResponse>;
        type StreamPodSandboxMetricsStream = Stream<StreamPodSandboxMetricsResponse>;
        type GetContainerEventsStream = Stream<ContainerEventResponse>;

        async fn version(&self, _: Request<VersionRequest>) -> Answer<VersionResponse> {
            Ok(Response::new(VersionResponse { runtime_name: "fake".into(), ..VersionResponse::default() }))
        }

        async fn run_pod_sandbox(&self, request: Request<RunPodSandboxRequest>) -> Answer<RunPodSandboxResponse> {
            let config = request.into_inner().config.unwrap();
            let mut state = self.state();
            let id = Self::id(&mut state, "sandbox");
            state.calls.push(format!("sandbox {}", config.metadata.as_ref().unwrap().attempt));
            let ip = format!("10.0.0.{}", state.next);
            state.sandboxes.insert(id.clone(), PodSandboxStatus {
                id: id.clone(),
                metadata: config.metadata,
                state: PodSandboxState::SandboxReady as i32,
                created_at: nanos(),
                network: Some(PodSandboxNetworkStatus { ip, additional_ips: Vec::new() }),
                labels: config.labels,
                annotations: config.annotations,
                ..PodSandboxStatus::default()
            });
            Ok(Response::new(RunPodSandboxResponse { pod_sandbox_id: id }))
        }

        async fn stop_pod_sandbox(&self, request: Request<StopPodSandboxRequest>) -> Answer<StopPodSandboxResponse> {
            let id = request.into_inner().pod_sandbox_id;
            let mut state = self.state();
            state.calls.push("stop-sandbox".into());
            if let Some(sandbox) = state.sandboxes.get_mut(&id) {
                sandbox.state = PodSandboxState::SandboxNotready as i32;
            }
            Ok(Response::new(Default::default()))
        }

        async fn remove_pod_sandbox(&self, request: Request<RemovePodSandboxRequest>) -> Answer<RemovePodSandboxResponse> {
            let mut state = self.state();
            state.calls.push("remove-sandbox".into());
            state.sandboxes.remove(&request.into_inner().pod_sandbox_id);
            Ok(Response::new(Default::default()))
        }

        async fn pod_sandbox_status(&self, request: Request<PodSandboxStatusRequest>) -> Answer<PodSandboxStatusResponse> {
            let id = request.into_inner().pod_sandbox_id;
            let status = self.state().sandboxes.get(&id).cloned().ok_or_else(|| not_found(&id))?;
            Ok(Response::new(PodSandboxStatusResponse { status: Some(status), ..PodSandboxStatusResponse::default() }))
        }

        async fn list_pod_sandbox(&self, request: Request<ListPodSandboxRequest>) -> Answer<ListPodSandboxResponse> {
            let filter = request.into_inner().filter.map(|filter| filter.label_selector);
            while filter.is_none() && self.state().hangs_on_lists {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            let state = self.state();
            let all = state.sandboxes.values().filter(|one| selected(filter.as_ref(), &one.labels)).cloned();
            let items = all.map(|one| PodSandbox {
                id: one.id,
                metadata: one.metadata,
                state: one.state,
                created_at: one.created_at,
                labels: one.labels,
                annotations: one.annotations,
                runtime_handler: String::new(),
            });
            Ok(Response::new(ListPodSandboxResponse { items: items.collect() }))
        }

        async fn create_container(&self, request: Request<CreateContainerRequest>) -> Answer<CreateContainerResponse> {
            let request = request.into_inner();
            let config = request.config.unwrap();
            let mut state = self.state();
            let id = Self::id(&mut state, "container");
            let metadata = config.metadata.clone().unwrap();
            state.calls.push(format!("create {} {}", metadata.name, metadata.attempt));
            let status = ContainerStatus {
                id: id.clone(),
                metadata: config.metadata,
                state: ContainerState::ContainerCreated as i32,
                created_at: nanos(),
                image: config.image,
                image_ref: "sha256:fake".into(),
                labels: config.labels,
                annotations: config.annotations,
                mounts: config.mounts,
                log_path: format!("{}/{}", request.sandbox_config.unwrap().log_directory, config.log_path),
                ..ContainerStatus::default()
            };
            state.containers.insert(id.clone(), (request.pod_sandbox_id, status));
            Ok(Response::new(CreateContainerResponse { container_id: id }))
        }

        async fn start_container(&self, request: Request<StartContainerRequest>) -> Answer<StartContainerResponse> {
            let id = request.into_inner().container_id;
            let exit = {
                let mut state = self.state();
                let (_, status) = state.containers.get_mut(&id).ok_or_else(|| not_found(&id))?;
                status.state = ContainerState::ContainerRunning as i32;
                status.started_at = nanos();
                let name = status.metadata.as_ref().unwrap().name.clone();
                state.calls.push(format!("start {name}"));
                state.exits_at_once.get(&name).copied()
            };
            if let Some(code) = exit {
                self.end(&id, code);
            }
            Ok(Response::new(Default::default()))
        }

        async fn stop_container(&self, request: Request<StopContainerRequest>) -> Answer<StopContainerResponse> {
            let StopContainerRequest { container_id: id, timeout } = request.into_inner();
            let is_stubborn = {
                let mut state = self.state();
                let (_, status) = state.containers.get(&id).ok_or_else(|| not_found(&id))?;
                let name = status.metadata.as_ref().unwrap().name.clone();
                state.calls.push(format!("stop {name} {timeout}"));
                state.stubborn.contains(&name)
            };
            if is_stubborn {
                tokio::time::sleep(std::time::Duration::from_secs(timeout.unsigned_abs())).await;
            }
            self.end(&id, if is_stubborn { 137 } else { 0 });
            Ok(Response::new(Default::default()))
        }

        async fn remove_container(&self, request: Request<RemoveContainerRequest>) -> Answer<RemoveContainerResponse> {
            let id = request.into_inner().container_id;
            let mut state = self.state();
            if let Some((_, status)) = state.containers.remove(&id) {
                let name = status.metadata.unwrap().name;
                state.calls.push(format!("remove {name}"));
            }
            Ok(Response::new(Default::default()))
        }

        async fn list_containers(&self, request: Request<ListContainersRequest>) -> Answer<ListContainersResponse> {
            let filter = request.into_inner().filter.map(|filter| filter.label_selector);
            let state = self.state();
            let all = state.containers.values().filter(|(_, one)| selected(filter.as_ref(), &one.labels)).cloned();
            let containers = all.map(|(pod_sandbox_id, one)| Container {
                id: one.id,
                pod_sandbox_id,
                metadata: one.metadata,
                state: one.state,
                created_at: one.created_at,
                labels: one.labels,
                annotations: one.annotations,
                ..Container::default()
            });
            Ok(Response::new(ListContainersResponse { containers: containers.collect() }))
        }

        async fn container_status(&self, request: Request<ContainerStatusRequest>) -> Answer<ContainerStatusResponse> {
            let id = request.into_inner().container_id;
            let found = self.state().containers.get(&id).cloned().ok_or_else(|| not_found(&id))?;
            Ok(Response::new(ContainerStatusResponse { status: Some(found.1), info: HashMap::new() }))
        }

        async fn get_container_events(&self, _: Request<GetEventsRequest>) -> Answer<Self::GetContainerEventsStream> {
            let receiver = self.events.subscribe();
            let stream = futures_util::stream::unfold(receiver, |mut receiver| async move {
                let event = receiver.recv().await.ok()?;
                Some((Ok(event), receiver))
            });
            Ok(Response::new(Box::pin(stream)))
        }

        async fn stream_pod_sandboxes(&self, _: Request<StreamPodSandboxesRequest>) -> Answer<Self::StreamPodSandboxesStream> {
            Err(Status::unimplemented("stream"))
        }
        async fn stream_containers(&self, _: Request<StreamContainersRequest>) -> Answer<Self::StreamContainersStream> {
            Err(Status::unimplemented("stream"))
        }
        async fn stream_container_stats(&self, _: Request<StreamContainerStatsRequest>) -> Answer<Self::StreamContainerStatsStream> {
            Err(Status::unimplemented("stream"))
        }
        async fn stream_pod_sandbox_stats(&self, _: Request<StreamPodSandboxStatsRequest>) -> Answer<Self::StreamPodSandboxStatsStream> {
            Err(Status::unimplemented("stream"))
        }
        async fn stream_pod_sandbox_metrics(&self, _: Request<StreamPodSandboxMetricsRequest>) -> Answer<Self::StreamPodSandboxMetricsStream> {
            Err(Status::unimplemented("stream"))
        }
    }
    refuse:
    update_container_resources(UpdateContainerResourcesRequest) -> UpdateContainerResourcesResponse;
    reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse;
    exec_sync(ExecSyncRequest) -> ExecSyncResponse;
    exec(ExecRequest) -> ExecResponse;
    attach(AttachRequest) -> AttachResponse;
    port_forward(PortForwardRequest) -> PortForwardResponse;
    container_stats(ContainerStatsRequest) -> ContainerStatsResponse;
    list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse;
    pod_sandbox_stats(PodSandboxStatsRequest) -> PodSandboxStatsResponse;
    list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> ListPodSandboxStatsResponse;
    update_runtime_config(UpdateRuntimeConfigRequest) -> UpdateRuntimeConfigResponse;
    status(StatusRequest) -> StatusResponse;
    checkpoint_container(CheckpointContainerRequest) -> CheckpointContainerResponse;
    list_metric_descriptors(ListMetricDescriptorsRequest) -> ListMetricDescriptorsResponse;
    list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) -> ListPodSandboxMetricsResponse;
    runtime_config(RuntimeConfigRequest) -> RuntimeConfigResponse;
    update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest) -> UpdatePodSandboxResourcesResponse;
}

#[tonic::async_trait]
impl ImageService for FakeRuntime {
    type StreamImagesStream = Stream<StreamImagesResponse>;

    async fn image_status(&self, request: Request<ImageStatusRequest>) -> Answer<ImageStatusResponse> {
        let name = request.into_inner().image.unwrap().image;
        let image = self.state().images.get(&name).cloned();
        Ok(Response::new(ImageStatusResponse { image, info: HashMap::new() }))
    }

    async fn pull_image(&self, request: Request<PullImageRequest>) -> Answer<PullImageResponse> {
        let name = request.into_inner().image.unwrap().image;
        let mut state = self.state();
        state.calls.push(format!("pull {name}"));
        if state.missing.contains(&name) {
            return Err(Status::unknown(format!("{name}: not found in the registry")));
        }
        let image = Image { id: "sha256:fake".into(), repo_tags: vec![name.clone()], ..Image::default() };
        state.images.insert(name, image);
        Ok(Response::new(PullImageResponse { image_ref: "sha256:fake".into() }))
    }

    async fn list_images(&self, _: Request<ListImagesRequest>) -> Answer<ListImagesResponse> {
        Ok(Response::new(Default::default()))
    }
    async fn stream_images(&self, _: Request<StreamImagesRequest>) -> Answer<Self::StreamImagesStream> {
        Err(Status::unimplemented("stream"))
    }
    async fn remove_image(&self, _: Request<RemoveImageRequest>) -> Answer<RemoveImageResponse> {
        Ok(Response::new(Default::default()))
    }
    async fn image_fs_info(&self, _: Request<ImageFsInfoRequest>) -> Answer<ImageFsInfoResponse> {
        Ok(Response::new(Default::default()))
    }
}

/// What a container must carry so that a restarted kubelet knows it again.
pub(super) fn carries_identity(runtime: &FakeRuntime) -> bool {
    runtime.state().containers.values().all(|(_, status)| {
        [labels::POD_UID, labels::POD_NAME, labels::POD_NAMESPACE, labels::CONTAINER_NAME]
            .iter()
            .all(|key| status.labels.contains_key(*key))
            && status.annotations.contains_key(labels::CONTAINER_HASH)
            && status.annotations.contains_key(labels::RESTART_COUNT)
    })
}
