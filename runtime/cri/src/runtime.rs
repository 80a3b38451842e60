//! The running service: its parts, how it opens, and what it does with the keeper's events.

use crate::config::{Config, MissingControllers};
use crate::container::Container;
use crate::error::CriError;
use crate::events;
use crate::network::SandboxNetwork;
use crate::record::{RecordDir, replace_file};
use crate::spec::resources::Controllers;
use crate::spec::{HostFacts, capabilities, pause, seccomp};
use crate::store::Store;
use crate::streaming::StreamServer;
use oci_spec::runtime::Spec;
use orlop_image::ImageStore;
use orlop_keeper::client::Keeper;
use orlop_keeper::protocol::{Event, Exit};
use orlop_proto::cri::ContainerEventResponse;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, Weak};
use std::time::SystemTime;
use tokio::sync::broadcast;
use tokio_util::task::AbortOnDropHandle;

/// The controllers that Kubernetes' limits need.
const NEEDED_CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// Everything the services share.
#[derive(Debug)]
pub(crate) struct Runtime {
    pub(crate) config: Config,
    pub(crate) keeper: Keeper,
    pub(crate) images: Arc<ImageStore>,
    pub(crate) network: Arc<dyn SandboxNetwork>,
    pub(crate) store: Store,
    pub(crate) sandbox_records: RecordDir,
    pub(crate) container_records: RecordDir,
    pub(crate) host: HostFacts,
    pub(crate) boot_id: String,
    pub(crate) events: broadcast::Sender<ContainerEventResponse>,
    pub(crate) streams: OnceLock<StreamServer>,
    pause_root: tokio::sync::OnceCell<PathBuf>,
    watcher: OnceLock<AbortOnDropHandle<()>>,
}

/// Nanoseconds since the epoch.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// 64 hexadecimal digits: what tools take for a container id.
pub(crate) fn new_id() -> String {
    format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple())
}

impl Runtime {
    pub(crate) fn new(
        config: Config,
        keeper: Keeper,
        images: Arc<ImageStore>,
        network: Arc<dyn SandboxNetwork>,
    ) -> Result<Self, CriError> {
        let records = config.root.join("cri");
        let host = host_facts(&config)?;
        for dir in ["sandboxes", "bundles"] {
            let dir = config.state.join(dir);
            fs::create_dir_all(&dir).map_err(|e| CriError::io("create", dir, e))?;
        }
        let boot_id = Path::new("/proc/sys/kernel/random/boot_id");
        let boot_id = fs::read_to_string(boot_id).map_err(|e| CriError::io("read", boot_id, e))?;
        let (events, _) = broadcast::channel(events::BACKLOG);
        Ok(Self {
            sandbox_records: RecordDir::open(records.join("sandboxes"))?,
            container_records: RecordDir::open(records.join("containers"))?,
            store: Store::default(),
            host,
            boot_id: boot_id.trim().to_owned(),
            events,
            streams: OnceLock::new(),
            pause_root: tokio::sync::OnceCell::new(),
            watcher: OnceLock::new(),
            config,
            keeper,
            images,
            network,
        })
    }

    pub(crate) fn bundle(&self, id: &str) -> PathBuf {
        self.config.state.join("bundles").join(id)
    }

    /// Writes `config.json` and makes the directory that the root is mounted on.
    pub(crate) fn write_bundle(&self, id: &str, spec: &Spec) -> Result<PathBuf, CriError> {
        let bundle = self.bundle(id);
        let rootfs = bundle.join("rootfs");
        fs::create_dir_all(&rootfs).map_err(|e| CriError::io("create", &rootfs, e))?;
        let path = bundle.join("config.json");
        let bytes = serde_json::to_vec(spec).map_err(|e| CriError::io("encode", &path, e.into()))?;
        replace_file(&path, &bytes, 0o600).map_err(|e| CriError::io("write", &path, e))?;
        Ok(bundle)
    }

    pub(crate) fn remove_bundle(&self, id: &str) -> Result<(), CriError> {
        let bundle = self.bundle(id);
        match fs::remove_dir_all(&bundle) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(CriError::io("remove", bundle, error))
            }
            _ => Ok(()),
        }
    }

    /// A root that holds nothing but the pause program.
    pub(crate) async fn pause_root(&self) -> Result<PathBuf, CriError> {
        let root = self.config.root.join("cri").join("pause");
        let make = || async move {
            for directory in pause::DIRECTORIES {
                let path = root.join(directory);
                fs::create_dir_all(&path).map_err(|e| CriError::io("create", path, e))?;
            }
            let target = root.join(pause::PROGRAM);
            // Renamed into place: an older one may be running.
            replace_file(&target, &crate::pause::program(), 0o555)
                .map_err(|e| CriError::io("write", &target, e))?;
            Ok::<_, CriError>(root)
        };
        self.pause_root.get_or_try_init(make).await.cloned()
    }

    pub(crate) fn running(&self, id: &str) -> Result<Arc<Container>, CriError> {
        let container = self.store.container(id).ok_or_else(|| CriError::container(id))?;
        self.require_running(&container, "reach the streams of")?;
        Ok(container)
    }

    /// Follows the keeper's events for as long as the service lives.
    pub(crate) fn watch_exits(self: &Arc<Self>, mut events: broadcast::Receiver<Event>) {
        let weak = Arc::downgrade(self);
        let task = tokio::spawn(async move {
            loop {
                let event = events.recv().await;
                let Some(runtime) = weak.upgrade() else { return };
                match event {
                    Ok(Event::ContainerExited { id, exit }) => handle_exit(&runtime, id, exit),
                    Ok(Event::ExecExited { .. }) => {}
                    Err(broadcast::error::RecvError::Lagged(missed)) => {
                        tracing::warn!(
                            missed,
                            "fell behind the keeper's events; asking for the state instead"
                        );
                        tokio::spawn(catch_up(weak.clone()));
                    }
                    Err(broadcast::error::RecvError::Closed) => return,
                }
            }
        });
        let _ = self.watcher.set(AbortOnDropHandle::new(task));
    }

    pub(crate) async fn exited(self: &Arc<Self>, id: &str, exit: &Exit) -> Result<(), CriError> {
        if let Some(container) = self.store.container(id) {
            return self.record_exit(&container, exit).await;
        }
        if let Some(sandbox) = self.store.sandbox(id) {
            // Its own process is gone, and with it the PID namespace: the pod cannot go on as it was.
            sandbox.pause_pid.store(0, std::sync::atomic::Ordering::Release);
            if sandbox.record().phase == crate::sandbox::Phase::Ready {
                self.update_sandbox(&sandbox, |r| r.phase = crate::sandbox::Phase::NotReady).await?;
                self.emit_sandbox(events::Kind::Stopped, &sandbox);
            }
            self.keeper.acknowledge(id).await?;
        }
        // An id that is neither belongs to a creation under way or one that failed; whoever made it deletes it.
        Ok(())
    }
}

/// Exits are handled side by side: one disk write never waits for another container's start.
fn handle_exit(runtime: &Arc<Runtime>, id: String, exit: Exit) {
    let runtime = runtime.clone();
    tokio::spawn(async move {
        if let Err(error) = runtime.exited(&id, &exit).await {
            // Not acknowledged: the keeper keeps it and repeats it on the next connection.
            tracing::error!(container = %id, %error, "recording an exit");
        }
    });
}

async fn catch_up(runtime: Weak<Runtime>) {
    let Some(runtime) = runtime.upgrade() else { return };
    match runtime.keeper.list().await {
        Ok(views) => {
            for view in views {
                if let Some(exit) = view.exit {
                    handle_exit(&runtime, view.id, exit);
                }
            }
        }
        Err(error) => tracing::error!(%error, "asking the keeper for its containers"),
    }
}

fn host_facts(config: &Config) -> Result<HostFacts, CriError> {
    let path = config.cgroup_root.join("cgroup.controllers");
    let text = fs::read_to_string(&path).map_err(|e| CriError::io("read", &path, e))?;
    let controllers: BTreeSet<String> = text.split_whitespace().map(str::to_owned).collect();
    let missing: Vec<_> = NEEDED_CONTROLLERS.iter().filter(|c| !controllers.contains(**c)).copied().collect();
    if !missing.is_empty() {
        let missing = missing.join(", ");
        if config.missing_controllers == MissingControllers::Refuse {
            return Err(CriError::MissingControllers { root: config.cgroup_root.clone(), missing });
        }
        tracing::warn!(%missing, root = %config.cgroup_root.display(), "running without cgroup controllers: their limits are not enforced");
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bounding = status
        .lines()
        .find_map(|line| line.strip_prefix("CapBnd:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or_default();
    let oom_score_floor = config.restrict_oom_score_adj.then(|| {
        fs::read_to_string("/proc/self/oom_score_adj").ok().and_then(|t| t.trim().parse().ok()).unwrap_or(0)
    });
    Ok(HostFacts {
        capabilities: capabilities::from_mask(bounding),
        controllers: Controllers(controllers),
        apparmor_profiles: seccomp::apparmor_profiles(),
        oom_score_floor,
        ulimits: config.default_ulimits.clone(),
    })
}
