//! The lab's certificates: one authority, and what it signs for the control plane and for people.

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// A certificate and its key, as files.
#[derive(Debug, Clone)]
pub struct Identity {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// A certificate authority that lives in a folder.
#[derive(Debug)]
pub struct Authority {
    folder: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    pub fn create(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "orlop lab");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let authority = Self { folder: folder.to_owned(), issuer };
        std::fs::write(authority.certificate(), authority.issuer.pem())?;
        std::fs::write(authority.key(), authority.issuer.key().serialize_pem())?;
        Ok(authority)
    }

    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.folder.join("ca.crt")
    }

    #[must_use]
    pub fn key(&self) -> PathBuf {
        self.folder.join("ca.key")
    }

    pub fn certificate_pem(&self) -> String {
        self.issuer.pem()
    }

    /// A client identity: common name is the user, organisations are the groups.
    pub fn client(&self, file: &str, user: &str, groups: &[&str]) -> Result<Identity> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, user);
        for group in groups {
            params.distinguished_name.push(DnType::OrganizationName, *group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(file, params)
    }

    pub fn server(&self, file: &str, names: &[&str], addresses: &[IpAddr]) -> Result<Identity> {
        let mut params = CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>())?;
        params.distinguished_name.push(DnType::CommonName, file);
        params.subject_alt_names.extend(addresses.iter().map(|a| SanType::IpAddress(*a)));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(file, params)
    }

    fn sign(&self, file: &str, params: CertificateParams) -> Result<Identity> {
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        let identity = Identity {
            certificate: self.folder.join(format!("{file}.crt")),
            key: self.folder.join(format!("{file}.key")),
        };
        std::fs::write(&identity.certificate, certificate.pem())?;
        std::fs::write(&identity.key, key.serialize_pem())?;
        Ok(identity)
    }
}

/// Writes a kubeconfig that uses a client identity.
pub fn kubeconfig(path: &Path, server: &str, authority: &Authority, identity: &Identity) -> Result<()> {
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
         clusters:\n- name: lab\n  cluster:\n    server: {server}\n    certificate-authority: {}\n\
         contexts:\n- name: lab\n  context: {{cluster: lab, user: lab}}\n\
         users:\n- name: lab\n  user:\n    client-certificate: {}\n    client-key: {}\n",
        authority.certificate().display(),
        identity.certificate.display(),
        identity.key.display()
    );
    std::fs::write(path, text)?;
    Ok(())
}

/// Writes a kubeconfig that holds a bearer token and the authority inline, as a bootstrap kubeconfig does.
pub fn token_kubeconfig(path: &Path, server: &str, authority_pem: &str, token: &str) -> Result<()> {
    use base64::Engine;
    let data = base64::engine::general_purpose::STANDARD.encode(authority_pem);
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: lab\n\
         clusters:\n- name: lab\n  cluster:\n    server: {server}\n    certificate-authority-data: {data}\n\
         contexts:\n- name: lab\n  context: {{cluster: lab, user: lab}}\n\
         users:\n- name: lab\n  user:\n    token: {token}\n"
    );
    std::fs::write(path, text)?;
    Ok(())
}
