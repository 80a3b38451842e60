//! Everything a node's status is made of.

use super::machine::Machine;
use crate::config::Reserved;
use k8s_openapi::api::core::v1::{NodeAddress, NodeFeatures, NodeRuntimeHandler};

#[derive(Debug, Clone)]
pub struct Facts {
    pub addresses: Vec<NodeAddress>,
    pub machine: Machine,
    pub runtime: RuntimeFacts,
    pub images: Vec<ImageFacts>,
    /// None: no cap.
    pub max_images: Option<usize>,
    pub max_pods: usize,
    /// 0: no limit by processors.
    pub pods_per_core: u32,
    pub reserved: Reserved,
    /// The port of our HTTP server; 0 without one.
    pub port: u16,
    pub pressure: Pressure,
    pub health: Health,
    /// Labels and declared features of our own that the status shows.
    pub declared_features: Vec<String>,
}

/// What the runtime tells about itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RuntimeFacts {
    /// `name://version`.
    pub version: String,
    pub handlers: Vec<NodeRuntimeHandler>,
    pub features: Option<NodeFeatures>,
}

/// Whether this node can run pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Not known yet: what was last reported stays.
    Unknown,
    Ready,
    /// Each problem in a sentence.
    NotReady(Vec<String>),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressure {
    pub memory: bool,
    pub disk: bool,
    pub pid: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFacts {
    pub digests: Vec<String>,
    pub tags: Vec<String>,
    pub size: u64,
}
