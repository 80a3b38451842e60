//! What the service is told by whoever starts it.

pub use orlop_oci::cgroup::MissingControllers;
use std::net::SocketAddr;
use std::path::PathBuf;

/// A resource limit every container gets, in the terms of `setrlimit`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ulimit {
    pub kind: oci_spec::runtime::PosixRlimitType,
    pub soft: u64,
    pub hard: u64,
}

#[derive(Debug, Clone)]
pub struct Config {
    /// Survives a reboot; our records go to `cri/` below it.
    pub root: PathBuf,
    /// Does not survive a reboot; bundles and pinned namespaces go here.
    pub state: PathBuf,
    /// A log file is rotated by the keeper before it grows beyond this; 0 leaves rotation to the kubelet.
    pub log_max_bytes: u64,
    /// Log files kept per container, the current one included.
    pub log_max_files: u32,
    /// Where the cgroup v2 tree is mounted.
    pub cgroup_root: PathBuf,
    pub missing_controllers: MissingControllers,
    pub runtime_name: String,
    pub runtime_version: String,
    /// Empty: containers inherit the keeper's limits.
    pub default_ulimits: Vec<Ulimit>,
    /// Never ask for an `oom_score_adj` below our own, which a process without `CAP_SYS_RESOURCE` could not set.
    pub restrict_oom_score_adj: bool,
    /// Reported to tools that compare pause images, such as kubeadm.
    pub sandbox_image: String,
    /// The streaming server's address; port 0 picks a free one.
    pub stream_address: SocketAddr,
    /// The directory whose file system holds images.
    pub image_root: PathBuf,
    /// The directory whose file system holds the containers' writable layers.
    pub container_root: PathBuf,
    /// The resolver configuration of pods that bring none.
    pub host_resolv_conf: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/orlop".into(),
            state: "/run/orlop".into(),
            log_max_bytes: 0,
            log_max_files: 5,
            cgroup_root: "/sys/fs/cgroup".into(),
            missing_controllers: MissingControllers::Refuse,
            runtime_name: "orlop".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            default_ulimits: Vec::new(),
            restrict_oom_score_adj: false,
            sandbox_image: "registry.k8s.io/pause:3.10.2".into(),
            stream_address: SocketAddr::from(([127, 0, 0, 1], 0)),
            image_root: "/var/lib/orlop/images".into(),
            container_root: "/var/lib/orlop/containers".into(),
            host_resolv_conf: "/etc/resolv.conf".into(),
        }
    }
}
