//! The one process of a sandbox that shares its PID namespace: it reaps what its pod leaves behind and does nothing
//! else, so it gets nothing: no capability, no device, a read-only root that holds only itself.

use super::cgroup_path;
use crate::sandbox::files::SandboxDir;
use oci_spec::runtime::{
    Linux, LinuxCapabilities, LinuxDeviceCgroup, LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount,
    Process, Root, Spec, User,
};
use orlop_proto::cri::PodSandboxConfig;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Nobody, in every distribution.
const UNPRIVILEGED: u32 = 65_535;

/// What the runtime mounts on.
pub(crate) const DIRECTORIES: [&str; 2] = ["proc", "dev"];

/// The program's name in its root.
pub(crate) const PROGRAM: &str = "pause";

#[derive(Debug)]
pub(crate) struct Pause<'a> {
    pub(crate) sandbox_id: &'a str,
    pub(crate) config: &'a PodSandboxConfig,
    pub(crate) dir: &'a SandboxDir,
    pub(crate) rootfs: &'a Path,
    pub(crate) own_net: bool,
    pub(crate) own_ipc: bool,
}

pub(crate) fn build(pause: &Pause<'_>) -> Spec {
    let mut root = Root::default();
    root.set_path(pause.rootfs.to_owned()).set_readonly(Some(true));
    let none = || Some(HashSet::new());
    let mut capabilities = LinuxCapabilities::default();
    capabilities
        .set_bounding(none())
        .set_effective(none())
        .set_permitted(none())
        .set_inheritable(none())
        .set_ambient(none());
    let mut user = User::default();
    user.set_uid(UNPRIVILEGED).set_gid(UNPRIVILEGED);
    let mut process = Process::default();
    process
        .set_terminal(Some(false))
        .set_user(user)
        .set_args(Some(vec![format!("/{PROGRAM}")]))
        .set_env(Some(Vec::new()))
        .set_cwd("/".into())
        .set_capabilities(Some(capabilities))
        .set_rlimits(None)
        .set_no_new_privileges(Some(true));
    let mut spec = Spec::default();
    spec.set_version("1.2.0".into())
        .set_root(Some(root))
        .set_mounts(Some(mounts()))
        .set_process(Some(process))
        .set_hostname(None)
        .set_linux(Some(linux(pause)));
    spec
}

fn mounts() -> Vec<Mount> {
    let mount = |destination: &str, kind: &str, options: &[&str]| {
        let mut mount = Mount::default();
        mount
            .set_destination(destination.into())
            .set_typ(Some(kind.to_owned()))
            .set_source(Some(kind.into()))
            .set_options(Some(options.iter().map(ToString::to_string).collect()));
        mount
    };
    vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=64k"]),
    ]
}

fn linux(pause: &Pause<'_>) -> Linux {
    use LinuxNamespaceType as T;
    let namespace = |kind, path: Option<PathBuf>| {
        let mut namespace = LinuxNamespace::default();
        namespace.set_typ(kind).set_path(path);
        namespace
    };
    let mut namespaces = vec![namespace(T::Mount, None), namespace(T::Pid, None), namespace(T::Cgroup, None)];
    if pause.own_net {
        namespaces.push(namespace(T::Network, Some(pause.dir.namespace("net"))));
        namespaces.push(namespace(T::Uts, Some(pause.dir.namespace("uts"))));
    }
    if pause.own_ipc {
        namespaces.push(namespace(T::Ipc, Some(pause.dir.namespace("ipc"))));
    }
    let mut no_device = LinuxDeviceCgroup::default();
    no_device.set_allow(false).set_access(Some("rwm".into()));
    let mut resources = LinuxResources::default();
    resources.set_devices(Some(vec![no_device]));
    let mut linux = Linux::default();
    linux
        .set_uid_mappings(None)
        .set_gid_mappings(None)
        .set_namespaces(Some(namespaces))
        .set_resources(Some(resources))
        .set_cgroups_path(Some(cgroup_path(pause.config, pause.sandbox_id)));
    linux
}
