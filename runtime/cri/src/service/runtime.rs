//! RuntimeService: one short function per call.

use super::{Answers, CriService, chunks, shielded};
use crate::container::Container;
use crate::error::CriError;
use crate::sandbox::Sandbox;
use crate::streaming::StreamServer;
use orlop_proto::cri;
use orlop_proto::cri::runtime_service_server::RuntimeService;
use std::sync::Arc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::BroadcastStream;
use tonic::{Request, Response, Status, async_trait};

type Answer<T> = Result<Response<T>, Status>;

impl CriService {
    fn find_container(&self, id: &str) -> Result<Arc<Container>, CriError> {
        self.runtime.store.container(id).ok_or_else(|| CriError::container(id))
    }

    fn find_sandbox(&self, id: &str) -> Result<Arc<Sandbox>, CriError> {
        self.runtime.store.sandbox(id).ok_or_else(|| CriError::sandbox(id))
    }

    fn streams(&self) -> Result<&StreamServer, CriError> {
        self.runtime.streams.get().ok_or(CriError::Stream(crate::streaming::StreamError::ShuttingDown))
    }
}

/// A terminal has one output, and a session without any stream is a mistake.
fn check_streams(tty: bool, stdin: bool, stdout: bool, stderr: bool) -> Result<(), CriError> {
    let invalid = |reason: &str| Err(CriError::Invalid { field: "streams", reason: reason.to_owned() });
    if tty && stderr {
        return invalid("with a terminal there is no stderr");
    }
    if !(stdin || stdout || stderr) {
        return invalid("none of stdin, stdout and stderr is asked for");
    }
    Ok(())
}

fn unimplemented<T>(rpc: &'static str, reason: &'static str) -> Answer<T> {
    Err(CriError::Unimplemented { rpc, reason }.into())
}

const NO_METRICS: &str = "the kubelet's own metrics come from the statistics calls";

#[async_trait]
impl RuntimeService for CriService {
    async fn version(&self, _: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
        Ok(Response::new(self.version_response()))
    }

    async fn run_pod_sandbox(
        &self,
        request: Request<cri::RunPodSandboxRequest>,
    ) -> Answer<cri::RunPodSandboxResponse> {
        let runtime = self.runtime.clone();
        let request = request.into_inner();
        let pod_sandbox_id =
            shielded(|token| async move { runtime.run_sandbox(request, token).await }).await?;
        Ok(Response::new(cri::RunPodSandboxResponse { pod_sandbox_id }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<cri::StopPodSandboxRequest>,
    ) -> Answer<cri::StopPodSandboxResponse> {
        let runtime = self.runtime.clone();
        let id = request.into_inner().pod_sandbox_id;
        shielded(|_| async move { runtime.stop_sandbox(&id).await }).await?;
        Ok(Response::new(cri::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<cri::RemovePodSandboxRequest>,
    ) -> Answer<cri::RemovePodSandboxResponse> {
        let runtime = self.runtime.clone();
        let id = request.into_inner().pod_sandbox_id;
        shielded(|_| async move { runtime.remove_sandbox(&id).await }).await?;
        Ok(Response::new(cri::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<cri::PodSandboxStatusRequest>,
    ) -> Answer<cri::PodSandboxStatusResponse> {
        let request = request.into_inner();
        let sandbox = self.find_sandbox(&request.pod_sandbox_id)?;
        Ok(Response::new(self.runtime.sandbox_status(&sandbox, request.verbose)))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<cri::ListPodSandboxRequest>,
    ) -> Answer<cri::ListPodSandboxResponse> {
        let items = self.runtime.list_sandboxes(request.into_inner().filter);
        Ok(Response::new(cri::ListPodSandboxResponse { items }))
    }

    type StreamPodSandboxesStream = Answers<cri::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let items = self.runtime.list_sandboxes(request.into_inner().filter);
        Ok(Response::new(chunks(&items, |pod_sandboxes| cri::StreamPodSandboxesResponse { pod_sandboxes })))
    }

    async fn create_container(
        &self,
        request: Request<cri::CreateContainerRequest>,
    ) -> Answer<cri::CreateContainerResponse> {
        let runtime = self.runtime.clone();
        let request = request.into_inner();
        let container_id = shielded(|_| async move { runtime.create_container(request).await }).await?;
        Ok(Response::new(cri::CreateContainerResponse { container_id }))
    }

    async fn start_container(
        &self,
        request: Request<cri::StartContainerRequest>,
    ) -> Answer<cri::StartContainerResponse> {
        let container = self.find_container(&request.into_inner().container_id)?;
        let runtime = self.runtime.clone();
        shielded(|_| async move { runtime.start_container(&container).await }).await?;
        Ok(Response::new(cri::StartContainerResponse {}))
    }

    /// Not shielded: the wait ends with the caller, who will ask again.
    async fn stop_container(
        &self,
        request: Request<cri::StopContainerRequest>,
    ) -> Answer<cri::StopContainerResponse> {
        let request = request.into_inner();
        if let Some(container) = self.runtime.store.container(&request.container_id) {
            self.runtime.stop_container(&container, request.timeout).await?;
        }
        Ok(Response::new(cri::StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<cri::RemoveContainerRequest>,
    ) -> Answer<cri::RemoveContainerResponse> {
        if let Some(container) = self.runtime.store.container(&request.into_inner().container_id) {
            let runtime = self.runtime.clone();
            shielded(|_| async move { runtime.remove_container(&container).await }).await?;
        }
        Ok(Response::new(cri::RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<cri::ListContainersRequest>,
    ) -> Answer<cri::ListContainersResponse> {
        let containers = self.runtime.list_containers(request.into_inner().filter);
        Ok(Response::new(cri::ListContainersResponse { containers }))
    }

    type StreamContainersStream = Answers<cri::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<cri::StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let items = self.runtime.list_containers(request.into_inner().filter);
        Ok(Response::new(chunks(&items, |containers| cri::StreamContainersResponse { containers })))
    }

    async fn container_status(
        &self,
        request: Request<cri::ContainerStatusRequest>,
    ) -> Answer<cri::ContainerStatusResponse> {
        let request = request.into_inner();
        let container = self.find_container(&request.container_id)?;
        let info = if request.verbose { self.runtime.container_info(&container) } else { Default::default() };
        Ok(Response::new(cri::ContainerStatusResponse { status: Some(container.status()), info }))
    }

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Answer<cri::UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        let container = self.find_container(&request.container_id)?;
        let runtime = self.runtime.clone();
        let update = request.linux.unwrap_or_default();
        shielded(|_| async move { runtime.update_container_resources(&container, &update).await }).await?;
        Ok(Response::new(cri::UpdateContainerResourcesResponse {}))
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Answer<cri::ReopenContainerLogResponse> {
        let container = self.find_container(&request.into_inner().container_id)?;
        self.runtime.require_running(&container, "reopen the log of")?;
        self.runtime.keeper.reopen_log(&container.id).await.map_err(CriError::from)?;
        Ok(Response::new(cri::ReopenContainerLogResponse {}))
    }

    /// Not shielded: a caller that goes takes its command along.
    async fn exec_sync(&self, request: Request<cri::ExecSyncRequest>) -> Answer<cri::ExecSyncResponse> {
        let request = request.into_inner();
        let container = self.find_container(&request.container_id)?;
        Ok(Response::new(self.runtime.exec_sync(&container, &request).await?))
    }

    async fn exec(&self, request: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
        let mut request = request.into_inner();
        check_streams(request.tty, request.stdin, request.stdout, request.stderr)?;
        if request.cmd.is_empty() {
            return Err(CriError::Invalid { field: "cmd", reason: "it is empty".into() }.into());
        }
        let container = self.find_container(&request.container_id)?;
        self.runtime.require_running(&container, "run a command in")?;
        request.container_id.clone_from(&container.id);
        let url = self.streams()?.exec_url(request).map_err(CriError::from)?;
        Ok(Response::new(cri::ExecResponse { url }))
    }

    async fn attach(&self, request: Request<cri::AttachRequest>) -> Answer<cri::AttachResponse> {
        let mut request = request.into_inner();
        check_streams(request.tty, request.stdin, request.stdout, request.stderr)?;
        let container = self.find_container(&request.container_id)?;
        self.runtime.require_running(&container, "attach to")?;
        request.container_id.clone_from(&container.id);
        let url = self.streams()?.attach_url(request).map_err(CriError::from)?;
        Ok(Response::new(cri::AttachResponse { url }))
    }

    async fn port_forward(
        &self,
        request: Request<cri::PortForwardRequest>,
    ) -> Answer<cri::PortForwardResponse> {
        let mut request = request.into_inner();
        let sandbox = self.find_sandbox(&request.pod_sandbox_id)?;
        if sandbox.record().phase != crate::sandbox::Phase::Ready {
            return Err(CriError::WrongState {
                operation: "forward ports of",
                what: "sandbox",
                id: sandbox.id.clone(),
                state: "not ready",
            }
            .into());
        }
        request.pod_sandbox_id.clone_from(&sandbox.id);
        let url = self.streams()?.port_forward_url(request).map_err(CriError::from)?;
        Ok(Response::new(cri::PortForwardResponse { url }))
    }

    async fn container_stats(
        &self,
        request: Request<cri::ContainerStatsRequest>,
    ) -> Answer<cri::ContainerStatsResponse> {
        let container = self.find_container(&request.into_inner().container_id)?;
        let stats = Some(self.runtime.container_stats(&container).await);
        Ok(Response::new(cri::ContainerStatsResponse { stats }))
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Answer<cri::ListContainerStatsResponse> {
        let stats = self.runtime.list_container_stats(request.into_inner().filter).await;
        Ok(Response::new(cri::ListContainerStatsResponse { stats }))
    }

    type StreamContainerStatsStream = Answers<cri::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let stats = self.runtime.list_container_stats(request.into_inner().filter).await;
        Ok(Response::new(chunks(&stats, |container_stats| cri::StreamContainerStatsResponse {
            container_stats,
        })))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<cri::PodSandboxStatsRequest>,
    ) -> Answer<cri::PodSandboxStatsResponse> {
        let sandbox = self.find_sandbox(&request.into_inner().pod_sandbox_id)?;
        let stats = Some(self.runtime.sandbox_stats(&sandbox).await?);
        Ok(Response::new(cri::PodSandboxStatsResponse { stats }))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Answer<cri::ListPodSandboxStatsResponse> {
        let stats = self.runtime.list_sandbox_stats(request.into_inner().filter).await;
        Ok(Response::new(cri::ListPodSandboxStatsResponse { stats }))
    }

    type StreamPodSandboxStatsStream = Answers<cri::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let stats = self.runtime.list_sandbox_stats(request.into_inner().filter).await;
        Ok(Response::new(chunks(&stats, |pod_sandbox_stats| cri::StreamPodSandboxStatsResponse {
            pod_sandbox_stats,
        })))
    }

    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Answer<cri::UpdateRuntimeConfigResponse> {
        let config = request.into_inner().runtime_config.and_then(|c| c.network_config).unwrap_or_default();
        if !config.pod_cidr.is_empty() {
            self.runtime.network.set_pod_cidrs(&config.pod_cidr).await.map_err(CriError::NetworkConfig)?;
        }
        Ok(Response::new(cri::UpdateRuntimeConfigResponse {}))
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        Ok(Response::new(self.status_response(request.into_inner().verbose).await))
    }

    async fn checkpoint_container(
        &self,
        _: Request<cri::CheckpointContainerRequest>,
    ) -> Answer<cri::CheckpointContainerResponse> {
        unimplemented("CheckpointContainer", "this runtime cannot freeze a process to disk")
    }

    type GetContainerEventsStream = Answers<cri::ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _: Request<cri::GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        // A subscriber that fell behind has lost events: it goes on with the next, and the kubelet relists anyway.
        let events = BroadcastStream::new(self.runtime.events.subscribe());
        Ok(Response::new(Box::pin(events.filter_map(|event| event.ok().map(Ok)))))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Answer<cri::ListMetricDescriptorsResponse> {
        unimplemented("ListMetricDescriptors", NO_METRICS)
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Answer<cri::ListPodSandboxMetricsResponse> {
        unimplemented("ListPodSandboxMetrics", NO_METRICS)
    }

    type StreamPodSandboxMetricsStream = Answers<cri::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        unimplemented("StreamPodSandboxMetrics", NO_METRICS)
    }

    async fn runtime_config(
        &self,
        _: Request<cri::RuntimeConfigRequest>,
    ) -> Answer<cri::RuntimeConfigResponse> {
        let linux = cri::LinuxRuntimeConfiguration { cgroup_driver: cri::CgroupDriver::Cgroupfs as i32 };
        Ok(Response::new(cri::RuntimeConfigResponse { linux: Some(linux) }))
    }

    /// The kubelet writes the pod's cgroup itself; what it tells us is kept with the sandbox.
    async fn update_pod_sandbox_resources(
        &self,
        request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<cri::UpdatePodSandboxResourcesResponse> {
        let request = request.into_inner();
        let sandbox = self.find_sandbox(&request.pod_sandbox_id)?;
        let _operation = sandbox.operation.lock().await;
        self.runtime
            .update_sandbox(&sandbox, |record| {
                let linux = record.config.0.linux.get_or_insert_default();
                if request.overhead.is_some() {
                    linux.overhead = request.overhead;
                }
                if request.resources.is_some() {
                    linux.resources = request.resources;
                }
            })
            .await?;
        Ok(Response::new(cri::UpdatePodSandboxResourcesResponse {}))
    }
}
