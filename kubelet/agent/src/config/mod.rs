//! The kubelet's configuration: flags and `KubeletConfiguration` in, [`Config`] out.
//!
//! Two types on purpose: [`KubeletConfiguration`] is what a person wrote, with defaults filled (and what `/configz` shows);
//! [`Config`] is what the kubelet works with, parsed and checked. Everything wrong with the former is reported together.
//!
//! Every key is accepted and kept. [`ACTING`] lists those that have an effect today; setting another one to something
//! else than its default is reported by [`Config::inactive`], never silently ignored.
//!
//! Three defaults differ from the kubelet's: `containerRuntimeEndpoint` is empty, which means our own runtime in this
//! process; without a configuration file the secure defaults hold as well; images are pulled several at a time unless
//! `serializeImagePulls` says otherwise.

mod duration;
mod file;
mod flags;
mod parse;
mod resolve;
mod sections;
mod validate;

pub use duration::{DurationError, GoDuration};
pub use file::{API_VERSION, KIND, KubeletConfiguration};
pub use flags::KubeletFlags;
pub use parse::{from_map, load, parse};
pub use resolve::{ACTING, Config, Reserved, Threshold, resolve};
pub use sections::{
    AnonymousAuthentication, Authentication, Authorization, CrashLoopBackOff, Logging, MemoryReservation,
    MemorySwap, ShutdownGracePeriodByPriority, Taint, Tracing, UserNamespaces, VModule,
    WebhookAuthentication, WebhookAuthorization, X509Authentication,
};

use std::fmt;

/// One thing that is wrong: where, what, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    pub key: String,
    pub problem: String,
}

/// Everything that is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors {
    /// The file, or `command line`.
    pub origin: String,
    pub errors: Vec<ConfigError>,
}

impl ConfigErrors {
    fn one(origin: &str, key: &str, problem: impl Into<String>) -> Self {
        let error = ConfigError { key: key.to_owned(), problem: problem.into() };
        Self { origin: origin.to_owned(), errors: vec![error] }
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kubelet configuration {} has {} error(s):", self.origin, self.errors.len())?;
        for ConfigError { key, problem } in &self.errors {
            if key.is_empty() {
                write!(f, "\n  {problem}")?;
            } else {
                write!(f, "\n  {key}: {problem}")?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}
