//! The API's pods of this node as last known, so that a kubelet that starts while the API server is away can run on.
//!
//! `<root>/pods/<uid>/pod.json`, readable for nobody else: the object with the status last computed. It lives and goes
//! with the pod's directory. What it says holds until the API server's first list; then that wins. Contents of
//! ConfigMaps and Secrets are not in it.

use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};
use std::fs::{DirEntry, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::watch;

const VERSION: u32 = 1;
const FILE: &str = "pod.json";

#[derive(Deserialize)]
struct Read {
    version: u32,
    pod: Pod,
}

#[derive(Serialize)]
struct Written<'a> {
    version: u32,
    pod: &'a Pod,
}

/// Why a remembered pod cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("cannot read {path}: {source}")]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{path} is not a remembered pod: {source}")]
    Malformed { path: PathBuf, source: serde_json::Error },
    #[error("{path} has version {version}, and only version {VERSION} is known here")]
    Version { path: PathBuf, version: u32 },
    #[error("{path} tells of pod {uid:?}, which is not the pod of its directory")]
    Misplaced { path: PathBuf, uid: String },
}

/// All pods that can be remembered. One that cannot concerns no other.
#[must_use]
pub fn recall(root: &Path) -> (Vec<Pod>, Vec<MemoryError>) {
    let entries = std::fs::read_dir(root.join("pods")).into_iter().flatten().flatten();
    let (mut pods, mut problems) = (Vec::new(), Vec::new());
    for found in entries.filter_map(|entry| recall_one(&entry).transpose()) {
        match found {
            Ok(pod) => pods.push(pod),
            Err(problem) => problems.push(problem),
        }
    }
    (pods, problems)
}

fn recall_one(entry: &DirEntry) -> Result<Option<Pod>, MemoryError> {
    let path = entry.path().join(FILE);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(source) => return Err(MemoryError::Unreadable { path, source }),
    };
    let Read { version, pod } = match serde_json::from_slice(&bytes) {
        Ok(read) => read,
        Err(source) => return Err(MemoryError::Malformed { path, source }),
    };
    if version != VERSION {
        return Err(MemoryError::Version { path, version });
    }
    let uid = pod.metadata.uid.clone().unwrap_or_default();
    if entry.file_name().to_str() != Some(&uid) || pod.spec.is_none() {
        return Err(MemoryError::Misplaced { path, uid });
    }
    Ok(Some(pod))
}

/// Replaces the file in one step. The directory must exist: a memory must not bring back what was removed.
fn save(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("json.new");
    let mut out = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    out.write_all(bytes)?;
    out.sync_all()?;
    std::fs::rename(&temporary, path)
}

/// One pod's place in the memory. Writing is done by a task of its own: only the newest is written, and nobody waits.
#[derive(Debug)]
pub struct Place(watch::Sender<Option<Arc<Pod>>>);

impl Place {
    /// Must be called within a tokio runtime.
    #[must_use]
    pub fn of(root: &Path, uid: &str) -> Self {
        let (sender, receiver) = watch::channel(None);
        tokio::spawn(keep(root.join("pods").join(uid).join(FILE), receiver));
        Self(sender)
    }

    pub fn put(&self, pod: Arc<Pod>) {
        self.0.send_replace(Some(pod));
    }
}

async fn keep(path: PathBuf, mut newest: watch::Receiver<Option<Arc<Pod>>>) {
    let mut written = Vec::new();
    let mut told = false;
    while newest.changed().await.is_ok() {
        let Some(pod) = newest.borrow_and_update().clone() else { continue };
        let bytes = match bytes_of(&pod) {
            Ok(bytes) if bytes != written => bytes,
            Ok(_) => continue,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "pod cannot be written down");
                continue;
            }
        };
        let work = {
            let (path, bytes) = (path.clone(), bytes.clone());
            tokio::task::spawn_blocking(move || save(&path, &bytes))
        };
        match work.await {
            Ok(Ok(())) => {
                written = bytes;
                told = false;
            }
            // The pod's directory is not there yet, or not any more.
            Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(Err(error)) if !told => {
                told = true;
                tracing::warn!(path = %path.display(), %error, "pod not remembered: a restart while the API server is away would not know it");
            }
            Ok(Err(_)) | Err(_) => {}
        }
    }
}

/// Without what changes with every write of our own and tells us nothing.
fn bytes_of(pod: &Pod) -> serde_json::Result<Vec<u8>> {
    let mut pod = pod.clone();
    pod.metadata.resource_version = None;
    pod.metadata.managed_fields = None;
    serde_json::to_vec(&Written { version: VERSION, pod: &pod })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::MetadataExt;
    use std::time::Duration;

    fn pod(uid: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "uid": uid, "resourceVersion": "7"},
            "spec": {"containers": []}, "status": {"phase": "Running"},
        }))
        .unwrap()
    }

    #[tokio::test]
    async fn a_pod_is_remembered_with_its_status_and_for_nobody_elses_eyes() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("pods/u");
        let place = Place::of(root.path(), "u");
        place.put(Arc::new(pod("u")));
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!directory.exists(), "a memory makes no directory");
        std::fs::create_dir_all(&directory).unwrap();
        place.put(Arc::new(pod("u")));
        for _ in 0..500 {
            if directory.join(FILE).exists() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(std::fs::metadata(directory.join(FILE)).unwrap().mode() & 0o777, 0o600);
        let (pods, problems) = recall(root.path());
        assert!(problems.is_empty(), "{problems:?}");
        let mut expected = pod("u");
        expected.metadata.resource_version = None;
        assert_eq!(pods, [expected]);
    }

    #[test]
    fn what_cannot_be_understood_is_told_and_concerns_no_other_pod() {
        let root = tempfile::tempdir().unwrap();
        let put = |directory: &str, text: &str| {
            std::fs::create_dir_all(root.path().join("pods").join(directory)).unwrap();
            std::fs::write(root.path().join("pods").join(directory).join(FILE), text).unwrap();
        };
        let good = String::from_utf8(bytes_of(&pod("good")).unwrap()).unwrap();
        put("good", &good);
        put("torn", &good[..good.len() / 2]);
        put("later", &good.replace("\"version\":1", "\"version\":2"));
        put("stolen", &good);
        std::fs::create_dir_all(root.path().join("pods/static")).unwrap();
        let (pods, problems) = recall(root.path());
        assert_eq!(pods.len(), 1);
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert_eq!(recall(&root.path().join("nowhere")).0, []);
    }
}
