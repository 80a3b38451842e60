//! Container ids: one path component, so that an id can never name anything outside the state root.

use std::fmt;
use std::str::FromStr;

/// A validated container id: letters, digits and `_ + - .`, at most 1024 bytes, neither `.` nor `..`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContainerId(String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid container ID format: {0:?} (use letters, digits, and _ + - .)")]
pub struct InvalidId(pub String);

impl ContainerId {
    pub fn new(id: impl Into<String>) -> Result<Self, InvalidId> {
        let id = id.into();
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'+' | b'-' | b'.');
        if id.is_empty() || id.len() > 1024 || id == "." || id == ".." || !id.bytes().all(allowed) {
            return Err(InvalidId(id));
        }
        Ok(Self(id))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ContainerId {
    type Err = InvalidId;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Self::new(s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_one_harmless_path_component() {
        for good in ["a", "web-1", "A_b+c.d", "...", "0"] {
            assert!(ContainerId::new(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "é", "a\0"] {
            assert!(ContainerId::new(bad).is_err(), "{bad:?}");
        }
    }
}
