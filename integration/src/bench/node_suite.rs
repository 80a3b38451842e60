//! Suite `node`: an orlop node on the real control plane, from `kubectl apply` to Ready.
//!
//! A watch that runs before anything is applied tells when pods are Ready, so that no polling interval is measured.

use crate::bench::Settings;
use crate::bench::figures::{Timings, millis, rounded};
use crate::bench::processes;
use crate::bench::verdict::{Limit, Verdict};
use crate::cluster::wait_ready;
use crate::image::Recipe;
use crate::kubectl::Kubectl;
use crate::lab::Lab;
use crate::wait;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

const NODE: &str = "node-a";
const IMAGE: &str = crate::bench::runtimes::IMAGE;
const PATIENCE: Duration = Duration::from_secs(120);
/// Ends of work that go on after pods are Ready: status writes, endpoint slices.
const SETTLE: Duration = Duration::from_secs(5);

/// kubectl's watch over all pods of the default namespace, as a channel of what it says.
struct Watch {
    child: Child,
    events: Receiver<Event>,
}

struct Event {
    at: Instant,
    pod: String,
    ready: bool,
}

impl Watch {
    fn start(kubectl: &Kubectl) -> Result<Self> {
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

    /// When the last of so many pods with this prefix became Ready.
    fn until_ready(&self, prefix: &str, count: usize) -> Result<Instant> {
        let deadline = Instant::now() + PATIENCE;
        let mut ready = BTreeMap::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(event) if event.pod.starts_with(prefix) => {
                    ready.insert(event.pod, event.ready);
                    if ready.values().filter(|ready| **ready).count() >= count {
                        return Ok(event.at);
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

/// The node's own processes at one moment.
#[derive(Debug, Default)]
struct Load {
    memory: processes::Memory,
    agent: processes::Memory,
    keeper: processes::Memory,
    cpu_percent: f64,
}

impl Load {
    fn to_json(&self) -> Value {
        let one = |m: &processes::Memory| json!({"pss_kb": m.pss_kb, "rss_kb": m.rss_kb});
        json!({
            "agent": one(&self.agent),
            "keeper": one(&self.keeper),
            "processes": self.memory.processes,
            "pss_kb": self.memory.pss_kb,
            "cpu_percent_of_a_core": self.cpu_percent,
        })
    }
}

fn observe(lab: &mut Lab, over: Duration) -> Result<Load> {
    let node = lab.node(NODE)?;
    let (agent, keeper) = (node.agent()?.pid(), node.keeper()?.pid());
    let used = || -> Result<Duration> { Ok(processes::cpu_time(agent)? + processes::cpu_time(keeper)?) };
    let (before, begin) = (used()?, Instant::now());
    std::thread::sleep(over);
    let cpu_percent = rounded((used()? - before).as_secs_f64() * 100.0 / begin.elapsed().as_secs_f64());
    Ok(Load {
        memory: processes::memory(&processes::of_runtime(node.cgroup())),
        agent: processes::memory(&[agent]),
        keeper: processes::memory(&[keeper]),
        cpu_percent,
    })
}

/// Runs the suite; the lab is gone when it returns.
pub fn run(id: &str, settings: &Settings) -> Result<(Value, Vec<Verdict>)> {
    let mut lab = Lab::create(id)?;
    lab.start_control_plane()?;
    let layout = lab.folder().join(NODE).join("etc/images/bench");
    std::fs::create_dir_all(&layout)?;
    Recipe::busybox(IMAGE).write_layout(&layout)?;
    lab.join_node(NODE)?;
    wait_ready(&mut lab, NODE)?;
    let kubectl = lab.kubectl()?;
    wait::until("the default service account", PATIENCE, || {
        kubectl.run(&["get", "serviceaccount", "default"])
    })?;
    std::thread::sleep(SETTLE);
    let idle = observe(&mut lab, settings.rest)?;

    let mut timings = Timings::default();
    let watch = Watch::start(&kubectl)?;
    for n in 0..=settings.applies {
        let name = format!("single-{n}");
        let (applied, ready) = apply_one(&kubectl, &watch, &name)?;
        // The first one finds caches cold and is not counted.
        if n > 0 {
            timings.add("kubectl_apply", applied);
            timings.add("apply_to_ready", ready);
        }
        kubectl.run(&["delete", "pod", &name, "--grace-period=1"])?;
    }
    let mut scaled = serde_json::Map::new();
    let mut last = None;
    let mut loaded = Load::default();
    for &replicas in &settings.replicas {
        let took = scale_up(&kubectl, &watch, replicas, "")?;
        scaled.insert(replicas.to_string(), json!(millis(took)));
        last = Some((replicas, took));
        std::thread::sleep(SETTLE);
        loaded = observe(&mut lab, settings.rest)?;
        remove_deployment(&kubectl)?;
    }
    let probed = probed_share(&kubectl, &watch, settings)?;
    let pods = settings.replicas.last().copied().unwrap_or_default();
    let node = json!({
        "one_pod": timings.summary(),
        "replicas_ready_ms": scaled,
        "idle": idle.to_json(),
        "loaded": loaded.to_json(),
        "loaded_pods": pods,
        "exec_probes": probed.as_ref().map(|(pods, share)| json!({"pods": pods, "busy_percent_of_all_cores": share})),
        "stock_kubelet": "not run: no ratio here",
    });
    let probed = probed.map(|(_, share)| share);
    Ok((node, verdicts(&timings, last, pods, &idle, &loaded, probed)))
}

/// From the start of kubectl to its end, and to the pod being Ready.
fn apply_one(kubectl: &Kubectl, watch: &Watch, name: &str) -> Result<(Duration, Duration)> {
    let manifest = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n  \
         - {{name: main, image: \"{IMAGE}\", imagePullPolicy: Never, command: [/bin/sleep, \"3600\"]}}\n"
    );
    let begin = Instant::now();
    kubectl.feed(&["apply", "-f", "-"], &manifest)?;
    let applied = begin.elapsed();
    Ok((applied, watch.until_ready(name, 1)?.saturating_duration_since(begin)))
}

/// A deployment without replicas, which then gets all at once; says how long until the last one was Ready.
fn scale_up(kubectl: &Kubectl, watch: &Watch, replicas: usize, probe: &str) -> Result<Duration> {
    let name = format!("scale-{replicas}");
    let manifest = format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: {name}, labels: {{bench: scale}}}}\nspec:\n  replicas: 0\n  \
         selector: {{matchLabels: {{app: {name}}}}}\n  template:\n    metadata: {{labels: {{app: {name}}}}}\n    spec:\n      \
         terminationGracePeriodSeconds: 1\n      containers:\n      - name: main\n        image: {IMAGE}\n        \
         imagePullPolicy: Never\n        command: [/bin/sleep, \"3600\"]\n{probe}"
    );
    kubectl.apply(&manifest)?;
    let begin = Instant::now();
    kubectl.run(&["scale", &format!("deployment/{name}"), &format!("--replicas={replicas}")])?;
    Ok(watch.until_ready(&name, replicas)?.saturating_duration_since(begin))
}

fn remove_deployment(kubectl: &Kubectl) -> Result<()> {
    kubectl.run(&["delete", "deployment", "-l", "bench=scale", "--cascade=foreground", "--timeout=120s"])?;
    wait::until("no pods are left", PATIENCE, || {
        match kubectl.run(&["get", "pods", "--output=name"])?.lines().count() {
            0 => Ok(()),
            left => bail!("{left} pods are left"),
        }
    })
}

/// Pods with an exec probe each second: how busy that keeps the machine.
fn probed_share(kubectl: &Kubectl, watch: &Watch, settings: &Settings) -> Result<Option<(usize, f64)>> {
    if settings.probed == 0 {
        return Ok(None);
    }
    let probe =
        "        readinessProbe: {exec: {command: [/bin/true]}, periodSeconds: 1, timeoutSeconds: 5}\n";
    scale_up(kubectl, watch, settings.probed, probe)?;
    std::thread::sleep(SETTLE);
    let before = processes::machine_ticks()?;
    std::thread::sleep(settings.rest);
    let after = processes::machine_ticks()?;
    remove_deployment(kubectl)?;
    #[allow(clippy::cast_precision_loss)]
    let share = (after.0 - before.0) as f64 * 100.0 / (after.1 - before.1).max(1) as f64;
    Ok(Some((settings.probed, rounded(share))))
}

fn verdicts(
    timings: &Timings,
    scaled: Option<(usize, Duration)>,
    pods: usize,
    idle: &Load,
    loaded: &Load,
    probed: Option<f64>,
) -> Vec<Verdict> {
    const KUBELET: &str = "stock kubelet";
    let verdict =
        |what: String, unit, ours, limit| Verdict { what, unit, ours, peer_name: KUBELET, peer: None, limit };
    #[allow(clippy::cast_precision_loss)]
    let (idle_mb, pod_mb) = (
        idle.memory.pss_kb as f64 / 1024.0,
        (loaded.memory.pss_kb as f64 - idle.memory.pss_kb as f64) / 1024.0 / pods.max(1) as f64,
    );
    let mut all = vec![verdict(
        "kubectl apply to Ready, p50".into(),
        "ms",
        timings.quantile("apply_to_ready", 50),
        Limit::Share(0.25),
    )];
    if let Some((replicas, took)) = scaled {
        let what = format!("{replicas} replicas Ready");
        all.push(verdict(what, "ms", Some(millis(took)), Limit::Share(1.0 / 6.0)));
    }
    all.push(verdict("node memory, idle".into(), "MB", Some(idle_mb), Limit::Absolute(30.0)));
    all.push(verdict("node memory, per pod".into(), "MB", Some(pod_mb), Limit::Absolute(0.2)));
    let rest = format!("CPU at rest, {pods} pods, of a core");
    all.push(verdict(rest, "%", Some(loaded.cpu_percent), Limit::Absolute(0.5)));
    let what = "exec probes each second, all cores busy";
    all.push(verdict(what.into(), "%", probed, Limit::Absolute(10.0)));
    all
}
