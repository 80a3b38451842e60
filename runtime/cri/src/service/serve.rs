//! The CRI on a unix socket.

use super::CriService;
use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("cannot {operation} CRI socket {path}: {source}")]
    Socket { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("CRI socket {0} is in use by another process")]
    InUse(PathBuf),
    #[error("serving CRI socket {path}: {source}")]
    Transport { path: PathBuf, source: tonic::transport::Error },
}

/// Serves until `shutdown` resolves. The socket is for root alone; one left behind by a process that is gone is
/// replaced.
pub async fn serve(
    path: &Path,
    service: CriService,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let listener = bind(path).await?;
    let result = tonic::transport::Server::builder()
        .add_service(service.runtime_server())
        .add_service(service.image_server())
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown)
        .await;
    let _ = fs::remove_file(path);
    result.map_err(|source| ServeError::Transport { path: path.to_owned(), source })
}

async fn bind(path: &Path) -> Result<UnixListener, ServeError> {
    let error = |operation| move |source| ServeError::Socket { operation, path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(error("make the directory of"))?;
    }
    if UnixStream::connect(path).await.is_ok() {
        return Err(ServeError::InUse(path.to_owned()));
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(error("replace")(e)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(error("bind"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(error("restrict"))?;
    Ok(listener)
}
