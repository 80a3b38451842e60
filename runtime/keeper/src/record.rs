//! What the keeper has on disk: one directory per container with one record in it, so that exit codes and the way back
//! to living containers survive the keeper itself.
//!
//! ```text
//! <state>/<container>/record.json   this module's; replaced whole, by rename
//! <state>/<container>/oci/          the OCI library's
//! ```

use crate::protocol::{ContainerView, Exit, LogTarget, Phase};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const VERSION: u32 = 1;
const FILE: &str = "record.json";

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("cannot write the record of container {id} at {path}: {source}")]
    Write { id: String, path: PathBuf, source: io::Error },
    #[error("cannot remove the record of container {id} at {path}: {source}")]
    Remove { id: String, path: PathBuf, source: io::Error },
    #[error("cannot read the record {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("record {path} is damaged: {source}")]
    Damaged { path: PathBuf, source: serde_json::Error },
    #[error("record {path} has version {found}, this keeper knows {VERSION}")]
    Version { path: PathBuf, found: u32 },
    #[error("cannot use the state directory {path}: {source}")]
    Root { path: PathBuf, source: io::Error },
}

/// Everything about a container that is not a descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    pub id: String,
    pub phase: Phase,
    pub pid: u32,
    /// Field 22 of `/proc/<pid>/stat`: together with the number it names one process of this boot.
    pub process_start: u64,
    pub created_at: i64,
    pub started_at: i64,
    pub exit: Option<Exit>,
    /// Why the exit code is not the process's own.
    pub exit_note: Option<String>,
    pub acknowledged: bool,
    pub log: Option<LogTarget>,
    pub tty: bool,
    pub stdin_once: bool,
    /// Inode numbers of the output pipes, by which a lost read end is found again.
    pub stdout_inode: u64,
    pub stderr_inode: u64,
}

impl Record {
    pub fn new(id: &str, created_at: i64) -> Self {
        Self {
            version: VERSION,
            id: id.to_owned(),
            phase: Phase::Created,
            pid: 0,
            process_start: 0,
            created_at,
            started_at: 0,
            exit: None,
            exit_note: None,
            acknowledged: false,
            log: None,
            tty: false,
            stdin_once: false,
            stdout_inode: 0,
            stderr_inode: 0,
        }
    }

    pub fn view(&self) -> ContainerView {
        ContainerView {
            id: self.id.clone(),
            phase: self.phase,
            pid: if self.phase == Phase::Exited { 0 } else { self.pid },
            created_at: self.created_at,
            started_at: self.started_at,
            exit: self.exit.clone(),
        }
    }
}

/// The state directory.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// What lies in the state directory.
#[derive(Debug, Default)]
pub struct Loaded {
    pub records: Vec<Record>,
    /// Directories without a record: a create that never finished.
    pub unfinished: Vec<String>,
    pub errors: Vec<RecordError>,
}

impl Store {
    pub fn open(root: &Path) -> Result<Self, RecordError> {
        let wrap = |source| RecordError::Root { path: root.to_owned(), source };
        fs::create_dir_all(root).map_err(wrap)?;
        fs::set_permissions(root, std::os::unix::fs::PermissionsExt::from_mode(0o700)).map_err(wrap)?;
        Ok(Self { root: root.to_owned() })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the OCI library keeps its part. Ids are single path components: the library's id type sees to that.
    pub fn oci_root(&self, id: &str) -> PathBuf {
        self.root.join(id).join("oci")
    }

    /// Makes the container's directory; its absence later means that nothing of the container is left.
    pub fn reserve(&self, id: &str) -> Result<(), RecordError> {
        let path = self.root.join(id);
        fs::create_dir(&path).map_err(|source| RecordError::Write { id: id.to_owned(), path, source })
    }

    pub fn save(&self, record: &Record) -> Result<(), RecordError> {
        let dir = self.root.join(&record.id);
        let write = || -> io::Result<()> {
            let temporary = dir.join("record.new");
            let mut file = File::create(&temporary)?;
            file.write_all(&serde_json::to_vec(record)?)?;
            file.sync_all()?;
            fs::rename(&temporary, dir.join(FILE))?;
            File::open(&dir)?.sync_all()
        };
        write().map_err(|source| RecordError::Write { id: record.id.clone(), path: dir.clone(), source })
    }

    pub fn remove(&self, id: &str) -> Result<(), RecordError> {
        let path = self.root.join(id);
        match fs::remove_dir_all(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(RecordError::Remove { id: id.to_owned(), path, source })
            }
            _ => Ok(()),
        }
    }

    /// One damaged record does not hide the others.
    pub fn load(&self) -> Result<Loaded, RecordError> {
        let wrap = |source| RecordError::Root { path: self.root.clone(), source };
        let mut loaded = Loaded::default();
        for entry in fs::read_dir(&self.root).map_err(wrap)? {
            let entry = entry.map_err(wrap)?;
            let Ok(id) = entry.file_name().into_string() else { continue };
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            match read(&entry.path().join(FILE)) {
                Ok(Some(record)) => loaded.records.push(record),
                Ok(None) => loaded.unfinished.push(id),
                Err(error) => loaded.errors.push(error),
            }
        }
        Ok(loaded)
    }
}

fn read(path: &Path) -> Result<Option<Record>, RecordError> {
    #[derive(Deserialize)]
    struct Header {
        version: u32,
    }
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(RecordError::Read { path: path.to_owned(), source }),
    };
    let damaged = |source| RecordError::Damaged { path: path.to_owned(), source };
    let header: Header = serde_json::from_slice(&bytes).map_err(damaged)?;
    if header.version != VERSION {
        return Err(RecordError::Version { path: path.to_owned(), found: header.version });
    }
    serde_json::from_slice(&bytes).map(Some).map_err(damaged)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("keeper")).unwrap();
        (dir, store)
    }

    fn record(id: &str) -> Record {
        let mut record = Record::new(id, 5);
        record.exit = Some(Exit { code: 137, oom_killed: true, finished_at: 9 });
        record.phase = Phase::Exited;
        record
    }

    #[test]
    fn a_record_comes_back_as_it_was_saved() {
        let (_dir, store) = store();
        store.reserve("a").unwrap();
        store.save(&record("a")).unwrap();
        assert_eq!(store.load().unwrap().records, [record("a")]);
    }

    #[test]
    fn a_saved_record_leaves_no_temporary_file() {
        let (_dir, store) = store();
        store.reserve("a").unwrap();
        store.save(&record("a")).unwrap();
        store.save(&record("a")).unwrap();
        assert_eq!(fs::read_dir(store.root().join("a")).unwrap().count(), 1);
    }

    #[test]
    fn a_write_that_was_cut_off_leaves_the_old_record() {
        let (_dir, store) = store();
        store.reserve("a").unwrap();
        store.save(&record("a")).unwrap();
        fs::write(store.root().join("a/record.new"), b"{\"vers").unwrap();
        assert_eq!(store.load().unwrap().records, [record("a")]);
    }

    #[test]
    fn damaged_and_foreign_records_do_not_hide_the_others() {
        let (_dir, store) = store();
        for id in ["good", "damaged", "newer", "unfinished"] {
            store.reserve(id).unwrap();
        }
        store.save(&record("good")).unwrap();
        fs::write(store.root().join("damaged/record.json"), b"{\"version\":1,").unwrap();
        fs::write(store.root().join("newer/record.json"), b"{\"version\":2}").unwrap();
        let loaded = store.load().unwrap();
        assert_eq!(loaded.records, [record("good")]);
        assert_eq!(loaded.unfinished, ["unfinished"]);
        assert_eq!(loaded.errors.len(), 2);
        assert!(loaded.errors.iter().any(|e| matches!(e, RecordError::Version { found: 2, .. })));
    }

    #[test]
    fn an_id_is_reserved_once_and_removal_is_idempotent() {
        let (_dir, store) = store();
        store.reserve("a").unwrap();
        assert!(store.reserve("a").is_err());
        store.remove("a").unwrap();
        store.remove("a").unwrap();
        assert_eq!(fs::read_dir(store.root()).unwrap().count(), 0);
    }
}
