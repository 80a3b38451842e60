//! How a node gets and keeps its certificates, against a server that signs, denies and forgets.

#![allow(clippy::unwrap_used)]

mod support;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use orlop_api::certificates::{Bootstrap, CertificateStore, Purpose, Rotation, Sink, request};
use rcgen::{CertificateSigningRequestParams, KeyPair};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::{Asked, Authority, Body, FakeServer, kubeconfig, status};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What the signer does with a request.
#[derive(Clone, Copy, PartialEq)]
enum Policy {
    Sign,
    Deny,
    /// Signs certificates that last only this many seconds.
    SignFor(i64),
}

#[derive(Clone)]
struct Signer {
    authority: Arc<Authority>,
    requests: Arc<Mutex<BTreeMap<String, Value>>>,
    policy: Arc<Mutex<Policy>>,
}

impl Signer {
    fn new(policy: Policy) -> Self {
        Self {
            authority: Arc::new(Authority::new("cluster")),
            requests: Arc::default(),
            policy: Arc::new(Mutex::new(policy)),
        }
    }

    async fn serve(&self) -> FakeServer {
        let signer = self.clone();
        FakeServer::tls(&self.authority, &["127.0.0.1"], move |asked| signer.answer(&asked)).await
    }

    fn answer(&self, asked: &Asked) -> http::Response<Body> {
        if asked.token.as_deref() != Some("Bearer boot") && asked.certificate.is_none() {
            return status(401, "Unauthorized", "Unauthorized");
        }
        let mut requests = self.requests.lock().unwrap();
        if asked.method == "POST" {
            let mut object: Value = serde_json::from_str(&asked.body).unwrap();
            let name = object["metadata"]["name"].as_str().unwrap().to_owned();
            if requests.contains_key(&name) {
                return status(409, "AlreadyExists", "there already");
            }
            object["status"] = self.decide(&object["spec"]);
            requests.insert(name, object.clone());
            return support::json(201, object);
        }
        if asked.path.contains("watch=true") {
            return support::text(200, "");
        }
        let items: Vec<_> = requests
            .iter()
            .filter(|(name, _)| asked.path.contains(*name))
            .map(|(_, object)| object)
            .collect();
        support::json(200, json!({"metadata": {"resourceVersion": "1"}, "items": items}))
    }

    fn decide(&self, spec: &Value) -> Value {
        let policy = *self.policy.lock().unwrap();
        if policy == Policy::Deny {
            return json!({"conditions": [{"type": "Denied", "reason": "Policy", "message": "not today"}]});
        }
        let pem = STANDARD.decode(spec["request"].as_str().unwrap()).unwrap();
        let mut csr = CertificateSigningRequestParams::from_pem(&String::from_utf8(pem).unwrap()).unwrap();
        if let Policy::SignFor(seconds) = policy {
            let now = std::time::SystemTime::now();
            csr.params.not_before = now.into();
            csr.params.not_after = (now + Duration::from_secs(seconds.unsigned_abs())).into();
        }
        let certificate = csr.signed_by(&self.authority.issuer()).unwrap().pem();
        json!({"conditions": [{"type": "Approved"}], "certificate": STANDARD.encode(certificate)})
    }

    fn count(&self) -> usize {
        self.requests.lock().unwrap().len()
    }

    fn bootstrap(&self, server: &FakeServer, directory: &Path) -> Bootstrap {
        let cluster = format!("certificate-authority-data: {}", STANDARD.encode(&self.authority.pem));
        let file = directory.join("bootstrap");
        std::fs::write(&file, kubeconfig(&server.url(), &cluster, "{token: boot}")).unwrap();
        Bootstrap {
            node_name: "a".to_owned(),
            kubeconfig: directory.join("kubeconfig"),
            bootstrap_kubeconfig: Some(file),
            cert_dir: directory.join("pki"),
        }
    }
}

#[tokio::test]
async fn a_bootstrap_token_becomes_a_client_certificate_and_a_kubeconfig() {
    let (signer, directory) = (Signer::new(Policy::Sign), tempfile::tempdir().unwrap());
    let server = signer.serve().await;
    let bootstrap = signer.bootstrap(&server, directory.path());
    let client = bootstrap.client().await.unwrap();
    client.get::<Value>("/x").await.unwrap();
    let last = server.asked.lock().unwrap().last().unwrap().clone();
    assert!(last.certificate.is_some() && last.token.is_none());
    let text = std::fs::read_to_string(&bootstrap.kubeconfig).unwrap();
    assert!(text.contains("kubelet-client-current.pem") && !text.contains("boot"), "{text}");
    assert!(!bootstrap.cert_dir.join("kubelet-client.key.tmp").exists());

    // The next start finds everything.
    let again = Bootstrap { bootstrap_kubeconfig: None, ..bootstrap.clone() };
    again.client().await.unwrap().get::<Value>("/x").await.unwrap();
    assert_eq!(signer.count(), 1);

    // Lost certificates are asked for again.
    std::fs::remove_dir_all(&bootstrap.cert_dir).unwrap();
    bootstrap.client().await.unwrap().get::<Value>("/x").await.unwrap();
    assert_eq!(signer.count(), 2);
}

#[tokio::test]
async fn an_interrupted_attempt_finds_its_own_request_again() {
    let (signer, directory) = (Signer::new(Policy::Sign), tempfile::tempdir().unwrap());
    let server = signer.serve().await;
    let bootstrap = signer.bootstrap(&server, directory.path());
    let store = CertificateStore::client(&bootstrap.cert_dir);
    let key = store.pending_key().unwrap();
    let early =
        orlop_api::Client::from_kubeconfig(bootstrap.bootstrap_kubeconfig.as_deref().unwrap()).unwrap();
    request(&early, &Purpose::Client { node: "a".to_owned() }, &key).await.unwrap();
    // Here the agent dies before the certificate is stored.
    bootstrap.client().await.unwrap();
    assert_eq!(signer.count(), 1);
}

#[tokio::test]
async fn a_denial_is_told_with_the_reason() {
    let (signer, directory) = (Signer::new(Policy::Deny), tempfile::tempdir().unwrap());
    let server = signer.serve().await;
    let bootstrap = signer.bootstrap(&server, directory.path());
    let client =
        orlop_api::Client::from_kubeconfig(bootstrap.bootstrap_kubeconfig.as_deref().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let error = request(&client, &Purpose::Client { node: "a".to_owned() }, &key).await.unwrap_err();
    assert!(error.to_string().contains("was denied: Policy not today"), "{error}");
}

#[tokio::test]
async fn without_a_bootstrap_kubeconfig_the_reason_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let bootstrap = Bootstrap {
        node_name: "a".to_owned(),
        kubeconfig: directory.path().join("kubeconfig"),
        bootstrap_kubeconfig: None,
        cert_dir: directory.path().join("pki"),
    };
    let text = bootstrap.client().await.unwrap_err().to_string();
    assert!(text.contains("does not exist") && text.contains("--bootstrap-kubeconfig"), "{text}");
    std::fs::write(&bootstrap.kubeconfig, "clusters: [").unwrap();
    let text = bootstrap.client().await.unwrap_err().to_string();
    assert!(text.contains("not valid YAML"), "{text}");
}

#[tokio::test]
async fn a_certificate_is_rotated_and_used_without_a_restart() {
    let (signer, directory) = (Signer::new(Policy::SignFor(3)), tempfile::tempdir().unwrap());
    let server = signer.serve().await;
    let bootstrap = signer.bootstrap(&server, directory.path());
    let client = bootstrap.client().await.unwrap();
    let first = client.credentials().certificate().unwrap();
    *signer.policy.lock().unwrap() = Policy::Sign;
    let (_purpose, receiver) = watch::channel(Purpose::Client { node: "a".to_owned() });
    let rotation = Rotation {
        client: client.clone(),
        store: CertificateStore::client(&bootstrap.cert_dir),
        purpose: receiver,
        sink: Sink::Client,
        bootstrap_kubeconfig: bootstrap.bootstrap_kubeconfig.clone(),
    };
    let stop = CancellationToken::new();
    let task = tokio::spawn(rotation.run(stop.clone()));
    let deadline = tokio::time::Instant::now() + Duration::from_secs(6);
    while client.credentials().certificate().unwrap().cert == first.cert {
        assert!(tokio::time::Instant::now() < deadline, "not rotated");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    client.get::<Value>("/x").await.unwrap();
    assert_eq!(signer.count(), 2);
    stop.cancel();
    task.await.unwrap();
}

#[tokio::test]
async fn an_expired_certificate_falls_back_to_the_bootstrap_token() {
    let (signer, directory) = (Signer::new(Policy::SignFor(1)), tempfile::tempdir().unwrap());
    let server = signer.serve().await;
    let bootstrap = signer.bootstrap(&server, directory.path());
    bootstrap.client().await.unwrap();
    tokio::time::sleep(Duration::from_millis(2100)).await;
    *signer.policy.lock().unwrap() = Policy::Sign;
    bootstrap.client().await.unwrap().get::<Value>("/x").await.unwrap();
    assert_eq!(signer.count(), 2);
}

#[tokio::test]
async fn a_serving_certificate_follows_the_nodes_addresses() {
    let (signer, directory) = (Signer::new(Policy::Sign), tempfile::tempdir().unwrap());
    let server = signer.serve().await;
    let client = signer.bootstrap(&server, directory.path()).client().await.unwrap();
    let slot = orlop_api::credentials::CertificateSlot::new(None);
    let purpose = |address: [u8; 4]| Purpose::Serving {
        node: "a".to_owned(),
        addresses: vec![address.into()],
        names: vec!["a".to_owned()],
    };
    let (change, receiver) = watch::channel(purpose([10, 0, 0, 1]));
    let store = CertificateStore::serving(directory.path());
    let rotation = Rotation {
        client,
        store: store.clone(),
        purpose: receiver,
        sink: Sink::Server(Arc::clone(&slot)),
        bootstrap_kubeconfig: None,
    };
    let stop = CancellationToken::new();
    let task = tokio::spawn(rotation.run(stop.clone()));
    for address in [[10, 0, 0, 1], [10, 0, 0, 2]] {
        change.send_replace(purpose(address));
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        loop {
            let addresses = store.current().unwrap().map(|pair| pair.addresses).unwrap_or_default();
            if slot.get().is_some() && addresses == [std::net::IpAddr::from(address)] {
                break;
            }
            assert!(tokio::time::Instant::now() < deadline, "{address:?} is not in the certificate");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    stop.cancel();
    task.await.unwrap();
}
