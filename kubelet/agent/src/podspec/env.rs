//! The environment of a container: `envFrom`, then `env` in its order, then the variables of Services that nothing
//! before has named. Later wins, but a variable keeps the place where it first appeared.

use crate::objects::Objects;
use crate::podspec::error::{FieldError, SpecError};
use crate::podspec::expansion::expand;
use crate::podspec::facts::Facts;
use crate::podspec::{fields, identity, services};
use k8s_openapi::api::core::v1::{Container, EnvFromSource, EnvVarSource, Pod};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Variables in order, each name once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    order: Vec<String>,
    values: BTreeMap<String, String>,
}

impl Environment {
    fn set(&mut self, name: String, value: String) {
        if self.values.insert(name.clone(), value).is_none() {
            self.order.push(name);
        }
    }

    fn set_if_absent(&mut self, name: String, value: String) {
        if !self.values.contains_key(&name) {
            self.set(name, value);
        }
    }

    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.order.iter().map(|name| (name.as_str(), self.values[name].as_str()))
    }

    #[must_use]
    pub fn values(&self) -> &BTreeMap<String, String> {
        &self.values
    }
}

/// What is asked for an environment.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    pub facts: &'a Facts,
    pub objects: &'a Objects,
    pub pod: &'a Pod,
    pub container: &'a Container,
    pub pod_ips: &'a [IpAddr],
}

/// Builds the environment; waits for referenced objects that were never read yet.
pub async fn environment(request: Request<'_>) -> Result<Environment, SpecError> {
    let links = service_links(request).await?;
    let mut env = Environment::default();
    for source in request.container.env_from.iter().flatten() {
        env_from(request, source, &mut env).await?;
    }
    for variable in request.container.env.iter().flatten() {
        let literal = variable.value.as_deref().unwrap_or_default();
        let value = match &variable.value_from {
            Some(source) if literal.is_empty() => match value_from(request, &variable.name, source).await? {
                Some(value) => value,
                None => continue,
            },
            _ => expand(literal, |name| env.get(name).or_else(|| links.get(name).map(String::as_str))),
        };
        env.set(variable.name.clone(), value);
    }
    for (name, value) in links {
        env.set_if_absent(name, value);
    }
    Ok(env)
}

async fn service_links(request: Request<'_>) -> Result<BTreeMap<String, String>, SpecError> {
    let links = identity::spec(request.pod).and_then(|spec| spec.enable_service_links).unwrap_or(true);
    // A static pod may be the API server that is to tell about services, so it does not wait for them.
    let all = if is_static(request.pod) {
        request.objects.known_services().unwrap_or_default()
    } else {
        request.objects.services().await.ok_or(SpecError::ServicesUnread)?
    };
    let visible = services::visible(all.iter(), identity::namespace(request.pod), links);
    Ok(services::variables(visible).into_iter().collect())
}

fn is_static(pod: &Pod) -> bool {
    let source = pod.metadata.annotations.as_ref().and_then(|a| a.get("kubernetes.io/config.source"));
    source.is_some_and(|source| source != "api")
}

async fn env_from(
    request: Request<'_>,
    source: &EnvFromSource,
    env: &mut Environment,
) -> Result<(), SpecError> {
    let prefix = source.prefix.as_deref().unwrap_or_default();
    let namespace = identity::namespace(request.pod);
    if let Some(reference) = &source.config_map_ref {
        match request.objects.config_map(namespace, &reference.name).await? {
            Some(map) => {
                for (key, value) in map.data.iter().flatten() {
                    env.set(format!("{prefix}{key}"), value.clone());
                }
            }
            None if reference.optional == Some(true) => {}
            None => return Err(SpecError::ConfigMapMissing { name: reference.name.clone() }),
        }
    } else if let Some(reference) = &source.secret_ref {
        match request.objects.secret(namespace, &reference.name).await? {
            Some(secret) => {
                for (key, value) in secret.data.iter().flatten() {
                    let value = secret_text(namespace, &reference.name, key, &value.0)?;
                    env.set(format!("{prefix}{key}"), value);
                }
            }
            None if reference.optional == Some(true) => {}
            None => return Err(SpecError::SecretMissing { name: reference.name.clone() }),
        }
    }
    Ok(())
}

/// The value of a variable's source; `None` where an optional one is absent, and the variable with it.
async fn value_from(
    request: Request<'_>,
    variable: &str,
    source: &EnvVarSource,
) -> Result<Option<String>, SpecError> {
    let named = |source: FieldError| SpecError::Variable { name: variable.to_owned(), source };
    let namespace = identity::namespace(request.pod);
    if let Some(selector) = &source.field_ref {
        fields::field(request.pod, &selector.field_path, request.facts, request.pod_ips)
            .map(Some)
            .map_err(named)
    } else if let Some(selector) = &source.resource_field_ref {
        fields::resource(request.pod, selector, Some(request.container), request.facts)
            .map(Some)
            .map_err(named)
    } else if let Some(selector) = &source.config_map_key_ref {
        let (name, key) = (selector.name.clone(), selector.key.clone());
        let optional = selector.optional == Some(true);
        match request.objects.config_map(namespace, &name).await? {
            None if optional => Ok(None),
            None => Err(SpecError::ConfigMapMissing { name }),
            Some(map) => match map.data.as_ref().and_then(|data| data.get(&key)) {
                Some(value) => Ok(Some(value.clone())),
                None if optional => Ok(None),
                None => Err(SpecError::ConfigMapKeyMissing { namespace: namespace.to_owned(), name, key }),
            },
        }
    } else if let Some(selector) = &source.secret_key_ref {
        let (name, key) = (selector.name.clone(), selector.key.clone());
        let optional = selector.optional == Some(true);
        match request.objects.secret(namespace, &name).await? {
            None if optional => Ok(None),
            None => Err(SpecError::SecretMissing { name }),
            Some(secret) => match secret.data.as_ref().and_then(|data| data.get(&key)) {
                Some(value) => secret_text(namespace, &name, &key, &value.0).map(Some),
                None if optional => Ok(None),
                None => Err(SpecError::SecretKeyMissing { namespace: namespace.to_owned(), name, key }),
            },
        }
    } else if source.file_key_ref.is_some() {
        Err(SpecError::FileKeyRef { name: variable.to_owned() })
    } else {
        Err(named(FieldError::Empty))
    }
}

fn secret_text(namespace: &str, name: &str, key: &str, bytes: &[u8]) -> Result<String, SpecError> {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(SpecError::SecretNotText {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            key: key.to_owned(),
        }),
    }
}
