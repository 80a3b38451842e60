//! Forgets UDP flows to endpoints that no longer serve.
//!
//! A UDP client that keeps its port would be sent to the old endpoint for as long as it talks. Only flows to frontends
//! that have just changed are looked at, and those whose endpoint still answers are left alone.

use crate::model::{Frontend, Route};
use crate::objects::Protocol;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Status, Tuple,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr as NetlinkAddress};
use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

#[derive(Debug, thiserror::Error)]
pub enum ConntrackError {
    #[error("cannot open a netlink socket for connection tracking")]
    Open(#[source] io::Error),
    #[error("cannot {what} through connection tracking's netlink socket")]
    Exchange { what: &'static str, source: io::Error },
    #[error("the kernel refused to list tracked connections")]
    List(#[source] io::Error),
}

/// Which flows to look at, and where each may lead.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct StaleFlows {
    addresses: HashMap<SocketAddr, Option<Arc<Route>>>,
    /// By family (is IPv4) and port.
    node_ports: HashMap<(bool, u16), Option<Arc<Route>>>,
    node_ips: HashSet<IpAddr>,
}

impl StaleFlows {
    #[must_use]
    pub fn new(node_ips: impl IntoIterator<Item = IpAddr>) -> Self {
        Self { node_ips: node_ips.into_iter().collect(), ..Self::default() }
    }

    /// A frontend that changed; `None`: it is no more. Those of other protocols than UDP are of no interest.
    pub fn add(&mut self, frontend: &Frontend, route: Option<Arc<Route>>) {
        match frontend {
            Frontend::Address { ip, protocol: Protocol::Udp, port } => {
                self.addresses.insert(SocketAddr::new(*ip, *port), route);
            }
            Frontend::NodePort { ipv4, protocol: Protocol::Udp, port } => {
                self.node_ports.insert((*ipv4, *port), route);
            }
            _ => {}
        }
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty() && self.node_ports.is_empty()
    }

    /// `to` is what the client addressed, `answering` who answers it.
    fn is_stale(&self, to: SocketAddr, answering: SocketAddr, translated: bool) -> bool {
        let route = self.addresses.get(&to).or_else(|| {
            let ours = translated || self.node_ips.contains(&to.ip());
            self.node_ports.get(&(to.is_ipv4(), to.port())).filter(|_| ours)
        });
        match route {
            None => false,
            // Without a service the address may be anybody's: only what we translated is wrong now.
            Some(None) => translated,
            Some(Some(route)) => route.serving.binary_search(&answering).is_err(),
        }
    }
}

/// A tracked flow, and what the kernel needs to find it again.
struct Flow {
    to: SocketAddr,
    answering: SocketAddr,
    translated: bool,
    identity: Vec<ConntrackAttribute>,
}

const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const UDP: u8 = 17;

impl Flow {
    fn decode(attributes: Vec<ConntrackAttribute>) -> Option<Self> {
        let (mut to, mut answering, mut translated) = (None, None, false);
        let mut identity = Vec::new();
        for attribute in attributes {
            match attribute {
                ConntrackAttribute::CtaTupleOrig(tuple) => {
                    to = udp_ends(&tuple).map(|(_, destination)| destination);
                    identity.push(ConntrackAttribute::CtaTupleOrig(tuple));
                }
                ConntrackAttribute::CtaTupleReply(tuple) => {
                    answering = udp_ends(&tuple).map(|(source, _)| source);
                }
                ConntrackAttribute::CtaStatus(status) => translated = status.contains(Status::DstNat),
                ConntrackAttribute::Other(nla) => {
                    use netlink_packet_core::Nla;
                    // With its number no later flow of the same ends can be meant.
                    if matches!(nla.kind(), CTA_ID | CTA_ZONE) {
                        identity.push(ConntrackAttribute::Other(nla));
                    }
                }
                _ => {}
            }
        }
        Some(Self { to: to?, answering: answering?, translated, identity })
    }
}

/// Source and destination of a tuple, if it is of UDP.
fn udp_ends(tuple: &[Tuple]) -> Option<(SocketAddr, SocketAddr)> {
    let (mut source, mut destination) = (None, None);
    let (mut source_port, mut destination_port) = (None, None);
    for part in tuple {
        match part {
            Tuple::Ip(list) => {
                for ip in list {
                    match ip {
                        IPTuple::SourceAddress(ip) => source = Some(*ip),
                        IPTuple::DestinationAddress(ip) => destination = Some(*ip),
                        _ => {}
                    }
                }
            }
            Tuple::Proto(list) => {
                for part in list {
                    match part {
                        ProtoTuple::Protocol(protocol) if u8::from(*protocol) != UDP => return None,
                        ProtoTuple::SourcePort(port) => source_port = Some(*port),
                        ProtoTuple::DestinationPort(port) => destination_port = Some(*port),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some((SocketAddr::new(source?, source_port?), SocketAddr::new(destination?, destination_port?)))
}

/// A connection to connection tracking, in the network namespace in which it was opened.
#[derive(Debug)]
pub struct Conntrack {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Conntrack {
    /// # Errors
    /// [`ConntrackError::Open`]
    pub fn open() -> Result<Self, ConntrackError> {
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(ConntrackError::Open)?;
        socket.bind_auto().map_err(ConntrackError::Open)?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; 64 * 1024] })
    }

    /// Deletes the flows that lead to endpoints which no longer serve; how many there were.
    ///
    /// # Errors
    /// [`ConntrackError`]
    pub fn forget(&mut self, stale: &StaleFlows) -> Result<usize, ConntrackError> {
        if stale.is_empty() {
            return Ok(0);
        }
        let flows = self.list(stale)?;
        let mut deleted = 0;
        for flow in flows {
            deleted += usize::from(self.delete(flow)?);
        }
        Ok(deleted)
    }

    fn send(&mut self, message: ConntrackMessage, flags: u16, ipv4: bool) -> Result<(), ConntrackError> {
        let family = if ipv4 { NetfilterProtoFamily::IPv4 } else { NetfilterProtoFamily::IPv6 };
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let body = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message);
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(body));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket
            .send_to(&bytes, &NetlinkAddress::new(0, 0), 0)
            .map(drop)
            .map_err(|source| ConntrackError::Exchange { what: "send", source })
    }

    fn receive(&mut self) -> Result<usize, ConntrackError> {
        loop {
            match self.socket.recv(&mut &mut self.buffer[..], 0) {
                Ok(length) => return Ok(length),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(ConntrackError::Exchange { what: "receive", source }),
            }
        }
    }

    /// The stale ones; what cannot be understood is not ours.
    fn list(&mut self, stale: &StaleFlows) -> Result<Vec<Vec<ConntrackAttribute>>, ConntrackError> {
        let mut found = Vec::new();
        for ipv4 in [true, false] {
            let concerned = stale.addresses.keys().any(|to| to.is_ipv4() == ipv4)
                || stale.node_ports.keys().any(|(family, _)| *family == ipv4);
            if concerned {
                self.send(ConntrackMessage::Get(Vec::new()), NLM_F_DUMP, ipv4)?;
                self.receive_list(stale, &mut found)?;
            }
        }
        Ok(found)
    }

    fn receive_list(
        &mut self,
        stale: &StaleFlows,
        found: &mut Vec<Vec<ConntrackAttribute>>,
    ) -> Result<(), ConntrackError> {
        loop {
            let length = self.receive()?;
            for message in messages(&self.buffer[..length]) {
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) => return Err(ConntrackError::List(error.to_io())),
                    NetlinkPayload::InnerMessage(NetfilterMessage {
                        inner: NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)),
                        ..
                    }) => {
                        let flow = Flow::decode(attributes);
                        found.extend(
                            flow.filter(|flow| stale.is_stale(flow.to, flow.answering, flow.translated))
                                .map(|flow| flow.identity),
                        );
                    }
                    _ => {}
                }
            }
        }
    }

    /// Whether it was still there.
    fn delete(&mut self, identity: Vec<ConntrackAttribute>) -> Result<bool, ConntrackError> {
        let ipv4 = identity.iter().any(|attribute| {
            matches!(attribute, ConntrackAttribute::CtaTupleOrig(tuple)
                if udp_ends(tuple).is_some_and(|(_, to)| to.is_ipv4()))
        });
        self.send(ConntrackMessage::Delete(identity), NLM_F_ACK, ipv4)?;
        let length = self.receive()?;
        for message in messages(&self.buffer[..length]) {
            if let NetlinkPayload::Error(error) = message.payload {
                return Ok(error.code.is_none());
            }
        }
        Ok(false)
    }
}

/// The messages of a datagram.
fn messages(mut bytes: &[u8]) -> Vec<NetlinkMessage<NetfilterMessage>> {
    let mut out = Vec::new();
    while let Ok(buffer) = NetlinkBuffer::new_checked(bytes) {
        let Ok(length) = usize::try_from(buffer.length()) else { break };
        out.extend(NetlinkMessage::deserialize(bytes));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Class, Refusal};

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn route(serving: &[&str]) -> Option<Arc<Route>> {
        Some(Arc::new(Route {
            class: Class::Internal,
            backends: Arc::default(),
            inside: Arc::default(),
            refusal: Refusal::Reject,
            affinity: None,
            serving: serving.iter().map(|text| address(text)).collect(),
            here: Arc::default(),
            sources: Arc::default(),
        }))
    }

    #[test]
    fn flows_to_endpoints_that_serve_stay_and_others_go() {
        let mut stale = StaleFlows::new(["192.0.2.1".parse().unwrap()]);
        let dns = Frontend::Address { ip: "10.96.0.10".parse().unwrap(), protocol: Protocol::Udp, port: 53 };
        stale.add(&dns, route(&["10.1.0.1:53", "10.1.0.2:53"]));
        let node = Frontend::NodePort { ipv4: true, protocol: Protocol::Udp, port: 30_053 };
        stale.add(&node, route(&[]));
        let service = address("10.96.0.10:53");
        assert!(!stale.is_stale(service, address("10.1.0.2:53"), true));
        assert!(stale.is_stale(service, address("10.1.0.3:53"), true));
        // Begun before there was a service: answered, if at all, by whom it was sent to.
        assert!(stale.is_stale(service, service, false));
        assert!(!stale.is_stale(address("10.96.0.11:53"), address("10.1.0.3:53"), true));
        assert!(stale.is_stale(address("192.0.2.1:30053"), address("192.0.2.1:30053"), false));
        assert!(!stale.is_stale(address("198.51.100.1:30053"), address("198.51.100.1:30053"), false));
    }

    #[test]
    fn of_a_removed_service_only_translated_flows_go() {
        let mut stale = StaleFlows::default();
        let gone = Frontend::Address { ip: "10.96.0.10".parse().unwrap(), protocol: Protocol::Udp, port: 53 };
        stale.add(&gone, None);
        assert!(stale.is_stale(address("10.96.0.10:53"), address("10.1.0.1:53"), true));
        assert!(!stale.is_stale(address("10.96.0.10:53"), address("10.96.0.10:53"), false));
    }

    #[test]
    fn tcp_is_never_looked_at() {
        let mut stale = StaleFlows::default();
        let tcp = Frontend::Address { ip: "10.96.0.10".parse().unwrap(), protocol: Protocol::Tcp, port: 53 };
        stale.add(&tcp, None);
        assert!(stale.is_empty());
    }
}
