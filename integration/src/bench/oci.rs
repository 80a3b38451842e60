//! Suite `oci`: `run` of a program that does nothing, by OCI runtimes on one bundle, taking turns.
//!
//! The measuring loop runs on a node of the lab, in a process of its own that enters the node's namespaces once: an
//! `nsenter` around every single run would cost as much as the fastest runtime.

use crate::bench::Settings;
use crate::bench::figures::{Timings, rounded};
use crate::bench::verdict::{Limit, Verdict};
use crate::lab::Lab;
use crate::peers::{ours, peer};
use crate::process::run as run_command;
use anyhow::{Context, Result, bail};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::{Map, Value, json};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ORLOP: &str = "orlop-oci";
const RUNC: &str = "runc";
const CRUN: &str = "crun";
/// Runs that warm caches and count nothing.
const WARM_UP: usize = 3;
const BUSYBOX: &str = "/bin/busybox";

/// Runs the suite; the lab is gone when it returns.
pub fn run(id: &str, settings: &Settings) -> Result<(Value, Vec<Verdict>)> {
    let mut lab = Lab::create(id)?;
    let node = lab.add_node("oci")?;
    let bundle = node.folder().join("bundle");
    write_bundle(&bundle)?;
    let own = std::env::current_exe().context("find this program")?;
    let text = run_command(node.command(own)?.env("ORLOP_MISSING_CONTROLLERS", "warn").args([
        "inside-oci",
        &bundle.display().to_string(),
        &settings.runs.to_string(),
    ]))?;
    let figures: Value = serde_json::from_str(&text).context("read the measuring loop's answer")?;
    let verdicts = verdicts(&figures);
    Ok((figures, verdicts))
}

/// A root of busybox, and runc's own example configuration without terminal, and without what not every machine lets a
/// runtime set.
fn write_bundle(bundle: &Path) -> Result<()> {
    let bin = bundle.join("rootfs/bin");
    std::fs::create_dir_all(&bin)?;
    for folder in ["proc", "sys", "dev", "etc", "tmp"] {
        std::fs::create_dir_all(bundle.join("rootfs").join(folder))?;
    }
    std::fs::copy(BUSYBOX, bin.join("busybox")).with_context(|| format!("copy {BUSYBOX}"))?;
    symlink("busybox", bin.join("true"))?;
    run_command(Command::new(peer("runc")?).args(["spec", "--bundle"]).arg(bundle))?;
    let path = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    // The oldest version that all of them know: crun refuses the newest.
    config["ociVersion"] = json!("1.0.2");
    config["process"]["terminal"] = json!(false);
    config["process"]["args"] = json!(["/bin/true"]);
    // The rules for devices go too: crun raises a limit of its own before it loads them.
    for (part, key) in [("process", "rlimits"), ("linux", "resources")] {
        if let Some(object) = config[part].as_object_mut() {
            object.remove(key);
        }
    }
    std::fs::write(&path, serde_json::to_vec(&config)?)?;
    Ok(())
}

struct Contender {
    name: &'static str,
    program: PathBuf,
}

impl Contender {
    fn command(&self, bundle: &Path, container: &str, wrap: &[&str]) -> Command {
        let mut words: Vec<std::ffi::OsString> = wrap.iter().map(Into::into).collect();
        words.push(self.program.clone().into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg("--root").arg(Path::new("/run").join(self.name));
        command.args(["run", "--bundle"]).arg(bundle).arg(container).stdin(Stdio::null());
        command
    }
}

/// The loop itself: prints what it measured. Runs in the node's namespaces.
pub fn measure_inside(bundle: &Path, runs: usize) -> Result<()> {
    let all = [
        Contender { name: ORLOP, program: ours("orlop-oci")? },
        Contender { name: RUNC, program: peer("runc")? },
        Contender { name: CRUN, program: "/usr/bin/crun".into() },
    ];
    let mut answer = Map::new();
    let mut able = Vec::new();
    for contender in all {
        let version = run_command(Command::new(&contender.program).arg("--version"))
            .map(|text| text.lines().next().unwrap_or_default().to_owned());
        let tried = version.and_then(|version| {
            for n in 0..WARM_UP {
                run_command(&mut contender.command(bundle, &format!("warm-{n}"), &[]))?;
            }
            Ok(version)
        });
        match tried {
            Ok(version) => {
                answer.insert(contender.name.to_owned(), json!({"version": version}));
                able.push(contender);
            }
            Err(error) => {
                answer.insert(contender.name.to_owned(), json!({"cannot_run": format!("{error:#}")}));
            }
        }
    }
    let (mut timings, mut cpu) = (Timings::default(), Timings::default());
    for n in 0..runs {
        for turn in 0..able.len() {
            // Another one begins each time, so that nobody always follows the same neighbour.
            let contender = &able[(turn + n) % able.len()];
            let mut command = contender.command(bundle, &format!("run-{n}"), &[]);
            command.stdout(Stdio::null()).stderr(Stdio::null());
            let (begin, used) = (Instant::now(), cpu_of_children()?);
            let status = command.status()?;
            timings.add(contender.name, begin.elapsed());
            cpu.add(contender.name, cpu_of_children()?.saturating_sub(used));
            if !status.success() {
                bail!("{} failed in run {n}: {status}", contender.name);
            }
        }
    }
    let (summary, cpu) = (timings.summary(), cpu.summary());
    for contender in &able {
        answer[contender.name]["run"] = summary[contender.name].clone();
        answer[contender.name]["cpu"] = cpu[contender.name].clone();
        answer[contender.name]["max_rss_kb"] = json!(max_rss(contender, bundle)?);
    }
    println!("{}", Value::Object(answer));
    Ok(())
}

/// Processor time of everything started here that has ended: unlike the time by the clock, a busy machine hardly
/// changes it.
fn cpu_of_children() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = |value: TimeVal| u64::try_from(value.num_microseconds()).unwrap_or_default();
    Ok(Duration::from_micros(micros(usage.user_time()) + micros(usage.system_time())))
}

/// The most memory that one run held at a time, in its largest process, as busybox' `time` reports it. A process
/// inherits the high-water mark of whoever started it, so that starter must be small; this one is not.
fn max_rss(contender: &Contender, bundle: &Path) -> Result<f64> {
    const KNOWN_MB: u32 = 64;
    let block = format!("bs={KNOWN_MB}M");
    let mut known = Command::new(BUSYBOX);
    known.args(["time", "-f", "%M", BUSYBOX, "dd", "if=/dev/zero", "of=/dev/null", &block, "count=1"]);
    // Some versions of busybox report multiples of a page's kilobytes.
    let factor = (reported(&mut known)? / (f64::from(KNOWN_MB) * 1024.0)).round().max(1.0);
    let mut samples = Vec::new();
    for n in 0..5 {
        let wrap = [BUSYBOX, "time", "-f", "%M"];
        samples.push(reported(&mut contender.command(bundle, &format!("rss-{n}"), &wrap))? / factor);
    }
    samples.sort_by(f64::total_cmp);
    Ok(rounded(samples[samples.len() / 2]))
}

fn reported(command: &mut Command) -> Result<f64> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    let last = text.lines().last().unwrap_or_default().trim();
    last.parse().with_context(|| format!("{command:?} reported {text:?}"))
}

fn verdicts(figures: &Value) -> Vec<Verdict> {
    let median = |name: &str| figures[name]["run"]["p50_ms"].as_f64();
    let rss = |name: &str| figures[name]["max_rss_kb"].as_f64().map(|kb| kb / 1024.0);
    let time = |peer_name, limit| Verdict {
        what: "OCI run of a program that does nothing".into(),
        unit: "ms",
        ours: median(ORLOP),
        peer_name,
        peer: median(peer_name),
        limit,
    };
    let memory = |peer_name| Verdict {
        what: "OCI run, largest process".into(),
        unit: "MB",
        ours: rss(ORLOP),
        peer_name,
        peer: rss(peer_name),
        limit: Limit::None,
    };
    let cpu = |peer_name| Verdict {
        what: "OCI run, processor time".into(),
        unit: "ms",
        ours: figures[ORLOP]["cpu"]["p50_ms"].as_f64(),
        peer_name,
        peer: figures[peer_name]["cpu"]["p50_ms"].as_f64(),
        limit: Limit::None,
    };
    vec![
        time(CRUN, Limit::Share(0.5)),
        time(RUNC, Limit::None),
        cpu(CRUN),
        cpu(RUNC),
        memory(CRUN),
        memory(RUNC),
    ]
}
