//! What the CRI says about the runtime itself.

use super::CriService;
use orlop_proto::cri;
use std::collections::HashMap;

const API_VERSION: &str = "v1";

impl CriService {
    pub(super) fn version_response(&self) -> cri::VersionResponse {
        cri::VersionResponse {
            version: "0.1.0".to_owned(),
            runtime_name: self.runtime.config.runtime_name.clone(),
            runtime_version: self.runtime.config.runtime_version.clone(),
            runtime_api_version: API_VERSION.to_owned(),
        }
    }

    pub(super) async fn status_response(&self, verbose: bool) -> cri::StatusResponse {
        let keeper = self.runtime.keeper.list().await;
        let network = self.runtime.network.status().await;
        let features = cri::RuntimeHandlerFeatures {
            // mount_setattr with AT_RECURSIVE is older than the oldest kernel we run on.
            recursive_read_only_mounts: true,
            user_namespaces: false,
        };
        let handler = |name: &str| cri::RuntimeHandler { name: name.to_owned(), features: Some(features) };
        cri::StatusResponse {
            status: Some(cri::RuntimeStatus {
                conditions: vec![
                    condition("RuntimeReady", "KeeperUnreachable", keeper.err().map(|e| e.to_string())),
                    condition("NetworkReady", "NetworkPluginNotReady", network.err().map(|e| e.to_string())),
                ],
            }),
            info: if verbose { self.info() } else { HashMap::new() },
            runtime_handlers: vec![handler(""), handler(&self.runtime.config.runtime_name)],
            features: Some(cri::RuntimeFeatures {
                supplemental_groups_policy: true,
                user_namespaces_host_network: false,
            }),
        }
    }

    fn info(&self) -> HashMap<String, String> {
        let config = &self.runtime.config;
        let info = serde_json::json!({
            "sandboxImage": config.sandbox_image,
            "root": config.root,
            "state": config.state,
            "cgroupRoot": config.cgroup_root,
            "cgroupDriver": "cgroupfs",
            "controllers": self.runtime.host.controllers.0,
            "logMaxBytes": config.log_max_bytes,
        });
        HashMap::from([("config".to_owned(), info.to_string())])
    }
}

fn condition(kind: &str, reason: &str, problem: Option<String>) -> cri::RuntimeCondition {
    cri::RuntimeCondition {
        r#type: kind.to_owned(),
        status: problem.is_none(),
        reason: if problem.is_some() { reason.to_owned() } else { String::new() },
        message: problem.unwrap_or_default(),
    }
}
