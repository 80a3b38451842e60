//! Pods, from a manifest or an API object to running containers and a true status.
//!
//! ```text
//! source_static ─┐                                    ┌─> executor ──> parts (volumes, podspec, hooks, probes),
//! API watch ─────┴> store ─> manager ─> worker (one  ─┤                runtime_client, images, cgroups, logs
//! runtime_events ────────────────┘      per pod: ─────┴─> status::writer ──> API object or mirror
//! probes ────────────────────────┘      machine::step)
//! ```

pub mod admission;
pub mod backoff;
pub mod cgroups;
pub mod credentials;
pub mod directory;
pub mod events;
pub mod executor;
pub mod gc;
pub mod image_gc;
pub mod images;
pub mod labels;
pub mod logs;
pub mod machine;
pub mod manager;
pub mod manifest;
pub mod memory;
pub mod mirror;
pub mod parts;
pub mod runtime_client;
pub mod runtime_events;
pub mod runtime_state;
pub mod source_static;
pub mod status;
pub mod store;
pub mod worker;

#[cfg(test)]
mod scenarios;
