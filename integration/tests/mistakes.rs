//! What people get wrong, and what the machine lacks: each gets a message that names the thing, the cause and the remedy,
//! and the node goes on where others are not concerned.

use anyhow::{Result, ensure};
use orlop_integration::cluster::{BUSYBOX, MINUTE};
use orlop_integration::image::Recipe;
use orlop_integration::lab::Lab;
use orlop_integration::node::Node;
use orlop_integration::peers::ours;
use orlop_integration::pki::{Authority, token_kubeconfig};
use orlop_integration::process::{run, tail};
use orlop_integration::wait;
use std::time::Duration;

fn agent_log(node: &Node) -> String {
    std::fs::read_to_string(node.folder().join("agent.log")).unwrap_or_default()
}

/// Waits until the agent has said all of these words in one line.
fn wait_said(node: &Node, words: &[&str]) -> Result<()> {
    wait::until(&format!("the agent says {words:?}"), MINUTE, || {
        let log = agent_log(node);
        let said = log.lines().any(|line| words.iter().all(|word| line.contains(word)));
        ensure!(said, "the log ends with:\n{}", tail(&node.folder().join("agent.log"), 5));
        Ok(())
    })
}

/// Runs `orlop node` to its end and returns what it said on the way out.
fn refusal(node: &Node, config: &str) -> Result<String> {
    std::fs::write(node.config_path(), config)?;
    let mut command = node.command("timeout")?;
    command.env("ORLOP_MISSING_CONTROLLERS", "warn").arg("20").arg(ours("orlop")?);
    command.args(["node", "--config", &node.config_path().display().to_string()]);
    let output = command.output()?;
    ensure!(!output.status.success(), "it started:\n{}", String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.code() != Some(124), "it hung:\n{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stderr).into_owned())
}

fn expect(text: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(text.contains(word), "{word:?} is missing in:\n{text}");
    }
    Ok(())
}

#[test]
fn a_node_that_cannot_start_says_why_and_what_to_do() -> Result<()> {
    let mut lab = Lab::create(&format!("no{}", std::process::id()))?;
    let node = lab.add_node("node-a")?;
    expect(&refusal(node, "nodeName: a\n")?, &["keeper", "/run/orlop/keeper.sock", "orlop-keeper.service"])?;

    node.start_keeper()?;
    let etc = node.folder().join("etc").display().to_string();
    let kubeconfig = format!("{etc}/kubeconfig");
    let with_kubeconfig = format!("nodeName: a\nkubeconfig: {kubeconfig}\n");
    expect(&refusal(node, &with_kubeconfig)?, &[&kubeconfig, "does not exist"])?;
    std::fs::write(&kubeconfig, "clusters: [\n")?;
    expect(&refusal(node, &with_kubeconfig)?, &[&kubeconfig])?;
    std::fs::write(&kubeconfig, "apiVersion: v1\nkind: Config\ncurrent-context: missing\n")?;
    expect(&refusal(node, &with_kubeconfig)?, &[&kubeconfig, "missing"])?;

    expect(&refusal(node, "kubelet: {clusterDNS: [nonsense], maxPods: -4}\n")?, &["clusterDNS", "maxPods"])?;
    expect(&refusal(node, "kubelet: {maxPodz: 4}\n")?, &["maxPodz"])?;
    let authority = format!("kubelet: {{authentication: {{x509: {{clientCAFile: {etc}/none.crt}}}}}}\n");
    expect(&refusal(node, &authority)?, &["none.crt", "clientCAFile"])?;
    Ok(())
}

#[test]
fn a_missing_controller_is_named_with_a_remedy() -> Result<()> {
    let mut lab = Lab::create(&format!("ctl{}", std::process::id()))?;
    let node = lab.add_node("node-a")?;
    node.start_keeper()?;
    std::fs::write(node.config_path(), "nodeName: a\nruntime: {missingControllers: refuse}\n")?;
    let config = node.config_path().display().to_string();
    let controllers = run(node.command("cat")?.arg("/sys/fs/cgroup/cgroup.controllers"))?;
    let all_there =
        ["cpu", "memory", "pids"].iter().all(|name| controllers.split_whitespace().any(|c| c == *name));
    ensure!(!all_there, "this test needs a cgroup v2 tree that lacks controllers; here are {controllers}");
    let output = node.command(ours("orlop")?)?.args(["node", "--config", &config]).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "{said}");
    expect(&said, &["/sys/fs/cgroup", "memory", "ORLOP_MISSING_CONTROLLERS=warn"])?;
    let check = node.command(ours("orlop")?)?.args(["check", "--config", &config]).output()?;
    expect(&String::from_utf8_lossy(&check.stdout), &["FAILED", "memory", "cgroup_no_v1=memory"])?;
    Ok(())
}

#[test]
fn one_bad_pod_or_image_does_not_concern_the_others() -> Result<()> {
    let mut lab = Lab::create(&format!("bad{}", std::process::id()))?;
    let node = lab.add_node("node-a")?;
    let etc = node.folder().join("etc");
    std::fs::create_dir_all(etc.join("images/busybox"))?;
    Recipe::busybox(BUSYBOX).write_layout(&etc.join("images/busybox"))?;
    std::fs::write(etc.join("images/rubbish.tar"), b"this is no archive")?;
    let manifests = etc.join("manifests");
    std::fs::create_dir_all(&manifests)?;
    let pod = |name: &str, image: &str, policy: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  containers:\n  - {{name: main, image: '{image}', \
             imagePullPolicy: {policy}, command: [sleep, '3600']}}\n"
        )
    };
    std::fs::write(manifests.join("good.yaml"), pod("good", BUSYBOX, "Never"))?;
    std::fs::write(manifests.join("broken.yaml"), "apiVersion: v1\nkind: Pod\nmetadata: {name: [\n")?;
    std::fs::write(
        manifests.join("nameless.yaml"),
        "apiVersion: v1\nkind: Pod\nmetadata: {}\nspec: {containers: []}\n",
    )?;
    std::fs::write(manifests.join("absent.yaml"), pod("absent", "localhost/absent:1", "Never"))?;
    std::fs::write(manifests.join("unreachable.yaml"), pod("unreachable", "127.0.0.1:9/x:1", "Always"))?;
    std::fs::write(manifests.join("invalid.yaml"), pod("invalid", "UPPER CASE", "Always"))?;
    let config = format!(
        "nodeName: node-a\nruntime: {{preloadDir: {etc}/images}}\nkubelet: {{staticPodPath: {etc}/manifests}}\n",
        etc = etc.display()
    );
    std::fs::write(node.config_path(), config)?;
    node.start()?;
    wait_said(node, &["rubbish.tar"])?;
    wait_said(node, &["broken.yaml"])?;
    wait_said(node, &["nameless.yaml"])?;
    wait_said(node, &["absent-node-a", "ErrImageNeverPull"])?;
    wait_said(node, &["unreachable-node-a", "127.0.0.1:9", "connection refused"])?;
    wait_said(node, &["invalid-node-a", "InvalidImageName"])?;
    wait::until("the good pod runs", MINUTE, || {
        let table = node.orlop(&["ps"])?;
        ensure!(table.contains("good-node-a"), "{table}");
        Ok(())
    })?;
    node.agent()?.check_alive()
}

#[test]
fn a_wrong_authority_and_a_dead_token_are_told_apart_and_waited_out() -> Result<()> {
    let mut lab = Lab::create(&format!("id{}", std::process::id()))?;
    let server = {
        let plane = lab.start_control_plane()?;
        (plane.server().to_owned(), plane.authority().certificate_pem())
    };
    let folder = lab.folder().to_owned();
    let node = lab.add_node("node-a")?;
    let etc = node.folder().join("etc");
    let bootstrap = etc.join("bootstrap.kubeconfig");
    let config = format!(
        "nodeName: node-a\nkubeconfig: /var/lib/kubelet/kubeconfig\nbootstrapKubeconfig: {}\n",
        bootstrap.display()
    );
    std::fs::write(node.config_path(), config)?;
    let stranger = Authority::create(&folder.join("stranger"))?;
    token_kubeconfig(&bootstrap, &server.0, &stranger.certificate_pem(), "abcdef.0123456789abcdef")?;
    node.start()?;
    wait_said(node, &["certificate", "another key signed it", "certificate-authority"])?;
    node.agent()?.check_alive()?;
    token_kubeconfig(&bootstrap, &server.0, &server.1, "abcdef.fedcba9876543210")?;
    wait_said(node, &["401"])?;
    // Put right, without a restart.
    token_kubeconfig(&bootstrap, &server.0, &server.1, "abcdef.0123456789abcdef")?;
    lab.control_plane()?;
    let kubectl = lab.kubectl()?;
    wait::until("the node joins once the token is right", MINUTE, || kubectl.run(&["get", "node", "node-a"]))
        .map(drop)
}

#[test]
fn a_full_disk_stops_what_needs_it_and_nothing_else() -> Result<()> {
    let mut lab = Lab::create(&format!("full{}", std::process::id()))?;
    let node = lab.add_node("node-a")?;
    let etc = node.folder().join("etc");
    std::fs::create_dir_all(etc.join("images/busybox"))?;
    Recipe::busybox(BUSYBOX).write_layout(&etc.join("images/busybox"))?;
    std::fs::create_dir_all(etc.join("manifests"))?;
    // The node's state on a small file system of its own.
    run(node
        .command("sh")?
        .args(["-c", "mkdir -p /var/lib/orlop && mount -t tmpfs -o size=16m tmpfs /var/lib/orlop"]))?;
    let manifest = |name: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  containers:\n  - {{name: main, image: '{BUSYBOX}', \
             imagePullPolicy: Never, command: [sh, -c, 'while true; do echo alive; sleep 1; done']}}\n"
        )
    };
    std::fs::write(etc.join("manifests/first.yaml"), manifest("first"))?;
    let config = format!(
        "nodeName: node-a\nruntime: {{preloadDir: {etc}/images}}\nkubelet: {{staticPodPath: {etc}/manifests}}\n",
        etc = etc.display()
    );
    std::fs::write(node.config_path(), config)?;
    node.start()?;
    let running = |node: &Node, name: &str| -> Result<()> {
        let table = node.orlop(&["ps"])?;
        ensure!(table.contains(name), "{table}");
        Ok(())
    };
    wait::until("the first pod runs", MINUTE, || running(node, "first-node-a"))?;
    // dd ends with an error when nothing is left; that is what is wanted.
    let fill = "dd if=/dev/zero of=/var/lib/orlop/filler bs=64k; test -e /var/lib/orlop/filler";
    run(node.command("sh")?.args(["-c", fill]))?;
    std::fs::write(etc.join("manifests/second.yaml"), manifest("second"))?;
    wait_said(node, &["second-node-a", "No space left"])?;
    running(node, "first-node-a")?;
    node.agent()?.check_alive()?;
    run(node.command("rm")?.arg("/var/lib/orlop/filler"))?;
    wait::until("the second pod runs once there is room", Duration::from_secs(90), || {
        running(node, "second-node-a")
    })
}
