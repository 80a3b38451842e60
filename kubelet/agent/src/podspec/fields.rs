//! Fields of a pod as text: `fieldRef` and `resourceFieldRef`, for environment variables and downward API files.

use crate::podspec::error::FieldError;
use crate::podspec::facts::Facts;
use crate::podspec::identity;
use crate::podspec::quantity::Amount;
use k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;

/// The text of a field. `pod_ips` are those of the sandbox: the pod's status lags behind while it starts.
pub fn field(pod: &Pod, path: &str, facts: &Facts, pod_ips: &[IpAddr]) -> Result<String, FieldError> {
    let spec = identity::spec(pod);
    let text = |value: Option<&String>| value.cloned().unwrap_or_default();
    if let Some((map, key)) = subscript(path) {
        let values = match map {
            "metadata.labels" => pod.metadata.labels.as_ref(),
            "metadata.annotations" => pod.metadata.annotations.as_ref(),
            _ => return Err(FieldError::Field { path: path.to_owned() }),
        };
        return Ok(text(values.and_then(|values| values.get(key))));
    }
    Ok(match path {
        "metadata.name" => identity::pod_name(pod).to_owned(),
        "metadata.namespace" => identity::namespace(pod).to_owned(),
        "metadata.uid" => identity::uid(pod).to_owned(),
        "metadata.labels" => key_values(pod.metadata.labels.as_ref()),
        "metadata.annotations" => key_values(pod.metadata.annotations.as_ref()),
        "spec.nodeName" => facts.node_name.clone(),
        "spec.serviceAccountName" => text(spec.and_then(|spec| spec.service_account_name.as_ref())),
        "status.hostIP" => first(&facts.host_ips),
        "status.hostIPs" => joined(&facts.host_ips),
        "status.podIP" => first(pod_ips),
        "status.podIPs" => joined(pod_ips),
        _ => return Err(FieldError::Field { path: path.to_owned() }),
    })
}

/// The text of a container's resource, divided by the selector's divisor. `own` is the container that asks.
pub fn resource(
    pod: &Pod,
    selector: &ResourceFieldSelector,
    own: Option<&Container>,
    facts: &Facts,
) -> Result<String, FieldError> {
    let named = selector.container_name.as_deref().unwrap_or_default();
    let container = if named.is_empty() {
        own
    } else {
        identity::containers(pod).find(|container| container.name == named)
    };
    let container = container.ok_or_else(|| FieldError::Container { container: named.to_owned() })?;
    let unsupported = || FieldError::Resource { resource: selector.resource.clone() };
    let (side, name) = selector.resource.split_once('.').ok_or_else(unsupported)?;
    if !matches!(name, "cpu" | "memory" | "ephemeral-storage") && !name.starts_with("hugepages-") {
        return Err(unsupported());
    }
    let resources = container.resources.as_ref();
    let limits = resources.and_then(|resources| resources.limits.as_ref());
    let requests = resources.and_then(|resources| resources.requests.as_ref());
    let stated = match side {
        "limits" => limits.and_then(|limits| limits.get(name)),
        "requests" => requests.and_then(|requests| requests.get(name)),
        _ => return Err(unsupported()),
    };
    let amount = match stated {
        Some(quantity) => Amount::try_from(quantity).map_err(FieldError::Quantity)?,
        None => Amount::ZERO,
    };
    // No limit means: as much as the node gives to pods.
    let amount = if side == "limits" && amount.is_zero() {
        facts.allocatable.get(name).copied().unwrap_or(Amount::ZERO)
    } else {
        amount
    };
    let divisor = match &selector.divisor {
        Some(quantity) => Amount::try_from(quantity).map_err(FieldError::Quantity)?,
        None => Amount::ZERO,
    };
    let divisor = if divisor.is_positive() { divisor } else { Amount::from_units(1) };
    let (amount, divisor) =
        if name == "cpu" { (amount.milli(), divisor.milli()) } else { (amount.value(), divisor.value()) };
    Ok((amount / divisor + i64::from(amount % divisor > 0)).to_string())
}

/// `metadata.labels['key']` as its map and key.
fn subscript(path: &str) -> Option<(&str, &str)> {
    let (map, rest) = path.split_once("['")?;
    Some((map, rest.strip_suffix("']")?))
}

fn first(addresses: &[IpAddr]) -> String {
    addresses.first().map(ToString::to_string).unwrap_or_default()
}

fn joined(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// One `key="escaped value"` line per entry, in the order of keys.
fn key_values(values: Option<&BTreeMap<String, String>>) -> String {
    let mut out = String::new();
    for (key, value) in values.into_iter().flatten() {
        if !out.is_empty() {
            out.push('\n');
        }
        let _ = write!(out, "{key}={}", quoted(value));
    }
    out
}

/// A string literal that Go's `strconv.Unquote` reads back, the form consumers of downward API files parse.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{b}' => out.push_str("\\v"),
            '\u{c}' => out.push_str("\\f"),
            control if control.is_ascii_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(control));
            }
            control if control.is_control() => {
                let _ = write!(out, "\\u{:04x}", u32::from(control));
            }
            plain => out.push(plain),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u", "labels": {"a": "1", "b/c": "two"},
                "annotations": {"note": "line\n\"quoted\" \\ \u{1}é"}},
            "spec": {"serviceAccountName": "sa", "containers": [
                {"name": "c", "resources": {"limits": {"cpu": "1500m", "memory": "100Mi"}, "requests": {"cpu": "1m"}}},
                {"name": "bare"}]}
        }))
        .unwrap()
    }

    fn facts() -> Facts {
        let mut facts = Facts::new("node-1");
        facts.host_ips = vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        facts.allocatable = BTreeMap::from([
            ("cpu".into(), Amount::from_units(4)),
            ("memory".into(), Amount::from_units(1000)),
        ]);
        facts
    }

    #[test]
    fn fields_are_those_of_the_pod_its_sandbox_and_its_node() {
        let ips = ["10.1.0.2".parse().unwrap(), "fd01::2".parse().unwrap()];
        for (path, text) in [
            ("metadata.name", "p"),
            ("metadata.namespace", "ns"),
            ("metadata.uid", "u"),
            ("metadata.labels['b/c']", "two"),
            ("metadata.labels['none']", ""),
            ("metadata.labels", "a=\"1\"\nb/c=\"two\""),
            ("metadata.annotations", "note=\"line\\n\\\"quoted\\\" \\\\ \\x01é\""),
            ("spec.nodeName", "node-1"),
            ("spec.serviceAccountName", "sa"),
            ("status.hostIP", "10.0.0.1"),
            ("status.hostIPs", "10.0.0.1,fd00::1"),
            ("status.podIP", "10.1.0.2"),
            ("status.podIPs", "10.1.0.2,fd01::2"),
        ] {
            assert_eq!(field(&pod(), path, &facts(), &ips).as_deref(), Ok(text), "{path}");
        }
        for path in ["spec.hostname", "metadata.labels['", "spec['a']", ""] {
            assert!(field(&pod(), path, &facts(), &ips).is_err(), "{path}");
        }
    }

    #[test]
    fn resources_are_divided_rounded_up_and_default_to_what_the_node_has() {
        let pod = pod();
        for (container, name, divisor, text) in [
            ("c", "limits.cpu", "", "2"),
            ("c", "limits.cpu", "1m", "1500"),
            ("c", "limits.cpu", "0", "2"),
            ("c", "requests.cpu", "", "1"),
            ("c", "limits.memory", "1Mi", "100"),
            ("c", "limits.memory", "", "104857600"),
            ("c", "requests.memory", "", "0"),
            ("bare", "limits.cpu", "", "4"),
            ("bare", "limits.memory", "1Ki", "1"),
            ("bare", "limits.ephemeral-storage", "", "0"),
        ] {
            let selector: ResourceFieldSelector = serde_json::from_value(
                serde_json::json!({"containerName": container, "resource": name, "divisor": if divisor.is_empty() { "0" } else { divisor }}),
            )
            .unwrap();
            assert_eq!(
                resource(&pod, &selector, None, &facts()).as_deref(),
                Ok(text),
                "{container} {name} {divisor}"
            );
        }
    }
}
