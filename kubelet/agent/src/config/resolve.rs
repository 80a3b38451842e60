//! From flags and file to what the kubelet works with.

use super::validate::validate;
use super::{ConfigError, ConfigErrors, KubeletConfiguration, KubeletFlags, from_map};
use crate::context::{MissingControllers, Settings};
use crate::pods::image_gc::Limits;
use crate::podspec::quantity::Amount;
use k8s_openapi::api::core::v1 as core;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Keys of the file that have an effect today.
pub const ACTING: &[&str] = &[
    "address",
    "authentication",
    "authorization",
    "cgroupDriver",
    "cgroupRoot",
    "cgroupsPerQOS",
    "clusterDNS",
    "clusterDomain",
    "containerRuntimeEndpoint",
    "cpuCFSQuota",
    "cpuCFSQuotaPeriod",
    "crashLoopBackOff",
    "enableDebuggingHandlers",
    "enableServer",
    "eventBurst",
    "eventRecordQPS",
    "evictionHard",
    "failSwapOn",
    "fileCheckFrequency",
    "healthzBindAddress",
    "healthzPort",
    "imageGCHighThresholdPercent",
    "imageGCLowThresholdPercent",
    "imageMinimumGCAge",
    "imageServiceEndpoint",
    "kubeReserved",
    "maxParallelImagePulls",
    "maxPods",
    "mergeDefaultEvictionSettings",
    "nodeLeaseDurationSeconds",
    "nodeStatusMaxImages",
    "nodeStatusReportFrequency",
    "nodeStatusUpdateFrequency",
    "podCIDR",
    "podLogsDir",
    "podPidsLimit",
    "podsPerCore",
    "port",
    "providerID",
    "readOnlyPort",
    "registerNode",
    "registerWithTaints",
    "registryBurst",
    "registryPullQPS",
    "resolvConf",
    "rotateCertificates",
    "runtimeRequestTimeout",
    "seccompDefault",
    "serializeImagePulls",
    "serverTLSBootstrap",
    "singleProcessOOMKill",
    "staticPodPath",
    "systemReserved",
    "tlsCertFile",
    "tlsPrivateKeyFile",
];

/// Parallel pulls when the configuration leaves it to us, and when it sets no limit.
const PULLS_BY_DEFAULT: usize = 4;
const PULLS_UNLIMITED: usize = 64;

/// What is kept from pods.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Reserved {
    pub cpu: Amount,
    pub memory: Amount,
    pub ephemeral_storage: Amount,
    /// Hard eviction thresholds, which pods may not count on either.
    pub memory_threshold: Threshold,
    pub storage_threshold: Threshold,
}

/// A threshold as an amount or as a share of the capacity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Threshold {
    Amount(Amount),
    /// 0 to 1.
    Share(f64),
}

impl Default for Threshold {
    fn default() -> Self {
        Self::Amount(Amount::ZERO)
    }
}

impl Threshold {
    fn parse(text: Option<&String>) -> Self {
        let Some(text) = text else { return Self::default() };
        match text.strip_suffix('%').map(str::parse::<f64>) {
            Some(Ok(percent)) => Self::Share(percent / 100.0),
            _ => Self::Amount(Amount::parse(text).unwrap_or_default()),
        }
    }

    /// The threshold for this capacity.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)]
    pub fn of(self, capacity: Amount) -> Amount {
        match self {
            Self::Amount(amount) => amount,
            // Shares of bytes: what a float loses is far below a page.
            Self::Share(share) => Amount::from_units((capacity.value() as f64 * share) as i64),
        }
    }
}

/// The kubelet's configuration, parsed and checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// For `/configz`, and for what nothing below has taken apart.
    pub raw: KubeletConfiguration,
    pub node_name: String,
    /// The host's own name, which may differ from the node's.
    pub hostname: String,
    pub kubeconfig: Option<PathBuf>,
    pub bootstrap_kubeconfig: Option<PathBuf>,
    pub cert_dir: PathBuf,
    pub register_node: bool,
    /// Empty: found out at run time.
    pub node_ips: Vec<IpAddr>,
    pub node_labels: BTreeMap<String, String>,
    pub taints: Vec<core::Taint>,
    pub reserved: Reserved,
    pub lease_duration: Duration,
    pub status_update_frequency: Duration,
    pub status_report_frequency: Duration,
    /// None: no cap.
    pub max_images: Option<usize>,
    pub pods_per_core: u32,
    pub port: u16,
    pub settings: Settings,
    /// Keys that were set but have no effect yet.
    pub inactive: Vec<String>,
}

/// Lays the flags over the file and checks the whole.
pub fn resolve(flags: &KubeletFlags, file: KubeletConfiguration) -> Result<Config, ConfigErrors> {
    let origin = flags.config.as_ref().map_or_else(|| "command line".to_owned(), |f| f.display().to_string());
    let raw = overlay(&origin, flags, file)?;
    let mut errors = validate(&raw);
    let mut add = |key: &str, problem: String| errors.push(ConfigError { key: key.to_owned(), problem });
    let node_ips = node_ips(flags.node_ip.as_deref()).unwrap_or_else(|problem| {
        add("--node-ip", problem);
        Vec::new()
    });
    let node_labels = node_labels(flags.node_labels.as_deref()).unwrap_or_else(|problems| {
        problems.into_iter().for_each(|problem| add("--node-labels", problem));
        BTreeMap::new()
    });
    let hostname = rustix::system::uname().nodename().to_string_lossy().trim().to_lowercase();
    let node_name = match flags.hostname_override.as_deref().map(str::trim) {
        None | Some("") => hostname.clone(),
        Some(name) => name.to_lowercase(),
    };
    if !is_subdomain(&node_name) {
        add("--hostname-override", format!("`{node_name}` cannot be a node's name: use a-z, 0-9, - and ."));
    }
    if !errors.is_empty() {
        return Err(ConfigErrors { origin, errors });
    }
    let root_dir = flags.root_dir.clone().unwrap_or_else(|| "/var/lib/kubelet".into());
    Ok(Config {
        hostname,
        kubeconfig: flags.kubeconfig.clone(),
        bootstrap_kubeconfig: flags.bootstrap_kubeconfig.clone(),
        cert_dir: flags.cert_dir.clone().unwrap_or_else(|| root_dir.join("pki")),
        register_node: flags.register_node.unwrap_or(raw.register_node),
        node_labels,
        taints: raw.register_with_taints.iter().map(taint).collect(),
        reserved: reserved(&raw),
        lease_duration: Duration::from_secs(u64::try_from(raw.node_lease_duration_seconds).unwrap_or(40)),
        status_update_frequency: raw.node_status_update_frequency.0,
        status_report_frequency: raw.node_status_report_frequency.0,
        max_images: usize::try_from(raw.node_status_max_images).ok(),
        pods_per_core: u32::try_from(raw.pods_per_core).unwrap_or(0),
        port: u16::try_from(raw.port).unwrap_or(10250),
        settings: settings(&raw, root_dir, &node_ips),
        inactive: inactive(&raw),
        node_ips,
        node_name,
        raw,
    })
}

fn overlay(
    origin: &str,
    flags: &KubeletFlags,
    file: KubeletConfiguration,
) -> Result<KubeletConfiguration, ConfigErrors> {
    if flags.overrides.is_empty() {
        return Ok(file);
    }
    let Ok(Value::Object(mut map)) = serde_json::to_value(&file) else {
        return Err(ConfigErrors::one(origin, "", "cannot be written as an object"));
    };
    for (path, value) in &flags.overrides {
        put(&mut map, path, value.clone());
    }
    from_map(origin, map)
}

/// Maps such as feature gates are merged, everything else is replaced.
fn put(map: &mut Map<String, Value>, path: &str, value: Value) {
    match path.split_once('.') {
        Some((key, rest)) => {
            let inner = map.entry(key).or_insert_with(|| Map::new().into());
            if let Value::Object(inner) = inner {
                put(inner, rest, value);
            }
        }
        None => match (map.get_mut(path), value) {
            (Some(Value::Object(old)), Value::Object(new)) if path == "featureGates" => old.extend(new),
            (_, value) => {
                map.insert(path.to_owned(), value);
            }
        },
    }
}

fn settings(raw: &KubeletConfiguration, root_dir: PathBuf, node_ips: &[IpAddr]) -> Settings {
    let defaults = Settings::default();
    let pulls = match (raw.max_parallel_image_pulls, raw.serialize_image_pulls) {
        (Some(limit), _) => usize::try_from(limit).unwrap_or(1),
        (None, Some(true)) => 1,
        (None, Some(false)) => PULLS_UNLIMITED,
        (None, None) => PULLS_BY_DEFAULT,
    };
    Settings {
        root_dir,
        pod_logs_dir: raw.pod_logs_dir.clone().into(),
        static_pod_path: (!raw.static_pod_path.is_empty()).then(|| raw.static_pod_path.clone().into()),
        file_check_frequency: raw.file_check_frequency.0,
        cgroup_root: if raw.cgroup_root.is_empty() { "/".to_owned() } else { raw.cgroup_root.clone() },
        cgroups_per_qos: raw.cgroups_per_qos,
        missing_controllers: MissingControllers::from_env(),
        cpu_cfs_quota: raw.cpu_cfs_quota,
        cpu_cfs_quota_period: raw.cpu_cfs_quota_period.0,
        pod_pids_limit: u64::try_from(raw.pod_pids_limit).ok(),
        max_pods: usize::try_from(raw.max_pods).unwrap_or(0),
        max_parallel_image_pulls: pulls,
        registry_qps: u32::try_from(raw.registry_pull_qps).unwrap_or(0),
        registry_burst: u32::try_from(raw.registry_burst).unwrap_or(0),
        image_gc: Limits {
            high: raw.image_gc_high_threshold_percent.try_into().unwrap_or(100),
            low: raw.image_gc_low_threshold_percent.try_into().unwrap_or(0),
            minimum_age: raw.image_minimum_gc_age.0,
        },
        runtime_request_timeout: raw.runtime_request_timeout.0,
        max_container_restart_period: raw
            .crash_loop_back_off
            .max_container_restart_period
            .map_or(defaults.max_container_restart_period, |period| period.0),
        node_ips: node_ips.to_vec(),
        ..defaults
    }
}

fn reserved(raw: &KubeletConfiguration) -> Reserved {
    let sum = |resource: &str| {
        [&raw.system_reserved, &raw.kube_reserved]
            .into_iter()
            .filter_map(|reserved| Amount::parse(reserved.get(resource)?).ok())
            .fold(Amount::ZERO, |sum, amount| sum + amount)
    };
    Reserved {
        cpu: sum("cpu"),
        memory: sum("memory"),
        ephemeral_storage: sum("ephemeral-storage"),
        memory_threshold: Threshold::parse(raw.eviction_hard.get("memory.available")),
        storage_threshold: Threshold::parse(raw.eviction_hard.get("nodefs.available")),
    }
}

fn taint(taint: &super::Taint) -> core::Taint {
    core::Taint {
        key: taint.key.clone(),
        value: (!taint.value.is_empty()).then(|| taint.value.clone()),
        effect: taint.effect.clone(),
        time_added: None,
    }
}

fn inactive(raw: &KubeletConfiguration) -> Vec<String> {
    let object = |config: &KubeletConfiguration| match serde_json::to_value(config) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    };
    let (ours, defaults) = (object(raw), object(&KubeletConfiguration::default()));
    ours.into_iter()
        .filter(|(key, value)| !ACTING.contains(&key.as_str()) && defaults.get(key) != Some(value))
        .map(|(key, _)| key)
        .collect()
}

fn node_ips(text: Option<&str>) -> Result<Vec<IpAddr>, String> {
    let Some(text) = text.filter(|text| !text.trim().is_empty()) else { return Ok(Vec::new()) };
    let addresses = text
        .split(',')
        .map(|part| part.trim().parse().map_err(|_| format!("`{part}` is not an IP address")))
        .collect::<Result<Vec<IpAddr>, _>>()?;
    match addresses.as_slice() {
        [one] if one.is_unspecified() => Ok(Vec::new()),
        [_] => Ok(addresses),
        [one, two] if one.is_ipv4() != two.is_ipv4() => Ok(addresses),
        _ => Err(format!("`{text}` must be one address, or one of each family")),
    }
}

/// The labels below kubernetes.io that a node may give itself; the API server refuses others.
const OWN_LABELS: &[&str] = &[
    "kubernetes.io/hostname",
    "kubernetes.io/arch",
    "kubernetes.io/os",
    "beta.kubernetes.io/arch",
    "beta.kubernetes.io/os",
    "beta.kubernetes.io/instance-type",
    "node.kubernetes.io/instance-type",
    "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.beta.kubernetes.io/region",
    "topology.kubernetes.io/zone",
    "topology.kubernetes.io/region",
];

fn node_labels(text: Option<&str>) -> Result<BTreeMap<String, String>, Vec<String>> {
    let mut problems = Vec::new();
    let mut labels = BTreeMap::new();
    for part in text.unwrap_or_default().split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let Some((key, value)) = part.split_once('=') else {
            problems.push(format!("`{part}` is not KEY=VALUE"));
            continue;
        };
        let domain = key.split_once('/').map(|(domain, _)| domain).unwrap_or_default();
        let below = |suffix: &str| {
            domain == suffix || domain.strip_suffix(suffix).is_some_and(|rest| rest.ends_with('.'))
        };
        let protected = below("kubernetes.io") || below("k8s.io");
        let allowed =
            OWN_LABELS.contains(&key) || below("kubelet.kubernetes.io") || below("node.kubernetes.io");
        if protected && !allowed {
            problems.push(format!(
                "`{key}` is reserved: a node may not give it to itself; set it with `kubectl label node`"
            ));
        }
        labels.insert(key.to_owned(), value.to_owned());
    }
    if problems.is_empty() { Ok(labels) } else { Err(problems) }
}

fn is_subdomain(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    name.len() <= 253
        && name.split('.').all(|label| {
            label.bytes().all(|byte| inner(byte) || byte == b'-')
                && label.bytes().next().is_some_and(inner)
                && label.bytes().last().is_some_and(inner)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> KubeletFlags {
        KubeletFlags { hostname_override: Some(" Node-1 ".to_owned()), ..KubeletFlags::default() }
    }

    #[test]
    fn names_are_lowered_and_directories_have_the_usual_defaults() {
        let config = resolve(&flags(), KubeletConfiguration::default()).unwrap();
        assert_eq!(config.node_name, "node-1");
        assert_eq!(config.cert_dir, PathBuf::from("/var/lib/kubelet/pki"));
        assert_eq!(config.lease_duration, Duration::from_secs(40));
        assert_eq!(config.reserved.memory_threshold, Threshold::Amount(Amount::from_units(100 << 20)));
        assert_eq!(config.reserved.storage_threshold, Threshold::Share(0.1));
        assert!(config.inactive.is_empty(), "{:?}", config.inactive);
    }

    #[test]
    fn flags_win_over_the_file_and_feature_gates_are_merged() {
        let mut flags = flags();
        for (name, value) in [
            ("max_pods", "7"),
            ("cluster-dns", "10.0.0.10,10.0.0.11"),
            ("feature-gates", "A=true"),
            ("eviction-hard", "memory.available<1Gi,nodefs.available<5%"),
            ("register-with-taints", "k=v:NoSchedule"),
            ("anonymous-auth", "true"),
        ] {
            flags.set(name, value).unwrap();
        }
        let file = KubeletConfiguration {
            max_pods: 5,
            feature_gates: [("B".to_owned(), false)].into(),
            ..KubeletConfiguration::default()
        };
        let config = resolve(&flags, file).unwrap();
        assert_eq!(config.settings.max_pods, 7);
        assert_eq!(config.raw.cluster_dns.len(), 2);
        assert_eq!(config.raw.feature_gates.len(), 2);
        assert_eq!(config.raw.eviction_hard.len(), 2);
        assert_eq!(config.taints[0].effect, "NoSchedule");
        assert!(config.raw.authentication.anonymous.enabled);
        assert_eq!(config.inactive, ["featureGates"]);
    }

    #[test]
    fn wrong_flags_are_told_together_with_a_wrong_file() {
        let flags = KubeletFlags {
            node_ip: Some("10.0.0.1,10.0.0.2".to_owned()),
            node_labels: Some("a=b,kubernetes.io/role=x,nonsense".to_owned()),
            hostname_override: Some("a_b".to_owned()),
            ..KubeletFlags::default()
        };
        let file = KubeletConfiguration { port: 0, ..KubeletConfiguration::default() };
        let error = resolve(&flags, file).unwrap_err();
        let keys: Vec<_> = error.errors.iter().map(|e| e.key.as_str()).collect();
        assert_eq!(keys, ["port", "--node-ip", "--node-labels", "--node-labels", "--hostname-override"]);
    }

    #[test]
    fn an_unknown_flag_names_what_to_do() {
        let text = flags().set("max-pod", "1").unwrap_err().to_string();
        assert!(text.contains("--max-pod") && text.contains("--config"), "{text}");
        let text = flags().set("max-pods", "many").unwrap_err().to_string();
        assert!(text.contains("`many` is not a whole number"), "{text}");
    }

    #[test]
    fn both_families_may_be_given_and_the_unspecified_address_means_any() {
        assert_eq!(node_ips(Some("10.0.0.1, fd00::1")).unwrap().len(), 2);
        assert!(node_ips(Some("0.0.0.0")).unwrap().is_empty());
    }
}
