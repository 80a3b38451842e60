//! What every part of the kubelet shares: who we are, whom we talk to, how we are set up.

use crate::cri::Cri;
use crate::pods::events::Events;
use k8s_openapi::api::core::v1::Node;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Shared by `Arc`; nothing in it changes but what the `node` channel shows.
#[derive(Debug)]
pub struct Context {
    pub settings: Settings,
    pub node_name: String,
    /// None in standalone mode.
    pub api: Option<orlop_api::Client>,
    pub cri: Cri,
    pub events: Events,
    /// The Node object as the API server last showed it; in standalone mode one of our own making, or none.
    pub node: watch::Receiver<Option<Arc<Node>>>,
}

impl Context {
    /// The node's own addresses, primary first, as pods see them in `status.hostIPs`.
    #[must_use]
    pub fn host_ips(&self) -> Vec<IpAddr> {
        let node = self.node.borrow();
        let addresses = node
            .as_ref()
            .and_then(|node| node.status.as_ref()?.addresses.as_ref())
            .map(|all| {
                all.iter()
                    .filter(|a| a.type_ == "InternalIP")
                    .filter_map(|a| a.address.parse().ok())
                    .collect()
            })
            .unwrap_or_default();
        if Vec::is_empty(&addresses) { self.settings.node_ips.clone() } else { addresses }
    }
}

/// What to do where the cgroup tree lacks a controller that a pod's limits need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MissingControllers {
    #[default]
    Refuse,
    Warn,
}

impl MissingControllers {
    /// From `ORLOP_MISSING_CONTROLLERS`; anything but `warn` refuses.
    #[must_use]
    pub fn from_env() -> Self {
        match std::env::var("ORLOP_MISSING_CONTROLLERS") {
            Ok(value) if value.eq_ignore_ascii_case("warn") => Self::Warn,
            _ => Self::Refuse,
        }
    }
}

/// The part of the configuration that decides how pods are run, in our own types.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `/var/lib/kubelet`.
    pub root_dir: PathBuf,
    /// `/var/log/pods`.
    pub pod_logs_dir: PathBuf,
    /// `/var/log/containers`.
    pub container_links_dir: PathBuf,
    /// A directory of manifests or one manifest.
    pub static_pod_path: Option<PathBuf>,
    pub file_check_frequency: Duration,
    /// Where the cgroup v2 tree is mounted.
    pub cgroup_mount: PathBuf,
    /// The cgroup below which `kubepods` lies, relative to the mount; `/` by default.
    pub cgroup_root: String,
    pub cgroups_per_qos: bool,
    pub missing_controllers: MissingControllers,
    pub cpu_cfs_quota: bool,
    pub cpu_cfs_quota_period: Duration,
    /// None: no limit.
    pub pod_pids_limit: Option<u64>,
    pub max_pods: usize,
    pub max_parallel_image_pulls: usize,
    /// Pulls that may begin each second; 0: no limit.
    pub registry_qps: u32,
    pub registry_burst: u32,
    pub image_gc: crate::pods::image_gc::Limits,
    pub runtime_request_timeout: Duration,
    pub max_container_restart_period: Duration,
    /// Addresses of this node for when there is no Node object.
    pub node_ips: Vec<IpAddr>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            root_dir: "/var/lib/kubelet".into(),
            pod_logs_dir: "/var/log/pods".into(),
            container_links_dir: "/var/log/containers".into(),
            static_pod_path: None,
            file_check_frequency: Duration::from_secs(20),
            cgroup_mount: "/sys/fs/cgroup".into(),
            cgroup_root: "/".into(),
            cgroups_per_qos: true,
            missing_controllers: MissingControllers::Refuse,
            cpu_cfs_quota: true,
            cpu_cfs_quota_period: Duration::from_millis(100),
            pod_pids_limit: None,
            max_pods: 110,
            max_parallel_image_pulls: 4,
            registry_qps: 5,
            registry_burst: 10,
            image_gc: crate::pods::image_gc::Limits::default(),
            runtime_request_timeout: Duration::from_secs(120),
            max_container_restart_period: Duration::from_secs(300),
            node_ips: Vec::new(),
        }
    }
}
