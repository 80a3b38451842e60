//! Being told what changes, by whomever.

use super::RtnlError;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;
use rtnetlink::MulticastGroup;
use std::fmt;

/// Something happened; what is true now is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Link { index: u32 },
    LinkGone { index: u32 },
    Address { link: u32 },
    Route,
    Neighbour { link: u32 },
}

/// A subscription, from the moment it was opened.
pub struct Monitor {
    changes: BoxStream<'static, Change>,
    task: tokio::task::JoinHandle<()>,
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").finish_non_exhaustive()
    }
}

impl Monitor {
    /// In the calling thread's network namespace, within a tokio runtime.
    ///
    /// # Errors
    /// [`RtnlError::Open`]
    pub fn open() -> Result<Self, RtnlError> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let (connection, handle, messages) =
            rtnetlink::new_multicast_connection(&groups).map_err(RtnlError::Open)?;
        let task = tokio::spawn(connection);
        let changes = messages
            .filter_map(move |(message, _)| {
                // The connection ends when its last handle goes.
                let _keep = &handle;
                std::future::ready(match &message.payload {
                    NetlinkPayload::InnerMessage(inner) => change(inner),
                    _ => None,
                })
            })
            .boxed();
        Ok(Self { changes, task })
    }

    /// `None` when the subscription broke, as after an overrun of its buffer: open another one and read everything.
    pub async fn next(&mut self) -> Option<Change> {
        self.changes.next().await
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn change(message: &RouteNetlinkMessage) -> Option<Change> {
    let index = |link: &LinkMessage| link.header.index;
    Some(match message {
        RouteNetlinkMessage::NewLink(link) => Change::Link { index: index(link) },
        RouteNetlinkMessage::DelLink(link) => Change::LinkGone { index: index(link) },
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            Change::Address { link: address.header.index }
        }
        RouteNetlinkMessage::NewRoute(_) | RouteNetlinkMessage::DelRoute(_) => Change::Route,
        RouteNetlinkMessage::NewNeighbour(entry) | RouteNetlinkMessage::DelNeighbour(entry) => {
            Change::Neighbour { link: entry.header.ifindex }
        }
        _ => return None,
    })
}
