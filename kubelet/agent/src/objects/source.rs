//! Where objects come from: the API server, or nowhere.

use crate::objects::references::{Kind, ObjectKey};
use crate::objects::services::ServiceFacts;
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use orlop_api::Client;
use orlop_api::watch::{WatchEvent, WatchRequest, watch};
use serde::de::DeserializeOwned;
use std::future::Future;
use std::pin::Pin;
use tokio::sync::mpsc;

pub type Answer<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The four things asked of an API server.
pub trait Source: Send + Sync + 'static {
    /// Watches one ConfigMap; ends when the receiver is dropped.
    fn config_map(&self, namespace: &str, name: &str) -> mpsc::Receiver<WatchEvent<ConfigMap>>;
    /// Watches one Secret; ends when the receiver is dropped.
    fn secret(&self, namespace: &str, name: &str) -> mpsc::Receiver<WatchEvent<Secret>>;
    /// Watches all Services that have an address.
    fn services(&self) -> mpsc::Receiver<WatchEvent<ServiceFacts>>;
    /// Asks for a token of a service account.
    fn token<'a>(
        &'a self,
        namespace: &'a str,
        account: &'a str,
        request: &'a TokenRequest,
    ) -> Answer<'a, Result<TokenRequest, String>>;
    /// Why an object that is watched did not come, in words: a question put to the server once.
    fn explain<'a>(&'a self, key: &'a ObjectKey) -> Answer<'a, String>;
}

/// The API server.
#[derive(Debug, Clone)]
pub struct ApiSource {
    client: Client,
}

impl ApiSource {
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    fn single<T: DeserializeOwned + Send + 'static>(
        &self,
        collection: &str,
        namespace: &str,
        name: &str,
    ) -> mpsc::Receiver<WatchEvent<T>> {
        let request = WatchRequest {
            path: format!("/api/v1/namespaces/{namespace}/{collection}"),
            label_selector: String::new(),
            field_selector: format!("metadata.name={name}"),
        };
        watch(&self.client, request)
    }
}

impl Source for ApiSource {
    fn config_map(&self, namespace: &str, name: &str) -> mpsc::Receiver<WatchEvent<ConfigMap>> {
        self.single("configmaps", namespace, name)
    }

    fn secret(&self, namespace: &str, name: &str) -> mpsc::Receiver<WatchEvent<Secret>> {
        self.single("secrets", namespace, name)
    }

    fn services(&self) -> mpsc::Receiver<WatchEvent<ServiceFacts>> {
        let request = WatchRequest {
            path: "/api/v1/services".to_owned(),
            label_selector: String::new(),
            field_selector: "spec.clusterIP!=None".to_owned(),
        };
        watch(&self.client, request)
    }

    fn token<'a>(
        &'a self,
        namespace: &'a str,
        account: &'a str,
        request: &'a TokenRequest,
    ) -> Answer<'a, Result<TokenRequest, String>> {
        Box::pin(async move {
            let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
            self.client.create(&path, request).await.map_err(|error| error.to_string())
        })
    }

    fn explain<'a>(&'a self, key: &'a ObjectKey) -> Answer<'a, String> {
        Box::pin(async move {
            let collection = match key.kind {
                Kind::ConfigMap => "configmaps",
                Kind::Secret => "secrets",
            };
            let path = format!("/api/v1/namespaces/{}/{collection}/{}", key.namespace, key.name);
            match self.client.get::<serde::de::IgnoredAny>(&path).await {
                Ok(_) => "its watch has not delivered it yet".to_owned(),
                Err(error) if error.is_retryable() => format!(
                    "{error}; its contents are not kept on this node, so what needs them waits for the API server"
                ),
                Err(error) => error.to_string(),
            }
        })
    }
}

/// A node without an API server: every object is absent, and there are no Services.
#[derive(Debug, Clone, Copy)]
pub struct NoSource;

/// A watch that has listed nothing and stays open only in its receiver's buffer.
fn empty<T>() -> mpsc::Receiver<WatchEvent<T>> {
    let (sender, receiver) = mpsc::channel(1);
    // The channel was made with room for exactly this.
    let _ = sender.try_send(WatchEvent::Listed(Vec::new()));
    receiver
}

impl Source for NoSource {
    fn config_map(&self, _: &str, _: &str) -> mpsc::Receiver<WatchEvent<ConfigMap>> {
        empty()
    }

    fn secret(&self, _: &str, _: &str) -> mpsc::Receiver<WatchEvent<Secret>> {
        empty()
    }

    fn services(&self) -> mpsc::Receiver<WatchEvent<ServiceFacts>> {
        empty()
    }

    fn token<'a>(
        &'a self,
        _: &'a str,
        _: &'a str,
        _: &'a TokenRequest,
    ) -> Answer<'a, Result<TokenRequest, String>> {
        Box::pin(async { Err("this node has no API server".to_owned()) })
    }

    fn explain<'a>(&'a self, _: &'a ObjectKey) -> Answer<'a, String> {
        Box::pin(async { "this node has no API server".to_owned() })
    }
}
