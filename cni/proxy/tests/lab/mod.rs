//! A node with pods and a client in network namespaces of their own, and an API server of a few lines.
//!
//! ```text
//! client 192.0.2.2 ── 192.0.2.1 node ── pods 10.1.1.2, 10.1.2.2, …
//! ```

use futures_util::StreamExt;
use orlop_api::kubeconfig::ServerConfig;
use orlop_net::netns::Netns;
use orlop_proxy::{Proxy, ProxyConfig};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

pub(crate) const NODE: &str = "192.0.2.1";
pub(crate) const POD_PORT: u16 = 8080;

pub(crate) struct Lab {
    pub(crate) node: Netns,
    pub(crate) client: Netns,
    pub(crate) pods: Vec<Netns>,
    pub(crate) api: Api,
    proxy: Option<RunningProxy>,
}

struct RunningProxy {
    stop: CancellationToken,
    thread: std::thread::JoinHandle<()>,
}

pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let out = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("these tests need the program {program}: {error}"));
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8(out.stdout).unwrap()
}

fn ip(ns: &Netns, commands: &[&str]) {
    ns.run(|| {
        for command in commands {
            run("ip", &command.split_whitespace().collect::<Vec<_>>());
        }
    })
    .unwrap();
}

fn new_namespace() -> Netns {
    let ns = Netns::create().expect("these tests need root");
    ip(&ns, &["link set lo up"]);
    ns
}

/// Joins two namespaces by a pair of devices with these addresses.
fn connect(node: &Netns, name: &str, address: &str, peer: &Netns, peer_address: &str) {
    let path = format!("/proc/{}/fd/{}", std::process::id(), peer.as_fd().as_raw_fd());
    let gateway = address.split('/').next().unwrap();
    ip(
        node,
        &[
            &format!("link add {name} type veth peer name eth0 netns {path}"),
            &format!("addr add {address} dev {name}"),
            &format!("link set {name} up"),
        ],
    );
    ip(
        peer,
        &[
            &format!("addr add {peer_address} dev eth0"),
            "link set eth0 up",
            &format!("route add default via {gateway}"),
        ],
    );
}

impl Lab {
    /// With this many pods, each serving [`POD_PORT`] over TCP and UDP; the proxy is not yet running.
    pub(crate) fn new(pods: usize) -> Self {
        let _ = tracing_subscriber::fmt().with_test_writer().with_max_level(tracing::Level::DEBUG).try_init();
        let node = new_namespace();
        let client = new_namespace();
        node.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap()).unwrap();
        connect(&node, "client", "192.0.2.1/24", &client, "192.0.2.2/24");
        // Where packets to service addresses would go if nothing translated them.
        ip(&node, &["route add default via 192.0.2.2"]);
        let pods: Vec<_> = (1..=pods)
            .map(|i| {
                let pod = new_namespace();
                connect(
                    &node,
                    &format!("pod{i}"),
                    &format!("10.1.{i}.1/24"),
                    &pod,
                    &format!("10.1.{i}.2/24"),
                );
                serve_tcp(&pod, i);
                serve_udp(&pod, i);
                pod
            })
            .collect();
        let api = Api::start(&node);
        Self { node, client, pods, api, proxy: None }
    }

    pub(crate) fn config() -> ProxyConfig {
        ProxyConfig {
            node_name: "us".into(),
            node_ips: vec![NODE.parse().unwrap()],
            cluster_cidr: vec!["10.1.0.0/16".parse().unwrap()],
            ..ProxyConfig::default()
        }
    }

    /// Gives the node fd00:c::1, the client fd00:c::2 and pod i fd00:1:i::2.
    pub(crate) fn add_ipv6(&self) {
        self.node.run(|| std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap()).unwrap();
        let join = |device: &str, net: &str, peer: &Netns| {
            ip(&self.node, &[&format!("addr add {net}::1/64 dev {device} nodad")]);
            let address = format!("addr add {net}::2/64 dev eth0 nodad");
            ip(peer, &[&address, &format!("route add default via {net}::1")]);
        };
        join("client", "fd00:c:0:0", &self.client);
        ip(&self.node, &["route add default via fd00:c::2"]);
        for (i, pod) in (1..).zip(&self.pods) {
            join(&format!("pod{i}"), &format!("fd00:1:{i}:0"), pod);
        }
    }

    pub(crate) fn start(&mut self, config: ProxyConfig) {
        let stop = CancellationToken::new();
        let (told, address, node) = (stop.clone(), self.api.address, self.node.as_fd().try_clone_to_owned());
        let node = Path::new("/proc/self/fd").join(node.as_ref().unwrap().as_raw_fd().to_string());
        let node = Netns::open(&node).unwrap();
        let thread = std::thread::spawn(move || {
            node.run(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let text = format!(
                    "{{clusters: [{{name: a, cluster: {{server: \"http://{address}\"}}}}], \
                     contexts: [{{name: a, context: {{cluster: a}}}}], current-context: a}}"
                );
                let server = ServerConfig::parse(Path::new("kubeconfig"), &text).unwrap();
                let client = runtime.block_on(async { orlop_api::Client::new(server).unwrap() });
                runtime.block_on(Proxy::run(client, config, told)).unwrap();
            })
            .unwrap();
        });
        self.proxy = Some(RunningProxy { stop, thread });
    }

    /// As when the agent is stopped; rules stay.
    pub(crate) fn stop(&mut self) {
        if let Some(proxy) = self.proxy.take() {
            proxy.stop.cancel();
            proxy.thread.join().unwrap();
        }
    }

    pub(crate) fn ruleset(&self) -> String {
        self.node.run(|| run("nft", &["list", "ruleset"])).unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Some(proxy) = self.proxy.take() {
            proxy.stop.cancel();
            let _ = proxy.thread.join();
        }
        self.api.stop.cancel();
    }
}

/// Waits for what a change should bring about.
pub(crate) fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !check() {
        assert!(Instant::now() < deadline, "{what} did not happen within 5 s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Answers with the pod's number and the client's address, then echoes.
fn serve_tcp(pod: &Netns, number: usize) {
    let listener = pod.run(|| TcpListener::bind(("::", POD_PORT)).unwrap()).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let peer = stream.peer_addr()?.ip().to_canonical();
                writeln!(stream, "{number} {peer}")?;
                let mut buffer = [0; 100];
                loop {
                    let length = stream.read(&mut buffer)?;
                    if length == 0 {
                        return Ok::<_, std::io::Error>(());
                    }
                    stream.write_all(&buffer[..length])?;
                }
            });
        }
    });
}

fn serve_udp(pod: &Netns, number: usize) {
    let socket = pod.run(|| UdpSocket::bind(("0.0.0.0", POD_PORT)).unwrap()).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 100];
        while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(format!("{number} {}", peer.ip()).as_bytes(), peer);
        }
    });
}

/// Who answered, and whom they saw.
pub(crate) type Answer = (usize, IpAddr);

fn parse(answer: &str) -> Answer {
    let (number, peer) = answer.trim().split_once(' ').unwrap();
    (number.parse().unwrap(), peer.parse().unwrap())
}

pub(crate) fn open(from: &Netns, to: &str) -> std::io::Result<(TcpStream, Answer)> {
    let to: SocketAddr = to.parse().unwrap();
    from.run(|| {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_millis(700))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let mut line = Vec::new();
        let mut byte = [0];
        while stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
            line.push(byte[0]);
        }
        Ok((stream, parse(&String::from_utf8(line).unwrap())))
    })
    .unwrap()
}

pub(crate) fn tcp(from: &Netns, to: &str) -> std::io::Result<Answer> {
    open(from, to).map(|(_, answer)| answer)
}

pub(crate) fn echoes(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 4];
    stream.write_all(b"ping").is_ok() && stream.read_exact(&mut buffer).is_ok() && &buffer == b"ping"
}

pub(crate) fn udp_socket(from: &Netns) -> UdpSocket {
    let socket = from.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    socket
}

pub(crate) fn udp(socket: &UdpSocket, to: &str) -> std::io::Result<Answer> {
    socket.send_to(b"who", to)?;
    let mut buffer = [0; 100];
    let (length, _) = socket.recv_from(&mut buffer)?;
    Ok(parse(std::str::from_utf8(&buffer[..length]).unwrap()))
}

/// Lists and watches over HTTP, enough for the proxy.
pub(crate) struct Api {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
    stop: CancellationToken,
}

struct State {
    /// By collection and key.
    objects: Mutex<BTreeMap<(String, String), Value>>,
    version: Mutex<u64>,
    events: broadcast::Sender<(String, Value)>,
}

impl Api {
    fn start(node: &Netns) -> Self {
        let listener = node.run(|| TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let events = broadcast::channel(1024).0;
        let state = Arc::new(State { objects: Mutex::default(), version: Mutex::new(1), events });
        let stop = CancellationToken::new();
        let (served, told) = (Arc::clone(&state), stop.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                let app = axum::Router::new().fallback(answer).with_state(served);
                tokio::select! {
                    () = told.cancelled() => {}
                    result = axum::serve(listener, app) => result.unwrap(),
                }
            });
        });
        Self { address, state, stop }
    }

    /// It refuses connections from now on.
    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }

    fn change(&self, collection: &str, mut object: Value, kind: &str) {
        let mut version = self.state.version.lock().unwrap();
        *version += 1;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let key = format!("{}/{}", object["metadata"]["namespace"], object["metadata"]["name"]);
        let mut objects = self.state.objects.lock().unwrap();
        let place = (collection.to_owned(), key);
        if kind == "DELETED" {
            objects.remove(&place);
        } else {
            objects.insert(place, object.clone());
        }
        let event = json!({"type": kind, "object": object});
        let _ = self.state.events.send((collection.to_owned(), event));
    }

    pub(crate) fn service(&self, name: &str, spec: Value) {
        self.change("services", service(name, spec), "MODIFIED");
    }

    /// The proxy's own node.
    pub(crate) fn node(&self, name: &str) {
        self.change("nodes", json!({"metadata": {"name": name}}), "MODIFIED");
    }

    pub(crate) fn delete_service(&self, name: &str) {
        self.change("services", service(name, json!({})), "DELETED");
    }

    pub(crate) fn endpoints(&self, name: &str, endpoints: Value) {
        self.change("endpointslices", slice(name, endpoints), "MODIFIED");
    }

    pub(crate) fn ipv6_endpoints(&self, name: &str, endpoints: Value) {
        let mut slice = slice(name, endpoints);
        slice["metadata"]["name"] = format!("{name}-6").into();
        slice["addressType"] = "IPv6".into();
        self.change("endpointslices", slice, "MODIFIED");
    }
}

pub(crate) fn service(name: &str, spec: Value) -> Value {
    let status =
        spec.get("lb").map_or_else(|| json!({}), |ip| json!({"loadBalancer": {"ingress": [{"ip": ip}]}}));
    json!({"metadata": {"name": name, "namespace": "test"}, "spec": spec, "status": status})
}

fn slice(name: &str, endpoints: Value) -> Value {
    json!({
        "metadata": {
            "name": format!("{name}-1"), "namespace": "test",
            "labels": {"kubernetes.io/service-name": name},
        },
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [
            {"name": "tcp", "protocol": "TCP", "port": POD_PORT},
            {"name": "udp", "protocol": "UDP", "port": POD_PORT},
        ],
    })
}

/// Pods of the lab as ready endpoints on a node.
pub(crate) fn pods(numbers: &[usize], node: &str) -> Value {
    numbers
        .iter()
        .map(|i| json!({"addresses": [format!("10.1.{i}.2")], "nodeName": node, "conditions": {"ready": true}}))
        .collect()
}

/// A service of this address with port 80 for both protocols.
pub(crate) fn spec(cluster_ip: &str) -> Value {
    json!({"clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "ports": [
        {"name": "tcp", "protocol": "TCP", "port": 80},
        {"name": "udp", "protocol": "UDP", "port": 80},
    ]})
}

async fn answer(
    axum::extract::State(state): axum::extract::State<Arc<State>>,
    uri: axum::http::Uri,
) -> axum::response::Response {
    let collection = uri.path().rsplit('/').next().unwrap().to_owned();
    let respond = |body| axum::http::Response::builder().body(body).unwrap();
    if uri.query().unwrap_or_default().contains("watch=true") {
        let after: u64 = uri
            .query()
            .and_then(|query| query.split('&').find_map(|part| part.strip_prefix("resourceVersion=")))
            .and_then(|version| version.parse().ok())
            .unwrap_or(0);
        let events = state.events.subscribe();
        // Changes between the list and the watch.
        let version = |object: &Value| -> u64 {
            object["metadata"]["resourceVersion"].as_str().unwrap_or("0").parse().unwrap_or(0)
        };
        let missed: Vec<_> = state
            .objects
            .lock()
            .unwrap()
            .iter()
            .filter(|((kind, _), object)| *kind == collection && version(object) > after)
            .map(|(_, object)| format!("{}\n", json!({"type": "MODIFIED", "object": object})))
            .collect();
        let live =
            futures_util::stream::unfold((events, collection), |(mut events, collection)| async move {
                loop {
                    let (kind, event) = events.recv().await.ok()?;
                    if kind == collection {
                        return Some((format!("{event}\n"), (events, collection)));
                    }
                }
            });
        let lines = futures_util::stream::iter(missed).chain(live).map(Ok::<_, std::io::Error>);
        return respond(axum::body::Body::from_stream(lines));
    }
    let version = state.version.lock().unwrap().to_string();
    let objects = state.objects.lock().unwrap();
    let items: Vec<_> =
        objects.iter().filter(|((kind, _), _)| *kind == collection).map(|(_, object)| object).collect();
    respond(json!({"metadata": {"resourceVersion": version}, "items": items}).to_string().into())
}
