//! An API server in memory.

use crate::objects::source::{Answer, Source};
use crate::objects::{ObjectKey, ServiceFacts};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestStatus};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use orlop_api::watch::WatchEvent;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokio::sync::mpsc;

type Watchers<T> = Vec<mpsc::Sender<WatchEvent<T>>>;

#[derive(Default)]
pub(crate) struct Fake {
    config_maps: Mutex<BTreeMap<String, ConfigMap>>,
    secrets: Mutex<BTreeMap<String, Secret>>,
    services: Mutex<Vec<ServiceFacts>>,
    config_map_watchers: Mutex<BTreeMap<String, Watchers<ConfigMap>>>,
    pub(crate) gone: AtomicBool,
    pub(crate) watches: AtomicUsize,
    pub(crate) tokens: AtomicUsize,
}

impl Fake {
    pub(crate) fn put_config_map(&self, namespace: &str, name: &str, data: &[(&str, &str)]) {
        let map = ConfigMap {
            data: Some(data.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()),
            ..Default::default()
        };
        self.put(namespace, name, map);
    }

    pub(crate) fn put(&self, namespace: &str, name: &str, map: ConfigMap) {
        let key = format!("{namespace}/{name}");
        self.config_maps.lock().unwrap().insert(key.clone(), map.clone());
        for watcher in self.config_map_watchers.lock().unwrap().get(&key).into_iter().flatten() {
            let _ = watcher.try_send(WatchEvent::Applied(map.clone()));
        }
    }

    pub(crate) fn open_config_map_watches(&self, namespace: &str, name: &str) -> usize {
        let watchers = self.config_map_watchers.lock().unwrap();
        watchers
            .get(&format!("{namespace}/{name}"))
            .map_or(0, |all| all.iter().filter(|sender| !sender.is_closed()).count())
    }

    pub(crate) fn put_secret(&self, namespace: &str, name: &str, data: &[(&str, &[u8])]) {
        let data = data.iter().map(|(k, v)| ((*k).to_owned(), k8s_openapi::ByteString(v.to_vec()))).collect();
        let secret = Secret { data: Some(data), ..Default::default() };
        self.secrets.lock().unwrap().insert(format!("{namespace}/{name}"), secret);
    }

    pub(crate) fn put_service(&self, service: ServiceFacts) {
        self.services.lock().unwrap().push(service);
    }

    fn answer<T>(&self, listed: Vec<T>) -> (mpsc::Sender<WatchEvent<T>>, mpsc::Receiver<WatchEvent<T>>) {
        self.watches.fetch_add(1, Ordering::SeqCst);
        let (sender, receiver) = mpsc::channel(16);
        if !self.gone.load(Ordering::SeqCst) {
            let _ = sender.try_send(WatchEvent::Listed(listed));
        }
        (sender, receiver)
    }
}

impl Source for Fake {
    fn config_map(&self, namespace: &str, name: &str) -> mpsc::Receiver<WatchEvent<ConfigMap>> {
        let key = format!("{namespace}/{name}");
        let listed = self.config_maps.lock().unwrap().get(&key).cloned().into_iter().collect();
        let (sender, receiver) = self.answer(listed);
        self.config_map_watchers.lock().unwrap().entry(key).or_default().push(sender);
        receiver
    }

    fn secret(&self, namespace: &str, name: &str) -> mpsc::Receiver<WatchEvent<Secret>> {
        let key = format!("{namespace}/{name}");
        let listed = self.secrets.lock().unwrap().get(&key).cloned().into_iter().collect();
        self.answer(listed).1
    }

    fn services(&self) -> mpsc::Receiver<WatchEvent<ServiceFacts>> {
        let listed = self.services.lock().unwrap().clone();
        self.answer(listed).1
    }

    fn token<'a>(
        &'a self,
        namespace: &'a str,
        account: &'a str,
        request: &'a TokenRequest,
    ) -> Answer<'a, Result<TokenRequest, String>> {
        Box::pin(async move {
            if self.gone.load(Ordering::SeqCst) {
                return Err("connection refused".to_owned());
            }
            let number = self.tokens.fetch_add(1, Ordering::SeqCst);
            let seconds = request.spec.as_ref().and_then(|spec| spec.expiration_seconds).unwrap_or(3600);
            let expires = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
            Ok(TokenRequest {
                status: Some(TokenRequestStatus {
                    expiration_timestamp: Some(Time(expires)),
                    token: Some(format!("token-{number} of {namespace}/{account}")),
                }),
                ..request.clone()
            })
        })
    }

    fn explain<'a>(&'a self, _: &'a ObjectKey) -> Answer<'a, String> {
        Box::pin(async { "connection refused".to_owned() })
    }
}
