//! Which hosts serve a registry's images: containerd's `hosts.toml`, and docker's older `certs.d` files.
//!
//! Read anew for each pull, so an edit needs no restart. Mirrors come in the order of the file, the registry itself
//! last. Paths in a file are relative to it.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::uri::{Authority, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use serde::Deserialize;

use crate::error::ImageError;

const DIAL_TIMEOUT: Duration = Duration::from_secs(30);

/// TLS material of one host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TlsFiles {
    pub(crate) ca: Vec<PathBuf>,
    /// Certificate and key; one file may hold both.
    pub(crate) client: Vec<(PathBuf, PathBuf)>,
    pub(crate) skip_verify: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Host {
    pub(crate) scheme: Scheme,
    pub(crate) authority: Authority,
    /// Ends without a slash; `/v2` unless overridden.
    pub(crate) prefix: String,
    /// May turn a tag into a digest.
    pub(crate) resolve: bool,
    /// May serve content by digest.
    pub(crate) pull: bool,
    pub(crate) tls: TlsFiles,
    pub(crate) headers: HeaderMap,
    pub(crate) dial_timeout: Duration,
    /// The registry the reference names, rather than a mirror of it.
    pub(crate) origin: bool,
}

#[derive(Debug, Default, Deserialize)]
struct HostFields {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany>,
    client: Option<Client>,
    #[serde(default)]
    skip_verify: bool,
    header: Option<std::collections::BTreeMap<String, OneOrMany>>,
    #[serde(default)]
    override_path: bool,
    dial_timeout: Option<String>,
}

#[derive(Debug, Deserialize)]
struct HostsFile {
    server: Option<String>,
    #[serde(default)]
    host: std::collections::BTreeMap<toml::Spanned<String>, HostFields>,
    #[serde(flatten)]
    own: HostFields,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Client {
    One(String),
    Many(Vec<String>),
    Pairs(Vec<Vec<String>>),
}

/// The hosts to ask for images of `domain`, in order.
pub(crate) fn hosts_for(config: Option<&Path>, domain: &str) -> Result<Vec<Host>, ImageError> {
    let directory = config.and_then(|config| {
        directory_names(domain).into_iter().map(|name| config.join(name)).find(|path| path.is_dir())
    });
    let Some(directory) = directory else {
        return Ok(vec![origin(domain, None, HostFields::default(), None)?]);
    };
    let path = directory.join("hosts.toml");
    let failed = |reason: String| ImageError::HostsConfig { path: path.clone(), reason };
    match fs::read_to_string(&path) {
        Ok(text) => parse(&text, domain, &directory).map_err(failed),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => {
            let mut host = origin(domain, None, HostFields::default(), None)?;
            host.tls = docker_certificates(&directory).map_err(|cause| failed(cause.to_string()))?;
            if host.tls != TlsFiles::default() {
                host.scheme = Scheme::HTTPS;
            }
            Ok(vec![host])
        }
        Err(cause) => Err(failed(cause.to_string())),
    }
}

fn directory_names(domain: &str) -> Vec<String> {
    let mut names = Vec::new();
    if let Some((host, port)) = domain.rsplit_once(':')
        && !port.contains(']')
    {
        names.push(format!("{host}_{port}_"));
        names.push(domain.to_owned());
        names.push(host.to_owned());
    } else {
        names.push(domain.to_owned());
    }
    names.push("_default".to_owned());
    names
}

fn parse(text: &str, domain: &str, directory: &Path) -> Result<Vec<Host>, String> {
    let file: HostsFile = toml::from_str(text).map_err(|cause| cause.to_string())?;
    let mut mirrors: Vec<_> = file.host.into_iter().collect();
    mirrors.sort_by_key(|(url, _)| url.span().start);
    let mut hosts = Vec::new();
    for (url, fields) in mirrors {
        hosts.push(host(url.get_ref(), fields, directory, false)?);
    }
    hosts.push(origin(domain, file.server.as_deref(), file.own, Some(directory)).map_err(|e| e.to_string())?);
    Ok(hosts)
}

fn origin(
    domain: &str,
    server: Option<&str>,
    fields: HostFields,
    directory: Option<&Path>,
) -> Result<Host, ImageError> {
    let domain = if domain == "docker.io" { "registry-1.docker.io" } else { domain };
    host(server.unwrap_or(domain), fields, directory.unwrap_or_else(|| Path::new("")), true)
        .map_err(|reason| ImageError::InvalidReference { reference: domain.to_owned(), reason })
}

fn host(url: &str, fields: HostFields, directory: &Path, origin: bool) -> Result<Host, String> {
    let (given, rest) = match url.split_once("://") {
        Some((scheme, rest)) => (Some(scheme), rest),
        None => (None, url),
    };
    let uri: Uri =
        format!("http://{rest}").parse().map_err(|cause| format!("{url:?} is not a URL: {cause}"))?;
    let authority = uri.authority().cloned().ok_or_else(|| format!("{url:?} names no host"))?;
    if authority.as_str().contains('@') {
        return Err(format!("{url:?} holds credentials; use a header or an image pull secret"));
    }
    let tls = tls_files(&fields, directory)?;
    let scheme = match given {
        Some("http") => Scheme::HTTP,
        Some("https") => Scheme::HTTPS,
        Some(other) => return Err(format!("{url:?} has scheme {other:?}; only http and https are possible")),
        None if is_loopback(authority.host()) && tls == TlsFiles::default() => Scheme::HTTP,
        None => Scheme::HTTPS,
    };
    let path = uri.path().trim_end_matches('/');
    let prefix =
        if fields.override_path || path.ends_with("/v2") { path.to_owned() } else { format!("{path}/v2") };
    let allows = |name: &str| {
        fields.capabilities.as_ref().is_none_or(|given| given.iter().any(|capability| capability == name))
    };
    let dial_timeout = match &fields.dial_timeout {
        Some(text) => duration(text).ok_or_else(|| format!("dial_timeout {text:?} is not a duration"))?,
        None => DIAL_TIMEOUT,
    };
    Ok(Host {
        resolve: allows("resolve"),
        pull: allows("pull"),
        headers: headers(fields.header.unwrap_or_default())?,
        scheme,
        authority,
        prefix,
        tls,
        dial_timeout,
        origin,
    })
}

fn tls_files(fields: &HostFields, directory: &Path) -> Result<TlsFiles, String> {
    let at = |name: &String| directory.join(name);
    let ca = fields.ca.clone().map(OneOrMany::into_vec).unwrap_or_default();
    let pair = |pair: &Vec<String>| match pair.as_slice() {
        [both] => Ok((at(both), at(both))),
        [certificate, key] if key.is_empty() => Ok((at(certificate), at(certificate))),
        [certificate, key] => Ok((at(certificate), at(key))),
        _ => Err("a client entry must be a certificate and its key".to_owned()),
    };
    let client = match &fields.client {
        None => Vec::new(),
        Some(Client::One(both)) => vec![(at(both), at(both))],
        Some(Client::Many(files)) => files.iter().map(|both| (at(both), at(both))).collect(),
        Some(Client::Pairs(pairs)) => pairs.iter().map(pair).collect::<Result<_, _>>()?,
    };
    Ok(TlsFiles { ca: ca.iter().map(at).collect(), client, skip_verify: fields.skip_verify })
}

fn headers(fields: std::collections::BTreeMap<String, OneOrMany>) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, values) in fields {
        let parsed: HeaderName = name.parse().map_err(|_| format!("{name:?} is not a header name"))?;
        for value in values.into_vec() {
            let mut value: HeaderValue =
                value.parse().map_err(|_| format!("the value of header {name:?} is not valid"))?;
            value.set_sensitive(true);
            headers.append(parsed.clone(), value);
        }
    }
    Ok(headers)
}

/// Go's notation, as far as time-outs use it: `30s`, `500ms`, `1m`.
fn duration(text: &str) -> Option<Duration> {
    let split = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text[..split].parse().ok()?;
    match &text[split..] {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        _ => None,
    }
}

fn docker_certificates(directory: &Path) -> std::io::Result<TlsFiles> {
    let mut tls = TlsFiles::default();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => tls.ca.push(path),
            Some("cert") => tls.client.push((path.clone(), path.with_extension("key"))),
            _ => {}
        }
    }
    Ok(tls)
}

/// Whether plain HTTP is acceptable without being asked for.
pub(crate) fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(domain_directory: &str, text: &str) -> tempfile::TempDir {
        let base = tempfile::tempdir().unwrap();
        let directory = base.path().join(domain_directory);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("hosts.toml"), text).unwrap();
        base
    }

    #[test]
    fn without_a_file_the_registry_itself_is_asked() {
        for (domain, url) in [
            ("docker.io", "https://registry-1.docker.io"),
            ("127.0.0.1:5000", "http://127.0.0.1:5000"),
            ("127.8.8.8:5000", "http://127.8.8.8:5000"),
            ("localhost", "http://localhost"),
            ("[::1]:5000", "http://[::1]:5000"),
            ("example.com:80", "https://example.com:80"),
        ] {
            let hosts = hosts_for(None, domain).unwrap();
            assert_eq!(format!("{}://{}", hosts[0].scheme, hosts[0].authority), url);
            assert!(hosts[0].origin && hosts[0].pull && hosts[0].resolve);
            assert_eq!(hosts[0].prefix, "/v2");
        }
    }

    #[test]
    fn mirrors_keep_the_order_of_the_file_and_the_server_comes_last() {
        let base = write(
            "docker.io",
            r#"
server = "https://registry-1.docker.io"
[host."https://z.example"]
capabilities = ["pull"]
skip_verify = true
[host."http://a.example:8080/cache"]
ca = ["a.crt", "/b.crt"]
client = [["c.cert", "c.key"]]
dial_timeout = "5s"
[host."http://a.example:8080/cache".header]
x-key = ["one", "two"]
[host."https://m.example/v2/proxy"]
override_path = true
"#,
        );
        let hosts = hosts_for(Some(base.path()), "docker.io").unwrap();
        let names: Vec<_> = hosts.iter().map(|h| format!("{}{}", h.authority, h.prefix)).collect();
        assert_eq!(
            names,
            ["z.example/v2", "a.example:8080/cache/v2", "m.example/v2/proxy", "registry-1.docker.io/v2"]
        );
        assert!(hosts[0].pull && !hosts[0].resolve && hosts[0].tls.skip_verify);
        let directory = base.path().join("docker.io");
        assert_eq!(hosts[1].tls.ca, [directory.join("a.crt"), PathBuf::from("/b.crt")]);
        assert_eq!(hosts[1].tls.client, [(directory.join("c.cert"), directory.join("c.key"))]);
        assert_eq!(hosts[1].headers.get_all("x-key").iter().count(), 2);
        assert_eq!(hosts[1].dial_timeout, Duration::from_secs(5));
        assert!(hosts[3].origin && !hosts[2].origin);
    }

    #[test]
    fn directories_are_tried_from_the_most_to_the_least_exact() {
        for name in ["reg.example_5000_", "reg.example:5000", "reg.example", "_default"] {
            let base = write(name, "[host.\"http://mirror.example\"]\n");
            let hosts = hosts_for(Some(base.path()), "reg.example:5000").unwrap();
            assert_eq!(hosts[0].authority, "mirror.example", "{name}");
            assert_eq!(hosts[1].authority, "reg.example:5000", "{name}");
        }
    }

    #[test]
    fn mistakes_name_the_file_and_the_reason() {
        for (text, reason) in [
            ("server = 3", "server"),
            ("server = \"ftp://x\"", "ftp"),
            ("[host.\"http://u:p@x\"]", "credentials"),
            ("dial_timeout = \"soon\"", "soon"),
        ] {
            let base = write("x.example", text);
            let error = hosts_for(Some(base.path()), "x.example").unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn dockers_certificate_files_are_understood() {
        let base = tempfile::tempdir().unwrap();
        let directory = base.path().join("127.0.0.1:5000");
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("ca.crt"), "").unwrap();
        let hosts = hosts_for(Some(base.path()), "127.0.0.1:5000").unwrap();
        assert_eq!(hosts[0].tls.ca, [directory.join("ca.crt")]);
        assert_eq!(hosts[0].scheme, Scheme::HTTPS);
    }
}
