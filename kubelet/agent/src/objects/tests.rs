use super::fake::Fake;
use super::*;
use serde_json::json;
use std::sync::atomic::Ordering;

fn pod(uid: &str, config_map: &str) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "ns", "uid": uid},
        "spec": {"containers": [{"name": "c", "envFrom": [{"configMapRef": {"name": config_map}}]}]}
    }))
    .unwrap()
}

fn value(map: &ConfigMap) -> &str {
    &map.data.as_ref().unwrap()["k"]
}

#[tokio::test]
async fn one_watch_serves_all_pods_and_ends_with_the_last() {
    let fake = Arc::new(Fake::default());
    fake.put_config_map("ns", "m", &[("k", "1")]);
    let objects = Objects::new(fake.clone());
    objects.register(&pod("a", "m"));
    objects.register(&pod("b", "m"));
    objects.register(&pod("b", "m"));
    assert_eq!(value(&objects.config_map("ns", "m").await.unwrap().unwrap()), "1");
    assert_eq!(fake.open_config_map_watches("ns", "m"), 1);
    objects.unregister("a");
    tokio::task::yield_now().await;
    assert_eq!(fake.open_config_map_watches("ns", "m"), 1);
    objects.register(&pod("b", "other"));
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert_eq!(fake.open_config_map_watches("ns", "m"), 0);
    assert_eq!(fake.open_config_map_watches("ns", "other"), 1);
}

#[tokio::test]
async fn changes_are_seen_and_told() {
    let fake = Arc::new(Fake::default());
    let objects = Objects::new(fake.clone());
    let mut changes = objects.changes();
    objects.register(&pod("a", "m"));
    assert!(objects.config_map("ns", "m").await.unwrap().is_none());
    changes.recv().await.unwrap();
    fake.put_config_map("ns", "m", &[("k", "2")]);
    assert_eq!(changes.recv().await.unwrap().to_string(), "configmap ns/m");
    assert_eq!(value(&objects.config_map("ns", "m").await.unwrap().unwrap()), "2");
}

#[tokio::test]
async fn what_was_read_stays_readable_when_the_server_is_gone() {
    let fake = Arc::new(Fake::default());
    fake.put_config_map("ns", "m", &[("k", "1")]);
    let objects = Objects::new(fake.clone());
    objects.register(&pod("a", "m"));
    objects.config_map("ns", "m").await.unwrap();
    fake.gone.store(true, Ordering::SeqCst);
    objects.register(&pod("b", "m"));
    assert_eq!(value(&objects.config_map("ns", "m").await.unwrap().unwrap()), "1");
}

#[tokio::test(start_paused = true)]
async fn what_was_never_read_is_an_error_that_says_why() {
    let fake = Arc::new(Fake::default());
    fake.gone.store(true, Ordering::SeqCst);
    let objects = Objects::new(fake.clone());
    let error = objects.secret("ns", "s").await.unwrap_err();
    assert_eq!(error.to_string(), "cannot read secret ns/s: connection refused");
    assert!(objects.services().await.is_none());
}

#[tokio::test]
async fn immutable_objects_are_read_once_and_kept() {
    let fake = Arc::new(Fake::default());
    let data = Some([("k".to_owned(), "1".to_owned())].into());
    fake.put("ns", "m", ConfigMap { data, immutable: Some(true), ..Default::default() });
    let objects = Objects::new(fake.clone());
    objects.register(&pod("a", "m"));
    objects.config_map("ns", "m").await.unwrap();
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert_eq!(fake.open_config_map_watches("ns", "m"), 0);
    assert_eq!(value(&objects.config_map("ns", "m").await.unwrap().unwrap()), "1");
}

#[tokio::test]
async fn a_node_without_a_server_has_no_objects_and_no_services() {
    let objects = Objects::none();
    assert!(objects.config_map("ns", "m").await.unwrap().is_none());
    assert!(objects.services().await.unwrap().is_empty());
}

#[tokio::test]
async fn tokens_are_kept_while_valid_even_if_renewal_fails() {
    let fake = Arc::new(Fake::default());
    let objects = Objects::new(fake.clone());
    let mut key = TokenKey {
        namespace: "ns".into(),
        account: "sa".into(),
        pod_name: "p".into(),
        pod_uid: "a".into(),
        audience: String::new(),
        expiration_seconds: 3600,
    };
    let first = objects.token(&key).await.unwrap();
    assert_eq!(objects.token(&key).await.unwrap().text, first.text);
    assert_eq!(fake.tokens.load(Ordering::SeqCst), 1);
    fake.gone.store(true, Ordering::SeqCst);
    assert_eq!(objects.token(&key).await.unwrap().text, first.text);
    key.audience = "vault".into();
    let error = objects.token(&key).await.unwrap_err().to_string();
    assert_eq!(error, "cannot get a token for service account ns/sa: connection refused");
    objects.unregister("a");
    key.audience.clear();
    assert!(objects.token(&key).await.is_err());
}
