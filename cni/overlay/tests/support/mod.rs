//! An API server that knows nodes only: list, watch and patch of their status, over plain HTTP.

#![allow(clippy::unwrap_used, unreachable_pub)]

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

#[derive(Default)]
struct State {
    nodes: BTreeMap<String, Value>,
    /// Event number `n` made resource version `n + 1`.
    events: Vec<String>,
    patches: usize,
}

/// Several listeners, in several network namespaces, may serve one state.
#[derive(Clone, Default)]
pub struct FakeApi {
    state: Arc<(Mutex<State>, Condvar)>,
}

impl FakeApi {
    /// Serves on the calling thread's namespace's loopback; the port.
    pub fn listen(&self) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let api = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (api, stream) = (api.clone(), stream.unwrap());
                // A client that goes away ends the thread of its connection.
                std::thread::spawn(move || api.serve(stream));
            }
        });
        port
    }

    pub fn put(&self, name: &str, pod_cidr: &str) {
        let node = json!({
            "metadata": {"name": name, "uid": format!("uid-{name}"), "annotations": {}},
            "spec": {"podCIDR": pod_cidr, "podCIDRs": [pod_cidr]},
            "status": {"conditions": []},
        });
        self.change(name, |known| {
            let annotations = known.map(|known| known["metadata"]["annotations"].clone());
            let mut node = node;
            node["metadata"]["annotations"] = annotations.unwrap_or_else(|| json!({}));
            Some(node)
        });
    }

    pub fn delete(&self, name: &str) {
        self.change(name, |_| None);
    }

    pub fn node(&self, name: &str) -> Value {
        self.state.0.lock().unwrap().nodes[name].clone()
    }

    pub fn patches(&self) -> usize {
        self.state.0.lock().unwrap().patches
    }

    fn change(&self, name: &str, change: impl FnOnce(Option<&Value>) -> Option<Value>) {
        let mut state = self.state.0.lock().unwrap();
        let version = (state.events.len() + 1).to_string();
        let (kind, mut object) = match change(state.nodes.get(name)) {
            Some(node) if state.nodes.contains_key(name) => ("MODIFIED", node),
            Some(node) => ("ADDED", node),
            None => ("DELETED", state.nodes.remove(name).unwrap()),
        };
        object["metadata"]["resourceVersion"] = json!(version);
        if kind != "DELETED" {
            state.nodes.insert(name.to_owned(), object.clone());
        }
        state.events.push(json!({"type": kind, "object": object}).to_string());
        self.state.1.notify_all();
    }

    fn serve(&self, mut stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        loop {
            let mut request = String::new();
            reader.read_line(&mut request).ok().filter(|length| *length > 0)?;
            let mut length = 0;
            loop {
                let mut header = String::new();
                reader.read_line(&mut header).ok()?;
                if header.trim().is_empty() {
                    break;
                }
                if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length:") {
                    length = value.trim().parse().unwrap();
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).ok()?;
            let mut words = request.split(' ');
            let (method, path) = (words.next().unwrap(), words.next().unwrap());
            if path.contains("watch=true") {
                return self.watch(&mut stream, path);
            }
            let answer = self.answer(method, path, &body);
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{answer}",
                answer.len()
            );
            stream.write_all(head.as_bytes()).ok()?;
        }
    }

    fn answer(&self, method: &str, path: &str, body: &[u8]) -> String {
        if method == "GET" {
            let state = self.state.0.lock().unwrap();
            let items: Vec<&Value> = state.nodes.values().collect();
            return json!({"metadata": {"resourceVersion": state.events.len().to_string()}, "items": items})
                .to_string();
        }
        assert_eq!(method, "PATCH");
        let name = path.strip_prefix("/api/v1/nodes/").and_then(|rest| rest.strip_suffix("/status")).unwrap();
        let patch: Value = serde_json::from_slice(body).unwrap();
        self.state.0.lock().unwrap().patches += 1;
        self.change(name, |known| {
            let mut node = known.unwrap().clone();
            for (key, value) in patch["metadata"]["annotations"].as_object().into_iter().flatten() {
                node["metadata"]["annotations"][key] = value.clone();
            }
            if let Some(conditions) = patch["status"].get("conditions") {
                node["status"]["conditions"] = conditions.clone();
            }
            Some(node)
        });
        self.node(name).to_string()
    }

    fn watch(&self, stream: &mut TcpStream, path: &str) -> Option<()> {
        let version = path.split("resourceVersion=").nth(1).unwrap().split('&').next().unwrap();
        let mut next: usize = version.parse().unwrap();
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n")
            .ok()?;
        loop {
            let mut state = self.state.0.lock().unwrap();
            while state.events.len() <= next {
                state = self.state.1.wait_timeout(state, Duration::from_secs(60)).unwrap().0;
            }
            let events: Vec<String> = state.events[next..].to_vec();
            next = state.events.len();
            drop(state);
            for event in events {
                stream.write_all(format!("{event}\n").as_bytes()).ok()?;
            }
        }
    }
}
