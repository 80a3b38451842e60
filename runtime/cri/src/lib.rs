//! CRI v1 services on the keeper, the image store and the OCI runtime.
//!
//! ```text
//! service/    gRPC in and out            spec/       kubelet's configuration -> OCI configuration (pure)
//! sandbox/    namespaces, files, network container/  records, create, start, stop, exec, update
//! stats/      cgroup readings            streaming/  exec, attach, port-forward over HTTP
//! network/    what a pod network must do, and conflists executed as plugins
//! ```
//!
//! State: one record per sandbox and per container in `<root>/cri/`, bundles and pinned namespaces in `<state>`. Every
//! object has its own lock; nothing slow is done under one that others need.

mod config;
mod container;
mod error;
mod events;
pub mod network;
mod pause;
mod reconcile;
mod record;
mod runtime;
mod sandbox;
mod service;
mod spec;
mod stats;
mod store;
pub mod streaming;

pub use config::{Config, MissingControllers, Ulimit};
pub use error::CriError;
pub use service::{CriService, MAX_MESSAGE, ServeError, serve};
