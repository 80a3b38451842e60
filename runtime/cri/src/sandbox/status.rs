//! Sandboxes as the CRI shows them.

use super::{Phase, Sandbox};
use crate::runtime::Runtime;
use orlop_proto::cri;
use std::collections::HashMap;
use std::sync::Arc;

impl Sandbox {
    fn state(&self) -> cri::PodSandboxState {
        match self.record().phase {
            Phase::Ready => cri::PodSandboxState::SandboxReady,
            Phase::Creating | Phase::NotReady => cri::PodSandboxState::SandboxNotready,
        }
    }

    pub(crate) fn to_cri(&self) -> cri::PodSandbox {
        let record = self.record();
        cri::PodSandbox {
            id: self.id.clone(),
            metadata: record.config().metadata.clone(),
            state: self.state() as i32,
            created_at: record.created_at,
            labels: record.config().labels.clone(),
            annotations: record.config().annotations.clone(),
            runtime_handler: record.runtime_handler.clone(),
        }
    }

    pub(crate) fn status(&self) -> cri::PodSandboxStatus {
        let record = self.record();
        let mut addresses = record.addresses.iter().map(ToString::to_string);
        let network = cri::PodSandboxNetworkStatus {
            ip: addresses.next().unwrap_or_default(),
            additional_ips: addresses.map(|ip| cri::PodIp { ip }).collect(),
        };
        cri::PodSandboxStatus {
            id: self.id.clone(),
            metadata: record.config().metadata.clone(),
            state: self.state() as i32,
            created_at: record.created_at,
            network: Some(network),
            linux: Some(cri::LinuxPodSandboxStatus {
                namespaces: Some(cri::Namespace { options: Some(record.namespaces()) }),
            }),
            labels: record.config().labels.clone(),
            annotations: record.config().annotations.clone(),
            runtime_handler: record.runtime_handler.clone(),
        }
    }

    fn info(&self) -> HashMap<String, String> {
        let record = self.record();
        let info = serde_json::json!({
            "pid": self.pause_pid(),
            "netns": self.netns(),
            "directory": self.dir.0,
            "cgroupParent": record.config().linux.as_ref().map(|l| &l.cgroup_parent),
            "addresses": record.addresses,
            "phase": record.phase,
        });
        HashMap::from([("info".to_owned(), info.to_string())])
    }

    fn matches(&self, filter: &cri::PodSandboxFilter) -> bool {
        self.id.starts_with(&filter.id)
            && filter.state.as_ref().is_none_or(|s| s.state == self.state() as i32)
            && has_labels(&self.record().config().labels, &filter.label_selector)
    }
}

/// Whether every wanted label is there with its value.
pub(crate) fn has_labels(labels: &HashMap<String, String>, wanted: &HashMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

impl Runtime {
    pub(crate) fn list_sandboxes(&self, filter: Option<cri::PodSandboxFilter>) -> Vec<cri::PodSandbox> {
        let filter = filter.unwrap_or_default();
        let sandboxes = self.store.sandboxes();
        sandboxes.iter().filter(|s| s.matches(&filter)).map(|s| s.to_cri()).collect()
    }

    pub(crate) fn sandbox_status(
        &self,
        sandbox: &Arc<Sandbox>,
        verbose: bool,
    ) -> cri::PodSandboxStatusResponse {
        cri::PodSandboxStatusResponse {
            status: Some(sandbox.status()),
            info: if verbose { sandbox.info() } else { HashMap::new() },
            containers_statuses: self.store.containers_of(&sandbox.id).iter().map(|c| c.status()).collect(),
            timestamp: crate::runtime::now(),
        }
    }
}
