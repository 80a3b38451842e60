//! Every broken kubeconfig must be refused with the file, the key, the cause and what to do.

#![allow(clippy::unwrap_used)]

mod support;

use orlop_api::ServerConfig;
use std::path::Path;
use support::{Authority, kubeconfig};

fn refusal(text: &str) -> String {
    ServerConfig::parse(Path::new("/etc/k/config"), text).unwrap_err().to_string()
}

fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is missing in: {text}");
    }
}

#[test]
fn a_missing_file_is_named_with_the_flag_to_correct() {
    let error = ServerConfig::load(Path::new("/nowhere/config")).unwrap_err().to_string();
    assert_says(&error, &["/nowhere/config", "No such file", "--kubeconfig"]);
}

#[test]
fn broken_yaml_names_the_place() {
    assert_says(&refusal("clusters: [\nusers: 3"), &["/etc/k/config", "not valid YAML", "line"]);
    assert_says(&refusal(""), &["/etc/k/config", "empty"]);
    assert_says(&refusal("clusters: {}"), &["/etc/k/config", "not valid YAML"]);
}

#[test]
fn a_missing_context_lists_those_there_are() {
    let text = kubeconfig("https://a:6443", "", "{}").replace("current-context: x", "current-context: y");
    assert_says(&refusal(&text), &["current-context", "no context `y`", "name one of", "x"]);
    assert_says(&refusal("apiVersion: v1"), &["current-context", "missing", "`contexts` is empty"]);
}

#[test]
fn a_context_that_leads_nowhere_is_refused() {
    let good = kubeconfig("https://a:6443", "", "{}");
    assert_says(
        &refusal(&good.replace("cluster: c,", "cluster: d,")),
        &["contexts[x].context.cluster", "no cluster `d`"],
    );
    assert_says(
        &refusal(&good.replace("user: u}", "user: w}")),
        &["contexts[x].context.user", "no user `w`"],
    );
}

#[test]
fn an_address_must_be_complete() {
    for server in ["a:6443", "ftp://a", "''"] {
        assert_says(
            &refusal(&kubeconfig(server, "", "{}")),
            &["clusters[c].cluster.server", "https://HOST:PORT"],
        );
    }
}

#[test]
fn proxies_plugins_and_passwords_are_refused_by_name() {
    let proxy = kubeconfig("https://a", "proxy-url: http://p:3128", "{}");
    assert_says(&refusal(&proxy), &["clusters[c].cluster.proxy-url", "not supported"]);
    for (key, user) in [
        ("exec", "{exec: {command: x}}"),
        ("username", "{username: a, password: b}"),
        ("auth-provider", "{auth-provider: {name: x}}"),
    ] {
        assert_says(
            &refusal(&kubeconfig("https://a", "", user)),
            &[&format!("users[u].user.{key}"), "not supported", "token"],
        );
    }
}

#[test]
fn unreadable_and_wrong_certificates_are_told_apart() {
    let ca = |value: &str| refusal(&kubeconfig("https://a", value, "{}"));
    assert_says(
        &ca("certificate-authority: ca.pem"),
        &["certificate-authority", "/etc/k/ca.pem", "No such file"],
    );
    assert_says(&ca("certificate-authority-data: '***'"), &["certificate-authority-data", "base64"]);
    assert_says(
        &ca("certificate-authority-data: bm8gcGVt"),
        &["certificate-authority-data", "no PEM certificate"],
    );
    let both = "insecure-skip-tls-verify: true\n    certificate-authority-data: bm8gcGVt";
    assert_says(&ca(both), &["insecure-skip-tls-verify", "contradicts"]);
}

#[test]
fn a_key_must_be_there_and_belong_to_the_certificate() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new("ca");
    let ((certificate, key), (_, other)) = (authority.issue(&["a"]), authority.issue(&["b"]));
    let file = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let certificate = file("cert.pem", &certificate);
    let (key, other) = (file("key.pem", &key.serialize_pem()), file("other.pem", &other.serialize_pem()));
    let user =
        |key: &str| kubeconfig("https://a", "", &format!("{{client-certificate: {certificate}{key}}}"));
    assert_says(&refusal(&user("")), &["users[u].user.client-key", "missing"]);
    assert_says(&refusal(&user(&format!(", client-key: {other}"))), &["client-key", "does not belong"]);
    assert_says(
        &refusal(&user(&format!(", client-key: {certificate}"))),
        &["client-key", "no PEM private key"],
    );
    ServerConfig::parse(Path::new("/x"), &user(&format!(", client-key: {key}"))).unwrap();
}

#[test]
fn paths_are_relative_to_the_file() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("ca.pem"), Authority::new("ca").pem).unwrap();
    std::fs::write(directory.path().join("token"), "t").unwrap();
    let text = kubeconfig("https://a", "certificate-authority: ca.pem", "{tokenFile: token}");
    let file = directory.path().join("config");
    std::fs::write(&file, text).unwrap();
    assert_eq!(ServerConfig::load(&file).unwrap().server(), "https://a");
}

#[test]
fn json_is_yaml_too_and_one_context_needs_no_choice() {
    let text = r#"{"clusters":[{"name":"c","cluster":{"server":"https://a"}}],"contexts":[{"name":"x","context":{"cluster":"c","user":""}}]}"#;
    ServerConfig::parse(Path::new("/x"), text).unwrap();
}
