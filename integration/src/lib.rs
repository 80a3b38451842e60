//! Tests of orlop against peers that others wrote, the lab and the benchmarks.
//!
//! A [`lab::Lab`] is a small data centre on one machine: a network namespace with a bridge in which the real control
//! plane runs, and nodes that each have their own network, mount and cgroup namespace. Dropping it takes everything
//! away again: processes, cgroups, namespaces, mounts and files.

pub mod bench;
pub mod cluster;
pub mod control_plane;
pub mod image;
pub mod kubectl;
pub mod lab;
pub mod netns;
pub mod node;
pub mod peers;
pub mod pki;
pub mod process;
pub mod wait;
