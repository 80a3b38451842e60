//! Pods, from a manifest or an API object to running containers and a true status.

pub mod backoff;
pub mod events;
pub mod labels;
pub mod qos;
pub mod quantity;
