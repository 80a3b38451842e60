//! Images: a registry client, a content store that verifies while it streams, layer unpacking, overlay snapshots.
//!
//! This is the interface the CRI builds on; each module below it says what it does.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where images live and how registries are reached.
#[derive(Debug, Clone)]
pub struct Config {
    /// `blobs/`, `layers/`, `images/`, `containers/` lie below it.
    pub root: PathBuf,
    /// Directory of containerd's `hosts.toml` files, one folder per registry host.
    pub registry_config_dir: Option<PathBuf>,
    pub max_concurrent_downloads: usize,
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
#[derive(Debug, Clone, Default)]
pub struct Auth {
    pub username: String,
    pub password: String,
    pub identity_token: String,
    pub registry_token: String,
    /// When set, the credentials are used for this host only.
    pub server_address: String,
}

/// The writable layer of a container and what lies beneath it.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub lower: Vec<PathBuf>,
    pub upper: PathBuf,
    pub work: PathBuf,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    pub bytes: u64,
    pub inodes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("image reference {reference:?} is not valid: {reason}")]
    InvalidReference { reference: String, reason: String },
    #[error("image {0} is not on this node")]
    NotFound(String),
}

/// The node's images. Clones are cheap through `Arc`.
#[derive(Debug)]
pub struct ImageStore {}

#[allow(clippy::todo, clippy::unused_async, unused_variables)]
impl ImageStore {
    /// Opens the store and finishes or discards what a crash interrupted.
    pub async fn open(config: Config) -> Result<Self, ImageError> {
        todo!()
    }
    pub fn list(&self) -> Vec<Arc<Image>> {
        todo!()
    }
    /// Finds by id (or unique prefix of one), tag or digest reference, normalised as docker does.
    pub fn find(&self, reference: &str) -> Option<Arc<Image>> {
        todo!()
    }
    /// Pulls and unpacks; concurrent pulls of one reference share the work; dropping the future stops it.
    pub async fn pull(&self, reference: &str, auth: Option<&Auth>) -> Result<Arc<Image>, ImageError> {
        todo!()
    }
    /// Imports an OCI layout (directory or tar) or a docker archive; `name` overrides the names recorded in it.
    pub async fn import(&self, path: &Path, name: Option<&str>) -> Result<Vec<Arc<Image>>, ImageError> {
        todo!()
    }
    /// Removes every tag and digest of the image that `reference` names; succeeds when there is none.
    pub async fn remove(&self, reference: &str) -> Result<(), ImageError> {
        todo!()
    }
    /// Makes (or finds) the writable layer of container `key`.
    pub async fn prepare(&self, image: &Image, key: &str) -> Result<Snapshot, ImageError> {
        todo!()
    }
    /// Removes the writable layer of container `key`; succeeds when there is none.
    pub async fn release(&self, key: &str) -> Result<(), ImageError> {
        todo!()
    }
    /// What container `key` has written.
    pub async fn snapshot_usage(&self, key: &str) -> Result<Usage, ImageError> {
        todo!()
    }
    /// What all layers, snapshots and blobs take.
    pub async fn usage(&self) -> Result<Usage, ImageError> {
        todo!()
    }
    /// Keeps only the writable layers of these containers; for the start of the agent.
    pub async fn retain_snapshots(&self, keys: &[String]) -> Result<(), ImageError> {
        todo!()
    }
}
