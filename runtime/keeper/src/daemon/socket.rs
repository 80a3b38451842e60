//! The listening socket: for root alone.

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("cannot make the directory of the socket {path}: {source}")]
    Directory { path: PathBuf, source: std::io::Error },
    #[error("cannot listen on {path}: {source}")]
    Listen { path: PathBuf, source: Errno },
}

const BACKLOG: i32 = 64;

/// Bound beside its place and renamed into it: nobody can connect before the mode is set and the queue is open, and a
/// socket left behind by a dead keeper is replaced.
pub(super) fn listen(path: &Path) -> Result<OwnedFd, SocketError> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)
            .map_err(|source| SocketError::Directory { path: parent.to_owned(), source })?;
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let make = || -> Result<OwnedFd, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        unlink(&temporary);
        rustix::net::bind(&socket, &SocketAddrUnix::new(&temporary)?)?;
        rustix::fs::chmod(&temporary, Mode::RUSR | Mode::WUSR)?;
        rustix::net::listen(&socket, BACKLOG)?;
        rustix::fs::rename(&temporary, path)?;
        Ok(socket)
    };
    make().map_err(|source| SocketError::Listen { path: path.to_owned(), source })
}

pub(super) fn unlink(path: &Path) {
    // Absence is success, and whatever else remains is replaced at the next start.
    let _ = std::fs::remove_file(path);
}

/// Accepts one connection; `None` when none waits or the peer is not root.
pub(super) fn accept(listener: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = match rustix::net::accept_with(listener, flags) {
        Ok(socket) => socket,
        Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return Ok(None),
        Err(error) => return Err(error),
    };
    let peer = rustix::net::sockopt::socket_peercred(&socket)?;
    if !peer.uid.is_root() {
        tracing::warn!(uid = peer.uid.as_raw(), "refused a client that is not root");
        return Ok(None);
    }
    Ok(Some(socket))
}
