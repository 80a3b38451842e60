//! What the keeper holds of each container.

use super::clients::ReplyTo;
use super::execs::Exec;
use super::poller::{Token, Watched};
use super::streams::Copies;
use crate::log::ContainerLog;
use crate::record::Record;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

#[derive(Debug)]
pub(super) struct Container {
    pub(super) record: Record,
    /// Absent when the OCI library lost track of it; then only the record and the streams are left.
    pub(super) oci: Option<orlop_oci::Container>,
    /// Until init has ended.
    pub(super) pidfd: Option<Watched>,
    pub(super) streams: Streams,
    pub(super) log: Option<ContainerLog>,
    pub(super) copies: Copies,
    pub(super) execs: BTreeMap<String, Exec>,
    /// Deletes that wait for init to end.
    pub(super) deletes: Vec<ReplyTo>,
    /// Init has ended as somebody else's child and that one has not reaped it yet: until when to wait for its code.
    pub(super) unreaped_until: Option<i64>,
}

/// The keeper's ends of a container's standard streams.
#[derive(Debug, Default)]
pub(super) struct Streams {
    pub(super) stdout: Option<Watched>,
    pub(super) stderr: Option<Watched>,
    /// Write end of the pipe, while the keeper keeps it.
    pub(super) stdin: Option<OwnedFd>,
    /// The terminal's master; `stdout` is then a duplicate of it.
    pub(super) console: Option<OwnedFd>,
}

impl Container {
    pub(super) fn new(record: Record, oci: Option<orlop_oci::Container>) -> Self {
        Self {
            record,
            oci,
            pidfd: None,
            streams: Streams::default(),
            log: None,
            copies: Copies::default(),
            execs: BTreeMap::new(),
            deletes: Vec::new(),
            unreaped_until: None,
        }
    }
}

/// A container whose init is still being set up.
#[derive(Debug)]
pub(super) struct Creating {
    pub(super) starting: orlop_oci::Starting,
    pub(super) token: Token,
    pub(super) record: Record,
    pub(super) log: Option<ContainerLog>,
    /// Read end of stdout and stderr, write end of stdin.
    pub(super) stdout: Option<OwnedFd>,
    pub(super) stderr: Option<OwnedFd>,
    pub(super) stdin: Option<OwnedFd>,
    pub(super) reply: ReplyTo,
}

#[derive(Debug, Default)]
pub(super) struct Containers {
    pub(super) creating: BTreeMap<String, Creating>,
    pub(super) existing: BTreeMap<String, Container>,
}

impl Containers {
    /// No handshake of the OCI library is under way.
    pub(super) fn settled(&self) -> bool {
        self.creating.is_empty()
            && self.existing.values().all(|c| c.execs.values().all(|exec| !exec.is_starting()))
    }

    /// Nanoseconds until something must be looked at again.
    pub(super) fn next_deadline(&self, now: i64) -> Option<i64> {
        self.existing.values().filter_map(|c| c.unreaped_until).min().map(|at| at - now)
    }
}
