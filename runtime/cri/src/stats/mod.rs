//! Usage of containers and pods, read from their cgroups when somebody asks.

mod network;

use crate::container::Container;
use crate::error::CriError;
use crate::runtime::{Runtime, now};
use crate::sandbox::Sandbox;
use crate::sandbox::status::has_labels;
use orlop_image::Usage;
use orlop_oci::cgroup::{Cgroup, CpuStats, MemoryStats, Pressure, PressureLine, Stats};
use orlop_proto::cri::{self, UInt64Value};
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// Walking a writable layer costs a system call per file: once in this time is often enough.
const LAYER_USAGE_AGE: Duration = Duration::from_secs(30);
/// A rate over less than this is noise.
const MIN_INTERVAL_NS: i64 = 100_000_000;

/// A reading of a CPU counter, and the rate that was computed from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CpuSample {
    at: i64,
    usage_ns: u64,
    nano_cores: Option<u64>,
}

impl CpuSample {
    /// The sample to keep now, given the last one: its rate is that since the last one.
    fn next(last: Option<Self>, at: i64, usage_ns: u64) -> Self {
        let fresh = Self { at, usage_ns, nano_cores: None };
        let Some(last) = last else { return fresh };
        let elapsed = at.saturating_sub(last.at);
        if usage_ns < last.usage_ns || elapsed <= 0 {
            return fresh;
        }
        if elapsed < MIN_INTERVAL_NS && last.nano_cores.is_some() {
            return last;
        }
        let spent = u128::from(usage_ns - last.usage_ns) * 1_000_000_000;
        let rate = spent / u128::from(elapsed.unsigned_abs());
        Self { nano_cores: Some(u64::try_from(rate).unwrap_or(u64::MAX)), ..fresh }
    }
}

#[allow(clippy::unnecessary_wraps)]
fn value(value: u64) -> Option<UInt64Value> {
    Some(UInt64Value { value })
}

fn psi(pressure: Option<Pressure>) -> Option<cri::PsiStats> {
    let line = |line: PressureLine| cri::PsiData {
        total: line.total_usec.saturating_mul(1000),
        avg10: f64::from(line.avg10) / 100.0,
        avg60: f64::from(line.avg60) / 100.0,
        avg300: f64::from(line.avg300) / 100.0,
    };
    pressure.map(|p| cri::PsiStats { full: Some(line(p.full)), some: Some(line(p.some)) })
}

fn cpu_usage(cpu: &CpuStats, sample: CpuSample) -> cri::CpuUsage {
    cri::CpuUsage {
        timestamp: sample.at,
        usage_core_nano_seconds: value(cpu.usage_usec.saturating_mul(1000)),
        usage_nano_cores: sample.nano_cores.and_then(value),
        psi: psi(cpu.pressure),
    }
}

fn memory_usage(memory: &MemoryStats, timestamp: i64) -> cri::MemoryUsage {
    let working_set = memory.current.saturating_sub(memory.inactive_file);
    cri::MemoryUsage {
        timestamp,
        working_set_bytes: value(working_set),
        available_bytes: memory.max.and_then(|max| value(max.saturating_sub(working_set))),
        usage_bytes: value(memory.current),
        rss_bytes: value(memory.anon),
        page_faults: value(memory.page_faults),
        major_page_faults: value(memory.major_page_faults),
        psi: psi(memory.pressure),
    }
}

fn swap_usage(memory: &MemoryStats, timestamp: i64) -> Option<cri::SwapUsage> {
    let current = memory.swap_current?;
    Some(cri::SwapUsage {
        timestamp,
        swap_available_bytes: memory.swap_max.and_then(|max| value(max.saturating_sub(current))),
        swap_usage_bytes: value(current),
    })
}

pub(crate) fn filesystem_usage(directory: &Path, usage: Usage, timestamp: i64) -> cri::FilesystemUsage {
    cri::FilesystemUsage {
        timestamp,
        fs_id: Some(cri::FilesystemIdentifier { mountpoint: directory.to_string_lossy().into_owned() }),
        used_bytes: value(usage.bytes),
        inodes_used: value(usage.inodes),
    }
}

fn sample(slot: &std::sync::Mutex<Option<CpuSample>>, cpu: &CpuStats, at: i64) -> CpuSample {
    let mut last = slot.lock().unwrap_or_else(PoisonError::into_inner);
    let next = CpuSample::next(*last, at, cpu.usage_usec.saturating_mul(1000));
    *last = Some(next);
    next
}

impl Runtime {
    /// A cgroup that is gone, or has no controllers, has no numbers: that is no error.
    fn read_cgroup(&self, relative: &Path) -> Option<Stats> {
        Cgroup::open(&self.config.cgroup_root, relative).ok()?.stats().ok()
    }

    pub(crate) async fn container_stats(&self, container: &Container) -> cri::ContainerStats {
        let record = container.record();
        let timestamp = now();
        let stats = if container.is_running() { self.read_cgroup(&record.cgroup) } else { None };
        let stats = stats.unwrap_or_default();
        let config = record.config();
        cri::ContainerStats {
            attributes: Some(cri::ContainerAttributes {
                id: container.id.clone(),
                metadata: config.metadata.clone(),
                labels: config.labels.clone(),
                annotations: config.annotations.clone(),
            }),
            cpu: stats.cpu.as_ref().map(|cpu| cpu_usage(cpu, sample(&container.cpu_sample, cpu, timestamp))),
            memory: stats.memory.as_ref().map(|memory| memory_usage(memory, timestamp)),
            writable_layer: self.layer_usage(container, timestamp).await,
            swap: stats.memory.as_ref().and_then(|memory| swap_usage(memory, timestamp)),
            io: None,
        }
    }

    async fn layer_usage(&self, container: &Container, timestamp: i64) -> Option<cri::FilesystemUsage> {
        let cached = *container.layer_usage.lock().unwrap_or_else(PoisonError::into_inner);
        let usage = match cached {
            Some((at, usage)) if at.elapsed() < LAYER_USAGE_AGE => usage,
            _ => {
                let usage = self.images.snapshot_usage(&container.id).await.ok()?;
                *container.layer_usage.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some((Instant::now(), usage));
                usage
            }
        };
        Some(filesystem_usage(&self.config.container_root, usage, timestamp))
    }

    pub(crate) async fn list_container_stats(
        &self,
        filter: Option<cri::ContainerStatsFilter>,
    ) -> Vec<cri::ContainerStats> {
        let filter = filter.unwrap_or_default();
        let mut list = Vec::new();
        for container in self.store.containers() {
            if container.id.starts_with(&filter.id)
                && container.sandbox_id.starts_with(&filter.pod_sandbox_id)
                && has_labels(&container.record().config().labels, &filter.label_selector)
            {
                list.push(self.container_stats(&container).await);
            }
        }
        list
    }

    pub(crate) async fn sandbox_stats(
        &self,
        sandbox: &Arc<Sandbox>,
    ) -> Result<cri::PodSandboxStats, CriError> {
        let record = sandbox.record();
        let config = record.config();
        let timestamp = now();
        let parent = config.linux.as_ref().map_or("", |l| l.cgroup_parent.as_str());
        let cgroup = (!parent.is_empty())
            .then(|| self.read_cgroup(parent.trim_start_matches('/').as_ref()))
            .flatten()
            .unwrap_or_default();
        let mut containers = Vec::new();
        for container in self.store.containers_of(&sandbox.id) {
            if container.is_running() {
                containers.push(self.container_stats(&container).await);
            }
        }
        let network = match (record.phase, sandbox.netns()) {
            (crate::sandbox::Phase::Ready, Some(netns)) => network::read(netns, timestamp).await?,
            _ => None,
        };
        let processes = cgroup
            .pids
            .as_ref()
            .map(|pids| cri::ProcessUsage { timestamp, process_count: value(pids.current) });
        Ok(cri::PodSandboxStats {
            attributes: Some(cri::PodSandboxAttributes {
                id: sandbox.id.clone(),
                metadata: config.metadata.clone(),
                labels: config.labels.clone(),
                annotations: config.annotations.clone(),
            }),
            linux: Some(cri::LinuxPodSandboxStats {
                cpu: cgroup
                    .cpu
                    .as_ref()
                    .map(|cpu| cpu_usage(cpu, sample(&sandbox.cpu_sample, cpu, timestamp))),
                memory: cgroup.memory.as_ref().map(|memory| memory_usage(memory, timestamp)),
                network,
                process: processes,
                containers,
                io: None,
            }),
            windows: None,
        })
    }

    pub(crate) async fn list_sandbox_stats(
        &self,
        filter: Option<cri::PodSandboxStatsFilter>,
    ) -> Vec<cri::PodSandboxStats> {
        let filter = filter.unwrap_or_default();
        let mut list = Vec::new();
        for sandbox in self.store.sandboxes() {
            if sandbox.id.starts_with(&filter.id)
                && has_labels(&sandbox.record().config().labels, &filter.label_selector)
            {
                match self.sandbox_stats(&sandbox).await {
                    Ok(stats) => list.push(stats),
                    Err(error) => {
                        tracing::warn!(sandbox = %sandbox.id, %error, "leaving a sandbox out of the statistics")
                    }
                }
            }
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_since_the_last_sample() {
        let second = 1_000_000_000;
        let first = CpuSample::next(None, 10 * second, 500);
        assert_eq!(first.nano_cores, None);
        let next = CpuSample::next(Some(first), 12 * second, 500 + 1_000_000_000);
        assert_eq!(next.nano_cores, Some(500_000_000));
        assert_eq!(CpuSample::next(Some(next), 12 * second + 5, next.usage_ns + 9), next);
        let restarted = CpuSample::next(Some(next), 20 * second, 3);
        assert_eq!((restarted.usage_ns, restarted.nano_cores), (3, None));
    }

    #[test]
    fn the_working_set_leaves_out_what_the_kernel_would_drop_first() {
        let memory =
            MemoryStats { current: 100, inactive_file: 30, max: Some(200), ..MemoryStats::default() };
        let usage = memory_usage(&memory, 1);
        assert_eq!(usage.working_set_bytes.unwrap().value, 70);
        assert_eq!(usage.available_bytes.unwrap().value, 130);
    }
}
