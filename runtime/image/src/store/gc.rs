//! Collecting what nothing refers to, and emptying the trash.
//!
//! Collection is a rename, so it is immediate and survives a crash half-way; deletion follows in the background.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use super::{Store, durable, lock};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::layer::tree;

impl Store {
    /// Moves unreferenced layers to the trash and removes unreferenced blobs. The caller holds `writer`.
    pub(super) fn collect(&self) -> Result<(), ImageError> {
        let (layers, blobs) = {
            let mut index = self.index();
            let layers: Vec<u64> =
                index.layers.keys().copied().filter(|number| !index.is_referenced(*number)).collect();
            for number in &layers {
                index.layers.remove(number);
            }
            let used: HashSet<&Digest> =
                index.images.values().flat_map(|entry| &entry.record.blobs).collect();
            let blobs: Vec<Digest> =
                index.blobs.keys().filter(|digest| !used.contains(digest)).cloned().collect();
            for digest in &blobs {
                index.blobs.remove(digest);
            }
            (layers, blobs)
        };
        for number in layers {
            self.discard(&self.layout.layer(number), &self.layout.trash())?;
        }
        for digest in blobs {
            durable::remove_file(&self.layout.blob(&digest))?;
        }
        Ok(())
    }

    /// Moves a directory into a trash on its file system; a missing one is a success.
    pub(super) fn discard(&self, path: &Path, trash: &Path) -> Result<(), ImageError> {
        match std::fs::rename(path, trash.join(self.next_number().to_string())) {
            Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
                Err(ImageError::store("move to the trash", path)(cause))
            }
            _ => Ok(()),
        }
    }

    /// Deletes what is in the trash; failures are logged and met again at the next sweep.
    pub(super) fn sweep(&self) {
        let _sweeping = lock(&self.sweeping);
        for trash in [self.layout.trash(), self.layout.container_trash()] {
            if let Err(cause) = tree::empty(&trash) {
                tracing::warn!(trash = %trash.display(), %cause, "cannot empty the image store's trash");
            }
        }
    }

    /// Outside a runtime (a store dropped last) the trash waits for the next open.
    pub(crate) fn sweep_in_background(self: &Arc<Self>) {
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let store = Arc::clone(self);
            runtime.spawn_blocking(move || store.sweep());
        }
    }
}
