//! Mounts: what the specification asks for as data (`plan`, `options`), and made with the kernel's descriptor-based
//! mount calls (`apply`), so that no path is looked up twice.

pub(crate) mod apply;
pub(crate) mod options;
pub(crate) mod plan;

use std::io;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("mount destination {} is not allowed: the root file system has its own setting", .0.display())]
    Root(PathBuf),
    #[error("mount destination {} is inside /proc, where only proc itself and a few files may be mounted", .0.display())]
    InsideProc(PathBuf),
    #[error("mount on {}: {reason}", .destination.display())]
    Option { destination: PathBuf, reason: String },
    #[error("mount {kind} on {}: {step}{}", .destination.display(), .message.as_deref().map(|m| format!(" ({m})")).unwrap_or_default())]
    Mount { kind: String, destination: PathBuf, step: String, message: Option<String>, source: io::Error },
}
