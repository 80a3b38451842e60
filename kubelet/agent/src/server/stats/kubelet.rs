//! `/metrics`: the kubelet about itself.

use super::exposition::{Exposition, Metric, number, seconds};
use super::host::Host;
use crate::node::KUBELET_VERSION;
use crate::pods::labels;
use crate::pods::runtime_state::RunState;
use crate::server::Parts;
use k8s_openapi::api::core::v1::Pod;
use rustls::sign::CertifiedKey;
use std::collections::BTreeMap;
use x509_cert::Certificate;
use x509_cert::der::Decode;

const NODE_NAME: Metric = Metric::gauge("kubelet_node_name", "The node's name, in a label; always 1.");
const BUILD: Metric = Metric::gauge("kubernetes_build_info", "What this program is; always 1.");
const CGROUPS: Metric = Metric::gauge("kubelet_cgroup_version", "The version of cgroups in use.");
const RUNNING_PODS: Metric = Metric::gauge("kubelet_running_pods", "Pods with a live sandbox.");
const RUNNING_CONTAINERS: Metric =
    Metric::gauge("kubelet_running_containers", "Containers of pods, by their state in the runtime.");
const DESIRED: Metric = Metric::gauge("kubelet_desired_pods", "Pods this node is told to run.");
const ACTIVE: Metric = Metric::gauge("kubelet_active_pods", "Pods that have not ended.");
const MIRRORS: Metric =
    Metric::gauge("kubelet_mirror_pods", "Mirror pods to be shown for static pods, one for each.");
const WORKING: Metric = Metric::gauge("kubelet_working_pods", "Pods at work, by stage, origin and kind.");
const CLIENT_TTL: Metric = Metric::gauge(
    "kubelet_certificate_manager_client_ttl_seconds",
    "Seconds until the client certificate expires.",
);
const SERVER_TTL: Metric = Metric::gauge(
    "kubelet_certificate_manager_server_ttl_seconds",
    "Seconds until the serving certificate expires.",
);
const CPU: Metric = Metric::counter("process_cpu_seconds_total", "Processor time of this process.");
const OPEN: Metric = Metric::gauge("process_open_fds", "Open files of this process.");
const MOST: Metric = Metric::gauge("process_max_fds", "Files that this process may open.");
const RESIDENT: Metric = Metric::gauge("process_resident_memory_bytes", "Resident memory of this process.");
const VIRTUAL: Metric = Metric::gauge("process_virtual_memory_bytes", "Virtual memory of this process.");
const STARTED: Metric =
    Metric::gauge("process_start_time_seconds", "When this process began, in seconds since 1970.");

pub(super) fn metrics(parts: &Parts, now: i64) -> Exposition {
    let mut out = Exposition::default();
    out.add(&NODE_NAME, &[("node", &parts.config.node_name)], 1.0, None);
    out.add(&CGROUPS, &[], 2.0, None);
    add_build(&mut out);
    add_pods(&mut out, parts);
    add_process(&mut out, parts);
    let serving = parts.certificate.get();
    let client = parts.api.as_ref().and_then(|api| api.credentials().certificate());
    for (metric, certified) in [(&SERVER_TTL, serving), (&CLIENT_TTL, client)] {
        if let Some(left) = certified.and_then(|certified| time_left(&certified, now)) {
            out.add(metric, &[], left, None);
        }
    }
    parts.statistics.requests.expose(&mut out);
    out
}

fn add_build(out: &mut Exposition) {
    let mut numbers = KUBELET_VERSION.trim_start_matches('v').split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let platform = format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH);
    let labels = [
        ("build_date", ""),
        ("compiler", "rustc"),
        ("git_commit", ""),
        ("git_tree_state", ""),
        ("git_version", KUBELET_VERSION),
        ("go_version", ""),
        ("major", major),
        ("minor", minor),
        ("platform", &platform),
    ];
    out.add(&BUILD, &labels, 1.0, None);
}

/// Which of the kubelet's stages a pod is in.
fn stage(pod: &Pod) -> &'static str {
    match pod.status.as_ref().and_then(|status| status.phase.as_deref()) {
        Some("Succeeded" | "Failed") => "terminated",
        _ if pod.metadata.deletion_timestamp.is_some() => "terminating",
        _ => "sync",
    }
}

fn is_static(pod: &Pod) -> bool {
    let source = pod.metadata.annotations.as_ref().and_then(|notes| notes.get(labels::CONFIG_SOURCE));
    source.is_some_and(|source| source != "api")
}

fn add_pods(out: &mut Exposition, parts: &Parts) {
    let mut working: BTreeMap<(&str, bool), u64> = BTreeMap::new();
    let mut states: BTreeMap<RunState, u64> = BTreeMap::new();
    let mut running = 0;
    parts.pods.visit(|pod, runtime| {
        *working.entry((stage(pod), is_static(pod))).or_default() += 1;
        running += u64::from(runtime.live_sandbox().is_some());
        for container in &runtime.containers {
            *states.entry(container.state).or_default() += 1;
        }
    });
    out.add(&RUNNING_PODS, &[], number(running), None);
    for (state, count) in states {
        let state = match state {
            RunState::Unknown => "unknown",
            RunState::Created => "created",
            RunState::Running => "running",
            RunState::Exited => "exited",
        };
        out.add(&RUNNING_CONTAINERS, &[("container_state", state)], number(count), None);
    }
    for of_files in [false, true] {
        let word = if of_files { "true" } else { "" };
        let of_kind = || working.iter().filter(|((_, one), _)| *one == of_files);
        let all: u64 = of_kind().map(|(_, count)| count).sum();
        let active: u64 = of_kind().filter(|((at, _), _)| *at != "terminated").map(|(_, count)| count).sum();
        out.add(&DESIRED, &[("static", word)], number(all), None);
        out.add(&ACTIVE, &[("static", word)], number(active), None);
        if of_files {
            out.add(&MIRRORS, &[], number(all), None);
        }
        for ((at, _), count) in of_kind() {
            let labels = [("config", "desired"), ("lifecycle", *at), ("static", word)];
            out.add(&WORKING, &labels, number(*count), None);
        }
    }
}

fn add_process(out: &mut Exposition, parts: &Parts) {
    let Some(process) = Host(&parts.statistics.root).process() else { return };
    out.add(&CPU, &[], seconds(process.cpu), None);
    out.add(&RESIDENT, &[], number(process.resident), None);
    out.add(&VIRTUAL, &[], number(process.virtual_size), None);
    if let Ok(started) = u64::try_from(process.started) {
        out.add(&STARTED, &[], seconds(started), None);
    }
    for (metric, count) in [(&OPEN, process.open_files), (&MOST, process.most_files)] {
        if let Some(count) = count {
            out.add(metric, &[], number(count), None);
        }
    }
}

/// Seconds until a certificate expires; negative when it has.
fn time_left(certified: &CertifiedKey, now: i64) -> Option<f64> {
    let certificate = Certificate::from_der(certified.cert.first()?.as_ref()).ok()?;
    let end = certificate.tbs_certificate().validity().not_after.to_unix_duration().as_secs_f64();
    let now = seconds(u64::try_from(now).ok()?);
    Some(end - now)
}
