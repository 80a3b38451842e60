//! `orlop up`: a standalone node with its keeper, for as long as the command runs. The quick start.
//!
//! A keeper that we started is ours, and so are the pods: both are gone afterwards. One that was there before keeps its
//! containers, as a node's keeper should.

use crate::cli::UpArgs;
use crate::config::NodeConfig;
use crate::node::{agent, purge, ready, run_with, stop_on_signals};
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use orlop_keeper::client::Keeper;
use std::cell::Cell;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

const MANIFESTS: &str = "/etc/orlop/manifests";
const KEEPER: &str = "orlop-keeper";
const KEEPER_START: Duration = Duration::from_secs(10);
const KEEPER_STOP: Duration = Duration::from_secs(10);
const TASKS_STOP: Duration = Duration::from_secs(5);
const PODS: &str = "/var/lib/kubelet/pods";

/// Runs the node in `main` until told to stop, then cleans up in `cleaner`: by then no task of the node may be left.
pub fn run(args: UpArgs, main: Runtime, cleaner: &Runtime) -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "orlop up makes namespaces, mounts and interfaces: run it as root"
    );
    let config = args.config()?;
    let marker = config.runtime.root.join("up");
    let keeper = main.block_on(OwnKeeper::start(&config, &marker))?;
    let started = Cell::new(false);
    let ran = main.block_on(Box::pin(node(&config, &started)));
    main.shutdown_timeout(TASKS_STOP);
    let Some(keeper) = keeper else {
        println!("The keeper was running before, so its containers go on. `orlop purge` takes them away.");
        return ran;
    };
    // A node that never came up has made nothing, and what lies there is somebody else's.
    let cleaned = if started.get() {
        println!("Removing the pods.");
        cleaner.block_on(Box::pin(purge::run(config)))
    } else {
        Ok(())
    };
    let stopped = keeper.stop();
    if cleaned.is_ok() {
        // Only a mark: if it stays, the next run looks at what is left in vain.
        drop(fs::remove_file(&marker));
    }
    let steps = [("run the node", ran), ("clean up", cleaned), ("stop the keeper", stopped)];
    let failed: Vec<String> =
        steps.into_iter().filter_map(|(what, result)| Some(format!("{what}: {:#}", result.err()?))).collect();
    ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

async fn node(config: &NodeConfig, started: &Cell<bool>) -> Result<()> {
    let shutdown = stop_on_signals()?;
    let closed = shutdown.clone();
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        if hangup.recv().await.is_some() {
            closed.trigger();
        }
    });
    let request = agent::Request::of_node(config)?;
    run_with(config.clone(), request, shutdown, || {
        started.set(true);
        ready("the node");
        print!("{}", suggestions(config));
    })
    .await
}

impl UpArgs {
    fn config(self) -> Result<NodeConfig> {
        let mut config =
            self.config.as_deref().map_or_else(|| Ok(NodeConfig::default()), NodeConfig::read)?;
        config.kubeconfig = None;
        config.bootstrap_kubeconfig = None;
        let manifests = self
            .manifests
            .or_else(|| manifests(&config).map(PathBuf::from))
            .unwrap_or_else(|| MANIFESTS.into());
        let manifests = manifests.canonicalize().ok().filter(|folder| folder.is_dir()).with_context(|| {
            format!("{} is no folder: make it and put a pod's manifest there, or name another with --manifests", manifests.display())
        })?;
        config.kubelet.insert("staticPodPath".into(), manifests.display().to_string().into());
        // Without an API server nobody can prove to us who he is.
        config.kubelet.entry("address").or_insert_with(|| "127.0.0.1".into());
        // A machine on which somebody tries things out may swap.
        config.kubelet.entry("failSwapOn").or_insert(false.into());
        if let Some(images) = self.images {
            let images =
                images.canonicalize().with_context(|| format!("find the images at {}", images.display()))?;
            config.runtime.preload_dir = Some(images);
        }
        Ok(config)
    }
}

fn manifests(config: &NodeConfig) -> Option<&str> {
    config.kubelet.get("staticPodPath")?.as_str().filter(|path| !path.is_empty())
}

fn suggestions(config: &NodeConfig) -> String {
    let default = NodeConfig::default().runtime.listen;
    let listen = &config.runtime.listen;
    let node = if *listen == default { String::new() } else { format!(" --endpoint {listen}") };
    let manifests = manifests(config).unwrap_or(MANIFESTS);
    format!(
        "The node is up. It runs the pods in {manifests}: add, change or remove a manifest, and it follows.\n\
         Try in another terminal, as root:\n\
         \x20 orlop pods{node}\n\
         \x20 orlop ps -a{node}\n\
         \x20 orlop logs -f POD{node}\n\
         \x20 orlop exec -i -t{node} POD -- sh\n\
         \x20 orlop images{node}\n\
         Ctrl-C stops the node and removes its pods.\n"
    )
}

/// A keeper that lives as long as we do. Dropping it kills it.
#[derive(Debug)]
struct OwnKeeper(Child);

impl OwnKeeper {
    /// None when one answers already.
    async fn start(config: &NodeConfig, marker: &Path) -> Result<Option<Self>> {
        let section = &config.runtime;
        if Keeper::connect(&section.keeper_socket).await.is_ok() {
            return Ok(None);
        }
        refuse_another_kubelet(Path::new(PODS), marker)?;
        for folder in section
            .keeper_socket
            .parent()
            .into_iter()
            .chain([section.state.as_path(), section.root.as_path()])
        {
            fs::create_dir_all(folder).with_context(|| format!("make the folder {}", folder.display()))?;
        }
        let program = beside_us(KEEPER);
        let child = Command::new(&program)
            .arg("--socket")
            .arg(&section.keeper_socket)
            .arg("--state")
            .arg(section.state.join("keeper"))
            .arg("--cgroup-root")
            .arg(&section.cgroup_root)
            .stdin(Stdio::null())
            // Ctrl-C is for us; the keeper must live until the pods are gone.
            .process_group(0)
            .spawn()
            .with_context(|| {
                format!("start {}: it belongs beside this program or in PATH", program.display())
            })?;
        let mut keeper = Self(child);
        keeper.wait_until_it_answers(&section.keeper_socket).await?;
        fs::write(marker, "").with_context(|| format!("write {}", marker.display()))?;
        Ok(Some(keeper))
    }

    async fn wait_until_it_answers(&mut self, socket: &Path) -> Result<()> {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().context("watch the keeper")? {
                bail!("the keeper ended at once ({status}); it has said why above");
            }
            match Keeper::connect(socket).await {
                Ok(_) => return Ok(()),
                Err(error) if begun.elapsed() > KEEPER_START => {
                    return Err(error).context("reach the keeper");
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    fn stop(mut self) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).context("the keeper's process id")?);
        let begun = Instant::now();
        if self.0.try_wait()?.is_none() {
            kill(pid, Signal::SIGTERM).context("tell the keeper to stop")?;
        }
        while self.0.try_wait()?.is_none() {
            ensure!(
                begun.elapsed() < KEEPER_STOP,
                "the keeper (process {pid}) did not stop when told, and was killed"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for OwnKeeper {
    fn drop(&mut self) {
        // Nothing to do for one that has ended.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// The kubelet's folder is the same for every kubelet, and cleaning up empties it. `marker` says that what lies there is
/// left from an earlier run of ours.
fn refuse_another_kubelet(pods: &Path, marker: &Path) -> Result<()> {
    let empty = fs::read_dir(pods).map_or(true, |mut entries| entries.next().is_none());
    ensure!(
        empty || marker.exists(),
        "{} holds pods of a kubelet: this machine is a node already. If it is none any more, empty the folder, or let \
         `orlop purge` do so",
        pods.display()
    );
    Ok(())
}

/// A program that is installed together with this one.
fn beside_us(name: &str) -> PathBuf {
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.join(name)));
    beside.filter(|path| path.exists()).unwrap_or_else(|| name.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(manifests: &Path) -> UpArgs {
        UpArgs { manifests: Some(manifests.to_owned()), images: None, config: None }
    }

    #[test]
    fn the_node_stands_alone_whatever_the_file_says() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("config.yaml");
        fs::write(&file, "kubeconfig: /k\nkubelet: {staticPodPath: /nonexistent, address: 0.0.0.0}\n")?;
        let config =
            UpArgs { config: Some(file.clone()), images: Some(file), ..args(folder.path()) }.config()?;
        assert!(config.kubeconfig.is_none());
        assert_eq!(manifests(&config), folder.path().canonicalize()?.to_str());
        assert_eq!(config.kubelet["address"], "0.0.0.0");
        assert!(config.runtime.preload_dir.is_some());
        assert_eq!(args(folder.path()).config()?.kubelet["address"], "127.0.0.1");
        Ok(())
    }

    #[test]
    fn a_missing_folder_is_told_with_the_remedy() {
        let message = format!("{:#}", args(Path::new("/nonexistent")).config().unwrap_err());
        assert!(message.contains("/nonexistent") && message.contains("--manifests"), "{message}");
    }

    #[test]
    fn another_kubelets_pods_are_not_ours_to_remove() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (pods, marker) = (folder.path().join("pods"), folder.path().join("up"));
        refuse_another_kubelet(&pods, &marker)?;
        fs::create_dir_all(pods.join("some-uid"))?;
        assert!(refuse_another_kubelet(&pods, &marker).is_err());
        fs::write(&marker, "")?;
        refuse_another_kubelet(&pods, &marker)
    }

    #[test]
    fn suggestions_name_the_socket_where_it_is_not_the_usual_one() {
        let mut config = NodeConfig::default();
        assert!(!suggestions(&config).contains("--endpoint"));
        config.runtime.listen = "unix:///a".into();
        assert!(suggestions(&config).contains("orlop pods --endpoint unix:///a\n"));
    }
}
