//! Exec, attach and port-forward streams: the kubelet asks the CRI for a URL and is then served here.
//!
//! This module is the server; what a stream is connected to is behind [`StreamTarget`], which the CRI service
//! implements. A request is validated by the CRI before it becomes a URL, so the server only has to carry bytes.

pub mod client;
mod forward;
mod server;
mod session;
pub mod spdy;
mod tokens;

pub use server::StreamServer;

pub(crate) mod target;

use orlop_proto::cri::{AttachRequest, ExecRequest};
use std::fmt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tonic::async_trait;

/// Both directions of a forwarded connection.
pub trait AsyncReadWrite: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> AsyncReadWrite for T {}

/// The client's end of an exec or attach session. Dropping a writer closes that stream.
#[derive(Default)]
pub struct StreamIo {
    pub stdin: Option<Box<dyn AsyncRead + Send + Unpin>>,
    pub stdout: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// Absent with a terminal: everything is standard output then.
    pub stderr: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// Terminal sizes as the client reports them: columns, rows.
    pub resize: Option<mpsc::Receiver<(u16, u16)>>,
}

impl fmt::Debug for StreamIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamIo")
            .field("stdin", &self.stdin.is_some())
            .field("stdout", &self.stdout.is_some())
            .field("stderr", &self.stderr.is_some())
            .field("resize", &self.resize.is_some())
            .finish()
    }
}

/// Why a stream could not be opened or was broken off. The text reaches the person at `kubectl`.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("{what} {id} does not exist")]
    NotFound { what: &'static str, id: String },
    #[error("cannot {operation}: {reason}")]
    Failed { operation: String, reason: String },
    /// Mapped to the code ResourceExhausted.
    #[error("too many streams wait for their client; try again in a moment")]
    TooManyPending,
    #[error("the runtime is shutting down")]
    ShuttingDown,
}

/// What the streaming server runs against.
#[async_trait]
pub trait StreamTarget: Send + Sync + 'static {
    /// Runs a command until it ends and returns its exit code (128 plus the signal for one that was killed).
    /// Dropping the future kills the command.
    async fn exec(&self, request: ExecRequest, io: StreamIo) -> Result<i32, StreamError>;
    /// Joins a running container's streams until it exits or the client goes.
    async fn attach(&self, request: AttachRequest, io: StreamIo) -> Result<(), StreamError>;
    /// Carries bytes between the client and a port on the loopback of the sandbox's network.
    async fn port_forward(
        &self,
        sandbox_id: &str,
        port: u16,
        stream: Box<dyn AsyncReadWrite>,
    ) -> Result<(), StreamError>;
}
