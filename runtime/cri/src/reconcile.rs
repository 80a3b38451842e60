//! What the service does when it starts: its records, the keeper and the kernel are brought into agreement.
//!
//! Records say what was wanted, the keeper what runs, the kernel what is pinned. One damaged sandbox is logged and left
//! aside: it keeps nobody else from starting.

use crate::container::{self, Container, Phase};
use crate::error::CriError;
use crate::runtime::Runtime;
use crate::sandbox::{self, Sandbox, namespaces};
use orlop_keeper::protocol::{ContainerView, Phase as KeeperPhase};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Runtime {
    pub(crate) async fn reconcile(self: &Arc<Self>) -> Result<(), CriError> {
        let views = self.keeper.list().await?;
        let mut views: HashMap<String, ContainerView> =
            views.into_iter().map(|v| (v.id.clone(), v)).collect();
        for record in self.sandbox_records.load_all::<sandbox::Record>()? {
            let id = record.id.clone();
            if let Err(error) = self.adopt_sandbox(record, views.remove(&id)).await {
                tracing::error!(sandbox = %id, %error, "taking up a sandbox again");
            }
        }
        for record in self.container_records.load_all::<container::Record>()? {
            let id = record.id.clone();
            if let Err(error) = self.adopt_container(record, views.remove(&id)).await {
                tracing::error!(container = %id, %error, "taking up a container again");
            }
        }
        for id in views.into_keys() {
            tracing::warn!(container = %id, "deleting a container that no record knows");
            self.keeper.delete(&id).await?;
        }
        self.sweep().await
    }

    async fn adopt_sandbox(
        self: &Arc<Self>,
        record: sandbox::Record,
        view: Option<ContainerView>,
    ) -> Result<(), CriError> {
        let name = sandbox::name(&record.metadata());
        let interrupted = record.phase == sandbox::Phase::Creating;
        let same_boot = record.boot_id == self.boot_id;
        let sandbox = Arc::new(Sandbox::new(record, &self.config.state));
        if interrupted {
            // The caller never got its id: nobody will ask for it.
            if self.tear_down(&sandbox).await.is_ok() {
                self.sandbox_records.remove(&sandbox.id)?;
                return Ok(());
            }
            self.update_sandbox(&sandbox, |r| r.phase = sandbox::Phase::NotReady).await?;
        }
        self.store.reserve("sandbox", &name, &sandbox.id)?.keep();
        self.store.insert_sandbox(sandbox.clone());
        let running = view.filter(|v| v.phase == KeeperPhase::Running);
        if let Some(view) = &running {
            sandbox.pause_pid.store(view.pid, Ordering::Release);
        }
        let whole = same_boot
            && (!sandbox.record().has_pause() || running.is_some())
            && sandbox.netns().is_none_or(|path| namespaces::is_pinned(&path));
        if sandbox.record().phase == sandbox::Phase::Ready && !whole {
            tracing::warn!(sandbox = %sandbox.id, same_boot, "a sandbox is no longer whole");
            self.update_sandbox(&sandbox, |r| r.phase = sandbox::Phase::NotReady).await?;
        }
        Ok(())
    }

    async fn adopt_container(
        self: &Arc<Self>,
        record: container::Record,
        view: Option<ContainerView>,
    ) -> Result<(), CriError> {
        let same_boot = record.boot_id == self.boot_id;
        let reservation = self.store.reserve("container", &record.name, &record.id)?;
        let container = Arc::new(Container::new(record));
        reservation.keep();
        self.store.insert_container(container.clone());
        let phase = container.record().phase.clone();
        match (phase, view) {
            (_, Some(ContainerView { exit: Some(exit), .. })) => {
                self.record_exit(&container, &exit).await?;
            }
            (Phase::Exited(_), Some(_)) => self.keeper.delete(&container.id).await?,
            // A start that was interrupted before it ran: it has not happened.
            (Phase::Created, Some(ContainerView { phase: KeeperPhase::Created, .. })) => {
                self.keeper.delete(&container.id).await?;
            }
            (_, Some(view)) => {
                container.set_pid(view.pid);
                if !container.is_running() {
                    let started_at = view.started_at;
                    self.update_container(&container, |r| r.phase = Phase::Running { started_at }).await?;
                }
            }
            (Phase::Running { .. }, None) => self.mark_lost(&container).await?,
            // What was only created needs its bundle, which a reboot has taken.
            (Phase::Created, None) if !same_boot => self.mark_lost(&container).await?,
            (Phase::Created | Phase::Exited(_), None) => {}
        }
        Ok(())
    }

    /// Takes away what belongs to nobody any more.
    async fn sweep(&self) -> Result<(), CriError> {
        let sandboxes: Vec<String> = self.store.sandboxes().iter().map(|s| s.id.clone()).collect();
        let containers: Vec<String> = self.store.containers().iter().map(|c| c.id.clone()).collect();
        self.sweep_sandbox_dirs(&sandboxes.iter().map(String::as_str).collect())?;
        let known = sandboxes.iter().chain(&containers).map(String::as_str).collect();
        for id in unknown(&self.config.state.join("bundles"), &known)? {
            self.remove_bundle(&id)?;
        }
        if let Err(error) = self.network.retain(&sandboxes).await {
            tracing::warn!(%error, "releasing addresses of sandboxes that are gone");
        }
        self.images.retain_snapshots(&containers).await?;
        Ok(())
    }

    fn sweep_sandbox_dirs(&self, known: &HashSet<&str>) -> Result<(), CriError> {
        for id in unknown(&self.config.state.join("sandboxes"), known)? {
            let dir = sandbox::files::SandboxDir(sandbox::directory(&self.config.state, &id));
            namespaces::remove(&dir.namespaces())?;
            dir.remove()?;
        }
        Ok(())
    }
}

/// The entries of a directory that are not in `known`.
fn unknown(dir: &std::path::Path, known: &HashSet<&str>) -> Result<Vec<String>, CriError> {
    let error = |e| CriError::io("list", dir, e);
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(error)? {
        let name = entry.map_err(error)?.file_name().to_string_lossy().into_owned();
        if !known.contains(name.as_str()) {
            names.push(name);
        }
    }
    Ok(names)
}
