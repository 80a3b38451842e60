//! Which objects a pod refers to.

use crate::podspec::namespace;
use k8s_openapi::api::core::v1::{EnvFromSource, EnvVar, Pod, Volume};
use std::collections::BTreeSet;
use std::fmt;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    ConfigMap,
    Secret,
}

/// One object's identity.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    pub kind: Kind,
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::ConfigMap => "configmap",
            Kind::Secret => "secret",
        };
        write!(f, "{kind} {}/{}", self.namespace, self.name)
    }
}

/// Every ConfigMap and Secret that the pod's containers, volumes and image pulls name.
#[must_use]
pub fn references(pod: &Pod) -> BTreeSet<ObjectKey> {
    let mut found = Found { namespace: namespace(pod), keys: BTreeSet::new() };
    let Some(spec) = &pod.spec else { return found.keys };
    for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
        found.env(container.env.as_deref(), container.env_from.as_deref());
    }
    for container in spec.ephemeral_containers.iter().flatten() {
        found.env(container.env.as_deref(), container.env_from.as_deref());
    }
    for volume in spec.volumes.iter().flatten() {
        found.volume(volume);
    }
    for secret in spec.image_pull_secrets.iter().flatten() {
        found.add(Kind::Secret, &secret.name);
    }
    found.keys
}

struct Found<'a> {
    namespace: &'a str,
    keys: BTreeSet<ObjectKey>,
}

impl Found<'_> {
    fn add(&mut self, kind: Kind, name: &str) {
        if !name.is_empty() {
            let namespace = self.namespace.to_owned();
            self.keys.insert(ObjectKey { kind, namespace, name: name.to_owned() });
        }
    }

    fn env(&mut self, variables: Option<&[EnvVar]>, sources: Option<&[EnvFromSource]>) {
        for source in variables.into_iter().flatten().filter_map(|variable| variable.value_from.as_ref()) {
            if let Some(selector) = &source.config_map_key_ref {
                self.add(Kind::ConfigMap, &selector.name);
            }
            if let Some(selector) = &source.secret_key_ref {
                self.add(Kind::Secret, &selector.name);
            }
        }
        for source in sources.into_iter().flatten() {
            if let Some(reference) = &source.config_map_ref {
                self.add(Kind::ConfigMap, &reference.name);
            }
            if let Some(reference) = &source.secret_ref {
                self.add(Kind::Secret, &reference.name);
            }
        }
    }

    fn volume(&mut self, volume: &Volume) {
        if let Some(source) = &volume.config_map {
            self.add(Kind::ConfigMap, &source.name);
        }
        if let Some(source) = &volume.secret {
            self.add(Kind::Secret, source.secret_name.as_deref().unwrap_or_default());
        }
        let projections = volume.projected.iter().flat_map(|source| source.sources.iter().flatten());
        for projection in projections {
            if let Some(source) = &projection.config_map {
                self.add(Kind::ConfigMap, &source.name);
            }
            if let Some(source) = &projection.secret {
                self.add(Kind::Secret, &source.name);
            }
        }
    }
}
