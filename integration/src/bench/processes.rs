//! What processes cost: memory they hold, processor time they used.

use anyhow::{Context, Result};
use std::path::Path;
use std::time::Duration;

/// Ticks of `/proc/<pid>/stat` per second; the kernel's interface to user space is fixed at that.
const TICKS: u64 = 100;

/// The first arguments of the program that measured pods run: no cost of the runtime.
pub const WORKLOAD: [&str; 2] = ["/bin/sleep", "3600"];
/// What keeps the namespaces of a lab's node.
const HOLDER: [&str; 2] = ["sleep", "infinity"];

/// Memory of a set of processes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    pub processes: usize,
    /// Proportional set size: pages shared with others count by share.
    pub pss_kb: u64,
    pub rss_kb: u64,
}

/// Every process below a cgroup but the workload: what the runtime keeps running.
pub fn of_runtime(cgroup: &Path) -> Vec<u32> {
    let mut found = Vec::new();
    collect(cgroup, &mut found);
    found.retain(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|b| *b == 0).take(2).collect();
        !line.is_empty() && ![WORKLOAD, HOLDER].iter().any(|known| words == known.map(str::as_bytes))
    });
    found
}

fn collect(cgroup: &Path, found: &mut Vec<u32>) {
    let procs = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    found.extend(procs.lines().filter_map(|line| line.parse::<u32>().ok()));
    for entry in std::fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), found);
        }
    }
}

/// A process that ends meanwhile counts nothing.
#[must_use]
pub fn memory(pids: &[u32]) -> Memory {
    let mut sum = Memory::default();
    for pid in pids {
        let Ok(rollup) = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")) else { continue };
        let field = |name: &str| -> u64 {
            let line = rollup.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().next().and_then(|kb| kb.parse().ok()).unwrap_or(0)
        };
        sum.processes += 1;
        sum.pss_kb += field("Pss:");
        sum.rss_kb += field("Rss:");
    }
    sum
}

/// User and system time that a process has used so far.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    // The name may hold spaces; the fields begin behind its closing bracket, utime and stime being 14 and 15 of all.
    let (_, fields) = text.rsplit_once(')').with_context(|| format!("{path} has no name"))?;
    let ticks: u64 =
        fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(Duration::from_millis(ticks * 1000 / TICKS))
}

/// Processor time of everything that ever ran below a cgroup, ended processes included; the kernel counts it whether or
/// not the tree has a `cpu` controller.
pub fn cpu_time_below(cgroup: &Path) -> Result<Duration> {
    let path = cgroup.join("cpu.stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    let micros = usage.and_then(|usage| usage.trim().parse().ok());
    Ok(Duration::from_micros(micros.with_context(|| format!("{} has no usage_usec", path.display()))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_holds_memory_and_used_processor_time() -> Result<()> {
        let own = memory(&[std::process::id()]);
        assert!(own.processes == 1 && own.pss_kb > 100 && own.rss_kb >= own.pss_kb, "{own:?}");
        let (start, begin) = (cpu_time(std::process::id())?, std::time::Instant::now());
        while cpu_time(std::process::id())? < start + Duration::from_millis(50) {
            assert!(begin.elapsed() < Duration::from_secs(10), "spinning costs no time");
        }
        Ok(())
    }
}
