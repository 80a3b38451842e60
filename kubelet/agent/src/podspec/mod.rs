//! From a Pod to what the container runtime is asked for: `PodSandboxConfig` and `ContainerConfig`.
//!
//! Everything that can be computed is computed from arguments (pod, [`Facts`], image) by the modules below; the two
//! functions here add what needs the disk (log directories, the hosts file, the termination message file, sub paths) and
//! the API server (ConfigMaps, Secrets, Services), in that order of dependence.

pub mod env;
pub mod expansion;
pub mod facts;
pub mod fields;
pub mod qos;
pub mod quantity;
pub mod sysctls;

mod container;
mod dns;
mod error;
mod hosts;
mod identity;
mod labels;
mod mounts;
mod resources;
mod sandbox;
mod security;
mod services;
mod subpath;

pub use container::{ContainerInputs, ContainerKind, container_config, ephemeral_as_container};
pub use dns::DnsWarning;
pub use error::{FieldError, SpecError};
pub use facts::{CgroupDriver, Facts, SharedFacts};
pub use identity::{namespace, pod_log_dir_name, pod_name, uid};
pub use labels::container_hash;
pub use mounts::termination_log_path;
pub use qos::{Qos, cgroup_parent, qos};
pub use resources::container_resources;
pub use sandbox::{SandboxSpec, sandbox_config, sandbox_spec};

pub(crate) use subpath::release as release_subpaths;

#[cfg(test)]
mod tests;
