//! Containers as the CRI shows them.

use super::{Container, Phase, Record, signal};
use crate::runtime::Runtime;
use crate::sandbox::status::has_labels;
use crate::spec;
use orlop_proto::cri;
use std::collections::HashMap;

fn state(record: &Record) -> cri::ContainerState {
    match record.phase {
        Phase::Created => cri::ContainerState::ContainerCreated,
        Phase::Running { .. } => cri::ContainerState::ContainerRunning,
        Phase::Exited(_) => cri::ContainerState::ContainerExited,
    }
}

/// The image under the name the user gave it.
fn image_spec(record: &Record) -> Option<cri::ImageSpec> {
    record.config().image.clone().map(|mut image| {
        if !image.user_specified_image.is_empty() {
            image.image.clone_from(&image.user_specified_image);
        }
        image
    })
}

impl Container {
    pub(crate) fn to_cri(&self) -> cri::Container {
        let record = self.record();
        cri::Container {
            id: self.id.clone(),
            pod_sandbox_id: self.sandbox_id.clone(),
            metadata: record.config().metadata.clone(),
            image: image_spec(&record),
            image_ref: record.image_ref.clone(),
            state: state(&record) as i32,
            created_at: record.created_at,
            labels: record.config().labels.clone(),
            annotations: record.config().annotations.clone(),
            image_id: record.image_id.clone(),
        }
    }

    pub(crate) fn status(&self) -> cri::ContainerStatus {
        let record = self.record();
        let config = record.config();
        let user = cri::LinuxContainerUser {
            uid: i64::from(record.user.uid),
            gid: i64::from(record.user.gid),
            supplemental_groups: record.user.groups.iter().copied().map(i64::from).collect(),
        };
        let mut status = cri::ContainerStatus {
            id: self.id.clone(),
            metadata: config.metadata.clone(),
            state: state(&record) as i32,
            created_at: record.created_at,
            image: image_spec(&record),
            image_ref: record.image_ref.clone(),
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
            mounts: config.mounts.clone(),
            log_path: record.log_path.to_string_lossy().into_owned(),
            resources: Some(cri::ContainerResources {
                linux: Some(spec::requested_resources(config)),
                windows: None,
            }),
            image_id: record.image_id.clone(),
            user: Some(cri::ContainerUser { linux: Some(user) }),
            stop_signal: signal::to_cri(record.stop_signal) as i32,
            ..Default::default()
        };
        match &record.phase {
            Phase::Created => {}
            Phase::Running { started_at } => status.started_at = *started_at,
            Phase::Exited(ended) => {
                status.started_at = ended.started_at;
                status.finished_at = ended.finished_at;
                status.exit_code = ended.exit_code;
                ended.reason.as_str().clone_into(&mut status.reason);
                status.message.clone_from(&ended.message);
            }
        }
        status
    }

    fn matches(&self, filter: &cri::ContainerFilter) -> bool {
        let record = self.record();
        self.id.starts_with(&filter.id)
            && self.sandbox_id.starts_with(&filter.pod_sandbox_id)
            && filter.state.as_ref().is_none_or(|s| s.state == state(&record) as i32)
            && has_labels(&record.config().labels, &filter.label_selector)
    }
}

impl Runtime {
    pub(crate) fn list_containers(&self, filter: Option<cri::ContainerFilter>) -> Vec<cri::Container> {
        let filter = filter.unwrap_or_default();
        let containers = self.store.containers();
        containers.iter().filter(|c| c.matches(&filter)).map(|c| c.to_cri()).collect()
    }

    pub(crate) fn container_info(&self, container: &Container) -> HashMap<String, String> {
        let record = container.record();
        let config = std::fs::read(self.bundle(&container.id).join("config.json")).ok();
        let oci: Option<serde_json::Value> = config.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let info = serde_json::json!({
            "sandboxID": container.sandbox_id,
            "pid": container.pid(),
            "cgroup": record.cgroup,
            "bundle": self.bundle(&container.id),
            "imageID": record.image_id,
            "runtimeSpec": oci,
        });
        HashMap::from([("info".to_owned(), info.to_string())])
    }
}
