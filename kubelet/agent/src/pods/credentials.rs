//! Registry credentials: from a pod's image pull secrets, then from the node's own docker configuration.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use k8s_openapi::api::core::v1::{Pod, Secret};
use orlop_proto::cri;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;

/// What to show a registry.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Credentials {
    username: String,
    password: String,
    identity_token: String,
    server: String,
}

impl Credentials {
    /// Tells pulls with different credentials apart without keeping the secret as a key.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({} at {})", self.username, self.server)
    }
}

impl From<Credentials> for cri::AuthConfig {
    fn from(it: Credentials) -> Self {
        Self {
            username: it.username,
            password: it.password,
            identity_token: it.identity_token,
            server_address: it.server,
            ..Self::default()
        }
    }
}

/// Where credentials are looked for.
#[derive(Debug)]
pub struct Keyring {
    api: Option<orlop_api::Client>,
    files: Vec<PathBuf>,
}

impl Keyring {
    /// `root` is the kubelet's root directory, whose `config.json` belongs to the node.
    #[must_use]
    pub fn new(api: Option<orlop_api::Client>, root: &std::path::Path) -> Self {
        Self { api, files: vec![root.join("config.json"), PathBuf::from("/root/.docker/config.json")] }
    }

    /// What to try in turn for an image, none at all being the last resort, and the names of secrets that cannot be used.
    pub async fn candidates(&self, pod: &Pod, image: &str) -> (Vec<Option<Credentials>>, Vec<String>) {
        let mut found = Vec::new();
        let mut missing = Vec::new();
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let secrets = pod.spec.iter().flat_map(|spec| spec.image_pull_secrets.iter().flatten());
        for reference in secrets.filter(|reference| !reference.name.is_empty()) {
            match self.secret(namespace, &reference.name).await {
                Some(config) => found.extend(config.matching(image)),
                None => missing.push(reference.name.clone()),
            }
        }
        for file in &self.files {
            let Ok(bytes) = tokio::fs::read(file).await else { continue };
            match serde_json::from_slice::<DockerConfig>(&bytes) {
                Ok(config) => found.extend(config.matching(image)),
                Err(error) => {
                    tracing::warn!(file = %file.display(), %error, "registry credentials cannot be read")
                }
            }
        }
        let mut candidates: Vec<_> = found.into_iter().map(Some).collect();
        if candidates.is_empty() {
            candidates.push(None);
        }
        (candidates, missing)
    }

    async fn secret(&self, namespace: &str, name: &str) -> Option<DockerConfig> {
        let path = format!("/api/v1/namespaces/{namespace}/secrets/{name}");
        let secret: Secret = self.api.as_ref()?.get(&path).await.ok()?;
        from_secret(&secret)
    }
}

fn from_secret(secret: &Secret) -> Option<DockerConfig> {
    let data = secret.data.as_ref()?;
    if let Some(new) = data.get(".dockerconfigjson") {
        return serde_json::from_slice(&new.0).ok();
    }
    let auths = serde_json::from_slice(&data.get(".dockercfg")?.0).ok()?;
    Some(DockerConfig { auths })
}

/// `~/.docker/config.json`.
#[derive(Debug, Default, Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

#[derive(Debug, Default, Deserialize)]
struct Entry {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
    #[serde(default, rename = "identitytoken")]
    identity_token: String,
}

impl DockerConfig {
    /// The entries that fit an image, the most specific first.
    fn matching(&self, image: &str) -> Vec<Credentials> {
        let image = qualified(image);
        let mut fitting: Vec<(usize, Credentials)> = self
            .auths
            .iter()
            .filter(|(key, _)| fits(key, &image))
            .map(|(key, entry)| (key.len(), entry.credentials(key)))
            .collect();
        fitting.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
        fitting.into_iter().map(|(_, credentials)| credentials).collect()
    }
}

impl Entry {
    fn credentials(&self, server: &str) -> Credentials {
        let decoded = BASE64.decode(self.auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = decoded.as_deref().and_then(|text| text.split_once(':'));
        let (username, password) = pair.unwrap_or((&self.username, &self.password));
        Credentials {
            username: username.to_owned(),
            password: password.trim_end_matches('\0').to_owned(),
            identity_token: self.identity_token.clone(),
            server: server.to_owned(),
        }
    }
}

/// `registry/path` of an image, the public registry written out.
fn qualified(image: &str) -> String {
    let name = image.split('@').next().unwrap_or(image);
    let has_domain =
        name.split_once('/').is_some_and(|(first, _)| first.contains(['.', ':']) || first == "localhost");
    match (has_domain, name.contains('/')) {
        (true, _) => name.to_owned(),
        (false, true) => format!("docker.io/{name}"),
        (false, false) => format!("docker.io/library/{name}"),
    }
}

/// A key is a registry, with a scheme or without, with a path or without; `*` stands for one label of the host.
fn fits(key: &str, image: &str) -> bool {
    let key = key.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
    let (host, path) = key.split_once('/').unwrap_or((key, ""));
    let path = if matches!(path, "v1" | "v2") { "" } else { path };
    let host = if matches!(host, "index.docker.io" | "registry-1.docker.io") { "docker.io" } else { host };
    let (image_host, image_path) = image.split_once('/').unwrap_or((image, ""));
    let labels: Vec<&str> = host.split('.').collect();
    let image_labels: Vec<&str> = image_host.split('.').collect();
    labels.len() == image_labels.len()
        && labels.iter().zip(&image_labels).all(|(pattern, label)| label_fits(pattern, label))
        && image_path.starts_with(path)
}

fn label_fits(pattern: &str, label: &str) -> bool {
    match pattern.split_once('*') {
        Some((front, back)) => {
            label.len() >= front.len() + back.len() && label.starts_with(front) && label.ends_with(back)
        }
        None => pattern == label,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_fit_hosts_paths_and_wildcards() {
        for (key, image, expected) in [
            ("https://index.docker.io/v1/", "busybox:1", true),
            ("registry.example.com", "registry.example.com/a:1", true),
            ("registry.example.com/a", "registry.example.com/a/b:1", true),
            ("registry.example.com/b", "registry.example.com/a/b:1", false),
            ("*.example.com", "registry.example.com/a:1", true),
            ("*.example.com", "a.registry.example.com/a:1", false),
            ("host:5000", "host:5000/a", true),
            ("host", "host:5000/a", false),
        ] {
            assert_eq!(fits(key, &qualified(image)), expected, "{key} {image}");
        }
    }

    #[test]
    fn the_most_specific_entry_comes_first_and_the_pair_is_decoded() {
        let config: DockerConfig = serde_json::from_value(serde_json::json!({"auths": {
            "r.example.com": {"username": "a", "password": "b"},
            "r.example.com/team": {"auth": BASE64.encode("c:d:e")},
        }}))
        .unwrap();
        let found = config.matching("r.example.com/team/x:1");
        assert_eq!((found[0].username.as_str(), found[0].password.as_str()), ("c", "d:e"));
        assert_eq!(found[1].username, "a");
        assert!(!format!("{found:?}").contains("d:e"));
    }
}
