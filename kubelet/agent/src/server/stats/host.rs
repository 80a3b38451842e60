//! The node as a whole, and our own process: read from `/proc` below a root that is `/` but for tests.

use super::cgroup::keyed;
use super::model::{Cpu, Interface, Io, Memory, Moment, Network, Pressure, PressureLine, Rlimit, Swap};
use super::network::{Counters, default_interface, parse};
use super::sample::Round;
use std::fs;
use std::path::Path;

/// Where the host is looked at.
#[derive(Debug, Clone, Copy)]
pub(super) struct Host<'a>(pub(super) &'a Path);

/// Our own process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Process {
    /// Nanoseconds of processor time.
    pub(super) cpu: u64,
    /// Nanoseconds since 1970.
    pub(super) started: i64,
    pub(super) resident: u64,
    pub(super) virtual_size: u64,
    pub(super) minor_faults: u64,
    pub(super) major_faults: u64,
    pub(super) open_files: Option<u64>,
    pub(super) most_files: Option<u64>,
}

impl Host<'_> {
    pub(super) fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.0.join(path)).ok()
    }

    /// When the host was started, in nanoseconds since 1970.
    pub(super) fn boot_time(&self) -> Option<i64> {
        let seconds = keyed(&self.read("proc/stat")?, "btime")?;
        i64::try_from(seconds).ok()?.checked_mul(1_000_000_000)
    }

    /// Nanoseconds that all processors together were not idle.
    pub(super) fn cpu_time(&self) -> Option<u64> {
        let text = self.read("proc/stat")?;
        let line = text.lines().next()?.strip_prefix("cpu ")?;
        let ticks: Vec<u64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
        // user, nice, system, idle, iowait, irq, softirq, steal; a guest's time is within user's.
        let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|index| ticks.get(*index)).sum();
        Some(nanoseconds(busy))
    }

    pub(super) fn cpu(&self, now: i64, round: &mut Round<'_>) -> Option<Cpu> {
        let usage = self.cpu_time()?;
        Some(Cpu {
            time: Moment(now),
            usage_nano_cores: round.rate("node", now, usage),
            usage_core_nano_seconds: Some(usage),
            psi: self.pressure("cpu"),
        })
    }

    pub(super) fn memory(&self, now: i64) -> Option<Memory> {
        let text = self.read("proc/meminfo")?;
        let total = kilobytes(&text, "MemTotal")?;
        let usage = total.saturating_sub(kilobytes(&text, "MemFree")?);
        let working_set = usage.saturating_sub(kilobytes(&text, "Inactive(file)").unwrap_or_default());
        let faults = self.read("proc/vmstat").unwrap_or_default();
        Some(Memory {
            time: Moment(now),
            available_bytes: Some(total.saturating_sub(working_set)),
            usage_bytes: Some(usage),
            working_set_bytes: Some(working_set),
            rss_bytes: kilobytes(&text, "AnonPages"),
            page_faults: keyed(&faults, "pgfault"),
            major_page_faults: keyed(&faults, "pgmajfault"),
            psi: self.pressure("memory"),
        })
    }

    pub(super) fn swap(&self, now: i64) -> Option<Swap> {
        let text = self.read("proc/meminfo")?;
        let free = kilobytes(&text, "SwapFree")?;
        Some(Swap {
            time: Moment(now),
            swap_available_bytes: Some(free),
            swap_usage_bytes: Some(kilobytes(&text, "SwapTotal")?.saturating_sub(free)),
        })
    }

    pub(super) fn io(&self, now: i64) -> Option<Io> {
        self.pressure("io").map(|psi| Io { time: Moment(now), psi: Some(psi) })
    }

    fn pressure(&self, resource: &str) -> Option<Pressure> {
        pressure(&self.read(&format!("proc/pressure/{resource}"))?)
    }

    pub(super) fn counters(&self) -> Vec<Counters> {
        parse(&self.read("proc/net/dev").unwrap_or_default())
    }

    /// The counters of the network that a process is in.
    pub(super) fn counters_of(&self, process: u32) -> Vec<Counters> {
        parse(&self.read(&format!("proc/{process}/net/dev")).unwrap_or_default())
    }

    pub(super) fn network(&self, now: i64) -> Option<Network> {
        let interfaces: Vec<Interface> = self.counters().into_iter().map(interface).collect();
        let routes = self.read("proc/net/route").unwrap_or_default();
        let name = default_interface(&routes).unwrap_or("eth0");
        let default = interfaces.iter().find(|one| one.name == name).cloned().unwrap_or_default();
        (!interfaces.is_empty()).then_some(Network {
            time: Moment(now),
            default,
            interfaces: Some(interfaces),
        })
    }

    /// How many processes there may be, and how many there are.
    pub(super) fn rlimit(&self, now: i64) -> Option<Rlimit> {
        let number = |path| self.read(path)?.trim().parse::<u64>().ok();
        let limits = [number("proc/sys/kernel/pid_max"), number("proc/sys/kernel/threads-max")];
        // `load load load running/all newest`: threads.
        let load = self.read("proc/loadavg")?;
        let all = load.split(' ').nth(3)?.split_once('/')?.1.parse().ok();
        Some(Rlimit { time: Moment(now), maxpid: limits.into_iter().flatten().min(), curproc: all })
    }

    /// The cgroup this process is in, in the v2 tree.
    pub(super) fn own_cgroup(&self) -> Option<String> {
        let text = self.read("proc/self/cgroup")?;
        text.lines().find_map(|line| line.strip_prefix("0::")).map(str::to_owned)
    }

    pub(super) fn process(&self) -> Option<Process> {
        let text = self.read("proc/self/stat")?;
        // The name in brackets may hold anything. After it comes the state, field 3.
        let words: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |number: usize| words.get(number - 3)?.parse::<u64>().ok();
        let since_boot = i64::try_from(nanoseconds(field(22)?)).ok()?;
        let limits = self.read("proc/self/limits").unwrap_or_default();
        let most = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
        let page = u64::try_from(rustix::param::page_size()).ok()?;
        Some(Process {
            cpu: nanoseconds(field(14)? + field(15)?),
            started: self.boot_time().unwrap_or_default().saturating_add(since_boot),
            resident: field(24)?.saturating_mul(page),
            virtual_size: field(23)?,
            minor_faults: field(10)?,
            major_faults: field(12)?,
            open_files: fs::read_dir(self.0.join("proc/self/fd"))
                .ok()
                .and_then(|entries| u64::try_from(entries.count()).ok()),
            most_files: most.and_then(|line| line.split_whitespace().next()?.parse().ok()),
        })
    }
}

fn interface(counters: Counters) -> Interface {
    Interface {
        name: counters.interface,
        rx_bytes: Some(counters.received.bytes),
        rx_errors: Some(counters.received.errors),
        tx_bytes: Some(counters.sent.bytes),
        tx_errors: Some(counters.sent.errors),
    }
}

/// Clock ticks as nanoseconds.
fn nanoseconds(ticks: u64) -> u64 {
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    ticks.saturating_mul(1_000_000_000 / per_second)
}

fn kilobytes(meminfo: &str, field: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// A pressure file's two lines; that of processors may have only the first.
pub(super) fn pressure(text: &str) -> Option<Pressure> {
    let line = |name: &str| {
        let words = text.lines().find_map(|line| line.strip_prefix(name))?;
        let word =
            |key: &str| words.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        Some(PressureLine {
            total: word("total")?.parse::<u64>().ok()?.saturating_mul(1000),
            avg10: word("avg10")?.parse().ok()?,
            avg60: word("avg60")?.parse().ok()?,
            avg300: word("avg300")?.parse().ok()?,
        })
    };
    Some(Pressure { some: line("some")?, full: line("full").unwrap_or_default() })
}
