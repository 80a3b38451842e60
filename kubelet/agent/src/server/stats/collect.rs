//! Puts a summary together.

use super::Extent;
use super::cgroup::Group;
use super::convert;
use super::host::{Host, Process};
use super::model::{
    Container, Cpu, Fs, Memory, Moment, Node, Pod, PodRef, Processes, Runtime, Summary, Swap, Volume,
};
use super::runtime::{self, ContainerUsage, PodUsage};
use super::sample::Round;
use super::storage::{self, Files, PodFiles, PodPaths, Used};
use crate::server::Parts;
use orlop_proto::cri::{FilesystemUsage, ImageFsInfoRequest, ImageFsInfoResponse};
use std::path::Path;
use std::time::Duration;
use tonic::Status;

/// Counting files may take so long; then the summary goes without.
const LOOKING: Duration = Duration::from_secs(10);
/// Where the service of a runtime lives by default: our own containers' parent, then others.
const RUNTIMES: [&str; 3] =
    ["system.slice/orlop-keeper.service", "system.slice/containerd.service", "system.slice/crio.service"];

pub(super) async fn summary(parts: &Parts, extent: Extent, now: i64) -> Result<Summary, Status> {
    let pods = runtime::pods(parts).await?;
    let disk = match extent {
        Extent::Everything => Some(Disk::look(parts, &pods, now).await),
        Extent::CpuAndMemory => None,
    };
    let mut round = parts.statistics.samples.round();
    let node = node(parts, disk.as_ref(), now, &mut round);
    let pods = pods.iter().enumerate().map(|(index, usage)| {
        let mut one = pod(usage, extent, now, &mut round);
        if let Some(disk) = &disk {
            disk.add(index, usage, &mut one);
        }
        one
    });
    Ok(Summary { pods: pods.collect(), node })
}

fn node(parts: &Parts, disk: Option<&Disk>, now: i64, round: &mut Round<'_>) -> Node {
    let host = Host(&parts.statistics.root);
    let node = Node {
        node_name: parts.config.node_name.clone(),
        start_time: Moment(host.boot_time().unwrap_or_default()),
        system_containers: Some(system_containers(parts, host, now, round)).filter(|list| !list.is_empty()),
        cpu: host.cpu(now, round),
        memory: host.memory(now),
        swap: host.swap(now),
        ..Node::default()
    };
    let Some(disk) = disk else { return node };
    Node {
        io: host.io(now),
        network: host.network(now),
        rlimit: host.rlimit(now),
        fs: disk.root.clone(),
        runtime: Some(Runtime { image_fs: disk.images.clone(), container_fs: disk.containers.clone() }),
        ..node
    }
}

/// The parts of the machine beside pods: this process, the runtime, what the configuration names, and all pods together.
fn system_containers(parts: &Parts, host: Host<'_>, now: i64, round: &mut Round<'_>) -> Vec<Container> {
    let (raw, settings) = (&parts.config.raw, &parts.config.settings);
    let at = |path: &str| Group::at(&settings.cgroup_mount, path);
    let start_time = Moment(host.boot_time().unwrap_or_default());
    let mut list = Vec::new();
    let own = Some(raw.kubelet_cgroups.clone()).filter(|path| !path.is_empty());
    let own = own.or_else(|| host.own_cgroup()).filter(|path| is_apart(path, &settings.cgroup_root));
    let kubelet = own.and_then(|path| container("kubelet", start_time, &at(&path), now, round));
    list.extend(kubelet.or_else(|| Some(this_process(&host.process()?, now, round))));
    let runtime = RUNTIMES.iter().map(|path| at(path)).find(Group::exists);
    list.extend(runtime.and_then(|group| container("runtime", start_time, &group, now, round)));
    if !raw.system_cgroups.is_empty() {
        list.extend(container("misc", start_time, &at(&raw.system_cgroups), now, round));
    }
    if settings.cgroups_per_qos {
        list.extend(container("pods", start_time, &at(&settings.cgroup_root).child("kubepods"), now, round));
    }
    list
}

/// Whether a cgroup holds neither the pods nor everything.
fn is_apart(path: &str, pods_root: &str) -> bool {
    let root = Path::new(pods_root);
    path != "/" && (pods_root == "/" || !root.starts_with(path))
}

fn container(
    name: &str,
    start_time: Moment,
    group: &Group,
    now: i64,
    round: &mut Round<'_>,
) -> Option<Container> {
    let one = Container {
        name: name.to_owned(),
        start_time,
        cpu: convert::group_cpu(group, now, name, round),
        memory: convert::group_memory(group, now),
        swap: convert::group_swap(group, now),
        ..Container::default()
    };
    (one.cpu.is_some() || one.memory.is_some()).then_some(one)
}

/// The kubelet where it shares its cgroup with others.
fn this_process(process: &Process, now: i64, round: &mut Round<'_>) -> Container {
    Container {
        name: "kubelet".to_owned(),
        start_time: Moment(process.started),
        cpu: Some(Cpu {
            time: Moment(now),
            usage_nano_cores: round.rate("kubelet", now, process.cpu),
            usage_core_nano_seconds: Some(process.cpu),
            psi: None,
        }),
        memory: Some(Memory {
            time: Moment(now),
            usage_bytes: Some(process.resident),
            working_set_bytes: Some(process.resident),
            rss_bytes: Some(process.resident),
            page_faults: Some(process.minor_faults + process.major_faults),
            major_page_faults: Some(process.major_faults),
            ..Memory::default()
        }),
        ..Container::default()
    }
}

fn pod(usage: &PodUsage, extent: Extent, now: i64, round: &mut Round<'_>) -> Pod {
    let group = usage.cgroup.as_ref().map(|cgroup| &cgroup.group);
    let containers: Vec<_> = usage.containers.iter().map(|one| pod_container(one, extent, round)).collect();
    let linux = &usage.usage;
    let processes = || {
        let told = linux.process.as_ref().and_then(|process| process.process_count);
        told.map(|count| count.value).or_else(|| group?.pids())
    };
    let full = extent == Extent::Everything;
    Pod {
        pod_ref: PodRef {
            name: usage.name.clone(),
            namespace: usage.namespace.clone(),
            uid: usage.uid.clone(),
        },
        start_time: Moment(usage.created),
        cpu: convert::cpu(linux.cpu.as_ref(), &usage.sandbox, round)
            .or_else(|| convert::group_cpu(group?, now, &usage.sandbox, round)),
        memory: convert::memory(linux.memory.as_ref()).or_else(|| convert::group_memory(group?, now)),
        swap: group.and_then(|group| convert::group_swap(group, now)).or_else(|| sum_of_swap(&containers)),
        io: if full {
            convert::io(linux.io.as_ref()).or_else(|| convert::group_io(group?, now))
        } else {
            None
        },
        network: if full { convert::network(linux.network.as_ref()) } else { None },
        process_stats: if full {
            processes().map(|count| Processes { process_count: Some(count) })
        } else {
            None
        },
        containers,
        ..Pod::default()
    }
}

fn sum_of_swap(containers: &[Container]) -> Option<Swap> {
    let used = containers.iter().filter_map(|container| container.swap.as_ref()?.swap_usage_bytes);
    let time = containers.iter().find_map(|container| Some(container.swap.as_ref()?.time))?;
    Some(Swap { time, swap_usage_bytes: Some(used.sum()), swap_available_bytes: None })
}

fn pod_container(container: &ContainerUsage, extent: Extent, round: &mut Round<'_>) -> Container {
    let usage = &container.usage;
    Container {
        name: container.name.clone(),
        start_time: Moment(container.created),
        cpu: convert::cpu(usage.cpu.as_ref(), &container.id, round),
        memory: convert::memory(usage.memory.as_ref()),
        swap: convert::swap(usage.swap.as_ref()),
        io: if extent == Extent::Everything { convert::io(usage.io.as_ref()) } else { None },
        ..Container::default()
    }
}

/// What lies on disk.
struct Disk {
    now: i64,
    root: Option<Fs>,
    images: Option<Fs>,
    containers: Option<Fs>,
    /// In the order of the pods.
    pods: Vec<PodFiles>,
}

impl Disk {
    async fn look(parts: &Parts, pods: &[PodUsage], now: i64) -> Self {
        let settings = &parts.config.settings;
        let paths: Vec<PodPaths> = pods
            .iter()
            .map(|pod| {
                let logs = settings.pod_logs_dir.join(format!("{}_{}_{}", pod.namespace, pod.name, pod.uid));
                PodPaths {
                    directory: settings.root_dir.join("pods").join(&pod.uid),
                    logs: pod.containers.iter().map(|container| logs.join(&container.name)).collect(),
                }
            })
            .collect();
        let counting = tokio::task::spawn_blocking(move || storage::look(&paths, now));
        let mut runtime = parts.cri.images();
        let (files, file_systems) = tokio::join!(
            tokio::time::timeout(LOOKING, counting),
            runtime.image_fs_info(ImageFsInfoRequest {}),
        );
        let file_systems = file_systems.map(tonic::Response::into_inner).unwrap_or_default();
        let (images, containers) = image_file_systems(&file_systems, now);
        Self {
            now,
            root: storage::file_system(&settings.root_dir, now),
            images,
            containers,
            pods: files.ok().and_then(Result::ok).unwrap_or_default(),
        }
    }

    /// Adds what the pod at this place has on disk.
    fn add(&self, index: usize, usage: &PodUsage, pod: &mut Pod) {
        let nothing = PodFiles::default();
        let files = self.pods.get(index).unwrap_or(&nothing);
        let mut total = files.hosts.unwrap_or_default();
        for (at, (container, shown)) in usage.containers.iter().zip(&mut pod.containers).enumerate() {
            let layer = container.usage.writable_layer.as_ref();
            let layer = layer.map(|layer| (layer.timestamp, used(layer)));
            shown.rootfs = layer.map(|(at, used)| within(self.containers.as_ref(), at, Some(used)));
            let logs = files.logs.get(at).copied().flatten();
            shown.logs = logs.map(|logs| within(self.root.as_ref(), self.now, Some(logs)));
            let parts = layer.map(|(_, used)| used).into_iter().chain(logs);
            total = parts.fold(total, Used::plus);
        }
        let mut volumes = Vec::new();
        for volume in &files.volumes {
            let fs = match &volume.files {
                Files::Mounted(fs) => fs.clone(),
                Files::Within(used) => {
                    total = total.plus(used.unwrap_or_default());
                    within(self.root.as_ref(), self.now, *used)
                }
            };
            volumes.push(Volume { fs, name: volume.name.clone() });
        }
        pod.volume = Some(volumes).filter(|volumes| !volumes.is_empty());
        pod.ephemeral_storage = Some(within(self.root.as_ref(), self.now, Some(total)));
    }
}

fn used(usage: &FilesystemUsage) -> Used {
    let value = |wrapped: Option<orlop_proto::cri::UInt64Value>| wrapped.map_or(0, |wrapped| wrapped.value);
    Used { bytes: value(usage.used_bytes), inodes: value(usage.inodes_used) }
}

/// A part of a file system: the whole's size, the part's use.
fn within(whole: Option<&Fs>, time: i64, used: Option<Used>) -> Fs {
    let whole = whole.cloned().unwrap_or_default();
    Fs {
        time: Moment(time),
        used_bytes: used.map(|used| used.bytes),
        inodes_used: used.map(|used| used.inodes),
        ..whole
    }
}

/// Of images and of containers' layers. One file system serves for both unless the runtime says otherwise.
fn image_file_systems(told: &ImageFsInfoResponse, now: i64) -> (Option<Fs>, Option<Fs>) {
    let one = |usage: Option<&FilesystemUsage>| {
        let usage = usage?;
        let mountpoint = &usage.fs_id.as_ref()?.mountpoint;
        let whole = storage::file_system(Path::new(mountpoint), now)?;
        Some(within(Some(&whole), usage.timestamp, Some(used(usage))))
    };
    let images = one(told.image_filesystems.first());
    let containers = one(told.container_filesystems.first()).or_else(|| images.clone());
    (images, containers)
}
