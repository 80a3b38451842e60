//! A cgroup's figures, version 2. A file that is not there, for want of its controller or of the cgroup, says nothing.

use super::host::pressure;
use super::model::Pressure;
use std::fs;
use std::path::{Path, PathBuf};

#[derive(Debug, Clone)]
pub(super) struct Group(PathBuf);

/// Times in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Cpu {
    pub(super) usage: u64,
    pub(super) user: u64,
    pub(super) system: u64,
    /// Only where the controller is on.
    pub(super) throttling: Option<Throttling>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Throttling {
    pub(super) periods: u64,
    pub(super) throttled_periods: u64,
    pub(super) time: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Memory {
    pub(super) usage: u64,
    pub(super) peak: Option<u64>,
    pub(super) limit: Option<u64>,
    pub(super) anonymous: u64,
    pub(super) file: u64,
    pub(super) mapped: u64,
    pub(super) kernel: u64,
    pub(super) active_file: u64,
    pub(super) inactive_file: u64,
    pub(super) page_faults: u64,
    pub(super) major_page_faults: u64,
    pub(super) swap: Option<u64>,
    pub(super) swap_limit: Option<u64>,
    pub(super) oom_kills: Option<u64>,
    pub(super) limit_hits: Option<u64>,
}

impl Memory {
    /// Without what the kernel would drop first.
    pub(super) fn working_set(&self) -> u64 {
        self.usage.saturating_sub(self.inactive_file)
    }
}

/// What a device has carried for a cgroup.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct DeviceIo {
    /// `major:minor`.
    pub(super) device: String,
    pub(super) read_bytes: u64,
    pub(super) written_bytes: u64,
    pub(super) reads: u64,
    pub(super) writes: u64,
}

impl Group {
    /// `path` as it is written below the mount, with or without a slash before it.
    pub(super) fn at(mount: &Path, path: impl AsRef<Path>) -> Self {
        let path = path.as_ref();
        Self(mount.join(path.strip_prefix("/").unwrap_or(path)))
    }

    pub(super) fn child(&self, name: &str) -> Self {
        Self(self.0.join(name))
    }

    pub(super) fn exists(&self) -> bool {
        self.0.is_dir()
    }

    pub(super) fn cpu(&self) -> Option<Cpu> {
        let text = self.read("cpu.stat")?;
        let micros = |name| keyed(&text, name).map(|value| value.saturating_mul(1000));
        let throttling = || {
            Some(Throttling {
                periods: keyed(&text, "nr_periods")?,
                throttled_periods: keyed(&text, "nr_throttled")?,
                time: micros("throttled_usec")?,
            })
        };
        Some(Cpu {
            usage: micros("usage_usec")?,
            user: micros("user_usec").unwrap_or_default(),
            system: micros("system_usec").unwrap_or_default(),
            throttling: throttling(),
        })
    }

    pub(super) fn memory(&self) -> Option<Memory> {
        let usage = self.number("memory.current")?;
        let text = self.read("memory.stat").unwrap_or_default();
        let stat = |name| keyed(&text, name).unwrap_or_default();
        let events = self.read("memory.events").unwrap_or_default();
        Some(Memory {
            usage,
            peak: self.number("memory.peak"),
            limit: self.number("memory.max"),
            anonymous: stat("anon"),
            file: stat("file"),
            mapped: stat("file_mapped"),
            kernel: stat("kernel"),
            active_file: stat("active_file"),
            inactive_file: stat("inactive_file"),
            page_faults: stat("pgfault"),
            major_page_faults: stat("pgmajfault"),
            swap: self.number("memory.swap.current"),
            swap_limit: self.number("memory.swap.max"),
            oom_kills: keyed(&events, "oom_kill"),
            limit_hits: keyed(&events, "max"),
        })
    }

    pub(super) fn pressure(&self, resource: &str) -> Option<Pressure> {
        pressure(&self.read(&format!("{resource}.pressure"))?)
    }

    /// Processes and threads in it and below.
    pub(super) fn pids(&self) -> Option<u64> {
        self.number("pids.current")
    }

    pub(super) fn pids_limit(&self) -> Option<u64> {
        self.number("pids.max")
    }

    /// Any process that is in the cgroup itself.
    pub(super) fn a_process(&self) -> Option<u32> {
        self.read("cgroup.procs")?.lines().next()?.parse().ok()
    }

    pub(super) fn process_count(&self) -> Option<u64> {
        self.read("cgroup.procs").and_then(|text| u64::try_from(text.lines().count()).ok())
    }

    pub(super) fn cpu_weight(&self) -> Option<u64> {
        self.number("cpu.weight")
    }

    /// Microseconds of processor time, if limited, and the period they are for.
    pub(super) fn cpu_limit(&self) -> Option<(Option<u64>, u64)> {
        let text = self.read("cpu.max")?;
        let (quota, period) = text.trim().split_once(' ')?;
        Some((quota.parse().ok(), period.parse().ok()?))
    }

    pub(super) fn io(&self) -> Vec<DeviceIo> {
        self.read("io.stat").unwrap_or_default().lines().filter_map(device).collect()
    }

    fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.0.join(file)).ok()
    }

    /// None for `max` too: there is no limit then.
    fn number(&self, file: &str) -> Option<u64> {
        self.read(file)?.trim().parse().ok()
    }
}

fn device(line: &str) -> Option<DeviceIo> {
    let (device, counters) = line.split_once(' ')?;
    let counter = |name: &str| {
        let word = counters.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        word.and_then(|word| word.parse().ok()).unwrap_or_default()
    };
    Some(DeviceIo {
        device: device.to_owned(),
        read_bytes: counter("rbytes"),
        written_bytes: counter("wbytes"),
        reads: counter("rios"),
        writes: counter("wios"),
    })
}

/// A number of a file of lines `name number`.
pub(super) fn keyed(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}
