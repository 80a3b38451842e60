//! From the kubelet's container configuration to an OCI one.
//!
//! [`build`] is pure: what it needs to know about the host, the image and the sandbox is in its input, resolved by the
//! modules below before. The defaults are those of a containerd node, since tools and tests notice differences.

pub(crate) mod capabilities;
pub(crate) mod devices;
pub(crate) mod image_files;
pub(crate) mod mounts;
pub(crate) mod pause;
pub(crate) mod process;
pub(crate) mod resources;
pub(crate) mod seccomp;
pub(crate) mod seccomp_default;
pub(crate) mod user;

use crate::config::Ulimit;
use crate::sandbox::files::SandboxDir;
use devices::DeviceNode;
use mounts::Bind;
use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{
    Capability, Linux, LinuxCapabilities, LinuxDeviceCgroup, LinuxNamespace, LinuxNamespaceType,
    LinuxResources, LinuxSeccomp, PosixRlimit, PosixRlimitBuilder, Process, Root, Spec,
};
use orlop_proto::cri::{
    ContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext, NamespaceMode, NamespaceOption,
    PodSandboxConfig,
};
use resources::Controllers;
use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use user::User;

#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    #[error("{field} is not valid: {reason}")]
    Invalid { field: &'static str, reason: String },
    #[error("there is no command: neither the pod nor the image names one")]
    NoCommand,
    #[error("user {0:?} is not in the image's /etc/passwd")]
    UnknownUser(String),
    #[error("group {0:?} is not in the image's /etc/group")]
    UnknownGroup(String),
    #[error("capability {0:?} is unknown")]
    UnknownCapability(String),
    #[error("cannot use device {path}: {source}")]
    Device { path: PathBuf, source: io::Error },
    #[error("{0} is not a device")]
    NotADevice(PathBuf),
    #[error("CDI device {0:?} cannot be given: this runtime reads no CDI specifications")]
    NoCdi(String),
    #[error("cannot mount host path {path}: {source}")]
    MountSource { path: PathBuf, source: io::Error },
    #[error("cannot propagate mounts of {path}: its mount on the host is not {needed}")]
    Propagation { path: PathBuf, needed: &'static str },
    #[error("RROUnsupported: mount {0} is recursively read-only without being read-only and private")]
    RecursiveReadonly(PathBuf),
    #[error("mount {0} asks for id mappings, which this runtime does not offer")]
    NoIdMappings(PathBuf),
    #[error("ImageVolumeMountFailed: cannot mount image {image} at {destination}: {reason}")]
    ImageVolume { image: String, destination: PathBuf, reason: String },
    #[error("seccomp profile {path} cannot be used: {reason}")]
    SeccompProfile { path: PathBuf, reason: String },
    #[error("AppArmor profile {profile:?} cannot be used: {reason}")]
    AppArmor { profile: String, reason: &'static str },
    #[error("cannot read {path} of the image: {source}")]
    ImageFile { path: &'static str, source: io::Error },
    #[error("privileged containers need a privileged sandbox")]
    PrivilegedSandbox,
    #[error("user namespaces are not offered by this runtime")]
    NoUserNamespaces,
}

impl SpecError {
    /// The caller asked for something that cannot be, rather than the host failing to provide it.
    pub(crate) fn is_invalid_argument(&self) -> bool {
        !matches!(
            self,
            Self::Device { .. }
                | Self::MountSource { .. }
                | Self::ImageFile { .. }
                | Self::Propagation { .. }
        )
    }
}

/// What the host can do, found once at start.
#[derive(Debug, Clone, Default)]
pub(crate) struct HostFacts {
    pub(crate) capabilities: HashSet<Capability>,
    pub(crate) controllers: Controllers,
    pub(crate) apparmor_profiles: Option<PathBuf>,
    /// The lowest `oom_score_adj` we may ask for.
    pub(crate) oom_score_floor: Option<i32>,
    pub(crate) ulimits: Vec<Ulimit>,
}

/// What the sandbox gives its containers.
#[derive(Debug)]
pub(crate) struct SandboxFacts<'a> {
    pub(crate) id: &'a str,
    pub(crate) config: &'a PodSandboxConfig,
    pub(crate) dir: &'a SandboxDir,
    /// The process whose PID namespace is joined: the sandbox's, or that of a target container.
    pub(crate) pid_namespace_of: Option<u32>,
    pub(crate) hostname: &'a str,
}

#[derive(Debug)]
pub(crate) struct Input<'a> {
    pub(crate) id: &'a str,
    pub(crate) config: &'a ContainerConfig,
    pub(crate) sandbox: SandboxFacts<'a>,
    pub(crate) image: &'a ImageConfiguration,
    pub(crate) user: &'a User,
    pub(crate) binds: &'a [Bind],
    pub(crate) devices: &'a [DeviceNode],
    pub(crate) rootfs: &'a Path,
    pub(crate) host: &'a HostFacts,
}

/// The security context, or one that asks for nothing.
pub(crate) fn security(config: &ContainerConfig) -> LinuxContainerSecurityContext {
    config.linux.as_ref().and_then(|l| l.security_context.clone()).unwrap_or_default()
}

pub(crate) fn requested_resources(config: &ContainerConfig) -> LinuxContainerResources {
    config.linux.as_ref().and_then(|l| l.resources.clone()).unwrap_or_default()
}

/// Refuses what no later step would notice.
pub(crate) fn check(config: &ContainerConfig, sandbox: &PodSandboxConfig) -> Result<(), SpecError> {
    let security = security(config);
    let sandbox_privileged =
        sandbox.linux.as_ref().and_then(|l| l.security_context.as_ref()).is_some_and(|s| s.privileged);
    if security.privileged && !sandbox_privileged {
        return Err(SpecError::PrivilegedSandbox);
    }
    check_userns(security.namespace_options.as_ref())?;
    if let Some(device) = config.cdi_devices.first() {
        return Err(SpecError::NoCdi(device.name.clone()));
    }
    Ok(())
}

pub(crate) fn check_userns(options: Option<&NamespaceOption>) -> Result<(), SpecError> {
    match options.and_then(|o| o.userns_options.as_ref()) {
        Some(userns) if userns.mode() != NamespaceMode::Node => Err(SpecError::NoUserNamespaces),
        _ => Ok(()),
    }
}

pub(crate) fn build(input: &Input<'_>) -> Result<Spec, SpecError> {
    let security = security(input.config);
    let capabilities = capabilities::resolve(&security, &input.host.capabilities)?;
    let seccomp = seccomp::resolve(&security, &capabilities)?;
    let defaults = mounts::Defaults {
        dir: input.sandbox.dir,
        privileged: security.privileged,
        readonly_rootfs: security.readonly_rootfs,
        host_ipc: namespaces_of(&security).ipc() == NamespaceMode::Node,
    };
    let mut root = Root::default();
    root.set_path(input.rootfs.to_owned()).set_readonly(Some(security.readonly_rootfs));
    let mut spec = Spec::default();
    spec.set_version("1.2.0".into())
        .set_root(Some(root))
        .set_mounts(Some(mounts::plan(&defaults, input.binds)))
        .set_process(Some(process(input, &security, &capabilities)?))
        .set_hostname(None)
        .set_annotations(Some(annotations(input)))
        .set_linux(Some(linux(input, &security, seccomp)));
    Ok(spec)
}

fn process(
    input: &Input<'_>,
    security: &LinuxContainerSecurityContext,
    capabilities: &HashSet<Capability>,
) -> Result<Process, SpecError> {
    let mut user = oci_spec::runtime::User::default();
    user.set_uid(input.user.uid)
        .set_gid(input.user.gid)
        .set_additional_gids(Some(input.user.groups.clone()))
        .set_umask(Some(0o022));
    let mut process = Process::default();
    process
        .set_terminal(Some(input.config.tty))
        .set_user(user)
        .set_args(Some(process::arguments(input.config, input.image)?))
        .set_env(Some(process::environment(input.config, input.image, input.sandbox.hostname)?))
        .set_cwd(process::working_dir(input.config, input.image).into())
        .set_capabilities(Some(capability_sets(capabilities)))
        .set_rlimits(rlimits(&input.host.ulimits))
        .set_no_new_privileges(Some(security.no_new_privs))
        .set_apparmor_profile(seccomp::apparmor(security, input.host.apparmor_profiles.as_deref())?)
        .set_oom_score_adj(oom_score(input));
    Ok(process)
}

fn capability_sets(capabilities: &HashSet<Capability>) -> LinuxCapabilities {
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(capabilities.clone()))
        .set_effective(Some(capabilities.clone()))
        .set_permitted(Some(capabilities.clone()))
        .set_inheritable(Some(HashSet::new()))
        .set_ambient(Some(HashSet::new()));
    sets
}

fn rlimits(ulimits: &[Ulimit]) -> Option<Vec<PosixRlimit>> {
    if ulimits.is_empty() {
        return None;
    }
    let limit = |u: &Ulimit| {
        PosixRlimitBuilder::default()
            .typ(u.kind)
            .soft(u.soft)
            .hard(u.hard)
            .build()
            .expect("every field is set above")
    };
    Some(ulimits.iter().map(limit).collect())
}

fn oom_score(input: &Input<'_>) -> Option<i32> {
    let wanted = requested_resources(input.config).oom_score_adj;
    let wanted = i32::try_from(wanted.clamp(-1000, 1000)).ok()?;
    Some(input.host.oom_score_floor.map_or(wanted, |floor| wanted.max(floor)))
}

pub(crate) fn namespaces_of(security: &LinuxContainerSecurityContext) -> NamespaceOption {
    security.namespace_options.clone().unwrap_or_default()
}

fn namespaces(input: &Input<'_>, security: &LinuxContainerSecurityContext) -> Vec<LinuxNamespace> {
    use LinuxNamespaceType as T;
    let options = namespaces_of(security);
    let namespace = |kind, path: Option<PathBuf>| {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(kind).set_path(path);
        namespace
    };
    let dir = input.sandbox.dir;
    let mut list = vec![namespace(T::Mount, None)];
    if options.network() != NamespaceMode::Node {
        list.push(namespace(T::Network, Some(dir.namespace("net"))));
        list.push(namespace(T::Uts, Some(dir.namespace("uts"))));
    }
    if options.ipc() != NamespaceMode::Node {
        list.push(namespace(T::Ipc, Some(dir.namespace("ipc"))));
    }
    match (options.pid(), input.sandbox.pid_namespace_of) {
        (NamespaceMode::Node, _) => {}
        (NamespaceMode::Container, _) | (_, None) => list.push(namespace(T::Pid, None)),
        (_, Some(pid)) => list.push(namespace(T::Pid, Some(format!("/proc/{pid}/ns/pid").into()))),
    }
    if !security.privileged {
        list.push(namespace(T::Cgroup, None));
    }
    list
}

fn linux(
    input: &Input<'_>,
    security: &LinuxContainerSecurityContext,
    seccomp: Option<LinuxSeccomp>,
) -> Linux {
    let paths = |list: &Vec<String>| if security.privileged { None } else { Some(list.clone()) };
    let mut linux = Linux::default();
    linux
        .set_uid_mappings(None)
        .set_gid_mappings(None)
        .set_sysctl(None)
        .set_namespaces(Some(namespaces(input, security)))
        .set_resources(Some(container_resources(input, security)))
        .set_cgroups_path(Some(cgroup_path(input.sandbox.config, input.id)))
        .set_devices(Some(input.devices.iter().map(DeviceNode::to_oci).collect()))
        .set_seccomp(seccomp)
        .set_rootfs_propagation(mounts::root_propagation(input.binds).map(str::to_owned))
        .set_masked_paths(paths(&security.masked_paths))
        .set_readonly_paths(paths(&security.readonly_paths));
    linux
}

fn container_resources(input: &Input<'_>, security: &LinuxContainerSecurityContext) -> LinuxResources {
    let mut resources = resources::to_oci(&requested_resources(input.config), &input.host.controllers);
    let mut everything = LinuxDeviceCgroup::default();
    everything.set_allow(security.privileged).set_access(Some("rwm".into()));
    let mut rules = vec![everything];
    if !security.privileged {
        rules.extend(input.devices.iter().map(DeviceNode::rule));
    }
    resources.set_devices(Some(rules));
    resources
}

/// Relative to the cgroup root, below the pod's own.
pub(crate) fn cgroup_path(sandbox: &PodSandboxConfig, id: &str) -> PathBuf {
    let parent = sandbox.linux.as_ref().map_or("", |l| l.cgroup_parent.as_str());
    let parent = if parent.is_empty() { "/orlop" } else { parent };
    Path::new("/").join(parent.trim_start_matches('/')).join(id)
}

/// What hooks and observers look for on every container of a Kubernetes node.
fn annotations(input: &Input<'_>) -> HashMap<String, String> {
    let sandbox = input.sandbox.config;
    let metadata = sandbox.metadata.clone().unwrap_or_default();
    let name = input.config.metadata.as_ref().map(|m| m.name.clone()).unwrap_or_default();
    let image = input.config.image.as_ref().map(|i| &i.user_specified_image).filter(|i| !i.is_empty());
    let image = image.or_else(|| input.config.image.as_ref().map(|i| &i.image)).cloned().unwrap_or_default();
    [
        ("container-type", "container".to_owned()),
        ("sandbox-id", input.sandbox.id.to_owned()),
        ("sandbox-name", metadata.name),
        ("sandbox-namespace", metadata.namespace),
        ("sandbox-uid", metadata.uid),
        ("container-name", name),
        ("image-name", image),
    ]
    .into_iter()
    .map(|(key, value)| (format!("io.kubernetes.cri.{key}"), value))
    .collect()
}

#[cfg(test)]
mod tests;
