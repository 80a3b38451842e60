//! The hosts file that every container of a pod sees, and the pod's host name.

use crate::podspec::error::SpecError;
use crate::podspec::facts::Facts;
use crate::podspec::identity;
use k8s_openapi::api::core::v1::{HostAlias, Pod};
use std::net::IpAddr;

/// The kernel's limit for a host name.
const MAX_NAME: usize = 64;
/// A DNS label's limit, which a pod's name may exceed.
const MAX_LABEL: usize = 63;

/// A pod's name in DNS: host name and, if it has one, domain.
pub(super) fn name_and_domain(facts: &Facts, pod: &Pod) -> (String, Option<String>) {
    let spec = identity::spec(pod);
    if let Some(name) = spec.and_then(|spec| spec.hostname_override.as_deref()).filter(|n| !n.is_empty()) {
        return (name.to_owned(), None);
    }
    let stated = spec.and_then(|spec| spec.hostname.as_deref()).filter(|name| !name.is_empty());
    let name = match stated {
        Some(name) => name.to_owned(),
        None => {
            let name = identity::pod_name(pod);
            let cut = name.char_indices().nth(MAX_LABEL).map_or(name, |(end, _)| &name[..end]);
            cut.trim_end_matches(['-', '.']).to_owned()
        }
    };
    let subdomain = spec.and_then(|spec| spec.subdomain.as_deref()).filter(|name| !name.is_empty());
    let domain = subdomain
        .map(|subdomain| format!("{subdomain}.{}.svc.{}", identity::namespace(pod), facts.cluster_domain));
    (name, domain)
}

/// The sandbox's host name; empty in the host's network, where the host has one.
pub(super) fn kernel_name(facts: &Facts, pod: &Pod) -> Result<String, SpecError> {
    if identity::host_network(pod) {
        return Ok(String::new());
    }
    let (name, domain) = name_and_domain(facts, pod);
    let qualified = identity::spec(pod).and_then(|spec| spec.set_hostname_as_fqdn).unwrap_or(false);
    let name = match domain {
        Some(domain) if qualified => format!("{name}.{domain}"),
        _ => name,
    };
    if name.len() > MAX_NAME { Err(SpecError::HostnameTooLong { name }) } else { Ok(name) }
}

/// The hosts file. `host_file` is the node's own, which pods in its network build on.
pub(super) fn file(facts: &Facts, pod: &Pod, pod_ips: &[IpAddr], host_file: &str) -> String {
    let mut out;
    if identity::host_network(pod) {
        out = "# Kubernetes-managed hosts file (host network).\n".to_owned();
        out.push_str(host_file);
        if !out.ends_with('\n') {
            out.push('\n');
        }
    } else {
        out = "# Kubernetes-managed hosts file.\n\
            127.0.0.1\tlocalhost\n\
            ::1\tlocalhost ip6-localhost ip6-loopback\n\
            fe00::0\tip6-localnet\n\
            fe00::0\tip6-mcastprefix\n\
            fe00::1\tip6-allnodes\n\
            fe00::2\tip6-allrouters\n"
            .to_owned();
        let (name, domain) = name_and_domain(facts, pod);
        for address in pod_ips {
            let qualified = domain.as_ref().map(|domain| format!("{name}.{domain}\t")).unwrap_or_default();
            out.push_str(&format!("{address}\t{qualified}{name}\n"));
        }
    }
    let aliases = identity::spec(pod).and_then(|spec| spec.host_aliases.as_deref()).unwrap_or_default();
    if !aliases.is_empty() {
        out.push_str("\n# Entries added by HostAliases.\n");
        for HostAlias { ip, hostnames } in aliases {
            let names = hostnames.as_deref().unwrap_or_default().join("\t");
            out.push_str(&format!("{ip}\t{names}\n"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(name: &str, spec: serde_json::Value) -> Pod {
        serde_json::from_value(
            json!({"metadata": {"name": name, "namespace": "ns", "uid": "u"}, "spec": spec}),
        )
        .unwrap()
    }

    #[test]
    fn a_pods_file_names_it_and_its_aliases() {
        let pod = pod(
            "web-0",
            json!({"containers": [], "hostname": "web-0", "subdomain": "web",
            "hostAliases": [{"ip": "192.0.2.9", "hostnames": ["a", "b"]}]}),
        );
        let ips = ["10.1.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        let expected = "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n10.1.0.2\tweb-0.web.ns.svc.cluster.local\tweb-0\nfd00::2\tweb-0.web.ns.svc.cluster.local\tweb-0\n\n# Entries added by HostAliases.\n192.0.2.9\ta\tb\n";
        assert_eq!(file(&Facts::new("n"), &pod, &ips, "ignored"), expected);
    }

    #[test]
    fn in_the_hosts_network_the_hosts_file_is_kept() {
        let pod = pod("p", json!({"containers": [], "hostNetwork": true}));
        assert_eq!(
            file(&Facts::new("n"), &pod, &["10.0.0.1".parse().unwrap()], "127.0.0.1 localhost"),
            "# Kubernetes-managed hosts file (host network).\n127.0.0.1 localhost\n"
        );
        assert_eq!(kernel_name(&Facts::new("n"), &pod).unwrap(), "");
    }

    #[test]
    fn host_names_fit_their_limits() {
        let facts = Facts::new("n");
        let long = format!("{}-{}", "a".repeat(62), "b".repeat(20));
        assert_eq!(kernel_name(&facts, &pod(&long, json!({"containers": []}))).unwrap(), "a".repeat(62));
        let qualified = json!({"containers": [], "subdomain": "s", "setHostnameAsFQDN": true});
        assert_eq!(kernel_name(&facts, &pod("p", qualified.clone())).unwrap(), "p.s.ns.svc.cluster.local");
        let error = kernel_name(&facts, &pod(&"a".repeat(60), qualified)).unwrap_err().to_string();
        assert!(error.contains("longer than 64"), "{error}");
        let over = json!({"containers": [], "hostnameOverride": "my.host", "subdomain": "s", "setHostnameAsFQDN": true});
        assert_eq!(kernel_name(&facts, &pod("p", over)).unwrap(), "my.host");
    }
}
