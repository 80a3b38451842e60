//! Service proxy: cluster addresses, node ports and load balancer addresses over nftables, no `nft` program needed.
//!
//! [`objects`] are what the API server tells, [`model`] works out where each frontend leads ([`select`] picks the
//! endpoints), [`plan`] turns changes into transactions over the table that [`layout`] draws, [`conntrack`] forgets UDP
//! flows to endpoints that are gone, and [`run`] is the loop around them. Rules stay when the agent goes: it may be
//! restarted, or lose its API server, without a connection noticing.

pub mod config;
pub mod conntrack;
mod health;
pub mod layout;
pub mod model;
pub mod objects;
pub mod plan;
mod run;
pub mod select;

pub use config::{ConfigError, KubeProxyConfiguration, NodePortAddresses, ProxyConfig};
pub use health::Health;
pub use run::{Proxy, ProxyError};
