//! The agent's side of the keeper's socket.

mod connection;
mod register;

use crate::protocol::{
    Answer, Call, ContainerView, CreateContainer, Event, ExecCall, ExecProcess, Exit, Failure,
};
use connection::{Command, Connection, Delivery, Reply};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use tokio::sync::{broadcast, mpsc, oneshot};

/// Events a subscriber may lag behind before it is told that it missed some (and lists instead).
const EVENT_BACKLOG: usize = 4096;

/// Why the keeper did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum KeeperError {
    #[error("cannot reach the keeper at {path}: {reason}; is orlop-keeper.service running?")]
    Unreachable { path: String, reason: String },
    #[error("container {0} does not exist")]
    NoSuchContainer(String),
    #[error("{0}")]
    Refused(String),
}

/// A connection to the keeper that is made again when it breaks. Clones share it; the last one closes it.
///
/// A request made while the keeper is away waits for a few seconds. One that was under way when the connection broke is
/// sent again, except where doing it twice would differ from once: [`Keeper::create`] and [`Keeper::exec`] then fail
/// with [`KeeperError::Unreachable`], and it is unknown whether they were done.
#[derive(Debug, Clone)]
pub struct Keeper {
    socket: PathBuf,
    commands: mpsc::UnboundedSender<Command>,
    events: broadcast::Sender<Event>,
}

/// The streams of a process started by [`Keeper::exec`].
#[derive(Debug)]
pub struct ExecStreams {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
}

/// What a started exec hands back.
#[derive(Debug)]
pub struct ExecStarted {
    pub pid: u32,
    /// The terminal's master, when one was asked for.
    pub console: Option<OwnedFd>,
}

/// A container's live streams. Output also goes on to the log.
#[derive(Debug)]
pub struct Attached {
    /// Write end of the container's standard input (or the terminal's master), if it has one.
    pub stdin: Option<OwnedFd>,
    /// A copy of standard output from now on.
    pub stdout: OwnedFd,
    /// A copy of standard error; absent with a terminal.
    pub stderr: Option<OwnedFd>,
    /// The terminal's master, for resizing.
    pub console: Option<OwnedFd>,
}

impl Keeper {
    pub async fn connect(socket: &Path) -> Result<Self, KeeperError> {
        let (commands, requests) = mpsc::unbounded_channel();
        let (events, _) = broadcast::channel(EVENT_BACKLOG);
        let connection = Connection::open(socket, requests, events.clone()).await?;
        tokio::spawn(connection.run());
        Ok(Self { socket: socket.to_owned(), commands, events })
    }

    /// Returns when init has set everything up and waits for [`Keeper::start`].
    pub async fn create(&self, request: CreateContainer) -> Result<ContainerView, KeeperError> {
        self.view(Call::Create(request), Delivery::Once).await
    }

    /// Succeeds on a running container.
    pub async fn start(&self, id: &str) -> Result<ContainerView, KeeperError> {
        self.view(Call::Start { id: id.to_owned() }, Delivery::Repeat).await
    }

    /// Signals init, or with `all` every process of the container. Succeeds on an exited container.
    pub async fn kill(&self, id: &str, signal: i32, all: bool) -> Result<(), KeeperError> {
        self.done(Call::Kill { id: id.to_owned(), signal, all }).await
    }

    /// Kills what still runs, removes the cgroup and forgets the container. Succeeds when it does not exist.
    pub async fn delete(&self, id: &str) -> Result<(), KeeperError> {
        self.done(Call::Delete { id: id.to_owned() }).await
    }

    pub async fn list(&self) -> Result<Vec<ContainerView>, KeeperError> {
        match self.call(Call::List, Vec::new(), Delivery::Repeat).await? {
            (Answer::Containers(views), _) => Ok(views),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Returns when the program runs. `streams` that are absent become the null device; with a terminal none are used.
    pub async fn exec(&self, request: ExecProcess, streams: ExecStreams) -> Result<ExecStarted, KeeperError> {
        let call = Call::Exec(ExecCall {
            process: request,
            stdin: streams.stdin.is_some(),
            stdout: streams.stdout.is_some(),
            stderr: streams.stderr.is_some(),
        });
        let passed = [streams.stdin, streams.stdout, streams.stderr].into_iter().flatten().collect();
        match self.call(call, passed, Delivery::Once).await? {
            (Answer::Exec { pid, console }, descriptors) => {
                Ok(ExecStarted { pid, console: descriptors.into_iter().next().filter(|_| console) })
            }
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Waits for the end of a process started by [`Keeper::exec`], and acknowledges it.
    pub async fn wait_exec(&self, container: &str, exec_id: &str) -> Result<Exit, KeeperError> {
        let call = Call::WaitExec { container: container.to_owned(), exec_id: exec_id.to_owned() };
        let exit = match self.call(call, Vec::new(), Delivery::Repeat).await? {
            (Answer::Exit(exit), _) => exit,
            (other, _) => return Err(unexpected(&other)),
        };
        let call = Call::AcknowledgeExec { container: container.to_owned(), exec_id: exec_id.to_owned() };
        // The exit is known; a keeper that cannot be told forgets the exec with its container.
        let _ = self.done(call).await;
        Ok(exit)
    }

    /// Signals every process the exec started.
    pub async fn kill_exec(&self, container: &str, exec_id: &str, signal: i32) -> Result<(), KeeperError> {
        self.done(Call::KillExec { container: container.to_owned(), exec_id: exec_id.to_owned(), signal })
            .await
    }

    /// The copies of the output are non-blocking pipes. A client that does not read them is dropped once a pipe is
    /// full: it sees the end of the stream, and neither the container nor its log waits for it.
    pub async fn attach(&self, id: &str) -> Result<Attached, KeeperError> {
        let call = Call::Attach { id: id.to_owned() };
        let (answer, descriptors) = self.call(call, Vec::new(), Delivery::Once).await?;
        let Answer::Attached { stdin, stderr, console } = answer else {
            return Err(unexpected(&answer));
        };
        let mut rest = descriptors.into_iter();
        let missing = || KeeperError::Refused("the keeper's answer lacks a descriptor".to_owned());
        let stdout = rest.next().ok_or_else(missing)?;
        let mut take = |present: bool| if present { rest.next() } else { None };
        Ok(Attached { stdout, stderr: take(stderr), stdin: take(stdin), console: take(console) })
    }

    /// Opens the log file anew after somebody else has renamed it.
    pub async fn reopen_log(&self, id: &str) -> Result<(), KeeperError> {
        self.done(Call::ReopenLog { id: id.to_owned() }).await
    }

    /// The agent has the exit on its own disk: the keeper need not repeat it.
    pub async fn acknowledge(&self, id: &str) -> Result<(), KeeperError> {
        self.done(Call::Acknowledge { id: id.to_owned() }).await
    }

    /// Replaces the keeper's program by the file at `binary`, or by what lies at its own path now. Containers, logs and
    /// this connection go on.
    pub async fn reexec(&self, binary: Option<&Path>) -> Result<(), KeeperError> {
        self.done(Call::Reexec { binary: binary.map(Path::to_owned) }).await
    }

    /// Exits as they happen, after those that nobody has acknowledged yet. After a reconnect, unacknowledged ones come
    /// again. A receiver that lags too far behind is told so and should [`Keeper::list`].
    pub fn events(&self) -> broadcast::Receiver<Event> {
        let receiver = self.events.subscribe();
        // Fails only when the connection's task has gone, which every other call reports.
        let _ = self.commands.send(Command::Subscribe);
        receiver
    }

    async fn view(&self, call: Call, delivery: Delivery) -> Result<ContainerView, KeeperError> {
        match self.call(call, Vec::new(), delivery).await? {
            (Answer::Container(view), _) => Ok(view),
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn done(&self, call: Call) -> Result<(), KeeperError> {
        match self.call(call, Vec::new(), Delivery::Repeat).await? {
            (Answer::Done, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    async fn call(&self, call: Call, descriptors: Vec<OwnedFd>, delivery: Delivery) -> Reply {
        let (answer, answered) = oneshot::channel();
        let gone = || KeeperError::Unreachable {
            path: self.socket.display().to_string(),
            reason: "the connection's task has ended".to_owned(),
        };
        self.commands
            .send(Command::Call { call: Box::new(call), descriptors, delivery, answer })
            .map_err(|_| gone())?;
        answered.await.unwrap_or_else(|_| Err(gone()))
    }
}

impl From<Failure> for KeeperError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::NoSuchContainer(id) => Self::NoSuchContainer(id),
            other => Self::Refused(other.to_string()),
        }
    }
}

fn unexpected(answer: &Answer) -> KeeperError {
    KeeperError::Refused(format!("the keeper gave an answer to another question: {answer:?}"))
}
