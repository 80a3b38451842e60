//! The kubelet: pods, volumes, probes, node status, HTTP server.

pub mod context;
pub mod cri;
pub mod pods;
pub mod volumes;
pub mod podspec;
pub mod objects;
