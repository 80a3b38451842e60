//! Changing a container's limits: on paper while it is created, in its cgroup while it runs.

use super::{Container, Phase};
use crate::error::CriError;
use crate::runtime::Runtime;
use crate::spec::{self, resources};
use oci_spec::runtime::Spec;
use orlop_oci::cgroup::Cgroup;
use orlop_proto::cri::LinuxContainerResources;

impl Runtime {
    pub(crate) async fn update_container_resources(
        &self,
        container: &Container,
        update: &LinuxContainerResources,
    ) -> Result<(), CriError> {
        let _operation = container.operation.lock().await;
        let record = container.record();
        let before = spec::requested_resources(record.config());
        let merged = resources::merge(&before, update);
        match record.phase {
            Phase::Exited(_) => {
                return Err(CriError::WrongState {
                    operation: "update",
                    what: "container",
                    id: container.id.clone(),
                    state: container.state_name(),
                });
            }
            Phase::Created => self.rewrite_limits(container, &merged)?,
            Phase::Running { .. } => {
                self.apply_limits(container, &resources::to_oci(update, &self.host.controllers))?;
                self.rewrite_limits(container, &merged)?;
            }
        }
        let saved = self
            .update_container(container, |r| {
                r.config.0.linux.get_or_insert_default().resources = Some(merged);
            })
            .await;
        if saved.is_err() && matches!(record.phase, Phase::Running { .. }) {
            // What the record says must be what the kernel does.
            self.apply_limits(container, &resources::to_oci(&before, &self.host.controllers))?;
        }
        saved
    }

    fn apply_limits(
        &self,
        container: &Container,
        limits: &oci_spec::runtime::LinuxResources,
    ) -> Result<(), CriError> {
        let relative = &container.record().cgroup;
        let failed = |error: &orlop_oci::cgroup::Error| CriError::Update {
            id: container.id.clone(),
            reason: crate::error::chain(error),
        };
        let cgroup = Cgroup::open(&self.config.cgroup_root, relative).map_err(|e| failed(&e))?;
        cgroup.apply(limits, self.config.missing_controllers).map_err(|e| failed(&e))
    }

    fn rewrite_limits(
        &self,
        container: &Container,
        limits: &LinuxContainerResources,
    ) -> Result<(), CriError> {
        let path = self.bundle(&container.id).join("config.json");
        let bytes = std::fs::read(&path).map_err(|e| CriError::io("read", &path, e))?;
        let mut spec: Spec =
            serde_json::from_slice(&bytes).map_err(|e| CriError::io("parse", &path, e.into()))?;
        if let Some(linux) = spec.linux_mut() {
            let devices = linux.resources().as_ref().and_then(|r| r.devices().clone());
            let mut new = resources::to_oci(limits, &self.host.controllers);
            new.set_devices(devices);
            linux.set_resources(Some(new));
        }
        self.write_bundle(&container.id, &spec)?;
        Ok(())
    }
}
