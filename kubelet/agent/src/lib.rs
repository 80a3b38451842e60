//! The kubelet: pods, volumes, probes, node status, HTTP server.

pub mod config;
pub mod context;
pub mod cri;
pub mod hooks;
pub mod node;
pub mod objects;
pub mod pods;
pub mod podspec;
pub mod probes;
pub mod server;
pub mod shutdown;
pub mod volumes;

mod kubelet;
mod wiring;

pub use kubelet::Kubelet;
