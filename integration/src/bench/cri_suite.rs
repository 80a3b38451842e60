//! Suite `cri`: orlop beside containerd with runc, driven through the CRI.
//!
//! Short series alternate between the runtimes, so that whatever else the machine does meets both alike; the burst of
//! pods runs once each.

use crate::bench::Settings;
use crate::bench::cri::Socket;
use crate::bench::figures::{Timings, millis, rounded};
use crate::bench::runtimes::{self, CONTAINERD, Runtime};
use crate::bench::verdict::{Limit, Verdict};
use crate::lab::Lab;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::time::Duration;

/// How many pods start at once in the burst.
const AT_ONCE: usize = 10;
/// Memory is read when the burst has calmed down.
const SETTLE: Duration = Duration::from_secs(2);

/// What one runtime did.
#[derive(Debug, Default)]
struct Figures {
    version: String,
    one_by_one: Timings,
    burst: Timings,
    up: Duration,
    down: Duration,
    idle: crate::bench::processes::Memory,
    loaded: crate::bench::processes::Memory,
    after: crate::bench::processes::Memory,
    pods: usize,
}

impl Figures {
    fn per_pod_kb(&self) -> f64 {
        let (loaded, idle) = (self.loaded.pss_kb, self.idle.pss_kb);
        // Tens of gigabytes in kilobytes are exact in a double.
        #[allow(clippy::cast_precision_loss)]
        let per_pod = (loaded as f64 - idle as f64) / self.pods.max(1) as f64;
        rounded(per_pod)
    }

    fn to_json(&self) -> Value {
        let memory = |m: &crate::bench::processes::Memory| json!({"pss_kb": m.pss_kb, "rss_kb": m.rss_kb, "processes": m.processes});
        json!({
            "version": self.version,
            "one_by_one": self.one_by_one.summary(),
            "burst": {
                "pods": self.pods,
                "at_once": AT_ONCE,
                "all_up_ms": millis(self.up),
                "all_down_ms": millis(self.down),
                "steps": self.burst.summary(),
            },
            "memory": {
                "idle": memory(&self.idle),
                "loaded": memory(&self.loaded),
                "after": memory(&self.after),
                "pss_kb_per_pod": self.per_pod_kb(),
            },
        })
    }
}

/// Runs the suite; the lab is gone when it returns.
pub fn run(id: &str, settings: &Settings) -> Result<(Value, Vec<Verdict>)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(Box::pin(async {
        let mut lab = Lab::create(id)?;
        let peers = [
            runtimes::orlop(&mut lab).await.context("start orlop")?,
            runtimes::containerd(&mut lab).await.context("start containerd")?,
        ];
        tokio::time::sleep(SETTLE).await;
        let mut figures: [Figures; 2] = Default::default();
        for (peer, figures) in peers.iter().zip(&mut figures) {
            figures.version = peer.socket.version().await?;
            figures.idle = peer.memory();
            // The first pod pays for bridges, directories and caches.
            let mut unmeasured = Timings::default();
            one_by_one(&peer.socket, "warm", 1, 1, &mut unmeasured).await?;
        }
        for round in 0..settings.rounds {
            for (peer, figures) in peers.iter().zip(&mut figures) {
                let prefix = format!("single-{round}");
                one_by_one(&peer.socket, &prefix, settings.pods, settings.execs, &mut figures.one_by_one)
                    .await
                    .with_context(|| format!("{}, one by one", peer.name))?;
            }
        }
        for (peer, figures) in peers.iter().zip(&mut figures) {
            burst(peer, settings, figures).await.with_context(|| format!("{}, burst", peer.name))?;
        }
        let [ours, theirs] = &figures;
        Ok((json!({"orlop": ours.to_json(), CONTAINERD: theirs.to_json()}), verdicts(ours, theirs)))
    }))
}

async fn one_by_one(
    socket: &Socket,
    prefix: &str,
    pods: usize,
    execs: usize,
    timings: &mut Timings,
) -> Result<()> {
    let (running, _) = socket.start_pods(prefix, pods, 1, timings).await?;
    if let Some(first) = running.first() {
        socket.exec(first, execs, timings).await?;
    }
    socket.lists(pods, 5, timings).await?;
    socket.stop_pods(running, 1, timings).await?;
    Ok(())
}

async fn burst(peer: &Runtime, settings: &Settings, figures: &mut Figures) -> Result<()> {
    let socket = &peer.socket;
    figures.pods = settings.burst;
    let (pods, up) = socket.start_pods("burst", settings.burst, AT_ONCE, &mut figures.burst).await?;
    figures.up = up;
    if let Some(first) = pods.first() {
        socket.exec(first, settings.execs, &mut figures.burst).await?;
    }
    socket.lists(pods.len(), 10, &mut figures.burst).await?;
    tokio::time::sleep(SETTLE).await;
    figures.loaded = peer.memory();
    figures.down = socket.stop_pods(pods, AT_ONCE, &mut figures.burst).await?;
    tokio::time::sleep(SETTLE).await;
    figures.after = peer.memory();
    Ok(())
}

fn verdicts(ours: &Figures, theirs: &Figures) -> Vec<Verdict> {
    let verdict = |what: &str, unit, ours, peer, limit| Verdict {
        what: what.to_owned(),
        unit,
        ours,
        peer_name: CONTAINERD,
        peer,
        limit,
    };
    let single = |what: &str, step: &str, limit| {
        verdict(what, "ms", ours.one_by_one.quantile(step, 50), theirs.one_by_one.quantile(step, 50), limit)
    };
    let loaded = |what: &str, step: &str, limit| {
        verdict(what, "ms", ours.burst.quantile(step, 50), theirs.burst.quantile(step, 50), limit)
    };
    #[allow(clippy::cast_precision_loss)]
    let mb = |kb: u64| Some(kb as f64 / 1024.0);
    vec![
        single("CRI sandbox, p50", "run_sandbox", Limit::None),
        single("CRI create, p50", "create", Limit::None),
        single("CRI start, p50", "start", Limit::None),
        single("CRI pod, p50", "pod", Limit::Share(1.0 / 8.0)),
        single("CRI stop and remove, p50", "stop_remove", Limit::Share(1.0 / 6.0)),
        single("CRI ExecSync, p50", "exec_sync", Limit::Share(1.0 / 4.0)),
        single("CRI stats, 20 pods, p50", "list_stats", Limit::None),
        loaded("CRI stats, burst's pods, p50", "list_stats", Limit::Share(1.0 / 40.0)),
        loaded("CRI ExecSync beside burst's pods, p50", "exec_sync", Limit::None),
        verdict(
            "CRI burst, all up",
            "ms",
            Some(millis(ours.up)),
            Some(millis(theirs.up)),
            Limit::Share(1.0 / 6.0),
        ),
        verdict("CRI burst, all down", "ms", Some(millis(ours.down)), Some(millis(theirs.down)), Limit::None),
        verdict(
            "runtime memory, idle",
            "MB",
            mb(ours.idle.pss_kb),
            mb(theirs.idle.pss_kb),
            Limit::Absolute(30.0),
        ),
        verdict(
            "runtime memory, per pod",
            "MB",
            Some(ours.per_pod_kb() / 1024.0),
            Some(theirs.per_pod_kb() / 1024.0),
            Limit::Absolute(0.2),
        ),
    ]
}
