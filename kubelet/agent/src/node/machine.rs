//! What the host is: read from /proc and /sys.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, UdpSocket};
use std::path::Path;

/// The host's size and names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    pub cpus: u32,
    pub memory: u64,
    pub swap: u64,
    /// Bytes in huge pages by page size.
    pub hugepages: BTreeMap<u64, u64>,
    /// The file system of the kubelet's directory; none if it could not be asked.
    pub storage: Option<u64>,
    pub machine_id: String,
    pub system_uuid: String,
    pub boot_id: String,
    pub kernel_version: String,
    pub os_image: String,
    pub architecture: String,
}

#[derive(Debug, thiserror::Error)]
#[error("cannot find out {what} from {file}: {cause}")]
pub struct MachineError {
    what: &'static str,
    file: String,
    cause: String,
}

impl Machine {
    /// `root` is `/` but for tests; `storage_dir` lies on the file system that pods' data goes to.
    pub fn read(root: &Path, storage_dir: &Path) -> Result<Self, MachineError> {
        let meminfo = read(root, "memory size", "proc/meminfo")?;
        let memory = meminfo_bytes(&meminfo, "MemTotal").ok_or_else(|| MachineError {
            what: "memory size",
            file: "/proc/meminfo".to_owned(),
            cause: "it has no MemTotal".to_owned(),
        })?;
        let uname = rustix::system::uname();
        let machine_id = optional(root, "etc/machine-id")
            .or_else(|| optional(root, "var/lib/dbus/machine-id"))
            .unwrap_or_default();
        Ok(Self {
            cpus: cpus(&read(root, "number of processors", "sys/devices/system/cpu/online")?),
            memory,
            swap: meminfo_bytes(&meminfo, "SwapTotal").unwrap_or_default(),
            hugepages: hugepages(root),
            storage: storage(storage_dir),
            system_uuid: optional(root, "sys/class/dmi/id/product_uuid")
                .or_else(|| optional(root, "sys/hypervisor/uuid"))
                .unwrap_or_else(|| machine_id.clone()),
            machine_id,
            boot_id: optional(root, "proc/sys/kernel/random/boot_id").unwrap_or_default(),
            kernel_version: uname.release().to_string_lossy().into_owned(),
            os_image: optional(root, "etc/os-release")
                .or_else(|| optional(root, "usr/lib/os-release"))
                .and_then(|text| pretty_name(&text))
                .unwrap_or_else(|| "Linux".to_owned()),
            architecture: architecture().to_owned(),
        })
    }
}

/// The architecture by Go's name.
#[must_use]
pub(super) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// The address that traffic to other hosts would leave from, if there is a route at all. Connecting a UDP socket only
/// asks the routing table; nothing is sent.
#[must_use]
pub(super) fn default_address() -> Option<IpAddr> {
    [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")].into_iter().find_map(|(local, remote)| {
        let socket = UdpSocket::bind(local).ok()?;
        socket.connect(remote).ok()?;
        socket.local_addr().ok().map(|address| address.ip()).filter(|ip| !ip.is_unspecified())
    })
}

fn read(root: &Path, what: &'static str, path: &str) -> Result<String, MachineError> {
    fs::read_to_string(root.join(path)).map_err(|error: io::Error| MachineError {
        what,
        file: format!("/{path}"),
        cause: error.to_string(),
    })
}

fn optional(root: &Path, path: &str) -> Option<String> {
    fs::read_to_string(root.join(path))
        .ok()
        .map(|text| text.trim().to_owned())
        .filter(|text| !text.is_empty())
}

fn meminfo_bytes(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Counts the processors in a list such as `0-3,8`.
fn cpus(list: &str) -> u32 {
    list.trim()
        .split(',')
        .filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(last.parse::<u32>().ok()?.checked_sub(first.parse().ok()?)? + 1)
        })
        .sum()
}

fn hugepages(root: &Path) -> BTreeMap<u64, u64> {
    let Ok(entries) = fs::read_dir(root.join("sys/kernel/mm/hugepages")) else { return BTreeMap::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()? * 1024;
            let count =
                fs::read_to_string(entry.path().join("nr_hugepages")).ok()?.trim().parse::<u64>().ok()?;
            Some((size, size.saturating_mul(count)))
        })
        .collect()
}

fn storage(directory: &Path) -> Option<u64> {
    // Before the first start the directory may not exist; its parent lies on the same file system.
    let existing = directory.ancestors().find(|path| path.exists())?;
    let stat = rustix::fs::statvfs(existing).ok()?;
    stat.f_blocks.checked_mul(stat.f_frsize)
}

fn pretty_name(os_release: &str) -> Option<String> {
    let value = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(value.trim().trim_matches(['"', '\'']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_lists_are_counted() {
        for (list, count) in [("0\n", 1), ("0-3", 4), ("0-1,4,6-7\n", 5), ("", 0)] {
            assert_eq!(cpus(list), count, "{list}");
        }
    }

    #[test]
    fn a_machine_is_read_from_its_files() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("proc/meminfo", "MemTotal:  2048 kB\nSwapTotal: 0 kB\n");
        write("sys/devices/system/cpu/online", "0-1\n");
        write("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "3\n");
        write("etc/machine-id", "abc\n");
        write("etc/os-release", "NAME=x\nPRETTY_NAME=\"Debian 12\"\n");
        let machine = Machine::read(root.path(), root.path()).unwrap();
        assert_eq!((machine.cpus, machine.memory), (2, 2 << 20));
        assert_eq!(machine.hugepages, [(2 << 20, 6 << 20)].into());
        assert_eq!((machine.machine_id.as_str(), machine.system_uuid.as_str()), ("abc", "abc"));
        assert_eq!(machine.os_image, "Debian 12");
        assert!(machine.storage.is_some_and(|bytes| bytes > 0));
    }

    #[test]
    fn a_missing_file_is_named() {
        let root = tempfile::tempdir().unwrap();
        let text = Machine::read(root.path(), root.path()).unwrap_err().to_string();
        assert!(text.contains("/proc/meminfo"), "{text}");
    }

    #[test]
    fn this_machine_can_be_read() {
        let machine = Machine::read(Path::new("/"), Path::new("/var/lib/kubelet")).unwrap();
        assert!(machine.cpus > 0 && machine.memory > 0 && machine.storage.is_some());
    }
}
