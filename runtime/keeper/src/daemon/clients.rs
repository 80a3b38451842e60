//! Connections of agents. A client that does not read is cut off; nothing waits for it.

use super::poller::{READ, Target, Watched};
use super::{Daemon, socket};
use crate::protocol::{Answer, Event, Failure, FromKeeper, Request};
use crate::wire::{Packet, WireError, receive};
use rustix::event::epoll::EventFlags;
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};

/// What may wait for one client: some thousand events.
const MAX_QUEUED_BYTES: usize = 8 << 20;
/// Requests taken from one client per wake-up.
const REQUESTS_PER_TURN: usize = 16;
const MAX_CLIENTS: usize = 64;

#[derive(Debug)]
pub(super) struct Client {
    pub(super) socket: Watched,
    pub(super) subscribed: bool,
    queue: VecDeque<Packet>,
    queued_bytes: usize,
    /// The socket was full and nothing says yet that it takes more.
    full: bool,
    /// The poll set waits for that.
    awaits_room: bool,
}

impl Client {
    pub(super) fn new(socket: Watched, subscribed: bool) -> Self {
        Self { socket, subscribed, queue: VecDeque::new(), queued_bytes: 0, full: false, awaits_room: false }
    }

    /// Sends as much as the socket takes.
    fn drain(&mut self) -> Result<(), WireError> {
        while let Some(packet) = self.queue.front() {
            match packet.send(self.socket.as_fd()) {
                Ok(()) => {}
                Err(WireError::WouldBlock) => {
                    self.full = true;
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
            self.queued_bytes = self.queued_bytes.saturating_sub(packet.weight());
            self.queue.pop_front();
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
pub(super) struct Clients {
    pub(super) connected: BTreeMap<u64, Client>,
    pub(super) next_id: u64,
}

/// Whom an answer goes to; a client that has gone in the meantime is no error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct ReplyTo {
    pub(super) client: u64,
    pub(super) request: u64,
}

pub(super) type Outcome = Result<(Answer, Vec<OwnedFd>), Failure>;

impl Clients {
    /// Nothing waits to be sent.
    pub(super) fn idle(&self) -> bool {
        self.connected.values().all(|client| client.queue.is_empty())
    }

    fn queue(&mut self, client: u64, message: &FromKeeper, descriptors: Vec<OwnedFd>) {
        let Some(client) = self.connected.get_mut(&client) else { return };
        let packet = match Packet::encode(message, descriptors) {
            Ok(packet) => packet,
            Err(error) => {
                tracing::error!(%error, "cannot encode a message");
                return;
            }
        };
        client.queued_bytes += packet.weight();
        client.queue.push_back(packet);
    }
}

impl Daemon {
    pub(super) fn accept_client(&mut self) {
        let socket = match socket::accept(self.listener.as_fd()) {
            Ok(Some(socket)) => socket,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a client");
                return;
            }
        };
        if self.clients.connected.len() >= MAX_CLIENTS {
            tracing::warn!("refused a client: {MAX_CLIENTS} are connected");
            return;
        }
        self.clients.next_id += 1;
        let id = self.clients.next_id;
        match self.poller.watch(socket, READ, Target::Client(id)) {
            Ok(socket) => {
                self.clients.connected.insert(id, Client::new(socket, false));
            }
            Err(error) => tracing::warn!(%error, "cannot watch a client"),
        }
    }

    pub(super) fn serve_client(&mut self, id: u64) {
        for _ in 0..REQUESTS_PER_TURN {
            let Some(client) = self.clients.connected.get_mut(&id) else { return };
            client.full = false;
            // A re-exec waits for what is under way; what comes later waits in the socket for the new program.
            if self.reexec.is_some() {
                return;
            }
            let received = match receive(client.socket.as_fd()) {
                Ok(received) => received,
                Err(WireError::WouldBlock) => return,
                Err(error) => {
                    if !matches!(error, WireError::Closed) {
                        tracing::warn!(%error, client = id, "dropped a client");
                    }
                    self.drop_client(id);
                    return;
                }
            };
            match received.decode::<Request>() {
                Ok(request) => {
                    let to = ReplyTo { client: id, request: request.id };
                    self.handle(to, request.call, received.descriptors);
                }
                Err(error) => {
                    let to = ReplyTo { client: id, request: received.id_at_least() };
                    self.reply(to, Err(Failure::Malformed(error.to_string())));
                }
            }
        }
    }

    pub(super) fn reply(&mut self, to: ReplyTo, outcome: Outcome) {
        let (result, descriptors) = match outcome {
            Ok((answer, descriptors)) => (Ok(answer), descriptors),
            Err(failure) => (Err(failure), Vec::new()),
        };
        self.clients.queue(to.client, &FromKeeper::Reply { id: to.request, result }, descriptors);
    }

    pub(super) fn announce(&mut self, event: &Event) {
        let subscribed: Vec<u64> =
            self.clients.connected.iter().filter(|(_, c)| c.subscribed).map(|(id, _)| *id).collect();
        for client in subscribed {
            self.announce_to(client, event);
        }
    }

    pub(super) fn announce_to(&mut self, client: u64, event: &Event) {
        self.clients.queue(client, &FromKeeper::Event(event.clone()), Vec::new());
    }

    /// Sends what the sockets take, once per turn of the loop.
    pub(super) fn flush_clients(&mut self) {
        let mut dead = Vec::new();
        for (id, client) in &mut self.clients.connected {
            if client.full && client.queued_bytes > MAX_QUEUED_BYTES {
                tracing::warn!(client = id, "dropped a client that does not read");
                dead.push(*id);
            }
            if client.full || client.queue.is_empty() {
                continue;
            }
            if client.drain().is_err() {
                dead.push(*id);
            } else if client.full != client.awaits_room {
                client.awaits_room = client.full;
                let flags = if client.full { READ | EventFlags::OUT } else { READ };
                if self.poller.change(&client.socket, flags).is_err() {
                    dead.push(*id);
                }
            }
        }
        for id in dead {
            self.drop_client(id);
        }
    }

    fn drop_client(&mut self, id: u64) {
        if let Some(client) = self.clients.connected.remove(&id) {
            drop(self.poller.release(client.socket));
        }
    }
}
