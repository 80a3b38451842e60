//! A container's configuration.

use crate::objects::Objects;
use crate::podspec::env::{self, Environment};
use crate::podspec::error::SpecError;
use crate::podspec::expansion::expand;
use crate::podspec::facts::Facts;
use crate::podspec::{identity, labels, mounts, resources, security};
use crate::volumes::{MountedVolumes, worker};
use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod};
use orlop_proto::cri::{
    ContainerConfig, ContainerMetadata, Image, ImageSpec, KeyValue, LinuxContainerConfig, Mount, Signal,
};
use std::net::IpAddr;
use std::time::Duration;

/// How long the file systems below a container's mounts may take.
const PREPARATION: Duration = Duration::from_secs(60);

/// In which list of the pod a container stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerKind {
    Main,
    Init,
    Ephemeral,
}

/// What is known when a container is about to be created.
#[derive(Debug, Clone, Copy)]
pub struct ContainerInputs<'a> {
    pub pod: &'a Pod,
    pub container: &'a Container,
    pub kind: ContainerKind,
    /// How often it was restarted before.
    pub attempt: u32,
    pub image: &'a Image,
    /// What the runtime calls the image: the result of its pull or look-up.
    pub image_ref: &'a str,
    pub pod_ips: &'a [IpAddr],
    pub mounted: &'a MountedVolumes,
    /// For an ephemeral container with `targetContainerName`: the running container of that name.
    pub target_id: Option<&'a str>,
}

/// The configuration of one container. Reads referenced objects, makes its log directory, hosts file, termination
/// message file and sub path mounts.
pub async fn container_config(
    facts: &Facts,
    objects: &Objects,
    inputs: ContainerInputs<'_>,
) -> Result<ContainerConfig, SpecError> {
    let ContainerInputs { pod, container, pod_ips, .. } = inputs;
    if container.volume_devices.as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Err(SpecError::VolumeDevices { container: container.name.clone() });
    }
    let env = env::environment(env::Request { facts, objects, pod, container, pod_ips }).await?;
    let host_file = if identity::host_network(pod) {
        // A host without such a file has an empty one.
        tokio::fs::read_to_string(&facts.etc_hosts).await.unwrap_or_default()
    } else {
        String::new()
    };
    let prepared = mounts::Preparation::plan(facts, inputs, &env, &host_file)?;
    let mut config = assemble(facts, inputs, &env, Vec::new())?;
    let logs = facts.pod_logs_dir.join(identity::pod_log_dir_name(pod)).join(&container.name);
    // Mounting and creating files can hang with the file system below, and then must not hold up other pods.
    let made = worker::run(PREPARATION, move || {
        std::fs::create_dir_all(&logs).map_err(SpecError::file("create log directory", &logs))?;
        prepared.apply()
    });
    config.mounts = made.await.map_err(|error| SpecError::File {
        operation: "prepare mounts below",
        path: facts.pod_dir(identity::uid(pod)),
        source: error.into(),
    })??;
    Ok(config)
}

/// The configuration from arguments alone.
pub(super) fn assemble(
    facts: &Facts,
    inputs: ContainerInputs<'_>,
    env: &Environment,
    mounts: Vec<Mount>,
) -> Result<ContainerConfig, SpecError> {
    let ContainerInputs { pod, container, attempt, image, image_ref, .. } = inputs;
    let annotations = labels::container_annotations(pod, container, attempt)
        .map_err(|error| SpecError::UnknownValue { field: "lifecycle or ports", value: error.to_string() })?;
    let expanded = |words: &Option<Vec<String>>| {
        words.iter().flatten().map(|word| expand(word, |name| env.get(name))).collect()
    };
    let user_specified = container.image.clone().unwrap_or_default();
    Ok(ContainerConfig {
        metadata: Some(ContainerMetadata { name: container.name.clone(), attempt }),
        image: Some(ImageSpec {
            image: image_ref.to_owned(),
            user_specified_image: user_specified,
            ..Default::default()
        }),
        command: expanded(&container.command),
        args: expanded(&container.args),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        envs: env
            .iter()
            .map(|(key, value)| KeyValue { key: key.to_owned(), value: value.as_bytes().to_vec() })
            .collect(),
        mounts,
        labels: labels::container_labels(pod, container),
        annotations,
        log_path: format!("{}/{attempt}.log", container.name),
        stdin: container.stdin.unwrap_or(false),
        stdin_once: container.stdin_once.unwrap_or(false),
        tty: container.tty.unwrap_or(false),
        linux: Some(LinuxContainerConfig {
            resources: Some(resources::container_resources(facts, pod, container)?),
            security_context: Some(security::container(facts, pod, container, image, inputs.target_id)?),
        }),
        stop_signal: stop_signal(container)?.into(),
        ..Default::default()
    })
}

fn stop_signal(container: &Container) -> Result<Signal, SpecError> {
    let stated = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.stop_signal.as_deref());
    let Some(name) = stated.filter(|name| !name.is_empty()) else { return Ok(Signal::RuntimeDefault) };
    // Names with a sign are spelled out in the wire format.
    let wire = name.replace('+', "PLUS").replace('-', "MINUS");
    Signal::from_str_name(&wire)
        .filter(|signal| *signal != Signal::RuntimeDefault)
        .ok_or_else(|| SpecError::UnknownValue { field: "stopSignal", value: name.to_owned() })
}

/// An ephemeral container as the container it is for every purpose but its place in the pod.
#[must_use]
pub fn ephemeral_as_container(ephemeral: &EphemeralContainer) -> Container {
    let EphemeralContainer { target_container_name: _, .. } = ephemeral;
    let e = ephemeral.clone();
    Container {
        args: e.args,
        command: e.command,
        env: e.env,
        env_from: e.env_from,
        image: e.image,
        image_pull_policy: e.image_pull_policy,
        name: e.name,
        security_context: e.security_context,
        stdin: e.stdin,
        stdin_once: e.stdin_once,
        termination_message_path: e.termination_message_path,
        termination_message_policy: e.termination_message_policy,
        tty: e.tty,
        volume_devices: e.volume_devices,
        volume_mounts: e.volume_mounts,
        working_dir: e.working_dir,
        ..Container::default()
    }
}
