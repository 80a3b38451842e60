//! The kubelet's command line as data. Parsing it is the binary's business.

use super::ConfigErrors;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What the command line says. Flags that repeat a key of the configuration file are in `overrides`.
#[derive(Debug, Clone, Default)]
pub struct KubeletFlags {
    /// None: standalone, no API server.
    pub kubeconfig: Option<PathBuf>,
    pub bootstrap_kubeconfig: Option<PathBuf>,
    pub config: Option<PathBuf>,
    /// `/var/lib/kubelet/pki` by default.
    pub cert_dir: Option<PathBuf>,
    /// `/var/lib/kubelet` by default.
    pub root_dir: Option<PathBuf>,
    /// The host's name by default.
    pub hostname_override: Option<String>,
    /// One address, or one of each family separated by a comma.
    pub node_ip: Option<String>,
    /// `key=value,key=value`.
    pub node_labels: Option<String>,
    pub register_node: Option<bool>,
    /// Keys of the configuration file, by their path such as `authentication.x509.clientCAFile`.
    pub overrides: BTreeMap<String, Value>,
}

/// How a flag's text becomes a value.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Text,
    Number,
    Switch,
    List,
    /// `a=b,c=d`.
    Map,
    /// `signal<threshold,…`.
    Thresholds,
    /// `gate=true,…`.
    Gates,
    /// `key=value:Effect,…`.
    Taints,
    /// `0:memory=1Gi,hugepages-2Mi=64Mi;1:…`: what is kept back of each NUMA node.
    Memory,
}

/// Flags that are keys of the file.
const OVERRIDES: &[(&str, &str, Kind)] = &[
    ("address", "address", Kind::Text),
    ("allowed-unsafe-sysctls", "allowedUnsafeSysctls", Kind::List),
    ("anonymous-auth", "authentication.anonymous.enabled", Kind::Switch),
    ("authentication-token-webhook", "authentication.webhook.enabled", Kind::Switch),
    ("authentication-token-webhook-cache-ttl", "authentication.webhook.cacheTTL", Kind::Text),
    ("authorization-mode", "authorization.mode", Kind::Text),
    ("authorization-webhook-cache-authorized-ttl", "authorization.webhook.cacheAuthorizedTTL", Kind::Text),
    (
        "authorization-webhook-cache-unauthorized-ttl",
        "authorization.webhook.cacheUnauthorizedTTL",
        Kind::Text,
    ),
    ("cgroup-driver", "cgroupDriver", Kind::Text),
    ("cgroup-root", "cgroupRoot", Kind::Text),
    ("cgroups-per-qos", "cgroupsPerQOS", Kind::Switch),
    ("client-ca-file", "authentication.x509.clientCAFile", Kind::Text),
    ("cluster-dns", "clusterDNS", Kind::List),
    ("cluster-domain", "clusterDomain", Kind::Text),
    ("container-log-max-files", "containerLogMaxFiles", Kind::Number),
    ("container-log-max-size", "containerLogMaxSize", Kind::Text),
    ("container-runtime-endpoint", "containerRuntimeEndpoint", Kind::Text),
    ("contention-profiling", "enableContentionProfiling", Kind::Switch),
    ("cpu-cfs-quota", "cpuCFSQuota", Kind::Switch),
    ("cpu-cfs-quota-period", "cpuCFSQuotaPeriod", Kind::Text),
    ("cpu-manager-policy", "cpuManagerPolicy", Kind::Text),
    ("cpu-manager-policy-options", "cpuManagerPolicyOptions", Kind::Map),
    ("cpu-manager-reconcile-period", "cpuManagerReconcilePeriod", Kind::Text),
    ("enable-controller-attach-detach", "enableControllerAttachDetach", Kind::Switch),
    ("enable-debugging-handlers", "enableDebuggingHandlers", Kind::Switch),
    ("enable-server", "enableServer", Kind::Switch),
    ("enforce-node-allocatable", "enforceNodeAllocatable", Kind::List),
    ("event-burst", "eventBurst", Kind::Number),
    ("event-qps", "eventRecordQPS", Kind::Number),
    ("eviction-hard", "evictionHard", Kind::Thresholds),
    ("eviction-max-pod-grace-period", "evictionMaxPodGracePeriod", Kind::Number),
    ("eviction-minimum-reclaim", "evictionMinimumReclaim", Kind::Map),
    ("eviction-pressure-transition-period", "evictionPressureTransitionPeriod", Kind::Text),
    ("eviction-soft", "evictionSoft", Kind::Thresholds),
    ("eviction-soft-grace-period", "evictionSoftGracePeriod", Kind::Map),
    ("fail-cgroupv1", "failCgroupV1", Kind::Switch),
    ("fail-swap-on", "failSwapOn", Kind::Switch),
    ("feature-gates", "featureGates", Kind::Gates),
    ("file-check-frequency", "fileCheckFrequency", Kind::Text),
    ("hairpin-mode", "hairpinMode", Kind::Text),
    ("healthz-bind-address", "healthzBindAddress", Kind::Text),
    ("healthz-port", "healthzPort", Kind::Number),
    ("http-check-frequency", "httpCheckFrequency", Kind::Text),
    ("image-gc-high-threshold", "imageGCHighThresholdPercent", Kind::Number),
    ("image-gc-low-threshold", "imageGCLowThresholdPercent", Kind::Number),
    ("image-service-endpoint", "imageServiceEndpoint", Kind::Text),
    ("iptables-drop-bit", "iptablesDropBit", Kind::Number),
    ("iptables-masquerade-bit", "iptablesMasqueradeBit", Kind::Number),
    ("kernel-memcg-notification", "kernelMemcgNotification", Kind::Switch),
    ("kube-api-burst", "kubeAPIBurst", Kind::Number),
    ("kube-api-content-type", "contentType", Kind::Text),
    ("kube-api-qps", "kubeAPIQPS", Kind::Number),
    ("kube-reserved", "kubeReserved", Kind::Map),
    ("kube-reserved-cgroup", "kubeReservedCgroup", Kind::Text),
    ("kubelet-cgroups", "kubeletCgroups", Kind::Text),
    ("local-storage-capacity-isolation", "localStorageCapacityIsolation", Kind::Switch),
    ("make-iptables-util-chains", "makeIPTablesUtilChains", Kind::Switch),
    ("manifest-url", "staticPodURL", Kind::Text),
    ("max-open-files", "maxOpenFiles", Kind::Number),
    ("max-pods", "maxPods", Kind::Number),
    ("memory-manager-policy", "memoryManagerPolicy", Kind::Text),
    ("minimum-image-ttl-duration", "imageMinimumGCAge", Kind::Text),
    ("node-status-max-images", "nodeStatusMaxImages", Kind::Number),
    ("node-status-update-frequency", "nodeStatusUpdateFrequency", Kind::Text),
    ("oom-score-adj", "oomScoreAdj", Kind::Number),
    ("pod-cidr", "podCIDR", Kind::Text),
    ("pod-manifest-path", "staticPodPath", Kind::Text),
    ("pod-max-pids", "podPidsLimit", Kind::Number),
    ("pods-per-core", "podsPerCore", Kind::Number),
    ("port", "port", Kind::Number),
    ("protect-kernel-defaults", "protectKernelDefaults", Kind::Switch),
    ("provider-id", "providerID", Kind::Text),
    ("qos-reserved", "qosReserved", Kind::Map),
    ("read-only-port", "readOnlyPort", Kind::Number),
    ("register-with-taints", "registerWithTaints", Kind::Taints),
    ("registry-burst", "registryBurst", Kind::Number),
    ("registry-qps", "registryPullQPS", Kind::Number),
    ("reserved-cpus", "reservedSystemCPUs", Kind::Text),
    ("reserved-memory", "reservedMemory", Kind::Memory),
    ("resolv-conf", "resolvConf", Kind::Text),
    ("rotate-certificates", "rotateCertificates", Kind::Switch),
    ("rotate-server-certificates", "serverTLSBootstrap", Kind::Switch),
    ("runtime-request-timeout", "runtimeRequestTimeout", Kind::Text),
    ("seccomp-default", "seccompDefault", Kind::Switch),
    ("serialize-image-pulls", "serializeImagePulls", Kind::Switch),
    ("streaming-connection-idle-timeout", "streamingConnectionIdleTimeout", Kind::Text),
    ("sync-frequency", "syncFrequency", Kind::Text),
    ("system-cgroups", "systemCgroups", Kind::Text),
    ("system-reserved", "systemReserved", Kind::Map),
    ("system-reserved-cgroup", "systemReservedCgroup", Kind::Text),
    ("tls-cert-file", "tlsCertFile", Kind::Text),
    ("tls-cipher-suites", "tlsCipherSuites", Kind::List),
    ("tls-min-version", "tlsMinVersion", Kind::Text),
    ("tls-private-key-file", "tlsPrivateKeyFile", Kind::Text),
    ("topology-manager-policy", "topologyManagerPolicy", Kind::Text),
    ("topology-manager-policy-options", "topologyManagerPolicyOptions", Kind::Map),
    ("topology-manager-scope", "topologyManagerScope", Kind::Text),
    ("volume-plugin-dir", "volumePluginDir", Kind::Text),
    ("volume-stats-agg-period", "volumeStatsAggPeriod", Kind::Text),
];

impl KubeletFlags {
    /// The flags that repeat keys of the file, for the binary's help.
    pub fn override_names() -> impl Iterator<Item = &'static str> {
        OVERRIDES.iter().map(|(name, _, _)| *name)
    }

    /// Whether a flag may stand without a value.
    #[must_use]
    pub fn is_switch(name: &str) -> bool {
        OVERRIDES.iter().any(|(known, _, kind)| *known == name && matches!(kind, Kind::Switch))
    }

    /// Takes a flag that repeats a key of the file. The name comes without dashes in front; `_` is as good as `-`.
    pub fn set(&mut self, name: &str, text: &str) -> Result<(), ConfigErrors> {
        let flag = name.replace('_', "-");
        let fail =
            |problem: &str| ConfigErrors::one("command line", &format!("--{flag}"), problem.to_owned());
        let Some((_, key, kind)) = OVERRIDES.iter().find(|(known, _, _)| *known == flag) else {
            return Err(fail("is not a flag of this kubelet; set the key in the file given with --config"));
        };
        let value = match kind {
            Kind::Text => text.into(),
            Kind::Number => {
                text.parse::<i64>().map_err(|_| fail(&format!("`{text}` is not a whole number")))?.into()
            }
            Kind::Switch => {
                text.parse::<bool>().map_err(|_| fail(&format!("`{text}` is neither true nor false")))?.into()
            }
            Kind::List => parts(text).map(Value::from).collect(),
            Kind::Map => pairs(text, '=').map_err(|p| fail(&p))?,
            Kind::Thresholds => pairs(text, '<').map_err(|p| fail(&p))?,
            Kind::Gates => gates(text).map_err(|p| fail(&p))?,
            Kind::Taints => taints(text).map_err(|p| fail(&p))?,
            Kind::Memory => memory(text).map_err(|p| fail(&p))?,
        };
        // A list or a map may be given piece by piece.
        match (self.overrides.get_mut(*key), value) {
            (Some(Value::Array(all)), Value::Array(more)) => all.extend(more),
            (Some(Value::Object(all)), Value::Object(more)) => all.extend(more),
            (_, value) => {
                self.overrides.insert((*key).to_owned(), value);
            }
        }
        Ok(())
    }
}

fn parts(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty())
}

fn pair(part: &str, mark: char) -> Result<(&str, &str), String> {
    part.split_once(mark).ok_or_else(|| format!("`{part}` has no `{mark}`"))
}

fn pairs(text: &str, mark: char) -> Result<Value, String> {
    parts(text).map(|part| pair(part, mark).map(|(k, v)| (k.to_owned(), Value::from(v)))).collect()
}

fn gates(text: &str) -> Result<Value, String> {
    parts(text)
        .map(|part| {
            let (gate, on) = pair(part, '=')?;
            let on: bool = on.parse().map_err(|_| format!("`{part}` ends neither in true nor false"))?;
            Ok((gate.to_owned(), Value::from(on)))
        })
        .collect()
}

fn taints(text: &str) -> Result<Value, String> {
    parts(text)
        .map(|part| {
            let (taint, effect) = pair(part, ':')?;
            let (key, value) = taint.split_once('=').unwrap_or((taint, ""));
            Ok(serde_json::json!({"key": key, "value": value, "effect": effect}))
        })
        .collect()
}

fn memory(text: &str) -> Result<Value, String> {
    let nodes = text.split(';').map(str::trim).filter(|node| !node.is_empty());
    nodes
        .map(|node| {
            let (number, limits) = pair(node, ':')?;
            let number: u32 =
                number.parse().map_err(|_| format!("`{node}` does not begin with a NUMA node's number"))?;
            Ok(serde_json::json!({"numaNode": number, "limits": pairs(limits, '=')?}))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{KubeletConfiguration, resolve};

    /// A text that each kind of flag understands and no default equals.
    fn sample(name: &str, kind: Kind) -> &'static str {
        match (name, kind) {
            ("address" | "healthz-bind-address", _) => "127.0.0.2",
            ("cluster-dns", _) => "10.0.0.10",
            (_, Kind::Number) => "7",
            (_, Kind::Switch) => "true",
            (_, Kind::Map) => "cpu=1",
            (_, Kind::Thresholds) => "memory.available<1Gi",
            (_, Kind::Gates) => "Some=true",
            (_, Kind::Taints) => "k=v:NoSchedule",
            (_, Kind::Memory) => "0:memory=1Gi;1:memory=2Gi",
            (_, Kind::Text | Kind::List) => "3s",
        }
    }

    #[test]
    fn every_flag_stands_for_a_key_of_the_file() {
        for (name, key, kind) in OVERRIDES {
            let mut flags = KubeletFlags::default();
            flags.set(name, sample(name, *kind)).unwrap();
            // Values may be refused (a mode, an amount), but the key must be known.
            if let Err(errors) = resolve(&flags, KubeletConfiguration::default()) {
                for error in errors.errors {
                    assert!(
                        !error.problem.contains("is not a key") && !error.problem.contains("unknown field"),
                        "--{name}: {error:?}"
                    );
                }
            }
            assert!(flags.overrides.contains_key(*key));
        }
    }

    #[test]
    fn lists_and_maps_may_be_given_piece_by_piece() {
        let mut flags = KubeletFlags::default();
        flags.set("feature-gates", "A=true").unwrap();
        flags.set("feature-gates", "B=false").unwrap();
        flags.set("cluster-dns", "10.0.0.10").unwrap();
        flags.set("cluster-dns", "10.0.0.11").unwrap();
        flags.set("max-pods", "5").unwrap();
        flags.set("max-pods", "6").unwrap();
        assert_eq!(flags.overrides["featureGates"], serde_json::json!({"A": true, "B": false}));
        assert_eq!(flags.overrides["clusterDNS"], serde_json::json!(["10.0.0.10", "10.0.0.11"]));
        assert_eq!(flags.overrides["maxPods"], 6);
    }

    #[test]
    fn memory_is_kept_back_by_numa_node() {
        let mut flags = KubeletFlags::default();
        flags.set("reserved-memory", "0:memory=1Gi,hugepages-2Mi=64Mi;1:memory=2Gi").unwrap();
        let wanted = serde_json::json!([
            {"numaNode": 0, "limits": {"memory": "1Gi", "hugepages-2Mi": "64Mi"}},
            {"numaNode": 1, "limits": {"memory": "2Gi"}},
        ]);
        assert_eq!(flags.overrides["reservedMemory"], wanted);
        assert!(flags.set("reserved-memory", "a:memory=1").unwrap_err().to_string().contains("NUMA"));
    }
}
