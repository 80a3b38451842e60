//! Commands in containers, for probes and hooks.

use crate::cri::Cri;
use orlop_proto::cri::ExecSyncRequest;
use std::time::Duration;
use tonic::Code;

/// What is kept of a command's output.
const MAX_OUTPUT: usize = 10 << 10;
/// How much longer than the command the runtime itself may take.
const MARGIN: Duration = Duration::from_secs(10);

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ended {
    Exit {
        code: i32,
        output: String,
    },
    TimedOut,
    /// The runtime could not run it.
    Error {
        message: String,
    },
}

pub(crate) async fn run(cri: &Cri, container_id: &str, command: &[String], timeout: Duration) -> Ended {
    let request = ExecSyncRequest {
        container_id: container_id.to_owned(),
        cmd: command.to_vec(),
        timeout: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX).max(1),
    };
    let mut runtime = cri.runtime();
    match tokio::time::timeout(timeout + MARGIN, runtime.exec_sync(request)).await {
        Err(_) => Ended::TimedOut,
        Ok(Ok(response)) => {
            let response = response.into_inner();
            let mut output = response.stdout;
            output.extend_from_slice(&response.stderr);
            output.truncate(MAX_OUTPUT);
            let output = String::from_utf8_lossy(&output).into_owned();
            Ended::Exit { code: response.exit_code, output }
        }
        Ok(Err(status)) if status.code() == Code::DeadlineExceeded => Ended::TimedOut,
        Ok(Err(status)) => Ended::Error { message: status.message().to_owned() },
    }
}
