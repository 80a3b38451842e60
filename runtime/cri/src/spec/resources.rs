//! Resource limits: from the CRI's terms to the OCI's, less what the host has no controller for.

use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxResources};
use orlop_proto::cri::LinuxContainerResources;
use std::collections::{BTreeSet, HashMap};

/// The controllers of the cgroup v2 tree, as `cgroup.controllers` names them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Controllers(pub(crate) BTreeSet<String>);

impl Controllers {
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

fn positive<T: TryFrom<i64>>(value: i64) -> Option<T> {
    if value > 0 { T::try_from(value).ok() } else { None }
}

fn text(value: &str) -> Option<String> {
    if value.is_empty() { None } else { Some(value.to_owned()) }
}

/// Zero means "not set" in the CRI. A memory limit without a word on swap allows no swap.
pub(crate) fn to_oci(resources: &LinuxContainerResources, controllers: &Controllers) -> LinuxResources {
    let mut oci = LinuxResources::default();
    oci.set_devices(None);
    let mut cpu = LinuxCpu::default();
    if controllers.has("cpu") {
        cpu.set_shares(positive(resources.cpu_shares))
            .set_quota(if resources.cpu_quota == 0 { None } else { Some(resources.cpu_quota) })
            .set_period(positive(resources.cpu_period));
    }
    if controllers.has("cpuset") {
        cpu.set_cpus(text(&resources.cpuset_cpus)).set_mems(text(&resources.cpuset_mems));
    }
    if cpu != LinuxCpu::default() {
        oci.set_cpu(Some(cpu));
    }
    if controllers.has("memory") {
        let limit: Option<i64> = positive(resources.memory_limit_in_bytes);
        let swap = positive(resources.memory_swap_limit_in_bytes).or(limit);
        if limit.is_some() || swap.is_some() {
            let mut memory = LinuxMemory::default();
            memory.set_limit(limit).set_swap(swap);
            oci.set_memory(Some(memory));
        }
    }
    if controllers.has("hugetlb") && !resources.hugepage_limits.is_empty() {
        let limits = resources.hugepage_limits.iter().map(|huge| {
            let mut limit = LinuxHugepageLimit::default();
            limit
                .set_page_size(huge.page_size.clone())
                .set_limit(i64::try_from(huge.limit).unwrap_or(i64::MAX));
            limit
        });
        oci.set_hugepage_limits(Some(limits.collect()));
    }
    let unified: HashMap<_, _> = resources
        .unified
        .iter()
        .filter(|(key, _)| {
            let controller = key.split('.').next().unwrap_or_default();
            controller == "cgroup" || controllers.has(controller)
        })
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    if !unified.is_empty() {
        oci.set_unified(Some(unified));
    }
    oci
}

/// What an update leaves unsaid stays as it was.
pub(crate) fn merge(
    current: &LinuxContainerResources,
    update: &LinuxContainerResources,
) -> LinuxContainerResources {
    let number = |new: i64, old: i64| if new == 0 { old } else { new };
    let text = |new: &String, old: &String| if new.is_empty() { old.clone() } else { new.clone() };
    let mut unified = current.unified.clone();
    unified.extend(update.unified.iter().map(|(k, v)| (k.clone(), v.clone())));
    LinuxContainerResources {
        cpu_period: number(update.cpu_period, current.cpu_period),
        cpu_quota: number(update.cpu_quota, current.cpu_quota),
        cpu_shares: number(update.cpu_shares, current.cpu_shares),
        memory_limit_in_bytes: number(update.memory_limit_in_bytes, current.memory_limit_in_bytes),
        oom_score_adj: number(update.oom_score_adj, current.oom_score_adj),
        cpuset_cpus: text(&update.cpuset_cpus, &current.cpuset_cpus),
        cpuset_mems: text(&update.cpuset_mems, &current.cpuset_mems),
        hugepage_limits: if update.hugepage_limits.is_empty() {
            current.hugepage_limits.clone()
        } else {
            update.hugepage_limits.clone()
        },
        unified,
        memory_swap_limit_in_bytes: number(
            update.memory_swap_limit_in_bytes,
            current.memory_swap_limit_in_bytes,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controllers(names: &[&str]) -> Controllers {
        Controllers(names.iter().map(ToString::to_string).collect())
    }

    fn sample() -> LinuxContainerResources {
        LinuxContainerResources {
            cpu_shares: 512,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 64 << 20,
            unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_memory_limit_also_closes_swap() {
        let oci = to_oci(&sample(), &controllers(&["cpu", "memory"]));
        let memory = oci.memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(64 << 20), Some(64 << 20)));
        assert_eq!(oci.cpu().as_ref().unwrap().shares(), Some(512));
        assert_eq!(oci.unified().as_ref().unwrap()["memory.oom.group"], "1");
    }

    #[test]
    fn limits_without_a_controller_are_left_out() {
        assert_eq!(to_oci(&sample(), &controllers(&[])), {
            let mut none = LinuxResources::default();
            none.set_devices(None);
            none
        });
    }

    #[test]
    fn an_update_keeps_what_it_does_not_name() {
        let update = LinuxContainerResources { cpu_quota: 20_000, ..Default::default() };
        let merged = merge(&sample(), &update);
        assert_eq!(
            (merged.cpu_quota, merged.cpu_shares, merged.memory_limit_in_bytes),
            (20_000, 512, 64 << 20)
        );
    }
}
