//! From YAML to [`KubeletConfiguration`], with every error in one go.

use super::{API_VERSION, ConfigError, ConfigErrors, KIND, KubeletConfiguration};
use serde_json::{Map, Value};
use std::path::Path;

/// Keys for which zero means "not set": tools write `0s` and `""` for everything that they leave alone.
const ZERO_MEANS_DEFAULT: &[&str] = &[
    "address",
    "authentication.webhook.cacheTTL",
    "authorization.mode",
    "authorization.webhook.cacheAuthorizedTTL",
    "authorization.webhook.cacheUnauthorizedTTL",
    "cgroupDriver",
    "configMapAndSecretChangeDetectionStrategy",
    "containerLogMaxSize",
    "contentType",
    "cpuManagerPolicy",
    "cpuManagerReconcilePeriod",
    "eventBurst",
    "evictionPressureTransitionPeriod",
    "fileCheckFrequency",
    "hairpinMode",
    "healthzBindAddress",
    "httpCheckFrequency",
    "imageMinimumGCAge",
    "imagePullCredentialsVerificationPolicy",
    "kubeAPIBurst",
    "logging.flushFrequency",
    "logging.format",
    "maxOpenFiles",
    "maxPods",
    "memoryManagerPolicy",
    "memoryReservationPolicy",
    "nodeLeaseDurationSeconds",
    "nodeStatusReportFrequency",
    "nodeStatusUpdateFrequency",
    "podLogsDir",
    "port",
    "registryBurst",
    "runtimeRequestTimeout",
    "streamingConnectionIdleTimeout",
    "syncFrequency",
    "topologyManagerPolicy",
    "topologyManagerScope",
    "volumePluginDir",
    "volumeStatsAggPeriod",
];

/// Reads a configuration file.
pub fn load(file: &Path) -> Result<KubeletConfiguration, ConfigErrors> {
    let origin = file.display().to_string();
    let text = std::fs::read_to_string(file).map_err(|error| {
        ConfigErrors::one(
            &origin,
            "",
            format!("cannot be read: {error}; correct --config or the permissions"),
        )
    })?;
    parse(&origin, &text)
}

/// Reads a configuration file's text; `apiVersion` and `kind` must be there.
pub fn parse(origin: &str, text: &str) -> Result<KubeletConfiguration, ConfigErrors> {
    let map: Map<String, Value> = serde_saphyr::from_str(text).map_err(|error| {
        let line = error.to_string().lines().next().unwrap_or_default().trim().to_owned();
        ConfigErrors::one(origin, "", format!("is not a YAML object: {line}"))
    })?;
    for (key, wanted) in [("apiVersion", API_VERSION), ("kind", KIND)] {
        if !map.contains_key(key) {
            return Err(ConfigErrors::one(origin, key, format!("is missing; write {key}: {wanted}")));
        }
    }
    from_map(origin, map)
}

/// Takes a configuration that is part of another document; `apiVersion` and `kind` may be left out.
pub fn from_map(origin: &str, mut map: Map<String, Value>) -> Result<KubeletConfiguration, ConfigErrors> {
    let mut errors = Vec::new();
    for (key, wanted) in [("apiVersion", API_VERSION), ("kind", KIND)] {
        if let Some(found) = map.get(key).filter(|value| value.as_str() != Some(wanted)) {
            let problem = format!("is {found}, but this kubelet reads only {wanted}");
            errors.push(ConfigError { key: key.to_owned(), problem });
        }
    }
    map.retain(|_, value| !value.is_null());
    for path in ZERO_MEANS_DEFAULT {
        drop_zero(&mut map, path);
    }
    let update_only =
        map.contains_key("nodeStatusUpdateFrequency") && !map.contains_key("nodeStatusReportFrequency");
    // Each key alone on top of the defaults: so one error doesn't hide the others.
    for (key, value) in &map {
        let alone = Map::from_iter([(key.clone(), value.clone())]);
        if let Err(error) = serde_json::from_value::<KubeletConfiguration>(alone.into()) {
            errors.push(ConfigError { key: key.clone(), problem: explain(key, &error) });
        }
    }
    if !errors.is_empty() {
        return Err(ConfigErrors { origin: origin.to_owned(), errors });
    }
    let mut config: KubeletConfiguration = serde_json::from_value(map.into())
        .map_err(|error| ConfigErrors::one(origin, "", error.to_string()))?;
    if update_only {
        config.node_status_report_frequency = config.node_status_update_frequency;
    }
    if config.merge_default_eviction_settings {
        for (signal, threshold) in super::file::default_eviction_hard() {
            config.eviction_hard.entry(signal).or_insert(threshold);
        }
    }
    Ok(config)
}

fn drop_zero(map: &mut Map<String, Value>, path: &str) {
    match path.split_once('.') {
        Some((key, rest)) => {
            if let Some(Value::Object(inner)) = map.get_mut(key) {
                drop_zero(inner, rest);
            }
        }
        None => {
            let zero = match map.get(path) {
                Some(Value::String(text)) => matches!(text.as_str(), "" | "0" | "0s"),
                Some(Value::Number(number)) => number.as_f64() == Some(0.0),
                Some(Value::Null) => true,
                _ => false,
            };
            if zero {
                map.remove(path);
            }
        }
    }
}

/// Serde lists all hundred keys when it doesn't know one.
fn explain(key: &str, error: &serde_json::Error) -> String {
    let text = error.to_string();
    if text.starts_with(&format!("unknown field `{key}`")) {
        "is not a key of KubeletConfiguration v1beta1; remove it or correct its spelling".to_owned()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::GoDuration;

    const HEAD: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n";

    fn read(text: &str) -> Result<KubeletConfiguration, ConfigErrors> {
        parse("f.yaml", &format!("{HEAD}{text}"))
    }

    #[test]
    fn an_empty_configuration_is_all_defaults() {
        assert_eq!(read("").unwrap(), KubeletConfiguration::default());
    }

    #[test]
    fn the_zeros_that_kubeadm_writes_mean_defaults() {
        let config = read(
            "syncFrequency: 0s\nnodeStatusReportFrequency: 0s\nauthentication:\n  webhook:\n    cacheTTL: 0s\n\
             authorization:\n  webhook:\n    cacheAuthorizedTTL: 0s\n    cacheUnauthorizedTTL: 0s\nmemorySwap: {}\n\
             containerRuntimeEndpoint: \"\"\nlogging:\n  flushFrequency: 0\n  options:\n    json:\n      infoBufferSize: \"0\"\n    text:\n      infoBufferSize: \"0\"\n  verbosity: 0\n",
        );
        assert_eq!(config.unwrap(), KubeletConfiguration::default());
    }

    #[test]
    fn zero_is_kept_where_it_means_something() {
        let config = read("registryPullQPS: 0\nhealthzPort: 0\nimageGCLowThresholdPercent: 0\n").unwrap();
        assert_eq!((config.registry_pull_qps, config.healthz_port), (0, 0));
        assert_eq!(config.image_gc_low_threshold_percent, 0);
    }

    #[test]
    fn all_errors_are_told_together() {
        let error =
            read("maxPod: 1\nport: high\nsyncFrequency: soon\nauthentication:\n  anon: true\nmaxPods: 20\n")
                .unwrap_err();
        let keys: Vec<_> = error.errors.iter().map(|e| e.key.as_str()).collect();
        assert_eq!(keys, ["authentication", "maxPod", "port", "syncFrequency"]);
        let text = error.to_string();
        assert!(text.starts_with("kubelet configuration f.yaml has 4 error(s):"), "{text}");
        assert!(text.contains("maxPod: is not a key of KubeletConfiguration"), "{text}");
        assert!(text.contains("`soon` is not a duration"), "{text}");
        assert!(text.contains("unknown field `anon`"), "{text}");
    }

    #[test]
    fn a_file_of_another_kind_is_refused() {
        let text = parse("f", "apiVersion: v1\nkind: Pod\n").unwrap_err().to_string();
        assert!(text.contains("apiVersion: is \"v1\"") && text.contains("kind: is \"Pod\""), "{text}");
        let text = parse("f", "maxPods: 1\n").unwrap_err().to_string();
        assert!(text.contains("apiVersion: is missing"), "{text}");
    }

    #[test]
    fn broken_yaml_is_refused_with_the_reason() {
        let text = parse("f", "a: [1\nb: 2").unwrap_err().to_string();
        assert!(text.contains("is not a YAML object"), "{text}");
    }

    #[test]
    fn the_report_frequency_follows_the_update_frequency_when_only_that_is_given() {
        let config = read("nodeStatusUpdateFrequency: 4s\n").unwrap();
        assert_eq!(config.node_status_report_frequency, GoDuration::from_secs(4));
    }

    #[test]
    fn own_thresholds_replace_the_defaults_unless_they_are_to_be_merged() {
        let own = read("evictionHard:\n  memory.available: 200Mi\n").unwrap();
        assert_eq!(own.eviction_hard.len(), 1);
        let merged =
            read("mergeDefaultEvictionSettings: true\nevictionHard:\n  memory.available: 200Mi\n").unwrap();
        assert_eq!(merged.eviction_hard["memory.available"], "200Mi");
        assert_eq!(merged.eviction_hard.len(), 5);
    }

    #[test]
    fn what_is_shown_can_be_read_again() {
        let config = read("clusterDNS: [10.96.0.10]\nfailCgroupV1: false\nkubeAPIQPS: 7\n").unwrap();
        let shown = serde_json::to_value(&config).unwrap();
        for key in
            ["kubeAPIQPS", "clusterDNS", "failCgroupV1", "cpuCFSQuotaPeriod", "imageGCHighThresholdPercent"]
        {
            assert!(shown.get(key).is_some(), "{key} is missing in {shown}");
        }
        let Value::Object(map) = shown else { panic!("not an object") };
        assert_eq!(from_map("again", map).unwrap(), config);
    }
}
