//! The parent of every container: it spawns them through the OCI library, holds their standard streams, writes their
//! logs, reaps them and keeps each exit code until the agent has acknowledged it.
//!
//! `protocol` is what travels over the socket, `client` the agent's asynchronous side of it, `daemon` the
//! single-threaded program itself.

pub mod client;
pub mod protocol;
