//! A node, its pods and a machine outside, each a network namespace that ends with the test.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

use ipnet::IpNet;
use orlop_net::netns::Netns;
use orlop_net::rtnl::{Far, Mac, Near, Route, Rtnl};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// Where a program can open the namespace.
pub fn path_of(namespace: &Netns) -> PathBuf {
    PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), namespace.as_fd().as_raw_fd()))
}

pub fn block_on<F: Future>(namespace: &Netns, work: impl FnOnce() -> F + Send) -> F::Output
where
    F::Output: Send,
{
    namespace
        .run(|| tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work()))
        .unwrap()
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// A node at 192.0.2.1, and beside it a machine at 192.0.2.2 that has no route to pods.
pub fn node_and_outside() -> (Netns, Netns) {
    let node = Netns::create().expect("these tests need root");
    let outside = Netns::create().unwrap();
    block_on(&node, || async {
        let rtnl = Rtnl::open().unwrap();
        up(&rtnl, "lo").await;
        let near = Near { name: "uplink", mtu: 1500, bridge: None };
        let far = Far { name: "uplink", namespace: &outside, mac: Some(Mac([2, 0, 0, 0, 0, 2])) };
        rtnl.add_veth(&near, &far).await.unwrap();
        let link = up(&rtnl, "uplink").await;
        rtnl.add_address(link, net("192.0.2.1/24")).await.unwrap();
        let inside = Rtnl::open_in(&outside).unwrap();
        up(&inside, "lo").await;
        let link = up(&inside, "uplink").await;
        inside.add_address(link, net("192.0.2.2/24")).await.unwrap();
        rtnl.replace_route(&Route::default_via(
            ip("192.0.2.2"),
            rtnl.link_by_name("uplink").await.unwrap().unwrap().index,
        ))
        .await
        .unwrap();
    });
    (node, outside)
}

async fn up(rtnl: &Rtnl, name: &str) -> u32 {
    let link = rtnl.link_by_name(name).await.unwrap().unwrap();
    rtnl.set_up(link.index).await.unwrap();
    link.index
}

/// Answers connections in a namespace with the address they came from.
pub struct Server {
    pub port: u16,
}

impl Server {
    pub fn start(namespace: &Netns, listen: &str) -> Self {
        let listener = namespace.run(|| TcpListener::bind(listen).unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        // Ends with the test process; it holds nothing but the socket.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let peer = stream.peer_addr().unwrap().ip().to_string();
                let _ = stream.write_all(peer.as_bytes());
            }
        });
        Self { port }
    }
}

/// The address under which the server saw us.
pub fn connect(namespace: &Netns, to: impl Into<IpAddr>, port: u16) -> std::io::Result<String> {
    let to = SocketAddr::new(to.into(), port);
    namespace
        .run(|| {
            let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })
        .unwrap()
}

pub fn output(namespace: &Netns, program: &str, arguments: &[&str]) -> String {
    namespace
        .run(|| {
            let out = Command::new(program).args(arguments).output().unwrap();
            String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
        })
        .unwrap()
}
