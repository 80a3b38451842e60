//! The container runtime of this process: image store, keeper, CRI service.

use crate::config::{MissingControllers, RuntimeSection};
use anyhow::{Context, Result, bail};
use orlop_cri::network::Conflist;
use orlop_cri::network::SandboxNetwork;
use orlop_cri::{Config, CriService, ServeError};
use orlop_image::ImageStore;
use orlop_keeper::client::Keeper;
use orlop_kubelet::shutdown::Shutdown;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

const LAST_CALLS: Duration = Duration::from_secs(2);

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
        let socket: PathBuf = section.listen.trim_start_matches("unix://").into();
        // Two on the same records would undo each other's work.
        if UnixStream::connect(&socket).await.is_ok() {
            bail!("another runtime answers at {}: stop it first (systemctl stop orlop)", socket.display());
        }
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
        Ok(Self { service, images, socket, preload: section.preload_dir.clone() })
    }

    /// Imports what lies in the preload folder. One bad archive keeps no other image from being there.
    pub async fn preload(&self) {
        let Some(folder) = &self.preload else { return };
        let archives = match archives(folder) {
            Ok(archives) => archives,
            Err(error) => {
                return tracing::warn!(folder = %folder.display(), %error, "cannot read the folder of images to preload");
            }
        };
        for path in archives {
            match self.images.import(&path, None).await {
                Ok(images) => {
                    let names: Vec<_> = images.iter().flat_map(|image| &image.repo_tags).collect();
                    tracing::info!(path = %path.display(), ?names, "image imported");
                }
                Err(error) => tracing::warn!(path = %path.display(), %error, "cannot import an image"),
            }
        }
    }

    /// Serves the CRI on its socket. Calls under way have a moment to end when the node stops; a client that follows
    /// events would otherwise hold us for ever.
    pub fn serve(&self, shutdown: Shutdown) -> JoinHandle<Result<(), ServeError>> {
        let (socket, service) = (self.socket.clone(), self.service.clone());
        tokio::spawn(async move {
            let stop = shutdown.clone();
            let patience = async {
                shutdown.triggered().await;
                tokio::time::sleep(LAST_CALLS).await;
            };
            tokio::select! {
                served = Box::pin(orlop_cri::serve(&socket, service, async move { stop.triggered().await })) => served,
                () = patience => {
                    // The next start replaces one that stays.
                    drop(std::fs::remove_file(&socket));
                    Ok(())
                }
            }
        })
    }

    /// An orderly end: the next start need not look for damage.
    pub async fn close(&self) {
        if let Err(error) = self.images.close().await {
            tracing::warn!(%error, "the image store could not be closed");
        }
    }
}

/// What is to be imported: the path itself if it is an archive or an OCI layout, or else what lies in it.
fn archives(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    if path.is_file() || path.join("oci-layout").exists() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found: Vec<PathBuf> = std::fs::read_dir(path)?.flatten().map(|entry| entry.path()).collect();
    found.sort();
    Ok(found)
}

/// The configuration's word, or else the environment's.
pub fn missing_controllers(configured: Option<MissingControllers>) -> orlop_cri::MissingControllers {
    let from_environment =
        || std::env::var("ORLOP_MISSING_CONTROLLERS").is_ok_and(|value| value.eq_ignore_ascii_case("warn"));
    let warn = configured.map_or_else(from_environment, |word| word == MissingControllers::Warn);
    if warn { orlop_cri::MissingControllers::Warn } else { orlop_cri::MissingControllers::Refuse }
}

/// CNI plugins as the network of sandboxes.
pub fn conflist(conf_dir: &Path, bin_dir: &Path, root: &Path) -> Result<Arc<dyn SandboxNetwork>> {
    let conflist = Conflist::open(conf_dir.to_owned(), vec![bin_dir.to_owned()], root.join("cni"))
        .with_context(|| format!("read CNI configurations from {}", conf_dir.display()))?;
    Ok(Arc::new(conflist))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_a_layout_and_a_folder_of_them_are_told_apart() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (layout, archive) = (folder.path().join("a"), folder.path().join("b.tar"));
        std::fs::create_dir(&layout)?;
        std::fs::write(layout.join("oci-layout"), "{}")?;
        std::fs::write(&archive, "")?;
        assert_eq!(archives(&layout)?.len(), 1);
        assert_eq!(archives(&archive)?.len(), 1);
        assert_eq!(archives(folder.path())?, [layout, archive]);
        assert!(archives(Path::new("/nonexistent")).is_err());
        Ok(())
    }
}
