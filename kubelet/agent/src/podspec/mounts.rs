//! A container's mounts: a plan of files to write and binds to make, then one executor that returns what the runtime is
//! to mount.

use crate::podspec::container::ContainerInputs;
use crate::podspec::env::Environment;
use crate::podspec::error::SpecError;
use crate::podspec::expansion::expand_strictly;
use crate::podspec::facts::Facts;
use crate::podspec::{hosts, identity, subpath};
use crate::volumes::MountedVolume;
use k8s_openapi::api::core::v1::VolumeMount;
use orlop_proto::cri::{Mount, MountPropagation};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

const HOSTS: &str = "/etc/hosts";

/// Where a container writes its last words: `<root>/pods/<uid>/containers/<name>/<attempt in hex>`.
#[must_use]
pub fn termination_log_path(facts: &Facts, pod_uid: &str, container: &str, attempt: u32) -> PathBuf {
    facts.pod_dir(pod_uid).join("containers").join(container).join(format!("{attempt:08x}"))
}

/// What has to be done before the container can be created.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Preparation {
    steps: Vec<Step>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Step {
    /// A file of ours, written anew, then mounted.
    File { content: String, mode: u32, mount: Mount },
    /// A volume as it is.
    Volume(Mount),
    /// A part of a volume, bound to a place of ours so that nobody can exchange it afterwards.
    SubPath { volume: String, base: PathBuf, sub_path: PathBuf, mount: Mount },
}

impl Preparation {
    pub(super) fn plan(
        facts: &Facts,
        inputs: ContainerInputs<'_>,
        env: &Environment,
        host_file: &str,
    ) -> Result<Self, SpecError> {
        let ContainerInputs { pod, container, pod_ips, .. } = inputs;
        let mounts = container.volume_mounts.as_deref().unwrap_or_default();
        let pod_dir = facts.pod_dir(identity::uid(pod));
        let mut steps = Vec::new();
        let covered = mounts.iter().any(|mount| Path::new(&mount.mount_path) == Path::new(HOSTS));
        if !covered && (!pod_ips.is_empty() || identity::host_network(pod)) {
            let content = hosts::file(facts, pod, pod_ips, host_file);
            steps.push(Step::File { content, mode: 0o644, mount: bind(HOSTS, &pod_dir.join("etc-hosts")) });
        }
        for (index, mount) in mounts.iter().enumerate() {
            steps.push(volume_step(facts, inputs, env, index, mount)?);
        }
        if let Some(path) = container.termination_message_path.as_deref().filter(|path| !path.is_empty()) {
            let file = termination_log_path(facts, identity::uid(pod), &container.name, inputs.attempt);
            // The container's user, whoever that is, has to be able to write it.
            steps.push(Step::File { content: String::new(), mode: 0o666, mount: bind(path, &file) });
        }
        Ok(Self { steps })
    }

    /// Writes and binds. May be repeated; blocks.
    pub(super) fn apply(self) -> Result<Vec<Mount>, SpecError> {
        self.steps.into_iter().map(Step::apply).collect()
    }
}

impl Step {
    fn apply(self) -> Result<Mount, SpecError> {
        match self {
            Self::Volume(mount) => Ok(mount),
            Self::File { content, mode, mount } => {
                let path = Path::new(&mount.host_path);
                write_file(path, content.as_bytes(), mode).map_err(SpecError::file("write", path))?;
                Ok(mount)
            }
            Self::SubPath { volume, base, sub_path, mount } => {
                subpath::bind(&base, &sub_path, Path::new(&mount.host_path)).map_err(|source| {
                    SpecError::SubPathIo { volume, sub_path: sub_path.to_string_lossy().into_owned(), source }
                })?;
                Ok(mount)
            }
        }
    }
}

/// In place: the file may be mounted in containers that run.
fn write_file(path: &Path, content: &[u8], mode: u32) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(path)?;
    file.set_permissions(std::fs::Permissions::from_mode(mode))?;
    file.write_all(content)
}

fn bind(container_path: &str, host_path: &Path) -> Mount {
    Mount {
        container_path: container_path.to_owned(),
        host_path: host_path.to_string_lossy().into_owned(),
        ..Default::default()
    }
}

fn volume_step(
    facts: &Facts,
    inputs: ContainerInputs<'_>,
    env: &Environment,
    index: usize,
    mount: &VolumeMount,
) -> Result<Step, SpecError> {
    let volume = inputs.mounted.get(&mount.name).ok_or_else(|| SpecError::VolumeNotMounted {
        volume: mount.name.clone(),
        path: mount.mount_path.clone(),
    })?;
    let mut wanted = bind(&container_path(mount), &volume.path);
    wanted.readonly = mount.read_only == Some(true) || volume.read_only;
    let propagation = propagation(mount)?;
    wanted.propagation = propagation.into();
    wanted.recursive_read_only = recursive_read_only(facts, mount, volume, propagation)?;
    let Some(sub_path) = sub_path(mount, env)? else { return Ok(Step::Volume(wanted)) };
    let place = facts.pod_dir(identity::uid(inputs.pod)).join(subpath::DIRECTORY);
    let place = place.join(&mount.name).join(&inputs.container.name).join(index.to_string());
    wanted.host_path = place.to_string_lossy().into_owned();
    Ok(Step::SubPath { volume: mount.name.clone(), base: volume.path.clone(), sub_path, mount: wanted })
}

/// Relative mount paths count from the root.
fn container_path(mount: &VolumeMount) -> String {
    if mount.mount_path.starts_with('/') {
        mount.mount_path.clone()
    } else {
        format!("/{}", mount.mount_path)
    }
}

fn propagation(mount: &VolumeMount) -> Result<MountPropagation, SpecError> {
    match mount.mount_propagation.as_deref() {
        None | Some("" | "None") => Ok(MountPropagation::PropagationPrivate),
        Some("HostToContainer") => Ok(MountPropagation::PropagationHostToContainer),
        Some("Bidirectional") => Ok(MountPropagation::PropagationBidirectional),
        Some(other) => Err(SpecError::UnknownValue { field: "mountPropagation", value: other.to_owned() }),
    }
}

fn recursive_read_only(
    facts: &Facts,
    mount: &VolumeMount,
    volume: &MountedVolume,
    propagation: MountPropagation,
) -> Result<bool, SpecError> {
    let supported = facts.recursive_read_only_handlers.iter().any(String::is_empty);
    let fail = |cause| SpecError::RecursiveReadOnly { path: mount.mount_path.clone(), cause };
    let enabled = match mount.recursive_read_only.as_deref() {
        None | Some("" | "Disabled") => return Ok(false),
        Some("IfPossible") => supported,
        Some("Enabled") if supported => true,
        Some("Enabled") => return Err(fail("the container runtime does not support it")),
        Some(other) => {
            return Err(SpecError::UnknownValue { field: "recursiveReadOnly", value: other.to_owned() });
        }
    };
    if mount.read_only != Some(true) && !volume.read_only {
        return Err(fail("the mount is not read-only"));
    }
    if propagation != MountPropagation::PropagationPrivate {
        return Err(fail("it excludes mount propagation"));
    }
    Ok(enabled)
}

fn sub_path(mount: &VolumeMount, env: &Environment) -> Result<Option<PathBuf>, SpecError> {
    let fail = |sub_path: &str, cause: String| SpecError::SubPath {
        volume: mount.name.clone(),
        sub_path: sub_path.to_owned(),
        cause,
    };
    let text = match (mount.sub_path.as_deref(), mount.sub_path_expr.as_deref()) {
        (Some(path), _) if !path.is_empty() => path.to_owned(),
        (_, Some(expression)) if !expression.is_empty() => expand_strictly(expression, env.values())
            .map_err(|name| fail(expression, format!("missing value for {name:?}")))?,
        _ => return Ok(None),
    };
    let path = Path::new(&text);
    if path.is_absolute() {
        return Err(fail(&text, "it must not be absolute".to_owned()));
    }
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(fail(&text, "it must not contain \"..\"".to_owned()));
    }
    // "." and the like mean the volume itself.
    let path: PathBuf = path.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    Ok((!path.as_os_str().is_empty()).then_some(path))
}
