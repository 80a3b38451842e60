//! `orlop exec`: runs a command in a container, as its terminal if asked to, and ends as the command ends.
//!
//! The CRI answers with the URL of a streaming session. Standard streams are read and written on threads of their own,
//! so that neither a silent keyboard nor a full pipe keeps this program from ending when the command has ended.

use super::NodeSocket;
use super::terminal::{self, RawTerminal};
use anyhow::{Context, Result, bail};
use orlop_cri::streaming::client;
use orlop_cri::streaming::spdy::{Connection, Stream};
use orlop_proto::cri::{Container, ExecRequest};
use serde::Deserialize;
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

/// The version of the protocol that tells the end as a Status object.
const PROTOCOL: &str = "v4.channel.k8s.io";
/// Bytes that travel at once between a standard stream and the session.
const CHUNK: usize = 16 << 10;
/// A Status object is far smaller.
const MAX_STATUS: u64 = 64 << 10;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    pub(crate) stdin: bool,
    pub(crate) tty: bool,
}

/// Runs `command` and returns its exit code, or 128 and the signal that ended us.
pub(crate) async fn exec(
    mut node: NodeSocket,
    container: Container,
    command: Vec<String>,
    options: Options,
) -> Result<ExitCode> {
    let request = ExecRequest {
        container_id: container.id.clone(),
        cmd: command,
        tty: options.tty,
        stdin: options.stdin,
        stdout: true,
        // A terminal has one output.
        stderr: !options.tty,
    };
    let reply =
        node.runtime.exec(request).await.with_context(|| format!("exec in container {}", container.id))?;
    let url = reply.into_inner().url;
    let mut signals = Signals::watch()?;
    let streams = Streams::open(&url, options).await?;
    // Without our input nobody would read the keys of a raw terminal, not even the one that interrupts.
    let raw = if options.stdin && options.tty { RawTerminal::enter(io::stdin())? } else { None };
    let code = tokio::select! {
        ended = streams.carry(LocalEnds::standard(options)?) => ended?,
        signal = signals.next() => 128 + signal,
    };
    drop(raw);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}

/// The signals that end a program. Taken instead of dying, to leave the terminal as it was.
struct Signals {
    watched: [(i32, Signal); 4],
}

impl Signals {
    fn watch() -> Result<Self> {
        let watch = |kind: SignalKind| {
            signal(kind).map(|signal| (kind.as_raw_value(), signal)).context("watch for signals")
        };
        let watched = [
            watch(SignalKind::hangup())?,
            watch(SignalKind::interrupt())?,
            watch(SignalKind::quit())?,
            watch(SignalKind::terminate())?,
        ];
        Ok(Self { watched })
    }

    /// The number of the first to come.
    async fn next(&mut self) -> i32 {
        let [hangup, interrupt, quit, terminate] = &mut self.watched;
        tokio::select! {
            _ = hangup.1.recv() => hangup.0,
            _ = interrupt.1.recv() => interrupt.0,
            _ = quit.1.recv() => quit.0,
            _ = terminate.1.recv() => terminate.0,
        }
    }
}

/// This side of the session.
struct LocalEnds {
    stdin: Option<mpsc::Receiver<Vec<u8>>>,
    stdout: Output,
    stderr: Output,
    sizes: Option<mpsc::Receiver<(u16, u16)>>,
}

impl LocalEnds {
    /// The streams of this process, read and written without buffers in between.
    fn standard(options: Options) -> Result<Self> {
        let unbuffered = |stream: &dyn AsFd| {
            stream.as_fd().try_clone_to_owned().map(File::from).context("open a standard stream")
        };
        Ok(Self {
            stdin: if options.stdin { Some(read_on_thread(unbuffered(&io::stdin())?)?) } else { None },
            stdout: Output::on_thread(unbuffered(&io::stdout())?)?,
            stderr: Output::on_thread(unbuffered(&io::stderr())?)?,
            sizes: if options.tty { Some(terminal::sizes()?) } else { None },
        })
    }
}

/// Pieces of `input` as they come; closed at its end. The thread stays in its last read when nobody listens any more.
fn read_on_thread(mut input: impl Read + Send + 'static) -> Result<mpsc::Receiver<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel(1);
    let read = move || {
        let mut buffer = vec![0; CHUNK];
        loop {
            let count = match input.read(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // A terminal that hung up cannot be read any more: for the command, that is the end of its input.
                Ok(0) | Err(_) => return,
                Ok(count) => count,
            };
            if sender.blocking_send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("input".to_owned())
        .spawn(read)
        .context("start the thread that reads the input")?;
    Ok(receiver)
}

/// A stream of ours that is written on its own thread.
struct Output {
    pieces: mpsc::Sender<Vec<u8>>,
    written: oneshot::Receiver<io::Result<()>>,
}

impl Output {
    fn on_thread(mut output: impl Write + Send + 'static) -> Result<Self> {
        let (pieces, mut received) = mpsc::channel::<Vec<u8>>(2);
        let (tell, written) = oneshot::channel();
        let write = move || {
            let mut result = Ok(());
            while let Some(piece) = received.blocking_recv() {
                result = output.write_all(&piece).and_then(|()| output.flush());
                if result.is_err() {
                    break;
                }
            }
            // Nobody waits when a signal ended the session.
            let _ended = tell.send(result);
        };
        std::thread::Builder::new()
            .name("output".to_owned())
            .spawn(write)
            .context("start the thread that writes the output")?;
        Ok(Self { pieces, written })
    }

    /// Writes all that comes from `stream`, until its end.
    async fn write_from(self, mut stream: Stream) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        loop {
            let count = stream.read(&mut buffer).await.context("read the command's output")?;
            if count == 0 || self.pieces.send(buffer[..count].to_vec()).await.is_err() {
                break;
            }
        }
        drop(self.pieces);
        self.written
            .await
            .context("the thread that writes the output is gone")?
            .context("write the command's output")
    }
}

/// The session's streams. Dropping them hangs up, upon which the runtime ends the command.
struct Streams {
    _connection: Connection,
    error: Stream,
    stdin: Option<Stream>,
    stdout: Stream,
    stderr: Option<Stream>,
    resize: Option<Stream>,
}

impl Streams {
    async fn open(url: &str, options: Options) -> Result<Self> {
        let connection = client::connect(url, PROTOCOL)
            .await
            .with_context(|| format!("reach the streaming server at {url}"))?;
        let open = async |kind: &str| {
            let headers = vec![("streamtype".to_owned(), kind.to_owned())];
            connection
                .open(headers)
                .await
                .with_context(|| format!("open the stream {kind}: the server hung up"))
        };
        // The server waits until every stream that the request implies is there.
        Ok(Self {
            error: open("error").await?,
            stdin: if options.stdin { Some(open("stdin").await?) } else { None },
            stdout: open("stdout").await?,
            stderr: if options.tty { None } else { Some(open("stderr").await?) },
            resize: if options.tty { Some(open("resize").await?) } else { None },
            _connection: connection,
        })
    }

    /// Carries bytes until the command has ended and all its output is written. Returns its exit code.
    async fn carry(self, local: LocalEnds) -> Result<i32> {
        let errors = async {
            match self.stderr {
                Some(stream) => local.stderr.write_from(stream).await,
                None => Ok(()),
            }
        };
        let mut status = Vec::new();
        let mut bounded = self.error.take(MAX_STATUS);
        let told = async { bounded.read_to_end(&mut status).await.context("read how the command ended") };
        let ended = async { tokio::try_join!(local.stdout.write_from(self.stdout), errors, told) };
        tokio::select! {
            ended = ended => ended.map(drop)?,
            never = feed(self.stdin, local.stdin) => match never {},
            never = report(self.resize, local.sizes) => match never {},
        }
        exit_code(&status)
    }
}

/// Passes input on. Its end is passed on too, but it is not the end of the command.
async fn feed(stream: Option<Stream>, pieces: Option<mpsc::Receiver<Vec<u8>>>) -> Infallible {
    if let (Some(mut stream), Some(mut pieces)) = (stream, pieces) {
        while let Some(piece) = pieces.recv().await {
            if stream.write_all(&piece).await.is_err() {
                break;
            }
        }
        // The command may have closed its input, or ended.
        let _gone = stream.shutdown().await;
    }
    std::future::pending().await
}

/// Tells the command's terminal the size of ours.
async fn report(stream: Option<Stream>, sizes: Option<mpsc::Receiver<(u16, u16)>>) -> Infallible {
    if let (Some(mut stream), Some(mut sizes)) = (stream, sizes) {
        while let Some((columns, rows)) = sizes.recv().await {
            let size = format!("{{\"Width\":{columns},\"Height\":{rows}}}\n");
            if stream.write_all(size.as_bytes()).await.is_err() {
                break;
            }
        }
        // Closed with the session: the command's terminal keeps its last size.
        return std::future::pending().await;
    }
    std::future::pending().await
}

/// What the error stream carries at the end: a Kubernetes Status, of which these fields matter here.
#[derive(Debug, Deserialize)]
struct Status {
    status: String,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    details: Option<Details>,
}

#[derive(Debug, Deserialize)]
struct Details {
    #[serde(default)]
    causes: Vec<Cause>,
}

#[derive(Debug, Deserialize)]
struct Cause {
    reason: String,
    message: String,
}

/// The exit code that a Status tells; an error when the command could not be run, or nobody knows how it ended.
fn exit_code(status: &[u8]) -> Result<i32> {
    if status.is_empty() {
        bail!("the connection broke before the command ended");
    }
    let status: Status = serde_json::from_slice(status).with_context(|| {
        format!("understand how the command ended: {}", String::from_utf8_lossy(status).trim())
    })?;
    if status.status == "Success" {
        return Ok(0);
    }
    let causes = status.details.map(|details| details.causes).unwrap_or_default();
    let code = causes.iter().find(|cause| status.reason == "NonZeroExitCode" && cause.reason == "ExitCode");
    match code {
        Some(cause) => {
            cause.message.parse().with_context(|| format!("understand the exit code {:?}", cause.message))
        }
        None => bail!("the command did not run to its end: {}", status.message),
    }
}

#[cfg(test)]
mod tests;
