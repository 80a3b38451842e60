//! What a pod's specification depends on beside the pod itself: facts about this node.
//!
//! A value, not a service: the node publishes a new one when an address or a resource changes, and everything that turns
//! pods into plans takes it as an argument.

use crate::podspec::quantity::Amount;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::watch;

/// The newest facts, for parts that live longer than one pod.
pub type SharedFacts = watch::Receiver<Arc<Facts>>;

/// Who writes the cgroup tree, which decides how paths in it are spelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CgroupDriver {
    #[default]
    Cgroupfs,
    Systemd,
}

/// The node as pods see it.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Name of the Node object.
    pub node_name: String,
    /// The machine's own host name, which pods in the host's network see.
    pub hostname: String,
    /// Addresses of the node, the primary one first.
    pub host_ips: Vec<IpAddr>,
    /// `/var/lib/kubelet`.
    pub root_dir: PathBuf,
    /// `/var/log/pods`.
    pub pod_logs_dir: PathBuf,
    /// Such as `cluster.local`; may be empty.
    pub cluster_domain: String,
    pub cluster_dns: Vec<IpAddr>,
    /// The resolver configuration that pods with host DNS get; `None` means they get none.
    pub resolv_conf: Option<PathBuf>,
    /// The host's own `/etc/hosts`.
    pub etc_hosts: PathBuf,
    pub cgroup_driver: CgroupDriver,
    /// Above `kubepods`; `/` unless configured.
    pub cgroup_root: String,
    /// Memory of the machine in bytes.
    pub memory_capacity: u64,
    /// What pods may use: the default of `resourceFieldRef` limits.
    pub allocatable: BTreeMap<String, Amount>,
    /// Page sizes in bytes for which the machine can have huge pages.
    pub hugepage_sizes: Vec<u64>,
    /// Pods without a seccomp profile get the runtime's default.
    pub seccomp_default: bool,
    pub cpu_cfs_quota: bool,
    pub cpu_cfs_period_us: u32,
    /// An out-of-memory kill takes only the one process, not its container.
    pub single_process_oom_kill: bool,
    /// The kernel can account swap per cgroup (`memory.swap.max` exists).
    pub swap_accounting: bool,
    /// Runtime handlers (`""` is the default one) that can make a mount recursively read-only.
    pub recursive_read_only_handlers: Vec<String>,
}

impl Facts {
    /// Facts of an unremarkable node; the caller sets what it knows better.
    #[must_use]
    pub fn new(node_name: &str) -> Self {
        Self {
            node_name: node_name.to_owned(),
            hostname: node_name.to_owned(),
            host_ips: Vec::new(),
            root_dir: PathBuf::from("/var/lib/kubelet"),
            pod_logs_dir: PathBuf::from("/var/log/pods"),
            cluster_domain: "cluster.local".to_owned(),
            cluster_dns: Vec::new(),
            resolv_conf: Some(PathBuf::from("/etc/resolv.conf")),
            etc_hosts: PathBuf::from("/etc/hosts"),
            cgroup_driver: CgroupDriver::Cgroupfs,
            cgroup_root: "/".to_owned(),
            memory_capacity: 0,
            allocatable: BTreeMap::new(),
            hugepage_sizes: Vec::new(),
            seccomp_default: false,
            cpu_cfs_quota: true,
            cpu_cfs_period_us: 100_000,
            single_process_oom_kill: false,
            swap_accounting: false,
            recursive_read_only_handlers: Vec::new(),
        }
    }

    /// A channel that will never publish anything else, for tests and one-shot commands.
    #[must_use]
    pub fn fixed(self) -> SharedFacts {
        watch::channel(Arc::new(self)).1
    }

    /// `<root>/pods/<uid>`.
    #[must_use]
    pub fn pod_dir(&self, uid: &str) -> PathBuf {
        self.root_dir.join("pods").join(uid)
    }

    /// `<root>/seccomp`, the base of localhost profiles.
    #[must_use]
    pub fn seccomp_dir(&self) -> PathBuf {
        self.root_dir.join("seccomp")
    }
}

/// Huge page sizes the kernel offers, read from `/sys/kernel/mm/hugepages`.
#[must_use]
pub fn hugepage_sizes(dir: &Path) -> Vec<u64> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut sizes: Vec<u64> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let kib = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()?;
            kib.checked_mul(1024)
        })
        .collect();
    sizes.sort_unstable();
    sizes
}
