//! The parts alone, as real programs on a machine of their own.

#[allow(unreachable_pub, missing_debug_implementations)]
mod machine;

use anyhow::{Context, Result, ensure};
use machine::{IMAGE, Machine, Program, until};
use nix::sys::signal::Signal;
use orlop_proto::cri::{Container, ContainerState, ListContainersRequest, StatusRequest, VersionRequest};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tokio::runtime::{Builder, Runtime};

const ORLOP: &str = env!("CARGO_BIN_EXE_orlop");

/// The keeper of this build: the one that `ORLOP_KEEPER` names, or else built here. Cargo builds programs of other packages
/// only when asked.
fn keeper() -> Result<PathBuf> {
    if let Some(built) = std::env::var_os("ORLOP_KEEPER") {
        return Ok(built.into());
    }
    let path = Path::new(ORLOP).with_file_name("orlop-keeper");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo).args(["build", "--quiet", "-p", "orlop-keeper"]).status()?;
    ensure!(built.success() && path.exists(), "build orlop-keeper: cargo build -p orlop-keeper");
    Ok(path)
}

fn runtime() -> Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

fn start_keeper(machine: &Machine) -> Result<Program> {
    let keeper = machine.start("keeper", machine.command(keeper()?))?;
    let socket = machine.path("run/orlop/keeper.sock");
    until("the keeper", || Ok(if socket.exists() { Ok(()) } else { Err("no socket".into()) }))?;
    Ok(keeper)
}

fn start_cri(machine: &Machine) -> Result<Program> {
    let mut command = machine.command(ORLOP);
    command
        .arg("cri")
        .arg("--cni-conf-dir")
        .arg(machine.path("cni"))
        .arg("--preload-dir")
        .arg(machine.path("images"));
    let mut cri = machine.start("cri", command)?;
    until("orlop cri", || {
        cri.check()?;
        Ok(if cri.log().contains("the container runtime is up") { Ok(()) } else { Err(cri.log()) })
    })?;
    Ok(cri)
}

async fn containers(machine: &Machine) -> Result<Vec<Container>> {
    Ok(machine
        .runtime()
        .await?
        .list_containers(ListContainersRequest::default())
        .await?
        .into_inner()
        .containers)
}

/// Waits until the one container runs, and has said what it has to say.
fn wait_for_pod(machine: &Machine, runtime: &Runtime, program: &mut Program) -> Result<Container> {
    until("the pod", || {
        program.check()?;
        let Ok(all) = runtime.block_on(containers(machine)) else { return Ok(Err(program.log())) };
        let running = all.into_iter().find(|c| c.state == ContainerState::ContainerRunning as i32);
        let spoke = logs(&machine.path("var-log/pods")).contains("the pod speaks");
        Ok(running.filter(|_| spoke).ok_or_else(|| program.log()))
    })
}

/// Everything that is written below a folder.
fn logs(folder: &Path) -> String {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries
        .map(|path| if path.is_dir() { logs(&path) } else { fs::read_to_string(path).unwrap_or_default() })
        .collect()
}

#[test]
fn orlop_cri_serves_a_stock_client_and_the_kubelet_runs_pods_on_it_as_on_any_endpoint() -> Result<()> {
    let machine = Machine::new("cri")?;
    machine.image()?;
    let _keeper = start_keeper(&machine)?;
    let mut cri = start_cri(&machine)?;
    let runtime = runtime()?;
    runtime.block_on(async {
        let mut client = machine.runtime().await?;
        let version = client.version(VersionRequest::default()).await?.into_inner();
        assert_eq!((version.runtime_name.as_str(), version.runtime_api_version.as_str()), ("orlop", "v1"));
        let status = client
            .status(StatusRequest { verbose: false })
            .await?
            .into_inner()
            .status
            .context("no status")?;
        let condition = |name: &str| status.conditions.iter().find(|c| c.r#type == name).map(|c| c.status);
        assert_eq!(condition("RuntimeReady"), Some(true));
        assert_eq!(condition("NetworkReady"), Some(false), "there is no conflist");
        anyhow::Ok(())
    })?;

    let config = machine.path("kubelet.yaml");
    fs::write(
        &config,
        "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\npodCIDR: 10.99.0.0/24\n",
    )?;
    machine.manifest("static", true)?;
    let mut command = machine.command(ORLOP);
    command.args([
        "kubelet",
        "--container_runtime_endpoint=unix:///run/orlop/cri.sock",
        "--address",
        "127.0.0.1",
    ]);
    command
        .args(["--hostname-override", "alone", "--v=2", "--pod-manifest-path"])
        .arg(machine.path("manifests"));
    command.arg("--config").arg(&config);
    let mut kubelet = machine.start("kubelet", command)?;
    let container = wait_for_pod(&machine, &runtime, &mut kubelet)?;
    assert_eq!(container.labels["io.kubernetes.pod.name"], "static-alone");
    until("the pod addresses to be told", || {
        let told = kubelet.log().contains("pod addresses of this node cidrs=10.99.0.0/24");
        Ok(if told { Ok(()) } else { Err(kubelet.log()) })
    })?;

    let (status, log) = kubelet.stop(Signal::SIGTERM)?;
    assert!(status.success(), "{log}");
    let after = runtime.block_on(containers(&machine))?;
    assert_eq!(
        after.first().map(|c| (&c.id, c.state)),
        Some((&container.id, ContainerState::ContainerRunning as i32))
    );
    cri.check()?;
    let (status, log) = cri.stop(Signal::SIGTERM)?;
    assert!(status.success(), "{log}");
    assert!(!machine.path("run/orlop/cri.sock").exists());
    Ok(())
}

#[test]
fn orlop_up_runs_pods_and_leaves_nothing_behind() -> Result<()> {
    let machine = Machine::new("up")?;
    let image = machine.image()?;
    // Beside the program.
    keeper()?;
    machine.manifest("hello", false)?;
    let mut command = machine.command(ORLOP);
    command.args(["up", "--manifests"]).arg(machine.path("manifests")).arg("--images").arg(image);
    let mut up = machine.start("up", command)?;
    let runtime = runtime()?;
    wait_for_pod(&machine, &runtime, &mut up)?;
    assert!(up.log().contains("Ctrl-C stops the node"), "{}", up.log());
    assert!(machine.cgroups().iter().any(|name| name == "kubepods"));
    let look = |arguments: &[&str]| {
        let mut command = machine.command(ORLOP);
        command.args(arguments);
        machine.output(command)
    };
    assert!(look(&["pods"])?.contains("hello"));
    assert!(look(&["images"])?.contains(IMAGE.split(':').next().unwrap_or_default()));

    let (status, log) = up.stop(Signal::SIGINT)?;
    assert!(status.success(), "{log}");
    assert!(!machine.cgroups().iter().any(|name| name == "kubepods"), "{log}");
    assert!(!machine.path("var-lib/kubelet/pods").exists(), "{log}");
    assert!(!machine.path("var-lib/orlop/up").exists(), "{log}");
    let links = machine.output({
        let mut command = machine.command("ip");
        command.args(["-o", "link"]);
        command
    })?;
    assert_eq!(links.lines().count(), 1, "only the loopback may be left: {links}");
    let keeper = machine.output({
        let mut command = machine.command("sh");
        command.args(["-c", "cat /sys/fs/cgroup/orlop/cgroup.procs"]);
        command
    })?;
    assert_eq!(keeper, "", "the keeper must be gone: {log}");
    Ok(())
}

#[test]
fn the_program_answers_to_the_names_it_stands_in_for() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for name in ["kubelet", "kube-proxy"] {
        let link = folder.path().join(name);
        std::os::unix::fs::symlink(ORLOP, &link)?;
        let output = Command::new(&link).arg("--version").output()?;
        assert_eq!(String::from_utf8_lossy(&output.stdout), "Kubernetes v1.36.3\n", "{name}: {output:?}");
        let output = Command::new(&link).arg("--no-such-flag").output()?;
        assert!(!output.status.success());
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(told.contains("--no-such-flag"), "{name}: {told}");
    }
    let help = Command::new(ORLOP).args(["kubelet", "--help"]).output()?;
    assert!(String::from_utf8_lossy(&help.stdout).contains("--container-runtime-endpoint"), "{help:?}");
    Ok(())
}
