//! Writable layers of containers.
//!
//! Their records are written without a sync: a writable layer does not outlive a boot, since no container does.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};

use super::index::SnapshotRecord;
use super::{Store, VERSION, create_dir, lock};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::layer::{DirectoryMeta, tree};
use crate::{Snapshot, Usage};

const DEFAULT_ROOT: DirectoryMeta = DirectoryMeta { uid: 0, gid: 0, mode: 0o755 };

impl Store {
    pub(crate) fn prepare(&self, image: &str, key: &str) -> Result<Snapshot, ImageError> {
        check_key(key)?;
        let gone = || ImageError::LayersGone { image: image.to_owned() };
        let (record, root, is_new) = {
            let mut index = self.index();
            if let Some(existing) = index.snapshots.get(key) {
                (existing.clone(), DEFAULT_ROOT, false)
            } else {
                // By record: what the caller knows of the image may be older than a removal.
                let id: Digest = image.parse().map_err(|_| gone())?;
                let layers = index.images.get(&id).ok_or_else(gone)?.record.layers.clone();
                let root = layers.iter().rev().find_map(|number| index.layers.get(number)?.root);
                let record = SnapshotRecord {
                    version: VERSION,
                    image: image.to_owned(),
                    layers,
                    measured: Usage::default(),
                };
                // From here on the layers are in use, whoever removes the image.
                index.snapshots.insert(key.to_owned(), record.clone());
                (record, root.unwrap_or(DEFAULT_ROOT), true)
            }
        };
        if is_new && let Err(error) = self.make_snapshot(&record, root, key) {
            self.index().snapshots.remove(key);
            return Err(error);
        }
        let directory = self.layout.container(key);
        let mut lower = Vec::with_capacity(record.layers.len());
        for number in record.layers.iter().rev() {
            let path = self.layout.layer(*number).join("fs");
            if !lower.contains(&path) {
                lower.push(path);
            }
        }
        Ok(Snapshot { lower, upper: directory.join("upper"), work: directory.join("work") })
    }

    fn make_snapshot(
        &self,
        record: &SnapshotRecord,
        root: DirectoryMeta,
        key: &str,
    ) -> Result<(), ImageError> {
        let staging = self.layout.containers.join(format!(".new-{}", self.next_number()));
        let upper = staging.join("upper");
        create_dir(&upper)?;
        create_dir(&staging.join("work"))?;
        // The root of an overlay has the attributes of its uppermost layer.
        chown(&upper, Some(root.uid), Some(root.gid))
            .map_err(ImageError::store("change owner of", &upper))?;
        fs::set_permissions(&upper, fs::Permissions::from_mode(root.mode))
            .map_err(ImageError::store("change mode of", &upper))?;
        let path = staging.join("snapshot.json");
        let bytes =
            serde_json::to_vec(record).map_err(|cause| ImageError::store("encode", &path)(cause.into()))?;
        fs::write(&path, bytes).map_err(ImageError::store("write", &path))?;
        let target = self.layout.container(key);
        fs::rename(&staging, &target).map_err(ImageError::store("create", &target))
    }

    /// Moves the writable layer to the trash. The caller sweeps.
    pub(crate) fn release(&self, key: &str) -> Result<(), ImageError> {
        check_key(key)?;
        self.discard(&self.layout.container(key), &self.layout.container_trash())?;
        let mut index = self.index();
        let last_user = match index.snapshots.remove(key) {
            Some(record) => record.layers.iter().any(|number| !index.is_referenced(*number)),
            None => false,
        };
        drop(index);
        // Its image was removed before it.
        if last_user {
            let _writer = lock(&self.writer);
            self.collect()?;
        }
        Ok(())
    }

    pub(crate) fn snapshot_usage(&self, key: &str) -> Result<Usage, ImageError> {
        check_key(key)?;
        let upper = self.layout.container(key).join("upper");
        let usage = tree::usage(&upper).map_err(ImageError::store("measure", &upper))?;
        if let Some(snapshot) = self.index().snapshots.get_mut(key) {
            snapshot.measured = usage;
        }
        Ok(usage)
    }

    pub(crate) fn retain_snapshots(&self, keys: &[String]) -> Result<(), ImageError> {
        let path = &self.layout.containers;
        for entry in fs::read_dir(path).map_err(ImageError::store("list", path))? {
            let entry = entry.map_err(ImageError::store("list", path))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') || keys.contains(&name) {
                continue;
            }
            if check_key(&name).is_ok() {
                self.release(&name)?;
            } else {
                self.discard(&entry.path(), &self.layout.container_trash())?;
            }
        }
        Ok(())
    }
}

/// A key becomes a directory's name beside our own, which start with a dot.
fn check_key(key: &str) -> Result<(), ImageError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if key.is_empty() || key.len() > 200 || key.starts_with('.') || !key.bytes().all(plain) {
        return Err(ImageError::InvalidKey { key: key.chars().take(200).collect() });
    }
    Ok(())
}
