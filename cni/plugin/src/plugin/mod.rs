//! The CNI plugin: environment and JSON in, JSON out. Specification 0.1.0 to 1.1.0.
//!
//! One program answers for two types: `orlop-cni`, configured like the reference bridge plugin with host-local
//! addresses and port mappings built in, and `flannel`, which takes its subnet from the overlay's environment file.

mod config;
mod error;
mod flannel;
mod result;
mod verbs;

pub use error::{Code, PluginError};
pub use verbs::{Environment, run, version_of};

/// Versions we answer in, oldest first.
pub const SUPPORTED_VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
