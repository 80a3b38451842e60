//! What the runtime says about itself and about a container's resources.

use super::Error;
use super::args::{Opt, Parsed};
use super::commands::print;
use crate::Container;
use crate::cgroup::{Pressure, PressureLine};
use serde_json::{Value, json};
use std::path::Path;

/// The form that go-runc parses, line by line.
pub(super) fn version() {
    let version = env!("CARGO_PKG_VERSION");
    let _ = print(&format!("orlop-oci version {version}\nspec: {}\n", crate::state::OCI_VERSION));
}

const MOUNT_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "iversion",
    "lazytime",
    "loud",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "nolazytime",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "remount",
    "rexec",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "unbindable",
];

pub(super) fn features() -> Result<u8, Error> {
    let capabilities: Vec<String> = {
        let mut all: Vec<String> = caps::all().iter().map(ToString::to_string).collect();
        all.sort();
        all
    };
    let features = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": crate::state::OCI_VERSION,
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "capabilities": capabilities,
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": true},
            "seccomp": {
                "enabled": true,
                "actions": ["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP"],
                "operators": ["SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"],
                "archs": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM", "SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
                "knownFlags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"],
                "supportedFlags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"],
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": false}},
            "netDevices": {"enabled": false},
        },
        "annotations": {"org.opencontainers.runc.checkpoint.enabled": "false"},
    });
    print(&format!("{features:#}\n"))
}

pub(super) fn spec(args: &[String]) -> Result<u8, Error> {
    let parsed = Parsed::parse(args, &[Opt(&["bundle", "b"], true), Opt(&["rootless"], false)])?;
    if parsed.is_set("rootless") {
        return Err(Error::Unsupported("spec --rootless"));
    }
    let path = Path::new(parsed.get("bundle").unwrap_or(".")).join("config.json");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(|source| Error::File { what: "make", path: path.clone(), source })?;
    std::io::Write::write_all(&mut file, format!("{:#}\n", default_spec()).as_bytes())
        .map_err(|source| Error::File { what: "write", path, source })?;
    Ok(0)
}

/// A shell with a terminal, in namespaces of its own, with few capabilities.
fn default_spec() -> Value {
    let caps = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "terminal": true,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "orlop",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "cgroup"}],
            "maskedPaths": ["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

fn pressure(found: Option<&Pressure>) -> Value {
    let line = |line: &PressureLine| {
        json!({"avg10": f64::from(line.avg10) / 100.0, "avg60": f64::from(line.avg60) / 100.0,
            "avg300": f64::from(line.avg300) / 100.0, "total": line.total_usec})
    };
    found.map_or(Value::Null, |found| json!({"some": line(&found.some), "full": line(&found.full)}))
}

/// One `stats` event in runc's form.
pub(super) fn stats(container: &Container) -> Result<Value, Error> {
    let stats = container.cgroup().stats()?;
    let mut data = json!({});
    let mut put = |name: &str, value: Value| {
        if let Some(fields) = data.as_object_mut() {
            fields.insert(name.to_owned(), value);
        }
    };
    if let Some(cpu) = &stats.cpu {
        put(
            "cpu",
            json!({
                "usage": {"total": cpu.usage_usec * 1000, "kernel": cpu.system_usec * 1000, "user": cpu.user_usec * 1000},
                "throttling": {"periods": cpu.periods, "throttledPeriods": cpu.throttled_periods,
                    "throttledTime": cpu.throttled_usec * 1000},
                "psi": pressure(cpu.pressure.as_ref()),
            }),
        );
    }
    if let Some(memory) = &stats.memory {
        let raw: serde_json::Map<String, Value> =
            memory.stat.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        put(
            "memory",
            json!({
                "cache": memory.file,
                "usage": {"limit": memory.max.unwrap_or(u64::MAX), "usage": memory.current, "max": memory.peak.unwrap_or(0),
                    "failcnt": container.cgroup().events()?.oom},
                "swap": {"limit": memory.swap_max.unwrap_or(u64::MAX), "usage": memory.swap_current.unwrap_or(0)},
                "raw": raw,
                "psi": pressure(memory.pressure.as_ref()),
            }),
        );
    }
    if let Some(pids) = &stats.pids {
        put("pids", json!({"current": pids.current, "limit": pids.max.unwrap_or(0)}));
    }
    if let Some(devices) = &stats.io {
        let entries: Vec<Value> = devices
            .iter()
            .flat_map(|device| {
                [("Read", device.read_bytes), ("Write", device.write_bytes)].map(|(op, value)| {
                    json!({"major": device.major, "minor": device.minor, "op": op, "value": value})
                })
            })
            .collect();
        put("blkio", json!({"ioServiceBytesRecursive": entries}));
    }
    Ok(json!({"type": "stats", "id": container.id().as_str(), "data": data}))
}
