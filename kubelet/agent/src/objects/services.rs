//! The Services of the cluster, as far as environment variables need them.

use crate::objects::services_memory;
use crate::objects::source::Source;
use orlop_api::watch::WatchEvent;
use serde::{Deserialize, Deserializer, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

/// A Service without everything that no variable tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceFacts {
    pub namespace: String,
    pub name: String,
    /// `None` for headless and external services.
    pub cluster_ip: Option<IpAddr>,
    pub ports: Vec<ServicePort>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    #[serde(default)]
    pub name: String,
    pub port: i32,
    #[serde(default)]
    pub protocol: String,
}

impl<'de> Deserialize<'de> for ServiceFacts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Wire {
            metadata: Metadata,
            #[serde(default)]
            spec: Spec,
        }
        #[derive(Deserialize)]
        struct Metadata {
            #[serde(default)]
            namespace: String,
            name: String,
        }
        #[derive(Deserialize, Default)]
        struct Spec {
            #[serde(default, rename = "clusterIP")]
            cluster_ip: String,
            #[serde(default)]
            ports: Vec<ServicePort>,
        }
        let wire = Wire::deserialize(deserializer)?;
        Ok(Self {
            namespace: wire.metadata.namespace,
            name: wire.metadata.name,
            cluster_ip: wire.spec.cluster_ip.parse().ok(),
            ports: wire.spec.ports,
        })
    }
}

pub(super) type Known = Option<Arc<Vec<ServiceFacts>>>;

pub(super) struct Services {
    known: watch::Receiver<Known>,
    /// As an earlier life knew them, for as long as the API server has not told.
    remembered: Known,
    task: AbortHandle,
}

impl Drop for Services {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Services {
    /// With a file, the Services are written down there, and read from there while the API server is silent.
    pub(super) fn new(source: &dyn Source, file: Option<PathBuf>) -> Self {
        let (sender, known) = watch::channel(None);
        let remembered = file.as_deref().and_then(services_memory::load).map(Arc::new);
        if let Some(file) = file {
            tokio::spawn(services_memory::keep(file, known.clone()));
        }
        let task = tokio::spawn(follow(source.services(), sender)).abort_handle();
        Self { known, remembered, task }
    }

    pub(super) fn now(&self) -> Known {
        let fresh = self.known.borrow().clone();
        fresh.or_else(|| self.remembered.clone())
    }

    pub(super) async fn all(&self, patience: Duration) -> Known {
        let mut known = self.known.clone();
        let first = tokio::time::timeout(patience, known.wait_for(Option::is_some)).await;
        let fresh = first.ok().and_then(Result::ok).and_then(|known| known.clone());
        fresh.or_else(|| self.remembered.clone())
    }
}

async fn follow(mut events: mpsc::Receiver<WatchEvent<ServiceFacts>>, known: watch::Sender<Known>) {
    let mut services: BTreeMap<(String, String), ServiceFacts> = BTreeMap::new();
    let key = |service: &ServiceFacts| (service.namespace.clone(), service.name.clone());
    while let Some(event) = events.recv().await {
        match event {
            WatchEvent::Listed(all) => services = all.into_iter().map(|s| (key(&s), s)).collect(),
            WatchEvent::Applied(service) => {
                services.insert(key(&service), service);
            }
            WatchEvent::Deleted(service) => {
                services.remove(&key(&service));
            }
        }
        // Publish once per burst: a cluster's services come in hundreds.
        if events.is_empty() {
            known.send_replace(Some(Arc::new(services.values().cloned().collect())));
        }
    }
    known.closed().await;
}
