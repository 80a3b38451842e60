//! Two complete members of one cluster: nodes come and go at the API server, and the kernel follows.

#![allow(clippy::unwrap_used)]

mod support;

use orlop_api::Client;
use orlop_net::netns::Netns;
use orlop_net::rtnl::{Far, Mac, Near, Rtnl};
use orlop_overlay::{Config, Lease, NetConf, Overlay};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};
use support::FakeApi;
use tokio::sync::oneshot;

fn sh(namespace: &Netns, command: &str) -> String {
    namespace
        .run(|| {
            let out = Command::new("sh").args(["-c", command]).output().unwrap();
            String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
        })
        .unwrap()
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "it never came true that {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A member that runs until it is dropped.
struct Running {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
    leases: mpsc::Receiver<Lease>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
        let outcome = self.thread.take().unwrap().join();
        assert!(std::thread::panicking() || outcome.is_ok(), "the member panicked");
    }
}

fn start(namespace: &Netns, api: &FakeApi, name: &str, dir: &Path) -> Running {
    let (stop, stopped) = oneshot::channel::<()>();
    let (tell, leases) = mpsc::channel();
    let path = format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(namespace))
    );
    let namespace = Netns::open(Path::new(&path)).unwrap();
    let (api, name, dir) = (api.clone(), name.to_owned(), dir.to_owned());
    let work = move || {
        let port = api.listen();
        let kubeconfig = dir.join(format!("{name}.kubeconfig"));
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: \"http://127.0.0.1:{port}\"}}}}]\nusers: [{{name: u, user: {{}}}}]\n"
        );
        std::fs::write(&kubeconfig, text).unwrap();
        let conf = NetConf::parse(r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}"#).unwrap();
        let mut config = Config::new(conf);
        config.subnet_file = dir.join(format!("{name}.env"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let overlay = Overlay::new(config);
            let mut lease = overlay.lease();
            tokio::spawn(async move {
                while lease.changed().await.is_ok() {
                    let known = *lease.borrow_and_update();
                    let _ = known.map(|known| tell.send(known));
                }
            });
            let client = Client::from_kubeconfig(&kubeconfig).unwrap();
            let shutdown = async { drop(stopped.await) };
            // As a task, which it must be able to be; it stays on this thread, and so in this namespace.
            tokio::spawn(overlay.run(client, name, shutdown)).await.unwrap().unwrap();
        });
    };
    let thread = std::thread::spawn(move || namespace.run(work).unwrap());
    Running { stop: Some(stop), thread: Some(thread), leases }
}

/// Nodes a and b at 192.0.2.1 and .2, connected by a bridge in a third namespace.
fn link_up() -> [Netns; 3] {
    let [between, a, b] = [(); 3].map(|()| Netns::create().expect("these tests need root"));
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    between
        .run(|| {
            runtime().block_on(async {
                let rtnl = Rtnl::open().unwrap();
                rtnl.add_bridge("lan", Mac([2, 0, 0, 0, 1, 0]), None).await.unwrap();
                let lan = rtnl.link_by_name("lan").await.unwrap().unwrap().index;
                for (name, namespace) in [("a", &a), ("b", &b)] {
                    let near = Near { name, mtu: 1500, bridge: Some(lan) };
                    let far = Far { name: "uplink", namespace, mac: None };
                    rtnl.add_veth(&near, &far).await.unwrap();
                }
            });
        })
        .unwrap();
    for (number, namespace) in [(1, &a), (2, &b)] {
        let said = sh(
            namespace,
            &format!(
                "ip link set lo up; ip link set uplink up; ip addr add 192.0.2.{number}/24 dev uplink; \
                 ip route add default via 192.0.2.254"
            ),
        );
        assert_eq!(said, "");
    }
    [between, a, b]
}

#[test]
fn members_find_each_other_repair_damage_and_follow_changes() {
    let [_between, a, b] = link_up();
    let dir = tempfile::tempdir().unwrap();
    let api = FakeApi::default();
    api.put("a", "10.244.1.0/24");
    api.put("b", "");
    let on_a = start(&a, &api, "a", dir.path());
    let lease = on_a.leases.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!((lease.subnet, lease.mtu), ("10.244.1.0/24".parse().unwrap(), 1450));
    eventually("a says so", || api.node("a")["status"]["conditions"][0]["reason"] == "FlannelIsUp");
    let annotations = &api.node("a")["metadata"]["annotations"];
    assert_eq!(annotations["flannel.alpha.coreos.com/public-ip"], "192.0.2.1");
    let env = std::fs::read_to_string(dir.path().join("a.env")).unwrap();
    assert!(env.contains("FLANNEL_SUBNET=10.244.1.1/24"), "{env}");

    // The second member waits for its pod CIDR.
    let on_b = start(&b, &api, "b", dir.path());
    assert!(on_b.leases.recv_timeout(Duration::from_millis(300)).is_err());
    api.put("b", "10.244.2.0/24");
    on_b.leases.recv_timeout(Duration::from_secs(10)).unwrap();
    let knows = |route: &str| sh(&a, "ip route").contains(route);
    eventually("a knows b", || knows("10.244.2.0/24 via 10.244.2.0 dev flannel.1"));
    let first_mac = sh(&a, "ip -o link show flannel.1");

    for damage in [
        "ip link del flannel.1",
        "ip route del 10.244.2.0/24",
        "ip link set flannel.1 down",
        "nft flush ruleset; ip neigh flush dev flannel.1 nud permanent",
    ] {
        assert_eq!(sh(&a, damage), "");
        eventually(&format!("{damage} is repaired"), || {
            knows("10.244.2.0/24 via 10.244.2.0 dev flannel.1")
                && sh(&a, "ip neigh show dev flannel.1 nud permanent").contains("10.244.2.0")
                && sh(&a, "nft list ruleset").contains("orlop-overlay")
        });
    }
    let ether = |text: &str| text.split("link/ether ").nth(1).map(|rest| rest[..17].to_owned());
    assert_eq!(ether(&sh(&a, "ip -o link show flannel.1")), ether(&first_mac));

    // Rest is rest: nothing is written that is so already.
    std::thread::sleep(Duration::from_millis(300));
    let patches = api.patches();
    api.put("c", "10.244.3.0/24");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(api.patches(), patches);

    api.delete("b");
    eventually("b is forgotten", || !knows("10.244.2.0/24"));
    assert!(!sh(&a, "bridge fdb show dev flannel.1").contains("192.0.2.2"));
    // After the end of a member its network goes on.
    drop(on_a);
    assert!(sh(&a, "ip link show flannel.1").contains("UP"));
    assert!(sh(&a, "nft list ruleset").contains("orlop-overlay"));
}
