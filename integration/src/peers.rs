//! Where the built programs are: ours, and the peers that `integration/peers` builds from pinned modules.

use anyhow::{Result, bail};
use std::path::{Path, PathBuf};

/// The folder of the workspace.
#[must_use]
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("integration/ lies in the workspace")
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// One of our own programs, as `cargo build --release` leaves it; `ORLOP_BIN_DIR` names another folder.
pub fn ours(name: &str) -> Result<PathBuf> {
    let folder = std::env::var_os("ORLOP_BIN_DIR").map_or_else(|| target().join("release"), PathBuf::from);
    existing(folder.join(name), "cargo build --release")
}

/// A peer, such as `kube-apiserver`.
pub fn peer(name: &str) -> Result<PathBuf> {
    existing(target().join("peers").join(name), "./integration/peers")
}

fn existing(path: PathBuf, remedy: &str) -> Result<PathBuf> {
    if !path.exists() {
        bail!("{} is missing; `{remedy}` makes it", path.display());
    }
    Ok(path)
}
