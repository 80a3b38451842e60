//! The benchmarks from the command line: what `integration/bench` calls.

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};
use orlop_integration::bench::tunables::Tunables;
use orlop_integration::bench::verdict::Verdict;
use orlop_integration::bench::{Settings, cri_suite, machine, node_suite, oci};
use orlop_integration::lab;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

const USAGE: &str = "usage: orlop-bench [--quick] [--output FILE] [oci|cri|node …]";
const SUITES: [&str; 3] = ["oci", "cri", "node"];

struct Request {
    settings: Settings,
    output: Option<PathBuf>,
    suites: Vec<String>,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [inside, bundle, runs] = arguments.as_slice()
        && inside == "inside-oci"
    {
        return oci::measure_inside(Path::new(bundle), runs.parse().context("number of runs")?);
    }
    let request = parse(&arguments)?;
    let (document, verdicts) = interruptible(&request)?;
    let text = serde_json::to_string_pretty(&document)?;
    match &request.output {
        Some(path) => {
            std::fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))?
        }
        None => println!("{text}"),
    }
    eprintln!("\n{:<44} {:>14} {:>10} {:<12} {:>8} {:>8}", "", "orlop", "peer", "", "ratio", "budget");
    for verdict in &verdicts {
        eprintln!("{}", verdict.line());
    }
    let failed = document["failed"].as_object().map_or(0, Map::len);
    if failed > 0 {
        bail!(
            "{failed} of {} suites could not be run; \"failed\" in the document says why",
            request.suites.len()
        );
    }
    Ok(())
}

fn parse(arguments: &[String]) -> Result<Request> {
    let mut request = Request { settings: Settings::full(), output: None, suites: Vec::new() };
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--quick" => request.settings = Settings::quick(),
            "--output" => request.output = Some(rest.next().context(USAGE)?.into()),
            suite if SUITES.contains(&suite) => request.suites.push(suite.to_owned()),
            other => bail!("{other:?} is no suite and no option\n{USAGE}"),
        }
    }
    if request.suites.is_empty() {
        request.suites = SUITES.map(str::to_owned).to_vec();
    }
    Ok(request)
}

fn lab_id() -> String {
    format!("bench{}", std::process::id())
}

/// Runs the suites; a signal takes their lab away and ends everything.
fn interruptible(request: &Request) -> Result<(Value, Vec<Verdict>)> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    // Blocked before the first thread, so that only the one below takes them.
    signals.thread_block()?;
    let (sender, receiver) = std::sync::mpsc::channel();
    let from_signal = sender.clone();
    std::thread::spawn(move || from_signal.send(signals.wait().err().map(|e| Err(e.into()))));
    // Declared here so that it is put back on every way out.
    let _tunables = Tunables::remember();
    let (settings, suites) = (request.settings.clone(), request.suites.clone());
    std::thread::spawn(move || sender.send(Some(Ok(run(&settings, &suites)))));
    receiver.recv()?.unwrap_or_else(|| {
        lab::purge(&lab_id());
        bail!("stopped; the lab is taken away")
    })
}

/// One suite's failure keeps no other from running.
fn run(settings: &Settings, suites: &[String]) -> (Value, Vec<Verdict>) {
    let (mut figures, mut failed, mut loads) = (Map::new(), Map::new(), Map::new());
    let mut verdicts = Vec::new();
    for suite in suites {
        eprintln!("==> {suite}");
        let before = machine::load();
        let outcome = match suite.as_str() {
            "oci" => oci::run(&lab_id(), settings),
            "cri" => cri_suite::run(&lab_id(), settings),
            _ => node_suite::run(&lab_id(), settings),
        };
        loads.insert(suite.clone(), json!({"before": before, "after": machine::load()}));
        match outcome {
            Ok((value, of_suite)) => {
                figures.insert(suite.clone(), value);
                verdicts.extend(of_suite);
            }
            Err(error) => {
                eprintln!("{suite} failed: {error:#}");
                failed.insert(suite.clone(), json!(format!("{error:#}")));
            }
        }
    }
    let budgets: Vec<Value> = verdicts.iter().map(Verdict::to_json).collect();
    let document = json!({
        "versions": machine::versions(),
        "machine": machine::describe(),
        "load_1m": loads,
        "suites": figures,
        "budgets": budgets,
        "failed": failed,
    });
    (document, verdicts)
}
