//! Reading statistics and events.

use super::{Error, files};
use std::path::Path;

/// What `cgroup.events` and `memory.events` say. Zero where the tree has no memory controller.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Events {
    pub populated: bool,
    pub frozen: bool,
    /// Out-of-memory situations, and processes killed for them.
    pub oom: u64,
    pub oom_kill: u64,
}

/// A reading of the statistics files. `None` where the tree lacks the controller.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    pub cpu: Option<CpuStats>,
    pub memory: Option<MemoryStats>,
    pub pids: Option<PidsStats>,
    pub io: Option<Vec<IoStats>>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuStats {
    pub usage_usec: u64,
    pub user_usec: u64,
    pub system_usec: u64,
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled_usec: u64,
    pub pressure: Option<Pressure>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryStats {
    pub current: u64,
    /// `None` means no limit.
    pub max: Option<u64>,
    pub peak: Option<u64>,
    pub swap_current: Option<u64>,
    pub swap_max: Option<u64>,
    pub anon: u64,
    pub file: u64,
    pub inactive_file: u64,
    pub page_faults: u64,
    pub major_page_faults: u64,
    /// Every line of `memory.stat`.
    pub stat: Vec<(String, u64)>,
    pub pressure: Option<Pressure>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PidsStats {
    pub current: u64,
    pub max: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IoStats {
    pub major: u32,
    pub minor: u32,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

/// Pressure stall information; averages in hundredths of a percent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressure {
    pub some: PressureLine,
    pub full: PressureLine,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PressureLine {
    pub avg10: u32,
    pub avg60: u32,
    pub avg300: u32,
    pub total_usec: u64,
}

/// `key value` lines, as in `cpu.stat`.
fn pairs(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

fn pressure(dir: &Path, file: &str) -> Result<Option<Pressure>, Error> {
    Ok(files::read_optional(dir, file)?.map(|text| parse_pressure(&text)))
}

fn parse_pressure(text: &str) -> Pressure {
    let mut pressure = Pressure::default();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let target = match words.next() {
            Some("some") => &mut pressure.some,
            Some("full") => &mut pressure.full,
            _ => continue,
        };
        for word in words {
            match word.split_once('=') {
                Some(("avg10", value)) => target.avg10 = hundredths(value),
                Some(("avg60", value)) => target.avg60 = hundredths(value),
                Some(("avg300", value)) => target.avg300 = hundredths(value),
                Some(("total", value)) => target.total_usec = value.parse().unwrap_or_default(),
                _ => {}
            }
        }
    }
    pressure
}

/// `12.34` to 1234; the kernel always prints two decimals.
fn hundredths(value: &str) -> u32 {
    let (whole, fraction) = value.split_once('.').unwrap_or((value, "0"));
    let whole: u32 = whole.parse().unwrap_or_default();
    whole.saturating_mul(100).saturating_add(fraction.parse().unwrap_or_default())
}

pub(super) fn events(dir: &Path) -> Result<Events, Error> {
    let mut events = Events::default();
    for (key, value) in pairs(&files::read(dir, "cgroup.events")?) {
        match key {
            "populated" => events.populated = value == 1,
            "frozen" => events.frozen = value == 1,
            _ => {}
        }
    }
    if let Some(text) = files::read_optional(dir, "memory.events")? {
        for (key, value) in pairs(&text) {
            match key {
                "oom" => events.oom = value,
                "oom_kill" => events.oom_kill = value,
                _ => {}
            }
        }
    }
    Ok(events)
}

pub(super) fn read(dir: &Path) -> Result<Stats, Error> {
    Ok(Stats { cpu: cpu(dir)?, memory: memory(dir)?, pids: pids(dir)?, io: io(dir)? })
}

fn cpu(dir: &Path) -> Result<Option<CpuStats>, Error> {
    // Present in every cgroup, controller or not, with at least the usage lines.
    let text = files::read(dir, "cpu.stat")?;
    let mut cpu = CpuStats::default();
    for (key, value) in pairs(&text) {
        match key {
            "usage_usec" => cpu.usage_usec = value,
            "user_usec" => cpu.user_usec = value,
            "system_usec" => cpu.system_usec = value,
            "nr_periods" => cpu.periods = value,
            "nr_throttled" => cpu.throttled_periods = value,
            "throttled_usec" => cpu.throttled_usec = value,
            _ => {}
        }
    }
    cpu.pressure = pressure(dir, "cpu.pressure")?;
    Ok(Some(cpu))
}

fn memory(dir: &Path) -> Result<Option<MemoryStats>, Error> {
    let Some(current) = files::read_optional(dir, "memory.current")? else { return Ok(None) };
    let optional = |file| Ok::<_, Error>(files::read_optional(dir, file)?.as_deref().and_then(number));
    let mut memory = MemoryStats {
        current: number(&current).unwrap_or_default(),
        max: optional("memory.max")?,
        peak: optional("memory.peak")?,
        swap_current: optional("memory.swap.current")?,
        swap_max: optional("memory.swap.max")?,
        pressure: pressure(dir, "memory.pressure")?,
        ..MemoryStats::default()
    };
    for (key, value) in pairs(&files::read_optional(dir, "memory.stat")?.unwrap_or_default()) {
        match key {
            "anon" => memory.anon = value,
            "file" => memory.file = value,
            "inactive_file" => memory.inactive_file = value,
            "pgfault" => memory.page_faults = value,
            "pgmajfault" => memory.major_page_faults = value,
            _ => {}
        }
        memory.stat.push((key.to_owned(), value));
    }
    Ok(Some(memory))
}

fn pids(dir: &Path) -> Result<Option<PidsStats>, Error> {
    let Some(current) = files::read_optional(dir, "pids.current")? else { return Ok(None) };
    let max = files::read_optional(dir, "pids.max")?.as_deref().and_then(number);
    Ok(Some(PidsStats { current: number(&current).unwrap_or_default(), max }))
}

fn io(dir: &Path) -> Result<Option<Vec<IoStats>>, Error> {
    Ok(files::read_optional(dir, "io.stat")?.map(|text| text.lines().filter_map(parse_io).collect()))
}

fn parse_io(line: &str) -> Option<IoStats> {
    let mut words = line.split_ascii_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let mut device = IoStats { major: major.parse().ok()?, minor: minor.parse().ok()?, ..IoStats::default() };
    for word in words {
        let (key, value) = word.split_once('=')?;
        let value = value.parse().unwrap_or_default();
        match key {
            "rbytes" => device.read_bytes = value,
            "wbytes" => device.write_bytes = value,
            "rios" => device.reads = value,
            "wios" => device.writes = value,
            _ => {}
        }
    }
    Some(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_read_in_hundredths() {
        let text = "some avg10=1.25 avg60=0.00 avg300=100.00 total=42\nfull avg10=0.07 avg60=0.00 avg300=0.00 total=7\n";
        let pressure = parse_pressure(text);
        assert_eq!((pressure.some.avg10, pressure.some.avg300, pressure.some.total_usec), (125, 10_000, 42));
        assert_eq!((pressure.full.avg10, pressure.full.total_usec), (7, 7));
    }

    #[test]
    fn io_lines_are_read_by_key() {
        let found = parse_io("8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0").unwrap();
        assert_eq!((found.major, found.read_bytes, found.writes), (8, 10, 2));
        assert_eq!(parse_io("nonsense"), None);
    }

    #[test]
    fn a_tree_without_controllers_gives_none_and_not_zero() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("cpu.stat"), "usage_usec 5\nuser_usec 3\nsystem_usec 2\n").unwrap();
        let stats = read(dir.path()).unwrap();
        assert_eq!(stats.cpu.unwrap().usage_usec, 5);
        assert!(stats.memory.is_none() && stats.pids.is_none() && stats.io.is_none());
    }
}
