//! Environment variables that point at Services, in the two styles every image knows: `X_SERVICE_HOST` and Docker links.

use crate::objects::ServiceFacts;
use std::net::IpAddr;

/// The variables for `services`, those of one service together, in the order given.
pub(super) fn variables<'a>(services: impl IntoIterator<Item = &'a ServiceFacts>) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for service in services {
        let Some(address) = service.cluster_ip else { continue };
        let Some(first) = service.ports.first() else { continue };
        let prefix = screaming(&service.name);
        out.push((format!("{prefix}_SERVICE_HOST"), address.to_string()));
        out.push((format!("{prefix}_SERVICE_PORT"), first.port.to_string()));
        for port in service.ports.iter().filter(|port| !port.name.is_empty()) {
            out.push((format!("{prefix}_SERVICE_PORT_{}", screaming(&port.name)), port.port.to_string()));
        }
        for (index, port) in service.ports.iter().enumerate() {
            let protocol = if port.protocol.is_empty() { "TCP" } else { &port.protocol };
            let lower = protocol.to_lowercase();
            let url = format!("{lower}://{}", authority(address, port.port));
            if index == 0 {
                out.push((format!("{prefix}_PORT"), url.clone()));
            }
            let port_prefix = format!("{prefix}_PORT_{}_{}", port.port, protocol.to_uppercase());
            out.push((format!("{port_prefix}_PROTO"), lower));
            out.push((format!("{port_prefix}_PORT"), port.port.to_string()));
            out.push((format!("{port_prefix}_ADDR"), address.to_string()));
            out.push((port_prefix, url));
        }
    }
    out
}

/// Which services a pod in `namespace` is told about: the API server's always, the namespace's own if wanted.
pub(super) fn visible<'a>(
    all: impl IntoIterator<Item = &'a ServiceFacts>,
    namespace: &str,
    links: bool,
) -> Vec<&'a ServiceFacts> {
    let mut chosen: std::collections::BTreeMap<&str, &ServiceFacts> = std::collections::BTreeMap::new();
    for service in all {
        let own = links && service.namespace == namespace;
        let api_server = service.namespace == "default" && service.name == "kubernetes";
        // A namespace's own service called kubernetes hides the API server's.
        if own || api_server && !chosen.contains_key("kubernetes") {
            chosen.insert(&service.name, service);
        }
    }
    chosen.into_values().collect()
}

fn screaming(name: &str) -> String {
    name.to_uppercase().replace('-', "_")
}

fn authority(address: IpAddr, port: i32) -> String {
    match address {
        IpAddr::V4(address) => format!("{address}:{port}"),
        IpAddr::V6(address) => format!("[{address}]:{port}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::ServicePort;

    fn service(
        namespace: &str,
        name: &str,
        address: Option<&str>,
        ports: &[(&str, i32, &str)],
    ) -> ServiceFacts {
        ServiceFacts {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            cluster_ip: address.map(|address| address.parse().unwrap()),
            ports: ports
                .iter()
                .map(|(name, port, protocol)| ServicePort {
                    name: (*name).to_owned(),
                    port: *port,
                    protocol: (*protocol).to_owned(),
                })
                .collect(),
        }
    }

    #[test]
    fn a_service_with_two_ports_gives_both_styles() {
        let service =
            service("ns", "my-db", Some("10.0.0.5"), &[("sql", 5432, "TCP"), ("stat-s", 9000, "UDP")]);
        let expected = [
            ("MY_DB_SERVICE_HOST", "10.0.0.5"),
            ("MY_DB_SERVICE_PORT", "5432"),
            ("MY_DB_SERVICE_PORT_SQL", "5432"),
            ("MY_DB_SERVICE_PORT_STAT_S", "9000"),
            ("MY_DB_PORT", "tcp://10.0.0.5:5432"),
            ("MY_DB_PORT_5432_TCP_PROTO", "tcp"),
            ("MY_DB_PORT_5432_TCP_PORT", "5432"),
            ("MY_DB_PORT_5432_TCP_ADDR", "10.0.0.5"),
            ("MY_DB_PORT_5432_TCP", "tcp://10.0.0.5:5432"),
            ("MY_DB_PORT_9000_UDP_PROTO", "udp"),
            ("MY_DB_PORT_9000_UDP_PORT", "9000"),
            ("MY_DB_PORT_9000_UDP_ADDR", "10.0.0.5"),
            ("MY_DB_PORT_9000_UDP", "udp://10.0.0.5:9000"),
        ];
        let variables = variables([&service]);
        let variables: Vec<_> =
            variables.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(variables, expected);
    }

    #[test]
    fn addresses_of_the_sixth_family_are_bracketed_and_headless_services_left_out() {
        let six = service("ns", "a", Some("fd00::1"), &[("", 80, "TCP")]);
        let headless = service("ns", "b", None, &[("", 80, "TCP")]);
        let variables = variables([&six, &headless]);
        assert!(variables.contains(&("A_PORT".to_owned(), "tcp://[fd00::1]:80".to_owned())));
        assert!(variables.iter().all(|(name, _)| !name.starts_with('B')));
    }

    #[test]
    fn a_pod_sees_the_api_server_and_its_own_namespace_unless_it_does_not_want_to() {
        let all = [
            service("default", "kubernetes", Some("10.0.0.1"), &[]),
            service("default", "other", Some("10.0.0.2"), &[]),
            service("ns", "own", Some("10.0.0.3"), &[]),
        ];
        let names = |links| visible(&all, "ns", links).iter().map(|s| s.name.as_str()).collect::<Vec<_>>();
        assert_eq!(names(true), ["kubernetes", "own"]);
        assert_eq!(names(false), ["kubernetes"]);
        let shadow = service("ns", "kubernetes", Some("10.9.9.9"), &[]);
        for order in [[&all[0], &shadow], [&shadow, &all[0]]] {
            assert_eq!(visible(order, "ns", true)[0].namespace, "ns");
        }
    }
}
