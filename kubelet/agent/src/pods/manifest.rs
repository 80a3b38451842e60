//! A static pod's manifest: parsed, defaulted, checked, and given its identity.
//!
//! The UID is a hash of what the file says, where it lies and on which node: the same after a restart, another one after a
//! change. A pod that refers to objects of the API server is refused, since it must also run without one.

use super::labels;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, Probe, Toleration};
use serde_json::Value;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Why a manifest is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    #[error("static pod manifest {file} cannot be read: {cause}")]
    Unreadable { file: PathBuf, cause: String },
    #[error("static pod manifest {file} is neither YAML nor JSON: {cause}; correct the file")]
    Syntax { file: PathBuf, cause: String },
    #[error(
        "static pod manifest {file} holds {found}, not a v1 Pod; move it out of the static pod directory"
    )]
    NotAPod { file: PathBuf, found: String },
    #[error("static pod manifest {file} is not a valid Pod: {cause}; correct the file")]
    Shape { file: PathBuf, cause: String },
    #[error("static pod manifest {file}: {problem}; correct the file")]
    Invalid { file: PathBuf, problem: String },
    #[error(
        "static pod manifest {file} refers to {object}, an object of the API server, which static pods cannot use; \
         use hostPath or write the value into the manifest"
    )]
    Reference { file: PathBuf, object: String },
}

/// A manifest larger than this is not one.
pub const LARGEST: u64 = 10 << 20;

/// Makes a static pod of a file's bytes.
pub fn parse(file: &Path, bytes: &[u8], node_name: &str) -> Result<Pod, ManifestError> {
    let syntax = |cause: String| ManifestError::Syntax { file: file.to_owned(), cause };
    let text = std::str::from_utf8(bytes).map_err(|error| syntax(error.to_string()))?;
    let value = parse_value(text).map_err(syntax)?;
    let word = |field: &str| value.get(field).and_then(Value::as_str).unwrap_or("nothing").to_owned();
    if word("kind") != "Pod" || word("apiVersion") != "v1" {
        let found = format!("apiVersion {}, kind {}", word("apiVersion"), word("kind"));
        return Err(ManifestError::NotAPod { file: file.to_owned(), found });
    }
    let hash =
        fnv128a(&[value.to_string().as_bytes(), b"host:", node_name.as_bytes(), b"file:", bytes_of(file)]);
    let mut pod: Pod = serde_json::from_value(value)
        .map_err(|error| ManifestError::Shape { file: file.to_owned(), cause: error.to_string() })?;
    let problem = |problem: String| ManifestError::Invalid { file: file.to_owned(), problem };
    check(&pod).map_err(problem)?;
    if let Some(object) = pod.spec.as_ref().and_then(api_reference) {
        return Err(ManifestError::Reference { file: file.to_owned(), object });
    }
    identify(&mut pod, hash, node_name);
    if let Some(spec) = pod.spec.as_mut() {
        default_spec(spec, node_name);
    }
    Ok(pod)
}

fn parse_value(text: &str) -> Result<Value, String> {
    if text.trim_start().starts_with('{') {
        return serde_json::from_str(text).map_err(|error| error.to_string());
    }
    let mut options = serde_saphyr::Options::default();
    // `defaultMode: 0644` is octal in every manifest ever written.
    options.legacy_octal_numbers = true;
    serde_saphyr::from_str_with_options(text, options).map_err(|error| error.to_string())
}

fn bytes_of(path: &Path) -> &[u8] {
    use std::os::unix::ffi::OsStrExt;
    path.as_os_str().as_bytes()
}

fn fnv128a(parts: &[&[u8]]) -> u128 {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    parts
        .iter()
        .flat_map(|part| part.iter())
        .fold(OFFSET, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(PRIME))
}

fn identify(pod: &mut Pod, hash: u128, node_name: &str) {
    let metadata = &mut pod.metadata;
    let uid = metadata.uid.get_or_insert_with(|| format!("{hash:032x}")).clone();
    let name = metadata.name.clone().unwrap_or_default();
    metadata.name = Some(format!("{name}-{}", node_name.to_lowercase()));
    metadata.namespace.get_or_insert_with(|| "default".to_owned());
    let notes = metadata.annotations.get_or_insert_default();
    // A UID that the file itself gives does not change with the file.
    notes.insert(labels::CONFIG_HASH.to_owned(), format!("{hash:032x}"));
    notes.insert(labels::CONFIG_SOURCE.to_owned(), "file".to_owned());
    if uid.is_empty() {
        metadata.uid = Some(format!("{hash:032x}"));
    }
    pod.status = None;
}

fn default_spec(spec: &mut PodSpec, node_name: &str) {
    spec.node_name = Some(node_name.to_owned());
    spec.restart_policy.get_or_insert_with(|| "Always".to_owned());
    spec.dns_policy.get_or_insert_with(|| "ClusterFirst".to_owned());
    spec.scheduler_name.get_or_insert_with(|| "default-scheduler".to_owned());
    spec.termination_grace_period_seconds.get_or_insert(30);
    spec.enable_service_links.get_or_insert(true);
    spec.security_context.get_or_insert_default();
    spec.tolerations.get_or_insert_default().push(Toleration {
        operator: Some("Exists".to_owned()),
        effect: Some("NoExecute".to_owned()),
        ..Toleration::default()
    });
    let host_network = spec.host_network == Some(true);
    for container in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
        default_container(container, host_network);
    }
}

fn default_container(container: &mut Container, host_network: bool) {
    let image = container.image.clone().unwrap_or_default();
    let last = image.rsplit('/').next().unwrap_or_default();
    let is_latest = last.ends_with(":latest") || !last.contains([':', '@']);
    container
        .image_pull_policy
        .get_or_insert_with(|| if is_latest { "Always" } else { "IfNotPresent" }.to_owned());
    container.termination_message_path.get_or_insert_with(|| "/dev/termination-log".to_owned());
    container.termination_message_policy.get_or_insert_with(|| "File".to_owned());
    for port in container.ports.iter_mut().flatten() {
        port.protocol.get_or_insert_with(|| "TCP".to_owned());
        if host_network {
            port.host_port.get_or_insert(port.container_port);
        }
    }
    if let Some(resources) = container.resources.as_mut() {
        // What is limited and not requested is requested up to its limit.
        for (name, limit) in resources.limits.clone().unwrap_or_default() {
            resources.requests.get_or_insert_default().entry(name).or_insert(limit);
        }
    }
    let probes =
        [&mut container.liveness_probe, &mut container.readiness_probe, &mut container.startup_probe];
    for probe in probes.into_iter().flatten() {
        default_probe(probe);
    }
}

fn default_probe(probe: &mut Probe) {
    for (field, value) in [
        (&mut probe.timeout_seconds, 1),
        (&mut probe.period_seconds, 10),
        (&mut probe.success_threshold, 1),
        (&mut probe.failure_threshold, 3),
    ] {
        if field.unwrap_or(0) == 0 {
            *field = Some(value);
        }
    }
    if let Some(http) = probe.http_get.as_mut() {
        http.path.get_or_insert_with(|| "/".to_owned());
        http.scheme.get_or_insert_with(|| "HTTP".to_owned());
    }
}

/// What would make the pod impossible to run or to show.
fn check(pod: &Pod) -> Result<(), String> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let is_name = |text: &str| !text.is_empty() && text.len() <= 253 && text.split('.').all(is_label);
    if !is_name(name) {
        return Err(format!(
            "metadata.name {name:?} is not a valid name (lower-case letters, digits, '-' and '.')"
        ));
    }
    if let Some(namespace) = pod.metadata.namespace.as_deref().filter(|namespace| !is_label(namespace)) {
        return Err(format!("metadata.namespace {namespace:?} is not a valid name"));
    }
    let Some(spec) = pod.spec.as_ref() else { return Err("spec is missing".to_owned()) };
    if spec.containers.is_empty() {
        return Err("spec.containers is empty: a pod needs at least one container".to_owned());
    }
    if !matches!(spec.restart_policy.as_deref(), None | Some("Always" | "OnFailure" | "Never")) {
        return Err("spec.restartPolicy must be Always, OnFailure or Never".to_owned());
    }
    let volumes: HashSet<&str> = spec.volumes.iter().flatten().map(|volume| volume.name.as_str()).collect();
    let mut names = HashSet::new();
    for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
        let name = container.name.as_str();
        if !is_label(name) {
            return Err(format!("container name {name:?} is not valid (lower-case letters, digits and '-')"));
        }
        if !names.insert(name) {
            return Err(format!("container name {name:?} is used twice"));
        }
        if container.image.as_deref().unwrap_or_default().trim().is_empty() {
            return Err(format!("container {name:?} has no image"));
        }
        for mount in container.volume_mounts.iter().flatten() {
            if !volumes.contains(mount.name.as_str()) {
                return Err(format!(
                    "container {name:?} mounts volume {:?}, which spec.volumes does not have",
                    mount.name
                ));
            }
        }
    }
    Ok(())
}

fn is_label(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    text.len() <= 63
        && bytes.first().is_some_and(|byte| plain(*byte))
        && bytes.last().is_some_and(|byte| plain(*byte))
        && bytes.iter().all(|byte| plain(*byte) || *byte == b'-')
}

/// The first object of the API server that a pod refers to.
fn api_reference(spec: &PodSpec) -> Option<String> {
    if let Some(account) = spec.service_account_name.as_ref().filter(|name| !name.is_empty()) {
        return Some(format!("service account {account:?}"));
    }
    if let Some(claim) = spec.resource_claims.iter().flatten().next() {
        return Some(format!("resource claim {:?}", claim.name));
    }
    for volume in spec.volumes.iter().flatten() {
        let name = &volume.name;
        let projected = volume.projected.as_ref().and_then(|projected| projected.sources.as_ref());
        let projects_objects = projected.into_iter().flatten().any(|source| source.downward_api.is_none());
        let kind = if volume.secret.is_some() {
            "a secret"
        } else if volume.config_map.is_some() {
            "a config map"
        } else if volume.persistent_volume_claim.is_some() || volume.ephemeral.is_some() {
            "a persistent volume claim"
        } else if projects_objects {
            "projected objects"
        } else {
            continue;
        };
        return Some(format!("{kind} (volume {name:?})"));
    }
    for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
        let from_key = container
            .env
            .iter()
            .flatten()
            .filter_map(|env| env.value_from.as_ref())
            .any(|source| source.config_map_key_ref.is_some() || source.secret_key_ref.is_some());
        if from_key || container.env_from.as_ref().is_some_and(|all| !all.is_empty()) {
            return Some(format!("a config map or secret (environment of container {:?})", container.name));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: web\nspec:\n  containers:\n  - name: c\n    image: nginx\n    livenessProbe:\n      httpGet: {port: 80}\n";

    fn parse_text(text: &str) -> Result<Pod, ManifestError> {
        parse(Path::new("/etc/manifests/web.yaml"), text.as_bytes(), "Node-A")
    }

    #[test]
    fn a_manifest_becomes_a_pod_of_this_node_with_all_defaults() {
        let pod = parse_text(GOOD).unwrap();
        assert_eq!(pod.metadata.name.as_deref(), Some("web-node-a"));
        assert_eq!(pod.metadata.namespace.as_deref(), Some("default"));
        let notes = pod.metadata.annotations.as_ref().unwrap();
        assert_eq!(notes[labels::CONFIG_SOURCE], "file");
        assert_eq!(Some(&notes[labels::CONFIG_HASH]), pod.metadata.uid.as_ref());
        let spec = pod.spec.unwrap();
        assert_eq!(spec.node_name.as_deref(), Some("Node-A"));
        assert_eq!(spec.containers[0].image_pull_policy.as_deref(), Some("Always"));
        assert_eq!(spec.containers[0].liveness_probe.as_ref().unwrap().period_seconds, Some(10));
        assert_eq!(spec.tolerations.unwrap()[0].effect.as_deref(), Some("NoExecute"));
    }

    #[test]
    fn the_uid_stays_with_the_file_and_changes_with_its_text_its_place_and_the_node() {
        let uid = |file: &str, text: &str, node: &str| {
            parse(Path::new(file), text.as_bytes(), node).unwrap().metadata.uid.unwrap()
        };
        let one = uid("/a", GOOD, "n");
        assert_eq!(one, uid("/a", GOOD, "n"));
        assert_ne!(one, uid("/b", GOOD, "n"));
        assert_ne!(one, uid("/a", GOOD, "m"));
        assert_ne!(one, uid("/a", &GOOD.replace("nginx", "nginx:2"), "n"));
    }

    #[test]
    fn yaml_octal_modes_are_octal() {
        let text =
            format!("{GOOD}  volumes:\n  - name: v\n    downwardAPI: {{defaultMode: 0644, items: []}}\n");
        let pod = parse_text(&text).unwrap();
        assert_eq!(
            pod.spec.unwrap().volumes.unwrap()[0].downward_api.as_ref().unwrap().default_mode,
            Some(0o644)
        );
    }

    #[test]
    fn every_refusal_names_the_file_the_cause_and_what_to_do() {
        for (text, cause) in [
            ("a: [", "neither YAML nor JSON"),
            ("kind: Service\napiVersion: v1\n", "apiVersion v1, kind Service"),
            ("apiVersion: v1\nkind: Pod\nspec: 3\n", "not a valid Pod"),
            (
                "apiVersion: v1\nkind: Pod\nmetadata: {name: Web}\nspec: {containers: []}\n",
                "metadata.name \"Web\"",
            ),
            (
                "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: []}\n",
                "at least one container",
            ),
            (
                "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: c}]}\n",
                "has no image",
            ),
            (
                "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: c, image: a, volumeMounts: [{name: v, mountPath: /v}]}]}\n",
                "mounts volume \"v\"",
            ),
            (
                "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec: {containers: [{name: c, image: a, envFrom: [{secretRef: {name: s}}]}]}\n",
                "config map or secret",
            ),
        ] {
            let message = parse_text(text).unwrap_err().to_string();
            assert!(message.contains("/etc/manifests/web.yaml") && message.contains(cause), "{message}");
            let remedy = ["correct the file", "move it out", "use hostPath"];
            assert!(remedy.iter().any(|remedy| message.contains(remedy)), "{message}");
        }
    }
}
