//! Kubernetes API client: one HTTP/2 connection per server, credentials that rotate without a restart, requests as
//! values, list-watch that resumes.

pub mod auth;
pub mod backoff;
pub mod certificates;
pub mod client;
pub mod credentials;
pub mod error;
pub mod events;
pub mod kubeconfig;
mod pool;
pub mod tls;
pub mod watch;

pub use client::{Client, ClientError};
pub use credentials::Credentials;
pub use error::ApiError;
pub use kubeconfig::{KubeconfigError, ServerConfig};
