//! `KubeletConfiguration`, version `kubelet.config.k8s.io/v1beta1`: every key with the kubelet's default.
//!
//! The raw form: what a person may write, and what `/configz` shows. What the kubelet works with is
//! [`super::Config`].

use super::duration::GoDuration;
use super::sections::{
    Authentication, Authorization, CrashLoopBackOff, Logging, MemoryReservation, MemorySwap,
    ShutdownGracePeriodByPriority, Taint, Tracing, UserNamespaces,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

pub const API_VERSION: &str = "kubelet.config.k8s.io/v1beta1";
pub const KIND: &str = "KubeletConfiguration";

/// The kubelet's configuration file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct KubeletConfiguration {
    pub api_version: String,
    pub kind: String,

    // Static pods.
    pub static_pod_path: String,
    #[serde(rename = "staticPodURL")]
    pub static_pod_url: String,
    #[serde(rename = "staticPodURLHeader")]
    pub static_pod_url_header: BTreeMap<String, Vec<String>>,
    pub file_check_frequency: GoDuration,
    pub http_check_frequency: GoDuration,
    pub pod_logs_dir: String,
    pub sync_frequency: GoDuration,

    // HTTP server.
    pub enable_server: bool,
    pub address: String,
    pub port: i32,
    pub read_only_port: i32,
    pub tls_cert_file: String,
    pub tls_private_key_file: String,
    pub tls_cipher_suites: Vec<String>,
    pub tls_curve_preferences: Vec<i32>,
    pub tls_min_version: String,
    pub rotate_certificates: bool,
    #[serde(rename = "serverTLSBootstrap")]
    pub server_tls_bootstrap: bool,
    pub authentication: Authentication,
    pub authorization: Authorization,
    pub healthz_port: i32,
    pub healthz_bind_address: String,
    pub enable_debugging_handlers: bool,
    pub enable_contention_profiling: bool,
    pub enable_profiling_handler: bool,
    pub enable_debug_flags_handler: bool,
    pub enable_system_log_handler: bool,
    pub enable_system_log_query: bool,
    pub streaming_connection_idle_timeout: GoDuration,

    // API client.
    pub content_type: String,
    #[serde(rename = "kubeAPIQPS")]
    pub kube_api_qps: i32,
    #[serde(rename = "kubeAPIBurst")]
    pub kube_api_burst: i32,
    #[serde(rename = "eventRecordQPS")]
    pub event_record_qps: i32,
    pub event_burst: i32,
    pub config_map_and_secret_change_detection_strategy: String,

    // Node.
    pub register_node: bool,
    pub register_with_taints: Vec<Taint>,
    #[serde(rename = "providerID")]
    pub provider_id: String,
    pub node_status_update_frequency: GoDuration,
    pub node_status_report_frequency: GoDuration,
    pub node_lease_duration_seconds: i32,
    pub node_status_max_images: i32,
    pub max_pods: i32,
    pub pods_per_core: i32,
    #[serde(rename = "podCIDR")]
    pub pod_cidr: String,

    // DNS.
    pub cluster_domain: String,
    #[serde(rename = "clusterDNS")]
    pub cluster_dns: Vec<String>,
    pub resolv_conf: String,
    pub hairpin_mode: String,

    // Cgroups and limits.
    pub cgroup_root: String,
    #[serde(rename = "cgroupsPerQOS")]
    pub cgroups_per_qos: bool,
    pub cgroup_driver: String,
    pub kubelet_cgroups: String,
    pub system_cgroups: String,
    pub fail_cgroup_v1: bool,
    #[serde(rename = "singleProcessOOMKill", skip_serializing_if = "Option::is_none")]
    pub single_process_oom_kill: Option<bool>,
    #[serde(rename = "cpuCFSQuota")]
    pub cpu_cfs_quota: bool,
    #[serde(rename = "cpuCFSQuotaPeriod")]
    pub cpu_cfs_quota_period: GoDuration,
    pub pod_pids_limit: i64,
    pub oom_score_adj: i32,
    pub max_open_files: i64,
    pub protect_kernel_defaults: bool,
    #[serde(rename = "makeIPTablesUtilChains")]
    pub make_iptables_util_chains: bool,
    pub iptables_masquerade_bit: i32,
    pub iptables_drop_bit: i32,

    // Resource managers.
    pub cpu_manager_policy: String,
    pub cpu_manager_policy_options: BTreeMap<String, String>,
    pub cpu_manager_reconcile_period: GoDuration,
    pub memory_manager_policy: String,
    pub reserved_memory: Vec<MemoryReservation>,
    pub topology_manager_policy: String,
    pub topology_manager_scope: String,
    pub topology_manager_policy_options: BTreeMap<String, String>,
    pub qos_reserved: BTreeMap<String, String>,

    // Reservations.
    pub system_reserved: BTreeMap<String, String>,
    pub kube_reserved: BTreeMap<String, String>,
    #[serde(rename = "reservedSystemCPUs")]
    pub reserved_system_cpus: String,
    pub system_reserved_cgroup: String,
    pub kube_reserved_cgroup: String,
    pub enforce_node_allocatable: Vec<String>,

    // Eviction.
    pub eviction_hard: BTreeMap<String, String>,
    pub eviction_soft: BTreeMap<String, String>,
    pub eviction_soft_grace_period: BTreeMap<String, String>,
    pub eviction_minimum_reclaim: BTreeMap<String, String>,
    pub eviction_pressure_transition_period: GoDuration,
    pub eviction_max_pod_grace_period: i32,
    pub merge_default_eviction_settings: bool,
    pub kernel_memcg_notification: bool,

    // Memory and swap.
    pub fail_swap_on: bool,
    pub memory_swap: MemorySwap,
    pub memory_throttling_factor: f64,
    pub memory_reservation_policy: String,

    // Images.
    #[serde(rename = "registryPullQPS")]
    pub registry_pull_qps: i32,
    pub registry_burst: i32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serialize_image_pulls: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_parallel_image_pulls: Option<i32>,
    #[serde(rename = "imageMinimumGCAge")]
    pub image_minimum_gc_age: GoDuration,
    #[serde(rename = "imageMaximumGCAge")]
    pub image_maximum_gc_age: GoDuration,
    #[serde(rename = "imageGCHighThresholdPercent")]
    pub image_gc_high_threshold_percent: i32,
    #[serde(rename = "imageGCLowThresholdPercent")]
    pub image_gc_low_threshold_percent: i32,
    pub image_pull_credentials_verification_policy: String,
    pub preloaded_images_verification_allowlist: Vec<String>,

    // Runtime and logs. An empty endpoint means the runtime in our own process.
    pub container_runtime_endpoint: String,
    pub image_service_endpoint: String,
    pub runtime_request_timeout: GoDuration,
    pub container_log_max_size: String,
    pub container_log_max_files: i32,
    pub container_log_max_workers: i32,
    pub container_log_monitor_interval: GoDuration,

    // Volumes.
    pub volume_stats_agg_period: GoDuration,
    pub enable_controller_attach_detach: bool,
    pub volume_plugin_dir: String,
    pub local_storage_capacity_isolation: bool,

    // The rest.
    pub feature_gates: BTreeMap<String, bool>,
    pub allowed_unsafe_sysctls: Vec<String>,
    pub seccomp_default: bool,
    pub shutdown_grace_period: GoDuration,
    pub shutdown_grace_period_critical_pods: GoDuration,
    pub shutdown_grace_period_by_pod_priority: Vec<ShutdownGracePeriodByPriority>,
    pub crash_loop_back_off: CrashLoopBackOff,
    pub user_namespaces: UserNamespaces,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tracing: Option<Tracing>,
    pub logging: Logging,
    pub show_hidden_metrics_for_version: String,
    pub run_once: bool,
}

impl Default for KubeletConfiguration {
    #[allow(clippy::too_many_lines)] // A table: one line for each key.
    fn default() -> Self {
        Self {
            api_version: API_VERSION.to_owned(),
            kind: KIND.to_owned(),
            static_pod_path: String::new(),
            static_pod_url: String::new(),
            static_pod_url_header: BTreeMap::new(),
            file_check_frequency: GoDuration::from_secs(20),
            http_check_frequency: GoDuration::from_secs(20),
            pod_logs_dir: "/var/log/pods".to_owned(),
            sync_frequency: GoDuration::from_secs(60),
            enable_server: true,
            address: "0.0.0.0".to_owned(),
            port: 10250,
            read_only_port: 0,
            tls_cert_file: String::new(),
            tls_private_key_file: String::new(),
            tls_cipher_suites: Vec::new(),
            tls_curve_preferences: Vec::new(),
            tls_min_version: String::new(),
            rotate_certificates: false,
            server_tls_bootstrap: false,
            authentication: Authentication::default(),
            authorization: Authorization::default(),
            healthz_port: 10248,
            healthz_bind_address: "127.0.0.1".to_owned(),
            enable_debugging_handlers: true,
            enable_contention_profiling: false,
            enable_profiling_handler: true,
            enable_debug_flags_handler: true,
            enable_system_log_handler: true,
            enable_system_log_query: false,
            streaming_connection_idle_timeout: GoDuration::from_secs(14400),
            content_type: "application/vnd.kubernetes.protobuf".to_owned(),
            kube_api_qps: 50,
            kube_api_burst: 100,
            event_record_qps: 50,
            event_burst: 100,
            config_map_and_secret_change_detection_strategy: "Watch".to_owned(),
            register_node: true,
            register_with_taints: Vec::new(),
            provider_id: String::new(),
            node_status_update_frequency: GoDuration::from_secs(10),
            node_status_report_frequency: GoDuration::from_secs(300),
            node_lease_duration_seconds: 40,
            node_status_max_images: 50,
            max_pods: 110,
            pods_per_core: 0,
            pod_cidr: String::new(),
            cluster_domain: String::new(),
            cluster_dns: Vec::new(),
            resolv_conf: "/etc/resolv.conf".to_owned(),
            hairpin_mode: "promiscuous-bridge".to_owned(),
            cgroup_root: String::new(),
            cgroups_per_qos: true,
            cgroup_driver: "cgroupfs".to_owned(),
            kubelet_cgroups: String::new(),
            system_cgroups: String::new(),
            fail_cgroup_v1: true,
            single_process_oom_kill: None,
            cpu_cfs_quota: true,
            cpu_cfs_quota_period: GoDuration::from_millis(100),
            pod_pids_limit: -1,
            oom_score_adj: -999,
            max_open_files: 1_000_000,
            protect_kernel_defaults: false,
            make_iptables_util_chains: true,
            iptables_masquerade_bit: 14,
            iptables_drop_bit: 15,
            cpu_manager_policy: "none".to_owned(),
            cpu_manager_policy_options: BTreeMap::new(),
            cpu_manager_reconcile_period: GoDuration::from_secs(10),
            memory_manager_policy: "None".to_owned(),
            reserved_memory: Vec::new(),
            topology_manager_policy: "none".to_owned(),
            topology_manager_scope: "container".to_owned(),
            topology_manager_policy_options: BTreeMap::new(),
            qos_reserved: BTreeMap::new(),
            system_reserved: BTreeMap::new(),
            kube_reserved: BTreeMap::new(),
            reserved_system_cpus: String::new(),
            system_reserved_cgroup: String::new(),
            kube_reserved_cgroup: String::new(),
            enforce_node_allocatable: vec!["pods".to_owned()],
            eviction_hard: default_eviction_hard(),
            eviction_soft: BTreeMap::new(),
            eviction_soft_grace_period: BTreeMap::new(),
            eviction_minimum_reclaim: BTreeMap::new(),
            eviction_pressure_transition_period: GoDuration::from_secs(300),
            eviction_max_pod_grace_period: 0,
            merge_default_eviction_settings: false,
            kernel_memcg_notification: false,
            fail_swap_on: true,
            memory_swap: MemorySwap::default(),
            memory_throttling_factor: 0.9,
            memory_reservation_policy: "None".to_owned(),
            registry_pull_qps: 5,
            registry_burst: 10,
            serialize_image_pulls: None,
            max_parallel_image_pulls: None,
            image_minimum_gc_age: GoDuration::from_secs(120),
            image_maximum_gc_age: GoDuration::from_secs(0),
            image_gc_high_threshold_percent: 85,
            image_gc_low_threshold_percent: 80,
            image_pull_credentials_verification_policy: "NeverVerifyPreloadedImages".to_owned(),
            preloaded_images_verification_allowlist: Vec::new(),
            container_runtime_endpoint: String::new(),
            image_service_endpoint: String::new(),
            runtime_request_timeout: GoDuration::from_secs(120),
            container_log_max_size: "10Mi".to_owned(),
            container_log_max_files: 5,
            container_log_max_workers: 1,
            container_log_monitor_interval: GoDuration::from_secs(10),
            volume_stats_agg_period: GoDuration::from_secs(60),
            enable_controller_attach_detach: true,
            volume_plugin_dir: "/usr/libexec/kubernetes/kubelet-plugins/volume/exec/".to_owned(),
            local_storage_capacity_isolation: true,
            feature_gates: BTreeMap::new(),
            allowed_unsafe_sysctls: Vec::new(),
            seccomp_default: false,
            shutdown_grace_period: GoDuration::from_secs(0),
            shutdown_grace_period_critical_pods: GoDuration::from_secs(0),
            shutdown_grace_period_by_pod_priority: Vec::new(),
            crash_loop_back_off: CrashLoopBackOff::default(),
            user_namespaces: UserNamespaces::default(),
            tracing: None,
            logging: Logging::default(),
            show_hidden_metrics_for_version: String::new(),
            run_once: false,
        }
    }
}

/// The thresholds that hold unless the file names its own.
pub(super) fn default_eviction_hard() -> BTreeMap<String, String> {
    [
        ("memory.available", "100Mi"),
        ("nodefs.available", "10%"),
        ("nodefs.inodesFree", "5%"),
        ("imagefs.available", "15%"),
        ("imagefs.inodesFree", "5%"),
    ]
    .into_iter()
    .map(|(signal, threshold)| (signal.to_owned(), threshold.to_owned()))
    .collect()
}
