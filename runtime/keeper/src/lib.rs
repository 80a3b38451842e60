//! The parent of every container: it spawns them through the OCI library, holds their standard streams, writes their
//! logs, reaps them and keeps each exit code until the agent has acknowledged it.
//!
//! `protocol` is what travels over the socket, `wire` how, `client` the agent's asynchronous side of it, `daemon` the
//! single-threaded program itself with `log` and `record` as its parts. The daemon never enters the asynchronous
//! runtime, so the binary does not carry it.

pub mod client;
pub mod daemon;
pub mod log;
pub mod protocol;
pub mod record;
pub mod wire;
