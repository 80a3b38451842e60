//! The task behind a [`super::Keeper`]: owns the socket, matches answers to requests, connects again.

use super::KeeperError;
use super::register::register;
use crate::protocol::{Answer, Call, Event, FromKeeper, Request};
use crate::wire::{Packet, WireError, receive};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout_at};

/// How long a request waits for a keeper that is away (a restart takes far less).
const PATIENCE: Duration = Duration::from_secs(5);
const FIRST_RETRY: Duration = Duration::from_millis(10);
const LAST_RETRY: Duration = Duration::from_millis(250);
/// Its answer interests nobody.
const SUBSCRIPTION: u64 = 0;

pub(super) type Reply = Result<(Answer, Vec<OwnedFd>), KeeperError>;

/// Whether a request may be sent again when the connection broke before the answer came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Delivery {
    Once,
    Repeat,
}

#[derive(Debug)]
pub(super) enum Command {
    Call { call: Box<Call>, descriptors: Vec<OwnedFd>, delivery: Delivery, answer: oneshot::Sender<Reply> },
    Subscribe,
}

#[derive(Debug)]
struct Pending {
    /// Dropped once sent when it is not to be repeated, so that passed descriptors do not linger here.
    packet: Option<Packet>,
    delivery: Delivery,
    answer: oneshot::Sender<Reply>,
    /// When the request was made, or the connection it went out on was lost.
    waiting_since: Instant,
}

#[derive(Debug)]
pub(super) struct Connection {
    path: PathBuf,
    socket: Option<AsyncFd<OwnedFd>>,
    requests: mpsc::UnboundedReceiver<Command>,
    events: broadcast::Sender<Event>,
    subscribed: bool,
    next_id: u64,
    pending: BTreeMap<u64, Pending>,
    unsent: VecDeque<u64>,
}

enum Turn {
    Command(Option<Command>),
    Readable,
    Writable,
}

impl Connection {
    pub(super) async fn open(
        path: &Path,
        requests: mpsc::UnboundedReceiver<Command>,
        events: broadcast::Sender<Event>,
    ) -> Result<Self, KeeperError> {
        let mut connection = Self {
            path: path.to_owned(),
            socket: None,
            requests,
            events,
            subscribed: false,
            next_id: SUBSCRIPTION + 1,
            pending: BTreeMap::new(),
            unsent: VecDeque::new(),
        };
        let deadline = Instant::now() + PATIENCE;
        let mut pause = FIRST_RETRY;
        loop {
            match dial(path) {
                Ok(socket) => connection.socket = Some(socket),
                Err(reason) if Instant::now() >= deadline => return Err(connection.unreachable(&reason)),
                Err(_) => {
                    sleep(pause).await;
                    pause = (pause * 2).min(LAST_RETRY);
                    continue;
                }
            }
            return Ok(connection);
        }
    }

    /// Ends when every [`super::Keeper`] is gone.
    pub(super) async fn run(mut self) {
        loop {
            if self.socket.is_none() && !self.reconnect().await {
                return;
            }
            match self.turn().await {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    tracing::warn!(%error, socket = %self.path.display(), "lost the keeper, connecting again");
                    self.lose();
                }
            }
        }
    }

    async fn turn(&mut self) -> Result<bool, WireError> {
        let Some(socket) = &self.socket else { return Ok(true) };
        let turn = tokio::select! {
            command = self.requests.recv() => Turn::Command(command),
            ready = socket.readable() => { keep_ready(ready)?; Turn::Readable }
            ready = socket.writable(), if !self.unsent.is_empty() => { keep_ready(ready)?; Turn::Writable }
        };
        match turn {
            Turn::Command(None) => return Ok(false),
            Turn::Command(Some(command)) => {
                self.accept(command);
                self.flush()?;
            }
            Turn::Readable => self.read()?,
            Turn::Writable => self.flush()?,
        }
        Ok(true)
    }

    fn accept(&mut self, command: Command) {
        match command {
            Command::Subscribe => {
                self.subscribed = true;
                self.queue_subscription();
            }
            Command::Call { call, descriptors, delivery, answer } => {
                let id = self.next_id;
                self.next_id += 1;
                match Packet::encode(&Request { id, call: *call }, descriptors) {
                    Ok(packet) => {
                        let waiting_since = Instant::now();
                        self.pending
                            .insert(id, Pending { packet: Some(packet), delivery, answer, waiting_since });
                        self.unsent.push_back(id);
                    }
                    Err(error) => {
                        let _ = answer.send(Err(KeeperError::Refused(error.to_string())));
                    }
                }
            }
        }
    }

    fn queue_subscription(&mut self) {
        if !self.unsent.contains(&SUBSCRIPTION) {
            self.unsent.push_front(SUBSCRIPTION);
        }
    }

    /// Sends what the socket takes.
    fn flush(&mut self) -> Result<(), WireError> {
        let Some(socket) = &self.socket else { return Ok(()) };
        while let Some(&id) = self.unsent.front() {
            let outcome = if id == SUBSCRIPTION {
                let request = Request { id, call: Call::Subscribe };
                let packet = Packet::encode(&request, Vec::new())?;
                attempt(socket, Interest::WRITABLE, |fd| packet.send(fd))
            } else {
                match self.pending.get(&id).and_then(|pending| pending.packet.as_ref()) {
                    Some(packet) => attempt(socket, Interest::WRITABLE, |fd| packet.send(fd)),
                    None => Ok(()),
                }
            };
            match outcome {
                Ok(()) => {}
                Err(WireError::WouldBlock) => return Ok(()),
                Err(WireError::Closed) => return Err(WireError::Closed),
                Err(error) => {
                    if let Some(pending) = self.pending.remove(&id) {
                        let _ = pending.answer.send(Err(KeeperError::Refused(error.to_string())));
                    }
                }
            }
            self.unsent.pop_front();
            if let Some(pending) = self.pending.get_mut(&id)
                && pending.delivery == Delivery::Once
            {
                pending.packet = None;
            }
        }
        Ok(())
    }

    fn read(&mut self) -> Result<(), WireError> {
        let Some(socket) = &self.socket else { return Ok(()) };
        loop {
            let received = match attempt(socket, Interest::READABLE, receive) {
                Ok(received) => received,
                Err(WireError::WouldBlock) => return Ok(()),
                Err(error) => return Err(error),
            };
            match received.decode()? {
                FromKeeper::Event(event) => {
                    // Nobody listening is fine: an exit comes again until it is acknowledged.
                    let _ = self.events.send(event);
                }
                FromKeeper::Reply { id, result } => {
                    if let Some(pending) = self.pending.remove(&id) {
                        let reply = result.map(|answer| (answer, received.descriptors)).map_err(Into::into);
                        let _ = pending.answer.send(reply);
                    }
                }
            }
        }
    }

    /// Sorts what was under way when the connection broke.
    fn lose(&mut self) {
        self.socket = None;
        self.unsent.clear();
        let unknown =
            self.unreachable("the connection broke before the answer; it is unknown whether it was done");
        let now = Instant::now();
        for (id, mut pending) in std::mem::take(&mut self.pending) {
            if pending.packet.is_none() {
                let _ = pending.answer.send(Err(unknown.clone()));
                continue;
            }
            pending.waiting_since = now;
            self.pending.insert(id, pending);
            self.unsent.push_back(id);
        }
    }

    /// Returns false when every [`super::Keeper`] is gone.
    async fn reconnect(&mut self) -> bool {
        let mut pause = FIRST_RETRY;
        loop {
            let reason = match dial(&self.path) {
                Ok(socket) => {
                    self.socket = Some(socket);
                    break;
                }
                Err(reason) => reason,
            };
            let next = Instant::now() + pause;
            while let Ok(command) = timeout_at(next, self.requests.recv()).await {
                let Some(command) = command else { return false };
                self.accept(command);
            }
            self.give_up(&reason);
            pause = (pause * 2).min(LAST_RETRY);
        }
        if self.subscribed {
            self.queue_subscription();
        }
        true
    }

    /// Answers the requests that have waited long enough.
    fn give_up(&mut self, reason: &str) {
        let failure = self.unreachable(reason);
        let now = Instant::now();
        for (id, pending) in std::mem::take(&mut self.pending) {
            if now.duration_since(pending.waiting_since) < PATIENCE {
                self.pending.insert(id, pending);
            } else {
                let _ = pending.answer.send(Err(failure.clone()));
            }
        }
        let pending = &self.pending;
        self.unsent.retain(|id| *id == SUBSCRIPTION || pending.contains_key(id));
    }

    fn unreachable(&self, reason: &str) -> KeeperError {
        KeeperError::Unreachable { path: self.path.display().to_string(), reason: reason.to_owned() }
    }
}

/// `turn` only learns which side is ready; [`attempt`] clears the readiness when the socket refuses.
fn keep_ready(ready: std::io::Result<AsyncFdReadyGuard<'_, OwnedFd>>) -> Result<(), WireError> {
    match ready {
        Ok(mut guard) => {
            guard.retain_ready();
            Ok(())
        }
        Err(_) => Err(WireError::Closed),
    }
}

fn attempt<T>(
    socket: &AsyncFd<OwnedFd>,
    interest: Interest,
    operation: impl FnOnce(BorrowedFd<'_>) -> Result<T, WireError>,
) -> Result<T, WireError> {
    let tried = socket.try_io(interest, |fd| match operation(fd.as_fd()) {
        Err(WireError::WouldBlock) => Err(std::io::ErrorKind::WouldBlock.into()),
        other => Ok(other),
    });
    tried.unwrap_or(Err(WireError::WouldBlock))
}

fn dial(path: &Path) -> Result<AsyncFd<OwnedFd>, String> {
    let open = || -> Result<OwnedFd, rustix::io::Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(socket)
    };
    let socket = open().map_err(|e| e.to_string())?;
    register(socket).map_err(|e| e.to_string())
}
