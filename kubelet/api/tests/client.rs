//! The client against a server: one connection, credentials that change, and failures that explain themselves.

#![allow(clippy::unwrap_used)]

mod support;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use orlop_api::ApiError;
use orlop_api::client::Patch;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::{Authority, FakeServer, client, kubeconfig, status};

fn trusting(authority: &Authority) -> String {
    format!("certificate-authority-data: {}", STANDARD.encode(&authority.pem))
}

#[tokio::test]
async fn many_requests_at_once_share_one_http2_connection() {
    let authority = Authority::new("ca");
    let server = FakeServer::tls(&authority, &["127.0.0.1"], |_| support::json(200, json!({}))).await;
    let client = client(&kubeconfig(&server.url(), &trusting(&authority), "{token: abc}"));
    let requests = (0..30).map(|_| client.get::<Value>("/api"));
    for result in futures_util::future::join_all(requests).await {
        result.unwrap();
    }
    assert_eq!(server.connections.load(Ordering::SeqCst), 1);
    let asked = server.asked.lock().unwrap();
    assert!(asked.iter().all(|asked| asked.h2 && asked.token.as_deref() == Some("Bearer abc")));
}

#[tokio::test]
async fn plain_http_works_and_connections_are_used_again() {
    let server = FakeServer::plain(|asked| support::json(200, json!({"path": asked.path}))).await;
    let client = client(&kubeconfig(&format!("{}/prefix/", server.url()), "", "{}"));
    for _ in 0..5 {
        let answer: Value = client.get("/api?x=1").await.unwrap();
        assert_eq!(answer["path"], "/prefix/api?x=1");
    }
    assert_eq!(server.connections.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn verbs_carry_their_content_types_and_bodies() {
    let server = FakeServer::plain(|_| support::json(200, json!({}))).await;
    let client = server.client();
    client.patch::<_, Value>("/p", Patch::Strategic, &json!({"a": 1})).await.unwrap();
    client.replace::<_, Value>("/p", &json!([])).await.unwrap();
    client.delete("/p", &()).await.unwrap();
    client.delete("/p", &json!({"gracePeriodSeconds": 0})).await.unwrap();
    let asked = server.asked.lock().unwrap();
    let seen: Vec<_> =
        asked.iter().map(|a| (a.method.as_str(), a.content_type.as_deref(), a.body.as_str())).collect();
    assert_eq!(
        seen,
        [
            ("PATCH", Some("application/strategic-merge-patch+json"), r#"{"a":1}"#),
            ("PUT", Some("application/json"), "[]"),
            ("DELETE", None, ""),
            ("DELETE", Some("application/json"), r#"{"gracePeriodSeconds":0}"#),
        ]
    );
}

#[tokio::test]
async fn a_refusal_keeps_the_servers_words() {
    let server = FakeServer::plain(|_| status(409, "AlreadyExists", "pods \"a\" already exists")).await;
    let error = server.client().get::<Value>("/x").await.unwrap_err();
    assert!(error.is_conflict() && error.is_retryable());
    assert_eq!(error.to_string(), "GET /x: pods \"a\" already exists (409 AlreadyExists)");
}

#[tokio::test]
async fn an_expired_token_says_where_it_lies() {
    let server = FakeServer::plain(|_| status(401, "Unauthorized", "Unauthorized")).await;
    let client = client(&kubeconfig(&server.url(), "", "{token: old}"));
    let text = client.get::<Value>("/x").await.unwrap_err().to_string();
    assert!(text.contains("users[u].user.token of /tmp/none/config") && text.contains("expired"), "{text}");
}

#[tokio::test]
async fn a_token_file_is_read_again_when_the_token_is_refused() {
    let server = FakeServer::plain(|asked| match asked.token.as_deref() {
        Some("Bearer new") => support::json(200, json!({})),
        _ => status(401, "Unauthorized", "Unauthorized"),
    })
    .await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    std::fs::write(&file, "old\n").unwrap();
    let client = client(&kubeconfig(&server.url(), "", &format!("{{tokenFile: {}}}", file.display())));
    let text = client.get::<Value>("/x").await.unwrap_err().to_string();
    assert!(text.contains(&file.display().to_string()), "{text}");
    std::fs::write(&file, "new\n").unwrap();
    client.get::<Value>("/x").await.unwrap();
}

#[tokio::test]
async fn a_wrong_ca_is_explained_with_server_and_origin() {
    let (right, wrong) = (Authority::new("right"), Authority::new("wrong"));
    let server = FakeServer::tls(&right, &["127.0.0.1"], |_| support::json(200, json!({}))).await;
    let text = client(&kubeconfig(&server.url(), &trusting(&wrong), "{}"))
        .get::<Value>("/x")
        .await
        .unwrap_err()
        .to_string();
    let expected = format!(
        "the certificate of {} is not signed by the CA in certificate-authority-data of /tmp/none/config",
        server.url()
    );
    assert!(text.contains(&expected), "{text}");
}

#[tokio::test]
async fn a_wrong_name_and_a_server_without_tls_are_explained() {
    let authority = Authority::new("ca");
    let server = FakeServer::tls(&authority, &["other.example"], |_| support::json(200, json!({}))).await;
    let get = |text: String| async move { client(&text).get::<Value>("/x").await.map_err(|e| e.to_string()) };
    let text = get(kubeconfig(&server.url(), &trusting(&authority), "{}")).await.unwrap_err();
    assert!(
        text.contains("does not bear the name `127.0.0.1`") && text.contains("tls-server-name"),
        "{text}"
    );
    let named = format!("{}\n    tls-server-name: other.example", trusting(&authority));
    get(kubeconfig(&server.url(), &named, "{}")).await.unwrap();
    get(kubeconfig(&server.url(), "insecure-skip-tls-verify: true", "{}")).await.unwrap();
    let plain = FakeServer::plain(|_| support::json(200, json!({}))).await;
    let https = plain.url().replace("http://", "https://");
    let text = get(kubeconfig(&https, &trusting(&authority), "{}")).await.unwrap_err();
    assert!(text.contains("does not speak TLS"), "{text}");
}

#[tokio::test]
async fn a_server_that_is_not_running_is_told_at_once() {
    let server = FakeServer::plain(|_| support::json(200, json!({}))).await;
    server.stop();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let started = Instant::now();
    let error = server.client().get::<Value>("/x").await.unwrap_err();
    assert!(matches!(error, ApiError::Unreachable { .. }) && error.is_retryable());
    assert!(error.to_string().contains("refused the connection"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn a_request_without_an_answer_ends_at_its_time_limit() {
    // The sender is kept, so the body never ends.
    let kept = std::sync::Mutex::new(Vec::new());
    let server = FakeServer::plain(move |_| {
        let (sender, response) = support::stream();
        kept.lock().unwrap().push(sender);
        response
    })
    .await;
    let client = server.client().with_timeout(Duration::from_millis(200));
    let text = client.get::<Value>("/x").await.unwrap_err().to_string();
    assert!(text.contains("no answer within 0.2 s"), "{text}");
}

#[tokio::test]
async fn a_new_certificate_is_used_at_once_on_a_new_connection() {
    let authority = Authority::new("ca");
    let server = FakeServer::tls(&authority, &["127.0.0.1"], |_| support::json(200, json!({}))).await;
    let client = client(&kubeconfig(&server.url(), &trusting(&authority), "{}"));
    let certified = |name: &str| {
        let (pem, key) = authority.issue(&[name]);
        let chain = orlop_api::tls::certificates(pem.as_bytes()).unwrap();
        orlop_api::tls::certified(chain, key.serialize_der().try_into().unwrap()).unwrap()
    };
    client.get::<Value>("/0").await.unwrap();
    for name in ["one", "two"] {
        let certified = certified(name);
        client.credentials().swap_certificate(Arc::clone(&certified));
        client.get::<Value>("/x").await.unwrap();
        let shown = server.asked.lock().unwrap().last().unwrap().certificate.clone();
        assert_eq!(shown.as_deref(), Some(certified.cert[0].as_ref()), "{name}");
    }
    assert_eq!(server.connections.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_certificate_renewed_on_disk_is_picked_up_when_the_old_one_is_refused() {
    let authority = Authority::new("ca");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("pair.pem");
    let write = || {
        let (pem, key) = authority.issue(&["node"]);
        std::fs::write(&file, format!("{pem}{}", key.serialize_pem())).unwrap();
    };
    write();
    let refusing = Arc::new(AtomicBool::new(false));
    let (first, refuse) = (std::sync::Mutex::new(None), Arc::clone(&refusing));
    let server = FakeServer::tls(&authority, &["127.0.0.1"], move |asked| {
        let mut first = first.lock().unwrap();
        let known = first.get_or_insert_with(|| asked.certificate.clone());
        if refuse.load(Ordering::SeqCst) && *known == asked.certificate {
            status(401, "Unauthorized", "Unauthorized")
        } else {
            support::json(200, json!({}))
        }
    })
    .await;
    let user = format!("{{client-certificate: {0}, client-key: {0}}}", file.display());
    let client = client(&kubeconfig(&server.url(), &trusting(&authority), &user));
    client.get::<Value>("/x").await.unwrap();
    refusing.store(true, Ordering::SeqCst);
    let text = client.get::<Value>("/x").await.unwrap_err().to_string();
    assert!(text.contains("client certificate"), "{text}");
    write();
    client.get::<Value>("/x").await.unwrap();
}

#[tokio::test]
async fn the_client_survives_a_restart_of_the_server() {
    let authority = Authority::new("ca");
    let server = FakeServer::tls(&authority, &["127.0.0.1"], |_| support::json(200, json!({}))).await;
    let client = client(&kubeconfig(&server.url(), &trusting(&authority), "{}"));
    client.get::<Value>("/x").await.unwrap();
    server.stop();
    tokio::time::sleep(Duration::from_millis(50)).await;
    server.restart().await;
    client.get::<Value>("/x").await.unwrap();
}

#[tokio::test]
async fn waiting_for_the_server_ends_soon_after_it_is_back() {
    let server = FakeServer::plain(|_| support::json(200, json!({}))).await;
    let client = server.client();
    server.stop();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let waiters: Vec<_> = (0..10)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.wait_reachable(Duration::from_secs(30)).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let before = server.connections.load(Ordering::SeqCst);
    server.restart().await;
    let back = Instant::now();
    for waiter in waiters {
        waiter.await.unwrap();
    }
    assert!(back.elapsed() < Duration::from_millis(1500), "{:?}", back.elapsed());
    assert_eq!(server.connections.load(Ordering::SeqCst), before + 1, "one probes for all");
}
