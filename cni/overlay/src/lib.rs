//! Flannel-compatible VXLAN overlay.
//!
//! [`Overlay`] joins a node to a network that stock flannel nodes may be part of: same annotations, same device, same
//! entries on the wire and on disk. What should be is a pure function of the nodes ([`plan`]); what is to be done about
//! what is, another ([`diff`]); [`Executor`] reads and writes the kernel.

mod config;
mod executor;
pub mod masquerade;
pub mod node;
mod plan;
mod run;
pub mod subnet_env;

pub use config::{Config, ConfigError, NetConf};
pub use executor::{Executor, ExecutorError};
pub use plan::{
    Desired, Device, Entries, Observed, ObservedDevice, Op, Own, Peer, PeerRoute, Through, Underlay, diff,
    plan,
};
pub use run::{Lease, Overlay, OverlayError};
