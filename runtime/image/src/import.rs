//! Importing images from disk: an OCI layout (directory or archive) or a docker archive, compressed or not.
//!
//! An archive is first unpacked into the store's temporary directory with the layer applier, which cannot be led
//! outside; its files are then opened with the archive's own symbolic links (docker uses them for repeated layers)
//! resolved inside it. Blobs of an OCI layout are verified by digest, layers of either kind by diffID.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use serde::Deserialize;

use crate::Image;
use crate::digest::Digest;
use crate::error::{ImageError, blocking};
use crate::layer::{Applier, Expected, decompress, tree};
use crate::manifest::{Descriptor, Document, choose, host_platforms, offered, parse};
use crate::pull::{bases, diff_ids, settle, unpack_layer};
use crate::reference::Reference;
use crate::store::{NewImage, Store, Workspace};

const MAX_DOCUMENT: u64 = 8 << 20;

/// One image found in an archive.
struct Found {
    id: Digest,
    tags: Vec<String>,
    blobs: Vec<(Digest, Vec<u8>)>,
    annotations: std::collections::BTreeMap<String, String>,
    diff_ids: Vec<Digest>,
    layers: Vec<LayerFile>,
}

struct LayerFile {
    path: PathBuf,
    blob: Option<(Digest, u64)>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

pub(crate) async fn import(
    store: &Arc<Store>,
    path: &Path,
    name: Option<&str>,
) -> Result<Vec<Arc<Image>>, ImageError> {
    let name = name.map(Reference::parse).transpose()?.map(|reference| reference.to_string());
    let (scan_store, path) = (Arc::clone(store), path.to_owned());
    let (archive, found) = blocking(move || scan(&scan_store, &path, name.as_deref())).await?;
    let archive = Arc::new(archive);
    let mut images = Vec::with_capacity(found.len());
    for image in found {
        images.push(install(store, &archive, image).await?);
    }
    Ok(images)
}

/// An opened archive or layout directory; removes what it unpacked when dropped.
struct Archive {
    given: PathBuf,
    root: OwnedFd,
    _workspace: Option<Workspace>,
}

impl Archive {
    fn open(store: &Arc<Store>, path: &Path) -> Result<Self, ImageError> {
        let open = |path: &Path| tree::open_directory(path).map_err(ImageError::store("open", path));
        if path.is_dir() {
            return Ok(Self { given: path.to_owned(), root: open(path)?, _workspace: None });
        }
        let file = File::open(path).map_err(ImageError::store("open", path))?;
        let workspace = store.workspace()?;
        let unpacked = decompress(file).map_err(ImageError::store("read", path)).and_then(|source| {
            Applier::new(&workspace.fs(), &workspace.scratch())
                .and_then(|applier| applier.apply(source))
                .map_err(|cause| ImageError::Import { path: path.to_owned(), reason: cause.to_string() })
        });
        unpacked?;
        Ok(Self { given: path.to_owned(), root: open(&workspace.fs())?, _workspace: Some(workspace) })
    }

    fn failed(&self, reason: impl Into<String>) -> ImageError {
        ImageError::Import { path: self.given.clone(), reason: reason.into() }
    }

    fn file(&self, path: &Path) -> Result<File, ImageError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let file = rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve)
            .map(File::from)
            .map_err(|cause| self.failed(format!("it has no readable {}: {cause}", path.display())))?;
        match file.metadata() {
            Ok(metadata) if metadata.is_file() => Ok(file),
            _ => Err(self.failed(format!("{} is not a file", path.display()))),
        }
    }

    fn document(&self, path: &Path) -> Result<Vec<u8>, ImageError> {
        let mut bytes = Vec::new();
        let read = self.file(path)?.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes);
        read.map_err(ImageError::store("read", path))?;
        if bytes.len() as u64 > MAX_DOCUMENT {
            return Err(self.failed(format!("{} is larger than 8 MiB", path.display())));
        }
        Ok(bytes)
    }

    fn blob(&self, digest: &Digest) -> Result<Vec<u8>, ImageError> {
        let bytes = self.document(&blob_path(digest))?;
        if digest.matches(&bytes) { Ok(bytes) } else { Err(self.failed(format!("blob {digest} is damaged"))) }
    }

    fn has(&self, name: &str) -> bool {
        self.file(Path::new(name)).is_ok()
    }
}

fn blob_path(digest: &Digest) -> PathBuf {
    Path::new("blobs").join(digest.algorithm().name()).join(digest.hex())
}

fn scan(store: &Arc<Store>, path: &Path, name: Option<&str>) -> Result<(Archive, Vec<Found>), ImageError> {
    let archive = Archive::open(store, path)?;
    // Newer docker archives are both; the layout is the one with digests to verify, but names are in manifest.json.
    let found = if archive.has("manifest.json") {
        docker_images(&archive, name)?
    } else if archive.has("index.json") {
        layout_images(&archive, name)?
    } else {
        return Err(
            archive.failed("it is neither an OCI layout (index.json) nor a docker archive (manifest.json)")
        );
    };
    if found.is_empty() {
        return Err(archive.failed("it holds no image"));
    }
    if name.is_some() && found.len() > 1 {
        return Err(
            archive.failed(format!("it holds {} images, which one name cannot stand for", found.len()))
        );
    }
    Ok((archive, found))
}

fn docker_images(archive: &Archive, name: Option<&str>) -> Result<Vec<Found>, ImageError> {
    let bytes = archive.document(Path::new("manifest.json"))?;
    let entries: Vec<DockerEntry> =
        serde_json::from_slice(&bytes).map_err(|cause| archive.failed(format!("manifest.json: {cause}")))?;
    let mut found = Vec::with_capacity(entries.len());
    for entry in entries {
        let config = archive.document(Path::new(&entry.config))?;
        let diff_ids = diff_ids(&config).map_err(|reason| archive.failed(reason))?;
        let given = entry.repo_tags.unwrap_or_default();
        let tags = match name {
            Some(name) => vec![name.to_owned()],
            None => given
                .iter()
                .map(|tag| Reference::parse(tag).map(|reference| reference.to_string()))
                .collect::<Result<_, _>>()?,
        };
        let id = Digest::of(&config);
        let layer = |path: String| LayerFile { path: path.into(), blob: None };
        found.push(Found {
            blobs: vec![(id.clone(), config)],
            id,
            tags,
            annotations: Default::default(),
            diff_ids,
            layers: entry.layers.into_iter().map(layer).collect(),
        });
    }
    Ok(found)
}

fn layout_images(archive: &Archive, name: Option<&str>) -> Result<Vec<Found>, ImageError> {
    let bytes = archive.document(Path::new("index.json"))?;
    let Document::Index(entries) = parse(&bytes).map_err(|reason| archive.failed(reason))? else {
        return Err(archive.failed("index.json is not an index"));
    };
    entries.iter().map(|entry| layout_image(archive, entry, name)).collect()
}

fn layout_image(archive: &Archive, entry: &Descriptor, name: Option<&str>) -> Result<Found, ImageError> {
    let unusable = |reason: String| archive.failed(reason);
    let bytes = archive.blob(&entry.digest)?;
    let mut blobs = vec![(entry.digest.clone(), bytes)];
    let mut document = parse(&blobs[0].1).map_err(unusable)?;
    if let Document::Index(entries) = &document {
        let wanted = host_platforms();
        let chosen = choose(entries, &wanted).ok_or_else(|| {
            unusable(format!("it has no image for this machine but for {}", offered(entries)))
        })?;
        let bytes = archive.blob(&chosen.digest)?;
        blobs.push((chosen.digest.clone(), bytes.clone()));
        document = parse(&bytes).map_err(unusable)?;
    }
    let Document::Manifest(manifest) = document else {
        return Err(unusable("its index leads to another index".to_owned()));
    };
    let id = manifest.config.digest.clone();
    let config = archive.blob(&id)?;
    let diff_ids = diff_ids(&config).map_err(unusable)?;
    blobs.push((id.clone(), config));
    let layer = |blob: &Descriptor| LayerFile {
        path: blob_path(&blob.digest),
        blob: Some((blob.digest.clone(), blob.size)),
    };
    Ok(Found {
        id,
        tags: layout_name(entry, name).into_iter().collect(),
        blobs,
        annotations: manifest.annotations,
        diff_ids,
        layers: manifest.layers.iter().map(layer).collect(),
    })
}

/// The name given, or a full one recorded in the layout. A mere tag there names no repository.
fn layout_name(entry: &Descriptor, name: Option<&str>) -> Option<String> {
    if let Some(name) = name {
        return Some(name.to_owned());
    }
    ["io.containerd.image.name", "org.opencontainers.image.ref.name"]
        .iter()
        .filter_map(|key| entry.annotations.get(*key))
        .filter(|recorded| recorded.contains([':', '/']))
        .find_map(|recorded| Reference::parse(recorded).ok())
        .map(|reference| reference.to_string())
}

async fn install(store: &Arc<Store>, archive: &Arc<Archive>, image: Found) -> Result<Arc<Image>, ImageError> {
    if image.layers.len() != image.diff_ids.len() {
        return Err(archive.failed(format!(
            "image {} has {} layers but {} are described",
            image.id,
            image.layers.len(),
            image.diff_ids.len()
        )));
    }
    let bases = bases(&image.diff_ids);
    let mut layers = Vec::with_capacity(bases.len());
    // One after the other: the disk is read and written here, nothing is waited for.
    for ((file, diff_id), base) in image.layers.into_iter().zip(image.diff_ids).zip(bases.clone()) {
        let (store, archive) = (Arc::clone(store), Arc::clone(archive));
        let layer = blocking(move || {
            if let Some(lease) = store.lease_layer(&diff_id, &base) {
                return Ok(crate::pull::Layer::Ready(lease));
            }
            let expected = Expected { blob: file.blob, diff_id };
            unpack_layer(&store, archive.file(&file.path)?, &expected, &base)
        });
        layers.push(layer.await?);
    }
    let layers = settle(store, layers, bases).await?;
    let new = NewImage {
        id: image.id,
        tags: image.tags,
        digests: Vec::new(),
        blobs: image.blobs,
        annotations: image.annotations,
        layers,
    };
    let store = Arc::clone(store);
    blocking(move || store.commit_image(new)).await
}
