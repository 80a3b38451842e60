//! Suite `node`: an orlop node and a stock one (kubelet, containerd, runc) on one real control plane, from `kubectl
//! apply` to Ready. Single pods alternate between the nodes; while one is measured, the other is at rest.

use crate::bench::Settings;
use crate::bench::figures::{Timings, millis, rounded};
use crate::bench::processes;
use crate::bench::ready::Watch;
use crate::bench::runtimes::IMAGE;
use crate::bench::stock::{STOCK, Stock};
use crate::bench::verdict::{Limit, Verdict};
use crate::cluster::wait_ready;
use crate::image::Recipe;
use crate::kubectl::Kubectl;
use crate::lab::Lab;
use crate::wait;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const ORLOP: &str = "orlop";
const PATIENCE: Duration = Duration::from_secs(120);
/// Ends of work that go on after pods are Ready: status writes, endpoint slices.
const SETTLE: Duration = Duration::from_secs(5);
const EXEC_PROBE: &str =
    "        readinessProbe: {exec: {command: [/bin/true]}, periodSeconds: 1, timeoutSeconds: 5}\n";

/// A node's own processes at one moment, and what they used over a while before it.
#[derive(Debug, Default)]
struct Load {
    memory: processes::Memory,
    cpu_percent: f64,
}

impl Load {
    /// Everything below the node's cgroup but the workload.
    fn observe(cgroup: &std::path::Path, over: Duration) -> Self {
        let pids = processes::of_runtime(cgroup);
        // One that ended meanwhile has used nothing that could be told.
        let used = || -> Duration { pids.iter().filter_map(|pid| processes::cpu_time(*pid).ok()).sum() };
        let (before, begin) = (used(), Instant::now());
        std::thread::sleep(over);
        let cpu = used().saturating_sub(before).as_secs_f64() / begin.elapsed().as_secs_f64();
        Self { memory: processes::memory(&processes::of_runtime(cgroup)), cpu_percent: rounded(cpu * 100.0) }
    }

    fn to_json(&self) -> Value {
        json!({
            "processes": self.memory.processes,
            "pss_kb": self.memory.pss_kb,
            "rss_kb": self.memory.rss_kb,
            "cpu_percent_of_a_core": self.cpu_percent,
        })
    }

    fn megabytes(&self) -> f64 {
        kilobytes(self.memory.pss_kb) / 1024.0
    }
}

/// Memory sizes are far below what a double holds exactly.
#[allow(clippy::cast_precision_loss)]
fn kilobytes(kb: u64) -> f64 {
    kb as f64
}

/// How a deployment came up.
#[derive(Debug, Clone, Copy)]
struct Scaled {
    /// Until the control plane had made the last pod.
    created: Duration,
    ready: Duration,
}

/// One node and what was measured on it.
#[derive(Debug)]
struct Contender {
    name: &'static str,
    cgroup: PathBuf,
    one_pod: Timings,
    scaled: BTreeMap<usize, Scaled>,
    idle: Load,
    loaded: Load,
    loaded_pods: usize,
    /// Share of all cores that was busy with probes.
    probed: Option<f64>,
}

impl Contender {
    fn new(lab: &mut Lab, name: &'static str) -> Result<Self> {
        Ok(Self {
            name,
            cgroup: lab.node(name)?.cgroup().to_owned(),
            one_pod: Timings::default(),
            scaled: BTreeMap::new(),
            idle: Load::default(),
            loaded: Load::default(),
            loaded_pods: 0,
            probed: None,
        })
    }

    fn per_pod_mb(&self) -> f64 {
        // A few hundred pods at most.
        let pods = u32::try_from(self.loaded_pods.max(1)).map_or(1.0, f64::from);
        (self.loaded.megabytes() - self.idle.megabytes()) / pods
    }

    fn to_json(&self) -> Value {
        let scaled: serde_json::Map<String, Value> = self
            .scaled
            .iter()
            .map(|(n, took)| {
                (n.to_string(), json!({"created": millis(took.created), "ready": millis(took.ready)}))
            })
            .collect();
        json!({
            "one_pod": self.one_pod.summary(),
            "replicas_ms": scaled,
            "idle": self.idle.to_json(),
            "loaded": self.loaded.to_json(),
            "loaded_pods": self.loaded_pods,
            "pss_kb_per_pod": rounded(self.per_pod_mb() * 1024.0),
            "exec_probes_busy_percent_of_all_cores": self.probed,
        })
    }
}

/// Runs the suite; the lab is gone when it returns.
pub fn run(id: &str, settings: &Settings) -> Result<(Value, Vec<Verdict>)> {
    let mut lab = Lab::create(id)?;
    lab.start_control_plane()?;
    let _stock = start_nodes(&mut lab)?;
    let kubectl = lab.kubectl()?;
    let mut contenders = [Contender::new(&mut lab, ORLOP)?, Contender::new(&mut lab, STOCK)?];
    std::thread::sleep(SETTLE);
    for contender in &mut contenders {
        contender.idle = Load::observe(&contender.cgroup, settings.rest);
    }
    let watch = Watch::start(&kubectl)?;
    // The first round finds caches cold and is not counted.
    for round in 0..=settings.applies {
        for contender in &mut contenders {
            let name = format!("single-{}-{round}", contender.name);
            let (applied, ready) = apply_one(&kubectl, &watch, contender.name, &name)?;
            if round > 0 {
                contender.one_pod.add("kubectl_apply", applied);
                contender.one_pod.add("apply_to_ready", ready);
                contender.one_pod.add("applied_to_ready", ready.saturating_sub(applied));
            }
            kubectl.run(&["delete", "pod", &name, "--grace-period=1"])?;
        }
    }
    for &replicas in &settings.replicas {
        for contender in &mut contenders {
            let took = scale_up(&kubectl, &watch, contender.name, replicas, "")?;
            contender.scaled.insert(replicas, took);
            std::thread::sleep(SETTLE);
            contender.loaded = Load::observe(&contender.cgroup, settings.rest);
            contender.loaded_pods = replicas;
            remove_deployments(&kubectl)?;
        }
    }
    for contender in &mut contenders {
        contender.probed = Some(probed_share(&kubectl, &watch, contender, settings)?);
    }
    let [ours, theirs] = &contenders;
    Ok((json!({ORLOP: ours.to_json(), "stock_kubelet": theirs.to_json()}), verdicts(ours, theirs)))
}

/// Both nodes, Ready; the stock one's programs live as long as the answer.
fn start_nodes(lab: &mut Lab) -> Result<Stock> {
    let layout = lab.folder().join(ORLOP).join("etc/images/bench");
    std::fs::create_dir_all(&layout)?;
    Recipe::busybox(IMAGE).write_layout(&layout)?;
    lab.join_node(ORLOP)?;
    wait_ready(lab, ORLOP)?;
    let mut stock = Stock::start(lab).context("start the stock node")?;
    let kubectl = lab.kubectl()?;
    wait::until("the stock node is Ready", PATIENCE, || {
        stock.check_alive()?;
        match kubectl.field(&["node", STOCK], "{.status.conditions[?(@.type==\"Ready\")].status}")?.as_str() {
            "True" => Ok(()),
            other => bail!("Ready is {other:?}"),
        }
    })?;
    wait::until("the default service account", PATIENCE, || {
        kubectl.run(&["get", "serviceaccount", "default"])
    })?;
    Ok(stock)
}

/// From the start of kubectl to its end, and to the pod being Ready.
fn apply_one(kubectl: &Kubectl, watch: &Watch, node: &str, name: &str) -> Result<(Duration, Duration)> {
    let manifest = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  nodeSelector: {{kubernetes.io/hostname: {node}}}\n  \
         terminationGracePeriodSeconds: 1\n  containers:\n  - {{name: main, image: \"{IMAGE}\", imagePullPolicy: Never, \
         command: [/bin/sleep, \"3600\"]}}\n"
    );
    let begin = Instant::now();
    kubectl.feed(&["apply", "-f", "-"], &manifest)?;
    let applied = begin.elapsed();
    Ok((applied, watch.until_ready(name, 1)?.last_ready.saturating_duration_since(begin)))
}

/// A deployment without replicas, which then gets all at once; says how long until the last one was Ready.
fn scale_up(kubectl: &Kubectl, watch: &Watch, node: &str, replicas: usize, probe: &str) -> Result<Scaled> {
    let kind = if probe.is_empty() { "scale" } else { "probe" };
    let name = format!("{kind}-{node}-{replicas}");
    let manifest = format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: {name}, labels: {{bench: scale}}}}\nspec:\n  replicas: 0\n  \
         selector: {{matchLabels: {{app: {name}}}}}\n  template:\n    metadata: {{labels: {{app: {name}}}}}\n    spec:\n      \
         nodeSelector: {{kubernetes.io/hostname: {node}}}\n      terminationGracePeriodSeconds: 1\n      containers:\n      \
         - name: main\n        image: {IMAGE}\n        imagePullPolicy: Never\n        command: [/bin/sleep, \"3600\"]\n{probe}"
    );
    kubectl.apply(&manifest)?;
    let begin = Instant::now();
    kubectl.run(&["scale", &format!("deployment/{name}"), &format!("--replicas={replicas}")])?;
    let ready = watch.until_ready(&name, replicas)?;
    Ok(Scaled {
        created: ready.last_seen.saturating_duration_since(begin),
        ready: ready.last_ready.saturating_duration_since(begin),
    })
}

fn remove_deployments(kubectl: &Kubectl) -> Result<()> {
    kubectl.run(&["delete", "deployment", "-l", "bench=scale", "--cascade=foreground", "--timeout=120s"])?;
    wait::until("no pods are left", PATIENCE, || {
        match kubectl.run(&["get", "pods", "--output=name"])?.lines().count() {
            0 => Ok(()),
            left => bail!("{left} pods are left"),
        }
    })
}

/// Pods with an exec probe each second: the share of all cores that the node is busy with them, probes included.
fn probed_share(kubectl: &Kubectl, watch: &Watch, contender: &Contender, settings: &Settings) -> Result<f64> {
    scale_up(kubectl, watch, contender.name, settings.probed, EXEC_PROBE)?;
    std::thread::sleep(SETTLE);
    let (before, begin) = (processes::cpu_time_below(&contender.cgroup)?, Instant::now());
    std::thread::sleep(settings.rest);
    let (after, took) = (processes::cpu_time_below(&contender.cgroup)?, begin.elapsed());
    remove_deployments(kubectl)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cores = u32::try_from(cores).map_or(1.0, f64::from);
    Ok(rounded(after.saturating_sub(before).as_secs_f64() * 100.0 / took.as_secs_f64() / cores))
}

fn verdicts(ours: &Contender, theirs: &Contender) -> Vec<Verdict> {
    let verdict = |what: String, unit, figure: &dyn Fn(&Contender) -> Option<f64>, limit| Verdict {
        what,
        unit,
        ours: figure(ours),
        peer_name: "kubelet",
        peer: figure(theirs),
        limit,
    };
    let mut all = vec![
        verdict(
            "kubectl apply alone, p50".into(),
            "ms",
            &|c| c.one_pod.quantile("kubectl_apply", 50),
            Limit::None,
        ),
        verdict(
            "kubectl apply to Ready, p50".into(),
            "ms",
            &|c| c.one_pod.quantile("apply_to_ready", 50),
            Limit::Share(0.25),
        ),
    ];
    let alone = &|c: &Contender| c.one_pod.quantile("applied_to_ready", 50);
    all.push(verdict("from kubectl's end to Ready, p50".into(), "ms", alone, Limit::None));
    let largest = ours.scaled.keys().max().copied();
    for &replicas in ours.scaled.keys() {
        let limit = if Some(replicas) == largest { Limit::Share(1.0 / 6.0) } else { Limit::None };
        let figure = |c: &Contender| c.scaled.get(&replicas).map(|took| millis(took.ready));
        all.push(verdict(format!("{replicas} replicas Ready"), "ms", &figure, limit));
        let figure = |c: &Contender| c.scaled.get(&replicas).map(|took| millis(took.created));
        all.push(verdict(format!("{replicas} replicas created"), "ms", &figure, Limit::None));
    }
    all.push(verdict("node memory, idle".into(), "MB", &|c| Some(c.idle.megabytes()), Limit::Absolute(30.0)));
    all.push(verdict("node memory, per pod".into(), "MB", &|c| Some(c.per_pod_mb()), Limit::Absolute(0.2)));
    let rest = format!("CPU at rest, {} pods, of a core", ours.loaded_pods);
    all.push(verdict(rest, "%", &|c| Some(c.loaded.cpu_percent), Limit::Absolute(0.5)));
    let probes = "exec probes each second, all cores busy";
    all.push(verdict(probes.into(), "%", &|c| c.probed, Limit::Absolute(10.0)));
    all
}
