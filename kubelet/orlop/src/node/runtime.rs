//! The container runtime of this process: image store, keeper, CRI service.

use crate::config::{MissingControllers, RuntimeSection};
use anyhow::{Context, Result};
use orlop_cri::network::SandboxNetwork;
use orlop_cri::network::Conflist;
use orlop_cri::{Config, CriService, ServeError};
use orlop_image::ImageStore;
use orlop_keeper::client::Keeper;
use orlop_kubelet::shutdown::Shutdown;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::task::JoinHandle;

/// Opened and in agreement with keeper and kernel.
#[derive(Debug)]
pub struct LocalRuntime {
    pub service: CriService,
    images: Arc<ImageStore>,
    socket: PathBuf,
    preload: Option<PathBuf>,
}

impl LocalRuntime {
    pub async fn open(section: &RuntimeSection, network: Arc<dyn SandboxNetwork>) -> Result<Self> {
        let keeper = Keeper::connect(&section.keeper_socket).await?;
        let images = orlop_image::Config {
            registry_config_dir: section.registry_config_dir.clone(),
            max_concurrent_downloads: section.max_concurrent_downloads.max(1),
            ..orlop_image::Config::below(&section.root)
        };
        let (image_root, container_root) = (images.root.clone(), images.containers.clone());
        let images = Arc::new(ImageStore::open(images).await.context("open the image store")?);
        let config = Config {
            root: section.root.clone(),
            state: section.state.clone(),
            cgroup_root: section.cgroup_root.clone(),
            missing_controllers: missing_controllers(section.missing_controllers),
            image_root,
            container_root,
            log_max_bytes: 10 << 20,
            log_max_files: 5,
            ..Config::default()
        };
        let service = Box::pin(CriService::open(config, keeper, images.clone(), network))
            .await
            .context("open the container runtime")?;
        let socket = section.listen.trim_start_matches("unix://").into();
        Ok(Self { service, images, socket, preload: section.preload_dir.clone() })
    }

    /// Imports what lies in the preload folder. One bad archive keeps no other image from being there.
    pub async fn preload(&self) {
        let Some(folder) = &self.preload else { return };
        let entries = match std::fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) => {
                return tracing::warn!(folder = %folder.display(), %error, "cannot read the folder of images to preload");
            }
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            match self.images.import(&path, None).await {
                Ok(images) => {
                    let names: Vec<_> = images.iter().flat_map(|image| &image.repo_tags).collect();
                    tracing::info!(path = %path.display(), ?names, "image imported");
                }
                Err(error) => tracing::warn!(path = %path.display(), %error, "cannot import an image"),
            }
        }
    }

    /// Serves the CRI on its socket.
    pub fn serve(&self, shutdown: Shutdown) -> JoinHandle<Result<(), ServeError>> {
        let (socket, service) = (self.socket.clone(), self.service.clone());
        tokio::spawn(async move {
            let stop = async move { shutdown.triggered().await };
            Box::pin(orlop_cri::serve(&socket, service, stop)).await
        })
    }

    /// An orderly end: the next start need not look for damage.
    pub async fn close(&self) {
        if let Err(error) = self.images.close().await {
            tracing::warn!(%error, "the image store could not be closed");
        }
    }
}

/// The configuration's word, or else the environment's.
pub fn missing_controllers(configured: Option<MissingControllers>) -> orlop_cri::MissingControllers {
    let from_environment = || {
        std::env::var("ORLOP_MISSING_CONTROLLERS").is_ok_and(|value| value.eq_ignore_ascii_case("warn"))
    };
    let warn = configured.map_or_else(from_environment, |word| word == MissingControllers::Warn);
    if warn { orlop_cri::MissingControllers::Warn } else { orlop_cri::MissingControllers::Refuse }
}

/// CNI plugins as the network of sandboxes.
pub fn conflist(conf_dir: &Path, bin_dir: &Path, root: &Path) -> Result<Arc<dyn SandboxNetwork>> {
    let conflist = Conflist::open(conf_dir.to_owned(), vec![bin_dir.to_owned()], root.join("cni"))
        .with_context(|| format!("read CNI configurations from {}", conf_dir.display()))?;
    Ok(Arc::new(conflist))
}
