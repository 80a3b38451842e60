//! Records as they are on disk, and the maps derived from them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use super::Layout;
use crate::digest::Digest;
use crate::layer::DirectoryMeta;
use crate::reference::Reference;
use crate::{Image, Usage};

/// Version of every record; a record of another version is not used.
pub(crate) const VERSION: u32 = 1;

/// `images/<hex>.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ImageRecord {
    pub(crate) version: u32,
    pub(crate) id: Digest,
    /// Grows with every write: of two images that claim one tag after a crash, the later one has it.
    pub(crate) generation: u64,
    pub(crate) tags: Vec<String>,
    pub(crate) digests: Vec<String>,
    pub(crate) blobs: Vec<Digest>,
    /// Directory numbers, bottom first.
    pub(crate) layers: Vec<u64>,
    pub(crate) pinned: bool,
    #[serde(default)]
    pub(crate) annotations: BTreeMap<String, String>,
}

impl ImageRecord {
    pub(super) fn new(id: Digest) -> Self {
        Self {
            version: VERSION,
            id,
            generation: 0,
            tags: Vec::new(),
            digests: Vec::new(),
            blobs: Vec::new(),
            layers: Vec::new(),
            pinned: false,
            annotations: BTreeMap::new(),
        }
    }
}

/// `layers/<n>/layer.json`, written after the layer's files were synced.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) version: u32,
    pub(crate) diff_id: Digest,
    /// For a layer that leaves directories undescribed: the chain of layers below it, from which they took their
    /// attributes (empty for the bottom of an image). Other layers are the same on any base.
    pub(crate) base: Option<String>,
    pub(crate) root: Option<DirectoryMeta>,
    pub(crate) usage: Usage,
    /// Sum of file sizes, which is what an image's size is reported as.
    pub(crate) size: u64,
}

/// `<containers>/<key>/snapshot.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SnapshotRecord {
    pub(crate) version: u32,
    pub(crate) image: String,
    /// Directory numbers, bottom first.
    pub(crate) layers: Vec<u64>,
    /// As last measured; not kept on disk.
    #[serde(skip)]
    pub(crate) measured: Usage,
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) record: ImageRecord,
    pub(crate) image: Arc<Image>,
}

#[derive(Debug, Default)]
pub(crate) struct Index {
    pub(crate) images: BTreeMap<Digest, Entry>,
    names: HashMap<String, Digest>,
    pub(crate) layers: BTreeMap<u64, LayerRecord>,
    pub(crate) snapshots: HashMap<String, SnapshotRecord>,
    /// Layers that a pull, an import or a caller is about to use.
    pub(crate) leases: HashMap<u64, usize>,
    pub(crate) blobs: HashMap<Digest, u64>,
}

impl Index {
    /// Finds by full id, by name, or by a unique prefix of an id's digits.
    pub(crate) fn find(&self, reference: &str) -> Option<&Entry> {
        if let Ok(id) = reference.parse::<Digest>() {
            return self.images.get(&id);
        }
        if let Ok(name) = Reference::parse(reference)
            && let Some(id) = self.names.get(&name.to_string())
        {
            return self.images.get(id);
        }
        let prefix = reference.strip_prefix("sha256:").unwrap_or(reference);
        if prefix.is_empty() || !prefix.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let mut matching = self.images.iter().filter(|(id, _)| id.hex().starts_with(prefix));
        match (matching.next(), matching.next()) {
            (Some((_, entry)), None) => Some(entry),
            _ => None,
        }
    }

    /// Puts a record in place; `config` may be left out when the image is known already.
    pub(super) fn insert(
        &mut self,
        layout: &Layout,
        record: ImageRecord,
        config: Option<ImageConfiguration>,
    ) -> Arc<Image> {
        let config = config
            .or_else(|| self.images.get(&record.id).map(|known| known.image.config.clone()))
            .unwrap_or_default();
        self.names.retain(|_, id| *id != record.id);
        for name in record.tags.iter().chain(&record.digests) {
            self.names.insert(name.clone(), record.id.clone());
        }
        let image = Arc::new(self.image(layout, &record, config));
        self.images.insert(record.id.clone(), Entry { record, image: Arc::clone(&image) });
        image
    }

    fn image(&self, layout: &Layout, record: &ImageRecord, config: ImageConfiguration) -> Image {
        let mut layers = Vec::with_capacity(record.layers.len());
        for number in record.layers.iter().rev() {
            let path = layout.layer(*number).join("fs");
            // The same layer twice: overlayfs refuses it, and the upper occurrence hides the lower one entirely.
            if !layers.contains(&path) {
                layers.push(path);
            }
        }
        let size =
            record.layers.iter().filter_map(|number| self.layers.get(number)).map(|layer| layer.size).sum();
        Image {
            id: record.id.to_string(),
            repo_tags: record.tags.clone(),
            repo_digests: record.digests.clone(),
            size,
            config,
            layers,
            pinned: record.pinned,
            annotations: record.annotations.clone(),
        }
    }

    pub(super) fn remove(&mut self, id: &Digest) {
        self.images.remove(id);
        self.names.retain(|_, named| named != id);
    }

    /// The records of other images that would lose one of `tags` to `winner`, without them.
    pub(super) fn without_tags(&self, tags: &[String], winner: &Digest) -> Vec<ImageRecord> {
        self.images
            .values()
            .filter(|entry| entry.record.id != *winner)
            .filter(|entry| entry.record.tags.iter().any(|tag| tags.contains(tag)))
            .map(|entry| {
                let mut record = entry.record.clone();
                record.tags.retain(|tag| !tags.contains(tag));
                record
            })
            .collect()
    }

    /// The directory of a layer on the given base.
    pub(crate) fn layer(&self, diff_id: &Digest, base: &str) -> Option<u64> {
        self.layers
            .iter()
            .find(|(_, layer)| {
                layer.diff_id == *diff_id && layer.base.as_deref().is_none_or(|needed| needed == base)
            })
            .map(|(number, _)| *number)
    }

    /// Whether anything uses this layer.
    pub(super) fn is_referenced(&self, number: u64) -> bool {
        self.leases.contains_key(&number)
            || self.images.values().any(|entry| entry.record.layers.contains(&number))
            || self.snapshots.values().any(|snapshot| snapshot.layers.contains(&number))
    }
}
