//! A container's capabilities.

use super::SpecError;
use oci_spec::runtime::Capability;
use orlop_proto::cri;
use std::collections::HashSet;
use std::str::FromStr as _;

/// In the kernel's numbering.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What a container has unless told otherwise.
const DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

fn parse(name: &str) -> Result<Capability, SpecError> {
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("CAP_").unwrap_or(&upper);
    if !NAMES.contains(&bare) {
        return Err(SpecError::UnknownCapability(name.to_owned()));
    }
    Capability::from_str(bare).map_err(|_| SpecError::UnknownCapability(name.to_owned()))
}

/// The set that a bounding mask (`CapBnd` of `/proc/self/status`) stands for.
pub(crate) fn from_mask(mask: u64) -> HashSet<Capability> {
    NAMES
        .iter()
        .enumerate()
        .filter(|(number, _)| mask & (1 << number) != 0)
        .filter_map(|(_, name)| Capability::from_str(name).ok())
        .collect()
}

/// What a container may have: never more than `available`, which is what we could pass on.
pub(crate) fn resolve(
    security: &cri::LinuxContainerSecurityContext,
    available: &HashSet<Capability>,
) -> Result<HashSet<Capability>, SpecError> {
    if security.privileged {
        return Ok(available.clone());
    }
    let empty = cri::Capability::default();
    let asked = security.capabilities.as_ref().unwrap_or(&empty);
    let is_all = |name: &String| name.eq_ignore_ascii_case("ALL");
    let mut set = DEFAULT.iter().map(|name| parse(name)).collect::<Result<HashSet<_>, _>>()?;
    if asked.add_capabilities.iter().any(is_all) {
        set.extend(available);
    }
    if asked.drop_capabilities.iter().any(is_all) {
        set.clear();
    }
    for name in asked.add_capabilities.iter().filter(|n| !is_all(n)) {
        set.insert(parse(name)?);
    }
    for name in asked.drop_capabilities.iter().filter(|n| !is_all(n)) {
        set.remove(&parse(name)?);
    }
    set.retain(|capability| available.contains(capability));
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(add: &[&str], drop: &[&str]) -> Result<HashSet<Capability>, SpecError> {
        let security = cri::LinuxContainerSecurityContext {
            capabilities: Some(cri::Capability {
                add_capabilities: add.iter().map(ToString::to_string).collect(),
                drop_capabilities: drop.iter().map(ToString::to_string).collect(),
                add_ambient_capabilities: Vec::new(),
            }),
            ..Default::default()
        };
        resolve(&security, &from_mask(u64::MAX))
    }

    #[test]
    fn every_kernel_name_is_known() {
        assert_eq!(from_mask(u64::MAX).len(), 41);
        assert_eq!(from_mask(1 << 12), HashSet::from([Capability::NetAdmin]));
    }

    #[test]
    fn all_comes_before_single_names() {
        assert_eq!(set(&[], &[]).unwrap().len(), 14);
        assert_eq!(set(&["NET_ADMIN"], &["all"]).unwrap(), HashSet::from([Capability::NetAdmin]));
        assert_eq!(set(&["ALL"], &["cap_chown"]).unwrap().len(), 40);
        assert_eq!(set(&["SYS_TIME"], &["CHOWN", "KILL"]).unwrap().len(), 13);
        assert!(matches!(set(&["FLY"], &[]), Err(SpecError::UnknownCapability(n)) if n == "FLY"));
    }

    #[test]
    fn nothing_is_promised_that_we_do_not_have() {
        let security = cri::LinuxContainerSecurityContext { privileged: true, ..Default::default() };
        assert_eq!(resolve(&security, &from_mask(0b101)).unwrap().len(), 2);
    }
}
