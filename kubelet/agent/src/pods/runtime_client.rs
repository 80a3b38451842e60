//! CRI calls as the pod code makes them: each with a deadline, each error naming the operation and its object.

use super::labels;
use super::runtime_state::{ContainerRecord, PodRuntime, SandboxRecord};
use crate::cri::Cri;
use orlop_proto::cri;
use std::collections::HashMap;
use std::future::Future;
use std::time::Duration;

/// A call to the runtime that failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RuntimeError {
    #[error("{operation} {object}: the runtime says: {message}")]
    Refused { operation: &'static str, object: String, code: tonic::Code, message: String },
    #[error("{operation} {object}: the runtime did not answer within {seconds} s")]
    Timeout { operation: &'static str, object: String, seconds: u64 },
    #[error("{operation} {object}: the runtime's answer lacks {missing}")]
    Incomplete { operation: &'static str, object: String, missing: &'static str },
}

impl RuntimeError {
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: tonic::Code::NotFound, .. })
    }

    /// The runtime's own words, without ours around them.
    #[must_use]
    pub fn words(&self) -> String {
        match self {
            Self::Refused { message, .. } => message.clone(),
            other => other.to_string(),
        }
    }
}

/// The runtime, with the deadline of ordinary calls.
#[derive(Debug, Clone)]
pub struct RuntimeClient {
    cri: Cri,
    timeout: Duration,
}

impl RuntimeClient {
    #[must_use]
    pub fn new(cri: Cri, timeout: Duration) -> Self {
        Self { cri, timeout }
    }

    async fn call<T>(
        &self,
        operation: &'static str,
        object: &str,
        timeout: Duration,
        future: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T, RuntimeError> {
        match tokio::time::timeout(timeout, future).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(RuntimeError::Refused {
                operation,
                object: object.to_owned(),
                code: status.code(),
                message: status.message().to_owned(),
            }),
            Err(_) => Err(RuntimeError::Timeout {
                operation,
                object: object.to_owned(),
                seconds: timeout.as_secs(),
            }),
        }
    }

    /// The runtime's name, the prefix of container ids.
    pub async fn name(&self) -> Result<String, RuntimeError> {
        let mut client = self.cri.runtime();
        let request = cri::VersionRequest { version: "v1".to_owned() };
        Ok(self
            .call("ask version of", "the runtime", self.timeout, Box::pin(client.version(request)))
            .await?
            .runtime_name)
    }

    /// All sandboxes, or those of one pod.
    pub async fn list_sandboxes(&self, uid: Option<&str>) -> Result<Vec<cri::PodSandbox>, RuntimeError> {
        let filter = uid.map(|uid| cri::PodSandboxFilter {
            label_selector: HashMap::from([(labels::POD_UID.to_owned(), uid.to_owned())]),
            ..cri::PodSandboxFilter::default()
        });
        let mut client = self.cri.runtime();
        let request = cri::ListPodSandboxRequest { filter };
        let object = uid.unwrap_or("all pods");
        Ok(self
            .call("list sandboxes of", object, self.timeout, Box::pin(client.list_pod_sandbox(request)))
            .await?
            .items)
    }

    /// All containers, or those of one pod.
    pub async fn list_containers(&self, uid: Option<&str>) -> Result<Vec<cri::Container>, RuntimeError> {
        let filter = uid.map(|uid| cri::ContainerFilter {
            label_selector: HashMap::from([(labels::POD_UID.to_owned(), uid.to_owned())]),
            ..cri::ContainerFilter::default()
        });
        let mut client = self.cri.runtime();
        let request = cri::ListContainersRequest { filter };
        let object = uid.unwrap_or("all pods");
        let answer = self
            .call("list containers of", object, self.timeout, Box::pin(client.list_containers(request)))
            .await?;
        Ok(answer.containers)
    }

    pub async fn sandbox(&self, id: &str) -> Result<SandboxRecord, RuntimeError> {
        const OPERATION: &str = "get status of sandbox";
        let mut client = self.cri.runtime();
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let answer =
            self.call(OPERATION, id, self.timeout, Box::pin(client.pod_sandbox_status(request))).await?;
        let missing =
            || RuntimeError::Incomplete { operation: OPERATION, object: id.to_owned(), missing: "status" };
        answer.status.map(SandboxRecord::from_cri).ok_or_else(missing)
    }

    /// None when the container is not a Kubernetes container.
    pub async fn container(&self, sandbox: &str, id: &str) -> Result<Option<ContainerRecord>, RuntimeError> {
        let mut client = self.cri.runtime();
        let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let call = Box::pin(client.container_status(request));
        let answer = self.call("get status of container", id, self.timeout, call).await?;
        Ok(answer.status.and_then(|status| ContainerRecord::from_cri(sandbox, status)))
    }

    /// Everything of one pod. `known` answers for containers whose state cannot change any more.
    pub async fn pod(
        &self,
        uid: &str,
        known: impl Fn(&str) -> Option<ContainerRecord>,
    ) -> Result<PodRuntime, RuntimeError> {
        let mut runtime = PodRuntime::default();
        for item in self.list_sandboxes(Some(uid)).await? {
            match self.sandbox(&item.id).await {
                Ok(sandbox) => runtime.sandboxes.push(sandbox),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        for item in self.list_containers(Some(uid)).await? {
            let exited = item.state == cri::ContainerState::ContainerExited as i32;
            if let Some(record) = exited.then(|| known(&item.id)).flatten() {
                runtime.containers.push(record);
                continue;
            }
            match self.container(&item.pod_sandbox_id, &item.id).await {
                Ok(record) => runtime.containers.extend(record),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        runtime.sort();
        Ok(runtime)
    }

    pub async fn run_sandbox(
        &self,
        config: cri::PodSandboxConfig,
        runtime_handler: String,
    ) -> Result<String, RuntimeError> {
        let object = config
            .metadata
            .as_ref()
            .map(|m| format!("of pod {}/{}", m.namespace, m.name))
            .unwrap_or_default();
        let mut client = self.cri.runtime();
        let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler };
        // Network set-up included, which may take as long again.
        let call = Box::pin(client.run_pod_sandbox(request));
        Ok(self.call("run sandbox", &object, self.timeout * 2, call).await?.pod_sandbox_id)
    }

    /// A sandbox that does not exist counts as stopped.
    pub async fn stop_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        let mut client = self.cri.runtime();
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        let call = Box::pin(client.stop_pod_sandbox(request));
        absent_is_fine(self.call("stop sandbox", id, self.timeout * 2, call).await.map(drop))
    }

    pub async fn remove_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        let mut client = self.cri.runtime();
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        let call = Box::pin(client.remove_pod_sandbox(request));
        absent_is_fine(self.call("remove sandbox", id, self.timeout, call).await.map(drop))
    }

    pub async fn create_container(
        &self,
        sandbox: &str,
        config: cri::ContainerConfig,
        sandbox_config: cri::PodSandboxConfig,
    ) -> Result<String, RuntimeError> {
        let object = config.metadata.as_ref().map(|metadata| metadata.name.clone()).unwrap_or_default();
        let mut client = self.cri.runtime();
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let call = Box::pin(client.create_container(request));
        Ok(self.call("create container", &object, self.timeout, call).await?.container_id)
    }

    pub async fn start_container(&self, id: &str) -> Result<(), RuntimeError> {
        let mut client = self.cri.runtime();
        let request = cri::StartContainerRequest { container_id: id.to_owned() };
        self.call("start container", id, self.timeout, Box::pin(client.start_container(request)))
            .await
            .map(drop)
    }

    /// A container that does not exist counts as stopped.
    pub async fn stop_container(&self, id: &str, grace_seconds: i64) -> Result<(), RuntimeError> {
        let mut client = self.cri.runtime();
        let request = cri::StopContainerRequest { container_id: id.to_owned(), timeout: grace_seconds };
        let patience = self.timeout + Duration::from_secs(grace_seconds.max(0).unsigned_abs());
        let call = Box::pin(client.stop_container(request));
        absent_is_fine(self.call("stop container", id, patience, call).await.map(drop))
    }

    pub async fn remove_container(&self, id: &str) -> Result<(), RuntimeError> {
        let mut client = self.cri.runtime();
        let request = cri::RemoveContainerRequest { container_id: id.to_owned() };
        let call = Box::pin(client.remove_container(request));
        absent_is_fine(self.call("remove container", id, self.timeout, call).await.map(drop))
    }

    /// None when the image is not on this machine.
    pub async fn image(&self, image: cri::ImageSpec) -> Result<Option<cri::Image>, RuntimeError> {
        let object = image.image.clone();
        let mut client = self.cri.images();
        let request = cri::ImageStatusRequest { image: Some(image), verbose: false };
        Ok(self
            .call("get status of image", &object, self.timeout, Box::pin(client.image_status(request)))
            .await?
            .image)
    }

    /// The reference under which the pulled image is known.
    pub async fn pull(
        &self,
        request: cri::PullImageRequest,
        patience: Duration,
    ) -> Result<String, RuntimeError> {
        let object = request.image.as_ref().map(|image| image.image.clone()).unwrap_or_default();
        let mut client = self.cri.images();
        Ok(self.call("pull image", &object, patience, Box::pin(client.pull_image(request))).await?.image_ref)
    }

    pub async fn list_images(&self) -> Result<Vec<cri::Image>, RuntimeError> {
        let mut client = self.cri.images();
        let call = Box::pin(client.list_images(cri::ListImagesRequest { filter: None }));
        Ok(self.call("list", "images", self.timeout, call).await?.images)
    }

    /// An image that does not exist counts as removed.
    pub async fn remove_image(&self, id: &str) -> Result<(), RuntimeError> {
        let mut client = self.cri.images();
        let image = Some(cri::ImageSpec { image: id.to_owned(), ..cri::ImageSpec::default() });
        let call = Box::pin(client.remove_image(cri::RemoveImageRequest { image }));
        absent_is_fine(self.call("remove image", id, self.timeout, call).await.map(drop))
    }

    /// A path on the file system that images lie on; none if the runtime does not tell.
    pub async fn image_mountpoint(&self) -> Result<Option<String>, RuntimeError> {
        let mut client = self.cri.images();
        let call = Box::pin(client.image_fs_info(cri::ImageFsInfoRequest {}));
        let answer = self.call("ask file system of", "images", self.timeout, call).await?;
        let first = answer.image_filesystems.into_iter().next();
        Ok(first.and_then(|one| one.fs_id).map(|id| id.mountpoint).filter(|path| !path.is_empty()))
    }

    /// Events of containers. The stream itself has no deadline: it lasts as long as the runtime.
    pub async fn events(&self) -> Result<tonic::Streaming<cri::ContainerEventResponse>, RuntimeError> {
        let mut client = self.cri.runtime();
        let call = Box::pin(client.get_container_events(cri::GetEventsRequest {}));
        self.call("watch events of", "the runtime", self.timeout, call).await
    }
}

fn absent_is_fine(result: Result<(), RuntimeError>) -> Result<(), RuntimeError> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}
