//! What is on disk, and the index of it in memory.
//!
//! ```text
//! <root>/state.json            boot id and whether the last end was orderly
//! <root>/lock                  held while the store is open
//! <root>/tmp/                  anything unfinished: discarded at open
//! <root>/trash/                anything removed: emptied in the background
//! <root>/blobs/sha256/<hex>    manifests and configurations
//! <root>/layers/<n>/           layer.json (written last) and fs/, the unpacked layer
//! <root>/images/<hex>.json     one record per image id
//! <containers>/<key>/          snapshot.json, upper/, work/
//! ```
//! Invariants: a layer directory below `layers/` is complete, verified and synced, because it gets there by one rename
//! after its record was synced; an image record names only layers that were there when it was written; everything in
//! memory can be derived from these files. Layers are keyed by diffID and shared between images. Their directories have
//! short numbers for names because the mount option `lowerdir` is limited to one page on older kernels.
//!
//! Compressed layer blobs are not kept: they would take about half as much again as the unpacked layer for the sole use
//! of re-unpacking a damaged one, which a pull can do as well.

mod durable;
mod gc;
mod index;
mod layers;
mod recover;
mod snapshots;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use oci_spec::image::ImageConfiguration;

use index::{ImageRecord, Index, VERSION};
pub(crate) use layers::{Lease, Staged, Workspace};

use crate::digest::Digest;
use crate::error::ImageError;
use crate::{Image, Usage};

/// Where the parts of the store lie.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
    containers: PathBuf,
}

impl Layout {
    fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }

    /// Writable layers may lie on another file system, hence a trash of their own.
    fn container_trash(&self) -> PathBuf {
        self.containers.join(".trash")
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.algorithm().name()).join(digest.hex())
    }

    fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    fn layer(&self, number: u64) -> PathBuf {
        self.layers().join(number.to_string())
    }

    fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    fn image(&self, id: &Digest) -> PathBuf {
        let prefix = match id.algorithm() {
            crate::digest::Algorithm::Sha256 => "",
            crate::digest::Algorithm::Sha512 => "sha512-",
        };
        self.images().join(format!("{prefix}{}.json", id.hex()))
    }

    fn container(&self, key: &str) -> PathBuf {
        self.containers.join(key)
    }
}

#[derive(Debug)]
pub(crate) struct Store {
    layout: Layout,
    index: Mutex<Index>,
    /// Serialises everything that changes records; held only on blocking threads, over file work.
    writer: Mutex<()>,
    /// One sweep of the trash at a time.
    sweeping: Mutex<()>,
    next: AtomicU64,
    _lock: File,
}

/// A complete image about to be recorded.
#[derive(Debug)]
pub(crate) struct NewImage {
    pub(crate) id: Digest,
    /// Canonical `domain/path:tag` names.
    pub(crate) tags: Vec<String>,
    /// Canonical `domain/path@digest` names.
    pub(crate) digests: Vec<String>,
    /// Manifests (and the index they came from) and the configuration; verified bytes.
    pub(crate) blobs: Vec<(Digest, Vec<u8>)>,
    pub(crate) annotations: std::collections::BTreeMap<String, String>,
    /// Bottom first.
    pub(crate) layers: Vec<Lease>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section leaves its data consistent at every step that can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    pub(crate) fn index(&self) -> MutexGuard<'_, Index> {
        lock(&self.index)
    }

    fn next_number(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Records an image, or adds names to one that is known. Tags move here from whatever image had them.
    pub(crate) fn commit_image(self: &Arc<Self>, new: NewImage) -> Result<Arc<Image>, ImageError> {
        let _writer = lock(&self.writer);
        for (digest, bytes) in &new.blobs {
            durable::write_new(&self.layout.blob(digest), bytes)?;
            self.index().blobs.insert(digest.clone(), bytes.len() as u64);
        }
        let config = new.blobs.iter().find(|(digest, _)| *digest == new.id);
        let (mut record, config) = {
            let index = self.index();
            let known = index.images.get(&new.id);
            let config = match (known, config) {
                (Some(entry), _) => entry.image.config.clone(),
                (None, Some((_, bytes))) => parse_config(&new.id, bytes)?,
                (None, None) => return Err(ImageError::NotFound(new.id.to_string())),
            };
            let record = known.map(|entry| entry.record.clone());
            (record.unwrap_or_else(|| ImageRecord::new(new.id.clone())), config)
        };
        record.generation = self.next_number();
        record.layers = new.layers.iter().map(Lease::number).collect();
        merge(&mut record.tags, new.tags.iter());
        merge(&mut record.digests, new.digests.iter());
        merge(&mut record.blobs, new.blobs.iter().map(|(digest, _)| digest));
        record.annotations = new.annotations;
        let losers = self.index().without_tags(&new.tags, &new.id);
        self.write_record(&record)?;
        for loser in losers {
            self.write_record(&loser)?;
            self.index().insert(&self.layout, loser, None);
        }
        Ok(self.index().insert(&self.layout, record, Some(config)))
    }

    fn write_record(&self, record: &ImageRecord) -> Result<(), ImageError> {
        durable::write_json(&self.layout.image(&record.id), record)
    }

    /// Marks an image as never to be collected, or takes the mark away.
    pub(crate) fn set_pinned(&self, id: &Digest, pinned: bool) -> Result<(), ImageError> {
        let _writer = lock(&self.writer);
        let record = self.index().images.get(id).map(|entry| entry.record.clone());
        let Some(mut record) = record else { return Err(ImageError::NotFound(id.to_string())) };
        record.pinned = pinned;
        self.write_record(&record)?;
        self.index().insert(&self.layout, record, None);
        Ok(())
    }

    /// Forgets an image and moves what only it used to the trash. The caller sweeps.
    pub(crate) fn remove_image(&self, id: &Digest) -> Result<(), ImageError> {
        let _writer = lock(&self.writer);
        if !self.index().images.contains_key(id) {
            return Ok(());
        }
        durable::remove_file(&self.layout.image(id))?;
        self.index().remove(id);
        self.collect()
    }

    /// Recorded sizes of layers and blobs, and of writable layers as last measured.
    pub(crate) fn usage(&self) -> Usage {
        let index = self.index();
        let layers = index.layers.values().map(|layer| layer.usage);
        let blobs = index.blobs.values().map(|bytes| Usage { bytes: *bytes, inodes: 1 });
        let snapshots = index.snapshots.values().map(|snapshot| snapshot.measured);
        layers.chain(blobs).chain(snapshots).fold(Usage::default(), |sum, one| Usage {
            bytes: sum.bytes + one.bytes,
            inodes: sum.inodes + one.inodes,
        })
    }

    /// Notes an orderly end, so that the next open after a reboot need not distrust the disk.
    pub(crate) fn close(&self) -> Result<(), ImageError> {
        let _writer = lock(&self.writer);
        recover::write_state(&self.layout, true)
    }
}

fn parse_config(id: &Digest, bytes: &[u8]) -> Result<ImageConfiguration, ImageError> {
    serde_json::from_slice(bytes).map_err(|cause| ImageError::Unsupported {
        object: format!("image {id}"),
        reason: format!("its configuration cannot be read: {cause}"),
    })
}

fn merge<'a, T: Clone + PartialEq + 'a>(into: &mut Vec<T>, more: impl Iterator<Item = &'a T>) {
    for item in more {
        if !into.contains(item) {
            into.push(item.clone());
        }
    }
}

fn create_dir(path: &Path) -> Result<(), ImageError> {
    std::fs::create_dir_all(path).map_err(ImageError::store("create", path))
}

#[cfg(test)]
mod tests;
