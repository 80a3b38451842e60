//! The status writer against a small API server that can be told to fail.

use super::*;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use std::sync::Mutex;
use tokio::sync::oneshot;

#[derive(Clone, Default)]
struct Server {
    seen: Arc<Mutex<Vec<(String, Value)>>>,
    failures: Arc<Mutex<usize>>,
}

async fn answer(State(server): State<Server>, method: Method, uri: Uri, body: Bytes) -> (StatusCode, String) {
    {
        let mut failures = server.failures.lock().unwrap();
        if *failures > 0 {
            *failures -= 1;
            return (StatusCode::SERVICE_UNAVAILABLE, "{}".to_owned());
        }
    }
    let value = serde_json::from_slice(&body).unwrap();
    server.seen.lock().unwrap().push((format!("{method} {}", uri.path()), value));
    (StatusCode::OK, json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}}).to_string())
}

async fn start(server: Server) -> Client {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = axum::Router::new().fallback(answer).with_state(server);
    tokio::spawn(async move {
        use hyper_util::rt::{TokioExecutor, TokioIo};
        while let Ok((stream, _)) = listener.accept().await {
            let app = app.clone();
            tokio::spawn(async move {
                let service = hyper_util::service::TowerToHyperService::new(app);
                let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                server.serve_connection(TokioIo::new(stream), service).await.ok();
            });
        }
    });
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("kubeconfig");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: k, user: u}}}}]\n\
         clusters: [{{name: k, cluster: {{server: 'http://{address}'}}}}]\nusers: [{{name: u, user: {{}}}}]\n"
    );
    std::fs::write(&file, text).unwrap();
    Client::from_kubeconfig(&file).unwrap()
}

fn status(phase: &str) -> PodStatus {
    PodStatus { phase: Some(phase.to_owned()), ..PodStatus::default() }
}

fn target() -> Target {
    Target { namespace: "n".into(), name: "p".into(), uid: watch::channel(Some("u".to_owned())).1 }
}

#[tokio::test]
async fn only_the_newest_status_is_written_when_the_server_returns_and_then_the_object_deleted() {
    let server = Server::default();
    *server.failures.lock().unwrap() = 2;
    let client = start(server.clone()).await;
    let (desired, wanted) =
        watch::channel(Desired { status: Some(Arc::new(status("Pending"))), delete: false });
    let (deleted, gone) = oneshot::channel();
    let task = tokio::spawn(run(client, target(), wanted, None, move || deleted.send(()).unwrap()));
    desired.send_modify(|desired| desired.status = Some(Arc::new(status("Running"))));
    desired.send_modify(|desired| {
        desired.status = Some(Arc::new(status("Succeeded")));
        desired.delete = true;
    });
    tokio::time::timeout(Duration::from_secs(10), gone).await.unwrap().unwrap();
    task.await.unwrap();
    let seen = server.seen.lock().unwrap().clone();
    let lines: Vec<&str> = seen.iter().map(|(line, _)| line.as_str()).collect();
    assert_eq!(lines, ["PATCH /api/v1/namespaces/n/pods/p/status", "DELETE /api/v1/namespaces/n/pods/p"]);
    assert_eq!(seen[0].1["status"]["phase"], "Succeeded");
    assert_eq!(seen[0].1["metadata"]["uid"], "u");
    assert_eq!(seen[1].1["preconditions"]["uid"], "u");
    assert_eq!(seen[1].1["gracePeriodSeconds"], 0);
}

#[tokio::test]
async fn what_the_server_already_holds_is_not_written_again() {
    let server = Server::default();
    let client = start(server.clone()).await;
    let first = Desired { status: Some(Arc::new(status("Running"))), delete: false };
    let (desired, wanted) = watch::channel(first);
    let task = tokio::spawn(run(client, target(), wanted, Some(status("Running")), || ()));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(server.seen.lock().unwrap().is_empty());
    desired.send_modify(|desired| desired.status = Some(Arc::new(status("Failed"))));
    drop(desired);
    tokio::time::timeout(Duration::from_secs(10), task).await.unwrap().unwrap();
    assert_eq!(server.seen.lock().unwrap().len(), 1, "the last word is written although nobody waits for it");
}
