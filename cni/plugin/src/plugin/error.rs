//! Failures as CNI wants them: a code, a message and details.

use crate::network::{LeaseError, NetworkError};
use serde::Serialize;
use std::error::Error as _;

/// The codes of the specification, and 100 for what goes wrong within the plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    IncompatibleVersion = 1,
    InvalidEnvironment = 4,
    Io = 5,
    Decode = 6,
    InvalidConfig = 7,
    TryAgainLater = 11,
    NotAvailable = 50,
    NotAvailableLimited = 51,
    Internal = 100,
}

#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct PluginError {
    pub code: Code,
    pub message: String,
    pub details: String,
}

#[derive(Debug, Serialize)]
struct Object<'a> {
    #[serde(rename = "cniVersion")]
    version: &'a str,
    code: u32,
    msg: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    details: &'a str,
}

impl PluginError {
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: String::new() }
    }

    #[must_use]
    pub fn details(mut self, details: impl ToString) -> Self {
        self.details = details.to_string();
        self
    }

    /// What goes to standard output.
    #[must_use]
    pub fn to_json(&self, version: &str) -> String {
        let object = Object { version, code: self.code as u32, msg: &self.message, details: &self.details };
        serde_json::to_string(&object).unwrap_or_else(|_| "{\"code\":100}".to_owned())
    }
}

impl From<NetworkError> for PluginError {
    fn from(error: NetworkError) -> Self {
        let code = match &error {
            NetworkError::NoPodCidr | NetworkError::Lease(LeaseError::Exhausted { .. }) => {
                Code::TryAgainLater
            }
            NetworkError::InterfaceName(_) => Code::InvalidEnvironment,
            NetworkError::NetworkName(_)
            | NetworkError::Range(_)
            | NetworkError::NotABridge { .. }
            | NetworkError::Lease(LeaseError::Unavailable { .. }) => Code::InvalidConfig,
            NetworkError::BootId(_)
            | NetworkError::Lease(LeaseError::File { .. })
            | NetworkError::Netns(_)
            | NetworkError::Sysctl(_) => Code::Io,
            _ => Code::Internal,
        };
        let mut causes = Vec::new();
        let mut source = error.source();
        while let Some(cause) = source {
            causes.push(cause.to_string());
            source = cause.source();
        }
        Self { code, message: error.to_string(), details: causes.join(": ") }
    }
}
