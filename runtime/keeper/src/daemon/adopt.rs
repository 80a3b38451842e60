//! Starting where another keeper has ended: from records on disk, descriptors that the service manager kept, and what
//! the kernel still knows.

use super::containers::Container;
use super::poller::{READ, Target};
use super::spawn::process_start;
use super::{Daemon, DaemonError, fdstore};
use crate::log::{ContainerLog, LogFile, LogState};
use crate::protocol::Phase;
use crate::record::Record;
use orlop_oci::ContainerId;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

type Passed = BTreeMap<(String, String), OwnedFd>;

impl Daemon {
    pub(super) fn adopt(&mut self) -> Result<(), DaemonError> {
        let loaded = self.store.load()?;
        let mut passed = fdstore::take_passed();
        for error in &loaded.errors {
            tracing::error!(%error, "left a container's record alone");
        }
        for id in &loaded.unfinished {
            self.remove_unfinished(id);
        }
        for record in loaded.records {
            self.adopt_container(record, &mut passed);
        }
        for (id, what) in passed.keys() {
            tracing::warn!(container = %id, what, "closed a descriptor of an unknown container");
            self.fdstore.remove(id, what);
        }
        Ok(())
    }

    fn remove_unfinished(&self, id: &str) {
        if let Some(oci) = self.load_oci(id)
            && let Err(error) = oci.delete(true)
        {
            tracing::error!(container = id, %error, "cannot remove a container that was never finished");
            return;
        }
        if let Err(error) = self.store.remove(id) {
            tracing::error!(%error, "cannot remove a container that was never finished");
        }
    }

    pub(super) fn load_oci(&self, id: &str) -> Option<orlop_oci::Container> {
        let container = ContainerId::new(id).ok()?;
        match orlop_oci::Container::load(&self.store.oci_root(id), &container) {
            Ok(oci) => Some(oci),
            Err(error) => {
                tracing::warn!(container = id, %error, "the runtime's state is lost");
                None
            }
        }
    }

    fn adopt_container(&mut self, record: Record, passed: &mut Passed) {
        let id = record.id.clone();
        let mut take = |what: &str| passed.remove(&(id.clone(), what.to_owned()));
        let (pidfd, console, stdin) = (take("pidfd"), take("console"), take("stdin"));
        let stdout = take("stdout").or_else(|| reopen_output(&record, 1, record.stdout_inode));
        let stderr = take("stderr").or_else(|| reopen_output(&record, 2, record.stderr_inode));
        let oci = self.load_oci(&id);
        let mut container = Container::new(record, oci);
        container.log = container.record.log.as_ref().map(|target| {
            let file = LogFile::restore(target, None, crate::log::LogFileState::default());
            ContainerLog::restore(file, container.record.tty, LogState::default())
        });
        container.streams.stdin = stdin;
        if let Err(error) = self.watch_streams(&mut container, console, stdout, stderr) {
            tracing::error!(container = id, %error, "cannot watch the output");
        }
        let exited = container.record.phase == Phase::Exited;
        let pidfd = pidfd.or_else(|| open_process(&container.record));
        if let (false, Some(pidfd)) = (exited, pidfd) {
            match self.poller.watch(pidfd, READ, Target::Init(id.clone())) {
                Ok(watched) => container.pidfd = Some(watched),
                Err(error) => tracing::error!(container = id, %error, "cannot watch the process"),
            }
        }
        let gone = container.pidfd.is_none() && !exited;
        self.containers.existing.insert(id.clone(), container);
        if gone {
            self.finish_unwatched(&id);
        }
    }
}

/// The process of the record, not another one that got its number.
fn open_process(record: &Record) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(record.pid).ok()?)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
    (process_start(record.pid) == Some(record.process_start)).then_some(pidfd)
}

/// A pipe whose read end died with the last keeper can be opened again through a process that still writes to it.
fn reopen_output(record: &Record, number: u32, inode: u64) -> Option<OwnedFd> {
    if record.phase == Phase::Exited || inode == 0 || process_start(record.pid) != Some(record.process_start)
    {
        return None;
    }
    let path = format!("/proc/{}/fd/{number}", record.pid);
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let same = |stat: &rustix::fs::Stat| {
        stat.st_ino == inode && rustix::fs::FileType::from_raw_mode(stat.st_mode).is_fifo()
    };
    // Asked before it is opened: opening a device could have an effect.
    rustix::fs::stat(&path).ok().filter(same)?;
    let fd = rustix::fs::open(&path, flags, Mode::empty()).ok()?;
    rustix::fs::fstat(&fd).ok().filter(same)?;
    Some(fd)
}
