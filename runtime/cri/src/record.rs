//! Small records on disk, one JSON file each.
//!
//! A record is written to a temporary name, synced and renamed, so a reader sees the old one or the new one. Protobuf
//! messages inside a record are kept as base64 of their wire form: what the kubelet sent comes back unaltered, also
//! fields that a later version adds.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("cannot {operation} record {path}: {source}")]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot encode record {path}: {source}")]
    Encode { path: PathBuf, source: serde_json::Error },
    #[error("record writer for {path} ended early")]
    Interrupted { path: PathBuf },
}

/// A directory of records of one kind.
#[derive(Debug, Clone)]
pub(crate) struct RecordDir {
    dir: PathBuf,
}

impl RecordDir {
    pub(crate) fn open(dir: PathBuf) -> Result<Self, RecordError> {
        fs::create_dir_all(&dir).map_err(|source| RecordError::Io {
            operation: "create directory of",
            path: dir.clone(),
            source,
        })?;
        let records = Self { dir };
        for path in records.entries()? {
            if path.extension().is_some_and(|e| e == "tmp") {
                // Of a write that a crash interrupted.
                let _ = fs::remove_file(&path);
            }
        }
        Ok(records)
    }

    fn entries(&self) -> Result<Vec<PathBuf>, RecordError> {
        let error =
            |source| RecordError::Io { operation: "list directory of", path: self.dir.clone(), source };
        let entries = fs::read_dir(&self.dir).map_err(error)?;
        entries.map(|entry| entry.map(|e| e.path()).map_err(error)).collect()
    }

    /// One record, if it is there.
    pub(crate) fn load<T: DeserializeOwned>(&self, id: &str) -> Result<Option<T>, RecordError> {
        let path = self.path(id);
        match read_record(&path) {
            Ok(record) => Ok(Some(record)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(RecordError::Io { operation: "read", path, source }),
        }
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    pub(crate) async fn save<T: Serialize>(&self, id: &str, record: &T) -> Result<(), RecordError> {
        let path = self.path(id);
        let bytes = serde_json::to_vec(record)
            .map_err(|source| RecordError::Encode { path: path.clone(), source })?;
        let target = path.clone();
        tokio::task::spawn_blocking(move || replace_file(&target, &bytes, 0o600))
            .await
            .map_err(|_| RecordError::Interrupted { path: path.clone() })?
            .map_err(|source| RecordError::Io { operation: "write", path, source })
    }

    pub(crate) fn remove(&self, id: &str) -> Result<(), RecordError> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(RecordError::Io { operation: "remove", path, source })
            }
            _ => Ok(()),
        }
    }

    /// Every record that can be read. A damaged one is logged and left aside: it must not keep the others down.
    pub(crate) fn load_all<T: DeserializeOwned>(&self) -> Result<Vec<T>, RecordError> {
        let mut records = Vec::new();
        for path in self.entries()? {
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            match read_record(&path) {
                Ok(record) => records.push(record),
                Err(reason) => {
                    tracing::error!(path = %path.display(), %reason, "leaving a damaged record aside")
                }
            }
        }
        Ok(records)
    }
}

fn read_record<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// Replaces a file so that it is whole at any moment, also after a power failure.
pub(crate) fn replace_file(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let temporary = path.with_extension("tmp");
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    fs::rename(&temporary, path)
}

/// A protobuf message inside a record.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Wire<M>(pub(crate) M);

impl<M: prost::Message> Serialize for Wire<M> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(self.0.encode_to_vec()))
    }
}

impl<'de, M: prost::Message + Default> Deserialize<'de> for Wire<M> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error as _;
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD.decode(text).map_err(D::Error::custom)?;
        M::decode(bytes.as_slice()).map(Self).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use orlop_proto::cri::PodSandboxConfig;

    #[tokio::test]
    async fn a_saved_record_comes_back_and_a_damaged_one_does_not_hide_it() {
        let dir = tempfile::tempdir().unwrap();
        let records = RecordDir::open(dir.path().join("sandboxes")).unwrap();
        let config = PodSandboxConfig { hostname: "web-0".into(), ..Default::default() };
        records.save("a", &Wire(config.clone())).await.unwrap();
        fs::write(dir.path().join("sandboxes/b.json"), b"{\"half").unwrap();
        fs::write(dir.path().join("sandboxes/c.tmp"), b"half").unwrap();
        let records = RecordDir::open(dir.path().join("sandboxes")).unwrap();
        let loaded: Vec<Wire<PodSandboxConfig>> = records.load_all().unwrap();
        assert_eq!(loaded, vec![Wire(config)]);
        assert!(!dir.path().join("sandboxes/c.tmp").exists());
        records.remove("a").unwrap();
        records.remove("a").unwrap();
        assert!(records.load_all::<Wire<PodSandboxConfig>>().unwrap().is_empty());
    }
}
