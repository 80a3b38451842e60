//! Work in another network namespace.
//!
//! A thread that has entered a namespace is never used for anything else: it is made for one piece of work and ends
//! with it, so nothing can run in the wrong namespace by accident, not even after a panic. Sockets keep the namespace
//! in which they were opened, so mostly the work is to open one.

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error("cannot open network namespace {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("cannot create a network namespace")]
    Create(#[source] io::Error),
    #[error("cannot enter the network namespace (is it one, and do we have CAP_SYS_ADMIN?)")]
    Enter(#[source] io::Error),
    #[error("cannot start a thread for the network namespace")]
    Thread(#[source] io::Error),
    #[error("the work in the network namespace panicked: {0}")]
    Panicked(String),
}

/// An open network namespace; holding it keeps the namespace alive.
#[derive(Debug)]
pub struct Netns {
    file: OwnedFd,
}

impl Netns {
    /// # Errors
    /// [`NetnsError::Open`]
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let file = File::open(path).map_err(|source| NetnsError::Open { path: path.to_owned(), source })?;
        Ok(Self { file: file.into() })
    }

    /// A new namespace without a name: it ends with the last descriptor, process or socket in it.
    ///
    /// # Errors
    /// [`NetnsError::Create`]
    pub fn create() -> Result<Self, NetnsError> {
        let thread = std::thread::Builder::new().name("netns".to_owned()).spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)
                .map_err(|errno| NetnsError::Create(errno.into()))?;
            Self::current()
        });
        let joined = thread.map_err(NetnsError::Thread)?.join();
        joined.unwrap_or_else(|panic| Err(NetnsError::Panicked(panic_text(panic.as_ref()))))
    }

    /// That of the calling thread.
    ///
    /// # Errors
    /// [`NetnsError::Open`]
    pub fn current() -> Result<Self, NetnsError> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Whether both are the same namespace.
    ///
    /// # Errors
    /// [`NetnsError::Enter`] when one cannot be examined.
    pub fn is_same(&self, other: &Self) -> Result<bool, NetnsError> {
        let stat = |ns: &Self| rustix::fs::fstat(&ns.file).map_err(|errno| NetnsError::Enter(errno.into()));
        let (a, b) = (stat(self)?, stat(other)?);
        Ok((a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
    }

    /// Runs `work` in the namespace, on a thread of its own, and waits for it.
    ///
    /// # Errors
    /// [`NetnsError`] when the namespace cannot be entered or the work panicked.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        let namespace = self.file.as_fd();
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("netns".to_owned())
                .spawn_scoped(scope, move || {
                    rustix::thread::move_into_link_name_space(
                        namespace,
                        Some(rustix::thread::LinkNameSpaceType::Network),
                    )
                    .map_err(|errno| NetnsError::Enter(errno.into()))?;
                    Ok(work())
                })
                .map_err(NetnsError::Thread)?;
            thread.join().unwrap_or_else(|panic| Err(NetnsError::Panicked(panic_text(panic.as_ref()))))
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "without a text".to_owned())
}
