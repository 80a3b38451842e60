//! Running one more command in a container.

use super::Container;
use crate::error::CriError;
use crate::runtime::Runtime;
use oci_spec::runtime::Process;
use orlop_keeper::client::{ExecStarted, ExecStreams, Keeper};
use orlop_keeper::protocol::{ExecProcess, Exit};
use orlop_proto::cri::{ExecSyncRequest, ExecSyncResponse};
use serde::Deserialize;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

/// What one answer may hold, less room for the rest of the message.
const OUTPUT_LIMIT: usize = (16 << 20) - (64 << 10);
/// How long output is awaited after the command's end: something it left behind may hold the pipe for ever.
pub(crate) const DRAIN: Duration = Duration::from_secs(2);

/// The part of a bundle's configuration that a further process takes over.
#[derive(Deserialize)]
struct ProcessOnly {
    process: Process,
}

/// A command under way. Dropped before its end is known, it is killed.
#[derive(Debug)]
pub(crate) struct RunningExec {
    keeper: Keeper,
    container: String,
    exec_id: String,
    ended: bool,
}

impl RunningExec {
    pub(crate) async fn wait(&mut self) -> Result<Exit, CriError> {
        let exit = self.keeper.wait_exec(&self.container, &self.exec_id).await?;
        self.ended = true;
        Ok(exit)
    }

    pub(crate) async fn kill(&self) -> Result<(), CriError> {
        let signal = nix::sys::signal::Signal::SIGKILL as i32;
        Ok(self.keeper.kill_exec(&self.container, &self.exec_id, signal).await?)
    }
}

impl Drop for RunningExec {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let abandoned = Self {
            keeper: self.keeper.clone(),
            container: std::mem::take(&mut self.container),
            exec_id: std::mem::take(&mut self.exec_id),
            // This one does not try again.
            ended: true,
        };
        let Ok(handle) = tokio::runtime::Handle::try_current() else { return };
        handle.spawn(async move {
            let mut abandoned = abandoned;
            let result = match abandoned.kill().await {
                Ok(()) => abandoned.wait().await.map(|_| ()),
                error => error,
            };
            if let Err(error) = result {
                tracing::debug!(container = %abandoned.container, %error, "clearing up an abandoned exec");
            }
        });
    }
}

/// A pipe: our end, ready for async use, and the end for the process.
pub(crate) fn output_pipe() -> io::Result<(pipe::Receiver, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    Ok((pipe::Receiver::from_owned_fd(read)?, write))
}

pub(crate) fn input_pipe() -> io::Result<(OwnedFd, pipe::Sender)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    Ok((read, pipe::Sender::from_owned_fd(write)?))
}

impl Runtime {
    /// Starts `command` beside the container's own process, with its identity and limits.
    pub(crate) async fn start_exec(
        &self,
        container: &Container,
        command: &[String],
        tty: bool,
        streams: ExecStreams,
    ) -> Result<(RunningExec, ExecStarted), CriError> {
        if command.is_empty() {
            return Err(CriError::Invalid { field: "cmd", reason: "it is empty".into() });
        }
        self.require_running(container, "run a command in")?;
        let path = self.bundle(&container.id).join("config.json");
        let bytes = std::fs::read(&path).map_err(|e| CriError::io("read", &path, e))?;
        let config: ProcessOnly =
            serde_json::from_slice(&bytes).map_err(|e| CriError::io("parse", &path, e.into()))?;
        let mut process = config.process;
        process.set_args(Some(command.to_vec())).set_terminal(Some(tty));
        let running = RunningExec {
            keeper: self.keeper.clone(),
            container: container.id.clone(),
            exec_id: crate::runtime::new_id(),
            ended: false,
        };
        let request = ExecProcess {
            container: container.id.clone(),
            exec_id: running.exec_id.clone(),
            process: Box::new(process),
            tty,
        };
        match self.keeper.exec(request, streams).await {
            Ok(started) => Ok((running, started)),
            Err(error) => {
                let mut running = running;
                running.ended = true;
                Err(error.into())
            }
        }
    }

    pub(crate) fn require_running(
        &self,
        container: &Container,
        operation: &'static str,
    ) -> Result<(), CriError> {
        if container.is_running() {
            return Ok(());
        }
        Err(CriError::WrongState {
            operation,
            what: "container",
            id: container.id.clone(),
            state: container.state_name(),
        })
    }

    pub(crate) async fn exec_sync(
        self: &Arc<Self>,
        container: &Container,
        request: &ExecSyncRequest,
    ) -> Result<ExecSyncResponse, CriError> {
        let pipe_error = |e| CriError::io("create a pipe for", "exec", e);
        let (mut stdout, stdout_end) = output_pipe().map_err(pipe_error)?;
        let (mut stderr, stderr_end) = output_pipe().map_err(pipe_error)?;
        let streams = ExecStreams { stdin: None, stdout: Some(stdout_end), stderr: Some(stderr_end) };
        let (mut running, _) = self.start_exec(container, &request.cmd, false, streams).await?;
        let mut response = ExecSyncResponse::default();
        let timeout = u64::try_from(request.timeout).ok().filter(|t| *t > 0).map(Duration::from_secs);
        let exit = {
            let reading = async {
                tokio::join!(
                    drain(&mut stdout, &mut response.stdout),
                    drain(&mut stderr, &mut response.stderr)
                );
            };
            let command = async {
                tokio::pin!(reading);
                let mut open = true;
                let exit = {
                    let waiting = running.wait();
                    tokio::pin!(waiting);
                    loop {
                        tokio::select! {
                            exit = &mut waiting => break exit?,
                            () = &mut reading, if open => open = false,
                        }
                    }
                };
                if open {
                    let _ = tokio::time::timeout(DRAIN, reading).await;
                }
                Ok::<_, CriError>(exit)
            };
            match timeout {
                None => Some(command.await?),
                Some(limit) => tokio::time::timeout(limit, command).await.ok().transpose()?,
            }
        };
        let Some(exit) = exit else {
            return Err(self.kill_timed_out(running, request).await);
        };
        response.exit_code = exit.code;
        // Both together must fit one message.
        response.stderr.truncate(OUTPUT_LIMIT.saturating_sub(response.stdout.len()));
        Ok(response)
    }

    /// When the caller hears of the timeout, the command is dead.
    async fn kill_timed_out(&self, mut running: RunningExec, request: &ExecSyncRequest) -> CriError {
        let killed = match running.kill().await {
            Ok(()) => running.wait().await.map(|_| ()),
            error => error,
        };
        if let Err(error) = killed {
            return error;
        }
        CriError::ExecTimeout {
            id: request.container_id.clone(),
            command: request.cmd.join(" "),
            seconds: request.timeout,
        }
    }
}

/// Reads to the end, keeps what fits, and lets the writer never block on the rest.
async fn drain(from: &mut pipe::Receiver, into: &mut Vec<u8>) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let room = OUTPUT_LIMIT.saturating_sub(into.len());
        into.extend_from_slice(&buffer[..read.min(room)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[tokio::test]
    async fn output_beyond_the_limit_is_read_and_dropped() {
        let (mut ours, theirs) = output_pipe().unwrap();
        let writer = std::thread::spawn(move || {
            let mut file = std::fs::File::from(theirs);
            let chunk = vec![b'x'; 1 << 20];
            for _ in 0..18 {
                file.write_all(&chunk).unwrap();
            }
        });
        let mut output = Vec::new();
        drain(&mut ours, &mut output).await;
        writer.join().unwrap();
        assert_eq!(output.len(), OUTPUT_LIMIT);
    }
}
