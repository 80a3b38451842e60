//! Where a probe or hook goes: addresses, ports by name, URLs.

use k8s_openapi::api::core::v1::{Container, HTTPGetAction};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::net::IpAddr;

/// A handler that leads nowhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error("the pod has no address yet")]
    NoAddress,
    #[error("port {port:?} of container {container:?} is not known")]
    Port { port: String, container: String },
    #[error("scheme {scheme:?} is not HTTP or HTTPS")]
    Scheme { scheme: String },
    #[error("header {name:?} is not valid")]
    Header { name: String },
    #[error("url {url:?} is not valid")]
    Url { url: String },
}

/// A server to connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl Address {
    /// `host:port`, with brackets where the host is an address of the sixth family.
    pub(crate) fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// What an HTTP handler asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HttpTarget {
    pub(crate) secure: bool,
    pub(crate) address: Address,
    /// Begins with a slash.
    pub(crate) path: String,
    pub(crate) headers: Vec<(String, String)>,
}

impl HttpTarget {
    pub(crate) fn new(
        action: &HTTPGetAction,
        container: &Container,
        pod_ip: Option<IpAddr>,
    ) -> Result<Self, TargetError> {
        let secure = match action.scheme.as_deref().unwrap_or("HTTP").to_ascii_lowercase().as_str() {
            "http" | "" => false,
            "https" => true,
            other => return Err(TargetError::Scheme { scheme: other.to_owned() }),
        };
        let host = host(action.host.as_deref(), pod_ip)?;
        let port = port(&action.port, container)?;
        let path = action.path.as_deref().unwrap_or("/");
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        let headers = action.http_headers.iter().flatten();
        Ok(Self {
            secure,
            address: Address { host, port },
            path: printable(&path),
            headers: headers.map(|header| (header.name.clone(), header.value.clone())).collect(),
        })
    }

    pub(crate) fn url(&self) -> String {
        let scheme = if self.secure { "https" } else { "http" };
        format!("{scheme}://{}{}", self.address.authority(), self.path)
    }
}

/// The host stated, or else the pod's address.
pub(crate) fn host(stated: Option<&str>, pod_ip: Option<IpAddr>) -> Result<String, TargetError> {
    match stated.filter(|host| !host.is_empty()) {
        Some(host) => Ok(host.trim_start_matches('[').trim_end_matches(']').to_owned()),
        None => Ok(pod_ip.ok_or(TargetError::NoAddress)?.to_string()),
    }
}

/// A port by its number or its name in the container.
pub(crate) fn port(port: &IntOrString, container: &Container) -> Result<u16, TargetError> {
    let unknown = |text: &str| TargetError::Port { port: text.to_owned(), container: container.name.clone() };
    let valid = |number: i32| u16::try_from(number).ok().filter(|number| *number > 0);
    match port {
        IntOrString::Int(number) => valid(*number).ok_or_else(|| unknown(&number.to_string())),
        IntOrString::String(name) => {
            let mut ports = container.ports.iter().flatten();
            let named = ports.find(|port| port.name.as_deref() == Some(name)).map(|port| port.container_port);
            // A number in quotes is a number.
            named.or_else(|| name.parse().ok()).and_then(valid).ok_or_else(|| unknown(name))
        }
    }
}

/// Replaces what cannot stand in a request line.
fn printable(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_graphic() && byte != b'#' {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn target(action: serde_json::Value) -> Result<String, String> {
        let container: Container =
            serde_json::from_value(json!({"name": "c", "ports": [{"name": "web", "containerPort": 8080}]}))
                .unwrap();
        let action: HTTPGetAction = serde_json::from_value(action).unwrap();
        HttpTarget::new(&action, &container, Some("fd00::5".parse().unwrap()))
            .map(|target| target.url())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn urls_are_made_of_defaults_names_and_what_is_stated() {
        for (action, url) in [
            (json!({"port": 80}), "http://[fd00::5]:80/"),
            (json!({"port": "web", "path": "healthz?full=1"}), "http://[fd00::5]:8080/healthz?full=1"),
            (
                json!({"port": "443", "scheme": "HTTPS", "host": "127.0.0.1", "path": "/a b"}),
                "https://127.0.0.1:443/a%20b",
            ),
        ] {
            assert_eq!(target(action.clone()).as_deref(), Ok(url), "{action}");
        }
        let unknown = target(json!({"port": "nope"})).unwrap_err();
        assert_eq!(unknown, "port \"nope\" of container \"c\" is not known");
        for action in [json!({"port": 0}), json!({"port": 70000}), json!({"port": 80, "scheme": "FTP"})] {
            assert!(target(action.clone()).is_err(), "{action}");
        }
    }
}
