//! Limits: from the specification's resources to a list of file writes (data), and the writes applied.

use super::{Error, MissingControllers, files};
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};
use std::io;
use std::path::Path;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Text(String),
    /// A new period for `cpu.max` under the quota it has.
    Period(u64),
}

/// One write into a cgroup file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Write {
    file: String,
    value: Value,
    /// Absent although its controller is there, the file may be left out (an option of the kernel's build).
    optional: bool,
    /// Written instead when `file` does not exist.
    otherwise: Option<(String, String)>,
}

impl Write {
    fn new(file: impl Into<String>, value: impl ToString) -> Self {
        Self { file: file.into(), value: Value::Text(value.to_string()), optional: false, otherwise: None }
    }

    fn optional(self) -> Self {
        Self { optional: true, ..self }
    }

    fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or_default()
    }
}

/// Negative means unlimited.
fn limit(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

fn invalid(field: &str, reason: impl Into<String>) -> Error {
    Error::Invalid { field: field.to_owned(), reason: reason.into() }
}

/// v1's 2…262144 to v2's 1…10000, on the curve that maps 1024 to 100 (the linear one gave 39).
fn weight_from_shares(shares: u64) -> u64 {
    if shares <= 2 {
        return 1;
    }
    if shares >= 262_144 {
        return 10_000;
    }
    #[allow(clippy::cast_precision_loss, reason = "shares are below 2^18 here")]
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 1 and 10000")]
    let weight = 10f64.powf(exponent).ceil() as u64;
    weight
}

/// The writes, in the order they must be made.
fn plan(resources: &LinuxResources) -> Result<Vec<Write>, Error> {
    let mut writes = Vec::new();
    if let Some(pids) = resources.pids() {
        // A limit of 0 would stop the container's own first process from being made.
        let value = if pids.limit() == 0 { "1".to_owned() } else { limit(pids.limit()) };
        writes.push(Write::new("pids.max", value));
    }
    if let Some(memory) = resources.memory() {
        plan_memory(memory, &mut writes)?;
    }
    if let Some(block_io) = resources.block_io() {
        plan_io(block_io, &mut writes);
    }
    if let Some(cpu) = resources.cpu() {
        plan_cpu(cpu, &mut writes);
    }
    for huge in resources.hugepage_limits().iter().flatten() {
        let size = huge.page_size();
        if size.is_empty() || !size.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(invalid("hugepageLimits.pageSize", format!("{size:?}")));
        }
        writes.push(Write::new(format!("hugetlb.{size}.max"), limit(huge.limit())));
        writes.push(Write::new(format!("hugetlb.{size}.rsvd.max"), limit(huge.limit())).optional());
    }
    for (device, rdma) in resources.rdma().iter().flatten() {
        let handles = rdma.hca_handles().map(|n| format!(" hca_handle={n}")).unwrap_or_default();
        let objects = rdma.hca_objects().map(|n| format!(" hca_object={n}")).unwrap_or_default();
        writes.push(Write::new("rdma.max", format!("{device}{handles}{objects}")));
    }
    plan_unified(resources, &mut writes)?;
    Ok(writes)
}

fn plan_memory(memory: &LinuxMemory, writes: &mut Vec<Write>) -> Result<(), Error> {
    let limit_value = memory.limit().filter(|&value| value != 0);
    if let Some(swap) = memory.swap().filter(|&value| value != 0) {
        // The specification counts memory and swap together, the kernel swap alone.
        let value = match limit_value {
            _ if swap < 0 => "max".to_owned(),
            Some(limit) if limit > 0 && swap >= limit => (swap - limit).to_string(),
            Some(limit) if limit > 0 => {
                return Err(invalid("memory.swap", format!("{swap} is below the memory limit {limit}")));
            }
            _ => return Err(invalid("memory.swap", "needs a memory limit")),
        };
        writes.push(Write::new("memory.swap.max", value).optional());
    }
    if let Some(value) = limit_value {
        writes.push(Write::new("memory.max", limit(value)));
    }
    if let Some(value) = memory.reservation().filter(|&value| value != 0) {
        writes.push(Write::new("memory.low", limit(value)));
    }
    Ok(())
}

fn plan_cpu(cpu: &LinuxCpu, writes: &mut Vec<Write>) {
    if let Some(idle) = cpu.idle() {
        writes.push(Write::new("cpu.idle", idle));
    }
    // An idle group has no weight; the kernel refuses to set one.
    if let Some(shares) = cpu.shares().filter(|&shares| shares != 0 && cpu.idle() != Some(1)) {
        writes.push(Write::new("cpu.weight", weight_from_shares(shares)));
    }
    let period = cpu.period().filter(|&period| period != 0);
    match (cpu.quota().filter(|&quota| quota != 0), period) {
        (Some(quota), Some(period)) => {
            let quota = if quota < 0 { "max".to_owned() } else { quota.to_string() };
            writes.push(Write::new("cpu.max", format!("{quota} {period}")));
        }
        // The period stays as it is; a new cgroup has 100000.
        (Some(quota), None) => {
            writes.push(Write::new("cpu.max", if quota < 0 { "max".into() } else { quota.to_string() }));
        }
        (None, Some(period)) => {
            writes.push(Write { value: Value::Period(period), ..Write::new("cpu.max", "") });
        }
        (None, None) => {}
    }
    if let Some(burst) = cpu.burst() {
        writes.push(Write::new("cpu.max.burst", burst));
    }
    if let Some(cpus) = cpu.cpus().as_ref().filter(|cpus| !cpus.is_empty()) {
        writes.push(Write::new("cpuset.cpus", cpus));
    }
    if let Some(mems) = cpu.mems().as_ref().filter(|mems| !mems.is_empty()) {
        writes.push(Write::new("cpuset.mems", mems));
    }
}

/// v1's 10…1000 to v2's 1…10000.
fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight).max(10) - 10) * 9999 / 990
}

fn plan_io(block_io: &LinuxBlockIo, writes: &mut Vec<Write>) {
    if let Some(weight) = block_io.weight().filter(|&weight| weight != 0) {
        writes.push(Write {
            otherwise: Some(("io.weight".to_owned(), io_weight(weight).to_string())),
            ..Write::new("io.bfq.weight", weight)
        });
    }
    for device in block_io.weight_device().iter().flatten() {
        if let Some(weight) = device.weight() {
            let number = format!("{}:{}", device.major(), device.minor());
            writes.push(Write {
                otherwise: Some(("io.weight".to_owned(), format!("{number} {}", io_weight(weight)))),
                ..Write::new("io.bfq.weight", format!("{number} {weight}"))
            });
        }
    }
    let mut throttle = |key: &str, devices: &Option<Vec<LinuxThrottleDevice>>| {
        for device in devices.iter().flatten() {
            let rate = if device.rate() == 0 { "max".to_owned() } else { device.rate().to_string() };
            writes.push(Write::new("io.max", format!("{}:{} {key}={rate}", device.major(), device.minor())));
        }
    };
    throttle("rbps", block_io.throttle_read_bps_device());
    throttle("wbps", block_io.throttle_write_bps_device());
    throttle("riops", block_io.throttle_read_iops_device());
    throttle("wiops", block_io.throttle_write_iops_device());
}

fn plan_unified(resources: &LinuxResources, writes: &mut Vec<Write>) -> Result<(), Error> {
    let mut entries: Vec<_> = resources.unified().iter().flatten().collect();
    entries.sort();
    for (file, value) in entries {
        if file.contains('/') || !file.contains('.') {
            return Err(invalid("unified", format!("{file:?} is not the name of a cgroup file")));
        }
        // Files with one line per device take one line per write.
        for line in value.lines().filter(|line| !line.trim().is_empty()) {
            writes.push(Write::new(file, line));
        }
    }
    Ok(())
}

pub(super) fn apply(
    dir: &Path,
    resources: &LinuxResources,
    missing: MissingControllers,
) -> Result<(), Error> {
    if let Some(memory) = resources.memory().as_ref().filter(|m| m.check_before_update() == Some(true)) {
        check_usage(dir, memory)?;
    }
    let writes = plan(resources)?;
    let mut deferred = None;
    for write in &writes {
        match execute(dir, write, missing) {
            // A burst above the old quota, or a quota below the old burst: right once the other one is written.
            Err(Error::Write { source, .. })
                if write.file == "cpu.max" && source.raw_os_error() == Some(libc::EINVAL) =>
            {
                deferred = Some(write);
            }
            other => other?,
        }
    }
    deferred.map_or(Ok(()), |write| execute(dir, write, missing))
}

fn check_usage(dir: &Path, memory: &LinuxMemory) -> Result<(), Error> {
    let Some(limit) = memory.limit().filter(|&limit| limit > 0) else { return Ok(()) };
    let Some(text) = files::read_optional(dir, "memory.current")? else { return Ok(()) };
    let usage = text.trim().parse().unwrap_or_default();
    if limit.unsigned_abs() < usage { Err(Error::BelowUsage { limit, usage }) } else { Ok(()) }
}

fn execute(dir: &Path, write: &Write, missing: MissingControllers) -> Result<(), Error> {
    let value = match &write.value {
        Value::Text(text) => text.clone(),
        Value::Period(period) => {
            let now = files::read_optional(dir, &write.file)?.unwrap_or_default();
            format!("{} {period}", now.split_ascii_whitespace().next().unwrap_or("max"))
        }
    };
    let (mut file, mut value) = (write.file.as_str(), value.as_str());
    let mut result = files::write_raw(dir, file, value);
    if let (Err(error), Some((other, text))) = (&result, &write.otherwise)
        && error.kind() == io::ErrorKind::NotFound
    {
        (file, value) = (other, text);
        result = files::write_raw(dir, file, value);
    }
    let source = match result {
        Ok(()) => return Ok(()),
        Err(source) if source.kind() == io::ErrorKind::NotFound => source,
        Err(source) => return Err(Error::Write { file: dir.join(file), value: value.to_owned(), source }),
    };
    if !dir.exists() {
        return Err(Error::NotExist(dir.to_owned()));
    }
    let controllers = files::read(dir, "cgroup.controllers")?;
    let controller = write.controller();
    let present = controllers.split_ascii_whitespace().any(|name| name == controller);
    if present && write.optional {
        tracing::debug!(file, "the kernel has no such limit");
        return Ok(());
    }
    if present || controller == "cgroup" {
        return Err(Error::Write { file: dir.join(file), value: value.to_owned(), source });
    }
    match missing {
        MissingControllers::Warn => {
            tracing::warn!(controller, file, cgroup = %dir.display(), "limit skipped: controller not available");
            Ok(())
        }
        MissingControllers::Refuse => Err(Error::MissingController {
            controller: controller.to_owned(),
            file: file.to_owned(),
            dir: dir.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn resources(json: &str) -> LinuxResources {
        serde_json::from_str(json).unwrap()
    }

    fn golden(json: &str) -> Vec<String> {
        let show = |write: Write| match write.value {
            Value::Text(text) => format!("{} = {text}", write.file),
            Value::Period(period) => format!("{} = <quota> {period}", write.file),
        };
        plan(&resources(json)).unwrap().into_iter().map(show).collect()
    }

    #[test]
    fn the_limits_of_a_kubernetes_container_become_these_writes() {
        let writes = golden(
            r#"{"memory":{"limit":1000,"swap":1000,"reservation":-1},
                "cpu":{"shares":1024,"quota":50000,"period":100000,"cpus":"0-1","mems":"0"},
                "pids":{"limit":-1},"hugepageLimits":[{"pageSize":"2MB","limit":0}],
                "unified":{"memory.high":"900","io.max":"8:0 rbps=1\n8:1 rbps=2"}}"#,
        );
        assert_eq!(
            writes,
            [
                "pids.max = max",
                "memory.swap.max = 0",
                "memory.max = 1000",
                "memory.low = max",
                "cpu.weight = 100",
                "cpu.max = 50000 100000",
                "cpuset.cpus = 0-1",
                "cpuset.mems = 0",
                "hugetlb.2MB.max = 0",
                "hugetlb.2MB.rsvd.max = 0",
                "io.max = 8:0 rbps=1",
                "io.max = 8:1 rbps=2",
                "memory.high = 900",
            ]
        );
    }

    #[test]
    fn shares_map_onto_weights_at_the_known_points() {
        for (shares, weight) in [(0, 1), (2, 1), (1024, 100), (262_144, 10_000), (1_000_000, 10_000)] {
            assert_eq!(weight_from_shares(shares), weight, "{shares}");
        }
        assert_eq!(golden(r#"{"cpu":{"period":5000}}"#), ["cpu.max = <quota> 5000"]);
        assert_eq!(golden(r#"{"pids":{"limit":0}}"#), ["pids.max = 1"]);
    }

    #[test]
    fn swap_needs_a_limit_and_unified_needs_a_file_name() {
        for bad in [
            r#"{"memory":{"swap":5}}"#,
            r#"{"memory":{"limit":10,"swap":5}}"#,
            r#"{"unified":{"../x.y":"1"}}"#,
            r#"{"hugepageLimits":[{"pageSize":"../2MB","limit":0}]}"#,
        ] {
            assert!(matches!(plan(&resources(bad)), Err(Error::Invalid { .. })), "{bad}");
        }
    }

    #[test]
    fn a_missing_controller_is_named_or_skipped_as_asked() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.controllers"), "hugetlb\n").unwrap();
        let limits = resources(r#"{"memory":{"limit":1000}}"#);
        let refused = apply(dir.path(), &limits, MissingControllers::Refuse).unwrap_err();
        assert!(refused.to_string().contains("the memory controller is not available"), "{refused}");
        apply(dir.path(), &limits, MissingControllers::Warn).unwrap();
    }

    #[test]
    fn a_period_alone_keeps_the_quota() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cpu.max"), "70000 100000").unwrap();
        apply(dir.path(), &resources(r#"{"cpu":{"period":50000}}"#), MissingControllers::Refuse).unwrap();
        assert!(fs::read_to_string(dir.path().join("cpu.max")).unwrap().starts_with("70000 50000"));
    }
}
