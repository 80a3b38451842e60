//! A pod's resolver configuration, by its DNS policy.

use crate::podspec::error::SpecError;
use crate::podspec::facts::Facts;
use crate::podspec::identity;
use k8s_openapi::api::core::v1::{Pod, PodDNSConfig};
use orlop_proto::cri::DnsConfig;
use std::net::IpAddr;

const MAX_NAMESERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
const MAX_SEARCH_LENGTH: usize = 2048;

/// Something a pod's owner should be told; becomes an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsWarning {
    pub reason: &'static str,
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    Cluster,
    Host,
    None,
}

/// The configuration, and what had to be left out. `host` is the content of the node's `resolv.conf`; `None` where the
/// node is set up to have none.
pub(super) fn config(
    facts: &Facts,
    pod: &Pod,
    host: Option<&str>,
) -> Result<(DnsConfig, Vec<DnsWarning>), SpecError> {
    let mut warnings = Vec::new();
    let policy = policy(facts, pod, &mut warnings)?;
    let mut dns = match policy {
        Policy::None => DnsConfig::default(),
        Policy::Host => host_config(facts, host),
        Policy::Cluster => cluster_config(facts, pod, host),
    };
    if let Some(extra) = identity::spec(pod).and_then(|spec| spec.dns_config.as_ref()) {
        append(&mut dns, extra);
    }
    limit(&mut dns, pod, &mut warnings);
    Ok((dns, warnings))
}

fn policy(facts: &Facts, pod: &Pod, warnings: &mut Vec<DnsWarning>) -> Result<Policy, SpecError> {
    let stated = identity::spec(pod).and_then(|spec| spec.dns_policy.as_deref()).unwrap_or("ClusterFirst");
    let wanted = match stated {
        "None" => Policy::None,
        "Default" => Policy::Host,
        "ClusterFirstWithHostNet" => Policy::Cluster,
        "ClusterFirst" if identity::host_network(pod) => Policy::Host,
        "ClusterFirst" => Policy::Cluster,
        other => return Err(SpecError::UnknownValue { field: "dnsPolicy", value: other.to_owned() }),
    };
    if wanted == Policy::Cluster && facts.cluster_dns.is_empty() {
        warnings.push(DnsWarning {
            reason: "MissingClusterDNS",
            message: format!(
                "pod: {:?}. kubelet does not have ClusterDNS IP configured and cannot create Pod using {stated:?} policy. Falling back to \"Default\" policy.",
                identity::described(pod)
            ),
        });
        return Ok(Policy::Host);
    }
    Ok(wanted)
}

fn host_config(facts: &Facts, host: Option<&str>) -> DnsConfig {
    match host {
        Some(text) => parse(text),
        // No resolver at all: point at loopback, where nobody answers, rather than inherit the image's.
        None => {
            let six = facts.host_ips.first().is_some_and(IpAddr::is_ipv6);
            DnsConfig {
                servers: vec![if six { "::1" } else { "127.0.0.1" }.to_owned()],
                searches: vec![".".to_owned()],
                options: Vec::new(),
            }
        }
    }
}

fn cluster_config(facts: &Facts, pod: &Pod, host: Option<&str>) -> DnsConfig {
    let domain = &facts.cluster_domain;
    let mut searches = Vec::new();
    if !domain.is_empty() {
        searches.push(format!("{}.svc.{domain}", identity::namespace(pod)));
        searches.push(format!("svc.{domain}"));
        searches.push(domain.clone());
    }
    for search in host.map(parse).unwrap_or_default().searches {
        push_new(&mut searches, search);
    }
    DnsConfig {
        servers: facts.cluster_dns.iter().map(ToString::to_string).collect(),
        searches,
        options: vec!["ndots:5".to_owned()],
    }
}

fn append(dns: &mut DnsConfig, extra: &PodDNSConfig) {
    for server in extra.nameservers.iter().flatten() {
        push_new(&mut dns.servers, server.clone());
    }
    for search in extra.searches.iter().flatten() {
        push_new(&mut dns.searches, search.clone());
    }
    for option in extra.options.iter().flatten() {
        let Some(name) = option.name.as_deref().filter(|name| !name.is_empty()) else { continue };
        // The pod's word replaces what the policy said about the same option.
        dns.options.retain(|present| present.split(':').next() != Some(name));
        dns.options.push(match option.value.as_deref() {
            Some(value) if !value.is_empty() => format!("{name}:{value}"),
            _ => name.to_owned(),
        });
    }
}

fn push_new(list: &mut Vec<String>, item: String) {
    if !list.contains(&item) {
        list.push(item);
    }
}

fn limit(dns: &mut DnsConfig, pod: &Pod, warnings: &mut Vec<DnsWarning>) {
    let mut warn = |what: &str, applied: String| {
        warnings.push(DnsWarning {
            reason: "DNSConfigForming",
            message: format!(
                "{what} limits were exceeded, some have been omitted, the applied line is: {applied} (pod {})",
                identity::described(pod)
            ),
        });
    };
    if dns.servers.len() > MAX_NAMESERVERS {
        dns.servers.truncate(MAX_NAMESERVERS);
        warn("Nameserver", dns.servers.join(" "));
    }
    let stated = dns.searches.len();
    dns.searches.truncate(MAX_SEARCHES);
    while dns.searches.iter().map(|search| search.len() + 1).sum::<usize>() > MAX_SEARCH_LENGTH + 1 {
        dns.searches.pop();
    }
    if dns.searches.len() < stated {
        warn("Search Line", dns.searches.join(" "));
    }
}

/// Reads a `resolv.conf`. As with the C library, the last `search` or `domain` line counts.
pub(super) fn parse(text: &str) -> DnsConfig {
    let mut dns = DnsConfig::default();
    for line in text.lines() {
        let line = line.split(['#', ';']).next().unwrap_or_default();
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => dns.servers.extend(words.next().map(str::to_owned)),
            Some("search") => {
                // A lone root means: no search list.
                dns.searches =
                    words.filter(|w| *w != ".").map(|w| w.trim_end_matches('.').to_owned()).collect();
            }
            Some("options") => {
                for option in words {
                    push_new(&mut dns.options, option.to_owned());
                }
            }
            _ => {}
        }
    }
    dns
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const HOST: &str = "# comment\nnameserver 192.0.2.1\nnameserver 192.0.2.2 # second\nsearch example.org. corp\noptions timeout:1 edns0\n";

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(
            json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u"}, "spec": spec}),
        )
        .unwrap()
    }

    fn facts() -> Facts {
        let mut facts = Facts::new("n");
        facts.cluster_dns = vec!["10.96.0.10".parse().unwrap()];
        facts
    }

    fn lines(
        facts: &Facts,
        spec: serde_json::Value,
        host: Option<&str>,
    ) -> (String, String, String, Vec<&'static str>) {
        let (dns, warnings) = config(facts, &pod(spec), host).unwrap();
        let reasons = warnings.iter().map(|warning| warning.reason).collect();
        (dns.servers.join(" "), dns.searches.join(" "), dns.options.join(" "), reasons)
    }

    #[test]
    fn each_policy_has_its_servers_searches_and_options() {
        let cluster = (
            "10.96.0.10",
            "ns.svc.cluster.local svc.cluster.local cluster.local example.org corp",
            "ndots:5",
        );
        let host = ("192.0.2.1 192.0.2.2", "example.org corp", "timeout:1 edns0");
        for (spec, (servers, searches, options)) in [
            (json!({"containers": []}), cluster),
            (json!({"containers": [], "dnsPolicy": "ClusterFirst"}), cluster),
            (json!({"containers": [], "dnsPolicy": "ClusterFirst", "hostNetwork": true}), host),
            (json!({"containers": [], "dnsPolicy": "ClusterFirstWithHostNet", "hostNetwork": true}), cluster),
            (json!({"containers": [], "dnsPolicy": "Default"}), host),
            (json!({"containers": [], "dnsPolicy": "None"}), ("", "", "")),
            (
                json!({"containers": [], "dnsPolicy": "None", "dnsConfig": {"nameservers": ["1.1.1.1", "1.1.1.1"],
                "searches": ["a"], "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]}}),
                ("1.1.1.1", "a", "ndots:2 edns0"),
            ),
            (
                json!({"containers": [], "dnsConfig": {"nameservers": ["1.1.1.1"], "searches": ["corp", "b"],
                "options": [{"name": "ndots", "value": "2"}]}}),
                (
                    "10.96.0.10 1.1.1.1",
                    "ns.svc.cluster.local svc.cluster.local cluster.local example.org corp b",
                    "ndots:2",
                ),
            ),
        ] {
            let got = lines(&facts(), spec.clone(), Some(HOST));
            assert_eq!(
                (got.0.as_str(), got.1.as_str(), got.2.as_str()),
                (servers, searches, options),
                "{spec}"
            );
            assert!(got.3.is_empty(), "{spec}");
        }
    }

    #[test]
    fn without_cluster_dns_a_pod_gets_the_hosts_and_is_told() {
        let mut facts = facts();
        facts.cluster_dns.clear();
        let got = lines(&facts, json!({"containers": []}), Some(HOST));
        assert_eq!(
            (got.0.as_str(), got.3.as_slice()),
            ("192.0.2.1 192.0.2.2", ["MissingClusterDNS"].as_slice())
        );
    }

    #[test]
    fn without_a_resolver_file_nobody_is_asked() {
        let got = lines(&facts(), json!({"containers": [], "dnsPolicy": "Default"}), None);
        assert_eq!((got.0.as_str(), got.1.as_str()), ("127.0.0.1", "."));
        let mut facts = facts();
        facts.host_ips = vec!["fd00::1".parse().unwrap()];
        assert_eq!(lines(&facts, json!({"containers": [], "dnsPolicy": "Default"}), None).0, "::1");
    }

    #[test]
    fn what_exceeds_the_resolvers_limits_is_left_out_and_told() {
        let servers: Vec<String> = (1..6).map(|n| format!("192.0.2.{n}")).collect();
        let many: Vec<String> = (0..40).map(|n| format!("d{n}")).collect();
        let spec = json!({"containers": [], "dnsPolicy": "None", "dnsConfig": {"nameservers": servers, "searches": many}});
        let (dns, warnings) = config(&facts(), &pod(spec), None).unwrap();
        assert_eq!((dns.servers.len(), dns.searches.len(), warnings.len()), (3, 32, 2));
        let long: Vec<String> = (0..20).map(|n| format!("{n}{}", "x".repeat(200))).collect();
        let spec = json!({"containers": [], "dnsPolicy": "None", "dnsConfig": {"searches": long}});
        let (dns, warnings) = config(&facts(), &pod(spec), None).unwrap();
        assert!(dns.searches.join(" ").len() <= 2048 && dns.searches.len() == 10);
        assert_eq!(warnings[0].reason, "DNSConfigForming");
    }

    #[test]
    fn an_unknown_policy_is_refused() {
        let error =
            config(&facts(), &pod(json!({"containers": [], "dnsPolicy": "Maybe"})), None).unwrap_err();
        assert_eq!(error.to_string(), "unknown dnsPolicy \"Maybe\"");
    }

    #[test]
    fn a_search_for_the_root_alone_is_no_search() {
        assert!(parse("search .\n").searches.is_empty());
        assert_eq!(parse("search a\nsearch b c").searches, ["b", "c"]);
    }
}
