//! The lab from the command line: what `integration/up`, `integration/node` and `integration/test` call.

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};
use orlop_integration::image::Recipe;
use orlop_integration::lab::{self, Lab};
use orlop_integration::node::Node;
use orlop_integration::peers::ours;
use orlop_integration::process::run;
use orlop_integration::wait;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// The lab that `up` makes; there is one at a time.
const UP: &str = "up";
const DEMO_IMAGE: &str = "localhost/orlop-demo:latest";

const DEMO_POD: &str = r#"apiVersion: v1
kind: Pod
metadata:
  name: hello
spec:
  containers:
  - name: web
    image: localhost/orlop-demo:latest
    imagePullPolicy: Never
    ports:
    - containerPort: 8080
    readinessProbe:
      httpGet: {path: /, port: 8080}
      periodSeconds: 1
"#;

const DEMO_DEPLOYMENT: &str = r#"apiVersion: apps/v1
kind: Deployment
metadata: {name: hello}
spec:
  replicas: 4
  selector: {matchLabels: {app: hello}}
  template:
    metadata: {labels: {app: hello}}
    spec:
      automountServiceAccountToken: false
      containers:
      - name: web
        image: localhost/orlop-demo:latest
        imagePullPolicy: Never
        readinessProbe:
          httpGet: {path: /, port: 8080}
          periodSeconds: 1
---
apiVersion: v1
kind: Service
metadata: {name: hello}
spec:
  type: NodePort
  selector: {app: hello}
  ports:
  - {port: 80, targetPort: 8080, nodePort: 30080}
"#;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["sweep"] => {
            lab::sweep();
            Ok(())
        }
        ["up"] => up(standalone),
        ["up", "--cluster"] => up(cluster),
        ["on", node, command @ ..] if !command.is_empty() => on(node, command),
        _ => bail!("usage: orlop-lab up [--cluster] | on NODE COMMAND… | sweep"),
    }
}

/// Builds a lab, says what is there and waits for Ctrl-C; whatever happens, nothing is left behind.
fn up(build: fn(&mut Lab) -> Result<()>) -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    // Blocked before the first thread, and taken by a thread of its own below, so that Ctrl-C also ends a build.
    signals.thread_block()?;
    let (sender, receiver) = std::sync::mpsc::channel();
    let from_signal = sender.clone();
    std::thread::spawn(move || from_signal.send(signals.wait().map(|_| None).map_err(anyhow::Error::from)));
    std::thread::spawn(move || {
        let built = Lab::create(UP).and_then(|mut lab| build(&mut lab).map(|()| Some(Box::new(lab))));
        sender.send(built)
    });
    let Some(lab) = receiver.recv()?? else {
        lab::purge(UP);
        bail!("stopped before everything was up");
    };
    println!("\nCtrl-C takes everything away again.");
    receiver.recv()??;
    println!("\ncleaning up");
    drop(lab);
    Ok(())
}

fn say(text: &str) {
    println!("==> {text}");
}

fn standalone(lab: &mut Lab) -> Result<()> {
    say("a machine of its own: network, mount and cgroup namespace");
    let node = lab.add_node("node-a")?;
    write_demo_image(&node.folder().join("etc/images"))?;
    let manifests = node.folder().join("etc/manifests");
    std::fs::create_dir_all(&manifests)?;
    std::fs::write(manifests.join("hello.yaml"), DEMO_POD)?;
    let config = format!(
        "nodeName: node-a\nruntime:\n  preloadDir: {etc}/images\nkubelet:\n  staticPodPath: {etc}/manifests\n  failSwapOn: false\n",
        etc = node.folder().join("etc").display()
    );
    std::fs::write(node.config_path(), config)?;
    say("starting orlop-keeper and orlop node: no API server, no registry");
    node.start()?;
    let address = wait::until("the pod hello has an address", Duration::from_secs(60), || {
        node.agent()?.check_alive()?;
        pod_address(node, "hello")
    })?;
    say(&format!("pod hello runs at {address}; asking it"));
    let answer = wait::until("the pod answers", Duration::from_secs(30), || {
        request(node, &format!("http://{address}:8080/"))
    })?;
    println!("    {}", answer.trim());
    println!("\nTry next, in another terminal:");
    for example in ["orlop pods", "orlop ps", "orlop logs -f hello", "orlop exec hello -- /orlop --version"] {
        println!("    sudo ./integration/node node-a {example}");
    }
    println!("and edit or add manifests in {}", manifests.display());
    Ok(())
}

fn cluster(lab: &mut Lab) -> Result<()> {
    say("etcd, kube-apiserver, kube-controller-manager and kube-scheduler");
    lab.start_control_plane()?;
    for name in ["node-a", "node-b"] {
        say(&format!("{name} joins with a bootstrap token"));
        let images = lab.folder().join(name).join("etc/images");
        write_demo_image(&images)?;
        lab.join_node(name)?;
    }
    let kubectl = lab.kubectl()?;
    for name in ["node-a", "node-b"] {
        let ready = "{.status.conditions[?(@.type==\"Ready\")].status}";
        wait::until("the node is Ready", Duration::from_secs(60), || {
            lab.node(name)?.agent()?.check_alive()?;
            match kubectl.field(&["node", name], ready)?.as_str() {
                "True" => Ok(()),
                other => bail!("{name} Ready is {other:?}"),
            }
        })?;
    }
    say("a deployment of four replicas and a service on node port 30080");
    kubectl.apply(DEMO_DEPLOYMENT)?;
    kubectl.run(&["rollout", "status", "deployment/hello", "--timeout=120s"])?;
    println!("{}", kubectl.run(&["get", "nodes,pods,services", "-o", "wide"])?);
    let url = format!("http://{}:30080/", lab.node("node-a")?.address());
    let answer = wait::until("the node port answers", Duration::from_secs(30), || {
        run(lab.hub().command("curl").args(["-sS", "--fail", "--max-time", "2", &url]))
    })?;
    say(&format!("{url} answers: {}", answer.trim()));
    println!("\nTry next, in another terminal:");
    let kubeconfig = lab.control_plane()?.admin_kubeconfig();
    println!(
        "    sudo nsenter --net={} target/peers/kubectl --kubeconfig {} get pods -A -o wide",
        lab.hub().path().display(),
        kubeconfig.display()
    );
    println!("    sudo ./integration/node node-b orlop ps");
    Ok(())
}

fn write_demo_image(folder: &Path) -> Result<()> {
    say("an image made of our own program");
    let layout = folder.join("orlop-demo");
    std::fs::create_dir_all(&layout)?;
    Recipe::demo(DEMO_IMAGE, &ours("orlop")?).write_layout(&layout)
}

/// The address of a running pod, as `orlop pods` shows it.
fn pod_address(node: &Node, name: &str) -> Result<String> {
    let table = node.orlop(&["pods"])?;
    let row = table.lines().map(|l| l.split_whitespace().collect::<Vec<_>>()).find(|cells| {
        cells.get(2).is_some_and(|pod| pod.starts_with(name))
            && cells.get(4).is_some_and(|running| running.starts_with("1/"))
    });
    Ok(row.with_context(|| format!("no running pod {name} in:\n{table}"))?[3].to_owned())
}

fn request(node: &Node, url: &str) -> Result<String> {
    run(node.command("curl")?.args(["-sS", "--fail", "--max-time", "2", url]))
}

/// Runs a command on a node of the lab that `up` made.
fn on(node: &str, command: &[&str]) -> Result<()> {
    use std::os::unix::process::CommandExt;
    let netns = format!("/run/netns/orlop-{UP}-{node}");
    if !Path::new(&netns).exists() {
        bail!("no node called {node} is up; `sudo ./integration/up` makes node-a");
    }
    let pids = run(Command::new("ip").args(["netns", "pids", &format!("orlop-{UP}-{node}")]))?;
    let holder = pids
        .split_whitespace()
        .find(|pid| {
            std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == "sleep")
        })
        .context("the node's namespaces are gone")?;
    let program = if command[0].starts_with("orlop") { ours(command[0])? } else { command[0].into() };
    let mut enter = Command::new("nsenter");
    enter.args(["--target", holder, "--mount", "--net", "--cgroup", "--"]).arg(program).args(&command[1..]);
    Err(enter.exec()).context("run nsenter")
}
