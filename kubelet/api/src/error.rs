//! What can go wrong between us and the API server.

/// A failed request. `reason` is the machine-readable word of the server's `Status` object.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ApiError {
    /// The server answered and said no.
    #[error("{method} {path}: {message} ({code} {reason})")]
    Status {
        method: &'static str,
        path: String,
        code: u16,
        reason: String,
        message: String,
        retry_after: Option<u32>,
    },
    /// The server could not be reached, or the connection broke.
    #[error("{method} {path}: cannot reach {server}: {cause}")]
    Unreachable { method: &'static str, path: String, server: String, cause: String },
    /// The server answered something that is not what was asked for.
    #[error("{method} {path}: cannot understand the answer: {cause}")]
    Malformed { method: &'static str, path: String, cause: String },
}

impl ApiError {
    #[must_use]
    pub fn code(&self) -> Option<u16> {
        match self {
            Self::Status { code, .. } => Some(*code),
            _ => None,
        }
    }
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(404)
    }
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }
    /// Trying the same again later may succeed.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Status { code, .. } => matches!(code, 409 | 429 | 500..=599),
            Self::Unreachable { .. } => true,
            Self::Malformed { .. } => false,
        }
    }
}
