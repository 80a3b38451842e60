//! List-watch that survives everything: expired versions, broken connections, a server that is gone for minutes.

use crate::client::Client;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

/// What to watch: a collection's path and selectors.
#[derive(Debug, Clone, Default)]
pub struct WatchRequest {
    /// Such as `/api/v1/pods`.
    pub path: String,
    pub label_selector: String,
    pub field_selector: String,
}

/// What a watch tells. After every (re)list comes a complete `Listed`, so a consumer replaces its state and cannot miss
/// a deletion.
#[derive(Debug, Clone)]
pub enum WatchEvent<T> {
    Listed(Vec<T>),
    Applied(T),
    Deleted(T),
}

/// Starts watching in a task of its own that ends when the receiver is dropped. `T` needs `metadata.resourceVersion`
/// only on the wire; it may be any slim struct.
#[allow(clippy::todo, unused_variables)]
pub fn watch<T: DeserializeOwned + Send + 'static>(
    client: &Client,
    request: WatchRequest,
) -> mpsc::Receiver<WatchEvent<T>> {
    todo!()
}
