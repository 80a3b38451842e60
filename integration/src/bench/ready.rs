//! When pods become Ready, told by a watch that runs before anything is applied, so that no polling interval is measured.

use crate::kubectl::Kubectl;
use anyhow::{Context, Result, bail};
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
        let path = "jsonpath={.metadata.name} {.metadata.deletionTimestamp}#{.status.conditions[?(@.type==\"Ready\")].status}{\"\\n\"}";
        let mut child = kubectl
            .command(&["get", "pods", "--watch", "--output", path])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("start kubectl's watch")?;
        let lines = BufReader::new(child.stdout.take().context("the watch has an output")?).lines();
        let (sender, events) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let at = Instant::now();
                let pod = line.split([' ', '#']).next().unwrap_or_default().to_owned();
                // A pod on its way out counts as ready no more.
                if sender.send(Event { at, pod, ready: line.ends_with(" #True") }).is_err() {
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

impl Drop for Watch {
    fn drop(&mut self) {
        // Already gone is as good as killed.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
