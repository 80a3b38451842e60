//! The lab: a hub with a bridge, the control plane in it, and nodes around it.
//!
//! ```text
//!   netns orlop-<id>-hub                      netns orlop-<id>-node-a
//!   lab0 10.90.0.1/24 ── veth ────────────── eth0 10.90.0.11/24
//!   control plane, kubectl, registry    └──── eth0 10.90.0.12/24   netns orlop-<id>-node-b
//! ```

use crate::control_plane::ControlPlane;
use crate::kubectl::Kubectl;
use crate::netns::{self, Netns};
use crate::node::{Node, remove_cgroup};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

const HUB_ADDRESS: &str = "10.90.0.1";

/// Everything of one lab. Dropping it leaves nothing behind but, on request, its folder.
#[derive(Debug)]
pub struct Lab {
    id: String,
    folder: PathBuf,
    keep_folder: bool,
    nodes: Vec<Node>,
    control_plane: Option<ControlPlane>,
    hub: Netns,
}

impl Lab {
    /// A lab without control plane and nodes. What an earlier lab of this name left is removed first.
    pub fn create(id: &str) -> Result<Self> {
        let folder = folder_of(id);
        purge(id);
        std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        std::fs::write(folder.join("owner"), std::process::id().to_string())?;
        let hub = Netns::create(&format!("orlop-{id}-hub"))?;
        hub.ip(&["link", "add", "lab0", "type", "bridge"])?;
        hub.ip(&["address", "add", &format!("{HUB_ADDRESS}/24"), "dev", "lab0"])?;
        hub.ip(&["link", "set", "lab0", "up"])?;
        let keep_folder = std::env::var_os("ORLOP_KEEP_LAB").is_some();
        Ok(Self { id: id.to_owned(), folder, keep_folder, nodes: Vec::new(), control_plane: None, hub })
    }

    #[must_use]
    pub fn hub(&self) -> &Netns {
        &self.hub
    }

    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn start_control_plane(&mut self) -> Result<&mut ControlPlane> {
        let plane = ControlPlane::start(&self.hub, HUB_ADDRESS.parse()?, &self.folder.join("control-plane"))?;
        Ok(self.control_plane.insert(plane))
    }

    pub fn control_plane(&mut self) -> Result<&mut ControlPlane> {
        self.control_plane.as_mut().context("the lab has no control plane")
    }

    /// Ends the API server and nothing else.
    pub fn stop_api_server(&mut self) -> Result<()> {
        self.control_plane()?.stop_api_server();
        Ok(())
    }

    pub fn start_api_server(&mut self) -> Result<()> {
        let plane = self.control_plane.as_mut().context("the lab has no control plane")?;
        plane.start_api_server(&self.hub)
    }

    pub fn kubectl(&self) -> Result<Kubectl> {
        self.control_plane.as_ref().context("the lab has no control plane")?.kubectl(&self.hub)
    }

    /// Adds a machine, cabled to the hub, with nothing on it.
    pub fn add_node(&mut self, name: &str) -> Result<&mut Node> {
        let number = self.nodes.len() + 11;
        let address = format!("10.90.0.{number}");
        let netns = Netns::create(&format!("orlop-{}-{name}", self.id))?;
        let (hub, port) = (self.hub.name(), format!("port{number}"));
        self.hub.ip(&[
            "link",
            "add",
            &port,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            netns.name(),
        ])?;
        self.hub
            .ip(&["link", "set", &port, "master", "lab0", "up"])
            .with_context(|| format!("cable {name} to {hub}"))?;
        netns.ip(&["address", "add", &format!("{address}/24"), "dev", "eth0"])?;
        netns.ip(&["link", "set", "eth0", "up"])?;
        netns.ip(&["route", "add", "default", "via", HUB_ADDRESS])?;
        let folder = self.folder.join(name);
        put_run_in_memory(&folder.join("run"), &memory_of(&self.id).join(name))?;
        let node = Node::create(name, &address, netns, &folder, &cgroup_of(&self.id).join(name))?;
        self.nodes.push(node);
        self.node(name)
    }

    /// Adds a node, joined to the control plane by bootstrap token.
    pub fn join_node(&mut self, name: &str) -> Result<&mut Node> {
        self.add_node(name)?;
        let plane = self.control_plane.as_ref().context("the lab has no control plane")?;
        let node = self.nodes.last_mut().context("a node was just added")?;
        let bootstrap = node.folder().join("etc/bootstrap.kubeconfig");
        plane.write_bootstrap_kubeconfig(&bootstrap)?;
        std::fs::copy(plane.authority().certificate(), node.folder().join("etc/ca.crt"))?;
        std::fs::write(node.config_path(), joined_config(node))?;
        node.start()?;
        Ok(node)
    }

    pub fn node(&mut self, name: &str) -> Result<&mut Node> {
        self.nodes
            .iter_mut()
            .find(|n| n.name() == name)
            .with_context(|| format!("the lab has no node {name}"))
    }

    /// Takes a node away from the lab; dropping it removes it from the machine.
    pub fn remove_node(&mut self, name: &str) -> Result<Node> {
        let at =
            self.nodes.iter().position(|n| n.name() == name).with_context(|| format!("no node {name}"))?;
        Ok(self.nodes.remove(at))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.nodes.clear();
        self.control_plane = None;
        remove_cgroup(&cgroup_of(&self.id));
        if !self.keep_folder {
            drop(std::fs::remove_dir_all(&self.folder));
            drop(std::fs::remove_dir_all(memory_of(&self.id)));
        }
    }
}

/// The configuration of a node that joins the lab's cluster.
fn joined_config(node: &Node) -> String {
    let etc = node.folder().join("etc");
    format!(
        "nodeName: {name}\nnodeIP: {address}\n\
         kubeconfig: /var/lib/kubelet/kubeconfig\nbootstrapKubeconfig: {etc}/bootstrap.kubeconfig\n\
         kubelet:\n  rotateCertificates: true\n  staticPodPath: {etc}/manifests\n\
         \x20 authentication:\n    x509: {{clientCAFile: {etc}/ca.crt}}\n\
         \x20 clusterDomain: cluster.local\n\
         runtime:\n  registryConfigDir: {etc}/certs.d\n  preloadDir: {etc}/images\n\
         proxy:\n  clusterCIDR: {cidr}\n\
         overlay:\n  network: {cidr}\n",
        name = node.name(),
        address = node.address(),
        etc = etc.display(),
        cidr = crate::control_plane::CLUSTER_CIDR,
    )
}

fn folder_of(id: &str) -> PathBuf {
    std::env::temp_dir().join(format!("orlop-lab-{id}"))
}

/// `/run` is a file system in memory wherever systemd runs, and nothing written there waits for a disk. So it is on the
/// nodes of a lab.
fn put_run_in_memory(run: &Path, memory: &Path) -> Result<()> {
    std::fs::create_dir_all(memory).with_context(|| format!("make {}", memory.display()))?;
    if run.is_symlink() {
        return Ok(());
    }
    std::fs::create_dir_all(run.parent().context("a node's folder has a parent")?)?;
    std::os::unix::fs::symlink(memory, run).with_context(|| format!("link {}", run.display()))
}

fn memory_of(id: &str) -> PathBuf {
    Path::new("/dev/shm").join(format!("orlop-lab-{id}"))
}

/// Labs live below a cgroup of their own in the machine's cgroup v2 tree, wherever that is mounted.
fn cgroup_of(id: &str) -> PathBuf {
    let unified = Path::new("/sys/fs/cgroup/unified");
    let root = if unified.join("cgroup.procs").exists() { unified } else { Path::new("/sys/fs/cgroup") };
    root.join(format!("orlop-lab-{id}"))
}

/// Removes whatever a lab of this name left: processes, cgroups, namespaces, files.
pub fn purge(id: &str) {
    let cgroup = cgroup_of(id);
    drop(std::fs::write(cgroup.join("cgroup.kill"), "1"));
    remove_cgroup(&cgroup);
    let prefix = format!("orlop-{id}-");
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        if let Some(name) = entry.file_name().to_str().filter(|n| n.starts_with(&prefix)) {
            kill_namespace(name);
            netns::remove(name);
        }
    }
    drop(std::fs::remove_dir_all(folder_of(id)));
    drop(std::fs::remove_dir_all(memory_of(id)));
}

/// Ends every process in a namespace of ours: the control plane of a lab whose owner was killed.
fn kill_namespace(name: &str) {
    let pids = crate::process::run(std::process::Command::new("ip").args(["netns", "pids", name]));
    for pid in pids.unwrap_or_default().split_whitespace().filter_map(|p| p.parse().ok()) {
        // A process that is gone already is what was wanted.
        let _gone =
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
}

/// Removes the labs whose owners are gone.
pub fn sweep() {
    for entry in std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(id) = name.to_str().and_then(|n| n.strip_prefix("orlop-lab-")) else { continue };
        let owner = std::fs::read_to_string(entry.path().join("owner")).unwrap_or_default();
        if owner.is_empty() || !Path::new("/proc").join(owner.trim()).exists() {
            purge(id);
        }
    }
}
