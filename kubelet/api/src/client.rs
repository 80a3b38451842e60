//! Requests to the API server.

use crate::error::ApiError;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How a PATCH body is to be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patch {
    Strategic,
    Merge,
    Json,
}

/// A connection to one API server. Clones share it and its credentials.
#[derive(Debug, Clone)]
pub struct Client {}

/// Paths are absolute and carry their query, such as `/api/v1/nodes/a/status?fieldManager=orlop`.
#[allow(clippy::todo, clippy::unused_async, unused_variables)]
impl Client {
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        todo!()
    }
    pub async fn create<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ApiError> {
        todo!()
    }
    pub async fn replace<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ApiError> {
        todo!()
    }
    pub async fn patch<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        path: &str,
        kind: Patch,
        body: &B,
    ) -> Result<T, ApiError> {
        todo!()
    }
    /// `options` is a `DeleteOptions` object or `()` for none.
    pub async fn delete<B: Serialize + Sync>(&self, path: &str, options: &B) -> Result<(), ApiError> {
        todo!()
    }
    /// The server's address, for messages.
    #[must_use]
    pub fn server(&self) -> &str {
        todo!()
    }
}
