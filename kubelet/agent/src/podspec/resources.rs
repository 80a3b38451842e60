//! A container's resources as the runtime's cgroup settings.

use crate::podspec::error::SpecError;
use crate::podspec::facts::Facts;
use crate::podspec::identity;
use crate::podspec::qos::{self, Qos, limit, request};
use crate::podspec::quantity::Amount;
use k8s_openapi::api::core::v1::{Container, Pod};
use orlop_proto::cri::{HugepageLimit, LinuxContainerResources};

const MIN_SHARES: i64 = 2;
const MAX_SHARES: i64 = 262_144;
/// The kernel refuses quotas below a millisecond.
const MIN_QUOTA_US: i64 = 1000;
const GUARANTEED_OOM_SCORE: i64 = -997;

/// What CRI's `LinuxContainerResources` says for this container.
pub fn container_resources(
    facts: &Facts,
    pod: &Pod,
    container: &Container,
) -> Result<LinuxContainerResources, SpecError> {
    check(container)?;
    let resources = container.resources.as_ref();
    let cpu_limit = limit(resources, "cpu").milli();
    let period = i64::from(facts.cpu_cfs_period_us);
    let mut unified = std::collections::HashMap::new();
    if !facts.single_process_oom_kill {
        unified.insert("memory.oom.group".to_owned(), "1".to_owned());
    }
    if facts.swap_accounting {
        unified.insert("memory.swap.max".to_owned(), "0".to_owned());
    }
    Ok(LinuxContainerResources {
        cpu_period: if facts.cpu_cfs_quota { period } else { 0 },
        cpu_quota: if facts.cpu_cfs_quota { quota(cpu_limit, period) } else { 0 },
        cpu_shares: shares(request(resources, "cpu").milli()),
        memory_limit_in_bytes: limit(resources, "memory").value(),
        oom_score_adj: oom_score_adj(facts, pod, container),
        hugepage_limits: hugepages(facts, container),
        unified,
        ..Default::default()
    })
}

/// The sums that the sandbox's configuration tells virtual-machine runtimes.
pub(super) fn pod_resources(facts: &Facts, pod: &Pod) -> LinuxContainerResources {
    let containers = identity::spec(pod).map(|spec| spec.containers.as_slice()).unwrap_or_default();
    let sum = |value: &dyn Fn(&Container) -> Amount| {
        containers.iter().map(value).fold(Amount::ZERO, |sum, amount| sum + amount)
    };
    // One container without a limit leaves the pod without one.
    let limited = |name| {
        let all = containers.iter().all(|c| limit(c.resources.as_ref(), name).is_positive());
        if all { sum(&|c| limit(c.resources.as_ref(), name)) } else { Amount::ZERO }
    };
    let period = i64::from(facts.cpu_cfs_period_us);
    LinuxContainerResources {
        cpu_period: period,
        cpu_quota: quota(limited("cpu").milli(), period),
        cpu_shares: shares(sum(&|c| request(c.resources.as_ref(), "cpu")).milli()),
        memory_limit_in_bytes: limited("memory").value(),
        ..Default::default()
    }
}

pub(super) fn overhead(facts: &Facts, pod: &Pod) -> LinuxContainerResources {
    let overhead = identity::spec(pod).and_then(|spec| spec.overhead.as_ref());
    let cpu = qos::amount(overhead, "cpu").milli();
    let period = i64::from(facts.cpu_cfs_period_us);
    if overhead.is_none() {
        return LinuxContainerResources::default();
    }
    LinuxContainerResources {
        cpu_period: period,
        cpu_quota: quota(cpu, period),
        cpu_shares: shares(cpu),
        memory_limit_in_bytes: qos::amount(overhead, "memory").value(),
        ..Default::default()
    }
}

/// Quantities that do not parse would otherwise read as "no limit".
fn check(container: &Container) -> Result<(), SpecError> {
    let Some(resources) = &container.resources else { return Ok(()) };
    for (resource, quantity) in resources.limits.iter().chain(&resources.requests).flatten() {
        Amount::try_from(quantity).map_err(|source| SpecError::Resource {
            container: container.name.clone(),
            resource: resource.clone(),
            source,
        })?;
    }
    Ok(())
}

fn shares(milli: i64) -> i64 {
    milli.saturating_mul(1024).saturating_div(1000).clamp(MIN_SHARES, MAX_SHARES)
}

fn quota(milli: i64, period: i64) -> i64 {
    if milli <= 0 { 0 } else { (milli.saturating_mul(period) / 1000).max(MIN_QUOTA_US) }
}

fn oom_score_adj(facts: &Facts, pod: &Pod, container: &Container) -> i64 {
    let spec = identity::spec(pod);
    let critical = spec.is_some_and(|spec| {
        spec.priority_class_name.as_deref() == Some("system-node-critical")
            && spec.priority.is_some_and(|priority| priority >= 2_000_000_000)
    });
    let class = qos::qos(pod);
    if critical || class == Qos::Guaranteed {
        return GUARANTEED_OOM_SCORE;
    }
    if class == Qos::BestEffort {
        return 1000;
    }
    let score = |container: &Container| {
        let requested = request(container.resources.as_ref(), "memory").value();
        let capacity = i64::try_from(facts.memory_capacity).unwrap_or(i64::MAX).max(1);
        let share = i128::from(requested) * 1000 / i128::from(capacity);
        1000 - i64::try_from(share).unwrap_or(i64::MAX).min(1000)
    };
    let clamp = |score: i64| score.clamp(1000 + GUARANTEED_OOM_SCORE, 999);
    let own = clamp(score(container));
    let init = spec.and_then(|spec| spec.init_containers.as_deref()).unwrap_or_default();
    let sidecar =
        identity::is_sidecar(container) && init.iter().any(|candidate| candidate.name == container.name);
    if sidecar {
        // What serves the regular containers must not be killed before them.
        let regular = spec.map(|spec| spec.containers.as_slice()).unwrap_or_default();
        regular.iter().map(|c| clamp(score(c))).min().map_or(own, |least| own.min(least))
    } else {
        own
    }
}

fn hugepages(facts: &Facts, container: &Container) -> Vec<HugepageLimit> {
    let limits = container.resources.as_ref().and_then(|resources| resources.limits.as_ref());
    facts
        .hugepage_sizes
        .iter()
        .map(|size| {
            let stated = limits.into_iter().flatten().find_map(|(name, quantity)| {
                let page = Amount::parse(name.strip_prefix("hugepages-")?).ok()?;
                (u64::try_from(page.value()).ok()? == *size)
                    .then(|| Amount::try_from(quantity).ok())
                    .flatten()
            });
            let limit = stated.map_or(0, |amount| u64::try_from(amount.value()).unwrap_or(0));
            HugepageLimit { page_size: page_size(*size), limit }
        })
        .collect()
}

/// Page sizes as the cgroup files of the kernel spell them.
fn page_size(bytes: u64) -> String {
    for (unit, suffix) in [(1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "KB")] {
        if bytes >= unit && bytes.is_multiple_of(unit) {
            return format!("{}{suffix}", bytes / unit);
        }
    }
    format!("{bytes}B")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn facts() -> Facts {
        let mut facts = Facts::new("n");
        facts.memory_capacity = 8 << 30;
        facts.hugepage_sizes = vec![2 << 20, 1 << 30];
        facts
    }

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"uid": "u"}, "spec": spec})).unwrap()
    }

    fn scores(pod: &Pod) -> Vec<i64> {
        identity::containers(pod)
            .map(|container| container_resources(&facts(), pod, container).unwrap().oom_score_adj)
            .collect()
    }

    #[test]
    fn out_of_memory_scores_follow_the_class_and_the_request() {
        let memory = |request: &str| json!({"requests": {"memory": request}});
        assert_eq!(scores(&pod(json!({"containers": [{"name": "a"}]}))), [1000]);
        let guaranteed = json!({"limits": {"memory": "1Gi", "cpu": "1"}});
        assert_eq!(scores(&pod(json!({"containers": [{"name": "a", "resources": guaranteed}]}))), [-997]);
        let mixed = pod(json!({
            "initContainers": [{"name": "side", "restartPolicy": "Always"}, {"name": "once"}],
            "containers": [{"name": "a", "resources": memory("4Gi")}, {"name": "b", "resources": memory("8Gi")},
                {"name": "c", "resources": memory("1Mi")}]
        }));
        assert_eq!(scores(&mixed), [3, 999, 500, 3, 999]);
        let critical = pod(json!({"priorityClassName": "system-node-critical", "priority": 2_000_001_000,
            "containers": [{"name": "a"}]}));
        assert_eq!(scores(&critical), [-997]);
    }

    #[test]
    fn cpu_memory_and_huge_pages_become_cgroup_settings() {
        let pod = pod(json!({"containers": [{"name": "a", "resources": {
            "requests": {"cpu": "250m"},
            "limits": {"cpu": "5m", "memory": "64Mi", "hugepages-2Mi": "4Mi"}}}]}));
        let resources =
            container_resources(&facts(), &pod, &pod.spec.as_ref().unwrap().containers[0]).unwrap();
        assert_eq!(resources.cpu_shares, 256);
        assert_eq!((resources.cpu_quota, resources.cpu_period), (1000, 100_000));
        assert_eq!(resources.memory_limit_in_bytes, 64 << 20);
        let pages: Vec<_> =
            resources.hugepage_limits.iter().map(|l| (l.page_size.as_str(), l.limit)).collect();
        assert_eq!(pages, [("2MB", 4 << 20), ("1GB", 0)]);
        assert_eq!(resources.unified["memory.oom.group"], "1");
    }

    #[test]
    fn an_unreadable_limit_is_an_error_and_not_no_limit() {
        let pod = pod(json!({"containers": [{"name": "a", "resources": {"limits": {"memory": "64MB"}}}]}));
        let error =
            container_resources(&facts(), &pod, &pod.spec.as_ref().unwrap().containers[0]).unwrap_err();
        assert!(error.to_string().contains("resource \"memory\" of container \"a\""), "{error}");
    }
}
