//! The pod's own: cgroup, directories, sandbox.

use super::{Executor, blocking};
use crate::pods::runtime_state::SandboxRecord;
use crate::pods::{cgroups, labels, logs};
use crate::podspec;
use k8s_openapi::api::core::v1::Pod;
use orlop_proto::cri;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

impl Executor {
    /// Makes the pod's cgroup and directories. Repeating it does no harm.
    pub(super) async fn prepare_host(&self, pod: &Arc<Pod>) -> Result<(), String> {
        let context = Arc::clone(&self.services.context);
        let pod = Arc::clone(pod);
        blocking(move || {
            let settings = &context.settings;
            cgroups::create(settings, &pod).map_err(|error| error.to_string())?;
            let (_, _, uid) = labels::identity(&pod);
            let directory = settings.root_dir.join("pods").join(uid);
            for part in ["volumes", "plugins", "containers"] {
                let path = directory.join(part);
                private_directory(&path)
                    .map_err(|error| format!("create directory {}: {error}", path.display()))?;
            }
            let path = logs::pod_directory(settings, &pod);
            logs::make_directory(&path)
                .map_err(|error| format!("create directory {}: {error}", path.display()))
        })
        .await
    }

    pub(super) async fn create_sandbox(&self, pod: &Arc<Pod>, attempt: u32) -> Result<SandboxRecord, String> {
        let plan = self.services.parts.sandbox_config(pod, attempt).await.map_err(|error| error.message)?;
        let config = self.complete_sandbox(plan.config, pod, attempt);
        let runtime = &self.services.runtime;
        let id =
            runtime.run_sandbox(config, plan.runtime_handler).await.map_err(|error| error.to_string())?;
        runtime.sandbox(&id).await.map_err(|error| error.to_string())
    }

    /// Writes into a sandbox's configuration what we need to find it again.
    pub(super) fn complete_sandbox(
        &self,
        mut config: cri::PodSandboxConfig,
        pod: &Pod,
        attempt: u32,
    ) -> cri::PodSandboxConfig {
        let settings = &self.services.context.settings;
        let (name, namespace, uid) = labels::identity(pod);
        config.metadata = Some(cri::PodSandboxMetadata {
            name: name.to_owned(),
            uid: uid.to_owned(),
            namespace: namespace.to_owned(),
            attempt,
        });
        config.labels.extend(labels::pod_labels(pod));
        config.log_directory = logs::pod_directory(settings, pod).to_string_lossy().into_owned();
        let linux = config.linux.get_or_insert_default();
        if linux.cgroup_parent.is_empty() {
            linux.cgroup_parent = cgroups::pod_path(settings, podspec::qos(pod), uid);
        }
        config
    }
}

fn private_directory(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o750).create(path)
}
