//! Gathers the facts: the host from its files, the runtime from its own words.

use super::facts::{Facts, Health, ImageFacts, Pressure, RuntimeFacts};
use super::machine::{Machine, MachineError, default_address};
use crate::config::Config;
use crate::cri::Cri;
use k8s_openapi::api::core::v1::{NodeAddress, NodeFeatures, NodeRuntimeHandler, NodeRuntimeHandlerFeatures};
use orlop_proto::cri;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;
use tokio::time::Instant;

/// A runtime that says nothing for this long is down.
const RUNTIME_SILENCE: Duration = Duration::from_secs(30);
/// How long a runtime may take for an answer.
const ANSWER: Duration = Duration::from_secs(10);
/// The list of images is not asked for more often than this.
const IMAGES_AGE: Duration = Duration::from_secs(8);
/// After the start of the agent the network and the runtime need a moment; a node that was ready stays so meanwhile.
const SETTLING: Duration = Duration::from_secs(10);

/// What is remembered between two looks at the runtime.
#[derive(Debug)]
pub(super) struct Collector {
    cri: Cri,
    started: Instant,
    last_answer: Option<Instant>,
    runtime: RuntimeFacts,
    images: Vec<ImageFacts>,
    images_at: Option<Instant>,
}

impl Collector {
    pub(super) fn new(cri: Cri) -> Self {
        Self {
            cri,
            started: Instant::now(),
            last_answer: None,
            runtime: RuntimeFacts::default(),
            images: Vec::new(),
            images_at: None,
        }
    }

    /// Looks at everything. `was_ready` is what the API server holds about us; `errors` are problems of our own parts.
    pub(super) async fn collect(
        &mut self,
        config: &Config,
        was_ready: bool,
        errors: &[String],
    ) -> Result<Facts, MachineError> {
        let answer = self.runtime_status().await;
        if self.runtime.version.is_empty() {
            self.ask_version().await;
        }
        if self.images_at.is_none_or(|at| at.elapsed() >= IMAGES_AGE) {
            self.images_at = Some(Instant::now());
            self.ask_images().await;
        }
        let mut problems = match answer {
            Ok(problems) => {
                self.last_answer = Some(Instant::now());
                Ok(problems)
            }
            Err(error) => {
                let heard = self.last_answer.unwrap_or(self.started);
                if heard.elapsed() < RUNTIME_SILENCE { Err(()) } else { Ok(vec![error]) }
            }
        };
        if let Ok(problems) = &mut problems {
            problems.extend(errors.iter().cloned());
        }
        let machine = Machine::read(Path::new("/"), &config.settings.root_dir)?;
        Ok(Facts {
            addresses: addresses(config),
            machine,
            runtime: self.runtime.clone(),
            images: self.images.clone(),
            max_images: config.max_images,
            max_pods: config.settings.max_pods,
            pods_per_core: config.pods_per_core,
            reserved: config.reserved.clone(),
            port: if config.raw.enable_server { config.port } else { 0 },
            pressure: Pressure::default(),
            health: health(problems, was_ready, self.started.elapsed()),
            declared_features: Vec::new(),
        })
    }

    /// The runtime's complaints, or why it could not be asked.
    async fn runtime_status(&mut self) -> Result<Vec<String>, String> {
        let mut client = self.cri.runtime();
        let request = client.status(cri::StatusRequest { verbose: false });
        let answer = match tokio::time::timeout(ANSWER, request).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => return Err(format!("container runtime is down: {}", status.message())),
            Err(_) => return Err(format!("container runtime is down: no answer within {ANSWER:?}")),
        };
        self.runtime.handlers = answer.runtime_handlers.iter().map(handler).collect();
        self.runtime.features = answer.features.map(|features| NodeFeatures {
            supplemental_groups_policy: Some(features.supplemental_groups_policy),
        });
        Ok(complaints(&answer.status.unwrap_or_default()))
    }

    async fn ask_version(&mut self) {
        let mut client = self.cri.runtime();
        let request = client.version(cri::VersionRequest { version: "v1".to_owned() });
        if let Ok(Ok(answer)) = tokio::time::timeout(ANSWER, request).await {
            let answer = answer.into_inner();
            self.runtime.version = format!("{}://{}", answer.runtime_name, answer.runtime_version);
        }
    }

    /// The list of images only helps the scheduler; the last one will do when the runtime doesn't answer.
    async fn ask_images(&mut self) {
        let mut client = self.cri.images();
        let request = client.list_images(cri::ListImagesRequest { filter: None });
        if let Ok(Ok(answer)) = tokio::time::timeout(ANSWER, request).await {
            self.images = answer
                .into_inner()
                .images
                .into_iter()
                .map(|image| ImageFacts {
                    digests: image.repo_digests,
                    tags: image.repo_tags,
                    size: image.size,
                })
                .collect();
        }
    }
}

fn handler(handler: &cri::RuntimeHandler) -> NodeRuntimeHandler {
    NodeRuntimeHandler {
        name: Some(handler.name.clone()),
        features: handler.features.as_ref().map(|features| NodeRuntimeHandlerFeatures {
            recursive_read_only_mounts: Some(features.recursive_read_only_mounts),
            user_namespaces: Some(features.user_namespaces),
        }),
    }
}

/// What the two conditions that a runtime must have say against being ready.
fn complaints(status: &cri::RuntimeStatus) -> Vec<String> {
    [("RuntimeReady", "container runtime not ready"), ("NetworkReady", "container runtime network not ready")]
        .into_iter()
        .filter_map(|(kind, what)| match status.conditions.iter().find(|c| c.r#type == kind) {
            Some(condition) if condition.status => None,
            Some(condition) => Some(format!(
                "{what}: {kind}=false reason:{} message:{}",
                condition.reason, condition.message
            )),
            None => Some(format!("{what}: the runtime reports no condition {kind}")),
        })
        .collect()
}

/// `problems` is an error while the runtime is silent, but not yet for too long.
fn health(problems: Result<Vec<String>, ()>, was_ready: bool, since_start: Duration) -> Health {
    match problems {
        Err(()) => Health::Unknown,
        Ok(problems) if problems.is_empty() => Health::Ready,
        Ok(_) if was_ready && since_start < SETTLING => Health::Unknown,
        Ok(problems) => Health::NotReady(problems),
    }
}

/// Where the node can be reached: the address it was given, or its name if that is one, or the one traffic leaves from.
fn addresses(config: &Config) -> Vec<NodeAddress> {
    let address = |kind: &str, address: String| NodeAddress { type_: kind.to_owned(), address };
    let found: Vec<IpAddr> = if config.node_ips.is_empty() {
        config.node_name.parse().ok().or_else(default_address).into_iter().collect()
    } else {
        config.node_ips.clone()
    };
    let mut all: Vec<_> = found.into_iter().map(|ip| address("InternalIP", ip.to_string())).collect();
    all.push(address("Hostname", config.node_name.clone()));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition(kind: &str, status: bool) -> cri::RuntimeCondition {
        cri::RuntimeCondition {
            r#type: kind.to_owned(),
            status,
            reason: "R".to_owned(),
            message: "m".to_owned(),
        }
    }

    #[test]
    fn both_conditions_of_the_runtime_must_hold() {
        let status = |runtime, network| cri::RuntimeStatus {
            conditions: vec![condition("RuntimeReady", runtime), condition("NetworkReady", network)],
        };
        assert!(complaints(&status(true, true)).is_empty());
        assert_eq!(
            complaints(&status(true, false)),
            ["container runtime network not ready: NetworkReady=false reason:R message:m"]
        );
        assert_eq!(complaints(&cri::RuntimeStatus::default()).len(), 2);
    }

    #[test]
    fn a_restarted_agent_gives_a_ready_node_time_to_settle() {
        let problem = || Ok(vec!["network".to_owned()]);
        let (early, late) = (Duration::from_secs(1), SETTLING);
        assert_eq!(health(problem(), true, early), Health::Unknown);
        assert!(matches!(health(problem(), true, late), Health::NotReady(_)));
        assert!(matches!(health(problem(), false, early), Health::NotReady(_)));
        assert_eq!(health(Err(()), true, late), Health::Unknown);
        assert_eq!(health(Ok(Vec::new()), false, early), Health::Ready);
    }
}
