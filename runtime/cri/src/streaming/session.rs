//! Exec and attach over SPDY: the client opens one stream for each of error, stdin, stdout, stderr and resize; the
//! command's end travels as a Status object on the error stream.

use super::spdy::{Connection, Stream};
use super::{StreamError, StreamIo};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::sync::mpsc;

/// How long a client may take to open all its streams.
const OPENING: Duration = Duration::from_secs(30);
/// How long we wait for the client to hang up after the end.
const GOODBYE: Duration = Duration::from_secs(5);
/// The largest resize message that makes sense.
const MAX_RESIZE: u64 = 1024;

/// Versions of the protocol, best first. The first three differ from the fourth only in how the end is told.
pub(super) const PROTOCOLS: [&str; 4] =
    ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];

/// Which streams a session has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// A session whose client has opened all its streams.
#[derive(Debug)]
pub(super) struct Session {
    connection: Connection,
    error: Stream,
    structured_end: bool,
}

impl Session {
    /// Collects the streams that `wanted` names; their order is the client's choice.
    pub(super) async fn open(
        mut connection: Connection,
        protocol: &str,
        wanted: Wanted,
    ) -> Option<(Self, StreamIo)> {
        let structured_end = protocol == PROTOCOLS[0];
        let resizes = wanted.tty && (structured_end || protocol == PROTOCOLS[1]);
        let kinds = [
            ("error", true),
            ("stdin", wanted.stdin),
            ("stdout", wanted.stdout),
            ("stderr", wanted.stderr && !wanted.tty),
            ("resize", resizes),
        ];
        let count = kinds.iter().filter(|(_, wanted)| *wanted).count();
        let mut streams: HashMap<String, Stream> = HashMap::new();
        let collect = async {
            while streams.len() < count {
                let stream = connection.accept().await?;
                let kind = stream.header("streamtype")?.to_owned();
                streams.insert(kind, stream);
            }
            Some(())
        };
        tokio::time::timeout(OPENING, collect).await.ok()??;
        let error = streams.remove("error")?;
        let io = StreamIo {
            stdin: streams.remove("stdin").map(|s| Box::new(s) as _),
            stdout: streams.remove("stdout").map(|s| Box::new(s) as _),
            stderr: streams.remove("stderr").map(|s| Box::new(s) as _),
            resize: streams.remove("resize").map(sizes),
        };
        Some((Self { connection, error, structured_end }, io))
    }

    /// Runs `work` until it ends or the client goes, then tells the client how it ended.
    pub(super) async fn run(mut self, work: impl Future<Output = Result<i32, StreamError>>) {
        let closed = self.connection.closed();
        let outcome = tokio::select! {
            outcome = work => outcome,
            () = closed.cancelled() => return,
        };
        let text = if self.structured_end { status(&outcome).to_string() } else { plain(&outcome) };
        // A client that has gone by now needs no ending.
        if self.error.write_all(text.as_bytes()).await.is_ok() && self.error.shutdown().await.is_ok() {
            self.connection.finish(GOODBYE).await;
        }
    }
}

/// The Status object a client of version 4 expects.
fn status(outcome: &Result<i32, StreamError>) -> Value {
    match outcome {
        Ok(0) => json!({"metadata": {}, "status": "Success"}),
        Ok(code) => json!({
            "metadata": {},
            "status": "Failure",
            "reason": "NonZeroExitCode",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        }),
        Err(error) => {
            json!({"metadata": {}, "status": "Failure", "reason": "InternalError", "message": error.to_string(), "code": 500})
        }
    }
}

fn plain(outcome: &Result<i32, StreamError>) -> String {
    match outcome {
        Ok(0) => String::new(),
        Ok(code) => format!("command terminated with non-zero exit code: exit status {code}"),
        Err(error) => error.to_string(),
    }
}

/// Terminal sizes, as the client sends them: one JSON object after the other.
fn sizes(stream: Stream) -> mpsc::Receiver<(u16, u16)> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Size {
        width: u16,
        height: u16,
    }
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        let mut reader = BufReader::new(tokio::io::AsyncReadExt::take(stream, MAX_RESIZE));
        let mut message = Vec::new();
        // Objects end with a brace, whether or not a newline follows.
        while reader.read_until(b'}', &mut message).await.is_ok_and(|count| count > 0) {
            let Ok(size) = serde_json::from_slice::<Size>(&message) else { return };
            if sender.send((size.width, size.height)).await.is_err() {
                return;
            }
            message.clear();
            reader.get_mut().set_limit(MAX_RESIZE);
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_code_is_told_as_kubectl_reads_it() {
        assert_eq!(status(&Ok(0))["status"], "Success");
        let failed = status(&Ok(7));
        assert_eq!(failed["reason"], "NonZeroExitCode");
        assert_eq!(failed["details"]["causes"][0], json!({"reason": "ExitCode", "message": "7"}));
        let broken = status(&Err(StreamError::ShuttingDown));
        assert_eq!(broken["reason"], "InternalError");
    }
}
