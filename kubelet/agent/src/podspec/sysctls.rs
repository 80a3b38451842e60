//! Kernel parameters that a pod may set: they have to be of a namespace of its own, and harmless or allowed by name.

use crate::podspec::identity;
use k8s_openapi::api::core::v1::Pod;

const SAFE: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
];
const IPC: [&str; 2] = ["kernel.sem", "kernel.shm"];

/// A parameter that a pod may not set; the pod is rejected with reason `SysctlForbidden`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SysctlError {
    #[error("forbidden sysctl: {name:?} not allowlisted")]
    NotAllowed { name: String },
    #[error("forbidden sysctl: {name:?} not allowed with host net enabled")]
    HostNetwork { name: String },
    #[error("forbidden sysctl: {name:?} not allowed with host ipc enabled")]
    HostIpc { name: String },
}

/// Slashes are as good as dots, unless a dot came first: then slashes are dots in a name, such as an interface's.
#[must_use]
pub fn normalized(name: &str) -> String {
    match name.find(['.', '/']) {
        Some(first) if name.as_bytes()[first] == b'/' => name
            .chars()
            .map(|c| match c {
                '/' => '.',
                '.' => '/',
                other => other,
            })
            .collect(),
        _ => name.to_owned(),
    }
}

/// Checks all parameters of a pod. `allowed_unsafe` are names, or prefixes that end in `*`.
pub fn check(pod: &Pod, allowed_unsafe: &[String]) -> Result<(), SysctlError> {
    let Some(spec) = identity::spec(pod) else { return Ok(()) };
    let sysctls = spec.security_context.as_ref().and_then(|context| context.sysctls.as_deref());
    for sysctl in sysctls.unwrap_or_default() {
        let name = normalized(&sysctl.name);
        let allowed = allowed_unsafe.iter().any(|pattern| {
            let pattern = normalized(pattern);
            pattern.strip_suffix('*').map_or(pattern == name, |prefix| name.starts_with(prefix))
        });
        let network = name.starts_with("net.");
        let ipc = name.starts_with("fs.mqueue.")
            || IPC.iter().any(|prefix| name.starts_with(prefix))
            || name.starts_with("kernel.msg");
        if !SAFE.contains(&name.as_str()) && !(allowed && (network || ipc)) {
            return Err(SysctlError::NotAllowed { name });
        }
        if network && spec.host_network == Some(true) {
            return Err(SysctlError::HostNetwork { name });
        }
        if ipc && spec.host_ipc == Some(true) {
            return Err(SysctlError::HostIpc { name });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn checked(name: &str, host: bool, allowed: &[&str]) -> Result<(), SysctlError> {
        let pod: Pod =
            serde_json::from_value(json!({"spec": {"containers": [], "hostNetwork": host, "hostIPC": host,
            "securityContext": {"sysctls": [{"name": name, "value": "1"}]}}}))
            .unwrap();
        check(&pod, &allowed.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn safe_ones_pass_and_others_need_permission_and_a_namespace() {
        assert!(checked("net.ipv4.tcp_syncookies", false, &[]).is_ok());
        assert!(checked("net/ipv4/tcp_syncookies", false, &[]).is_ok());
        assert!(matches!(checked("net.core.somaxconn", false, &[]), Err(SysctlError::NotAllowed { .. })));
        assert!(checked("net.core.somaxconn", false, &["net.core.*"]).is_ok());
        assert!(checked("kernel.msgmax", false, &["kernel.msgmax"]).is_ok());
        assert!(checked("vm.swappiness", false, &["vm.*"]).is_err());
        assert!(matches!(checked("net.ipv4.tcp_rmem", true, &[]), Err(SysctlError::HostNetwork { .. })));
        assert!(matches!(checked("kernel.shm_rmid_forced", true, &[]), Err(SysctlError::HostIpc { .. })));
    }

    #[test]
    fn the_first_separator_says_which_form_a_name_has() {
        assert_eq!(normalized("net/ipv4/conf/eth0.1/rp_filter"), "net.ipv4.conf.eth0/1.rp_filter");
        assert_eq!(normalized("net.ipv4.conf.eth0/1.rp_filter"), "net.ipv4.conf.eth0/1.rp_filter");
    }
}
