//! What a configuration must not say. All findings are reported together.

use super::{ConfigError, KubeletConfiguration};
use crate::podspec::quantity::Amount;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

const SIGNALS: [&str; 8] = [
    "memory.available",
    "allocatableMemory.available",
    "nodefs.available",
    "nodefs.inodesFree",
    "imagefs.available",
    "imagefs.inodesFree",
    "containerfs.available",
    "containerfs.inodesFree",
];
const PID_SIGNAL: &str = "pid.available";

struct Findings(Vec<ConfigError>);

impl Findings {
    fn add(&mut self, key: &str, problem: impl Into<String>) {
        self.0.push(ConfigError { key: key.to_owned(), problem: problem.into() });
    }

    fn range(&mut self, key: &str, value: i64, lowest: i64, highest: i64) {
        if !(lowest..=highest).contains(&value) {
            self.add(key, format!("is {value}, but must lie between {lowest} and {highest}"));
        }
    }

    fn at_least(&mut self, key: &str, value: i64, lowest: i64) {
        if value < lowest {
            self.add(key, format!("is {value}, but must be at least {lowest}"));
        }
    }

    fn one_of(&mut self, key: &str, value: &str, known: &[&str]) {
        if !known.contains(&value) {
            self.add(key, format!("is `{value}`, but must be one of {}", known.join(", ")));
        }
    }

    fn address(&mut self, key: &str, value: &str) {
        if value.parse::<IpAddr>().is_err() {
            self.add(key, format!("`{value}` is not an IP address"));
        }
    }

    fn amount(&mut self, key: &str, value: &str) {
        match Amount::parse(value) {
            Ok(amount) if amount < Amount::ZERO => self.add(key, format!("`{value}` is negative")),
            Ok(_) => {}
            Err(error) => self.add(key, error.to_string()),
        }
    }
}

pub(super) fn validate(config: &KubeletConfiguration) -> Vec<ConfigError> {
    let mut found = Findings(Vec::new());
    numbers(config, &mut found);
    choices(config, &mut found);
    reservations(config, &mut found);
    evictions(config, &mut found);
    times(config, &mut found);
    found.0
}

fn numbers(config: &KubeletConfiguration, found: &mut Findings) {
    found.range("port", config.port.into(), 1, 65535);
    found.range("readOnlyPort", config.read_only_port.into(), 0, 65535);
    found.range("healthzPort", config.healthz_port.into(), 0, 65535);
    found.range("oomScoreAdj", config.oom_score_adj.into(), -1000, 1000);
    let (high, low) = (config.image_gc_high_threshold_percent, config.image_gc_low_threshold_percent);
    found.range("imageGCHighThresholdPercent", high.into(), 0, 100);
    found.range("imageGCLowThresholdPercent", low.into(), 0, 100);
    if low >= high {
        found.add(
            "imageGCLowThresholdPercent",
            format!("is {low}, but must be below imageGCHighThresholdPercent ({high})"),
        );
    }
    for (key, value, lowest) in [
        ("nodeLeaseDurationSeconds", config.node_lease_duration_seconds, 1),
        ("maxPods", config.max_pods, 0),
        ("podsPerCore", config.pods_per_core, 0),
        ("kubeAPIQPS", config.kube_api_qps, 0),
        ("kubeAPIBurst", config.kube_api_burst, 0),
        ("registryPullQPS", config.registry_pull_qps, 0),
        ("registryBurst", config.registry_burst, 0),
        ("eventRecordQPS", config.event_record_qps, 0),
        ("eventBurst", config.event_burst, 0),
        ("nodeStatusMaxImages", config.node_status_max_images, -1),
        ("containerLogMaxFiles", config.container_log_max_files, 2),
        ("containerLogMaxWorkers", config.container_log_max_workers, 1),
        ("evictionMaxPodGracePeriod", config.eviction_max_pod_grace_period, 0),
        ("maxParallelImagePulls", config.max_parallel_image_pulls.unwrap_or(1), 1),
    ] {
        found.at_least(key, value.into(), lowest);
    }
    found.at_least("maxOpenFiles", config.max_open_files, 0);
    if config.pod_pids_limit == 0 || config.pod_pids_limit < -1 {
        found.add(
            "podPidsLimit",
            format!("is {}, but must be -1 (no limit) or above 0", config.pod_pids_limit),
        );
    }
    if config.max_parallel_image_pulls.is_some_and(|pulls| pulls > 1)
        && config.serialize_image_pulls == Some(true)
    {
        found
            .add("maxParallelImagePulls", "is above 1 while serializeImagePulls is true; remove one of them");
    }
    let ids = config.user_namespaces.ids_per_pod.unwrap_or(65536);
    if ids < 65536 || ids % 65536 != 0 {
        found.add("userNamespaces.idsPerPod", format!("is {ids}, but must be a multiple of 65536"));
    }
    found.amount("containerLogMaxSize", &config.container_log_max_size);
}

fn choices(config: &KubeletConfiguration, found: &mut Findings) {
    found.one_of("authorization.mode", &config.authorization.mode, &["Webhook", "AlwaysAllow"]);
    found.one_of("cgroupDriver", &config.cgroup_driver, &["cgroupfs", "systemd"]);
    found.one_of(
        "configMapAndSecretChangeDetectionStrategy",
        &config.config_map_and_secret_change_detection_strategy,
        &["Get", "Cache", "Watch"],
    );
    found.one_of("hairpinMode", &config.hairpin_mode, &["promiscuous-bridge", "hairpin-veth", "none"]);
    found.one_of("cpuManagerPolicy", &config.cpu_manager_policy, &["none", "static"]);
    found.one_of("memoryManagerPolicy", &config.memory_manager_policy, &["None", "Static"]);
    found.one_of(
        "topologyManagerPolicy",
        &config.topology_manager_policy,
        &["none", "best-effort", "restricted", "single-numa-node"],
    );
    found.one_of("topologyManagerScope", &config.topology_manager_scope, &["container", "pod"]);
    found.one_of(
        "memorySwap.swapBehavior",
        &config.memory_swap.swap_behavior,
        &["", "NoSwap", "LimitedSwap"],
    );
    found.one_of(
        "imagePullCredentialsVerificationPolicy",
        &config.image_pull_credentials_verification_policy,
        &["NeverVerify", "NeverVerifyPreloadedImages", "NeverVerifyAllowlistedImages", "AlwaysVerify"],
    );
    found.one_of("logging.format", &config.logging.format, &["text", "json"]);
    found.address("address", &config.address);
    found.address("healthzBindAddress", &config.healthz_bind_address);
    for server in &config.cluster_dns {
        found.address("clusterDNS", server);
    }
    for taint in &config.register_with_taints {
        if taint.key.is_empty() {
            found.add("registerWithTaints", "a taint has no key");
        }
        found.one_of("registerWithTaints", &taint.effect, &["NoSchedule", "PreferNoSchedule", "NoExecute"]);
    }
    for (endpoint, key) in [
        (&config.container_runtime_endpoint, "containerRuntimeEndpoint"),
        (&config.image_service_endpoint, "imageServiceEndpoint"),
    ] {
        if !endpoint.is_empty() && !endpoint.starts_with("unix:///") && !endpoint.starts_with('/') {
            found.add(
                key,
                format!("is `{endpoint}`, but must be a socket such as unix:///run/orlop/cri.sock"),
            );
        }
    }
    if config.tls_cert_file.is_empty() != config.tls_private_key_file.is_empty() {
        found.add("tlsCertFile", "goes together with tlsPrivateKeyFile; give both or none");
    }
    if config.run_once {
        found.add("runOnce", "is no longer supported; remove it");
    }
}

fn reservations(config: &KubeletConfiguration, found: &mut Findings) {
    let resources = ["cpu", "memory", "ephemeral-storage", "pid"];
    for (key, reserved) in
        [("systemReserved", &config.system_reserved), ("kubeReserved", &config.kube_reserved)]
    {
        for (resource, amount) in reserved {
            found.one_of(key, resource, &resources);
            found.amount(&format!("{key}.{resource}"), amount);
        }
    }
    let known = [
        "none",
        "pods",
        "system-reserved",
        "system-reserved-compressible",
        "kube-reserved",
        "kube-reserved-compressible",
    ];
    for what in &config.enforce_node_allocatable {
        found.one_of("enforceNodeAllocatable", what, &known);
        if what == "none" && config.enforce_node_allocatable.len() > 1 {
            found.add("enforceNodeAllocatable", "`none` cannot stand beside others");
        }
        if what.starts_with("system-reserved") && config.system_reserved_cgroup.is_empty() {
            found.add("systemReservedCgroup", format!("is missing, but enforceNodeAllocatable names {what}"));
        }
        if what.starts_with("kube-reserved") && config.kube_reserved_cgroup.is_empty() {
            found.add("kubeReservedCgroup", format!("is missing, but enforceNodeAllocatable names {what}"));
        }
    }
    if config.enforce_node_allocatable.iter().any(|what| what != "none") && !config.cgroups_per_qos {
        found.add("enforceNodeAllocatable", "needs cgroupsPerQOS; set it to true, or this to [none]");
    }
}

fn evictions(config: &KubeletConfiguration, found: &mut Findings) {
    let mut check = |key: &str, thresholds: &BTreeMap<String, String>, percent: bool| {
        for (signal, threshold) in thresholds {
            let key = format!("{key}.{signal}");
            if !SIGNALS.contains(&signal.as_str()) && signal != PID_SIGNAL {
                found.add(&key, format!("is not a signal; known are {}, {PID_SIGNAL}", SIGNALS.join(", ")));
                continue;
            }
            match threshold.strip_suffix('%') {
                Some(number) if percent => match number.parse::<f64>() {
                    Ok(share) if (0.0..=100.0).contains(&share) => {}
                    _ => found.add(&key, format!("`{threshold}` is not between 0% and 100%")),
                },
                _ => found.amount(&key, threshold),
            }
        }
    };
    check("evictionHard", &config.eviction_hard, true);
    check("evictionSoft", &config.eviction_soft, true);
    check("evictionMinimumReclaim", &config.eviction_minimum_reclaim, true);
    for signal in config.eviction_soft.keys() {
        match config.eviction_soft_grace_period.get(signal).map(|text| text.parse::<super::GoDuration>()) {
            Some(Ok(_)) => {}
            Some(Err(error)) => found.add(&format!("evictionSoftGracePeriod.{signal}"), error.to_string()),
            None => {
                found.add(
                    &format!("evictionSoftGracePeriod.{signal}"),
                    "is missing, but evictionSoft names it",
                );
            }
        }
    }
}

fn times(config: &KubeletConfiguration, found: &mut Findings) {
    let between = |found: &mut Findings, key: &str, value: Duration, low: Duration, high: Duration| {
        if !(low..=high).contains(&value) {
            found.add(key, format!("is {value:?}, but must lie between {low:?} and {high:?}"));
        }
    };
    let millis = Duration::from_millis;
    between(found, "cpuCFSQuotaPeriod", config.cpu_cfs_quota_period.0, millis(1), millis(1000));
    if let Some(period) = config.crash_loop_back_off.max_container_restart_period {
        between(found, "crashLoopBackOff.maxContainerRestartPeriod", period.0, millis(1000), millis(300_000));
    }
    let (all, critical) = (config.shutdown_grace_period, config.shutdown_grace_period_critical_pods);
    if critical > all {
        found.add(
            "shutdownGracePeriodCriticalPods",
            format!("is {critical}, but shutdownGracePeriod is only {all}"),
        );
    }
    let maximum = config.image_maximum_gc_age;
    if !maximum.is_zero() && maximum <= config.image_minimum_gc_age {
        found.add("imageMaximumGCAge", "must be above imageMinimumGCAge, or 0s");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid() {
        assert_eq!(validate(&KubeletConfiguration::default()), []);
    }

    #[test]
    fn every_wrong_value_is_found_in_one_go() {
        let config = KubeletConfiguration {
            port: 0,
            cluster_dns: vec!["dns".to_owned()],
            cgroup_driver: "cgroup".to_owned(),
            image_gc_low_threshold_percent: 90,
            pod_pids_limit: 0,
            kube_reserved: [("gpu".to_owned(), "x".to_owned())].into(),
            eviction_hard: [
                ("disk".to_owned(), "1".to_owned()),
                ("memory.available".to_owned(), "110%".to_owned()),
            ]
            .into(),
            eviction_soft: [("memory.available".to_owned(), "1Gi".to_owned())].into(),
            run_once: true,
            ..KubeletConfiguration::default()
        };
        let keys: Vec<_> = validate(&config).into_iter().map(|error| error.key).collect();
        assert_eq!(
            keys,
            [
                "port",
                "imageGCLowThresholdPercent",
                "podPidsLimit",
                "cgroupDriver",
                "clusterDNS",
                "runOnce",
                "kubeReserved",
                "kubeReserved.gpu",
                "evictionHard.disk",
                "evictionHard.memory.available",
                "evictionSoftGracePeriod.memory.available",
            ]
        );
    }
}
