//! The Node object: registration, status, lease.
//!
//! ```text
//! host, runtime ──collect──> Facts ──node_status(facts, previous, now)──> NodeStatus ──status_patch──> API server
//!                                          ^                                                          │
//!                                          └───────────────── the Node, watched ──────────────────────┘
//! ```
//!
//! Invariants: readiness never flips because the agent restarted: until the runtime has answered, and for a short time
//! after the start while it settles, the conditions that the API server holds stay as they are. Fields of the status that
//! others own (attached volumes, device resources, foreign conditions) are left alone.

mod collect;
mod facts;
mod lease;
mod machine;
mod manager;
mod patch;
mod register;
mod status;
mod swap;

pub use facts::{Facts, Health, ImageFacts, Pressure, RuntimeFacts};
pub use machine::Machine;
pub use manager::{NodeHandle, NodeManager};
pub use patch::status_patch;
pub use register::initial_node;
pub use status::node_status;
pub use swap::{SwapOn, refuse_swap};

/// What we report as the kubelet's version: the API this agent implements. Version-skew checks read it.
pub const KUBELET_VERSION: &str = "v1.36.3";

/// The reference that events about a node carry.
#[must_use]
pub fn node_reference(name: &str) -> k8s_openapi::api::core::v1::ObjectReference {
    k8s_openapi::api::core::v1::ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Node".to_owned()),
        name: Some(name.to_owned()),
        // Events about nodes have always carried the name here; tools filter by it.
        uid: Some(name.to_owned()),
        ..Default::default()
    }
}
