//! What the streaming server's streams are connected to: processes, containers and ports of this node.

use super::{AsyncReadWrite, StreamError, StreamIo, StreamTarget};
use crate::container::exec::{DRAIN, input_pipe, output_pipe};
use crate::error::CriError;
use crate::runtime::Runtime;
use crate::sandbox::namespaces;
use orlop_keeper::client::ExecStreams;
use orlop_proto::cri::{AttachRequest, ExecRequest};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tonic::async_trait;

const CONNECT_PATIENCE: Duration = Duration::from_secs(10);

/// Holds the service without keeping it alive: the server belongs to the service and not the other way round.
#[derive(Debug)]
pub(crate) struct Target(pub(crate) Weak<Runtime>);

fn failed(operation: &str) -> impl Fn(CriError) -> StreamError + '_ {
    move |error| match error {
        CriError::NotFound { what, id } => StreamError::NotFound { what, id },
        other => StreamError::Failed { operation: operation.to_owned(), reason: other.to_string() },
    }
}

impl Target {
    fn runtime(&self) -> Result<Arc<Runtime>, StreamError> {
        self.0.upgrade().ok_or(StreamError::ShuttingDown)
    }
}

#[async_trait]
impl StreamTarget for Target {
    async fn exec(&self, request: ExecRequest, io: StreamIo) -> Result<i32, StreamError> {
        let runtime = self.runtime()?;
        let run = if request.tty {
            exec_with_terminal(&runtime, &request, io).await
        } else {
            exec_with_pipes(&runtime, &request, io).await
        };
        run.map_err(failed("run the command"))
    }

    async fn attach(&self, request: AttachRequest, io: StreamIo) -> Result<(), StreamError> {
        let runtime = self.runtime()?;
        attach(&runtime, &request, io).await.map_err(failed("attach to the container"))
    }

    async fn port_forward(
        &self,
        sandbox_id: &str,
        port: u16,
        mut stream: Box<dyn AsyncReadWrite>,
    ) -> Result<(), StreamError> {
        let runtime = self.runtime()?;
        let sandbox = runtime
            .store
            .sandbox(sandbox_id)
            .ok_or_else(|| StreamError::NotFound { what: "sandbox", id: sandbox_id.to_owned() })?;
        let refused = |reason: String| StreamError::Failed {
            operation: format!("connect to port {port} of sandbox {sandbox_id}"),
            reason,
        };
        let connected = namespaces::in_netns(sandbox.netns(), move || connect(port)).await;
        let connection =
            connected.map_err(|e| refused(e.to_string()))?.map_err(|e| refused(e.to_string()))?;
        connection.set_nonblocking(true).map_err(|e| refused(e.to_string()))?;
        let mut connection =
            tokio::net::TcpStream::from_std(connection).map_err(|e| refused(e.to_string()))?;
        tokio::io::copy_bidirectional(&mut stream, &mut connection).await.map(|_| ()).map_err(|e| {
            StreamError::Failed {
                operation: format!("carry port {port} of sandbox {sandbox_id}"),
                reason: e.to_string(),
            }
        })
    }
}

fn connect(port: u16) -> io::Result<TcpStream> {
    let v4 = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    let v6 = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), port);
    TcpStream::connect_timeout(&v4, CONNECT_PATIENCE)
        // The error of the first says what is wrong; a pod without IPv6 fails the second in its own way.
        .or_else(|error| TcpStream::connect_timeout(&v6, CONNECT_PATIENCE).map_err(|_| error))
}

async fn exec_with_pipes(
    runtime: &Arc<Runtime>,
    request: &ExecRequest,
    io: StreamIo,
) -> Result<i32, CriError> {
    let container = runtime.running(&request.container_id)?;
    let pipe_error = |e| CriError::io("create a pipe for", "exec", e);
    let mut streams = ExecStreams { stdin: None, stdout: None, stderr: None };
    let mut copies = Vec::new();
    let mut input = None;
    if let Some(mut from) = io.stdin {
        let (theirs, mut ours) = input_pipe().map_err(pipe_error)?;
        streams.stdin = Some(theirs);
        input = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            let _ = tokio::io::copy(&mut from, &mut ours).await;
        })));
    }
    for (wanted, slot) in [(io.stdout, &mut streams.stdout), (io.stderr, &mut streams.stderr)] {
        let Some(mut to) = wanted else { continue };
        let (mut ours, theirs) = output_pipe().map_err(pipe_error)?;
        *slot = Some(theirs);
        copies.push(AbortOnDropHandle::new(tokio::spawn(async move {
            let _ = tokio::io::copy(&mut ours, &mut to).await;
            let _ = to.shutdown().await;
        })));
    }
    let (mut running, _) = runtime.start_exec(&container, &request.cmd, false, streams).await?;
    let exit = running.wait().await?;
    drop(input);
    finish(copies).await;
    Ok(exit.code)
}

/// Lets the output that is already written reach the client.
async fn finish(copies: Vec<AbortOnDropHandle<()>>) {
    let all = async {
        for copy in copies {
            let _ = copy.await;
        }
    };
    let _ = tokio::time::timeout(DRAIN, all).await;
}

async fn exec_with_terminal(
    runtime: &Arc<Runtime>,
    request: &ExecRequest,
    io: StreamIo,
) -> Result<i32, CriError> {
    let container = runtime.running(&request.container_id)?;
    let none = ExecStreams { stdin: None, stdout: None, stderr: None };
    let (mut running, started) = runtime.start_exec(&container, &request.cmd, true, none).await?;
    let console_error = |e| CriError::io("use the terminal of", "exec", e);
    let console = started
        .console
        .ok_or_else(|| console_error(io::Error::other("the keeper handed out no terminal")))?;
    let console = Arc::new(async_fd(console).map_err(console_error)?);
    let mut output = Vec::new();
    if let Some(to) = io.stdout {
        output.push(AbortOnDropHandle::new(tokio::spawn(copy_out(console.clone(), to))));
    }
    let _input = io.stdin.map(|from| AbortOnDropHandle::new(tokio::spawn(copy_in(from, console.clone()))));
    let _resize = io.resize.map(|sizes| AbortOnDropHandle::new(tokio::spawn(resize(sizes, console.clone()))));
    let exit = running.wait().await?;
    finish(output).await;
    Ok(exit.code)
}

async fn attach(runtime: &Arc<Runtime>, request: &AttachRequest, io: StreamIo) -> Result<(), CriError> {
    let container = runtime.running(&request.container_id)?;
    let attached = runtime.keeper.attach(&container.id).await?;
    let stream_error = |e| CriError::io("use the streams of", &container.id, e);
    let stdout = Arc::new(async_fd(attached.stdout).map_err(stream_error)?);
    let mut output = vec![AbortOnDropHandle::new(tokio::spawn(copy_out(stdout, or_sink(io.stdout))))];
    if let Some(stderr) = attached.stderr {
        let stderr = Arc::new(async_fd(stderr).map_err(stream_error)?);
        output.push(AbortOnDropHandle::new(tokio::spawn(copy_out(stderr, or_sink(io.stderr)))));
    }
    let mut tasks = Vec::new();
    if let (Some(from), Some(stdin)) = (io.stdin, attached.stdin) {
        let stdin = Arc::new(async_fd(stdin).map_err(stream_error)?);
        tasks.push(AbortOnDropHandle::new(tokio::spawn(copy_in(from, stdin))));
    }
    if let (Some(sizes), Some(console)) = (io.resize, attached.console) {
        let console = Arc::new(async_fd(console).map_err(stream_error)?);
        tasks.push(AbortOnDropHandle::new(tokio::spawn(resize(sizes, console))));
    }
    // The copies end with the container; a client that goes ends this future.
    for copy in output {
        let _ = copy.await;
    }
    Ok(())
}

/// Output that nobody wants is still read, so that it does not stand in the way of the rest.
fn or_sink(wanted: Option<Box<dyn AsyncWrite + Send + Unpin>>) -> Box<dyn AsyncWrite + Send + Unpin> {
    wanted.unwrap_or_else(|| Box::new(tokio::io::sink()))
}

fn async_fd(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = rustix::fs::fcntl_getfl(&fd)?;
    rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
    // Deprecated for types whose descriptor may change under the registration; an `OwnedFd`'s never does.
    #[allow(deprecated)]
    AsyncFd::new(fd)
}

/// Copies to the client until the other side is gone; a terminal says so with EIO.
async fn copy_out(from: Arc<AsyncFd<OwnedFd>>, mut to: Box<dyn AsyncWrite + Send + Unpin>) {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let Ok(mut ready) = from.readable().await else { return };
        let read = ready.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut buffer[..])?));
        match read {
            Err(_) => {}
            Ok(Ok(0) | Err(_)) => break,
            Ok(Ok(length)) => {
                if to.write_all(&buffer[..length]).await.is_err() {
                    return;
                }
                let _ = to.flush().await;
            }
        }
    }
    let _ = to.shutdown().await;
}

async fn copy_in(mut from: Box<dyn AsyncRead + Send + Unpin>, to: Arc<AsyncFd<OwnedFd>>) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            let Ok(mut ready) = to.writable().await else { return };
            match ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), rest)?)) {
                Err(_) => {}
                Ok(Ok(written)) => rest = &rest[written..],
                Ok(Err(_)) => return,
            }
        }
    }
}

async fn resize(mut sizes: mpsc::Receiver<(u16, u16)>, console: Arc<AsyncFd<OwnedFd>>) {
    while let Some((columns, rows)) = sizes.recv().await {
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        if let Err(error) = rustix::termios::tcsetwinsize(console.get_ref(), size) {
            tracing::debug!(%error, columns, rows, "resizing a terminal");
        }
    }
}
