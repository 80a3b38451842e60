//! Certificates with their keys in files: `<name>-<date>.pem` holds the chain and the key, `<name>-current.pem` is a symbolic
//! link to the one in use, `<name>.key.tmp` the key of a request that is under way.
//!
//! Invariant: the link always leads to a complete pair; it is replaced by renaming.

use super::CertificateError;
use crate::credentials::{PairError, read_pair};
use jiff::Timestamp;
use rcgen::KeyPair;
use rustls::sign::CertifiedKey;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

/// The one in use and the one before, for whoever has just opened it.
const KEPT: usize = 2;

/// The files of one certificate.
#[derive(Debug, Clone)]
pub struct CertificateStore {
    directory: PathBuf,
    name: &'static str,
}

/// A certificate in use.
#[derive(Debug, Clone)]
pub struct Pair {
    pub certified: Arc<CertifiedKey>,
    pub not_before: Timestamp,
    pub not_after: Timestamp,
    /// The names and addresses in it.
    pub names: Vec<String>,
    pub addresses: Vec<IpAddr>,
}

impl CertificateStore {
    #[must_use]
    pub fn client(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), name: "kubelet-client" }
    }

    #[must_use]
    pub fn serving(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), name: "kubelet-server" }
    }

    /// The link to the pair in use.
    #[must_use]
    pub fn current_path(&self) -> PathBuf {
        self.directory.join(format!("{}-current.pem", self.name))
    }

    fn pending_path(&self) -> PathBuf {
        self.directory.join(format!("{}.key.tmp", self.name))
    }

    /// The pair in use; none if there never was one.
    pub fn current(&self) -> Result<Option<Pair>, CertificateError> {
        let path = self.current_path();
        match read_pair(&path, &path) {
            Ok(certified) => Pair::new(certified)
                .map(Some)
                .map_err(|cause| CertificateError::Content { file: path, cause: cause.to_string() }),
            Err(PairError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The key of a request under way, or a new one. It is on disk before anybody hears of it.
    pub fn pending_key(&self) -> Result<KeyPair, CertificateError> {
        let path = self.pending_path();
        match fs::read_to_string(&path).map(|text| KeyPair::from_pem(&text)) {
            Ok(Ok(key)) => return Ok(key),
            Ok(Err(error)) => {
                tracing::warn!(file = %path.display(), %error, "key of an earlier request is not usable, making a new one");
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(CertificateError::File { verb: "read", file: path, source }),
        }
        let key = KeyPair::generate()?;
        fs::create_dir_all(&self.directory)
            .and_then(|()| write_durably(&path, key.serialize_pem().as_bytes()))
            .map_err(|source| CertificateError::File { verb: "write", file: path, source })?;
        Ok(key)
    }

    /// Forgets the key of a request that came to nothing.
    pub fn forget_pending(&self) -> Result<(), CertificateError> {
        let path = self.pending_path();
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(CertificateError::File { verb: "remove", file: path, source: error })
            }
            _ => Ok(()),
        }
    }

    /// Puts a new pair into use.
    pub fn store(&self, chain: &str, key: &KeyPair, now: Timestamp) -> Result<Pair, CertificateError> {
        let file_name = format!("{}-{}.pem", self.name, now.strftime("%Y-%m-%d-%H-%M-%S"));
        let file = self.directory.join(&file_name);
        let wrap = |verb, file: &Path| {
            let file = file.to_owned();
            move |source| CertificateError::File { verb, file, source }
        };
        let text = format!("{}\n{}", chain.trim_end(), key.serialize_pem());
        write_durably(&file, text.as_bytes()).map_err(wrap("write", &file))?;
        let (link, fresh) =
            (self.current_path(), self.directory.join(format!("{}-current.pem.new", self.name)));
        let linked = remove_if_there(&fresh)
            .and_then(|()| symlink(&file_name, &fresh))
            .and_then(|()| fs::rename(&fresh, &link))
            .and_then(|()| sync_directory(&self.directory));
        linked.map_err(wrap("link", &link))?;
        self.forget_pending()?;
        self.prune();
        let certified = read_pair(&file, &file)?;
        Pair::new(certified).map_err(|cause| CertificateError::Content { file, cause: cause.to_string() })
    }

    /// Removes pairs that are no longer used. Leaving one behind harms nobody.
    fn prune(&self) {
        let Ok(entries) = fs::read_dir(&self.directory) else { return };
        let dated = |name: &str| {
            name.strip_prefix(self.name)
                .and_then(|rest| rest.strip_prefix('-'))
                .and_then(|rest| rest.strip_suffix(".pem"))
                .is_some_and(|date| date.bytes().all(|b| b.is_ascii_digit() || b == b'-'))
        };
        let mut names: Vec<_> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| dated(name))
            .collect();
        // Dates sort as they follow each other.
        names.sort();
        for old in names.iter().rev().skip(KEPT) {
            if let Err(error) = fs::remove_file(self.directory.join(old)) {
                tracing::debug!(file = %old, %error, "cannot remove a certificate that is no longer used");
            }
        }
    }
}

impl Pair {
    /// Looks into a certificate.
    pub fn new(certified: Arc<CertifiedKey>) -> Result<Self, x509_cert::der::Error> {
        let leaf = certified.cert.first().map(AsRef::as_ref).unwrap_or_default();
        let parsed = Certificate::from_der(leaf)?;
        let body = parsed.tbs_certificate();
        let at = |time: &x509_cert::time::Time| {
            let seconds = i64::try_from(time.to_unix_duration().as_secs()).unwrap_or(i64::MAX);
            Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX)
        };
        let (mut names, mut addresses) = (Vec::new(), Vec::new());
        if let Some((_, SubjectAltName(alternatives))) = body.get_extension::<SubjectAltName>()? {
            for alternative in alternatives {
                match alternative {
                    GeneralName::DnsName(name) => names.push(name.to_string()),
                    GeneralName::IpAddress(octets) => addresses.extend(ip(octets.as_bytes())),
                    _ => {}
                }
            }
        }
        let (not_before, not_after) = (at(&body.validity().not_before), at(&body.validity().not_after));
        Ok(Self { certified, not_before, not_after, names, addresses })
    }

    #[must_use]
    pub fn is_expired(&self, now: Timestamp) -> bool {
        now >= self.not_after
    }
}

fn ip(octets: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(octets)
        .map(IpAddr::from)
        .or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from))
        .ok()
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Writes a file that only we may read, complete or not at all.
pub(super) fn write_durably(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    remove_if_there(&temporary)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    path.parent().map_or(Ok(()), sync_directory)
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::CertificateParams;
    use std::os::unix::fs::PermissionsExt;

    fn chain(key: &KeyPair) -> String {
        CertificateParams::new(["node.example".to_owned(), "10.0.0.1".to_owned()])
            .unwrap()
            .self_signed(key)
            .unwrap()
            .pem()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    #[test]
    fn a_stored_pair_is_the_current_one_and_only_ours_to_read() {
        let directory = tempfile::tempdir().unwrap();
        let store = CertificateStore::serving(directory.path());
        assert!(store.current().unwrap().is_none());
        let key = store.pending_key().unwrap();
        store.store(&chain(&key), &key, at(0)).unwrap();
        let pair = store.current().unwrap().unwrap();
        assert_eq!(pair.names, ["node.example"]);
        assert_eq!(pair.addresses, [IpAddr::from([10, 0, 0, 1])]);
        let mode = fs::metadata(store.current_path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(fs::symlink_metadata(store.current_path()).unwrap().is_symlink());
    }

    #[test]
    fn the_key_of_an_interrupted_request_is_used_again_until_it_is_stored() {
        let directory = tempfile::tempdir().unwrap();
        let store = CertificateStore::client(directory.path());
        let key = store.pending_key().unwrap();
        let again = store.pending_key().unwrap();
        assert_eq!(key.public_key_raw(), again.public_key_raw());
        store.store(&chain(&key), &key, at(0)).unwrap();
        assert_ne!(store.pending_key().unwrap().public_key_raw(), key.public_key_raw());
    }

    #[test]
    fn only_the_last_two_pairs_stay() {
        let directory = tempfile::tempdir().unwrap();
        let store = CertificateStore::client(directory.path());
        for second in 0..5 {
            let key = store.pending_key().unwrap();
            store.store(&chain(&key), &key, at(second)).unwrap();
        }
        let count = fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(count, KEPT + 1, "two pairs and the link");
        assert!(store.current().unwrap().is_some());
    }

    #[test]
    fn a_broken_pending_key_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let store = CertificateStore::client(directory.path());
        fs::write(store.pending_path(), "half a k").unwrap();
        store.pending_key().unwrap();
        assert!(fs::read_to_string(store.pending_path()).unwrap().contains("PRIVATE KEY"));
    }
}
