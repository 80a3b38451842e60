//! The loop: nodes from the API server and changes in the kernel in, reconciliation out.
//!
//! ```text
//! node events ──┐
//! netlink ──────┼──> dirty ──(settles)──> plan, observe, diff, apply ──> annotations, subnet.env, condition, lease
//! audit, retry ─┘
//! ```
//!
//! Every round starts from all nodes and from what the kernel holds, so it does not matter what woke it, or what a
//! former round left undone.

use crate::config::Config;
use crate::executor::{Executor, ExecutorError};
use crate::masquerade;
use crate::node::{Node, NotAPeer, derived_mac};
use crate::plan::{Op, Own, Peer, diff, plan};
use crate::subnet_env::{self, SubnetEnvError};
use ipnet::Ipv4Net;
use orlop_api::client::Patch;
use orlop_api::watch::{WatchEvent, WatchRequest, watch};
use orlop_api::{ApiError, Client};
use orlop_net::nft::{NftError, NftSocket};
use orlop_net::rtnl::{Monitor, RtnlError};
use serde::de::IgnoredAny;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    #[error("node {0} is not registered (yet)")]
    NoNode(String),
    #[error("node {0} has no IPv4 pod CIDR (does the controller manager allocate them?)")]
    NoPodCidr(String),
    #[error("pod CIDR {subnet} of this node lies outside of the overlay's network {network}")]
    OutsideNetwork { subnet: Ipv4Net, network: Ipv4Net },
    #[error("{failed} of {total} changes failed, the first: {first}")]
    Incomplete { failed: usize, total: usize, first: String },
    #[error(transparent)]
    Executor(#[from] ExecutorError),
    #[error(transparent)]
    Nft(#[from] NftError),
    #[error(transparent)]
    Monitor(#[from] RtnlError),
    #[error(transparent)]
    SubnetEnv(#[from] SubnetEnvError),
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// This node's part of the network, once the overlay stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    pub network: Ipv4Net,
    pub subnet: Ipv4Net,
    pub public_ip: Ipv4Addr,
    pub mtu: u32,
}

/// Bursts of events become one round.
const SETTLE: Duration = Duration::from_millis(50);
/// The safety net under the events.
const AUDIT: Duration = Duration::from_secs(300);
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_LAST: Duration = Duration::from_secs(30);

/// A node's membership in the overlay.
#[derive(Debug)]
pub struct Overlay {
    config: Config,
    lease: tokio::sync::watch::Sender<Option<Lease>>,
}

impl Overlay {
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self { config, lease: tokio::sync::watch::Sender::new(None) }
    }

    /// Tells when this node's pod CIDR is known and the overlay stands, and whenever that changes.
    #[must_use]
    pub fn lease(&self) -> tokio::sync::watch::Receiver<Option<Lease>> {
        self.lease.subscribe()
    }

    /// Until `shutdown` completes. Everything stays in place then: pods go on talking while we are away.
    ///
    /// # Errors
    /// [`OverlayError`] when it cannot even begin; later failures are logged and tried again.
    pub async fn run(
        self,
        client: Client,
        node_name: String,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), OverlayError> {
        let mut member = Member {
            executor: Executor::new(&self.config.net_conf)?,
            nft: NftSocket::open()?,
            nodes: BTreeMap::new(),
            complaints: BTreeMap::new(),
            client,
            node_name,
            config: self.config,
            lease: self.lease,
        };
        let request = WatchRequest { path: "/api/v1/nodes".to_owned(), ..WatchRequest::default() };
        let mut events = watch::<Node>(&member.client, request);
        let mut monitor = Monitor::open()?;
        let mut retry = RETRY_FIRST;
        let mut next = Instant::now() + AUDIT;
        let mut listed = false;
        tokio::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => return Ok(()),
                event = events.recv() => match event {
                    Some(event) => {
                        listed |= matches!(event, WatchEvent::Listed(_));
                        if member.take(event) {
                            next = next.min(Instant::now() + SETTLE);
                        }
                    }
                    None => return Ok(()),
                },
                change = monitor.next() => {
                    if change.is_none() {
                        monitor = Monitor::open()?;
                    }
                    next = next.min(Instant::now() + SETTLE);
                }
                () = sleep_until(next) => {
                    // Before the first list is complete every peer would look as if it had left.
                    let outcome = if listed { member.reconcile().await } else { Ok(()) };
                    next = Instant::now() + match outcome {
                        Ok(()) => {
                            retry = RETRY_FIRST;
                            AUDIT
                        }
                        Err(error) => {
                            tracing::warn!(%error, retry_in = ?retry, "overlay is not as it should be");
                            let wait = retry;
                            retry = (retry * 2).min(RETRY_LAST);
                            wait
                        }
                    };
                }
            }
        }
    }
}

#[derive(Debug)]
struct Member {
    config: Config,
    client: Client,
    node_name: String,
    lease: tokio::sync::watch::Sender<Option<Lease>>,
    executor: Executor,
    nft: NftSocket,
    nodes: BTreeMap<String, Seen>,
    /// What was wrong with a node when it was last said.
    complaints: BTreeMap<String, NotAPeer>,
}

/// Of other nodes only what makes them peers is kept.
#[derive(Debug)]
enum Seen {
    Own(Box<Node>),
    Other(Option<Peer>),
}

impl Member {
    /// Whether the event changes anything for us: most are heartbeats.
    fn take(&mut self, event: WatchEvent<Node>) -> bool {
        match event {
            WatchEvent::Listed(nodes) => {
                self.nodes.clear();
                for node in nodes {
                    self.learn(node);
                }
                true
            }
            WatchEvent::Applied(node) => self.learn(node),
            WatchEvent::Deleted(node) => {
                self.complaints.remove(&node.metadata.name);
                self.nodes.remove(&node.metadata.name).is_some()
            }
        }
    }

    fn learn(&mut self, node: Node) -> bool {
        let name = node.metadata.name.clone();
        if name == self.node_name {
            let relevant = |node: &Node| {
                (node.pod_cidr(), node.metadata.annotations.clone(), node.network_is_available())
            };
            let changed = match self.nodes.get(&name) {
                Some(Seen::Own(known)) => relevant(known) != relevant(&node),
                _ => true,
            };
            self.nodes.insert(name, Seen::Own(Box::new(node)));
            return changed;
        }
        let peer = match node.peer(self.config.net_conf.vni) {
            Ok(peer) => {
                self.complaints.remove(&name);
                peer
            }
            Err(reason) => {
                if self.complaints.get(&name) != Some(&reason) {
                    tracing::warn!(node = name, %reason, "node is in the overlay but cannot be a peer");
                    self.complaints.insert(name.clone(), reason);
                }
                None
            }
        };
        !matches!(self.nodes.insert(name, Seen::Other(peer)), Some(Seen::Other(known)) if known == peer)
    }

    async fn reconcile(&mut self) -> Result<(), OverlayError> {
        let own = self.own().await?;
        let conf = &self.config.net_conf;
        let peers: BTreeSet<Peer> = self
            .nodes
            .values()
            .filter_map(|seen| if let Seen::Other(peer) = seen { *peer } else { None })
            .collect();
        let desired = plan(conf, &own, &peers);
        let observed = self.executor.observe(&own.underlay).await?;
        let ops = diff(&desired, &observed);
        let mut failures = Vec::new();
        let mut device_failed = false;
        for op in &ops {
            // One peer that cannot be reached must not keep the others waiting.
            if let Err(error) = self.executor.apply(op, &own.underlay).await {
                device_failed |= matches!(op, Op::CreateDevice(_) | Op::SetMac(_) | Op::AddAddress(_));
                failures.push(format!("{op:?}: {error}"));
            }
        }
        if !ops.is_empty() {
            tracing::info!(
                changes = ops.len(),
                failed = failures.len(),
                peers = peers.len(),
                "overlay reconciled"
            );
        }
        if device_failed {
            return Err(incomplete(&failures, ops.len()));
        }
        self.edge(own.subnet)?;
        let lease = Lease {
            network: self.config.net_conf.network,
            subnet: own.subnet,
            public_ip: own.public_ip,
            mtu: desired.device.mtu,
        };
        let text = subnet_env::render(lease.network, lease.subnet, lease.mtu, self.config.ip_masq);
        subnet_env::write(&self.config.subnet_file, &text)?;
        self.lease.send_if_modified(|known| known.replace(lease) != Some(lease));
        self.publish(&own).await?;
        if failures.is_empty() { Ok(()) } else { Err(incomplete(&failures, ops.len())) }
    }

    async fn own(&self) -> Result<Own, OverlayError> {
        let Some(Seen::Own(node)) = self.nodes.get(&self.node_name) else {
            return Err(OverlayError::NoNode(self.node_name.clone()));
        };
        let subnet = node.pod_cidr().ok_or_else(|| OverlayError::NoPodCidr(self.node_name.clone()))?;
        let network = self.config.net_conf.network;
        if !network.contains(&subnet) {
            return Err(OverlayError::OutsideNetwork { subnet, network });
        }
        let underlay = self.executor.underlay(&self.config).await?;
        let configured = match self.config.public_ip {
            Some(IpAddr::V4(ip)) => Some(ip),
            _ => None,
        };
        let public_ip = node.public_ip_overwrite().or(configured).unwrap_or(underlay.local);
        // A device that peers already know by its address keeps it, whoever made it.
        let present = self.executor.present_mac().await?;
        let mac = present
            .filter(|mac| node.published_mac() == Some(*mac))
            .unwrap_or_else(|| derived_mac(&node.metadata.uid));
        Ok(Own { subnet, public_ip, mac, underlay })
    }

    fn edge(&mut self, subnet: Ipv4Net) -> Result<(), NftError> {
        let known = self.lease.borrow().map(|lease| lease.subnet);
        let stands = known == Some(subnet) && masquerade::is_present(&mut self.nft)?;
        match (self.config.ip_masq, stands) {
            (true, false) => masquerade::apply(&mut self.nft, self.config.net_conf.network, subnet),
            (false, _) if known.is_none() => masquerade::remove(&mut self.nft),
            _ => Ok(()),
        }
    }

    /// Tells the others where we are, and the scheduler that pods can come. Nothing is written that is so already.
    async fn publish(&self, own: &Own) -> Result<(), OverlayError> {
        let Some(Seen::Own(node)) = self.nodes.get(&self.node_name) else { return Ok(()) };
        let annotations = node.annotation_changes(self.config.net_conf.vni, own.mac, own.public_ip);
        let mut body = json!({});
        if !annotations.is_empty() {
            body["metadata"] = json!({"annotations": annotations});
        }
        if !node.network_is_available() {
            let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
            body["status"] = json!({"conditions": [{
                "type": "NetworkUnavailable",
                "status": "False",
                "reason": "FlannelIsUp",
                "message": "the overlay of this node is up",
                "lastHeartbeatTime": now,
                "lastTransitionTime": now,
            }]});
        }
        if body.as_object().is_some_and(|body| !body.is_empty()) {
            let path = format!("/api/v1/nodes/{}/status", self.node_name);
            self.client.patch::<_, IgnoredAny>(&path, Patch::Strategic, &body).await?;
        }
        Ok(())
    }
}

fn incomplete(failures: &[String], total: usize) -> OverlayError {
    OverlayError::Incomplete {
        failed: failures.len(),
        total,
        first: failures.first().cloned().unwrap_or_default(),
    }
}
