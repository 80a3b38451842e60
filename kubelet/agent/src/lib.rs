//! The kubelet: pods, volumes, probes, node status, HTTP server.

pub mod context;
pub mod cri;
pub mod pods;
pub mod hooks;
pub mod probes;
pub mod volumes;
pub mod podspec;
pub mod objects;
pub mod config;
pub mod node;
pub mod server;
pub mod shutdown;

mod kubelet;
mod wiring;

pub use kubelet::Kubelet;
