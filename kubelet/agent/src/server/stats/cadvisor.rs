//! `/metrics/cadvisor`: the node, its pods and their containers by the names that dashboards and rules are written for.
//!
//! A series is what the runtime says about a container, and what its cgroup says beyond that. Network counters belong to
//! the pod.

use super::cgroup::{DeviceIo, Group, Memory as GroupMemory};
use super::exposition::{Exposition, Metric, number, seconds};
use super::host::Host;
use super::model::Pressure;
use super::network::{Counters, Direction};
use super::runtime::{ContainerUsage, PodUsage};
use crate::node::{KUBELET_VERSION, Machine};
use crate::server::Parts;
use orlop_proto::cri::{CpuUsage, MemoryUsage, NetworkInterfaceUsage, SwapUsage, UInt64Value};

mod names;

/// Whose figures are written.
struct Subject<'a> {
    /// The cgroup.
    id: String,
    name: &'a str,
    image: &'a str,
    container: &'a str,
    pod: &'a str,
    namespace: &'a str,
    at: i64,
}

/// What everything has, wherever it is known from.
#[derive(Default)]
struct Basic {
    cpu: Option<u64>,
    usage: Option<u64>,
    working_set: Option<u64>,
    rss: Option<u64>,
    swap: Option<u64>,
    page_faults: Option<u64>,
    major_page_faults: Option<u64>,
}

impl Basic {
    fn of_runtime(cpu: Option<&CpuUsage>, memory: Option<&MemoryUsage>, swap: Option<&SwapUsage>) -> Self {
        let memory = memory.copied().unwrap_or_default();
        let value = |wrapped: Option<UInt64Value>| wrapped.map(|wrapped| wrapped.value);
        Self {
            cpu: cpu.and_then(|cpu| value(cpu.usage_core_nano_seconds)),
            usage: value(memory.usage_bytes),
            working_set: value(memory.working_set_bytes),
            rss: value(memory.rss_bytes),
            swap: swap.and_then(|swap| value(swap.swap_usage_bytes)),
            page_faults: value(memory.page_faults),
            major_page_faults: value(memory.major_page_faults),
        }
    }

    /// What is not known yet is taken from a cgroup.
    fn or(self, group: &Group) -> Self {
        let memory = group.memory();
        let of = |pick: fn(&GroupMemory) -> u64| memory.as_ref().map(pick);
        Self {
            cpu: self.cpu.or_else(|| Some(group.cpu()?.usage)),
            usage: self.usage.or_else(|| of(|memory| memory.usage)),
            working_set: self.working_set.or_else(|| of(GroupMemory::working_set)),
            rss: self.rss.or_else(|| of(|memory| memory.anonymous)),
            swap: self.swap.or_else(|| memory.as_ref()?.swap),
            page_faults: self.page_faults.or_else(|| of(|memory| memory.page_faults)),
            major_page_faults: self.major_page_faults.or_else(|| of(|memory| memory.major_page_faults)),
        }
    }
}

pub(super) fn metrics(parts: &Parts, pods: &[PodUsage], now: i64) -> Exposition {
    let mut out = Exposition::default();
    let host = Host(&parts.statistics.root);
    add_machine(&mut out, parts);
    out.add(&names::SCRAPE_ERROR, &[], 0.0, None);
    add_node(&mut out, host, now);
    let settings = &parts.config.settings;
    if settings.cgroups_per_qos {
        let id = format!("{}/kubepods", settings.cgroup_root.trim_end_matches('/'));
        let group = Group::at(&settings.cgroup_mount, &id);
        if group.exists() {
            let subject = Subject::of_group(id, now);
            subject.add_basic(&mut out, &Basic::default().or(&group));
            subject.add_group(&mut out, &group);
        }
    }
    for pod in pods {
        add_pod(&mut out, host, pod, now);
    }
    out
}

fn add_machine(out: &mut Exposition, parts: &Parts) {
    let Ok(machine) = Machine::read(&parts.statistics.root, &parts.config.settings.root_dir) else { return };
    let labels = [
        ("boot_id", machine.boot_id.as_str()),
        ("machine_id", &machine.machine_id),
        ("system_uuid", &machine.system_uuid),
    ];
    out.add(&names::MACHINE_CORES, &labels, f64::from(machine.cpus), None);
    out.add(&names::MACHINE_MEMORY, &labels, number(machine.memory), None);
    out.add(&names::MACHINE_SWAP, &labels, number(machine.swap), None);
    let version = [
        ("cadvisorRevision", ""),
        ("cadvisorVersion", ""),
        ("dockerVersion", ""),
        ("kernelVersion", &machine.kernel_version),
        ("kubeletVersion", KUBELET_VERSION),
        ("osVersion", &machine.os_image),
    ];
    out.add(&names::VERSION, &version, 1.0, None);
}

fn add_node(out: &mut Exposition, host: Host<'_>, now: i64) {
    let subject = Subject::of_group("/".to_owned(), now);
    let memory = host.memory(now).unwrap_or_default();
    let basic = Basic {
        cpu: host.cpu_time(),
        usage: memory.usage_bytes,
        working_set: memory.working_set_bytes,
        rss: memory.rss_bytes,
        swap: host.swap(now).and_then(|swap| swap.swap_usage_bytes),
        page_faults: memory.page_faults,
        major_page_faults: memory.major_page_faults,
    };
    subject.add_basic(out, &basic);
    subject.add_network(out, &host.counters());
    if let Some(started) = host.boot_time() {
        subject.add_times(out, started);
    }
}

fn add_pod(out: &mut Exposition, host: Host<'_>, pod: &PodUsage, now: i64) {
    let linux = &pod.usage;
    let cgroup = pod.cgroup.as_ref();
    let at = linux.cpu.as_ref().map_or(now, |cpu| cpu.timestamp);
    let id = cgroup.map_or_else(|| format!("/{}", pod.sandbox), |cgroup| cgroup.path.clone());
    let subject = Subject { pod: &pod.name, namespace: &pod.namespace, ..Subject::of_group(id, at) };
    let mut basic = Basic::of_runtime(linux.cpu.as_ref(), linux.memory.as_ref(), None);
    if let Some(cgroup) = cgroup {
        basic = basic.or(&cgroup.group);
        subject.add_group(out, &cgroup.group);
    }
    subject.add_basic(out, &basic);
    subject.add_times(out, pod.created);
    for container in &pod.containers {
        add_container(out, pod, container, now);
    }
    if !pod.host_network {
        subject.add_network(out, &pod_network(host, pod));
    }
}

/// From within the pod's network if one of its processes can be found, otherwise what the runtime says.
fn pod_network(host: Host<'_>, pod: &PodUsage) -> Vec<Counters> {
    let inside = pod.containers.iter().find_map(|container| {
        let group = pod.cgroup.as_ref()?.group.child(&container.id);
        let process = group.a_process()?;
        let counters = host.counters_of(process);
        // Were it gone by now, its number might have been another's.
        (group.a_process() == Some(process)).then_some(counters)
    });
    if let Some(counters) = inside.filter(|counters| !counters.is_empty()) {
        return counters;
    }
    let Some(network) = &pod.usage.network else { return Vec::new() };
    let mut all: Vec<&NetworkInterfaceUsage> =
        network.default_interface.iter().chain(&network.interfaces).collect();
    all.sort_by_key(|one| &one.name);
    all.dedup_by_key(|one| &one.name);
    let value = |wrapped: Option<UInt64Value>| wrapped.map_or(0, |wrapped| wrapped.value);
    let direction =
        |bytes, errors| Direction { bytes: value(bytes), errors: value(errors), ..Direction::default() };
    all.into_iter()
        .map(|one| Counters {
            interface: one.name.clone(),
            received: direction(one.rx_bytes, one.rx_errors),
            sent: direction(one.tx_bytes, one.tx_errors),
        })
        .collect()
}

fn add_container(out: &mut Exposition, pod: &PodUsage, container: &ContainerUsage, now: i64) {
    let usage = &container.usage;
    let parent = pod.cgroup.as_ref().map_or("", |cgroup| cgroup.path.as_str());
    let subject = Subject {
        id: format!("{parent}/{}", container.id),
        name: &container.id,
        image: &container.image,
        container: &container.name,
        pod: &pod.name,
        namespace: &pod.namespace,
        at: usage.cpu.as_ref().map_or(now, |cpu| cpu.timestamp),
    };
    let mut basic = Basic::of_runtime(usage.cpu.as_ref(), usage.memory.as_ref(), usage.swap.as_ref());
    let group = pod.cgroup.as_ref().map(|cgroup| cgroup.group.child(&container.id));
    if let Some(group) = group.filter(Group::exists) {
        basic = basic.or(&group);
        subject.add_group(out, &group);
        subject.add_limits(out, &group);
    }
    subject.add_basic(out, &basic);
    subject.add_times(out, container.created);
    if let Some(layer) = &usage.writable_layer {
        let device = layer.fs_id.as_ref().map_or("", |id| id.mountpoint.as_str());
        let value = |wrapped: Option<UInt64Value>| wrapped.map_or(0, |wrapped| wrapped.value);
        subject.put(out, &names::FS_USAGE, &[("device", device)], number(value(layer.used_bytes)));
        subject.put(out, &names::FS_INODES, &[("device", device)], number(value(layer.inodes_used)));
    }
}

impl Subject<'_> {
    fn of_group(id: String, at: i64) -> Self {
        Self { id, name: "", image: "", container: "", pod: "", namespace: "", at }
    }

    fn put(&self, out: &mut Exposition, metric: &Metric, more: &[(&str, &str)], value: f64) {
        let mut labels = vec![
            ("container", self.container),
            ("id", &self.id),
            ("image", self.image),
            ("name", self.name),
            ("namespace", self.namespace),
            ("pod", self.pod),
        ];
        labels.extend_from_slice(more);
        out.add(metric, &labels, value, Some(self.at));
    }

    fn put_all(&self, out: &mut Exposition, figures: &[(&Metric, Option<u64>)]) {
        for (metric, value) in figures {
            if let Some(value) = value {
                self.put(out, metric, &[], number(*value));
            }
        }
    }

    fn add_basic(&self, out: &mut Exposition, basic: &Basic) {
        if let Some(cpu) = basic.cpu {
            self.put(out, &names::CPU, &[("cpu", "total")], seconds(cpu));
        }
        self.put_all(
            out,
            &[
                (&names::MEMORY_USAGE, basic.usage),
                (&names::WORKING_SET, basic.working_set),
                (&names::RSS, basic.rss),
                (&names::SWAP, basic.swap),
            ],
        );
        for (kind, faults) in [("pgfault", basic.page_faults), ("pgmajfault", basic.major_page_faults)] {
            let Some(faults) = faults else { continue };
            for scope in ["container", "hierarchy"] {
                let labels = [("failure_type", kind), ("scope", scope)];
                self.put(out, &names::FAULTS, &labels, number(faults));
            }
        }
    }

    fn add_times(&self, out: &mut Exposition, started: i64) {
        let seen = u64::try_from(self.at / 1_000_000_000).unwrap_or_default();
        self.put(out, &names::LAST_SEEN, &[], number(seen));
        let started = u64::try_from(started / 1_000_000_000).unwrap_or_default();
        self.put(out, &names::STARTED, &[], number(started));
    }

    fn add_network(&self, out: &mut Exposition, all: &[Counters]) {
        for one in all {
            let directions = [(&names::RECEIVED, one.received), (&names::SENT, one.sent)];
            for (metrics, direction) in directions {
                let values = [direction.bytes, direction.packets, direction.errors, direction.dropped];
                for (metric, value) in metrics.iter().zip(values) {
                    self.put(out, metric, &[("interface", &one.interface)], number(value));
                }
            }
        }
    }

    /// What only a cgroup says.
    fn add_group(&self, out: &mut Exposition, group: &Group) {
        if let Some(cpu) = group.cpu() {
            self.put(out, &names::CPU_USER, &[], seconds(cpu.user));
            self.put(out, &names::CPU_SYSTEM, &[], seconds(cpu.system));
            if let Some(throttling) = cpu.throttling {
                self.put(out, &names::PERIODS, &[], number(throttling.periods));
                self.put(out, &names::THROTTLED_PERIODS, &[], number(throttling.throttled_periods));
                self.put(out, &names::THROTTLED, &[], seconds(throttling.time));
            }
        }
        if let Some(memory) = group.memory() {
            let figures = [
                (&names::CACHE, Some(memory.file)),
                (&names::MAPPED, Some(memory.mapped)),
                (&names::KERNEL, Some(memory.kernel)),
                (&names::PEAK, memory.peak),
                (&names::ACTIVE_FILE, Some(memory.active_file)),
                (&names::INACTIVE_FILE, Some(memory.inactive_file)),
                (&names::LIMIT_HITS, memory.limit_hits),
                (&names::OOM, memory.oom_kills),
            ];
            self.put_all(out, &figures);
        }
        self.put_all(out, &[(&names::PROCESSES, group.process_count()), (&names::THREADS, group.pids())]);
        for (metrics, resource) in
            [(&names::CPU_PRESSURE, "cpu"), (&names::MEMORY_PRESSURE, "memory"), (&names::IO_PRESSURE, "io")]
        {
            if let Some(Pressure { some, full }) = group.pressure(resource) {
                self.put(out, &metrics[0], &[], seconds(some.total));
                self.put(out, &metrics[1], &[], seconds(full.total));
            }
        }
        for DeviceIo { device, read_bytes, written_bytes, reads, writes } in group.io() {
            let values = [read_bytes, written_bytes, reads, writes];
            for (metric, value) in names::FS_IO.iter().zip(values) {
                self.put(out, metric, &[("device", &device)], number(value));
            }
        }
    }

    /// What it may use; 0 is no limit, as these metrics have it.
    fn add_limits(&self, out: &mut Exposition, group: &Group) {
        if let Some((quota, period)) = group.cpu_limit() {
            self.put_all(out, &[(&names::CPU_PERIOD, Some(period)), (&names::CPU_QUOTA, quota)]);
        }
        // From the scale of version 2 back to that of the metric.
        let shares = group.cpu_weight().map(|weight| 2 + weight.saturating_sub(1) * 262_142 / 9999);
        let memory = group.memory();
        let figures = [
            (&names::CPU_SHARES, shares),
            (&names::MEMORY_LIMIT, memory.as_ref().map(|memory| memory.limit.unwrap_or(0))),
            (&names::SWAP_LIMIT, memory.as_ref().map(|memory| memory.swap_limit.unwrap_or(0))),
            (&names::THREADS_MOST, group.pids().map(|_| group.pids_limit().unwrap_or(0))),
        ];
        self.put_all(out, &figures);
    }
}
