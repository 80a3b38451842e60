//! After a node is stopped and purged nothing of ours is left: no process, mount, namespace, cgroup, interface, address
//! or rule.

use anyhow::{Context, Result, ensure};
use orlop_integration::cluster::{self, pod, service};
use orlop_integration::node::Node;
use orlop_integration::process::run;

/// What a node shows of itself, one text per kind of thing.
fn traces(node: &Node) -> Result<Vec<(&'static str, String)>> {
    let shell = |script: &str| -> Result<String> { run(node.command("sh")?.args(["-c", script])) };
    Ok(vec![
        // Namespaces pinned by other labs come and go while this one is looked at.
        ("mounts", shell("awk '{print $5}' /proc/self/mountinfo | grep -v ^/run/netns/ | sort")?),
        ("interfaces", shell("ip -o link | awk '{print $2}' | cut -d@ -f1 | sort")?),
        ("addresses", shell("ip -o address | awk '{print $2, $4}' | grep -v ' fe80' | sort")?),
        ("routes", shell("ip route | sort")?),
        ("rules", shell("nft list ruleset")?),
        (
            "namespaces and sandboxes",
            shell("find /run/orlop/sandboxes /run/orlop/bundles -mindepth 1 2>/dev/null || true")?,
        ),
        ("leases", shell("find /var/lib/orlop/network -type f 2>/dev/null | grep -v lock || true")?),
        ("pods' folders", shell("ls /var/lib/kubelet/pods 2>/dev/null || true")?),
        ("kubepods", shell("find /sys/fs/cgroup -mindepth 1 -name '*pod*' -type d")?),
    ])
}

#[test]
fn a_purged_node_leaves_nothing_behind() -> Result<()> {
    let mut lab = cluster::start("purge")?;
    let kubectl = lab.kubectl()?;
    kubectl.apply("apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: default, namespace: default}\n")?;
    kubectl.apply(&(pod("a", "node-a", "Always", "exec sleep 3600") + &service("a", "type: NodePort")))?;
    kubectl.apply(&pod("b", "node-a", "Always", "sleep 3600 & exec sleep 3600"))?;
    for name in ["a", "b"] {
        kubectl.run(&["wait", "--for=condition=Ready", &format!("pod/{name}"), "--timeout=60s"])?;
    }
    // A node that has nothing on it, with the same cables.
    let fresh = traces(lab.add_node("fresh")?)?;

    let node = lab.node("node-a")?;
    let used = traces(node)?;
    ensure!(
        used.iter().zip(&fresh).filter(|(a, b)| a != b).count() >= 6,
        "the test sees too little: {used:?}"
    );
    ensure!(node.stop_agent()?, "the agent had to be killed");
    let config = node.config_path().display().to_string();
    node.orlop(&["purge", "--config", &config])?;
    ensure!(node.keeper()?.stop(std::time::Duration::from_secs(5))?, "the keeper had to be killed");

    for ((kind, left), (_, clean)) in traces(node)?.iter().zip(&fresh) {
        let clean = clean.replace("10.90.0.13", node.address());
        ensure!(*left == clean, "{kind}: left is\n{left}\nclean is\n{clean}");
    }
    let processes = run(std::process::Command::new("ip").args(["netns", "pids", node.netns().name()]))?;
    let holder = node.holder_pid().context("the holder runs")?.to_string();
    ensure!(processes.split_whitespace().all(|pid| pid == holder), "processes are left: {processes}");
    Ok(())
}
