//! Links, addresses, routes and neighbours: small verbs on a route netlink connection.
//!
//! A connection belongs to the network namespace in which its socket was opened, wherever it is used. Refusals of the
//! kernel become [`RtnlError::Refused`], which says what was to be done to which object.

mod address;
mod link;
mod monitor;
mod neighbour;
mod route;

pub use link::{Far, InvalidMac, Link, LinkKind, Mac, Near, Vxlan};
pub use monitor::{Change, Monitor};
pub use neighbour::{FdbEntry, Neighbour};
pub use route::{Route, RouteTo};

use crate::netns::{Netns, NetnsError};
use rustix::io::Errno;
use std::io;

#[derive(Debug, thiserror::Error)]
pub enum RtnlError {
    #[error("cannot open a route netlink socket")]
    Open(#[source] io::Error),
    #[error("cannot open a route netlink socket in the network namespace")]
    Namespace(#[source] NetnsError),
    #[error("cannot {operation}: {errno}")]
    Refused { operation: String, errno: Errno },
    #[error("cannot {operation}: the netlink exchange failed")]
    Exchange { operation: String, source: Box<rtnetlink::Error> },
}

impl RtnlError {
    fn new(operation: impl FnOnce() -> String, error: rtnetlink::Error) -> Self {
        let operation = operation();
        match &error {
            rtnetlink::Error::NetlinkError(message) if message.code.is_some() => Self::Refused {
                operation,
                errno: Errno::from_raw_os_error(message.raw_code().saturating_neg()),
            },
            _ => Self::Exchange { operation, source: Box::new(error) },
        }
    }

    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// The object, or the link it belongs to, does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(
            self.errno(),
            Some(Errno::NOENT | Errno::NODEV | Errno::SRCH | Errno::ADDRNOTAVAIL | Errno::NXIO)
        )
    }

    #[must_use]
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(Errno::EXIST)
    }
}

/// Removal that finds nothing has succeeded.
///
/// # Errors
/// Every other failure of the removal.
pub fn ignore_missing(result: Result<(), RtnlError>) -> Result<(), RtnlError> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}

/// A connection to the kernel's routing tables and links. Must be made, and lives, within a tokio runtime.
#[derive(Debug)]
pub struct Rtnl {
    handle: rtnetlink::Handle,
    task: tokio::task::JoinHandle<()>,
}

impl Rtnl {
    /// In the calling thread's network namespace.
    ///
    /// # Errors
    /// [`RtnlError::Open`]
    pub fn open() -> Result<Self, RtnlError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(RtnlError::Open)?;
        Ok(Self { handle, task: tokio::spawn(connection) })
    }

    /// In another network namespace. The calling thread does not enter it, it waits for one that does.
    ///
    /// # Errors
    /// [`RtnlError::Open`], [`RtnlError::Namespace`]
    pub fn open_in(namespace: &Netns) -> Result<Self, RtnlError> {
        let runtime = tokio::runtime::Handle::current();
        namespace
            .run(|| {
                let _entered = runtime.enter();
                Self::open()
            })
            .map_err(RtnlError::Namespace)?
    }
}

impl Drop for Rtnl {
    fn drop(&mut self) {
        self.task.abort();
    }
}
