//! Opening: what a crash interrupted is discarded, what is complete is indexed.
//!
//! No single bad entry keeps the store from opening: it is logged, moved to the trash, and pulled again when needed.
//! After a reboot without an orderly end, each layer's tree is walked and compared with its record. File contents are
//! not hashed again: they were synced before the record was written.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::index::{ImageRecord, LayerRecord, SnapshotRecord};
use super::{Index, Layout, Store, VERSION, create_dir, durable, lock, parse_config};
use crate::error::ImageError;
use crate::layer::tree;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

#[derive(Debug, Serialize, Deserialize)]
struct StateRecord {
    version: u32,
    boot_id: String,
    clean: bool,
}

fn boot_id() -> Result<String, ImageError> {
    let id = fs::read_to_string(BOOT_ID).map_err(ImageError::store("read", Path::new(BOOT_ID)))?;
    Ok(id.trim().to_owned())
}

pub(super) fn write_state(layout: &Layout, clean: bool) -> Result<(), ImageError> {
    let state = StateRecord { version: VERSION, boot_id: boot_id()?, clean };
    durable::write_json(&layout.root.join("state.json"), &state)
}

/// Whether the machine went down while the store was open. The page cache survives a mere crash of this process.
fn unclean_boot(layout: &Layout) -> Result<bool, ImageError> {
    match durable::read_json::<StateRecord>(&layout.root.join("state.json")) {
        Ok(state) => Ok(!state.clean && state.boot_id != boot_id()?),
        Err(_) => Ok(layout.layers().read_dir().is_ok_and(|mut entries| entries.next().is_some())),
    }
}

impl Store {
    pub(crate) fn open(root: &Path, containers: &Path) -> Result<Arc<Self>, ImageError> {
        let layout = Layout { root: root.to_owned(), containers: containers.to_owned() };
        let directories =
            [layout.tmp(), layout.trash(), layout.layers(), layout.images(), layout.container_trash()];
        for directory in directories {
            create_dir(&directory)?;
        }
        // Layers hold set-id programs of any age: no other user of the host may reach them.
        for directory in [root, containers] {
            fs::set_permissions(directory, fs::Permissions::from_mode(0o700))
                .map_err(ImageError::store("restrict", directory))?;
        }
        for algorithm in ["sha256", "sha512"] {
            create_dir(&root.join("blobs").join(algorithm))?;
        }
        let lock_file = take_lock(&root.join("lock"))?;
        let unclean = unclean_boot(&layout)?;
        write_state(&layout, false)?;
        let store = Arc::new(Self {
            next: AtomicU64::new(first_free_number(&layout)),
            layout,
            index: Mutex::new(Index::default()),
            writer: Mutex::new(()),
            sweeping: Mutex::new(()),
            _lock: lock_file,
        });
        if unclean {
            tracing::warn!(root = %root.display(), "the machine went down while images were in use; checking layers");
        }
        store.recover(unclean)?;
        Ok(store)
    }

    fn recover(&self, unclean: bool) -> Result<(), ImageError> {
        let _writer = lock(&self.writer);
        for entry in list(&self.layout.tmp())? {
            self.discard(&entry.path(), &self.layout.trash())?;
        }
        self.recover_layers(unclean)?;
        self.recover_blobs()?;
        self.recover_images()?;
        self.recover_snapshots()?;
        self.collect()
    }

    fn recover_layers(&self, unclean: bool) -> Result<(), ImageError> {
        for entry in list(&self.layout.layers())? {
            let path = entry.path();
            let number = entry.file_name().to_str().and_then(|name| name.parse::<u64>().ok());
            match (number, read_layer(&path, unclean)) {
                (Some(number), Ok(record)) => drop(self.index().layers.insert(number, record)),
                (_, read) => {
                    let reason = read.err().unwrap_or_else(|| "it has no number".to_owned());
                    tracing::warn!(layer = %path.display(), reason, "discarding a layer");
                    self.discard(&path, &self.layout.trash())?;
                }
            }
        }
        Ok(())
    }

    fn recover_blobs(&self) -> Result<(), ImageError> {
        for algorithm in ["sha256", "sha512"] {
            for entry in list(&self.layout.root.join("blobs").join(algorithm))? {
                let name = entry.file_name();
                match format!("{algorithm}:{}", name.to_string_lossy()).parse() {
                    Ok(digest) => {
                        let size = entry.metadata().map_or(0, |metadata| metadata.len());
                        self.index().blobs.insert(digest, size);
                    }
                    Err(_) => durable::remove_file(&entry.path())?,
                }
            }
        }
        Ok(())
    }

    fn recover_images(&self) -> Result<(), ImageError> {
        let mut records = Vec::new();
        for entry in list(&self.layout.images())? {
            let path = entry.path();
            match self.read_image(&path) {
                Ok(found) => records.push(found),
                Err(reason) => {
                    let temporary = entry.file_name().to_string_lossy().starts_with(durable::TEMPORARY);
                    if !temporary {
                        tracing::warn!(record = %path.display(), reason, "discarding an image");
                    }
                    durable::remove_file(&path)?;
                }
            }
        }
        // In order of writing, so that a tag two images claim ends with the later one.
        records.sort_by_key(|(record, _)| record.generation);
        for (record, config) in records {
            let losers = self.index().without_tags(&record.tags, &record.id);
            for loser in losers {
                self.write_record(&loser)?;
                self.index().insert(&self.layout, loser, None);
            }
            self.index().insert(&self.layout, record, Some(config));
        }
        Ok(())
    }

    fn read_image(&self, path: &Path) -> Result<(ImageRecord, oci_spec::image::ImageConfiguration), String> {
        let record: ImageRecord = durable::read_json(path).map_err(|error| error.to_string())?;
        if record.version != VERSION || self.layout.image(&record.id) != path {
            return Err("its record is of another version or image".to_owned());
        }
        let index = self.index();
        if let Some(missing) = record.layers.iter().find(|number| !index.layers.contains_key(number)) {
            return Err(format!("its layer {missing} is missing"));
        }
        let blob = self.layout.blob(&record.id);
        let bytes = fs::read(&blob).map_err(|cause| format!("its configuration cannot be read: {cause}"))?;
        if !record.id.matches(&bytes) {
            return Err("its configuration is damaged".to_owned());
        }
        let config = parse_config(&record.id, &bytes).map_err(|error| error.to_string())?;
        Ok((record, config))
    }

    fn recover_snapshots(&self) -> Result<(), ImageError> {
        for entry in list(&self.layout.containers)? {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(".new-") {
                self.discard(&entry.path(), &self.layout.container_trash())?;
            } else if !name.starts_with('.') {
                match durable::read_json::<SnapshotRecord>(&entry.path().join("snapshot.json")) {
                    Ok(record) => drop(self.index().snapshots.insert(name, record)),
                    // It may belong to a running container: whether it goes is for `retain_snapshots` to decide.
                    Err(error) => {
                        tracing::warn!(container = name, %error, "the record of a writable layer cannot be read");
                    }
                }
            }
        }
        Ok(())
    }
}

fn take_lock(path: &Path) -> Result<File, ImageError> {
    let file = File::create(path).map_err(ImageError::store("create", path))?;
    match rustix::fs::flock(file.as_fd(), FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(ImageError::InUse { path: path.parent().unwrap_or(path).to_owned() }),
        Err(cause) => Err(ImageError::store("lock", path)(cause.into())),
    }
}

fn list(path: &Path) -> Result<Vec<fs::DirEntry>, ImageError> {
    fs::read_dir(path)
        .and_then(|entries| entries.collect::<Result<Vec<_>, _>>())
        .map_err(ImageError::store("list", path))
}

/// Numbers name layers, generations and trash; none may be used twice, also not by what a snapshot still refers to.
fn first_free_number(layout: &Layout) -> u64 {
    let names = [layout.layers(), layout.trash(), layout.container_trash()]
        .into_iter()
        .filter_map(|directory| list(&directory).ok())
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.rsplit('-').next()?.parse::<u64>().ok());
    let generations = list(&layout.images())
        .unwrap_or_default()
        .into_iter()
        .filter_map(|entry| durable::read_json::<ImageRecord>(&entry.path()).ok())
        .map(|record| record.generation);
    let snapshots = list(&layout.containers)
        .unwrap_or_default()
        .into_iter()
        .filter_map(|entry| durable::read_json::<SnapshotRecord>(&entry.path().join("snapshot.json")).ok())
        .flat_map(|record| record.layers);
    names.chain(generations).chain(snapshots).max().map_or(1, |highest| highest + 1)
}

fn read_layer(path: &Path, thorough: bool) -> Result<LayerRecord, String> {
    let record: LayerRecord =
        durable::read_json(&path.join("layer.json")).map_err(|error| error.to_string())?;
    if record.version != VERSION {
        return Err(format!("its record has version {}", record.version));
    }
    let fs = path.join("fs");
    if !fs.is_dir() {
        return Err("its files are missing".to_owned());
    }
    if thorough {
        let (usage, size) = tree::measure(&fs).map_err(|cause| cause.to_string())?;
        if (usage.inodes, size) != (record.usage.inodes, record.size) {
            return Err(format!(
                "{} files of {} bytes are there where {} of {} were recorded",
                usage.inodes, size, record.usage.inodes, record.size
            ));
        }
    }
    Ok(record)
}
