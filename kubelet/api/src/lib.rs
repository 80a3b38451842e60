//! Kubernetes API client: one HTTP/2 connection per server, credentials that rotate without a restart, requests as
//! values, list-watch that resumes.

pub mod client;
pub mod error;
pub mod watch;

pub use client::Client;
pub use error::ApiError;
