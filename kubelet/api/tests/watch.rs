//! List-watch against a server that pages, expires, breaks off and goes away.

#![allow(clippy::unwrap_used)]

mod support;

use bytes::Bytes;
use http_body_util::channel::Sender;
use orlop_api::watch::{WatchEvent, WatchRequest, watch};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::{Asked, Body, FakeServer, status, stream};
use tokio::sync::mpsc::Receiver;

#[derive(Debug, Clone, Deserialize)]
struct Thing {
    metadata: Meta,
    #[serde(default)]
    value: u32,
}

#[derive(Debug, Clone, Deserialize)]
struct Meta {
    name: String,
}

fn thing(name: &str, version: u32) -> Value {
    json!({"metadata": {"name": name, "resourceVersion": version.to_string()}, "value": version})
}

fn listed(items: &[Value], version: u32, more: &str) -> Value {
    json!({"metadata": {"resourceVersion": version.to_string(), "continue": more}, "items": items})
}

/// Watches that the server holds open, newest last.
type Open = Arc<Mutex<Vec<Sender<Bytes>>>>;

async fn server(list: impl Fn(&Asked) -> http::Response<Body> + Send + Sync + 'static) -> (FakeServer, Open) {
    let open = Open::default();
    let held = Arc::clone(&open);
    let server = FakeServer::plain(move |asked| {
        if asked.path.contains("watch=true") {
            let (sender, response) = stream();
            held.lock().unwrap().push(sender);
            response
        } else {
            list(&asked)
        }
    })
    .await;
    (server, open)
}

async fn next(events: &mut Receiver<WatchEvent<Thing>>) -> String {
    let event = tokio::time::timeout(Duration::from_secs(10), events.recv()).await;
    match event.expect("no event within 10 s").expect("the watch has ended") {
        WatchEvent::Listed(things) => {
            let names: Vec<_> = things.into_iter().map(|thing| thing.metadata.name).collect();
            format!("listed {}", names.join(","))
        }
        WatchEvent::Applied(thing) => format!("applied {} {}", thing.metadata.name, thing.value),
        WatchEvent::Deleted(thing) => format!("deleted {}", thing.metadata.name),
    }
}

async fn send(open: &Open, number: usize, kind: &str, object: Value) {
    let started = Instant::now();
    let mut sender = loop {
        if open.lock().unwrap().len() > number {
            break open.lock().unwrap().remove(number);
        }
        assert!(started.elapsed() < Duration::from_secs(10), "watch {number} never came");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let line = format!("{}\n", json!({"type": kind, "object": object}));
    // In two pieces, as the network may deliver it.
    let (first, second) = line.split_at(line.len() / 2);
    sender.send_data(Bytes::from(first.to_owned())).await.unwrap();
    sender.send_data(Bytes::from(second.to_owned())).await.unwrap();
    open.lock().unwrap().insert(number, sender);
}

fn things() -> WatchRequest {
    WatchRequest { path: "/things".to_owned(), ..WatchRequest::default() }
}

#[tokio::test]
async fn a_list_in_pages_comes_as_one_and_events_follow() {
    let (server, open) = server(|asked| {
        let page = if asked.path.contains("continue=tok%2B1") {
            listed(&[thing("b", 2)], 7, "")
        } else {
            listed(&[thing("a", 1)], 7, "tok+1")
        };
        support::json(200, page)
    })
    .await;
    let mut events = watch(&server.client(), things());
    assert_eq!(next(&mut events).await, "listed a,b");
    send(&open, 0, "ADDED", thing("c", 8)).await;
    send(&open, 0, "MODIFIED", thing("c", 9)).await;
    send(&open, 0, "DELETED", thing("a", 10)).await;
    assert_eq!(next(&mut events).await, "applied c 8");
    assert_eq!(next(&mut events).await, "applied c 9");
    assert_eq!(next(&mut events).await, "deleted a");
    let paths = server.paths();
    assert!(paths[0].contains("limit=500"), "{paths:?}");
    assert!(
        paths[2].contains("allowWatchBookmarks=true") && paths[2].ends_with("resourceVersion=7"),
        "{paths:?}"
    );
}

#[tokio::test]
async fn a_broken_stream_resumes_after_the_last_bookmark_without_a_new_list() {
    let (server, open) = server(|_| support::json(200, listed(&[], 7, ""))).await;
    let mut events = watch(&server.client(), things());
    assert_eq!(next(&mut events).await, "listed ");
    send(&open, 0, "ADDED", thing("a", 8)).await;
    assert_eq!(next(&mut events).await, "applied a 8");
    send(&open, 0, "BOOKMARK", json!({"metadata": {"resourceVersion": "42"}})).await;
    let sender = open.lock().unwrap().remove(0);
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(sender);
    send(&open, 0, "ADDED", thing("b", 43)).await;
    assert_eq!(next(&mut events).await, "applied b 43");
    let paths = server.paths();
    assert!(paths.last().unwrap().ends_with("resourceVersion=42"), "{paths:?}");
    assert_eq!(paths.iter().filter(|path| !path.contains("watch=true")).count(), 1);
}

#[tokio::test]
async fn an_expired_version_in_the_stream_leads_to_a_new_list() {
    let (server, open) = server(|_| support::json(200, listed(&[thing("a", 1)], 7, ""))).await;
    let mut events = watch(&server.client(), things());
    assert_eq!(next(&mut events).await, "listed a");
    send(&open, 0, "ERROR", json!({"kind": "Status", "code": 410, "reason": "Expired"})).await;
    assert_eq!(next(&mut events).await, "listed a");
}

#[tokio::test]
async fn an_expired_version_refused_at_once_leads_to_a_new_list() {
    let watches = Arc::new(Mutex::new(0));
    let counted = Arc::clone(&watches);
    let server = FakeServer::plain(move |asked| {
        if asked.path.contains("watch=true") {
            *counted.lock().unwrap() += 1;
            return status(410, "Gone", "too old resource version");
        }
        support::json(200, listed(&[thing("a", 1)], 7, ""))
    })
    .await;
    let mut events = watch::<Thing>(&server.client(), things());
    for _ in 0..3 {
        assert_eq!(next(&mut events).await, "listed a");
    }
    assert!(*watches.lock().unwrap() >= 2);
}

#[tokio::test]
async fn an_object_that_cannot_be_understood_does_not_hide_the_others() {
    let broken = json!({"metadata": {"name": "x"}, "value": "not a number"});
    let list = listed(&[thing("a", 1), broken.clone(), thing("b", 2)], 7, "");
    let (server, open) = server(move |_| support::json(200, list.clone())).await;
    let mut events = watch(&server.client(), things());
    assert_eq!(next(&mut events).await, "listed a,b");
    send(&open, 0, "ADDED", broken).await;
    send(&open, 0, "ADDED", thing("c", 9)).await;
    assert_eq!(next(&mut events).await, "applied c 9");
}

#[tokio::test]
async fn a_server_that_comes_back_is_noticed_within_a_second_or_so() {
    let (server, open) = server(|_| support::json(200, listed(&[thing("a", 1)], 7, ""))).await;
    let mut events = watch(&server.client(), things());
    assert_eq!(next(&mut events).await, "listed a");
    // The watch must stand before it can break.
    send(&open, 0, "ADDED", thing("b", 8)).await;
    assert_eq!(next(&mut events).await, "applied b 8");
    server.stop();
    tokio::time::sleep(Duration::from_secs(4)).await;
    open.lock().unwrap().clear();
    server.restart().await;
    let back = Instant::now();
    send(&open, 0, "ADDED", thing("c", 9)).await;
    assert_eq!(next(&mut events).await, "applied c 9");
    assert!(back.elapsed() < Duration::from_secs(2), "noticed after {:?}", back.elapsed());
    let paths = server.paths();
    assert!(paths.last().unwrap().ends_with("resourceVersion=8"), "{paths:?}");
}

#[tokio::test]
async fn a_server_that_refuses_is_not_asked_in_a_tight_loop() {
    let server = FakeServer::plain(|_| status(403, "Forbidden", "no")).await;
    let events = watch::<Thing>(&server.client(), things());
    tokio::time::sleep(Duration::from_millis(1200)).await;
    drop(events);
    let count = server.paths().len();
    assert!((2..=5).contains(&count), "{count} requests in 1.2 s");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(server.paths().len(), count, "a watch that nobody reads goes on");
}

#[tokio::test]
async fn an_empty_list_may_be_null() {
    let (server, _open) =
        server(|_| support::json(200, json!({"metadata": {"resourceVersion": "1"}, "items": null}))).await;
    let mut events = watch(&server.client(), things());
    assert_eq!(next(&mut events).await, "listed ");
}
