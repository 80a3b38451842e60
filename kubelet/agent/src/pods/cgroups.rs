//! The cgroups of pods: `<root>/kubepods[/burstable|/besteffort]/pod<uid>`, with the limits of the pod as a whole.
//!
//! Plain files below a mounted cgroup v2 tree. The plan (which file gets which value) is computed first and is tested
//! without a kernel. Where a controller is missing, the plan's limits for it are refused or left out, as configured.

use super::machine::is_sidecar;
use crate::context::{MissingControllers, Settings};
use crate::podspec::qos::{self, Qos};
use crate::podspec::quantity::Amount;
use k8s_openapi::api::core::v1::{Pod, ResourceRequirements};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("create cgroup {path}: {cause}")]
    Create { path: PathBuf, cause: io::Error },
    #[error("write {value:?} to {path}: {cause}")]
    Write { path: PathBuf, value: String, cause: io::Error },
    #[error("remove cgroup {path}: {cause}")]
    Remove { path: PathBuf, cause: io::Error },
    #[error(
        "cgroup controllers {missing} are not available below {path}: enable them for the kubelet's cgroup, \
         or set ORLOP_MISSING_CONTROLLERS=warn to run pods without these limits"
    )]
    Missing { missing: String, path: PathBuf },
}

const NEEDED: [&str; 3] = ["cpu", "memory", "pids"];

/// Where a pod's cgroup lies, relative to the mount of the tree: what the runtime is given as the sandbox's parent.
#[must_use]
pub fn pod_path(settings: &Settings, qos: Qos, uid: &str) -> String {
    let root = settings.cgroup_root.trim_end_matches('/');
    let class = match qos {
        _ if !settings.cgroups_per_qos => return root.to_owned(),
        Qos::Guaranteed => "",
        Qos::Burstable => "/burstable",
        Qos::BestEffort => "/besteffort",
    };
    format!("{root}/kubepods{class}/pod{uid}")
}

/// The files of a pod's cgroup and what is to be written to them.
#[must_use]
pub fn plan(settings: &Settings, pod: &Pod) -> BTreeMap<&'static str, String> {
    let needs = Needs::of(pod);
    let class = qos::qos(pod);
    let mut files = BTreeMap::new();
    let shares = if class == Qos::BestEffort { 2 } else { shares(needs.cpu_request) };
    files.insert("cpu.weight", weight(shares).to_string());
    if let Some(limit) = needs.cpu_limit.filter(|_| settings.cpu_cfs_quota) {
        let period = i128::try_from(settings.cpu_cfs_quota_period.as_micros()).unwrap_or(100_000);
        let quota = (i128::from(limit.milli()) * period / 1000).max(1000);
        files.insert("cpu.max", format!("{quota} {period}"));
    }
    if let Some(limit) = needs.memory_limit {
        files.insert("memory.max", limit.value().to_string());
    }
    if let Some(pids) = settings.pod_pids_limit {
        files.insert("pids.max", pids.to_string());
    }
    files
}

/// A pod's resources as a whole. A limit stands only when every container has one.
struct Needs {
    cpu_request: Amount,
    cpu_limit: Option<Amount>,
    memory_limit: Option<Amount>,
}

impl Needs {
    fn of(pod: &Pod) -> Self {
        let Some(spec) = pod.spec.as_ref() else {
            return Self { cpu_request: Amount::ZERO, cpu_limit: None, memory_limit: None };
        };
        let (sidecars, inits): (Vec<_>, Vec<_>) =
            spec.init_containers.iter().flatten().partition(|container| is_sidecar(container));
        let mains: Vec<Option<&ResourceRequirements>> =
            sidecars.into_iter().chain(&spec.containers).map(|c| c.resources.as_ref()).collect();
        let inits: Vec<_> = inits.into_iter().map(|c| c.resources.as_ref()).collect();
        let pod_level = spec.resources.as_ref();
        let sum_limit = |name: &str| {
            if let Some(own) = limit(pod_level, name) {
                return Some(own);
            }
            let all = mains.iter().map(|r| limit(*r, name));
            let sum = all.reduce(|sum, one| Some(sum? + one?)).flatten()?;
            let largest =
                inits.iter().map(|r| limit(*r, name)).collect::<Option<Vec<_>>>()?.into_iter().max();
            Some(sum.max(largest.unwrap_or_default()))
        };
        let wanted = |resources| qos::request(resources, "cpu");
        let sum = mains.iter().map(|r| wanted(*r)).fold(Amount::ZERO, |sum, one| sum + one);
        let largest = inits.iter().map(|r| wanted(*r)).max().unwrap_or_default();
        let own_request = Some(wanted(pod_level)).filter(|own| own.is_positive());
        Self {
            cpu_request: own_request.unwrap_or_else(|| sum.max(largest)),
            cpu_limit: sum_limit("cpu"),
            memory_limit: sum_limit("memory"),
        }
    }
}

/// Zero counts as no limit.
fn limit(resources: Option<&ResourceRequirements>, name: &str) -> Option<Amount> {
    Some(qos::limit(resources, name)).filter(|limit| limit.is_positive())
}

fn shares(cpu: Amount) -> i128 {
    (i128::from(cpu.milli()) * 1024 / 1000).clamp(2, 262_144)
}

/// cgroup v1 shares on the scale of v2, as kubelets have always converted them.
fn weight(shares: i128) -> i128 {
    1 + (shares - 2) * 9999 / 262_142
}

/// Makes a pod's cgroup and everything above it, and writes its limits. Repeating it does no harm.
pub fn create(settings: &Settings, pod: &Pod) -> Result<(), CgroupError> {
    if !settings.cgroups_per_qos {
        return Ok(());
    }
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let relative = pod_path(settings, qos::qos(pod), uid);
    let mut path = settings.cgroup_mount.clone();
    let mut parts: Vec<&str> = relative.split('/').filter(|part| !part.is_empty()).collect();
    let leaf = parts.pop().unwrap_or_default();
    delegate(&path);
    for part in parts {
        path.push(part);
        make(&path)?;
        delegate(&path);
    }
    let available = read(&path.join("cgroup.subtree_control"));
    let missing: Vec<&str> =
        NEEDED.into_iter().filter(|name| !available.split_whitespace().any(|a| a == *name)).collect();
    if !missing.is_empty() && settings.missing_controllers == MissingControllers::Refuse {
        return Err(CgroupError::Missing { missing: missing.join(", "), path });
    }
    path.push(leaf);
    make(&path)?;
    for (file, value) in plan(settings, pod) {
        if missing.iter().any(|controller| file.starts_with(controller)) {
            continue;
        }
        let path = path.join(file);
        std::fs::write(&path, &value).map_err(|cause| CgroupError::Write { path, value, cause })?;
    }
    // The runtime makes the containers' cgroups inside and needs their controllers.
    delegate(&path);
    Ok(())
}

/// Removes a pod's cgroup in whichever class it is, with the empty ones inside it.
pub fn remove(settings: &Settings, uid: &str) -> Result<(), CgroupError> {
    if !settings.cgroups_per_qos || uid.is_empty() {
        return Ok(());
    }
    for qos in [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort] {
        let relative = pod_path(settings, qos, uid);
        let path = settings.cgroup_mount.join(relative.trim_start_matches('/'));
        remove_tree(&path)?;
    }
    Ok(())
}

/// UIDs of all pods that have a cgroup.
#[must_use]
pub fn existing(settings: &Settings) -> Vec<String> {
    let above = |qos| {
        let path = pod_path(settings, qos, "");
        let path = settings.cgroup_mount.join(path.trim_start_matches('/'));
        path.parent().map(Path::to_path_buf).unwrap_or(path)
    };
    if !settings.cgroups_per_qos {
        return Vec::new();
    }
    let classes = [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort];
    let entries =
        classes.into_iter().filter_map(|qos| std::fs::read_dir(above(qos)).ok()).flatten().flatten();
    entries
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_prefix("pod")?.to_owned()))
        .filter(|uid| !uid.is_empty())
        .collect()
}

fn make(path: &Path) -> Result<(), CgroupError> {
    match std::fs::create_dir(path) {
        Ok(()) => Ok(()),
        Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(cause) => Err(CgroupError::Create { path: path.to_owned(), cause }),
    }
}

/// Hands down every controller that can be handed down. One at a time: one that cannot does not spoil the others.
fn delegate(path: &Path) {
    let available = read(&path.join("cgroup.controllers"));
    for controller in available.split_whitespace() {
        let enabled = std::fs::write(path.join("cgroup.subtree_control"), format!("+{controller}"));
        if let Err(error) = enabled {
            tracing::debug!(path = %path.display(), controller, %error, "controller not handed down");
        }
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn remove_tree(path: &Path) -> Result<(), CgroupError> {
    let Ok(entries) = std::fs::read_dir(path) else { return Ok(()) };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    match std::fs::remove_dir(path) {
        Ok(()) => Ok(()),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(cause) => Err(CgroupError::Remove { path: path.to_owned(), cause }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(containers: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"uid": "u"}, "spec": {"containers": containers}})).unwrap()
    }

    #[test]
    fn each_class_has_its_place() {
        let settings = Settings::default();
        assert_eq!(pod_path(&settings, Qos::Guaranteed, "u"), "/kubepods/podu");
        assert_eq!(pod_path(&settings, Qos::Burstable, "u"), "/kubepods/burstable/podu");
        let below = Settings { cgroup_root: "/a/b/".into(), ..settings };
        assert_eq!(pod_path(&below, Qos::BestEffort, "u"), "/a/b/kubepods/besteffort/podu");
    }

    #[test]
    fn limits_of_all_containers_add_up_to_the_pods() {
        let resources = json!({"limits": {"cpu": "500m", "memory": "64Mi"}});
        let plan = plan(
            &Settings { pod_pids_limit: Some(100), ..Settings::default() },
            &pod(json!([{"name": "a", "resources": resources}, {"name": "b", "resources": resources}])),
        );
        assert_eq!(plan["cpu.max"], "100000 100000");
        assert_eq!(plan["memory.max"], (128 << 20).to_string());
        assert_eq!(plan["cpu.weight"], "39");
        assert_eq!(plan["pids.max"], "100");
    }

    #[test]
    fn one_container_without_a_limit_leaves_the_pod_unlimited() {
        let resources = json!({"limits": {"cpu": "500m", "memory": "64Mi"}});
        let plan =
            plan(&Settings::default(), &pod(json!([{"name": "a", "resources": resources}, {"name": "b"}])));
        assert!(!plan.contains_key("cpu.max") && !plan.contains_key("memory.max"));
    }

    #[test]
    fn a_best_effort_pod_has_the_smallest_weight() {
        assert_eq!(plan(&Settings::default(), &pod(json!([{"name": "a"}])))["cpu.weight"], "1");
    }

    #[test]
    fn a_tree_without_controllers_is_refused_by_name_or_used_without_limits() {
        let mount = tempfile::tempdir().unwrap();
        let settings = Settings { cgroup_mount: mount.path().into(), ..Settings::default() };
        let pod = pod(json!([{"name": "a"}]));
        let error = create(&settings, &pod).unwrap_err().to_string();
        assert!(
            error.contains("cpu, memory, pids") && error.contains("ORLOP_MISSING_CONTROLLERS"),
            "{error}"
        );
        let lenient = Settings { missing_controllers: MissingControllers::Warn, ..settings };
        create(&lenient, &pod).unwrap();
        assert_eq!(existing(&lenient), ["u"]);
        std::fs::remove_file(mount.path().join("kubepods/besteffort/podu/cgroup.subtree_control")).ok();
        remove(&lenient, "u").unwrap();
        assert!(existing(&lenient).is_empty());
    }
}
