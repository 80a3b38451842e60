//! Whole answers: a runtime of fixed answers, a host and a cgroup tree of plain files.

use super::exposition::parser::{Sample, parse};
use super::fake_runtime::FakeRuntime;
use super::*;
use crate::config::{Config, KubeletConfiguration, KubeletFlags, resolve};
use crate::pods::labels;
use crate::pods::runtime_state::{PodRuntime, SandboxRecord};
use crate::probes::Prober;
use http_body_util::BodyExt;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use orlop_api::credentials::CertificateSlot;
use orlop_proto::cri;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

const S: i64 = 1_000_000_000;
/// 2026-01-01T00:00:00Z.
const NEW_YEAR: i64 = 1_767_225_600;

const HOST: [(&str, &str); 16] = [
    (
        "proc/stat",
        "cpu  100 10 50 9000 7 3 2 5 40 0\ncpu0 100 10 50 9000 7 3 2 5 40 0\nintr 5\nbtime 1767225600\nprocesses 9\n",
    ),
    (
        "proc/meminfo",
        "MemTotal: 1000 kB\nMemFree: 400 kB\nInactive(file): 100 kB\nAnonPages: 250 kB\nSwapTotal: 64 kB\nSwapFree: 60 kB\n",
    ),
    ("proc/vmstat", "pgfault 11\npgmajfault 2\n"),
    ("proc/pressure/cpu", "some avg10=1.50 avg60=0.25 avg300=0.00 total=7\n"),
    (
        "proc/pressure/memory",
        "some avg10=0.00 avg60=0.00 avg300=0.00 total=3\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n",
    ),
    (
        "proc/net/dev",
        "Inter-| Receive | Transmit\n face |bytes\n lo: 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1\n eno1: 100 2 3 4 0 0 0 0 200 5 6 7 0 0 0 0\n",
    ),
    ("proc/net/route", "Iface\tDestination\neno1\t00000000\n"),
    ("proc/loadavg", "0.00 0.01 0.05 2/345 678\n"),
    ("proc/sys/kernel/pid_max", "4194304\n"),
    ("proc/sys/kernel/threads-max", "1000\n"),
    ("proc/sys/kernel/random/boot_id", "b-1\n"),
    ("proc/self/cgroup", "1:name=systemd:/x\n0::/\n"),
    (
        "proc/self/stat",
        "77 (a (b) c) S 1 1 1 0 -1 0 20 0 4 0 150 50 0 0 20 0 9 0 500 123456 3 18446744073709551615 0\n",
    ),
    (
        "proc/77/net/dev",
        "Inter-| Receive | Transmit\n face |bytes\n eth0: 10 20 30 40 0 0 0 0 50 60 70 80 0 0 0 0\n",
    ),
    ("sys/devices/system/cpu/online", "0-3\n"),
    ("etc/machine-id", "m-1\n"),
];

struct Node {
    _folder: tempfile::TempDir,
    root: PathBuf,
    runtime: FakeRuntime,
    parts: Parts,
    _findings: tokio::sync::mpsc::UnboundedReceiver<crate::probes::ProbeEvent>,
}

fn write(root: &Path, files: &[(&str, &str)]) {
    for (path, text) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

fn pod(uid: &str, phase: &str) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": format!("pod-{uid}"), "namespace": "ns", "uid": uid},
        "spec": {"containers": [{"name": "main"}]},
        "status": {"phase": phase, "qosClass": "BestEffort"},
    }))
    .unwrap()
}

impl Node {
    /// Pods `u1`, running, and `u2`, which has ended while its sandbox still stands.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().to_owned();
        write(&root, &HOST);
        fs::create_dir_all(root.join("proc/self/fd/0")).unwrap();
        let mut config: Config = resolve(&KubeletFlags::default(), KubeletConfiguration::default()).unwrap();
        config.node_name = "node-1".to_owned();
        config.settings.root_dir = root.join("kubelet");
        config.settings.pod_logs_dir = root.join("logs");
        config.settings.cgroup_mount = root.join("cgroup");
        fs::create_dir_all(&config.settings.root_dir).unwrap();
        let runtime = FakeRuntime::default();
        runtime.answers("ListPodSandbox", &sandboxes());
        runtime.answers("ListContainers", &containers());
        let pods = crate::pods::directory::PodDirectory::default();
        for (uid, phase) in [("u1", "Running"), ("u2", "Succeeded")] {
            let pod = pod(uid, phase);
            let status: PodStatus = pod.status.clone().unwrap();
            let sandbox = SandboxRecord {
                id: format!("sandbox-{uid}"),
                attempt: 0,
                ready: true,
                created_at: Timestamp::UNIX_EPOCH,
                ips: Vec::new(),
            };
            pods.publish(&pod, &status, &PodRuntime { sandboxes: vec![sandbox], containers: Vec::new() });
        }
        let (finding, findings) = tokio::sync::mpsc::unbounded_channel();
        let parts = Parts {
            config: Arc::new(config),
            cri: runtime.cri(),
            api: None,
            pods,
            certificate: CertificateSlot::new(None),
            prober: Prober::new(runtime.cri(), finding),
            statistics: Statistics::below(root.clone()),
        };
        Self { _folder: folder, root, runtime, parts, _findings: findings }
    }

    async fn summary(&self, extent: Extent, now: i64) -> Value {
        serde_json::to_value(collect::summary(&self.parts, extent, now).await.unwrap()).unwrap()
    }
}

fn sandboxes() -> cri::ListPodSandboxResponse {
    let sandbox = |id: &str, uid: &str, seconds: i64, state| cri::PodSandbox {
        id: id.to_owned(),
        state: state as i32,
        created_at: (NEW_YEAR + seconds) * S,
        labels: HashMap::from([
            (labels::POD_UID.to_owned(), uid.to_owned()),
            (labels::POD_NAME.to_owned(), format!("pod-{uid}")),
            (labels::POD_NAMESPACE.to_owned(), "ns".to_owned()),
        ]),
        ..cri::PodSandbox::default()
    };
    let (ready, not) = (cri::PodSandboxState::SandboxReady, cri::PodSandboxState::SandboxNotready);
    let stranger = cri::PodSandbox { state: ready as i32, ..cri::PodSandbox::default() };
    cri::ListPodSandboxResponse {
        items: vec![
            sandbox("sandbox-u0", "u1", 5, not),
            sandbox("sandbox-u1", "u1", 10, ready),
            sandbox("sandbox-u2", "u2", 10, ready),
            stranger,
        ],
    }
}

fn containers() -> cri::ListContainersResponse {
    let container = |id: &str, name: &str, seconds: i64, state| cri::Container {
        id: id.to_owned(),
        pod_sandbox_id: "sandbox-u1".to_owned(),
        state: state as i32,
        created_at: (NEW_YEAR + seconds) * S,
        image: Some(cri::ImageSpec { image: "app:1".to_owned(), ..cri::ImageSpec::default() }),
        labels: HashMap::from([(labels::CONTAINER_NAME.to_owned(), name.to_owned())]),
        ..cri::Container::default()
    };
    let (running, exited) = (cri::ContainerState::ContainerRunning, cri::ContainerState::ContainerExited);
    cri::ListContainersResponse {
        containers: vec![
            container("c-old", "main", 11, running),
            container("c-new", "main", 12, running),
            container("c-gone", "setup", 11, exited),
        ],
    }
}

#[allow(clippy::unnecessary_wraps)]
fn value(value: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value })
}

fn container_stats(id: &str, at: i64, cpu: u64) -> cri::ContainerStats {
    cri::ContainerStats {
        attributes: Some(cri::ContainerAttributes { id: id.to_owned(), ..Default::default() }),
        cpu: Some(cri::CpuUsage { timestamp: at, usage_core_nano_seconds: value(cpu), ..Default::default() }),
        memory: Some(cri::MemoryUsage {
            timestamp: at,
            usage_bytes: value(5000),
            working_set_bytes: value(4000),
            rss_bytes: value(3000),
            page_faults: value(9),
            major_page_faults: value(1),
            ..Default::default()
        }),
        writable_layer: Some(cri::FilesystemUsage {
            timestamp: at,
            fs_id: Some(cri::FilesystemIdentifier { mountpoint: "/".to_owned() }),
            used_bytes: value(4096),
            inodes_used: value(2),
        }),
        swap: Some(cri::SwapUsage {
            timestamp: at,
            swap_available_bytes: value(90),
            swap_usage_bytes: value(10),
        }),
        io: None,
    }
}

fn pod_stats(at: i64, cpu: u64) -> cri::ListPodSandboxStatsResponse {
    let interface = |name: &str, bytes| cri::NetworkInterfaceUsage {
        name: name.to_owned(),
        rx_bytes: value(bytes),
        ..Default::default()
    };
    let linux = cri::LinuxPodSandboxStats {
        cpu: Some(cri::CpuUsage {
            timestamp: at,
            usage_core_nano_seconds: value(cpu + 1),
            usage_nano_cores: value(77),
            psi: None,
        }),
        network: Some(cri::NetworkUsage {
            timestamp: at,
            default_interface: Some(interface("eth0", 10)),
            interfaces: vec![interface("net1", 20)],
        }),
        process: Some(cri::ProcessUsage { timestamp: at, process_count: value(3) }),
        containers: vec![container_stats("c-new", at, cpu), container_stats("c-old", at, 1)],
        ..Default::default()
    };
    let attributes = cri::PodSandboxAttributes { id: "sandbox-u1".to_owned(), ..Default::default() };
    let stats = cri::PodSandboxStats { attributes: Some(attributes), linux: Some(linux), windows: None };
    cri::ListPodSandboxStatsResponse { stats: vec![stats] }
}

/// What a cgroup tree with all controllers says of the pod and its container.
fn grow_cgroups(root: &Path) {
    let cpu = "usage_usec 3000\nuser_usec 2000\nsystem_usec 1000\nnr_periods 4\nnr_throttled 1\nthrottled_usec 50\n";
    let pod = "cgroup/kubepods/besteffort/podu1";
    for group in ["cgroup/kubepods", pod, "cgroup/kubepods/besteffort/podu1/c-new"] {
        let file = |name: &str| format!("{group}/{name}");
        let (stat, current, memory, pids) =
            (file("cpu.stat"), file("memory.current"), file("memory.stat"), file("pids.current"));
        let (procs, max, weight, limit) =
            (file("cgroup.procs"), file("cpu.max"), file("cpu.weight"), file("memory.max"));
        let (pressure, io) = (file("cpu.pressure"), file("io.stat"));
        write(
            root,
            &[
                (&stat, cpu),
                (&current, "8000\n"),
                (
                    &memory,
                    "anon 3000\nfile 2500\nkernel 100\nfile_mapped 400\ninactive_file 1000\nactive_file 1500\npgfault 6\npgmajfault 2\n",
                ),
                (&pids, "4\n"),
                (&procs, if group == pod { "" } else { "77\n" }),
                (&max, "max 100000\n"),
                (&weight, "1\n"),
                (&limit, "16000\n"),
                (
                    &pressure,
                    "some avg10=0.50 avg60=0.00 avg300=0.00 total=2\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n",
                ),
                (&io, "8:0 rbytes=1024 wbytes=2048 rios=3 wios=4 dbytes=0 dios=0\n"),
            ],
        );
    }
}

#[tokio::test]
async fn the_short_summary_is_what_the_kubelet_writes_and_no_more() {
    let node = Node::new();
    let at = (NEW_YEAR + 100) * S;
    node.runtime.answers("ListPodSandboxStats", &pod_stats(at, 2_000_000_000));
    node.summary(Extent::CpuAndMemory, at).await;
    let later = at + 10 * S;
    node.runtime.answers("ListPodSandboxStats", &pod_stats(later, 7_000_000_000));
    let time = "2026-01-01T00:01:50Z";
    let tick = 1_000_000_000 / rustix::param::clock_ticks_per_second();
    let page = rustix::param::page_size() as u64;
    let expected = json!({
        "node": {
            "nodeName": "node-1",
            "startTime": "2026-01-01T00:00:00Z",
            "systemContainers": [{
                "name": "kubelet",
                "startTime": "2026-01-01T00:00:05Z",
                "cpu": {"time": time, "usageNanoCores": 0, "usageCoreNanoSeconds": 200 * tick},
                "memory": {"time": time, "usageBytes": 3 * page, "workingSetBytes": 3 * page,
                           "rssBytes": 3 * page, "pageFaults": 24, "majorPageFaults": 4},
            }],
            "cpu": {
                "time": time, "usageNanoCores": 0, "usageCoreNanoSeconds": 170 * tick,
                "psi": {"full": {"total": 0, "avg10": 0.0, "avg60": 0.0, "avg300": 0.0},
                        "some": {"total": 7000, "avg10": 1.5, "avg60": 0.25, "avg300": 0.0}},
            },
            "memory": {
                "time": time, "availableBytes": 500 << 10, "usageBytes": 600 << 10,
                "workingSetBytes": 500 << 10, "rssBytes": 250 << 10, "pageFaults": 11, "majorPageFaults": 2,
                "psi": {"full": {"total": 1000, "avg10": 0.0, "avg60": 0.0, "avg300": 0.0},
                        "some": {"total": 3000, "avg10": 0.0, "avg60": 0.0, "avg300": 0.0}},
            },
            "swap": {"time": time, "swapAvailableBytes": 60 << 10, "swapUsageBytes": 4 << 10},
        },
        "pods": [{
            "podRef": {"name": "pod-u1", "namespace": "ns", "uid": "u1"},
            "startTime": "2026-01-01T00:00:10Z",
            "containers": [{
                "name": "main",
                "startTime": "2026-01-01T00:00:12Z",
                "cpu": {"time": time, "usageNanoCores": 500_000_000, "usageCoreNanoSeconds": 7_000_000_000u64},
                "memory": {"time": time, "usageBytes": 5000, "workingSetBytes": 4000, "rssBytes": 3000,
                           "pageFaults": 9, "majorPageFaults": 1},
                "swap": {"time": time, "swapAvailableBytes": 90, "swapUsageBytes": 10},
            }],
            "cpu": {"time": time, "usageNanoCores": 77, "usageCoreNanoSeconds": 7_000_000_001u64},
            "swap": {"time": time, "swapUsageBytes": 10},
        }],
    });
    let found = node.summary(Extent::CpuAndMemory, later).await;
    assert_eq!(found, expected, "{found:#}");
}

#[tokio::test]
async fn the_whole_summary_adds_disks_networks_and_numbers_of_processes() {
    let node = Node::new();
    let at = (NEW_YEAR + 100) * S;
    node.runtime.answers("ListPodSandboxStats", &pod_stats(at, 1));
    let images = cri::FilesystemUsage {
        timestamp: at,
        fs_id: Some(cri::FilesystemIdentifier { mountpoint: "/".to_owned() }),
        used_bytes: value(1_000_000),
        inodes_used: value(100),
    };
    let told =
        cri::ImageFsInfoResponse { image_filesystems: vec![images], container_filesystems: Vec::new() };
    node.runtime.answers("ImageFsInfo", &told);
    let volume = "kubelet/pods/u1/volumes/kubernetes.io~empty-dir/scratch/file";
    let text = "x".repeat(10_000);
    write(
        &node.root,
        &[
            ("logs/ns_pod-u1_u1/main/0.log", "a line\n"),
            (volume, &text),
            ("kubelet/pods/u1/volumes/kubernetes.io~csi/elsewhere/file", "not to be touched"),
        ],
    );
    let found = node.summary(Extent::Everything, at).await;
    let pod = &found["pods"][0];
    assert_eq!(pod["network"]["name"], "eth0");
    assert_eq!(pod["network"]["rxBytes"], 10);
    assert_eq!(pod["network"]["interfaces"][1], json!({"name": "net1", "rxBytes": 20}));
    assert_eq!(pod["process_stats"], json!({"process_count": 3}));
    let main = &pod["containers"][0];
    assert_eq!((&main["rootfs"]["usedBytes"], &main["rootfs"]["inodesUsed"]), (&json!(4096), &json!(2)));
    assert!(main["rootfs"]["capacityBytes"].as_u64().unwrap() > 4096);
    assert_eq!(main["logs"]["inodesUsed"], 2);
    assert_eq!(pod["volume"].as_array().unwrap().len(), 1, "{pod:#}");
    assert_eq!(pod["volume"][0]["name"], "scratch");
    let scratch = pod["volume"][0]["usedBytes"].as_u64().unwrap();
    assert!(scratch >= 10_000);
    let logs = main["logs"]["usedBytes"].as_u64().unwrap();
    assert_eq!(pod["ephemeral-storage"]["usedBytes"].as_u64().unwrap(), 4096 + logs + scratch);
    let host = &found["node"];
    assert_eq!(host["rlimit"], json!({"time": "2026-01-01T00:01:40Z", "maxpid": 1000, "curproc": 345}));
    assert_eq!(host["network"]["name"], "eno1");
    assert_eq!(host["network"]["txErrors"], 6);
    assert_eq!(host["runtime"]["imageFs"]["usedBytes"], 1_000_000);
    assert_eq!(host["runtime"]["containerFs"], host["runtime"]["imageFs"]);
    assert!(host["fs"]["capacityBytes"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn a_runtime_without_pod_statistics_is_made_up_for_by_the_cgroups() {
    let node = Node::new();
    let at = (NEW_YEAR + 100) * S;
    let stats = cri::ListContainerStatsResponse { stats: vec![container_stats("c-new", at, 5)] };
    node.runtime.answers("ListContainerStats", &stats);
    grow_cgroups(&node.root);
    let found = node.summary(Extent::Everything, at).await;
    let pod = &found["pods"][0];
    assert_eq!(pod["containers"][0]["cpu"]["usageCoreNanoSeconds"], 5);
    assert_eq!(pod["cpu"]["usageCoreNanoSeconds"], 3_000_000);
    assert_eq!(pod["cpu"]["psi"]["some"]["total"], 2000);
    assert_eq!(pod["memory"]["workingSetBytes"], 7000);
    assert_eq!(pod["memory"]["availableBytes"], 9000);
    assert_eq!(pod["process_stats"]["process_count"], 4);
    let names: Vec<&Value> =
        found["node"]["systemContainers"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["kubelet", "pods"]);
}

#[tokio::test]
async fn a_runtime_without_any_statistics_still_gets_an_answer() {
    let node = Node::new();
    let found = node.summary(Extent::Everything, NEW_YEAR * S).await;
    assert_eq!(found["pods"][0]["containers"][0]["name"], "main");
    assert_eq!(found["pods"][0].get("cpu"), None);
    assert_eq!(found["node"]["runtime"], json!({}));
}

async fn scrape(response: Response<Body>) -> Vec<Sample> {
    assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    parse(std::str::from_utf8(&bytes).unwrap())
}

fn one<'a>(samples: &'a [Sample], name: &str, labels: &[(&str, &str)]) -> &'a Sample {
    let fits = |sample: &&Sample| {
        sample.name == name
            && labels.iter().all(|(key, value)| sample.labels.get(*key).is_some_and(|found| found == value))
    };
    let found: Vec<&Sample> = samples.iter().filter(fits).collect();
    assert_eq!(found.len(), 1, "{name} {labels:?}: {found:?}");
    found[0]
}

#[tokio::test]
async fn the_resource_metrics_have_the_names_labels_and_times_that_autoscalers_read() {
    let node = Node::new();
    let at = (NEW_YEAR + 100) * S + 5_000_000;
    node.runtime.answers("ListPodSandboxStats", &pod_stats(at, 2_500_000_000));
    let samples = scrape(resource_metrics(&node.parts).await.unwrap()).await;
    let labels = [("container", "main"), ("pod", "pod-u1"), ("namespace", "ns")];
    let cpu = one(&samples, "container_cpu_usage_seconds_total", &labels);
    assert_eq!((cpu.value.to_string(), cpu.milliseconds), ("2.5".to_owned(), Some(at / 1_000_000)));
    let value = |name: &str, labels: &[(&str, &str)]| one(&samples, name, labels).value.to_string();
    assert_eq!(value("container_memory_working_set_bytes", &labels), "4000");
    assert_eq!(value("container_swap_limit_bytes", &labels), "100");
    assert_eq!(value("container_start_time_seconds", &labels), (NEW_YEAR + 12).to_string());
    assert_eq!(value("pod_cpu_usage_seconds_total", &labels[1..]), "2.500000001");
    assert_eq!(value("node_memory_working_set_bytes", &[]), (500 << 10).to_string());
    assert_eq!(value("resource_scrape_error", &[]), "0");
    assert!(one(&samples, "node_cpu_usage_seconds_total", &[]).milliseconds.is_some());
}

#[tokio::test]
async fn a_runtime_that_does_not_answer_is_told_as_a_failed_scrape() {
    let mut node = Node::new();
    node.parts.cri = FakeRuntime::default().cri();
    let samples = scrape(resource_metrics(&node.parts).await.unwrap()).await;
    assert_eq!(one(&samples, "resource_scrape_error", &[]).value.to_string(), "1");
    assert!(container_metrics(&node.parts).await.is_err());
}

#[tokio::test]
async fn the_container_metrics_join_what_the_runtime_and_the_cgroups_say() {
    let node = Node::new();
    node.runtime.answers("ListPodSandboxStats", &pod_stats(NEW_YEAR * S, 2_500_000_000));
    grow_cgroups(&node.root);
    let samples = scrape(container_metrics(&node.parts).await.unwrap()).await;
    let pod = "/kubepods/besteffort/podu1";
    let main = [
        ("container", "main"),
        ("id", "/kubepods/besteffort/podu1/c-new"),
        ("image", "app:1"),
        ("name", "c-new"),
        ("namespace", "ns"),
        ("pod", "pod-u1"),
    ];
    let value = |name: &str, labels: &[(&str, &str)]| one(&samples, name, labels).value.to_string();
    assert_eq!(value("container_cpu_usage_seconds_total", &main), "2.5");
    assert_eq!(value("container_cpu_user_seconds_total", &main), "0.002");
    assert_eq!(value("container_cpu_cfs_throttled_periods_total", &main), "1");
    assert_eq!(value("container_memory_working_set_bytes", &main), "4000");
    assert_eq!(value("container_memory_cache", &main), "2500");
    assert_eq!(value("container_spec_memory_limit_bytes", &main), "16000");
    assert_eq!(value("container_spec_cpu_shares", &main), "2");
    assert_eq!(value("container_pressure_cpu_waiting_seconds_total", &main), "0.000002");
    assert_eq!(value("container_fs_writes_bytes_total", &[("device", "8:0"), ("name", "c-new")]), "2048");
    assert_eq!(value("container_fs_usage_bytes", &main), "4096");
    let network = [("id", pod), ("interface", "eth0"), ("pod", "pod-u1"), ("container", "")];
    assert_eq!(value("container_network_receive_bytes_total", &network), "10");
    assert_eq!(value("container_network_transmit_packets_dropped_total", &network), "80");
    assert_eq!(value("container_memory_working_set_bytes", &[("id", pod)]), "7000");
    assert_eq!(value("container_memory_rss", &[("id", "/")]), (250 << 10).to_string());
    let machine = [("boot_id", "b-1"), ("machine_id", "m-1")];
    assert_eq!(value("machine_cpu_cores", &machine), "4");
    assert_eq!(value("machine_memory_bytes", &machine), (1000 << 10).to_string());
    assert_eq!(samples.iter().filter(|sample| sample.labels.values().any(|v| v == "c-old")).count(), 0);
}

#[tokio::test]
async fn the_kubelet_tells_about_itself() {
    let node = Node::new();
    drop(node.parts.statistics.requests.begin(Door::Main, &http::Method::GET, "/pods"));
    let samples = scrape(metrics(&node.parts)).await;
    let value = |name: &str, labels: &[(&str, &str)]| one(&samples, name, labels).value.to_string();
    assert_eq!(value("kubelet_node_name", &[("node", "node-1")]), "1");
    assert_eq!(value("kubelet_running_pods", &[]), "2");
    assert_eq!(value("kubelet_desired_pods", &[("static", "")]), "2");
    assert_eq!(value("kubelet_active_pods", &[("static", "")]), "1");
    assert_eq!(value("kubelet_working_pods", &[("lifecycle", "terminated")]), "1");
    assert_eq!(value("kubelet_http_requests_total", &[("path", "pods")]), "1");
    assert_eq!(value("process_open_fds", &[]), "1");
    assert_eq!(value("process_start_time_seconds", &[]), (NEW_YEAR + 5).to_string());
    assert_eq!(value("kubernetes_build_info", &[("git_version", crate::node::KUBELET_VERSION)]), "1");
}

#[tokio::test]
async fn probes_are_counted_by_their_results() {
    let node = Node::new();
    let mut pod = pod("u1", "Running");
    let probe = json!({"exec": {"command": ["true"]}, "periodSeconds": 1});
    let container = json!({"name": "main", "livenessProbe": probe});
    pod.spec.as_mut().unwrap().containers = vec![serde_json::from_value(container).unwrap()];
    node.parts.prober.start(&pod, "main", "c-new", None, crate::probes::Seed::default());
    let counted = async {
        loop {
            let samples = scrape(probe_metrics(&node.parts)).await;
            if !samples.is_empty() {
                return samples;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    let samples = tokio::time::timeout(std::time::Duration::from_secs(10), counted).await.unwrap();
    // This runtime cannot run commands, which says nothing about the container.
    let labels = [
        ("container", "main"),
        ("namespace", "ns"),
        ("pod", "pod-u1"),
        ("pod_uid", "u1"),
        ("probe_type", "Liveness"),
        ("result", "unknown"),
    ];
    assert!(one(&samples, "prober_probe_total", &labels).value >= 1.0);
    node.parts.prober.stop("c-new");
    assert_eq!(scrape(probe_metrics(&node.parts)).await, []);
}

#[test]
fn this_machine_writes_its_files_as_they_are_read_here() {
    let host = host::Host(Path::new("/"));
    let (process, memory) = (host.process().unwrap(), host.memory(0).unwrap());
    assert!(process.resident > 0 && process.open_files.unwrap() > 2 && process.most_files.unwrap() > 2);
    assert!((0..now()).contains(&(process.started - S)), "{process:?}");
    assert!(memory.working_set_bytes.unwrap() <= memory.usage_bytes.unwrap());
    assert!(host.cpu_time().unwrap() > 0 && host.boot_time().unwrap() < now());
    assert!(host.rlimit(0).unwrap().curproc.unwrap() > 0);
}
