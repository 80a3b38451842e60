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
}

/// Flags that are keys of the file.
const OVERRIDES: &[(&str, &str, Kind)] = &[
    ("address", "address", Kind::Text),
    ("allowed-unsafe-sysctls", "allowedUnsafeSysctls", Kind::List),
    ("anonymous-auth", "authentication.anonymous.enabled", Kind::Switch),
    ("authentication-token-webhook", "authentication.webhook.enabled", Kind::Switch),
    ("authorization-mode", "authorization.mode", Kind::Text),
    ("cgroup-driver", "cgroupDriver", Kind::Text),
    ("cgroup-root", "cgroupRoot", Kind::Text),
    ("cgroups-per-qos", "cgroupsPerQOS", Kind::Switch),
    ("client-ca-file", "authentication.x509.clientCAFile", Kind::Text),
    ("cluster-dns", "clusterDNS", Kind::List),
    ("cluster-domain", "clusterDomain", Kind::Text),
    ("container-log-max-files", "containerLogMaxFiles", Kind::Number),
    ("container-log-max-size", "containerLogMaxSize", Kind::Text),
    ("container-runtime-endpoint", "containerRuntimeEndpoint", Kind::Text),
    ("cpu-cfs-quota", "cpuCFSQuota", Kind::Switch),
    ("cpu-cfs-quota-period", "cpuCFSQuotaPeriod", Kind::Text),
    ("enable-server", "enableServer", Kind::Switch),
    ("enforce-node-allocatable", "enforceNodeAllocatable", Kind::List),
    ("eviction-hard", "evictionHard", Kind::Thresholds),
    ("eviction-soft", "evictionSoft", Kind::Thresholds),
    ("fail-cgroupv1", "failCgroupV1", Kind::Switch),
    ("fail-swap-on", "failSwapOn", Kind::Switch),
    ("feature-gates", "featureGates", Kind::Gates),
    ("file-check-frequency", "fileCheckFrequency", Kind::Text),
    ("healthz-bind-address", "healthzBindAddress", Kind::Text),
    ("healthz-port", "healthzPort", Kind::Number),
    ("image-gc-high-threshold", "imageGCHighThresholdPercent", Kind::Number),
    ("image-gc-low-threshold", "imageGCLowThresholdPercent", Kind::Number),
    ("image-service-endpoint", "imageServiceEndpoint", Kind::Text),
    ("kube-reserved", "kubeReserved", Kind::Map),
    ("kube-reserved-cgroup", "kubeReservedCgroup", Kind::Text),
    ("max-pods", "maxPods", Kind::Number),
    ("node-status-update-frequency", "nodeStatusUpdateFrequency", Kind::Text),
    ("pod-cidr", "podCIDR", Kind::Text),
    ("pod-manifest-path", "staticPodPath", Kind::Text),
    ("pod-max-pids", "podPidsLimit", Kind::Number),
    ("pods-per-core", "podsPerCore", Kind::Number),
    ("port", "port", Kind::Number),
    ("protect-kernel-defaults", "protectKernelDefaults", Kind::Switch),
    ("provider-id", "providerID", Kind::Text),
    ("read-only-port", "readOnlyPort", Kind::Number),
    ("register-with-taints", "registerWithTaints", Kind::Taints),
    ("registry-burst", "registryBurst", Kind::Number),
    ("registry-qps", "registryPullQPS", Kind::Number),
    ("resolv-conf", "resolvConf", Kind::Text),
    ("rotate-certificates", "rotateCertificates", Kind::Switch),
    ("rotate-server-certificates", "serverTLSBootstrap", Kind::Switch),
    ("runtime-request-timeout", "runtimeRequestTimeout", Kind::Text),
    ("seccomp-default", "seccompDefault", Kind::Switch),
    ("serialize-image-pulls", "serializeImagePulls", Kind::Switch),
    ("sync-frequency", "syncFrequency", Kind::Text),
    ("system-reserved", "systemReserved", Kind::Map),
    ("system-reserved-cgroup", "systemReservedCgroup", Kind::Text),
    ("tls-cert-file", "tlsCertFile", Kind::Text),
    ("tls-cipher-suites", "tlsCipherSuites", Kind::List),
    ("tls-min-version", "tlsMinVersion", Kind::Text),
    ("tls-private-key-file", "tlsPrivateKeyFile", Kind::Text),
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
        };
        self.overrides.insert((*key).to_owned(), value);
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
