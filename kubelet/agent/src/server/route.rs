//! Which handler a path means.

/// A container that a path names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub namespace: String,
    pub pod: String,
    pub uid: Option<String>,
    /// Empty where the path names a pod.
    pub container: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Route {
    Healthz,
    Pods,
    RunningPods,
    Configz,
    Summary,
    Metrics,
    MetricsResource,
    MetricsCadvisor,
    MetricsProbes,
    ContainerLogs(Target),
    Exec(Target),
    Attach(Target),
    PortForward(Target),
    Run(Target),
    NodeLogs(String),
    Unknown,
}

impl Route {
    pub(super) fn of(path: &str) -> Self {
        let path = path.strip_prefix('/').unwrap_or(path);
        let parts: Vec<&str> = path.split('/').collect();
        let container = |make: fn(Target) -> Self| match parts[1..] {
            [namespace, pod, container] => make(target(namespace, pod, None, container)),
            [namespace, pod, uid, container] => make(target(namespace, pod, Some(uid), container)),
            _ => Self::Unknown,
        };
        match parts[0] {
            "healthz" if matches!(parts[1..], [] | ["" | "ping" | "log" | "syncloop"]) => Self::Healthz,
            "pods" if matches!(parts[1..], [] | [""]) => Self::Pods,
            "runningpods" if matches!(parts[1..], [] | [""]) => Self::RunningPods,
            "configz" if parts.len() == 1 => Self::Configz,
            "stats" if matches!(parts[1..], ["summary"]) => Self::Summary,
            "metrics" => match parts[1..] {
                [] => Self::Metrics,
                ["resource"] => Self::MetricsResource,
                ["cadvisor"] => Self::MetricsCadvisor,
                ["probes"] => Self::MetricsProbes,
                _ => Self::Unknown,
            },
            "containerLogs" => match parts[1..] {
                [namespace, pod, container] => Self::ContainerLogs(target(namespace, pod, None, container)),
                _ => Self::Unknown,
            },
            "exec" => container(Self::Exec),
            "attach" => container(Self::Attach),
            "run" => container(Self::Run),
            "portForward" => match parts[1..] {
                [namespace, pod] => Self::PortForward(target(namespace, pod, None, "")),
                [namespace, pod, uid] => Self::PortForward(target(namespace, pod, Some(uid), "")),
                _ => Self::Unknown,
            },
            "logs" => Self::NodeLogs(parts[1..].join("/")),
            _ => Self::Unknown,
        }
    }

    /// Reaches into pods or the machine: closed by `enableDebuggingHandlers: false`.
    pub(super) fn is_debugging(&self) -> bool {
        matches!(
            self,
            Self::ContainerLogs(_)
                | Self::Exec(_)
                | Self::Attach(_)
                | Self::PortForward(_)
                | Self::Run(_)
                | Self::NodeLogs(_)
                | Self::RunningPods
        )
    }

    /// Open on the read-only port, which asks nobody who they are.
    pub(super) fn is_read_only(&self) -> bool {
        matches!(
            self,
            Self::Healthz
                | Self::Pods
                | Self::Summary
                | Self::Metrics
                | Self::MetricsResource
                | Self::MetricsCadvisor
                | Self::MetricsProbes
        )
    }
}

fn target(namespace: &str, pod: &str, uid: Option<&str>, container: &str) -> Target {
    Target {
        namespace: namespace.to_owned(),
        pod: pod.to_owned(),
        uid: uid.map(str::to_owned),
        container: container.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_named_with_and_without_a_uid() {
        assert_eq!(Route::of("/exec/ns/pod/main"), Route::Exec(target("ns", "pod", None, "main")));
        assert_eq!(Route::of("/exec/ns/pod/u-1/main"), Route::Exec(target("ns", "pod", Some("u-1"), "main")));
        assert_eq!(Route::of("/portForward/ns/pod"), Route::PortForward(target("ns", "pod", None, "")));
        assert_eq!(
            Route::of("/portForward/ns/pod/u"),
            Route::PortForward(target("ns", "pod", Some("u"), ""))
        );
        assert_eq!(Route::of("/exec/ns"), Route::Unknown);
    }

    #[test]
    fn slashes_at_the_end_are_as_the_kubelet_has_them() {
        for path in ["/healthz", "/healthz/ping", "/healthz/syncloop"] {
            assert_eq!(Route::of(path), Route::Healthz);
        }
        assert_eq!(Route::of("/runningpods/"), Route::RunningPods);
        assert_eq!(Route::of("/logs/"), Route::NodeLogs(String::new()));
        assert_eq!(Route::of("/"), Route::Unknown);
        assert_eq!(Route::of(""), Route::Unknown);
    }
}
