//! CRI v1 services on the keeper, the image store and the OCI runtime.

pub mod network;
pub mod streaming;
