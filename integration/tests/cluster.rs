//! Two orlop nodes on the real control plane, one scenario after the other on one lab: starting it takes longer than
//! most of them.

use anyhow::{Context, Result, ensure};
use orlop_integration::cluster::{self, BUSYBOX, MINUTE, NODES, pod, pods_of, service, workload};
use orlop_integration::kubectl::Kubectl;
use orlop_integration::lab::Lab;
use orlop_integration::process::run;
use orlop_integration::wait;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::time::{Duration, Instant};

#[test]
fn two_nodes_run_what_the_control_plane_asks_for() -> Result<()> {
    let mut lab = cluster::start("run")?;
    let kubectl = lab.kubectl()?;
    kubectl.apply("apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: default, namespace: default}\n")?;
    a_deployment_spreads_and_its_service_answers_across_nodes(&mut lab, &kubectl)?;
    people_reach_into_pods(&kubectl)?;
    workloads_of_every_kind_run(&kubectl)?;
    a_pod_is_deleted_with_grace(&kubectl)?;
    a_crash_of_the_agent_goes_unnoticed(&mut lab, &kubectl)?;
    Ok(())
}

fn a_deployment_spreads_and_its_service_answers_across_nodes(lab: &mut Lab, kubectl: &Kubectl) -> Result<()> {
    let manifest = workload("Deployment", "web", "replicas: 4", "1") + &service("web", "type: NodePort");
    kubectl.apply(&manifest)?;
    kubectl.run(&["rollout", "status", "deployment/web", "--timeout=60s"])?;
    let pods = pods_of(kubectl, "web")?;
    let nodes: BTreeSet<&str> = pods.iter().filter_map(|p| p["spec"]["nodeName"].as_str()).collect();
    ensure!(nodes.len() == 2, "all replicas on {nodes:?}");

    // A client on node A and endpoints on node B only.
    kubectl.apply(
        &(pod("far", "node-b", "Always", "exec httpd -f -p 8080 -h /etc")
            + &service("far", "type: ClusterIP")),
    )?;
    kubectl.apply(&pod("client", "node-a", "Always", "exec sleep 3600"))?;
    for name in ["far", "client"] {
        kubectl.run(&["wait", "--for=condition=Ready", &format!("pod/{name}"), "--timeout=60s"])?;
    }
    let address = kubectl.field(&["service", "far"], "{.spec.clusterIP}")?;
    // Not wget: that of a statically linked busybox dies where it looks names up.
    let ask = format!("printf 'GET /passwd HTTP/1.0\\r\\n\\r\\n' | nc -w 2 {address} 80");
    wait::until("a pod on node A reaches the service on node B", MINUTE, || {
        let answer = kubectl.run(&["exec", "client", "--", "sh", "-c", &ask])?;
        ensure!(answer.contains("root:x:0:0"), "answered {answer:?}");
        Ok(())
    })?;

    let port = kubectl.field(&["service", "web"], "{.spec.ports[0].nodePort}")?;
    for name in NODES {
        let url = format!("http://{}:{port}/", lab.node(name)?.address());
        let answer = wait::until("a node port answers from outside", MINUTE, || {
            run(lab.hub().command("curl").args(["-sS", "--fail", "--max-time", "2", &url]))
        })?;
        ensure!(answer.contains("Hello from pod web-"), "{answer}");
    }

    kubectl.apply(&workload("Deployment", "web", "replicas: 4", "2"))?;
    kubectl.run(&["rollout", "status", "deployment/web", "--timeout=90s"])?;
    wait::until("only the new replicas are left", MINUTE, || {
        let pods = pods_of(kubectl, "web")?;
        let new = pods.iter().all(|p| p["spec"]["containers"][0]["env"][0]["value"] == "2");
        ensure!(pods.len() == 4 && new, "{} pods, all new: {new}", pods.len());
        Ok(())
    })
}

fn people_reach_into_pods(kubectl: &Kubectl) -> Result<()> {
    kubectl.apply(&pod(
        "shell",
        "node-b",
        "Always",
        "i=0; while true; do echo line $i; i=$((i+1)); sleep 0.1; done",
    ))?;
    kubectl.run(&["wait", "--for=condition=Ready", "pod/shell", "--timeout=60s"])?;

    let mut follow = kubectl.command(&["logs", "-f", "shell"]).stdout(Stdio::piped()).spawn()?;
    let lines = BufReader::new(follow.stdout.take().context("logs has an output")?).lines();
    let followed: Vec<String> = lines.take(30).collect::<std::io::Result<_>>()?;
    follow.kill()?;
    follow.wait()?;
    let expected: Vec<String> = (0..30).map(|i| format!("line {i}")).collect();
    ensure!(followed == expected, "{followed:?}");
    ensure!(kubectl.run(&["logs", "shell", "--tail=1", "--timestamps"])?.contains("Z line "));

    ensure!(kubectl.run(&["exec", "shell", "--", "echo", "hello"])? == "hello\n");
    let failed = kubectl
        .run(&["exec", "shell", "--", "sh", "-c", "exit 7"])
        .err()
        .map(|e| e.to_string())
        .unwrap_or_default();
    ensure!(failed.contains("exit code 7"), "{failed}");
    let killed = kubectl.run(&["exec", "shell", "--", "sh", "-c", "kill -9 $$"]).err();
    ensure!(killed.is_some_and(|e| e.to_string().contains("exit code 137")), "a killed command must tell so");
    let upper = kubectl.feed(&["exec", "-i", "shell", "--", "sh", "-c", "tr a-z A-Z || cat"], "abc")?;
    ensure!(upper.to_uppercase() == "ABC", "{upper:?}");
    let tty =
        kubectl.feed(&["exec", "-i", "shell", "--", "sh", "-c", "test -t 0 && echo tty || echo none"], "")?;
    ensure!(tty.trim() == "none", "{tty:?}");
    let script = format!(
        "{:?}",
        kubectl.command(&["exec", "-it", "shell", "--", "sh", "-c", "test -t 0 && echo a terminal"])
    );
    let terminal =
        run(std::process::Command::new("script").args(["-qec", &script.replace('"', "'"), "/dev/null"]))?;
    ensure!(terminal.contains("a terminal"), "{terminal:?}");

    let folder = tempfile::tempdir()?;
    let file = folder.path().join("blob");
    let content: Vec<u8> = (0..300_000u32).map(|i| u8::try_from(i % 251).unwrap_or(0)).collect();
    std::fs::write(&file, &content)?;
    let path = file.display().to_string();
    kubectl.run(&["cp", &path, "shell:/tmp/blob"])?;
    let back = folder.path().join("back");
    kubectl.run(&["cp", "shell:/tmp/blob", &back.display().to_string()])?;
    ensure!(std::fs::read(&back)? == content, "what came back is not what was sent");

    let described = kubectl.run(&["describe", "pod", "shell"])?;
    for part in ["Started", "Pulled", "Container started"] {
        ensure!(described.contains(part), "describe lacks {part}:\n{described}");
    }
    port_forward(kubectl)
}

fn port_forward(kubectl: &Kubectl) -> Result<()> {
    let name =
        pods_of(kubectl, "web")?[0]["metadata"]["name"].as_str().context("a pod has a name")?.to_owned();
    let mut command = kubectl.command(&["port-forward", &name, "18080:8080"]);
    let mut forward = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut output = BufReader::new(forward.stdout.take().context("port-forward has an output")?);
    let mut line = String::new();
    output.read_line(&mut line)?;
    let answer = wait::until("the forwarded port answers", Duration::from_secs(20), || {
        let mut curl = std::process::Command::new("nsenter");
        let netns = command.get_args().next().context("kubectl runs in a namespace")?;
        run(curl.arg(netns).args([
            "--",
            "curl",
            "-sS",
            "--fail",
            "--max-time",
            "3",
            "http://127.0.0.1:18080/",
        ]))
    });
    forward.kill()?;
    forward.wait()?;
    let mut errors = String::new();
    forward.stderr.take().context("port-forward has errors")?.read_to_string(&mut errors)?;
    let answer = answer.with_context(|| format!("{line}{errors}"))?;
    ensure!(answer.contains("Hello from pod"), "{answer}");
    Ok(())
}

fn workloads_of_every_kind_run(kubectl: &Kubectl) -> Result<()> {
    kubectl.apply(&workload("DaemonSet", "each", "minReadySeconds: 0", "1"))?;
    kubectl.run(&["rollout", "status", "daemonset/each", "--timeout=60s"])?;
    ensure!(pods_of(kubectl, "each")?.len() == 2, "a daemon on each node");

    kubectl.apply(
        &(workload("StatefulSet", "db", "replicas: 2\n  serviceName: db", "1")
            + &service("db", "clusterIP: None")),
    )?;
    kubectl.run(&["rollout", "status", "statefulset/db", "--timeout=90s"])?;
    let before = kubectl.field(&["pod", "db-1"], "{.metadata.uid}")?;
    kubectl.run(&["delete", "pod", "db-1", "--wait=true"])?;
    wait::until("db-1 is back under its name", MINUTE, || {
        let uid = kubectl.field(&["pod", "db-1"], "{.metadata.uid}")?;
        ensure!(uid != before, "still the old one");
        Ok(())
    })?;
    kubectl.run(&["wait", "--for=condition=Ready", "pod/db-1", "--timeout=60s"])?;

    kubectl.apply(&format!(
        "apiVersion: batch/v1\nkind: Job\nmetadata: {{name: count}}\nspec:\n  completions: 3\n  parallelism: 2\n  template:\n    spec:\n      \
         restartPolicy: Never\n      containers:\n      - {{name: main, image: {BUSYBOX}, imagePullPolicy: Never, command: [sh, -c, \"echo done; exit 0\"]}}\n"
    ))?;
    kubectl.run(&["wait", "--for=condition=Complete", "job/count", "--timeout=90s"])?;
    Ok(())
}

fn a_pod_is_deleted_with_grace(kubectl: &Kubectl) -> Result<()> {
    let script = "trap \"echo asked to go; sleep 1; exit 0\" TERM; echo up; while true; do sleep 0.1; done";
    kubectl.apply(&pod("polite", "node-a", "Always", script))?;
    kubectl.run(&["wait", "--for=condition=Ready", "pod/polite", "--timeout=60s"])?;
    let mut follow = kubectl.command(&["logs", "-f", "polite"]).stdout(Stdio::piped()).spawn()?;
    let start = Instant::now();
    kubectl.run(&["delete", "pod", "polite", "--wait=true"])?;
    let took = start.elapsed();
    let mut log = String::new();
    follow.stdout.take().context("logs has an output")?.read_to_string(&mut log)?;
    follow.wait()?;
    ensure!(log.contains("asked to go"), "SIGTERM did not reach the container: {log:?}");
    ensure!(took > Duration::from_secs(1) && took < Duration::from_secs(5), "deleted after {took:?}");
    Ok(())
}

fn a_crash_of_the_agent_goes_unnoticed(lab: &mut Lab, kubectl: &Kubectl) -> Result<()> {
    kubectl.apply(&pod(
        "counter",
        "node-a",
        "Always",
        "i=0; while true; do echo n $i; i=$((i+1)); usleep 2000; done",
    ))?;
    kubectl.apply(&pod("exits", "node-a", "Never", "sleep 4; echo last words; exit 42"))?;
    kubectl.run(&["wait", "--for=condition=Ready", "pod/counter", "pod/exits", "--timeout=60s"])?;
    let transition = "{.status.conditions[?(@.type==\"Ready\")].lastTransitionTime}";
    let pods =
        kubectl.json(&["get", "pods", "--field-selector=spec.nodeName=node-a,status.phase=Running"])?;
    let names: Vec<String> = pods["items"]
        .as_array()
        .context("a list has items")?
        .iter()
        .filter_map(|p| p["metadata"]["name"].as_str().map(str::to_owned))
        .collect();
    let seen = |kubectl: &Kubectl| -> Result<Vec<String>> {
        names
            .iter()
            .filter(|n| *n != "exits")
            .map(|n| kubectl.field(&["pod", n], &format!("{transition} {{.status.containerStatuses[0].restartCount}} {{.status.containerStatuses[0].containerID}}")))
            .collect()
    };
    let node_before = kubectl.field(&["node", "node-a"], transition)?;
    let before = seen(kubectl)?;
    lab.node("node-a")?.crash_agent()?;
    // The container that exits does so while nobody but the keeper is there.
    std::thread::sleep(Duration::from_secs(6));
    let start = Instant::now();
    lab.node("node-a")?.start_agent()?;
    wait::until("the kubelet API is back", Duration::from_secs(2), || {
        lab.node("node-a")?.agent()?.check_alive()?;
        kubectl.run(&["logs", "counter", "--tail=1"])
    })?;
    println!("back after {:?}", start.elapsed());
    wait::until("the exit code that nobody saw arrives", Duration::from_secs(10), || {
        let code =
            kubectl.field(&["pod", "exits"], "{.status.containerStatuses[0].state.terminated.exitCode}")?;
        ensure!(code == "42", "exit code {code:?}");
        Ok(())
    })?;
    ensure!(kubectl.run(&["logs", "exits"])? == "last words\n");
    std::thread::sleep(Duration::from_secs(3));
    ensure!(
        seen(kubectl)? == before,
        "something restarted or flipped: {before:?} became {:?}",
        seen(kubectl)?
    );
    ensure!(kubectl.field(&["node", "node-a"], transition)? == node_before, "the node flipped");
    let log = kubectl.run(&["logs", "counter"])?;
    let numbers: Vec<u64> = log.lines().filter_map(|l| l.strip_prefix("n ")?.parse().ok()).collect();
    ensure!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "a log line is missing or doubled");
    ensure!(numbers.len() > 1000, "only {} lines", numbers.len());
    Ok(())
}
