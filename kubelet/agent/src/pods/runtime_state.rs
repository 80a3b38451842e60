//! A pod as the runtime shows it, in our own types.
//!
//! Observations of containers only move forward (created, running, exited): an answer that was on its way while
//! something changed cannot take a container back to an earlier state.

use super::labels;
use jiff::Timestamp;
use orlop_proto::cri;
use std::net::IpAddr;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RunState {
    /// The runtime has lost sight of it.
    Unknown,
    Created,
    Running,
    Exited,
}

/// One container that exists in the runtime.
#[derive(Debug, Clone, PartialEq)]
pub struct ContainerRecord {
    pub id: String,
    pub name: String,
    pub sandbox_id: String,
    /// How often the container had been restarted when this one was made.
    pub attempt: u32,
    pub state: RunState,
    pub created_at: Timestamp,
    pub started_at: Option<Timestamp>,
    pub finished_at: Option<Timestamp>,
    pub exit_code: i32,
    pub reason: String,
    pub message: String,
    pub image: String,
    pub image_ref: String,
    pub hash: String,
    pub log_path: String,
    /// Where on the host the file behind the container's termination message path lies.
    pub message_file: Option<String>,
    /// Without a message in the file, the end of the log is the message.
    pub falls_back_to_logs: bool,
    pub user: Option<(i64, i64, Vec<i64>)>,
}

impl ContainerRecord {
    #[must_use]
    pub fn is_running(&self) -> bool {
        // What the runtime cannot see may well be running: it has to be stopped like a running one.
        matches!(self.state, RunState::Running | RunState::Unknown)
    }

    #[must_use]
    pub fn has_exited(&self) -> bool {
        self.state == RunState::Exited
    }

    /// When it ended, or failing that, the last time it was known to live.
    #[must_use]
    pub fn ended_at(&self) -> Timestamp {
        self.finished_at.or(self.started_at).unwrap_or(self.created_at)
    }

    /// None when the runtime's answer carries no Kubernetes container name: then it is not ours.
    #[must_use]
    pub fn from_cri(sandbox_id: &str, status: cri::ContainerStatus) -> Option<Self> {
        let name = status.labels.get(labels::CONTAINER_NAME)?.clone();
        let metadata = status.metadata.unwrap_or_default();
        let attempt = status
            .annotations
            .get(labels::RESTART_COUNT)
            .and_then(|text| text.parse().ok())
            .unwrap_or(metadata.attempt);
        let message_path = status.annotations.get(labels::MESSAGE_PATH);
        let message_file = message_path.and_then(|path| {
            let mount = status.mounts.iter().find(|mount| mount.container_path == *path)?;
            Some(mount.host_path.clone())
        });
        Some(Self {
            name,
            sandbox_id: sandbox_id.to_owned(),
            attempt,
            state: match cri::ContainerState::try_from(status.state) {
                Ok(cri::ContainerState::ContainerCreated) => RunState::Created,
                Ok(cri::ContainerState::ContainerRunning) => RunState::Running,
                Ok(cri::ContainerState::ContainerExited) => RunState::Exited,
                _ => RunState::Unknown,
            },
            created_at: time(status.created_at).unwrap_or_default(),
            started_at: time(status.started_at),
            finished_at: time(status.finished_at),
            exit_code: status.exit_code,
            reason: status.reason,
            message: status.message,
            image: status.image.map(|image| image.image).unwrap_or_default(),
            image_ref: status.image_ref,
            hash: status.annotations.get(labels::CONTAINER_HASH).cloned().unwrap_or_default(),
            log_path: status.log_path,
            message_file,
            falls_back_to_logs: status.annotations.get(labels::MESSAGE_POLICY).map(String::as_str)
                == Some("FallbackToLogsOnError"),
            user: status
                .user
                .and_then(|user| user.linux)
                .map(|linux| (linux.uid, linux.gid, linux.supplemental_groups)),
            id: status.id,
        })
    }
}

/// Nanoseconds since 1970; the runtime writes 0 for "never".
fn time(nanos: i64) -> Option<Timestamp> {
    (nanos > 0).then(|| Timestamp::from_nanosecond(i128::from(nanos)).ok()).flatten()
}

/// One sandbox that exists in the runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxRecord {
    pub id: String,
    pub attempt: u32,
    pub ready: bool,
    pub created_at: Timestamp,
    /// Primary address first; empty in the host's network.
    pub ips: Vec<IpAddr>,
}

impl SandboxRecord {
    #[must_use]
    pub fn from_cri(status: cri::PodSandboxStatus) -> Self {
        let ips = status.network.map(|network| {
            let rest = network.additional_ips.into_iter().map(|ip| ip.ip);
            std::iter::once(network.ip).chain(rest).filter_map(|ip| ip.parse().ok()).collect()
        });
        Self {
            attempt: status.metadata.map_or(0, |metadata| metadata.attempt),
            ready: status.state == cri::PodSandboxState::SandboxReady as i32,
            created_at: time(status.created_at).unwrap_or_default(),
            ips: ips.unwrap_or_default(),
            id: status.id,
        }
    }
}

/// All sandboxes and containers of one pod, newest first.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PodRuntime {
    pub sandboxes: Vec<SandboxRecord>,
    pub containers: Vec<ContainerRecord>,
}

impl PodRuntime {
    pub fn sort(&mut self) {
        self.sandboxes.sort_by_key(|s| std::cmp::Reverse((s.attempt, s.created_at)));
        self.containers.sort_by_key(|c| std::cmp::Reverse((c.attempt, c.created_at)));
    }

    /// The newest sandbox, if it is alive.
    #[must_use]
    pub fn live_sandbox(&self) -> Option<&SandboxRecord> {
        self.sandboxes.first().filter(|sandbox| sandbox.ready)
    }

    /// The newest container of that name.
    #[must_use]
    pub fn latest(&self, name: &str) -> Option<&ContainerRecord> {
        self.containers.iter().find(|container| container.name == name)
    }

    /// The newest container of that name in one sandbox.
    #[must_use]
    pub fn latest_in(&self, sandbox_id: &str, name: &str) -> Option<&ContainerRecord> {
        self.containers.iter().find(|c| c.name == name && c.sandbox_id == sandbox_id)
    }

    /// The newest finished one before `record`.
    #[must_use]
    pub fn previous(&self, record: &ContainerRecord) -> Option<&ContainerRecord> {
        self.containers
            .iter()
            .filter(|c| c.name == record.name && c.has_exited())
            .find(|c| c.id != record.id && (c.attempt, c.created_at) <= (record.attempt, record.created_at))
    }

    #[must_use]
    pub fn container(&self, id: &str) -> Option<&ContainerRecord> {
        self.containers.iter().find(|container| container.id == id)
    }

    #[must_use]
    pub fn any_running(&self) -> bool {
        self.containers.iter().any(ContainerRecord::is_running)
    }

    /// Takes in a container's newer state, or the container if it was unknown.
    pub fn merge_container(&mut self, record: ContainerRecord) {
        match self.containers.iter_mut().find(|known| known.id == record.id) {
            Some(known) if record.state >= known.state || known.state == RunState::Unknown => *known = record,
            Some(_) => {}
            None => {
                self.containers.push(record);
                self.sort();
            }
        }
    }

    pub fn merge_sandbox(&mut self, record: SandboxRecord) {
        match self.sandboxes.iter_mut().find(|known| known.id == record.id) {
            Some(known) => {
                let stays_dead = !known.ready;
                *known = record;
                known.ready &= !stays_dead;
            }
            None => {
                self.sandboxes.push(record);
                self.sort();
            }
        }
    }
}
