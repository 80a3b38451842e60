//! One certificate through the certificates API: make the request, wait for approval, check what comes.
//!
//! A request's name is derived from the key and the purpose, so an attempt repeated with the same key finds its earlier
//! request instead of adding another one.

use super::CertificateError;
use crate::client::Client;
use crate::tls;
use crate::watch::{WatchRequest, wait_for};
use aws_lc_rs::digest::{SHA512_256, digest};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PublicKeyData, SanType};
use serde::Deserialize;
use serde_json::{Value, json};
use std::net::IpAddr;
use std::time::Duration;

const COLLECTION: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
const LONGEST_WAIT: Duration = Duration::from_secs(15 * 60);

/// What a certificate is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Purpose {
    /// The node as a client of the API server.
    Client { node: String },
    /// The kubelet's own HTTPS server.
    Serving { node: String, addresses: Vec<IpAddr>, names: Vec<String> },
}

impl Purpose {
    fn node(&self) -> &str {
        match self {
            Self::Client { node } | Self::Serving { node, .. } => node,
        }
    }

    fn signer(&self) -> &'static str {
        match self {
            Self::Client { .. } => "kubernetes.io/kube-apiserver-client-kubelet",
            Self::Serving { .. } => "kubernetes.io/kubelet-serving",
        }
    }

    /// No key encipherment: our keys are elliptic.
    fn usages(&self) -> [&'static str; 2] {
        match self {
            Self::Client { .. } => ["digital signature", "client auth"],
            Self::Serving { .. } => ["digital signature", "server auth"],
        }
    }

    fn common_name(&self) -> String {
        format!("system:node:{}", self.node())
    }

    /// The request's name for this key.
    pub(super) fn name(&self, key: &KeyPair) -> String {
        let mut text = key.subject_public_key_info();
        text.extend_from_slice(format!("{self:?}|{:?}", self.usages()).as_bytes());
        let prefix = match self {
            Self::Client { .. } => "node-csr-",
            Self::Serving { .. } => "node-serving-",
        };
        format!("{prefix}{}", URL_SAFE_NO_PAD.encode(digest(&SHA512_256, &text).as_ref()))
    }

    fn params(&self) -> Result<CertificateParams, rcgen::Error> {
        let mut params = CertificateParams::default();
        let mut subject = DistinguishedName::new();
        subject.push(DnType::OrganizationName, "system:nodes");
        subject.push(DnType::CommonName, self.common_name());
        params.distinguished_name = subject;
        if let Self::Serving { addresses, names, .. } = self {
            for name in names {
                params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
            }
            params.subject_alt_names.extend(addresses.iter().map(|address| SanType::IpAddress(*address)));
        }
        Ok(params)
    }

    fn object(&self, name: &str, key: &KeyPair) -> Result<Value, CertificateError> {
        let pem = self.params()?.serialize_request(key)?.pem()?;
        Ok(json!({
            "apiVersion": "certificates.k8s.io/v1",
            "kind": "CertificateSigningRequest",
            "metadata": {"name": name},
            "spec": {
                "request": STANDARD.encode(pem),
                "signerName": self.signer(),
                "usages": self.usages(),
            },
        }))
    }
}

#[derive(Debug, Deserialize)]
struct Csr {
    #[serde(default)]
    status: CsrStatus,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CsrStatus {
    certificate: Option<String>,
    conditions: Vec<CsrCondition>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CsrCondition {
    #[serde(rename = "type")]
    kind: String,
    reason: String,
    message: String,
}

/// How a request ended.
enum Verdict {
    Issued(String),
    Denied(CsrCondition),
    Failed(CsrCondition),
}

fn verdict(csr: Csr) -> Option<Verdict> {
    let CsrStatus { certificate, conditions } = csr.status;
    for condition in conditions {
        match condition.kind.as_str() {
            "Denied" => return Some(Verdict::Denied(condition)),
            "Failed" => return Some(Verdict::Failed(condition)),
            _ => {}
        }
    }
    certificate.filter(|text| !text.is_empty()).map(Verdict::Issued)
}

/// Asks for a certificate and waits for it. Gives the chain as PEM; it belongs to `key`.
pub async fn request(client: &Client, purpose: &Purpose, key: &KeyPair) -> Result<String, CertificateError> {
    let name = purpose.name(key);
    let failed = |source| CertificateError::Request { name: name.clone(), source: Box::new(source) };
    match client.create::<_, Value>(COLLECTION, &purpose.object(&name, key)?).await {
        Ok(_) => tracing::info!(request = %name, signer = purpose.signer(), "asked for a certificate"),
        // Ours, from an attempt that was interrupted.
        Err(error) if error.is_conflict() => {}
        Err(error) => return Err(failed(error)),
    }
    let this = WatchRequest {
        path: COLLECTION.to_owned(),
        field_selector: format!("metadata.name={name}"),
        ..WatchRequest::default()
    };
    match wait_for(client, this, LONGEST_WAIT, verdict).await {
        None => Err(CertificateError::Pending { name, waited: LONGEST_WAIT }),
        Some(Verdict::Denied(CsrCondition { reason, message, .. })) => {
            Err(CertificateError::Denied { name, reason, message })
        }
        Some(Verdict::Failed(CsrCondition { reason, message, .. })) => {
            Err(CertificateError::Failed { name, reason, message })
        }
        Some(Verdict::Issued(base64)) => {
            let pem = STANDARD.decode(base64).unwrap_or_default();
            check(&pem, key).map_err(|cause| CertificateError::Issued { name, cause })?;
            Ok(String::from_utf8_lossy(&pem).into_owned())
        }
    }
}

/// The certificate must be one and must belong to our key, or nothing that follows could work.
fn check(pem: &[u8], key: &KeyPair) -> Result<(), tls::TlsError> {
    let chain = tls::certificates(pem)?;
    let key = tls::private_key(key.serialize_pem().as_bytes())?;
    tls::certified(chain, key).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client() -> Purpose {
        Purpose::Client { node: "a".to_owned() }
    }

    #[test]
    fn the_same_key_and_purpose_give_the_same_name() {
        let (one, two) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        assert_eq!(client().name(&one), client().name(&one));
        assert_ne!(client().name(&one), client().name(&two));
        assert_ne!(client().name(&one), Purpose::Client { node: "b".to_owned() }.name(&one));
        assert!(client().name(&one).starts_with("node-csr-"));
    }

    #[test]
    fn a_client_request_names_the_node_and_its_group() {
        let key = KeyPair::generate().unwrap();
        let object = client().object("n", &key).unwrap();
        assert_eq!(object["spec"]["usages"], json!(["digital signature", "client auth"]));
        let pem = STANDARD.decode(object["spec"]["request"].as_str().unwrap()).unwrap();
        let pem = String::from_utf8(pem).unwrap();
        assert!(pem.starts_with("-----BEGIN CERTIFICATE REQUEST-----"), "{pem}");
        use x509_cert::der::DecodePem;
        let request = x509_cert::request::CertReq::from_pem(pem.as_bytes()).unwrap();
        assert_eq!(request.info.subject.to_string(), "CN=system:node:a,O=system:nodes");
    }

    #[test]
    fn a_denied_request_is_not_waited_for_even_if_it_has_a_certificate() {
        let csr = |value| serde_json::from_value::<Csr>(value).unwrap();
        assert!(verdict(csr(json!({}))).is_none());
        assert!(verdict(csr(json!({"status": {"conditions": [{"type": "Approved"}]}}))).is_none());
        let denied = csr(json!({"status": {"certificate": "eA==", "conditions": [{"type": "Denied"}]}}));
        assert!(matches!(verdict(denied), Some(Verdict::Denied(_))));
    }
}
