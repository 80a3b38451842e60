//! What a person does at the node. Every command talks to the node's CRI socket, so it works on whatever answers there.

pub mod containers;
pub(crate) mod exec;
pub mod images;
pub mod logs;
pub mod table;
mod terminal;

use anyhow::{Context, Result, bail};
use orlop_proto::cri::image_service_client::ImageServiceClient;
use orlop_proto::cri::runtime_service_client::RuntimeServiceClient;
use orlop_proto::cri::{Container, ContainerFilter, ContainerState, ListContainersRequest, VersionRequest};
use tonic::transport::{Channel, Endpoint};

pub(crate) const POD_NAME: &str = "io.kubernetes.pod.name";
pub(crate) const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
pub(crate) const CONTAINER_NAME: &str = "io.kubernetes.container.name";

/// A connection to the node's runtime.
#[derive(Debug, Clone)]
pub struct NodeSocket {
    pub runtime: RuntimeServiceClient<Channel>,
    pub images: ImageServiceClient<Channel>,
}

impl NodeSocket {
    pub async fn connect(endpoint: &str) -> Result<Self> {
        let path = endpoint.strip_prefix("unix://").unwrap_or(endpoint);
        let channel =
            Endpoint::from_shared(format!("unix://{path}"))?.connect().await.with_context(|| {
                format!(
                    "reach the runtime at {path}: is orlop.service running? (--endpoint names another socket)"
                )
            })?;
        let mut runtime = RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(16 << 20);
        runtime
            .version(VersionRequest::default())
            .await
            .with_context(|| format!("ask {path} for its version"))?;
        Ok(Self { runtime, images: ImageServiceClient::new(channel).max_decoding_message_size(16 << 20) })
    }

    /// The one container that `name` means: an id (or its beginning), or a pod's name with the container's name beside
    /// it where the pod has several. Running ones go before ended ones, younger before older.
    pub async fn find_container(
        &mut self,
        name: &str,
        container: Option<&str>,
        namespace: Option<&str>,
    ) -> Result<Container> {
        let request = ListContainersRequest { filter: Some(ContainerFilter::default()) };
        let mut all = self.runtime.list_containers(request).await?.into_inner().containers;
        all.sort_by_key(|c| (c.state != ContainerState::ContainerRunning as i32, -c.created_at));
        let label = |c: &Container, key: &str| c.labels.get(key).cloned().unwrap_or_default();
        if let Some(by_id) = all.iter().find(|c| name.len() >= 4 && c.id.starts_with(name)) {
            return Ok(by_id.clone());
        }
        let of_pod: Vec<&Container> = all
            .iter()
            .filter(|c| label(c, POD_NAME) == name && namespace.is_none_or(|n| label(c, POD_NAMESPACE) == n))
            .filter(|c| container.is_none_or(|n| label(c, CONTAINER_NAME) == n))
            .collect();
        let Some(first) = of_pod.first() else {
            bail!(
                "no container of a pod called {name:?} and none whose id begins so; `orlop ps -a` lists all"
            );
        };
        let mut names: Vec<String> = of_pod.iter().map(|c| label(c, CONTAINER_NAME)).collect();
        names.sort();
        names.dedup();
        if names.len() > 1 {
            bail!("pod {name} has several containers, choose one with -c: {}", names.join(", "));
        }
        Ok((*first).clone())
    }
}
