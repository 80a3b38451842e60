//! Pod network: bridge, addresses and host ports; library and CNI plugin.
//!
//! [`PodNetwork`] is used in-process by `orlop node`; [`plugin`] is the same behind CNI's command line and JSON.

mod network;
pub mod plugin;

pub use network::{
    Assigned, Attach, Attachment, Config, LeaseError, NetworkError, PodNetwork, PortMapping, Protocol, Range,
    RangeError, RangeSet,
};
pub use orlop_net::rtnl::Mac;
