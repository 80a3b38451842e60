//! Pulling: resolve, fetch what is missing, unpack while it arrives, record.
//!
//! Several callers who want the same image with the same credentials share one pull. It runs inside their futures and
//! ends when the last of them is dropped: the unpacking threads then see their input end early and discard their work.

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::{Buf, Bytes};
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, WeakShared, try_join_all};
use tokio::sync::{Semaphore, mpsc};

use crate::digest::{Digest, Hasher};
use crate::error::{ImageError, blocking};
use crate::layer::{Applied, Expected, unpack};
use crate::manifest::{Document, Manifest, choose, host_platforms, offered, parse};
use crate::reference::{Reference, Target};
use crate::registry::{BlobStream, Session, Timing};
use crate::store::{Lease, NewImage, Staged, Store};
use crate::{Auth, Image};

/// Pieces of a body on their way to the unpacker; hyper's are up to some hundred kilobytes.
const PIECES: usize = 8;
const MAX_CONFIG: usize = 8 << 20;

type Outcome = Result<Arc<Image>, ImageError>;
type Running = WeakShared<BoxFuture<'static, Outcome>>;

pub(crate) struct Puller {
    store: Arc<Store>,
    registry_config: Option<PathBuf>,
    downloads: Arc<Semaphore>,
    timing: Timing,
    running: Mutex<HashMap<(String, Option<Auth>), Running>>,
    /// One unpacking per layer at a time, across pulls.
    layers: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
}

impl std::fmt::Debug for Puller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Puller").field("registry_config", &self.registry_config).finish_non_exhaustive()
    }
}

/// A layer that is there, or one that still has to learn the attributes of directories it doesn't describe from the
/// layers below it.
pub(crate) enum Layer {
    Ready(Lease),
    Pending(Staged, Applied),
}

impl Puller {
    pub(crate) fn new(
        store: Arc<Store>,
        registry_config: Option<PathBuf>,
        downloads: usize,
        timing: Timing,
    ) -> Self {
        let downloads = Arc::new(Semaphore::new(downloads.clamp(1, 64)));
        Self {
            store,
            registry_config,
            downloads,
            timing,
            running: Mutex::default(),
            layers: Mutex::default(),
        }
    }

    /// Joins the running pull of this reference with these credentials, or starts one.
    pub(crate) async fn pull(self: &Arc<Self>, reference: Reference, auth: Option<&Auth>) -> Outcome {
        let key = (reference.to_string(), auth.cloned());
        let shared = {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            running.retain(|_, pull| pull.upgrade().is_some());
            match running.get(&key).and_then(WeakShared::upgrade) {
                Some(shared) => shared,
                None => {
                    let (this, auth) = (Arc::clone(self), auth.cloned());
                    let future = async move { this.fetch(&reference, auth.as_ref()).await }.boxed().shared();
                    running.extend(future.downgrade().map(|weak| (key, weak)));
                    future
                }
            }
        };
        shared.await
    }

    async fn fetch(&self, reference: &Reference, auth: Option<&Auth>) -> Outcome {
        let session = Session::new(reference, self.registry_config.as_deref(), auth, self.timing)?;
        if let Some(image) = self.unchanged(&session, reference).await? {
            return Ok(image);
        }
        let top = session.manifest().await?;
        let mut blobs = vec![(top.digest.clone(), top.bytes.to_vec())];
        let unusable = |reason| ImageError::Unsupported { object: reference.to_string(), reason };
        let manifest = match parse(&top.bytes).map_err(unusable)? {
            Document::Manifest(manifest) => manifest,
            Document::Index(entries) => {
                let wanted = host_platforms();
                let entry = choose(&entries, &wanted).ok_or_else(|| ImageError::NoPlatform {
                    object: reference.to_string(),
                    wanted: wanted.first().map(ToString::to_string).unwrap_or_default(),
                    offered: offered(&entries),
                })?;
                let inner = session.manifest_by_digest(&entry.digest).await?;
                blobs.push((inner.digest, inner.bytes.to_vec()));
                match parse(&inner.bytes).map_err(unusable)? {
                    Document::Manifest(manifest) => manifest,
                    Document::Index(_) => {
                        return Err(unusable("its index leads to another index".to_owned()));
                    }
                }
            }
        };
        let id = manifest.config.digest.clone();
        let layers = match self.store.lease_image(&id) {
            Some(known) => known,
            None => {
                let config = session.small_blob(&id, MAX_CONFIG).await?;
                let diff_ids = diff_ids(&config).map_err(unusable)?;
                blobs.push((id.clone(), config.to_vec()));
                self.layers(&session, reference, &manifest, &diff_ids).await?
            }
        };
        let tag = matches!(reference.target(), Target::Tag(_)).then(|| reference.to_string());
        let new = NewImage {
            id,
            tags: tag.into_iter().collect(),
            digests: vec![reference.with_digest(top.digest).to_string()],
            blobs,
            annotations: manifest.annotations,
            layers,
        };
        let store = Arc::clone(&self.store);
        blocking(move || store.commit_image(new)).await
    }

    /// The image on this node, if the registry (which has checked the credentials) says it is still the same.
    async fn unchanged(
        &self,
        session: &Session,
        reference: &Reference,
    ) -> Result<Option<Arc<Image>>, ImageError> {
        let known = self.store.index().find(&reference.to_string()).map(|entry| Arc::clone(&entry.image));
        let Some(image) = known else { return Ok(None) };
        let Some(digest) = session.head().await? else { return Ok(None) };
        let name = reference.with_digest(digest).to_string();
        Ok(image.repo_digests.contains(&name).then_some(image))
    }

    async fn layers(
        &self,
        session: &Session,
        reference: &Reference,
        manifest: &Manifest,
        diff_ids: &[Digest],
    ) -> Result<Vec<Lease>, ImageError> {
        if manifest.layers.len() != diff_ids.len() {
            return Err(ImageError::Unsupported {
                object: reference.to_string(),
                reason: format!(
                    "its manifest has {} layers, its configuration {}",
                    manifest.layers.len(),
                    diff_ids.len()
                ),
            });
        }
        let bases = bases(diff_ids);
        let fetches = manifest.layers.iter().zip(diff_ids).zip(&bases).map(|((blob, diff_id), base)| {
            let expected =
                Expected { blob: Some((blob.digest.clone(), blob.size)), diff_id: diff_id.clone() };
            self.layer(base.clone(), expected, move |sender| async move {
                let mut stream = BlobStream::new(session, &blob.digest, blob.size);
                while let Some(piece) = stream.next().await? {
                    // The unpacker has given up; its own error is the one that counts.
                    if sender.send(Some(piece)).await.is_err() {
                        return Ok(());
                    }
                }
                let _ = sender.send(None).await;
                Ok(())
            })
        });
        let layers = try_join_all(fetches).await?;
        settle(&self.store, layers, bases).await
    }

    /// One layer: found, or fed by `feed` through the unpacker. A `None` marks the orderly end of the input.
    async fn layer<F, Fut>(&self, base: String, expected: Expected, feed: F) -> Result<Layer, ImageError>
    where
        F: FnOnce(mpsc::Sender<Option<Bytes>>) -> Fut,
        Fut: Future<Output = Result<(), ImageError>>,
    {
        if let Some(lease) = self.store.lease_layer(&expected.diff_id, &base) {
            return Ok(Layer::Ready(lease));
        }
        let turn = self.turn(&expected.diff_id);
        let _turn = turn.lock().await;
        if let Some(lease) = self.store.lease_layer(&expected.diff_id, &base) {
            return Ok(Layer::Ready(lease));
        }
        // The semaphore is never closed; were it, the download would merely not be limited.
        let permit = Arc::clone(&self.downloads).acquire_owned().await.ok();
        let (sender, receiver) = mpsc::channel(PIECES);
        let store = Arc::clone(&self.store);
        let worker = blocking(move || {
            let _permit = permit;
            unpack_layer(
                &store,
                ChannelReader { receiver, current: Bytes::new(), ended: false },
                &expected,
                &base,
            )
        });
        // Both together: the unpacker only starts to run when it is polled or spawned.
        let (fed, unpacked) = tokio::join!(feed(sender), worker);
        fed?;
        unpacked
    }

    fn turn(&self, diff_id: &Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        layers.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = layers.get(diff_id).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::default();
        layers.insert(diff_id.clone(), Arc::downgrade(&turn));
        turn
    }
}

/// Unpacks into a staging directory and commits, unless the layer must wait for those below it.
pub(crate) fn unpack_layer(
    store: &Arc<Store>,
    source: impl Read + Send,
    expected: &Expected,
    base: &str,
) -> Result<Layer, ImageError> {
    let staged = store.stage_layer(&expected.diff_id)?;
    let applied = unpack(source, expected, &staged.fs(), &staged.scratch()).map_err(|cause| {
        let blob = expected.blob.as_ref().map_or(&expected.diff_id, |(digest, _)| digest);
        ImageError::Layer { layer: blob.to_string(), cause }
    })?;
    if applied.implied.is_empty() {
        store.commit_layer(staged, &applied, base, &[]).map(Layer::Ready)
    } else {
        Ok(Layer::Pending(staged, applied))
    }
}

/// Commits the layers that waited, from the bottom up.
pub(crate) async fn settle(
    store: &Arc<Store>,
    layers: Vec<Layer>,
    bases: Vec<String>,
) -> Result<Vec<Lease>, ImageError> {
    let store = Arc::clone(store);
    blocking(move || {
        let mut leases: Vec<Lease> = Vec::with_capacity(layers.len());
        for (layer, base) in layers.into_iter().zip(bases) {
            let lease = match layer {
                Layer::Ready(lease) => lease,
                Layer::Pending(staged, applied) => {
                    let below: Vec<&Lease> = leases.iter().collect();
                    store.commit_layer(staged, &applied, &base, &below)?
                }
            };
            leases.push(lease);
        }
        Ok(leases)
    })
    .await
}

/// For each layer the chain id of those below it, empty for the bottom.
pub(crate) fn bases(diff_ids: &[Digest]) -> Vec<String> {
    let mut chain = String::new();
    let mut bases = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        bases.push(chain.clone());
        chain = if chain.is_empty() {
            diff_id.to_string()
        } else {
            let mut hasher = Hasher::new(diff_id.algorithm());
            hasher.update(format!("{chain} {diff_id}").as_bytes());
            hasher.finish().to_string()
        };
    }
    bases
}

/// The layers an image configuration names, bottom first. The reason is for a person.
pub(crate) fn diff_ids(config: &[u8]) -> Result<Vec<Digest>, String> {
    #[derive(serde::Deserialize)]
    struct RootFs {
        #[serde(default)]
        diff_ids: Vec<Digest>,
    }
    #[derive(serde::Deserialize)]
    struct Config {
        rootfs: RootFs,
    }
    let config: Config = serde_json::from_slice(config)
        .map_err(|cause| format!("its configuration cannot be read: {cause}"))?;
    if config.rootfs.diff_ids.is_empty() {
        return Err("it has no layers".to_owned());
    }
    Ok(config.rootfs.diff_ids)
}

/// The blocking side of a download. Input that ends without its mark was cancelled or failed.
struct ChannelReader {
    receiver: mpsc::Receiver<Option<Bytes>>,
    current: Bytes,
    ended: bool,
}

impl Read for ChannelReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.ended {
            match self.receiver.blocking_recv() {
                Some(Some(piece)) => self.current = piece,
                Some(None) => self.ended = true,
                None => {
                    return Err(io::Error::new(
                        io::ErrorKind::ConnectionAborted,
                        "the download was cancelled",
                    ));
                }
            }
        }
        let count = buffer.len().min(self.current.len());
        self.current.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}
