//! When pods become Ready, told by a watch that runs before anything is applied, so that no polling interval is measured.

use crate::kubectl::Kubectl;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(120);

/// kubectl's watch over all pods of the default namespace, as a channel of what it says.
#[derive(Debug)]
pub struct Watch {
    child: Child,
    events: Receiver<Event>,
}

#[derive(Debug)]
struct Event {
    at: Instant,
    pod: String,
    ready: bool,
}

/// Two moments of a group of pods.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    /// The last of them existed: what comes before is the control plane's work alone.
    pub last_seen: Instant,
    pub last_ready: Instant,
}

impl Watch {
    pub fn start(kubectl: &Kubectl) -> Result<Self> {
        // The bare stream: kubectl's own table keeps up with a hundred pods at once so badly that the server hangs up.
        let mut child = kubectl
            .command(&["get", "--raw", "/api/v1/namespaces/default/pods?watch=true&timeoutSeconds=7200"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start kubectl's watch")?;
        let lines = BufReader::new(child.stdout.take().context("the watch has an output")?).lines();
        let (sender, events) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let at = Instant::now();
                let Some(event) = event(&line, at) else { continue };
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        let watch = Self { child, events };
        // The first list has to be through before something is applied.
        std::thread::sleep(Duration::from_secs(1));
        Ok(watch)
    }

    /// Waits until so many pods with this prefix are Ready.
    pub fn until_ready(&self, prefix: &str, count: usize) -> Result<Ready> {
        let deadline = Instant::now() + PATIENCE;
        let mut ready = BTreeMap::new();
        let mut last_seen = Instant::now();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(event) if event.pod.starts_with(prefix) => {
                    if ready.insert(event.pod, event.ready).is_none() {
                        last_seen = event.at;
                    }
                    if ready.values().filter(|ready| **ready).count() >= count {
                        return Ok(Ready { last_seen, last_ready: event.at });
                    }
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    let now = ready.values().filter(|ready| **ready).count();
                    bail!("{now} of {count} pods {prefix}* are Ready after {PATIENCE:?}")
                }
                Err(RecvTimeoutError::Disconnected) => bail!("kubectl's watch ended"),
            }
        }
    }
}

/// A line of the stream; a pod on its way out counts as ready no more.
fn event(line: &str, at: Instant) -> Option<Event> {
    let event: Value = serde_json::from_str(line).ok()?;
    let pod = &event["object"];
    let conditions = pod["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let ready = conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
    let leaving = event["type"] == "DELETED" || !pod["metadata"]["deletionTimestamp"].is_null();
    Some(Event { at, pod: pod["metadata"]["name"].as_str()?.to_owned(), ready: ready && !leaving })
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Already gone is as good as killed.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leaving_pod_is_not_ready() {
        let line = |kind: &str, deleted: &str| {
            let metadata = format!(r#"{{"name":"a"{deleted}}}"#);
            format!(
                r#"{{"type":"{kind}","object":{{"metadata":{metadata},"status":{{"conditions":[{{"type":"Ready","status":"True"}}]}}}}}}"#
            )
        };
        let ready = |line: &str| event(line, Instant::now()).map(|event| event.ready);
        assert_eq!(ready(&line("MODIFIED", "")), Some(true));
        assert_eq!(ready(&line("MODIFIED", r#","deletionTimestamp":"2026-01-01T00:00:00Z""#)), Some(false));
        assert_eq!(ready(&line("DELETED", "")), Some(false));
        assert_eq!(ready("no event"), None);
    }
}
