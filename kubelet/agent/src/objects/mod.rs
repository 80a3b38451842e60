//! ConfigMaps, Secrets, Services and service-account tokens that pods refer to.
//!
//! Each referenced ConfigMap and Secret has a watch of its own (the node authorizer allows a node no other form), held as
//! long as a pod refers to it. What was read once stays readable while the API server is gone, so containers can be
//! restarted without it; Services even by an agent that was restarted without it. Immutable objects are read once and not watched.

mod references;
mod services;
mod services_memory;
mod source;
mod store;
mod tokens;

pub use references::{Kind, ObjectKey, references};
pub use services::{ServiceFacts, ServicePort};
pub use source::{Answer, ApiSource, NoSource, Source};
pub use tokens::{Token, TokenKey};

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Secret};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use store::Store;
use tokio::sync::broadcast;

/// How long a reader waits for an object that was never seen before it gets an error.
const FIRST_READ: Duration = Duration::from_secs(10);
/// Changes that a slow reader may fall behind before it is told to look at everything.
const CHANGES: usize = 256;

/// An object that could not be read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ObjectError {
    #[error("cannot read {key}: {cause}")]
    Unavailable { key: ObjectKey, cause: String },
    #[error("cannot get a token for service account {namespace}/{account}: {cause}")]
    Token { namespace: String, account: String, cause: String },
}

/// The objects of all pods on this node. Clones share everything.
#[derive(Clone)]
pub struct Objects {
    inner: Arc<Inner>,
}

struct Inner {
    config_maps: Store<ConfigMap>,
    secrets: Store<Secret>,
    services: services::Services,
    tokens: tokens::Tokens,
    changes: broadcast::Sender<ObjectKey>,
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Objects")
    }
}

impl Objects {
    /// Must be called within a tokio runtime: the watch of Services starts at once.
    #[must_use]
    pub fn new(source: Arc<dyn Source>) -> Self {
        Self::with(source, None)
    }

    /// Also writes the Services down in a file, and starts from that while the API server is silent.
    #[must_use]
    pub fn remembering(source: Arc<dyn Source>, services_file: PathBuf) -> Self {
        Self::with(source, Some(services_file))
    }

    fn with(source: Arc<dyn Source>, services_file: Option<PathBuf>) -> Self {
        let changes = broadcast::channel(CHANGES).0;
        let inner = Inner {
            config_maps: Store::new(Kind::ConfigMap, Arc::clone(&source), changes.clone()),
            secrets: Store::new(Kind::Secret, Arc::clone(&source), changes.clone()),
            services: services::Services::new(source.as_ref(), services_file),
            tokens: tokens::Tokens::new(source),
            changes,
        };
        Self { inner: Arc::new(inner) }
    }

    /// Objects of a node without an API server: there are none.
    #[must_use]
    pub fn none() -> Self {
        Self::new(Arc::new(NoSource))
    }

    /// Starts watching what the pod refers to. Idempotent; a changed pod drops what it no longer refers to.
    pub fn register(&self, pod: &Pod) {
        let uid = crate::podspec::uid(pod);
        let keys = references(pod);
        self.inner.config_maps.hold(uid, keys.iter().filter(|key| key.kind == Kind::ConfigMap));
        self.inner.secrets.hold(uid, keys.iter().filter(|key| key.kind == Kind::Secret));
    }

    /// Forgets the pod's references; watches that nobody else needs end.
    pub fn unregister(&self, pod_uid: &str) {
        self.inner.config_maps.release(pod_uid);
        self.inner.secrets.release(pod_uid);
        self.inner.tokens.release(pod_uid);
    }

    /// The ConfigMap, or `None` if the API server says there is none.
    pub async fn config_map(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Arc<ConfigMap>>, ObjectError> {
        self.inner.config_maps.get(namespace, name, FIRST_READ).await
    }

    /// The Secret, or `None` if the API server says there is none.
    pub async fn secret(&self, namespace: &str, name: &str) -> Result<Option<Arc<Secret>>, ObjectError> {
        self.inner.secrets.get(namespace, name, FIRST_READ).await
    }

    /// All Services with an address, or `None` while they were never read.
    pub async fn services(&self) -> Option<Arc<Vec<ServiceFacts>>> {
        self.inner.services.all(FIRST_READ).await
    }

    /// All Services with an address as far as they are known now.
    #[must_use]
    pub fn known_services(&self) -> Option<Arc<Vec<ServiceFacts>>> {
        self.inner.services.now()
    }

    /// A token bound to a pod: a cached one until it is due for renewal, and for as long as it is valid if renewal fails.
    pub async fn token(&self, key: &TokenKey) -> Result<Token, ObjectError> {
        self.inner.tokens.get(key).await
    }

    /// Told of each change to a registered object. A receiver that lags has to look at everything.
    #[must_use]
    pub fn changes(&self) -> broadcast::Receiver<ObjectKey> {
        self.inner.changes.subscribe()
    }
}

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;
