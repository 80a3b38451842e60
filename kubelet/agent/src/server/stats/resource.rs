//! `/metrics/resource`: what autoscalers live on, by the names and with the times that metrics-server reads.

use super::exposition::{Exposition, Labels, Metric, number, seconds};
use super::model::{Container, Cpu, Memory, Pod, Summary, Swap};

const FAILED: Metric = Metric::gauge(
    "resource_scrape_error",
    "1 if the runtime gave no figures at this scrape, 0 if it gave them.",
);
const FAILED_FORMERLY: Metric = Metric::gauge("scrape_error", "The former name of resource_scrape_error.");
const STARTED: Metric =
    Metric::gauge("container_start_time_seconds", "When the container was made, in seconds since 1970.");

/// The metrics of one level.
struct Level {
    cpu: Metric,
    memory: Metric,
    swap: Metric,
}

const NODE: Level = Level {
    cpu: Metric::counter("node_cpu_usage_seconds_total", "Processor time that the node has used."),
    memory: Metric::gauge("node_memory_working_set_bytes", "Working set of the node."),
    swap: Metric::gauge("node_swap_usage_bytes", "Swap that the node uses."),
};
const POD: Level = Level {
    cpu: Metric::counter("pod_cpu_usage_seconds_total", "Processor time that the pod has used."),
    memory: Metric::gauge("pod_memory_working_set_bytes", "Working set of the pod."),
    swap: Metric::gauge("pod_swap_usage_bytes", "Swap that the pod uses."),
};
const CONTAINER: Level = Level {
    cpu: Metric::counter("container_cpu_usage_seconds_total", "Processor time that the container has used."),
    memory: Metric::gauge("container_memory_working_set_bytes", "Working set of the container."),
    swap: Metric::gauge("container_swap_usage_bytes", "Swap that the container uses."),
};
const SWAP_LIMIT: Metric =
    Metric::gauge("container_swap_limit_bytes", "Swap that the container may use at most.");

/// None if there is no summary to be had.
pub(super) fn metrics(summary: Option<&Summary>) -> Exposition {
    let mut out = Exposition::default();
    let failed = if summary.is_some() { 0.0 } else { 1.0 };
    out.add(&FAILED, &[], failed, None);
    out.add(&FAILED_FORMERLY, &[], failed, None);
    let Some(summary) = summary else { return out };
    let node = &summary.node;
    NODE.add(&mut out, &[], node.cpu.as_ref(), node.memory.as_ref(), node.swap.as_ref());
    for pod in &summary.pods {
        let labels = [("namespace", pod.pod_ref.namespace.as_str()), ("pod", pod.pod_ref.name.as_str())];
        POD.add(&mut out, &labels, pod.cpu.as_ref(), pod.memory.as_ref(), pod.swap.as_ref());
        for container in &pod.containers {
            add_container(&mut out, pod, container);
        }
    }
    out
}

fn add_container(out: &mut Exposition, pod: &Pod, container: &Container) {
    let labels = [
        ("container", container.name.as_str()),
        ("namespace", &pod.pod_ref.namespace),
        ("pod", &pod.pod_ref.name),
    ];
    if let Ok(started) = u64::try_from(container.start_time.0) {
        out.add(&STARTED, &labels, seconds(started), None);
    }
    let swap = container.swap.as_ref();
    CONTAINER.add(out, &labels, container.cpu.as_ref(), container.memory.as_ref(), swap);
    if let Some(swap) = swap
        && let Some(free) = swap.swap_available_bytes
    {
        let limit = free.saturating_add(swap.swap_usage_bytes.unwrap_or_default());
        out.add(&SWAP_LIMIT, &labels, number(limit), Some(swap.time.0));
    }
}

impl Level {
    fn add(
        &self,
        out: &mut Exposition,
        labels: &Labels<'_>,
        cpu: Option<&Cpu>,
        memory: Option<&Memory>,
        swap: Option<&Swap>,
    ) {
        if let Some((cpu, usage)) = cpu.and_then(|cpu| Some((cpu, cpu.usage_core_nano_seconds?))) {
            out.add(&self.cpu, labels, seconds(usage), Some(cpu.time.0));
        }
        if let Some((memory, bytes)) = memory.and_then(|memory| Some((memory, memory.working_set_bytes?))) {
            out.add(&self.memory, labels, number(bytes), Some(memory.time.0));
        }
        if let Some((swap, bytes)) = swap.and_then(|swap| Some((swap, swap.swap_usage_bytes?))) {
            out.add(&self.swap, labels, number(bytes), Some(swap.time.0));
        }
    }
}
