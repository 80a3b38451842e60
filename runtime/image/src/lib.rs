//! Images: a registry client, a content store that verifies while it streams, layer unpacking, overlay snapshots.
//!
//! This is the interface the CRI builds on; each module below it says what it does. A pull goes through them in this
//! order: [`reference`](mod@reference) → `registry` → `manifest` → `layer` → `store`, put together in `pull`. Layers are
//! unpacked while they arrive; nothing becomes visible before it was verified and synced.

#![forbid(unsafe_code)]

mod digest;
mod error;
mod import;
mod layer;
mod manifest;
mod pull;
pub mod reference;
mod registry;
mod store;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use digest::{Algorithm, Digest, InvalidDigest};
pub use error::{ErrorKind, ImageError};
pub use layer::LayerError;
use pull::Puller;
use reference::Reference;
use registry::Timing;
use store::Store;

/// Where images live and how registries are reached.
#[derive(Debug, Clone)]
pub struct Config {
    /// `blobs/`, `layers/`, `images/` lie below it.
    pub root: PathBuf,
    /// Writable layers, one directory per container. May lie on another file system than `root`.
    pub containers: PathBuf,
    /// Directory of containerd's `hosts.toml` files, one folder per registry host.
    pub registry_config_dir: Option<PathBuf>,
    pub max_concurrent_downloads: usize,
}

impl Config {
    /// The layout of ARCHITECTURE.md below `state`, such as `/var/lib/orlop`: `images/` and `containers/`.
    pub fn below(state: &Path) -> Self {
        Self {
            root: state.join("images"),
            containers: state.join("containers"),
            registry_config_dir: None,
            max_concurrent_downloads: 3,
        }
    }
}

/// One image as the node knows it.
#[derive(Debug, Clone)]
pub struct Image {
    /// `sha256:…` of the image's configuration.
    pub id: String,
    pub repo_tags: Vec<String>,
    pub repo_digests: Vec<String>,
    /// Bytes of the unpacked layers.
    pub size: u64,
    pub config: oci_spec::image::ImageConfiguration,
    /// Unpacked layers, the topmost first: the `lowerdir` of a container.
    pub layers: Vec<PathBuf>,
    /// Never removed by garbage collection.
    pub pinned: bool,
    pub annotations: BTreeMap<String, String>,
}

/// Credentials for one registry.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Auth {
    pub username: String,
    pub password: String,
    pub identity_token: String,
    pub registry_token: String,
    /// When set, the credentials are used for this host only.
    pub server_address: String,
}

impl fmt::Debug for Auth {
    /// Says which credentials there are, not what they are.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth")
            .field("username", &self.username)
            .field("server_address", &self.server_address)
            .finish_non_exhaustive()
    }
}

/// The writable layer of a container and what lies beneath it.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub lower: Vec<PathBuf>,
    pub upper: PathBuf,
    pub work: PathBuf,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    pub bytes: u64,
    pub inodes: u64,
}

/// The node's images. Clones are cheap through `Arc`.
#[derive(Debug, Clone)]
pub struct ImageStore {
    store: Arc<Store>,
    puller: Arc<Puller>,
}

impl ImageStore {
    /// Opens the store and finishes or discards what a crash interrupted.
    pub async fn open(config: Config) -> Result<Self, ImageError> {
        Self::open_with(config, Timing::default()).await
    }

    async fn open_with(config: Config, timing: Timing) -> Result<Self, ImageError> {
        let Config { root, containers, registry_config_dir, max_concurrent_downloads } = config;
        let store = error::blocking(move || Store::open(&root, &containers)).await?;
        store.sweep_in_background();
        let puller =
            Arc::new(Puller::new(Arc::clone(&store), registry_config_dir, max_concurrent_downloads, timing));
        Ok(Self { store, puller })
    }

    /// Notes an orderly end: after a reboot the layers need no check then. Not closing is safe.
    pub async fn close(&self) -> Result<(), ImageError> {
        let store = Arc::clone(&self.store);
        error::blocking(move || store.close()).await
    }

    pub fn list(&self) -> Vec<Arc<Image>> {
        self.store.index().images.values().map(|entry| Arc::clone(&entry.image)).collect()
    }

    /// Finds by id (or unique prefix of one), tag or digest reference, normalised as docker does.
    pub fn find(&self, reference: &str) -> Option<Arc<Image>> {
        self.store.index().find(reference).map(|entry| Arc::clone(&entry.image))
    }

    /// Pulls and unpacks; concurrent pulls of one reference share the work; dropping the future stops it.
    pub async fn pull(&self, reference: &str, auth: Option<&Auth>) -> Result<Arc<Image>, ImageError> {
        self.puller.pull(Reference::parse(reference)?, auth).await
    }

    /// Imports an OCI layout (directory or tar) or a docker archive; `name` overrides the names recorded in it.
    pub async fn import(&self, path: &Path, name: Option<&str>) -> Result<Vec<Arc<Image>>, ImageError> {
        import::import(&self.store, path, name).await
    }

    /// Removes every tag and digest of the image that `reference` names; succeeds when there is none.
    pub async fn remove(&self, reference: &str) -> Result<(), ImageError> {
        let Some(id) = self.store.index().find(reference).map(|entry| entry.record.id.clone()) else {
            return Ok(());
        };
        let store = Arc::clone(&self.store);
        error::blocking(move || store.remove_image(&id)).await?;
        self.store.sweep_in_background();
        Ok(())
    }

    /// Marks an image so that garbage collection leaves it alone, or takes the mark away.
    pub async fn set_pinned(&self, reference: &str, pinned: bool) -> Result<(), ImageError> {
        let id = self.store.index().find(reference).map(|entry| entry.record.id.clone());
        let id = id.ok_or_else(|| ImageError::NotFound(reference.to_owned()))?;
        let store = Arc::clone(&self.store);
        error::blocking(move || store.set_pinned(&id, pinned)).await
    }

    /// Makes (or finds) the writable layer of container `key`.
    pub async fn prepare(&self, image: &Image, key: &str) -> Result<Snapshot, ImageError> {
        let (store, id, key) = (Arc::clone(&self.store), image.id.clone(), key.to_owned());
        error::blocking(move || store.prepare(&id, &key)).await
    }

    /// Removes the writable layer of container `key`; succeeds when there is none.
    pub async fn release(&self, key: &str) -> Result<(), ImageError> {
        let (store, key) = (Arc::clone(&self.store), key.to_owned());
        error::blocking(move || store.release(&key)).await?;
        self.store.sweep_in_background();
        Ok(())
    }

    /// What container `key` has written.
    pub async fn snapshot_usage(&self, key: &str) -> Result<Usage, ImageError> {
        let (store, key) = (Arc::clone(&self.store), key.to_owned());
        error::blocking(move || store.snapshot_usage(&key)).await
    }

    /// What all layers, snapshots and blobs take, from records: writable layers count as `snapshot_usage` last saw them.
    pub async fn usage(&self) -> Result<Usage, ImageError> {
        Ok(self.store.usage())
    }

    /// Keeps only the writable layers of these containers; for the start of the agent.
    pub async fn retain_snapshots(&self, keys: &[String]) -> Result<(), ImageError> {
        let (store, keys) = (Arc::clone(&self.store), keys.to_vec());
        error::blocking(move || store.retain_snapshots(&keys)).await?;
        self.store.sweep_in_background();
        Ok(())
    }
}
