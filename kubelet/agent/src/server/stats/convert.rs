//! From the runtime's and the kernel's figures to the summary's.

use super::cgroup::Group;
use super::model::{Cpu, Interface, Io, Memory, Moment, Network, Pressure, PressureLine, Swap};
use super::sample::Round;
use orlop_proto::cri::{self, UInt64Value};

fn value(value: Option<UInt64Value>) -> Option<u64> {
    value.map(|wrapped| wrapped.value)
}

fn pressure(stats: Option<cri::PsiStats>) -> Option<Pressure> {
    let line = |data: Option<cri::PsiData>| {
        data.map(|data| PressureLine {
            total: data.total,
            avg10: data.avg10,
            avg60: data.avg60,
            avg300: data.avg300,
        })
    };
    let stats = stats?;
    Some(Pressure { full: line(stats.full).unwrap_or_default(), some: line(stats.some).unwrap_or_default() })
}

/// `key` names whatever has used the time, for the rate where the runtime states none.
pub(super) fn cpu(usage: Option<&cri::CpuUsage>, key: &str, round: &mut Round<'_>) -> Option<Cpu> {
    let usage = usage?;
    let total = value(usage.usage_core_nano_seconds);
    let own = value(usage.usage_nano_cores);
    let rate = own.or_else(|| total.and_then(|total| round.rate(key, usage.timestamp, total)));
    Some(Cpu {
        time: Moment(usage.timestamp),
        usage_nano_cores: rate,
        usage_core_nano_seconds: total,
        psi: pressure(usage.psi),
    })
}

pub(super) fn memory(usage: Option<&cri::MemoryUsage>) -> Option<Memory> {
    let usage = usage?;
    Some(Memory {
        time: Moment(usage.timestamp),
        available_bytes: value(usage.available_bytes),
        usage_bytes: value(usage.usage_bytes),
        working_set_bytes: value(usage.working_set_bytes),
        rss_bytes: value(usage.rss_bytes),
        page_faults: value(usage.page_faults),
        major_page_faults: value(usage.major_page_faults),
        psi: pressure(usage.psi),
    })
}

pub(super) fn swap(usage: Option<&cri::SwapUsage>) -> Option<Swap> {
    let usage = usage?;
    Some(Swap {
        time: Moment(usage.timestamp),
        swap_available_bytes: value(usage.swap_available_bytes),
        swap_usage_bytes: value(usage.swap_usage_bytes),
    })
}

pub(super) fn io(usage: Option<&cri::IoUsage>) -> Option<Io> {
    usage.map(|usage| Io { time: Moment(usage.timestamp), psi: pressure(usage.psi) })
}

pub(super) fn network(usage: Option<&cri::NetworkUsage>) -> Option<Network> {
    let usage = usage?;
    let interface = |one: &cri::NetworkInterfaceUsage| Interface {
        name: one.name.clone(),
        rx_bytes: value(one.rx_bytes),
        rx_errors: value(one.rx_errors),
        tx_bytes: value(one.tx_bytes),
        tx_errors: value(one.tx_errors),
    };
    let default = usage.default_interface.as_ref().map(interface);
    // The list holds all of them, the default one too.
    let all = default.iter().cloned().chain(usage.interfaces.iter().map(interface));
    let mut interfaces: Vec<Interface> = Vec::new();
    for one in all {
        if !interfaces.iter().any(|known| known.name == one.name) {
            interfaces.push(one);
        }
    }
    Some(Network {
        time: Moment(usage.timestamp),
        default: default.unwrap_or_default(),
        interfaces: Some(interfaces).filter(|list| !list.is_empty()),
    })
}

/// What a cgroup says, for those that the runtime knows nothing of.
pub(super) fn group_cpu(group: &Group, now: i64, key: &str, round: &mut Round<'_>) -> Option<Cpu> {
    let usage = group.cpu()?.usage;
    Some(Cpu {
        time: Moment(now),
        usage_nano_cores: round.rate(key, now, usage),
        usage_core_nano_seconds: Some(usage),
        psi: group.pressure("cpu"),
    })
}

pub(super) fn group_memory(group: &Group, now: i64) -> Option<Memory> {
    let memory = group.memory()?;
    let working_set = memory.working_set();
    Some(Memory {
        time: Moment(now),
        available_bytes: memory.limit.map(|limit| limit.saturating_sub(working_set)),
        usage_bytes: Some(memory.usage),
        working_set_bytes: Some(working_set),
        rss_bytes: Some(memory.anonymous),
        page_faults: Some(memory.page_faults),
        major_page_faults: Some(memory.major_page_faults),
        psi: group.pressure("memory"),
    })
}

pub(super) fn group_swap(group: &Group, now: i64) -> Option<Swap> {
    let memory = group.memory()?;
    let usage = memory.swap?;
    Some(Swap {
        time: Moment(now),
        swap_available_bytes: memory.swap_limit.map(|limit| limit.saturating_sub(usage)),
        swap_usage_bytes: Some(usage),
    })
}

pub(super) fn group_io(group: &Group, now: i64) -> Option<Io> {
    group.pressure("io").map(|psi| Io { time: Moment(now), psi: Some(psi) })
}
