//! Creating a container: everything that can be refused is refused here, and nothing runs yet.
//!
//! The keeper hears of the container only when it is started. So a created container costs no process, survives a
//! restart as a record and nothing else, may still have its limits changed on paper, and a program that does not exist
//! is a failed start (exit code 128, `StartError`) as the kubelet expects. The time from create to running is the same:
//! the two calls follow each other.

use super::{Container, Phase, RECORD_VERSION, Record, StoredUser, name, signal};
use crate::error::CriError;
use crate::events::Kind;
use crate::record::Wire;
use crate::runtime::Runtime;
use crate::sandbox::{self, Sandbox};
use crate::spec::image_files::ImageFiles;
use crate::spec::user::UserDatabase;
use crate::spec::{self, SandboxFacts, SpecError, devices, mounts, user};
use oci_spec::runtime::Spec;
use orlop_image::{Image, ImageStore};
use orlop_proto::cri::{ContainerConfig, CreateContainerRequest, NamespaceMode};
use std::path::{Path, PathBuf};
use std::sync::Arc;

struct StoreImages(Arc<ImageStore>);

impl mounts::Images for StoreImages {
    fn layers(&self, reference: &str) -> Option<Vec<PathBuf>> {
        self.0.find(reference).map(|image| image.layers.clone())
    }
}

impl Runtime {
    pub(crate) async fn create_container(
        self: &Arc<Self>,
        request: CreateContainerRequest,
    ) -> Result<String, CriError> {
        let config = request.config.unwrap_or_default();
        let sandbox = self
            .store
            .sandbox(&request.pod_sandbox_id)
            .ok_or_else(|| CriError::sandbox(&request.pod_sandbox_id))?;
        let image = self.check_container(&config, &sandbox)?;
        let id = crate::runtime::new_id();
        let sandbox_metadata = sandbox.record().metadata();
        let metadata = config.metadata.clone().unwrap_or_default();
        let name = name(&metadata, &sandbox_metadata);
        let reservation = self.store.reserve("container", &name, &id)?;
        let planned = self.plan_container(&id, config, &sandbox, image.clone(), name).await;
        let (record, spec) = planned?;
        let container = Arc::new(Container::new(record));
        if let Err(error) = self.materialise(&container, &spec, &image).await {
            self.discard(&container).await;
            return Err(error);
        }
        reservation.keep();
        self.store.insert_container(container.clone());
        // The sandbox may have been stopped or removed while we worked; its removal has not seen this container then.
        if self.store.sandbox(&sandbox.id).is_none() {
            self.remove_container(&container).await?;
            return Err(CriError::sandbox(&sandbox.id));
        }
        self.emit_container(Kind::Created, &container);
        Ok(id)
    }

    fn check_container(&self, config: &ContainerConfig, sandbox: &Sandbox) -> Result<Arc<Image>, CriError> {
        let record = sandbox.record();
        if record.phase != sandbox::Phase::Ready {
            return Err(CriError::WrongState {
                operation: "create a container in",
                what: "sandbox",
                id: sandbox.id.clone(),
                state: "not ready",
            });
        }
        if config.metadata.as_ref().is_none_or(|m| m.name.is_empty()) {
            return Err(CriError::Invalid { field: "container metadata name", reason: "it is empty".into() });
        }
        if Path::new(&config.log_path).components().any(|c| c == std::path::Component::ParentDir) {
            return Err(CriError::Invalid {
                field: "log_path",
                reason: format!("{:?} leads out of the sandbox's log directory", config.log_path),
            });
        }
        spec::check(config, record.config())?;
        let reference = config.image.as_ref().map(|i| i.image.clone()).unwrap_or_default();
        self.images.find(&reference).ok_or(CriError::ImageMissing(reference))
    }

    async fn plan_container(
        self: &Arc<Self>,
        id: &str,
        config: ContainerConfig,
        sandbox: &Arc<Sandbox>,
        image: Arc<Image>,
        name: String,
    ) -> Result<(Record, Spec), CriError> {
        let pid = self.pid_namespace(&config, sandbox)?;
        let runtime = self.clone();
        let sandbox = sandbox.clone();
        let id = id.to_owned();
        // Reads the image's layers, the devices and the mounts of the host, all of which may be slow.
        tokio::task::spawn_blocking(move || runtime.plan_here(id, config, &sandbox, &image, name, pid))
            .await
            .map_err(|e| CriError::Panicked(e.to_string()))?
    }

    #[allow(clippy::too_many_arguments)]
    fn plan_here(
        &self,
        id: String,
        config: ContainerConfig,
        sandbox: &Sandbox,
        image: &Image,
        name: String,
        pid_namespace_of: Option<u32>,
    ) -> Result<(Record, Spec), CriError> {
        let security = spec::security(&config);
        let of_image = image.config.config().as_ref();
        let image_user = of_image.and_then(|c| c.user().clone()).unwrap_or_default();
        let user = user::resolve(&security, &image_user, &user_database(&image.layers)?)?;
        let mountinfo = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
        let binds = mounts::resolve(&config.mounts, &mountinfo, &StoreImages(self.images.clone()))?;
        let devices =
            if security.privileged { devices::all_of_host()? } else { devices::resolve(&config.devices)? };
        let sandbox_record = sandbox.record();
        let rootfs = self.bundle(&id).join("rootfs");
        let spec = spec::build(&spec::Input {
            id: &id,
            config: &config,
            sandbox: SandboxFacts {
                id: &sandbox.id,
                config: sandbox_record.config(),
                dir: &sandbox.dir,
                pid_namespace_of,
                hostname: &self.sandbox_hostname(&sandbox_record),
            },
            image: &image.config,
            user: &user,
            binds: &binds,
            devices: &devices,
            rootfs: &rootfs,
            host: &self.host,
        })?;
        let log_directory = &sandbox_record.config().log_directory;
        let log_path = if config.log_path.is_empty() || log_directory.is_empty() {
            PathBuf::new()
        } else {
            Path::new(log_directory).join(&config.log_path)
        };
        let image_signal = of_image.and_then(|c| c.stop_signal().clone());
        let record = Record {
            version: RECORD_VERSION,
            sandbox_id: sandbox.id.clone(),
            name,
            created_at: crate::runtime::now(),
            boot_id: self.boot_id.clone(),
            phase: Phase::Created,
            image_id: image.id.clone(),
            image_ref: image.repo_digests.first().unwrap_or(&image.id).clone(),
            log_path,
            cgroup: spec::cgroup_path(sandbox_record.config(), &id),
            stop_signal: signal::stop_signal(config.stop_signal(), image_signal.as_deref()),
            user: StoredUser::from(&user),
            config: Wire(config),
            id,
        };
        Ok((record, spec))
    }

    /// The process whose PID namespace the container joins, if it joins one.
    fn pid_namespace(&self, config: &ContainerConfig, sandbox: &Sandbox) -> Result<Option<u32>, CriError> {
        let options = spec::namespaces_of(&spec::security(config));
        match options.pid() {
            NamespaceMode::Pod => Ok(sandbox.pause_pid()),
            NamespaceMode::Container | NamespaceMode::Node => Ok(None),
            NamespaceMode::Target => {
                let target = self
                    .store
                    .container(&options.target_id)
                    .filter(|c| c.sandbox_id == sandbox.id)
                    .ok_or_else(|| CriError::container(&options.target_id))?;
                target.pid().map(Some).ok_or_else(|| CriError::WrongState {
                    operation: "join the PID namespace of",
                    what: "container",
                    id: target.id.clone(),
                    state: target.state_name(),
                })
            }
        }
    }

    async fn materialise(&self, container: &Container, spec: &Spec, image: &Image) -> Result<(), CriError> {
        self.images.prepare(image, &container.id).await?;
        self.write_bundle(&container.id, spec)?;
        self.container_records.save(&container.id, &*container.record()).await?;
        Ok(())
    }

    /// Takes away what a failed creation made. What cannot be taken away now is found again at the next start.
    async fn discard(&self, container: &Container) {
        let id = &container.id;
        let steps = [
            self.container_records.remove(id).map_err(CriError::from),
            self.remove_bundle(id),
            self.images.release(id).await.map_err(CriError::from),
        ];
        for error in steps.into_iter().filter_map(Result::err) {
            tracing::warn!(container = %id, %error, "undoing a failed creation");
        }
    }
}

fn user_database(layers: &[PathBuf]) -> Result<UserDatabase, SpecError> {
    let files = ImageFiles::new(layers);
    let read = |path: &'static str| {
        let bytes = files.read(path).map_err(|source| SpecError::ImageFile { path, source })?;
        Ok(String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned())
    };
    Ok(UserDatabase { passwd: read("/etc/passwd")?, group: read("/etc/group")? })
}
