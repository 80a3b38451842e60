//! Running, stopping and removing sandboxes.
//!
//! A record is on disk before anything is acquired, and [`Runtime::tear_down`] is idempotent and takes everything away
//! in reverse. So a failure, a cancelled call and a crash at any point are all undone by the same code.

use super::files::{Contents, render_hosts, render_resolv_conf};
use super::{Phase, RECORD_VERSION, Record, Sandbox, name, namespaces};
use crate::error::CriError;
use crate::events::Kind;
use crate::record::Wire;
use crate::runtime::Runtime;
use crate::spec;
use orlop_keeper::protocol::CreateContainer;
use orlop_proto::cri::{NamespaceMode, PodSandboxConfig, RunPodSandboxRequest};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio_util::sync::CancellationToken;

impl Runtime {
    pub(crate) async fn run_sandbox(
        self: &Arc<Self>,
        request: RunPodSandboxRequest,
        cancelled: CancellationToken,
    ) -> Result<String, CriError> {
        let config = request.config.unwrap_or_default();
        self.check_sandbox(&config, &request.runtime_handler)?;
        let id = crate::runtime::new_id();
        let metadata = config.metadata.clone().unwrap_or_default();
        let reservation = self.store.reserve("sandbox", &name(&metadata), &id)?;
        let record = Record {
            version: RECORD_VERSION,
            id: id.clone(),
            created_at: crate::runtime::now(),
            boot_id: self.boot_id.clone(),
            phase: Phase::Creating,
            runtime_handler: request.runtime_handler,
            addresses: Vec::new(),
            attached: true,
            config: Wire(config),
        };
        let record = Record { attached: !record.host_network(), ..record };
        record.network_request(&super::files::SandboxDir(super::directory(&self.config.state, &id)))?;
        let sandbox = Arc::new(Sandbox::new(record, &self.config.state));
        let _operation = sandbox.operation.lock().await;
        self.sandbox_records.save(&id, &*sandbox.record()).await?;
        let built = self.build_sandbox(&sandbox, &cancelled).await;
        if let Err(error) = built {
            return Err(self.undo_sandbox(&sandbox, reservation, error).await);
        }
        reservation.keep();
        self.store.insert_sandbox(sandbox.clone());
        self.emit_sandbox(Kind::Created, &sandbox);
        self.emit_sandbox(Kind::Started, &sandbox);
        Ok(id)
    }

    fn check_sandbox(&self, config: &PodSandboxConfig, handler: &str) -> Result<(), CriError> {
        let invalid = |field, reason: String| Err(CriError::Invalid { field, reason });
        let metadata = config.metadata.clone().unwrap_or_default();
        for (field, value) in [
            ("sandbox metadata name", &metadata.name),
            ("sandbox metadata namespace", &metadata.namespace),
            ("sandbox metadata uid", &metadata.uid),
        ] {
            if value.is_empty() {
                return invalid(field, "it is empty".into());
            }
        }
        if !handler.is_empty() && handler != self.config.runtime_name {
            return invalid("runtime_handler", format!("no runtime handler is called {handler:?}"));
        }
        let options = config
            .linux
            .as_ref()
            .and_then(|l| l.security_context.as_ref())
            .and_then(|s| s.namespace_options.as_ref());
        spec::check_userns(options)?;
        if let Some(options) = options
            && options.network() == NamespaceMode::Container
        {
            return invalid("network namespace mode", "a container has no network of its own".into());
        }
        if config.hostname.len() > 64 {
            return invalid("hostname", format!("{:?} exceeds 64 bytes", config.hostname));
        }
        Ok(())
    }

    /// Only waiting for the network is broken off by a cancelled call: everything else is short, and dropping it half
    /// way would leave its thread or the keeper at work behind our back.
    async fn build_sandbox(
        &self,
        sandbox: &Arc<Sandbox>,
        cancelled: &CancellationToken,
    ) -> Result<(), CriError> {
        let record = sandbox.record();
        let config = record.config();
        sandbox.dir.create(&self.sandbox_contents(&record)?)?;
        namespaces::create(sandbox.dir.namespaces(), self.namespace_plan(&record)).await?;
        let addresses = if record.host_network() {
            Vec::new()
        } else {
            let request = record.network_request(&sandbox.dir)?;
            tokio::select! {
                biased;
                () = cancelled.cancelled() => return Err(CriError::Cancelled),
                attached = self.network.attach(&request) => attached
                    .map_err(|source| CriError::Network { sandbox: sandbox.id.clone(), source })?,
            }
        };
        sandbox.dir.write_hosts(&self.hosts(&record, &addresses))?;
        if record.has_pause() {
            self.start_pause(sandbox, config).await?;
        }
        if cancelled.is_cancelled() {
            return Err(CriError::Cancelled);
        }
        self.update_sandbox(sandbox, |r| {
            r.addresses = addresses;
            r.phase = Phase::Ready;
        })
        .await
    }

    fn hosts(&self, record: &Record, addresses: &[std::net::IpAddr]) -> String {
        match std::fs::read_to_string("/etc/hosts") {
            Ok(text) if record.host_network() => text,
            _ => render_hosts(&self.sandbox_hostname(record), addresses),
        }
    }

    /// The host's own name where the UTS namespace is the host's.
    pub(crate) fn sandbox_hostname(&self, record: &Record) -> String {
        let wanted = &record.config().hostname;
        if !wanted.is_empty() && !record.host_network() {
            return wanted.clone();
        }
        rustix::system::uname().nodename().to_string_lossy().into_owned()
    }

    fn sandbox_contents(&self, record: &Record) -> Result<Contents, CriError> {
        let resolv_conf = match record.config().dns_config.as_ref().map(render_resolv_conf) {
            Some(text) if !text.is_empty() => text,
            _ => {
                let path = &self.config.host_resolv_conf;
                std::fs::read_to_string(path).or_else(|e| match e.kind() {
                    std::io::ErrorKind::NotFound => Ok(String::new()),
                    _ => Err(CriError::io("read", path, e)),
                })?
            }
        };
        Ok(Contents {
            resolv_conf,
            hostname: self.sandbox_hostname(record),
            own_shm: record.namespaces().ipc() != NamespaceMode::Node,
        })
    }

    fn namespace_plan(&self, record: &Record) -> namespaces::Plan {
        let own_net = !record.host_network();
        let mut sysctls = std::collections::BTreeMap::new();
        if own_net {
            // Nothing in a pod's own network needs protection from the pod: low ports and ping for everyone.
            sysctls.insert("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned());
            sysctls.insert("net.ipv4.ping_group_range".to_owned(), "0 2147483647".to_owned());
        }
        if let Some(linux) = &record.config().linux {
            sysctls.extend(linux.sysctls.iter().map(|(k, v)| (k.clone(), v.clone())));
        }
        namespaces::Plan {
            net: own_net,
            ipc: record.namespaces().ipc() != NamespaceMode::Node,
            uts: own_net,
            hostname: own_net.then(|| self.sandbox_hostname(record)),
            sysctls,
        }
    }

    async fn start_pause(&self, sandbox: &Arc<Sandbox>, config: &PodSandboxConfig) -> Result<(), CriError> {
        let rootfs = self.pause_root().await?;
        let options = sandbox.record().namespaces();
        let spec = spec::pause::build(&spec::pause::Pause {
            sandbox_id: &sandbox.id,
            config,
            dir: &sandbox.dir,
            rootfs: &rootfs,
            own_net: options.network() != NamespaceMode::Node,
            own_ipc: options.ipc() != NamespaceMode::Node,
        });
        let bundle = self.write_bundle(&sandbox.id, &spec)?;
        let request = CreateContainer {
            id: sandbox.id.clone(),
            bundle,
            rootfs: None,
            log: None,
            tty: false,
            stdin: false,
            stdin_once: false,
        };
        self.keeper.create(request).await?;
        let view = self.keeper.start(&sandbox.id).await?;
        sandbox.pause_pid.store(view.pid, Ordering::Release);
        Ok(())
    }

    pub(crate) async fn update_sandbox(
        &self,
        sandbox: &Sandbox,
        change: impl FnOnce(&mut Record),
    ) -> Result<(), CriError> {
        let mut record = (*sandbox.record()).clone();
        change(&mut record);
        self.sandbox_records.save(&sandbox.id, &record).await?;
        sandbox.replace(record);
        Ok(())
    }

    /// A sandbox that cannot even be torn down stays, not ready, so that the kubelet can try again.
    async fn undo_sandbox(
        &self,
        sandbox: &Arc<Sandbox>,
        reservation: crate::store::Reservation<'_>,
        error: CriError,
    ) -> CriError {
        let torn_down = self.tear_down(sandbox).await;
        let removed = torn_down.and_then(|()| Ok(self.sandbox_records.remove(&sandbox.id)?));
        if let Err(left) = removed {
            tracing::warn!(sandbox = %sandbox.id, error = %left, "keeping a failed sandbox that cannot be undone");
            let mut record = (*sandbox.record()).clone();
            record.phase = Phase::NotReady;
            sandbox.replace(record);
            reservation.keep();
            self.store.insert_sandbox(sandbox.clone());
        }
        error
    }

    /// Releases everything the sandbox holds. Goes on after an error and returns the first one.
    pub(crate) async fn tear_down(&self, sandbox: &Arc<Sandbox>) -> Result<(), CriError> {
        let record = sandbox.record();
        let mut first = Ok(());
        let mut note = |result: Result<(), CriError>| {
            if first.is_ok() {
                first = result;
            } else if let Err(error) = result {
                tracing::warn!(sandbox = %sandbox.id, %error, "tearing down a sandbox");
            }
        };
        if record.has_pause() {
            sandbox.pause_pid.store(0, Ordering::Release);
            note(self.keeper.delete(&sandbox.id).await.map_err(Into::into));
            note(self.remove_bundle(&sandbox.id));
        }
        if record.attached {
            note(self.detach(sandbox, &record).await);
        }
        note(namespaces::remove(&sandbox.dir.namespaces()).map_err(Into::into));
        note(sandbox.dir.remove().map_err(Into::into));
        first
    }

    async fn detach(&self, sandbox: &Sandbox, record: &Record) -> Result<(), CriError> {
        let request = record.network_request(&sandbox.dir)?;
        self.network
            .detach(&request)
            .await
            .map_err(|source| CriError::NetworkRelease { sandbox: sandbox.id.clone(), source })?;
        self.update_sandbox(sandbox, |r| r.attached = false).await
    }

    /// Stops every container, then lets go of namespaces and network. Succeeds when there is nothing to stop.
    pub(crate) async fn stop_sandbox(self: &Arc<Self>, id: &str) -> Result<(), CriError> {
        let Some(sandbox) = self.store.sandbox(id) else { return Ok(()) };
        let _operation = sandbox.operation.lock().await;
        self.stop_sandbox_locked(&sandbox).await
    }

    async fn stop_sandbox_locked(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<(), CriError> {
        for container in self.store.containers_of(&sandbox.id) {
            self.stop_container(&container, 0).await?;
        }
        let was_ready = sandbox.record().phase == Phase::Ready;
        if was_ready {
            self.update_sandbox(sandbox, |r| r.phase = Phase::NotReady).await?;
        }
        self.tear_down(sandbox).await?;
        if was_ready {
            self.emit_sandbox(Kind::Stopped, sandbox);
        }
        Ok(())
    }

    pub(crate) async fn remove_sandbox(self: &Arc<Self>, id: &str) -> Result<(), CriError> {
        let Some(sandbox) = self.store.sandbox(id) else { return Ok(()) };
        let _operation = sandbox.operation.lock().await;
        self.stop_sandbox_locked(&sandbox).await?;
        for container in self.store.containers_of(&sandbox.id) {
            self.remove_container(&container).await?;
        }
        self.sandbox_records.remove(&sandbox.id)?;
        self.store.remove_sandbox(&sandbox.id, &name(&sandbox.record().metadata()));
        self.emit_sandbox(Kind::Deleted, &sandbox);
        Ok(())
    }
}
