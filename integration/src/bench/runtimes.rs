//! The runtimes of the comparison, each on a machine of its own in the lab: orlop, and containerd with runc and the
//! reference CNI plugins.

use crate::bench::cri::Socket;
use crate::bench::processes;
use crate::image::Recipe;
use crate::lab::Lab;
use crate::node::Node;
use crate::peers::peer;
use crate::process::{Background, run};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

pub const IMAGE: &str = "localhost/bench:1";
const PAUSE: &str = "localhost/pause:1";
pub const ORLOP: &str = "orlop";
pub const CONTAINERD: &str = "containerd";

/// A runtime that answers on its socket.
#[derive(Debug)]
pub struct Runtime {
    pub name: &'static str,
    pub socket: Socket,
    cgroup: PathBuf,
    /// Ends with the value; orlop's own processes belong to their node.
    _process: Option<Background>,
}

impl Runtime {
    /// What the runtime's own processes hold right now.
    #[must_use]
    pub fn memory(&self) -> processes::Memory {
        processes::memory(&processes::of_runtime(&self.cgroup))
    }
}

/// Keeper and agent, standalone: the agent's CRI socket is the same that a stock kubelet would use.
pub async fn orlop(lab: &mut Lab) -> Result<Runtime> {
    let node = lab.add_node(ORLOP)?;
    let etc = node.folder().join("etc");
    let layout = etc.join("images/bench");
    std::fs::create_dir_all(&layout)?;
    Recipe::busybox(IMAGE).write_layout(&layout)?;
    let etc = etc.display();
    let config = format!(
        "nodeName: {ORLOP}\nruntime:\n  preloadDir: {etc}/images\nkubelet:\n  staticPodPath: {etc}/manifests\n  failSwapOn: false\n"
    );
    std::fs::create_dir_all(node.folder().join("etc/manifests"))?;
    std::fs::write(node.config_path(), config)?;
    node.start()?;
    let (path, logs) = (node.folder().join("run/orlop/cri.sock"), node.folder().join("var-log"));
    let socket = Socket::connect(&path, IMAGE, logs, || node.agent()?.check_alive()).await?;
    Ok(Runtime { name: ORLOP, socket, cgroup: node.cgroup().to_owned(), _process: None })
}

/// containerd as a node would run it.
pub async fn containerd(lab: &mut Lab) -> Result<Runtime> {
    let node = lab.add_node(CONTAINERD)?;
    let mut process = start_containerd(node, PodNetwork { subnet: "10.88.0.0/16" })?;
    let (path, logs) = (containerd_socket(node), node.folder().join("var-log"));
    import(node, "bench", Recipe::busybox(IMAGE))?;
    let socket = Socket::connect(&path, IMAGE, logs, || process.check_alive()).await?;
    Ok(Runtime { name: CONTAINERD, socket, cgroup: node.cgroup().to_owned(), _process: Some(process) })
}

#[must_use]
pub fn containerd_socket(node: &Node) -> PathBuf {
    node.folder().join("run/containerd/containerd.sock")
}

/// The addresses of a peer's pods.
#[derive(Debug, Clone, Copy)]
pub struct PodNetwork<'a> {
    pub subnet: &'a str,
}

/// Starts containerd on a node and gives it its sandbox image.
pub fn start_containerd(node: &Node, network: PodNetwork) -> Result<Background> {
    let etc = node.folder().join("etc");
    std::fs::create_dir_all(etc.join("net.d"))?;
    std::fs::write(etc.join("net.d/10-bench.conflist"), conflist(network))?;
    std::fs::write(etc.join("containerd.toml"), containerd_config(&etc, node.cgroup())?)?;
    let config = etc.join("containerd.toml").display().to_string();
    let mut process = node.service(&peer("containerd")?, CONTAINERD, &["--config", &config])?;
    crate::wait::until("containerd's socket", std::time::Duration::from_secs(30), || {
        process.check_alive()?;
        run(&mut ctr(node, &["version"])?)
    })?;
    import(node, "pause", pause())?;
    Ok(process)
}

/// What holds a sandbox's namespaces. busybox stands in for the usual program of a few lines.
fn pause() -> Recipe {
    Recipe {
        entrypoint: vec!["/bin/sleep".into(), "1000000000".into()],
        command: Vec::new(),
        ..Recipe::busybox(PAUSE)
    }
}

fn ctr(node: &Node, arguments: &[&str]) -> Result<Command> {
    let mut command = node.command(peer("ctr")?)?;
    command.args(["--address", "/run/containerd/containerd.sock", "--namespace", "k8s.io"]).args(arguments);
    Ok(command)
}

/// Makes an image and hands it to containerd as an archive.
pub fn import(node: &Node, name: &str, recipe: Recipe) -> Result<()> {
    let layout = node.folder().join("etc").join(name);
    std::fs::create_dir_all(&layout)?;
    recipe.write_layout(&layout)?;
    let archive = layout.with_extension("tar");
    let mut builder = tar::Builder::new(std::fs::File::create(&archive)?);
    builder.append_dir_all(".", &layout)?;
    builder.into_inner()?;
    let archive = archive.display().to_string();
    run(&mut ctr(node, &["images", "import", &archive])?).with_context(|| format!("import {archive}"))?;
    Ok(())
}

/// The bridge network of the reference plugins, as their documentation shows it.
fn conflist(network: PodNetwork) -> String {
    serde_json::json!({
        "cniVersion": "1.0.0",
        "name": "bench",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": true,
                "ipMasq": true,
                "hairpinMode": true,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": network.subnet}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
    .to_string()
}

fn containerd_config(etc: &Path, cgroup: &Path) -> Result<String> {
    let runc = peer("runc")?;
    for plugin in ["bridge", "host-local", "loopback", "portmap", "containerd-shim-runc-v2"] {
        peer(plugin)?;
    }
    let plugins = runc.parent().context("runc lies in a folder")?.display();
    let runtime = if limits_work(cgroup) { runc.clone() } else { without_limits(etc, &runc)? };
    Ok(format!(
        "version = 3\n\
         [plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = '{PAUSE}'\n\
         [plugins.'io.containerd.cri.v1.runtime']\nrestrict_oom_score_adj = true\n\
         [plugins.'io.containerd.cri.v1.runtime'.cni]\nbin_dirs = ['{plugins}']\nconf_dir = '{etc}/net.d'\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n\
         runtime_path = '{plugins}/containerd-shim-runc-v2'\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]\nBinaryName = '{runc}'\nSystemdCgroup = false\n",
        etc = etc.display(),
        runc = runtime.display(),
    ))
}

/// Whether a node's cgroup tree has the controllers that limits need.
#[must_use]
pub fn limits_work(cgroup: &Path) -> bool {
    let controllers = std::fs::read_to_string(cgroup.join("cgroup.controllers")).unwrap_or_default();
    controllers.split_whitespace().any(|name| name == "cpu")
}

/// containerd wants a CPU weight for every sandbox, and runc fails where the cgroup tree has no such controller. There
/// this stands between the two: it takes the limits out of `config.json` when a container is created, and becomes runc.
/// Shell and not a program of ours, because dash starts faster.
fn without_limits(etc: &Path, runc: &Path) -> Result<PathBuf> {
    let path = etc.join("runc-without-limits");
    let cut = ["cpu", "memory", "unified"]
        .map(|name| format!("s/\"{name}\":{{[^{{}}]*}}/\"{name}\":{{}}/g;"))
        .concat();
    let script = format!(
        "#!/bin/sh\nfor word; do [ \"$before\" = --bundle ] && bundle=$word; before=$word; done\n\
         [ -z \"$bundle\" ] || sed -i '{cut}' \"$bundle/config.json\"\nexec {} \"$@\"\n",
        runc.display()
    );
    std::fs::write(&path, script)?;
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(path)
}
