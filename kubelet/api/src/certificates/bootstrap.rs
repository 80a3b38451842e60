//! How a node gets its identity: a kubeconfig that works, or else a certificate asked for with the bootstrap token.

use super::rotation::obtain;
use super::store::{CertificateStore, Pair, write_durably};
use super::{CertificateError, Purpose};
use crate::backoff::{Backoff, chance};
use crate::client::Client;
use crate::kubeconfig::ServerConfig;
use crate::tls::Trust;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where a node's identity comes from and goes to.
#[derive(Debug, Clone)]
pub struct Bootstrap {
    pub node_name: String,
    /// Used if it works; written otherwise.
    pub kubeconfig: PathBuf,
    pub bootstrap_kubeconfig: Option<PathBuf>,
    pub cert_dir: PathBuf,
}

impl Bootstrap {
    /// A client with the node's own identity. Waits for the API server and for approval as long as it takes, telling the
    /// log why; fails only when a person must change something on this node first.
    pub async fn client(&self) -> Result<Client, CertificateError> {
        let Some(problem) = self.kubeconfig_problem()? else {
            return Ok(Client::from_kubeconfig(&self.kubeconfig)?);
        };
        let Some(bootstrap) = &self.bootstrap_kubeconfig else {
            return Err(CertificateError::NoBootstrap { problem });
        };
        tracing::info!(%problem, "asking for a client certificate with the bootstrap token");
        let mut backoff = Backoff::default();
        loop {
            match self.attempt(bootstrap).await {
                Ok(client) => return Ok(client),
                Err(error @ (CertificateError::File { .. } | CertificateError::Client(_))) => {
                    return Err(error);
                }
                Err(error) => {
                    let delay = match error {
                        CertificateError::Denied { .. } | CertificateError::Failed { .. } => {
                            Duration::from_secs(60)
                        }
                        _ => backoff.next(chance()),
                    };
                    tracing::warn!(%error, delay_ms = delay.as_millis(), "no client certificate yet, trying again");
                    tokio::time::sleep(delay).await;
                }
            }
        }
    }

    /// Why the kubeconfig cannot be used; none if it can. A file that is there but broken is an error: overwriting what a
    /// person wrote would help nobody.
    fn kubeconfig_problem(&self) -> Result<Option<String>, CertificateError> {
        let shown = self.kubeconfig.display();
        match std::fs::metadata(&self.kubeconfig) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Some(format!("kubeconfig {shown} does not exist")));
            }
            // Loading it says what is wrong.
            _ => {}
        }
        let config = match ServerConfig::load(&self.kubeconfig) {
            Ok(config) => config,
            // The kubeconfig that we wrote ourselves, but the certificate directory has been emptied since.
            Err(error) if self.refers_to_lost_certificate() => return Ok(Some(error.to_string())),
            Err(error) => return Err(error.into()),
        };
        let Some(certified) = config.credentials().certificate() else { return Ok(None) };
        let pair = Pair::new(certified).map_err(|error| CertificateError::Content {
            file: self.kubeconfig.clone(),
            cause: error.to_string(),
        })?;
        if self.bootstrap_kubeconfig.is_some() && pair.is_expired(Timestamp::now()) {
            return Ok(Some(format!(
                "the client certificate in kubeconfig {shown} expired on {}",
                pair.not_after
            )));
        }
        Ok(None)
    }

    fn refers_to_lost_certificate(&self) -> bool {
        let current = CertificateStore::client(&self.cert_dir).current_path();
        !current.exists()
            && std::fs::read_to_string(&self.kubeconfig)
                .is_ok_and(|text| text.contains(&current.display().to_string()))
    }

    /// The bootstrap kubeconfig is read again for each attempt: a person may have put a fresh token there.
    async fn attempt(&self, bootstrap: &Path) -> Result<Client, CertificateError> {
        let config = ServerConfig::load(bootstrap)?;
        let store = CertificateStore::client(&self.cert_dir);
        let purpose = Purpose::Client { node: self.node_name.clone() };
        obtain(&Client::new(config.clone())?, &store, &purpose).await?;
        let text = kubeconfig_text(&config, &store.current_path());
        let wrap = |source| CertificateError::File { verb: "write", file: self.kubeconfig.clone(), source };
        if let Some(parent) = self.kubeconfig.parent() {
            std::fs::create_dir_all(parent).map_err(wrap)?;
        }
        write_durably(&self.kubeconfig, text.as_bytes()).map_err(wrap)?;
        Ok(Client::from_kubeconfig(&self.kubeconfig)?)
    }
}

/// A kubeconfig for the same server as another one, with the identity in a file.
fn kubeconfig_text(config: &ServerConfig, pair: &Path) -> String {
    // A JSON string is a YAML string.
    let quote = |text: &str| serde_json::Value::from(text).to_string();
    let mut cluster = format!("    server: {}\n", quote(&config.endpoint.url));
    match &config.trust {
        Trust::Authorities { roots, .. } => {
            let pem: String = roots
                .iter()
                .map(|root| {
                    let body = STANDARD.encode(root);
                    format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")
                })
                .collect();
            cluster.push_str(&format!("    certificate-authority-data: {}\n", STANDARD.encode(pem)));
        }
        Trust::Anyone => cluster.push_str("    insecure-skip-tls-verify: true\n"),
        Trust::System => {}
    }
    if let Some(name) = &config.tls_server_name {
        cluster.push_str(&format!("    tls-server-name: {}\n", quote(name)));
    }
    let pair = quote(&pair.display().to_string());
    format!(
        "apiVersion: v1\nkind: Config\nclusters:\n- name: default-cluster\n  cluster:\n{cluster}\
         users:\n- name: default-auth\n  user:\n    client-certificate: {pair}\n    client-key: {pair}\n\
         contexts:\n- name: default-context\n  context:\n    cluster: default-cluster\n    user: default-auth\n\
         current-context: default-context\n"
    )
}
