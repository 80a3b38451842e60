//! Making the node known, or bringing what is known up to date.

use super::machine::architecture;
use crate::config::Config;
use k8s_openapi::api::core::v1::{Node, NodeSpec, NodeStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use orlop_api::client::Patch;
use orlop_api::{ApiError, Client};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const ATTACH_DETACH: &str = "volumes.kubernetes.io/controller-managed-attach-detach";

/// The labels a node always bears, then those it was told to.
pub(super) fn labels(config: &Config) -> BTreeMap<String, String> {
    let hostname = &config.node_name;
    let mut labels: BTreeMap<String, String> = [
        ("kubernetes.io/hostname", hostname.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", architecture()),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/arch", architecture()),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .collect();
    labels.extend(config.node_labels.clone());
    labels
}

fn annotations() -> BTreeMap<String, String> {
    [(ATTACH_DETACH.to_owned(), "true".to_owned())].into()
}

/// The Node as it is first created. Taints are given only here: later they belong to whoever administers the cluster.
#[must_use]
pub fn initial_node(config: &Config, status: NodeStatus) -> Node {
    let provider = &config.raw.provider_id;
    Node {
        metadata: ObjectMeta {
            name: Some(config.node_name.clone()),
            labels: Some(labels(config)),
            annotations: Some(annotations()),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            provider_id: (!provider.is_empty()).then(|| provider.clone()),
            taints: (!config.taints.is_empty()).then(|| config.taints.clone()),
            ..NodeSpec::default()
        }),
        status: Some(status),
    }
}

/// The change that gives an existing Node the labels and annotations it should bear; none if it has them.
pub(super) fn metadata_patch(config: &Config, node: &Node) -> Option<Value> {
    let missing = |wanted: BTreeMap<String, String>, has: Option<&BTreeMap<String, String>>| {
        wanted
            .into_iter()
            .filter(|(key, value)| has.and_then(|has| has.get(key)) != Some(value))
            .collect::<BTreeMap<_, _>>()
    };
    let labels = missing(labels(config), node.metadata.labels.as_ref());
    let annotations = missing(annotations(), node.metadata.annotations.as_ref());
    (!labels.is_empty() || !annotations.is_empty())
        .then(|| json!({"metadata": {"labels": labels, "annotations": annotations}}))
}

/// Creates the Node, or reconciles the one that is there. Gives it as the server has it.
pub(super) async fn register(
    client: &Client,
    config: &Config,
    status: NodeStatus,
) -> Result<Box<Node>, ApiError> {
    let path = format!("/api/v1/nodes/{}", config.node_name);
    if config.register_node {
        match Box::pin(client.create::<_, Node>("/api/v1/nodes", &initial_node(config, status))).await {
            Ok(node) => {
                tracing::info!(node = %config.node_name, "node registered");
                return Ok(Box::new(node));
            }
            // Forbidden: another quota or admission rule spoke before "already exists" could.
            Err(ApiError::Status { code: 409 | 403, .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let node: Node = Box::pin(client.get(&path)).await?;
    match metadata_patch(config, &node) {
        Some(patch) => Ok(Box::new(Box::pin(client.patch(&path, Patch::Strategic, &patch)).await?)),
        None => Ok(Box::new(node)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{KubeletConfiguration, KubeletFlags, resolve};

    fn config(labels: &str) -> Config {
        let flags = KubeletFlags {
            hostname_override: Some("a".to_owned()),
            node_labels: Some(labels.to_owned()),
            ..KubeletFlags::default()
        };
        let file = KubeletConfiguration {
            register_with_taints: vec![crate::config::Taint {
                key: "k".to_owned(),
                effect: "NoSchedule".to_owned(),
                ..Default::default()
            }],
            ..KubeletConfiguration::default()
        };
        resolve(&flags, file).unwrap()
    }

    #[test]
    fn a_new_node_bears_labels_annotation_and_taints() {
        let node = initial_node(&config("disk=ssd"), NodeStatus::default());
        let labels = node.metadata.labels.unwrap();
        assert_eq!((labels["kubernetes.io/hostname"].as_str(), labels["disk"].as_str()), ("a", "ssd"));
        assert_eq!(node.metadata.annotations.unwrap()[ATTACH_DETACH], "true");
        assert_eq!(node.spec.unwrap().taints.unwrap()[0].key, "k");
    }

    #[test]
    fn an_existing_node_gets_what_it_lacks_and_keeps_the_rest() {
        let config = config("disk=ssd");
        let mut node = initial_node(&config, NodeStatus::default());
        assert!(metadata_patch(&config, &node).is_none());
        let labels = node.metadata.labels.as_mut().unwrap();
        labels.remove("kubernetes.io/os");
        labels.insert("by-an-admin".to_owned(), "yes".to_owned());
        let patch = metadata_patch(&config, &node).unwrap();
        assert_eq!(patch, json!({"metadata": {"labels": {"kubernetes.io/os": "linux"}, "annotations": {}}}));
    }
}
