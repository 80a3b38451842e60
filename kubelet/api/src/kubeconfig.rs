//! Kubeconfig files: which server, whom to trust, who we are.
//!
//! A file is read once and turned into a [`ServerConfig`] that holds everything a connection needs; nothing later can fail
//! because of the file's text. Every refusal names the file, the key, the cause and what to do.

use crate::credentials::{CertificateSource, Credentials, TokenSource};
use crate::tls::{self, Trust};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::io;
use std::path::{Path, PathBuf};

/// Where pods find their service account.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

#[derive(Debug, thiserror::Error)]
pub enum KubeconfigError {
    #[error("cannot read kubeconfig {}: {source}; give the right path with --kubeconfig, or make the file readable", file.display())]
    Read { file: PathBuf, source: io::Error },
    #[error("kubeconfig {} is not valid YAML for a kubeconfig: {cause}; correct the line named", file.display())]
    Syntax { file: PathBuf, cause: String },
    #[error("kubeconfig {}: {key}: {problem}; {remedy}", file.display())]
    Field { file: PathBuf, key: String, problem: String, remedy: String },
    #[error("not in a cluster: {problem}; give a kubeconfig file instead")]
    NotInCluster { problem: String },
}

/// A server and everything needed to talk to it.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    pub(crate) endpoint: Endpoint,
    pub(crate) trust: Trust,
    /// The name the server's certificate must bear, when it is not the one in the address.
    pub(crate) tls_server_name: Option<String>,
    pub(crate) credentials: Credentials,
}

/// The address of a server, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// As it was written, for messages.
    pub(crate) url: String,
    pub(crate) tls: bool,
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Host and port as they go into requests.
    pub(crate) authority: String,
    /// A path before every request's own, without the closing slash; empty for most.
    pub(crate) prefix: String,
}

impl Endpoint {
    pub(crate) fn parse(url: &str) -> Result<Self, String> {
        // An address without a scheme means plain HTTP to Go's clients; nobody wants that by accident.
        let uri: http::Uri = url.parse().map_err(|error| format!("`{url}` is not an address: {error}"))?;
        let tls = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            Some(other) => return Err(format!("`{url}` has the scheme `{other}`")),
            None => return Err(format!("`{url}` has no scheme")),
        };
        let authority = uri.authority().ok_or_else(|| format!("`{url}` has no host"))?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        let port = authority.port_u16().unwrap_or(if tls { 443 } else { 80 });
        Ok(Self {
            url: url.trim_end_matches('/').to_owned(),
            tls,
            host,
            port,
            authority: authority.as_str().rsplit('@').next().unwrap_or_default().to_owned(),
            prefix: uri.path().trim_end_matches('/').to_owned(),
        })
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct File {
    current_context: Option<String>,
    clusters: Vec<NamedCluster>,
    users: Vec<NamedUser>,
    contexts: Vec<NamedContext>,
}

#[derive(Debug, Deserialize)]
struct NamedCluster {
    name: String,
    #[serde(default)]
    cluster: Cluster,
}

#[derive(Debug, Deserialize)]
struct NamedUser {
    name: String,
    #[serde(default)]
    user: User,
}

#[derive(Debug, Deserialize)]
struct NamedContext {
    name: String,
    #[serde(default)]
    context: Context,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Context {
    cluster: String,
    user: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Cluster {
    server: String,
    certificate_authority: Option<PathBuf>,
    certificate_authority_data: Option<String>,
    insecure_skip_tls_verify: bool,
    tls_server_name: Option<String>,
    proxy_url: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct User {
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<PathBuf>,
    client_certificate: Option<PathBuf>,
    client_certificate_data: Option<String>,
    client_key: Option<PathBuf>,
    client_key_data: Option<String>,
    username: Option<String>,
    exec: Option<serde::de::IgnoredAny>,
    auth_provider: Option<serde::de::IgnoredAny>,
    #[serde(rename = "as")]
    impersonate: Option<String>,
}

/// Where a message about a key comes from, and the folder relative paths start at.
struct Origin<'a> {
    file: &'a Path,
    section: String,
}

impl Origin<'_> {
    fn error(&self, key: &str, problem: impl Into<String>, remedy: &str) -> KubeconfigError {
        let key = if self.section.is_empty() { key.to_owned() } else { format!("{}.{key}", self.section) };
        KubeconfigError::Field {
            file: self.file.to_owned(),
            key,
            problem: problem.into(),
            remedy: remedy.to_owned(),
        }
    }

    fn path(&self, path: &Path) -> PathBuf {
        self.file.parent().unwrap_or_else(|| Path::new("")).join(path)
    }

    fn decode(&self, key: &str, text: &str) -> Result<Vec<u8>, KubeconfigError> {
        let compact: String = text.split_whitespace().collect();
        STANDARD.decode(compact).map_err(|error| {
            self.error(key, format!("is not base64: {error}"), "encode the PEM file with `base64 -w0`")
        })
    }

    fn read(&self, key: &str, path: &Path) -> Result<Vec<u8>, KubeconfigError> {
        std::fs::read(path).map_err(|error| {
            self.error(
                key,
                format!("cannot read {}: {error}", path.display()),
                "correct the path, or the file's permissions",
            )
        })
    }
}

impl ServerConfig {
    /// Reads a kubeconfig and follows its current context.
    pub fn load(file: &Path) -> Result<Self, KubeconfigError> {
        let text = std::fs::read_to_string(file)
            .map_err(|source| KubeconfigError::Read { file: file.to_owned(), source })?;
        Self::parse(file, &text)
    }

    /// `file` names the origin in messages and is the base of relative paths.
    pub fn parse(file: &Path, text: &str) -> Result<Self, KubeconfigError> {
        let root = Origin { file, section: String::new() };
        if text.trim().is_empty() {
            return Err(KubeconfigError::Syntax {
                file: file.to_owned(),
                cause: "the file is empty".to_owned(),
            });
        }
        let parsed: File = serde_saphyr::from_str(text).map_err(|error| KubeconfigError::Syntax {
            file: file.to_owned(),
            cause: one_line(&error.to_string()),
        })?;
        let context = current_context(&root, &parsed)?;
        let cluster =
            parsed.clusters.iter().find(|c| c.name == context.context.cluster).ok_or_else(|| {
                root.error(
                    &format!("contexts[{}].context.cluster", context.name),
                    format!("there is no cluster `{}`", context.context.cluster),
                    &known("clusters", parsed.clusters.iter().map(|c| c.name.as_str())),
                )
            })?;
        let anonymous = User::default();
        let user = if context.context.user.is_empty() {
            (String::new(), &anonymous)
        } else {
            parsed
                .users
                .iter()
                .find(|u| u.name == context.context.user)
                .map(|u| (u.name.clone(), &u.user))
                .ok_or_else(|| {
                    root.error(
                        &format!("contexts[{}].context.user", context.name),
                        format!("there is no user `{}`", context.context.user),
                        &known("users", parsed.users.iter().map(|u| u.name.as_str())),
                    )
                })?
        };
        let of_cluster = Origin { file, section: format!("clusters[{}].cluster", cluster.name) };
        let of_user = Origin { file, section: format!("users[{}].user", user.0) };
        Ok(Self {
            endpoint: endpoint(&of_cluster, &cluster.cluster)?,
            trust: trust(&of_cluster, &cluster.cluster)?,
            tls_server_name: cluster.cluster.tls_server_name.clone().filter(|name| !name.is_empty()),
            credentials: credentials(&of_user, user.1)?,
        })
    }

    /// The server and service account of the pod we run in.
    pub fn in_cluster() -> Result<Self, KubeconfigError> {
        let variable = |name: &str| {
            std::env::var(name)
                .map_err(|_| KubeconfigError::NotInCluster { problem: format!("{name} is not set") })
        };
        let (host, port) = (variable("KUBERNETES_SERVICE_HOST")?, variable("KUBERNETES_SERVICE_PORT")?);
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let ca = Path::new(SERVICE_ACCOUNT).join("ca.crt");
        let problem = |problem: String| KubeconfigError::NotInCluster { problem };
        let pem =
            std::fs::read(&ca).map_err(|error| problem(format!("cannot read {}: {error}", ca.display())))?;
        let roots = tls::certificates(&pem).map_err(|cause| problem(format!("{}: {cause}", ca.display())))?;
        Ok(Self {
            endpoint: Endpoint::parse(&format!("https://{host}:{port}")).map_err(problem)?,
            trust: Trust::Authorities { origin: ca.display().to_string(), roots },
            tls_server_name: None,
            credentials: Credentials::new(None, TokenSource::File(Path::new(SERVICE_ACCOUNT).join("token"))),
        })
    }

    /// The address as it was written.
    #[must_use]
    pub fn server(&self) -> &str {
        &self.endpoint.url
    }

    /// The identity in use, to look at its certificate or to swap it.
    #[must_use]
    pub fn credentials(&self) -> &Credentials {
        &self.credentials
    }
}

fn current_context<'a>(root: &Origin<'_>, parsed: &'a File) -> Result<&'a NamedContext, KubeconfigError> {
    let names = || known("contexts", parsed.contexts.iter().map(|c| c.name.as_str()));
    match parsed.current_context.as_deref().unwrap_or_default() {
        // The only one there is leaves no doubt.
        "" => match parsed.contexts.as_slice() {
            [only] => Ok(only),
            _ => Err(root.error("current-context", "is missing", &names())),
        },
        name => {
            parsed.contexts.iter().find(|c| c.name == name).ok_or_else(|| {
                root.error("current-context", format!("there is no context `{name}`"), &names())
            })
        }
    }
}

fn known<'a>(section: &str, names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.collect();
    if names.is_empty() {
        format!("add it: `{section}` is empty")
    } else {
        format!("name one of those under `{section}`: {}", names.join(", "))
    }
}

fn endpoint(origin: &Origin<'_>, cluster: &Cluster) -> Result<Endpoint, KubeconfigError> {
    if cluster.proxy_url.as_deref().is_some_and(|url| !url.is_empty()) {
        return Err(origin.error(
            "proxy-url",
            "proxies are not supported",
            "remove it and give the node a direct route to the API server",
        ));
    }
    if cluster.server.is_empty() {
        return Err(origin.error("server", "is missing", "set it to https://HOST:PORT of the API server"));
    }
    Endpoint::parse(&cluster.server)
        .map_err(|problem| origin.error("server", problem, "write it as https://HOST:PORT"))
}

fn trust(origin: &Origin<'_>, cluster: &Cluster) -> Result<Trust, KubeconfigError> {
    const REMEDY: &str = "put the PEM certificate of the cluster's CA there";
    let data = cluster.certificate_authority_data.as_deref().filter(|data| !data.is_empty());
    let file = cluster.certificate_authority.as_deref().filter(|path| !path.as_os_str().is_empty());
    if cluster.insecure_skip_tls_verify {
        if data.is_some() || file.is_some() {
            return Err(origin.error(
                "insecure-skip-tls-verify",
                "contradicts certificate-authority",
                "remove one of the two",
            ));
        }
        return Ok(Trust::Anyone);
    }
    let (key, pem, name) = match (data, file) {
        (Some(data), _) => {
            let key = "certificate-authority-data";
            (key, origin.decode(key, data)?, format!("{key} of {}", origin.file.display()))
        }
        (None, Some(file)) => {
            let path = origin.path(file);
            let key = "certificate-authority";
            (key, origin.read(key, &path)?, path.display().to_string())
        }
        (None, None) => return Ok(Trust::System),
    };
    let roots =
        tls::certificates(&pem).map_err(|cause| origin.error(key, format!("{name}: {cause}"), REMEDY))?;
    Ok(Trust::Authorities { origin: name, roots })
}

fn credentials(origin: &Origin<'_>, user: &User) -> Result<Credentials, KubeconfigError> {
    let refuse = |key: &str, what: &str| {
        Err(origin.error(
            key,
            format!("{what} not supported"),
            "use a client certificate, a token or a tokenFile",
        ))
    };
    if user.exec.is_some() {
        return refuse("exec", "credential plugins are");
    }
    if user.auth_provider.is_some() {
        return refuse("auth-provider", "authentication providers are");
    }
    if user.username.as_deref().is_some_and(|name| !name.is_empty()) {
        return refuse("username", "passwords are");
    }
    if user.impersonate.as_deref().is_some_and(|name| !name.is_empty()) {
        return refuse("as", "impersonation is");
    }
    let token = match (&user.token, &user.token_file) {
        // Go's clients prefer the file as well, since its content is renewed.
        (_, Some(path)) if !path.as_os_str().is_empty() => {
            let path = origin.path(path);
            origin.read("tokenFile", &path)?;
            TokenSource::File(path)
        }
        (Some(token), _) if !token.is_empty() => TokenSource::Fixed {
            origin: format!("{}.token of {}", origin.section, origin.file.display()),
            token: token.trim().to_owned(),
        },
        _ => TokenSource::None,
    };
    Ok(Credentials::new(client_certificate(origin, user)?, token))
}

fn client_certificate(
    origin: &Origin<'_>,
    user: &User,
) -> Result<Option<CertificateSource>, KubeconfigError> {
    let part = |name: &'static str, data: &Option<String>, file: &Option<PathBuf>| {
        let data = data.as_deref().filter(|data| !data.is_empty());
        let file = file.as_deref().filter(|path| !path.as_os_str().is_empty());
        Ok::<_, KubeconfigError>(match (data, file) {
            (Some(data), _) => Some((origin.decode(&format!("{name}-data"), data)?, None)),
            (None, Some(file)) => {
                let path = origin.path(file);
                Some((origin.read(name, &path)?, Some(path)))
            }
            (None, None) => None,
        })
    };
    let chain = part("client-certificate", &user.client_certificate_data, &user.client_certificate)?;
    let key = part("client-key", &user.client_key_data, &user.client_key)?;
    let ((chain, chain_file), (key, key_file)) = match (chain, key) {
        (None, None) => return Ok(None),
        (Some(chain), Some(key)) => (chain, key),
        (Some(_), None) => {
            return Err(origin.error("client-key", "is missing", "give the key of the client certificate"));
        }
        (None, Some(_)) => {
            return Err(origin.error(
                "client-certificate",
                "is missing",
                "give the certificate of the client key",
            ));
        }
    };
    let named = |path: &Option<PathBuf>, name: &str| {
        path.as_ref().map_or_else(|| format!("{name}-data"), |path| path.display().to_string())
    };
    let chain = tls::certificates(&chain).map_err(|cause| {
        origin.error(
            "client-certificate",
            format!("{}: {cause}", named(&chain_file, "client-certificate")),
            "put a PEM certificate there",
        )
    })?;
    let key = tls::private_key(&key).map_err(|cause| {
        origin.error(
            "client-key",
            format!("{}: {cause}", named(&key_file, "client-key")),
            "put an unencrypted PEM private key there",
        )
    })?;
    let certified = tls::certified(chain, key).map_err(|cause| {
        origin.error("client-key", cause.to_string(), "give the key that belongs to client-certificate")
    })?;
    Ok(Some(CertificateSource { certified, files: chain_file.zip(key_file) }))
}

/// YAML errors come with a drawing of the place; a log line has room for the words.
fn one_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().trim().to_owned()
}
