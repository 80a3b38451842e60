//! The kubelet: pods, volumes, probes, node status, HTTP server.

pub mod cri;
