//! SPDY/3.1 as Kubernetes uses it for exec, attach and port-forward: multiplexed byte streams over one upgraded HTTP
//! connection. No flow control beyond TCP's, which is how every peer of this protocol does it.
//!
//! [`frame`] and [`headers`] are pure; [`connection`] moves bytes.

pub(crate) mod connection;
mod frame;
mod headers;

pub use connection::{Connection, Role, Stream};
