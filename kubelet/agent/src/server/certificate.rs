//! The certificate that :10250 shows: the operator's files, one the cluster signs, or one of our own making.

use crate::config::Config;
use crate::shutdown::Shutdown;
use orlop_api::Client;
use orlop_api::certificates::{CertificateStore, Purpose, Rotation, Sink};
use orlop_api::credentials::{CertificateSlot, read_pair};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, SanType};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::watch;

#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("cannot read the serving certificate {certificate} and its key {key}: {cause}")]
    Read { certificate: PathBuf, key: PathBuf, cause: String },
    #[error("cannot make a self-signed serving certificate in {folder}: {cause}")]
    SelfSigned { folder: PathBuf, cause: String },
    #[error(
        "serverTLSBootstrap needs an API server that signs the certificate; give a kubeconfig or turn it off"
    )]
    NobodyToSign,
}

/// Finds or makes the certificate. One that the cluster signs arrives later and is renewed in the background; until it
/// is there, handshakes fail.
pub fn serving_certificate(
    config: &Config,
    api: Option<&Client>,
    addresses: Vec<IpAddr>,
    shutdown: &Shutdown,
) -> Result<Arc<CertificateSlot>, CertificateError> {
    let raw = &config.raw;
    if !raw.tls_cert_file.is_empty() {
        return from_files(Path::new(&raw.tls_cert_file), Path::new(&raw.tls_private_key_file));
    }
    if raw.server_tls_bootstrap {
        let client = api.ok_or(CertificateError::NobodyToSign)?.clone();
        let slot = CertificateSlot::new(None);
        let names = vec![config.hostname.clone()];
        let purpose = Purpose::Serving { node: config.node_name.clone(), addresses, names };
        let rotation = Rotation {
            client,
            store: CertificateStore::serving(&config.cert_dir),
            purpose: watch::Sender::new(purpose).subscribe(),
            sink: Sink::Server(slot.clone()),
            bootstrap_kubeconfig: None,
        };
        tokio::spawn(rotation.run(shutdown.token()));
        return Ok(slot);
    }
    let (certificate, key) = (config.cert_dir.join("kubelet.crt"), config.cert_dir.join("kubelet.key"));
    if let Ok(slot) = from_files(&certificate, &key) {
        return Ok(slot);
    }
    self_signed(config, &addresses, &certificate, &key)
        .map_err(|cause| CertificateError::SelfSigned { folder: config.cert_dir.clone(), cause })?;
    from_files(&certificate, &key)
}

fn from_files(certificate: &Path, key: &Path) -> Result<Arc<CertificateSlot>, CertificateError> {
    let pair = read_pair(certificate, key).map_err(|error| CertificateError::Read {
        certificate: certificate.to_owned(),
        key: key.to_owned(),
        cause: error.to_string(),
    })?;
    Ok(CertificateSlot::new(Some(pair)))
}

fn self_signed(config: &Config, addresses: &[IpAddr], certificate: &Path, key: &Path) -> Result<(), String> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut params = CertificateParams::new(vec![config.hostname.clone()]).map_err(|e| e.to_string())?;
    params.distinguished_name.push(DnType::CommonName, format!("{}@orlop", config.node_name));
    params.subject_alt_names.extend(addresses.iter().map(|address| SanType::IpAddress(*address)));
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let pair = KeyPair::generate().map_err(|e| e.to_string())?;
    let signed = params.self_signed(&pair).map_err(|e| e.to_string())?;
    let write = |path: &Path, mode: u32, text: &str| -> std::io::Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(mode).open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    // The key first: a certificate without its key would be taken for a whole pair.
    write(key, 0o600, &pair.serialize_pem()).map_err(|e| e.to_string())?;
    write(certificate, 0o644, &signed.pem()).map_err(|e| e.to_string())
}
