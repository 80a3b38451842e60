//! How often a container's probe has succeeded and failed, for the metrics. It begins anew with each container.

use super::{Outcome, ProbeKind};
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug, Default)]
pub(super) struct Counts {
    successful: AtomicU64,
    failed: AtomicU64,
    unknown: AtomicU64,
}

/// One probe's results so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProbeCount {
    pub(crate) pod_uid: String,
    pub(crate) container: String,
    pub(crate) kind: ProbeKind,
    pub(crate) successful: u64,
    pub(crate) failed: u64,
    pub(crate) unknown: u64,
}

impl Counts {
    pub(super) fn add(&self, outcome: &Outcome) {
        let count = match outcome {
            Outcome::Success | Outcome::Warning { .. } => &self.successful,
            Outcome::Failure { .. } => &self.failed,
            Outcome::Unknown { .. } => &self.unknown,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self, pod_uid: &str, container: &str, kind: ProbeKind) -> ProbeCount {
        ProbeCount {
            pod_uid: pod_uid.to_owned(),
            container: container.to_owned(),
            kind,
            successful: self.successful.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            unknown: self.unknown.load(Ordering::Relaxed),
        }
    }
}
