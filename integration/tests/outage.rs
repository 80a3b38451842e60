//! The API server is gone for two minutes: pods go on and are restarted by policy, and all converges when it returns.

use anyhow::{Result, ensure};
use orlop_integration::cluster::{self, MINUTE, pod};
use orlop_integration::wait;
use std::time::Duration;

const OUTAGE: Duration = Duration::from_secs(120);

#[test]
fn two_minutes_without_an_api_server_change_nothing_for_pods() -> Result<()> {
    let mut lab = cluster::start("out")?;
    let kubectl = lab.kubectl()?;
    kubectl.apply("apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: default, namespace: default}\n")?;
    kubectl.apply(&pod("steady", "node-a", "Always", "exec sleep 3600"))?;
    kubectl.apply(&pod("flaky", "node-a", "Always", "echo up; sleep 50; exit 1"))?;
    kubectl.apply(&pod("ends", "node-b", "Never", "sleep 60; exit 3"))?;
    for name in ["steady", "flaky", "ends"] {
        kubectl.run(&["wait", "--for=condition=Ready", &format!("pod/{name}"), "--timeout=60s"])?;
    }
    let container = "{.status.containerStatuses[0].containerID}";
    let steady = kubectl.field(&["pod", "steady"], container)?;

    lab.stop_api_server()?;
    // Half way through, the container that crashes must have been restarted with nobody to report to.
    std::thread::sleep(OUTAGE / 2 + Duration::from_secs(10));
    let running = lab.node("node-a")?.orlop(&["ps"])?;
    ensure!(
        running.contains("steady") && running.contains("flaky"),
        "not all run without the API server:\n{running}"
    );
    std::thread::sleep(OUTAGE / 2 - Duration::from_secs(10));
    lab.start_api_server()?;

    for name in cluster::NODES {
        cluster::wait_ready(&mut lab, name)?;
    }
    ensure!(kubectl.field(&["pod", "steady"], container)? == steady, "the steady pod was restarted");
    wait::until("the end that nobody could be told of is told", MINUTE, || {
        let code =
            kubectl.field(&["pod", "ends"], "{.status.containerStatuses[0].state.terminated.exitCode}")?;
        ensure!(code == "3", "exit code {code:?}");
        Ok(())
    })?;
    wait::until("the restarts of the outage are counted", MINUTE, || {
        let count = kubectl.field(&["pod", "flaky"], "{.status.containerStatuses[0].restartCount}")?;
        ensure!(count.parse::<u32>().is_ok_and(|c| c >= 1), "restart count {count:?}");
        Ok(())
    })?;
    // New work is taken on again.
    kubectl.apply(&pod("after", "node-b", "Always", "exec sleep 3600"))?;
    kubectl.run(&["wait", "--for=condition=Ready", "pod/after", "--timeout=30s"])?;
    Ok(())
}
