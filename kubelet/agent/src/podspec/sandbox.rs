//! The sandbox: what all containers of a pod share.

use crate::podspec::dns::{self, DnsWarning};
use crate::podspec::error::SpecError;
use crate::podspec::facts::Facts;
use crate::podspec::{hosts, identity, labels, qos, resources, security, sysctls};
use k8s_openapi::api::core::v1::Pod;
use orlop_proto::cri::{LinuxPodSandboxConfig, PodSandboxConfig, PodSandboxMetadata, PortMapping, Protocol};
use std::io::ErrorKind;

/// A sandbox's configuration, and what the pod's owner should be told about it.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxSpec {
    pub config: PodSandboxConfig,
    pub warnings: Vec<DnsWarning>,
}

/// Like [`sandbox_spec`], for callers that send no events.
pub async fn sandbox_config(facts: &Facts, pod: &Pod, attempt: u32) -> Result<PodSandboxConfig, SpecError> {
    Ok(sandbox_spec(facts, pod, attempt).await?.config)
}

/// The configuration of a pod's sandbox. Makes the pod's log directory and reads the node's resolver configuration.
pub async fn sandbox_spec(facts: &Facts, pod: &Pod, attempt: u32) -> Result<SandboxSpec, SpecError> {
    let resolver = match &facts.resolv_conf {
        None => None,
        Some(path) => match tokio::fs::read_to_string(path).await {
            Ok(text) => Some(text),
            Err(error) if error.kind() == ErrorKind::NotFound => Some(String::new()),
            Err(error) => return Err(SpecError::file("read", path)(error)),
        },
    };
    let spec = plan(facts, pod, attempt, resolver.as_deref())?;
    let logs = &spec.config.log_directory;
    tokio::fs::create_dir_all(logs).await.map_err(SpecError::file("create log directory", logs))?;
    Ok(spec)
}

/// The configuration from arguments alone.
pub(super) fn plan(
    facts: &Facts,
    pod: &Pod,
    attempt: u32,
    resolver: Option<&str>,
) -> Result<SandboxSpec, SpecError> {
    let (dns, warnings) = dns::config(facts, pod, resolver)?;
    let context = identity::spec(pod).and_then(|spec| spec.security_context.as_ref());
    let sysctls = context.and_then(|context| context.sysctls.as_deref()).unwrap_or_default();
    let config = PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: identity::pod_name(pod).to_owned(),
            uid: identity::uid(pod).to_owned(),
            namespace: identity::namespace(pod).to_owned(),
            attempt,
        }),
        hostname: hosts::kernel_name(facts, pod)?,
        log_directory: facts
            .pod_logs_dir
            .join(identity::pod_log_dir_name(pod))
            .to_string_lossy()
            .into_owned(),
        dns_config: Some(dns),
        port_mappings: port_mappings(pod)?,
        labels: labels::sandbox_labels(pod),
        annotations: labels::sandbox_annotations(pod),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: qos::cgroup_parent(facts, pod),
            security_context: Some(security::sandbox(pod)?),
            sysctls: sysctls.iter().map(|s| (sysctls::normalized(&s.name), s.value.clone())).collect(),
            overhead: Some(resources::overhead(facts, pod)),
            resources: Some(resources::pod_resources(facts, pod)),
        }),
        windows: None,
    };
    Ok(SandboxSpec { config, warnings })
}

/// Ports of the host that lead into the pod. In the host's network they are the host's already.
fn port_mappings(pod: &Pod) -> Result<Vec<PortMapping>, SpecError> {
    if identity::host_network(pod) {
        return Ok(Vec::new());
    }
    let Some(spec) = identity::spec(pod) else { return Ok(Vec::new()) };
    let sidecars = spec.init_containers.iter().flatten().filter(|container| identity::is_sidecar(container));
    let ports = sidecars.chain(&spec.containers).flat_map(|container| container.ports.iter().flatten());
    ports
        .filter_map(|port| Some((port, port.host_port.filter(|number| *number > 0)?)))
        .map(|(port, host_port)| {
            let protocol = match port.protocol.as_deref().unwrap_or("TCP") {
                "TCP" => Protocol::Tcp,
                "UDP" => Protocol::Udp,
                "SCTP" => Protocol::Sctp,
                other => {
                    return Err(SpecError::UnknownValue { field: "port protocol", value: other.to_owned() });
                }
            };
            Ok(PortMapping {
                protocol: protocol.into(),
                container_port: port.container_port,
                host_port,
                host_ip: port.host_ip.clone().unwrap_or_default(),
            })
        })
        .collect()
}
