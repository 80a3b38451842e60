//! Pods driven through a CRI socket, and how long every step takes. The same code drives every runtime.

use crate::bench::figures::Timings;
use crate::bench::processes::WORKLOAD;
use crate::wait::Hopeless;
use anyhow::{Context, Result, bail};
use orlop_proto::cri;
use orlop_proto::cri::image_service_client::ImageServiceClient;
use orlop_proto::cri::runtime_service_client::RuntimeServiceClient;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};

/// No call may hold up the run for longer.
const PATIENCE: Duration = Duration::from_secs(120);
/// More than any list of this benchmark.
const LARGEST_ANSWER: usize = 16 << 20;

/// A runtime's socket.
#[derive(Debug, Clone)]
pub struct Socket {
    runtime: RuntimeServiceClient<Channel>,
    image: String,
    /// The node's `/var/log` as seen from here.
    logs: PathBuf,
}

/// A pod that runs.
#[derive(Debug, Clone)]
pub struct Pod {
    sandbox: String,
    container: String,
}

impl Socket {
    /// Waits until the runtime answers, calls itself ready and has the image.
    pub async fn connect(
        path: &Path,
        image: &str,
        logs: PathBuf,
        mut alive: impl FnMut() -> Result<()>,
    ) -> Result<Self> {
        let start = Instant::now();
        loop {
            alive()?;
            match Self::try_connect(path, image, &logs).await {
                Ok(socket) => return Ok(socket),
                Err(last) if start.elapsed() > Duration::from_secs(60) || last.is::<Hopeless>() => {
                    return Err(last.context(format!("{} does not become ready", path.display())));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    async fn try_connect(path: &Path, image: &str, logs: &Path) -> Result<Self> {
        let endpoint = Endpoint::from_shared(format!("unix://{}", path.display()))?.timeout(PATIENCE);
        let channel = endpoint.connect().await?;
        let mut runtime =
            RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(LARGEST_ANSWER);
        let status = runtime.status(cri::StatusRequest { verbose: false }).await?.into_inner();
        for condition in status.status.unwrap_or_default().conditions {
            if condition.r#type.ends_with("Ready") && !condition.status {
                bail!("{} is false: {}", condition.r#type, condition.message);
            }
        }
        let spec = cri::ImageSpec { image: image.to_owned(), ..Default::default() };
        let request = cri::ImageStatusRequest { image: Some(spec), verbose: false };
        let known = ImageServiceClient::new(channel).image_status(request).await?.into_inner();
        known.image.with_context(|| format!("image {image} is not there"))?;
        Ok(Self { runtime, image: image.to_owned(), logs: logs.to_owned() })
    }

    pub async fn version(&self) -> Result<String> {
        let answer = self.runtime.clone().version(cri::VersionRequest::default()).await?.into_inner();
        Ok(format!("{} {}", answer.runtime_name, answer.runtime_version))
    }

    fn sandbox_config(&self, name: &str) -> Result<cri::PodSandboxConfig> {
        std::fs::create_dir_all(self.logs.join("pods").join(name)).context("make a log folder")?;
        let namespaces =
            cri::NamespaceOption { pid: cri::NamespaceMode::Container.into(), ..Default::default() };
        let security =
            cri::LinuxSandboxSecurityContext { namespace_options: Some(namespaces), ..Default::default() };
        Ok(cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: name.to_owned(),
                uid: name.to_owned(),
                namespace: "bench".to_owned(),
                attempt: 0,
            }),
            log_directory: format!("/var/log/pods/{name}"),
            linux: Some(cri::LinuxPodSandboxConfig {
                security_context: Some(security),
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    async fn start_pod(&self, name: &str, timings: &mut Timings) -> Result<Pod> {
        let mut runtime = self.runtime.clone();
        let config = self.sandbox_config(name)?;
        let begin = Instant::now();
        let request = cri::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
        let sandbox = runtime.run_pod_sandbox(request).await.context("RunPodSandbox")?.into_inner();
        let sandbox = sandbox.pod_sandbox_id;
        let sandboxed = Instant::now();
        let container = cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: "main".to_owned(), attempt: 0 }),
            image: Some(cri::ImageSpec { image: self.image.clone(), ..Default::default() }),
            command: WORKLOAD.map(str::to_owned).to_vec(),
            log_path: "main.log".to_owned(),
            linux: Some(cri::LinuxContainerConfig::default()),
            ..Default::default()
        };
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: sandbox.clone(),
            config: Some(container),
            sandbox_config: Some(config),
        };
        let container = runtime.create_container(request).await.context("CreateContainer")?.into_inner();
        let container = container.container_id;
        let created = Instant::now();
        let request = cri::StartContainerRequest { container_id: container.clone() };
        runtime.start_container(request).await.context("StartContainer")?;
        let started = Instant::now();
        timings.add("run_sandbox", sandboxed - begin);
        timings.add("create", created - sandboxed);
        timings.add("start", started - created);
        timings.add("pod", started - begin);
        Ok(Pod { sandbox, container })
    }

    async fn stop_pod(&self, pod: &Pod, timings: &mut Timings) -> Result<()> {
        let mut runtime = self.runtime.clone();
        let begin = Instant::now();
        let request = cri::StopContainerRequest { container_id: pod.container.clone(), timeout: 0 };
        runtime.stop_container(request).await.context("StopContainer")?;
        let stopped = Instant::now();
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: pod.sandbox.clone() };
        runtime.stop_pod_sandbox(request).await.context("StopPodSandbox")?;
        let torn_down = Instant::now();
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: pod.sandbox.clone() };
        runtime.remove_pod_sandbox(request).await.context("RemovePodSandbox")?;
        timings.add("stop_container", stopped - begin);
        timings.add("stop_sandbox", torn_down - stopped);
        timings.add("remove_sandbox", torn_down.elapsed());
        timings.add("stop_remove", begin.elapsed());
        Ok(())
    }

    /// Starts so many pods, some at a time; says how long it took until the last one ran.
    pub async fn start_pods(
        &self,
        prefix: &str,
        count: usize,
        parallel: usize,
        timings: &mut Timings,
    ) -> Result<(Vec<Pod>, Duration)> {
        let names = (0..count).map(|n| format!("{prefix}-{n}")).collect();
        let begin = Instant::now();
        let pods = at_a_time(
            names,
            parallel,
            timings,
            |socket: Self, name: String| async move {
                let mut own = Timings::default();
                let pod = Box::pin(socket.start_pod(&name, &mut own))
                    .await
                    .with_context(|| format!("pod {name}"))?;
                Ok((pod, own))
            },
            self,
        )
        .await?;
        Ok((pods, begin.elapsed()))
    }

    /// Stops and removes pods, some at a time.
    pub async fn stop_pods(
        &self,
        pods: Vec<Pod>,
        parallel: usize,
        timings: &mut Timings,
    ) -> Result<Duration> {
        let begin = Instant::now();
        at_a_time(
            pods,
            parallel,
            timings,
            |socket: Self, pod: Pod| async move {
                let mut own = Timings::default();
                socket.stop_pod(&pod, &mut own).await.with_context(|| format!("sandbox {}", pod.sandbox))?;
                Ok(((), own))
            },
            self,
        )
        .await?;
        Ok(begin.elapsed())
    }

    /// Runs `/bin/true` in a pod, one after the other.
    pub async fn exec(&self, pod: &Pod, count: usize, timings: &mut Timings) -> Result<()> {
        for _ in 0..count {
            let request = cri::ExecSyncRequest {
                container_id: pod.container.clone(),
                cmd: vec!["/bin/true".to_owned()],
                timeout: 10,
            };
            let begin = Instant::now();
            let answer = self.runtime.clone().exec_sync(request).await.context("ExecSync")?.into_inner();
            timings.add("exec_sync", begin.elapsed());
            if answer.exit_code != 0 {
                bail!("/bin/true in a container ended with {}", answer.exit_code);
            }
        }
        Ok(())
    }

    /// Lists containers and their statistics; fails unless all of the pods are in the answer.
    pub async fn lists(&self, pods: usize, count: usize, timings: &mut Timings) -> Result<()> {
        for _ in 0..count {
            let begin = Instant::now();
            let request = cri::ListContainersRequest::default();
            let listed = self.runtime.clone().list_containers(request).await.context("ListContainers")?;
            timings.add("list_containers", begin.elapsed());
            let begin = Instant::now();
            let request = cri::ListContainerStatsRequest::default();
            let stats =
                self.runtime.clone().list_container_stats(request).await.context("ListContainerStats")?;
            timings.add("list_stats", begin.elapsed());
            let found = (listed.into_inner().containers.len(), stats.into_inner().stats.len());
            if found != (pods, pods) {
                bail!("{pods} containers run, but {} are listed and {} have statistics", found.0, found.1);
            }
        }
        Ok(())
    }
}

/// Does something with every item, at most `parallel` at once, and gathers results in order and timings.
async fn at_a_time<I, T, F>(
    items: Vec<I>,
    parallel: usize,
    timings: &mut Timings,
    work: impl Fn(Socket, I) -> F,
    socket: &Socket,
) -> Result<Vec<T>>
where
    I: Send + 'static,
    T: Send + 'static,
    F: Future<Output = Result<(T, Timings)>> + Send + 'static,
{
    let gate = Arc::new(Semaphore::new(parallel));
    let mut running = JoinSet::new();
    for (number, item) in items.into_iter().enumerate() {
        let (gate, task) = (gate.clone(), work(socket.clone(), item));
        running.spawn(async move {
            let _permit = gate.acquire_owned().await?;
            anyhow::Ok((number, task.await?))
        });
    }
    let mut done = Vec::new();
    while let Some(finished) = running.join_next().await {
        let (number, (result, own)) = finished??;
        timings.merge(own);
        done.push((number, result));
    }
    done.sort_by_key(|(number, _)| *number);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}
