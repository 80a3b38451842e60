//! What a request means to the authorizer: a verb on one of the node's subresources.

use http::Method;

/// The node's subresources a request needs, tried in order: the first that is allowed opens the door.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Attributes {
    pub verb: &'static str,
    pub subresources: &'static [&'static str],
}

impl Attributes {
    pub(super) fn of(method: &Method, path: &str) -> Self {
        Self { verb: verb(method), subresources: subresources(path) }
    }
}

fn verb(method: &Method) -> &'static str {
    match *method {
        Method::POST => "create",
        Method::GET => "get",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        // The empty verb is what the kubelet asks with, too: nobody but an administrator has it.
        _ => "",
    }
}

/// The coarse `proxy` opens everything; reading what has a subresource of its own does not need it.
fn subresources(path: &str) -> &'static [&'static str] {
    let below =
        |prefix: &str| path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    if below("/stats") {
        &["stats"]
    } else if below("/metrics") {
        &["metrics"]
    } else if below("/logs") {
        &["log"]
    } else if below("/checkpoint") {
        &["checkpoint"]
    } else if below("/statusz") {
        &["statusz"]
    } else if below("/flagz") {
        &["configz"]
    } else if below("/pods") || below("/runningpods") {
        &["pods", "proxy"]
    } else if below("/healthz") {
        &["healthz", "proxy"]
    } else if below("/configz") {
        &["configz", "proxy"]
    } else {
        &["proxy"]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_needs_its_subresource() {
        for (path, expected) in [
            ("/stats/summary", &["stats"][..]),
            ("/metrics", &["metrics"]),
            ("/metrics/cadvisor", &["metrics"]),
            ("/logs/syslog", &["log"]),
            ("/pods", &["pods", "proxy"]),
            ("/runningpods/", &["pods", "proxy"]),
            ("/healthz/ping", &["healthz", "proxy"]),
            ("/configz", &["configz", "proxy"]),
            ("/exec/ns/pod/container", &["proxy"]),
            ("/containerLogs/ns/pod/container", &["proxy"]),
            ("/podsx", &["proxy"]),
            ("/metricsfoo", &["proxy"]),
        ] {
            assert_eq!(Attributes::of(&Method::GET, path).subresources, expected, "{path}");
        }
    }

    #[test]
    fn the_verb_is_the_method() {
        assert_eq!(Attributes::of(&Method::POST, "/exec/a/b/c").verb, "create");
        assert_eq!(Attributes::of(&Method::HEAD, "/healthz").verb, "");
    }
}
