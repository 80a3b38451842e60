//! Starting, stopping and removing containers, and what happens when one exits.

use super::{Container, Ended, Phase, Reason, Record};
use crate::error::CriError;
use crate::events::Kind;
use crate::runtime::Runtime;
use orlop_keeper::client::KeeperError;
use orlop_keeper::protocol::{ContainerView, CreateContainer, Exit, LogTarget, Overlay};
use orlop_proto::cri::NamespaceMode;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// What a failed start leaves as exit code.
const START_ERROR: i32 = 128;
/// How long a killed container may take to be gone: the kernel may be tearing down a large address space.
const KILL_PATIENCE: Duration = Duration::from_secs(60);

impl Runtime {
    pub(crate) async fn update_container(
        &self,
        container: &Container,
        change: impl FnOnce(&mut Record),
    ) -> Result<(), CriError> {
        let _change = container.change.lock().await;
        self.update_container_locked(container, change).await
    }

    async fn update_container_locked(
        &self,
        container: &Container,
        change: impl FnOnce(&mut Record),
    ) -> Result<(), CriError> {
        let mut record = (*container.record()).clone();
        change(&mut record);
        self.container_records.save(&container.id, &record).await?;
        container.replace(record);
        Ok(())
    }

    pub(crate) async fn start_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
    ) -> Result<(), CriError> {
        let _operation = container.operation.lock().await;
        let _change = container.change.lock().await;
        if container.record().phase != Phase::Created {
            return Err(CriError::WrongState {
                operation: "start",
                what: "container",
                id: container.id.clone(),
                state: container.state_name(),
            });
        }
        match self.launch(container).await {
            Ok(view) => {
                container.set_pid(view.pid);
                let started_at = if view.started_at == 0 { crate::runtime::now() } else { view.started_at };
                self.update_container_locked(container, |r| r.phase = Phase::Running { started_at }).await?;
                self.emit_container(Kind::Started, container);
                Ok(())
            }
            Err(error @ KeeperError::Unreachable { .. }) => {
                // Nothing is known: the container stays created, and what the keeper may have made of it goes.
                let _ = self.keeper.delete(&container.id).await;
                Err(error.into())
            }
            Err(error) => {
                self.fail_start(container, &error).await?;
                Err(CriError::Start { id: container.id.clone(), reason: error.to_string() })
            }
        }
    }

    async fn fail_start(&self, container: &Container, error: &KeeperError) -> Result<(), CriError> {
        if let Err(error) = self.keeper.delete(&container.id).await {
            tracing::warn!(container = %container.id, %error, "clearing up after a failed start");
        }
        let ended = Ended {
            started_at: 0,
            finished_at: crate::runtime::now(),
            exit_code: START_ERROR,
            reason: Reason::StartError,
            message: error.to_string(),
        };
        self.update_container_locked(container, |r| r.phase = Phase::Exited(ended)).await?;
        self.emit_container(Kind::Stopped, container);
        Ok(())
    }

    async fn launch(&self, container: &Container) -> Result<ContainerView, KeeperError> {
        let refused = |error: &dyn std::fmt::Display| KeeperError::Refused(error.to_string());
        let record = container.record();
        let image = self.images.find(&record.image_id).ok_or_else(|| {
            KeeperError::Refused(format!("image {} was removed before the start", record.image_id))
        })?;
        let snapshot = self.images.prepare(&image, &container.id).await.map_err(|e| refused(&e))?;
        let config = record.config();
        let log = (!record.log_path.as_os_str().is_empty()).then(|| LogTarget {
            path: record.log_path.clone(),
            max_bytes: self.config.log_max_bytes,
            max_files: self.config.log_max_files,
        });
        let request = CreateContainer {
            id: container.id.clone(),
            bundle: self.bundle(&container.id),
            rootfs: Some(Overlay { lower: snapshot.lower, upper: snapshot.upper, work: snapshot.work }),
            log,
            tty: config.tty,
            stdin: config.stdin,
            stdin_once: config.stdin_once,
        };
        self.keeper.create(request).await?;
        self.keeper.start(&container.id).await
    }

    /// The keeper reports an exit: on our disk first, then the keeper may forget it.
    pub(crate) async fn record_exit(
        self: &Arc<Self>,
        container: &Arc<Container>,
        exit: &Exit,
    ) -> Result<(), CriError> {
        let change = container.change.lock().await;
        let phase = container.record().phase.clone();
        if let Phase::Exited(_) = phase {
            // A repetition: our acknowledgement was lost.
        } else {
            let started_at = match phase {
                Phase::Running { started_at } => started_at,
                _ => 0,
            };
            let ended = ended(started_at, exit);
            self.update_container_locked(container, |r| r.phase = Phase::Exited(ended)).await?;
            self.emit_container(Kind::Stopped, container);
        }
        drop(change);
        self.keeper.acknowledge(&container.id).await?;
        // Its cgroup and whatever outlived init go now; the record of it is ours.
        self.keeper.delete(&container.id).await?;
        Ok(())
    }

    /// Signals once, waits, kills. A later call with less patience shortens the wait of all.
    pub(crate) async fn stop_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
        timeout: i64,
    ) -> Result<(), CriError> {
        let grace = Duration::from_secs(u64::try_from(timeout.max(0)).unwrap_or_default());
        if !container.is_running() {
            // A start under way ends before this is asked again; then there is something to stop.
            drop(container.change.lock().await);
            if !container.is_running() {
                return Ok(());
            }
        }
        let signal_now = {
            let mut stopping = container.stopping.lock().unwrap_or_else(PoisonError::into_inner);
            let wanted = Instant::now() + grace;
            stopping.deadline = Some(stopping.deadline.map_or(wanted, |d| d.min(wanted)));
            !grace.is_zero() && !std::mem::replace(&mut stopping.signalled, true)
        };
        container.deadline_changed.notify_waiters();
        if signal_now {
            let signal = container.record().stop_signal;
            ignore_missing(self.keeper.kill(&container.id, signal, false).await)?;
        }
        if self.wait_until_deadline(container).await {
            return Ok(());
        }
        self.kill_container(container).await
    }

    /// Whether the container has exited by the deadline, which may move closer meanwhile.
    async fn wait_until_deadline(&self, container: &Container) -> bool {
        let mut exited = container.exited.subscribe();
        loop {
            let moved = container.deadline_changed.notified();
            let deadline = container
                .stopping
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .deadline
                .unwrap_or_else(Instant::now);
            if *exited.borrow_and_update() {
                return true;
            }
            tokio::select! {
                _ = exited.changed() => {}
                () = moved => {}
                () = tokio::time::sleep_until(deadline) => return *exited.borrow(),
            }
        }
    }

    async fn kill_container(self: &Arc<Self>, container: &Arc<Container>) -> Result<(), CriError> {
        let record = container.record();
        let pid_mode = crate::spec::namespaces_of(&crate::spec::security(record.config())).pid();
        // Where init is the PID namespace's first process, its end takes all others along.
        let all = pid_mode != NamespaceMode::Container;
        match self.keeper.kill(&container.id, nix::sys::signal::Signal::SIGKILL as i32, all).await {
            Err(KeeperError::NoSuchContainer(_)) if container.is_running() => {
                return self.mark_lost(container).await;
            }
            result => ignore_missing(result)?,
        }
        let mut exited = container.exited.subscribe();
        let gone = tokio::time::timeout(KILL_PATIENCE, exited.wait_for(|exited| *exited)).await;
        if gone.is_err() {
            return Err(CriError::Unkillable { id: container.id.clone(), seconds: KILL_PATIENCE.as_secs() });
        }
        Ok(())
    }

    /// The keeper does not know a container that we believe to run: its exit code is lost.
    pub(crate) async fn mark_lost(&self, container: &Arc<Container>) -> Result<(), CriError> {
        let finished_at = crate::runtime::now();
        self.update_container(container, |record| {
            let started_at = match record.phase {
                Phase::Running { started_at } => started_at,
                Phase::Exited(_) => return,
                Phase::Created => 0,
            };
            record.phase = Phase::Exited(Ended {
                started_at,
                finished_at,
                exit_code: 255,
                reason: Reason::Unknown,
                message: "the container ended while nothing watched it".into(),
            });
        })
        .await?;
        self.emit_container(Kind::Stopped, container);
        Ok(())
    }

    pub(crate) async fn remove_container(
        self: &Arc<Self>,
        container: &Arc<Container>,
    ) -> Result<(), CriError> {
        let _operation = container.operation.lock().await;
        if self.store.container(&container.id).is_none() {
            return Ok(());
        }
        self.stop_container(container, 0).await?;
        self.keeper.delete(&container.id).await?;
        self.remove_bundle(&container.id)?;
        self.images.release(&container.id).await?;
        self.container_records.remove(&container.id)?;
        let sandbox = self.store.sandbox(&container.sandbox_id);
        self.store.remove_container(&container.id, &container.record().name);
        drop(sandbox);
        self.emit_container(Kind::Deleted, container);
        Ok(())
    }
}

fn ignore_missing(result: Result<(), KeeperError>) -> Result<(), CriError> {
    match result {
        Err(KeeperError::NoSuchContainer(_)) | Ok(()) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

pub(crate) fn ended(started_at: i64, exit: &Exit) -> Ended {
    let reason = match exit {
        Exit { oom_killed: true, .. } => Reason::OomKilled,
        Exit { code: 0, .. } => Reason::Completed,
        _ => Reason::Error,
    };
    Ended { started_at, finished_at: exit.finished_at, exit_code: exit.code, reason, message: String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_is_named_as_the_kubelet_expects() {
        let exit = |code, oom_killed| ended(5, &Exit { code, oom_killed, finished_at: 9 });
        assert_eq!(exit(0, false).reason.as_str(), "Completed");
        assert_eq!(exit(2, false).reason.as_str(), "Error");
        assert_eq!(exit(137, false).reason.as_str(), "Error");
        assert_eq!(exit(137, true).reason.as_str(), "OOMKilled");
        assert_eq!(
            (exit(3, false).started_at, exit(3, false).finished_at, exit(3, false).exit_code),
            (5, 9, 3)
        );
    }
}
