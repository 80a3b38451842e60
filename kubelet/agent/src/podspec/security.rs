//! Security contexts: the pod's and the container's, merged into what the runtime enforces.

use crate::podspec::error::SpecError;
use crate::podspec::facts::Facts;
use crate::podspec::identity;
use k8s_openapi::api::core::v1::{
    AppArmorProfile, Container, Pod, PodSecurityContext, SELinuxOptions, SeccompProfile, SecurityContext,
};
use orlop_proto::cri::{
    Capability, Image, Int64Value, LinuxContainerSecurityContext, LinuxSandboxSecurityContext, NamespaceMode,
    NamespaceOption, SeLinuxOption, SecurityProfile, SupplementalGroupsPolicy, security_profile::ProfileType,
};
use std::path::{Component, Path};
use std::sync::OnceLock;

const MASKED: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The sandbox's context. Its own process, where there is one, always gets the runtime's default profile.
pub(super) fn sandbox(pod: &Pod) -> Result<LinuxSandboxSecurityContext, SpecError> {
    let context = pod_context(pod);
    let privileged = identity::containers(pod)
        .any(|container| container.security_context.as_ref().and_then(|c| c.privileged) == Some(true));
    Ok(LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces(pod, None)?),
        selinux_options: context.and_then(|context| context.se_linux_options.as_ref()).map(selinux),
        run_as_user: context.and_then(|context| context.run_as_user).map(number),
        run_as_group: context.and_then(|context| context.run_as_group).map(number),
        supplemental_groups: supplemental_groups(context),
        supplemental_groups_policy: groups_policy(context)?.into(),
        privileged,
        seccomp: Some(profile(ProfileType::RuntimeDefault, String::new())),
        ..Default::default()
    })
}

/// The container's context. `target` is the container whose processes an ephemeral one joins.
pub(super) fn container(
    facts: &Facts,
    pod: &Pod,
    container: &Container,
    image: &Image,
    target: Option<&str>,
) -> Result<LinuxContainerSecurityContext, SpecError> {
    let of_pod = pod_context(pod);
    let own = container.security_context.as_ref();
    let (run_as_user, run_as_username) = user(pod, container, image)?;
    let capabilities = own.and_then(|own| own.capabilities.as_ref()).map(|capabilities| Capability {
        add_capabilities: capabilities.add.clone().unwrap_or_default(),
        drop_capabilities: capabilities.drop.clone().unwrap_or_default(),
        ..Default::default()
    });
    let (masked_paths, readonly_paths) = proc_paths(own)?;
    Ok(LinuxContainerSecurityContext {
        capabilities,
        privileged: own.and_then(|own| own.privileged).unwrap_or(false),
        namespace_options: Some(namespaces(pod, target)?),
        selinux_options: own
            .and_then(|own| own.se_linux_options.as_ref())
            .or_else(|| of_pod.and_then(|pod| pod.se_linux_options.as_ref()))
            .map(selinux),
        run_as_user: run_as_user.map(number),
        run_as_group: own
            .and_then(|own| own.run_as_group)
            .or_else(|| of_pod.and_then(|pod| pod.run_as_group))
            .map(number),
        run_as_username,
        readonly_rootfs: own.and_then(|own| own.read_only_root_filesystem).unwrap_or(false),
        supplemental_groups: supplemental_groups(of_pod),
        supplemental_groups_policy: groups_policy(of_pod)?.into(),
        no_new_privs: own.and_then(|own| own.allow_privilege_escalation) == Some(false),
        masked_paths,
        readonly_paths,
        seccomp: Some(seccomp(facts, of_pod, own)?),
        apparmor: apparmor(pod, container)?,
        ..Default::default()
    })
}

fn pod_context(pod: &Pod) -> Option<&PodSecurityContext> {
    identity::spec(pod)?.security_context.as_ref()
}

fn namespaces(pod: &Pod, target: Option<&str>) -> Result<NamespaceOption, SpecError> {
    let spec = identity::spec(pod);
    let wants = |flag: Option<Option<bool>>| flag.flatten() == Some(true);
    if spec.and_then(|spec| spec.host_users) == Some(false) {
        return Err(SpecError::UserNamespace);
    }
    let node_or_pod = |node| if node { NamespaceMode::Node } else { NamespaceMode::Pod };
    let pid = if let Some(_target) = target {
        NamespaceMode::Target
    } else if wants(spec.map(|spec| spec.host_pid)) {
        NamespaceMode::Node
    } else if wants(spec.map(|spec| spec.share_process_namespace)) {
        NamespaceMode::Pod
    } else {
        NamespaceMode::Container
    };
    Ok(NamespaceOption {
        network: node_or_pod(identity::host_network(pod)).into(),
        ipc: node_or_pod(wants(spec.map(|spec| spec.host_ipc))).into(),
        pid: pid.into(),
        target_id: target.unwrap_or_default().to_owned(),
        userns_options: None,
    })
}

/// The user a container runs as: its own, the pod's, or the image's; checked against `runAsNonRoot`.
fn user(pod: &Pod, container: &Container, image: &Image) -> Result<(Option<i64>, String), SpecError> {
    let of_pod = pod_context(pod);
    let own = container.security_context.as_ref();
    let stated =
        own.and_then(|own| own.run_as_user).or_else(|| of_pod.and_then(|context| context.run_as_user));
    let of_image = image.uid.as_ref().map(|uid| uid.value);
    let non_root = own
        .and_then(|own| own.run_as_non_root)
        .or_else(|| of_pod.and_then(|context| context.run_as_non_root))
        .unwrap_or(false);
    if non_root {
        let (pod, container) = (identity::described(pod), container.name.clone());
        match (stated, of_image) {
            (Some(0), _) => return Err(SpecError::UserBreaksPolicy { pod, container }),
            (Some(_), _) => {}
            (None, Some(0)) => return Err(SpecError::ImageRunsAsRoot { pod, container }),
            (None, Some(_)) => {}
            (None, None) if image.username.is_empty() => {
                return Err(SpecError::ImageRunsAsRoot { pod, container });
            }
            (None, None) => {
                let user = image.username.clone();
                return Err(SpecError::ImageUserNotNumeric { pod, container, user });
            }
        }
    }
    Ok(match stated.or(of_image) {
        Some(uid) => (Some(uid), String::new()),
        None => (None, image.username.clone()),
    })
}

fn supplemental_groups(context: Option<&PodSecurityContext>) -> Vec<i64> {
    let Some(context) = context else { return Vec::new() };
    let listed = context.supplemental_groups.iter().flatten();
    context.fs_group.iter().chain(listed).copied().collect()
}

fn groups_policy(context: Option<&PodSecurityContext>) -> Result<SupplementalGroupsPolicy, SpecError> {
    match context.and_then(|context| context.supplemental_groups_policy.as_deref()) {
        None | Some("Merge") => Ok(SupplementalGroupsPolicy::Merge),
        Some("Strict") => Ok(SupplementalGroupsPolicy::Strict),
        Some(other) => {
            Err(SpecError::UnknownValue { field: "supplementalGroupsPolicy", value: other.to_owned() })
        }
    }
}

fn seccomp(
    facts: &Facts,
    of_pod: Option<&PodSecurityContext>,
    own: Option<&SecurityContext>,
) -> Result<SecurityProfile, SpecError> {
    let stated = own
        .and_then(|own| own.seccomp_profile.as_ref())
        .or_else(|| of_pod.and_then(|pod| pod.seccomp_profile.as_ref()));
    let Some(SeccompProfile { type_, localhost_profile }) = stated else {
        let kind = if facts.seccomp_default { ProfileType::RuntimeDefault } else { ProfileType::Unconfined };
        return Ok(profile(kind, String::new()));
    };
    match type_.as_str() {
        "RuntimeDefault" => Ok(profile(ProfileType::RuntimeDefault, String::new())),
        "Unconfined" => Ok(profile(ProfileType::Unconfined, String::new())),
        "Localhost" => {
            let name = localhost_profile.clone().unwrap_or_default();
            let inside = Path::new(&name).components().all(|part| matches!(part, Component::Normal(_)));
            if name.is_empty() || !inside {
                return Err(SpecError::SeccompProfile { profile: name });
            }
            let path = facts.seccomp_dir().join(name);
            Ok(profile(ProfileType::Localhost, path.to_string_lossy().into_owned()))
        }
        other => Err(SpecError::UnknownValue { field: "seccompProfile type", value: other.to_owned() }),
    }
}

fn apparmor(pod: &Pod, container: &Container) -> Result<Option<SecurityProfile>, SpecError> {
    let own = container.security_context.as_ref().and_then(|own| own.app_armor_profile.as_ref());
    let stated = own.or_else(|| pod_context(pod)?.app_armor_profile.as_ref());
    if let Some(AppArmorProfile { type_, localhost_profile }) = stated {
        return match type_.as_str() {
            "RuntimeDefault" => Ok(Some(profile(ProfileType::RuntimeDefault, String::new()))),
            "Unconfined" => Ok(Some(profile(ProfileType::Unconfined, String::new()))),
            "Localhost" => {
                let name = localhost_profile.clone().unwrap_or_default();
                Ok(Some(profile(ProfileType::Localhost, name)))
            }
            other => Err(SpecError::UnknownValue { field: "appArmorProfile type", value: other.to_owned() }),
        };
    }
    // The form before the field existed; static pods still use it.
    let key = format!("container.apparmor.security.beta.kubernetes.io/{}", container.name);
    let annotation = pod.metadata.annotations.as_ref().and_then(|annotations| annotations.get(&key));
    match annotation.map(String::as_str) {
        None | Some("") => Ok(None),
        Some("runtime/default") => Ok(Some(profile(ProfileType::RuntimeDefault, String::new()))),
        Some("unconfined") => Ok(Some(profile(ProfileType::Unconfined, String::new()))),
        Some(other) => match other.strip_prefix("localhost/") {
            Some(name) => Ok(Some(profile(ProfileType::Localhost, name.to_owned()))),
            None => Err(SpecError::UnknownValue { field: "AppArmor annotation", value: other.to_owned() }),
        },
    }
}

fn proc_paths(own: Option<&SecurityContext>) -> Result<(Vec<String>, Vec<String>), SpecError> {
    match own.and_then(|own| own.proc_mount.as_deref()) {
        None | Some("Default") => {
            let masked = MASKED.iter().map(|path| (*path).to_owned()).chain(throttle_paths().iter().cloned());
            Ok((masked.collect(), READ_ONLY.iter().map(|path| (*path).to_owned()).collect()))
        }
        Some("Unmasked") => Ok((Vec::new(), Vec::new())),
        Some(other) => Err(SpecError::UnknownValue { field: "procMount", value: other.to_owned() }),
    }
}

/// Per-processor directories that tell one container about the load of others.
fn throttle_paths() -> &'static [String] {
    static PATHS: OnceLock<Vec<String>> = OnceLock::new();
    PATHS.get_or_init(|| {
        let Ok(entries) = std::fs::read_dir("/sys/devices/system/cpu") else { return Vec::new() };
        let mut paths: Vec<String> = entries
            .flatten()
            .map(|entry| entry.path().join("thermal_throttle"))
            .filter(|path| path.is_dir())
            .filter_map(|path| path.into_os_string().into_string().ok())
            .collect();
        paths.sort();
        paths
    })
}

fn selinux(options: &SELinuxOptions) -> SeLinuxOption {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    SeLinuxOption {
        user: text(&options.user),
        role: text(&options.role),
        r#type: text(&options.type_),
        level: text(&options.level),
    }
}

fn profile(kind: ProfileType, localhost_ref: String) -> SecurityProfile {
    SecurityProfile { profile_type: kind.into(), localhost_ref }
}

fn number(value: i64) -> Int64Value {
    Int64Value { value }
}

#[cfg(test)]
#[path = "security_tests.rs"]
mod tests;
