//! A machine for one test: mount, network and cgroup namespaces of its own, in which the real programs run.

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use orlop_proto::cri::runtime_service_client::RuntimeServiceClient;
use serde_json::json;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tonic::transport::{Channel, Endpoint};

pub const IMAGE: &str = "localhost/programs-test:1";

/// Prepares the machine and then waits to be killed. `$1` is the machine's folder.
const HOLDER: &str = r#"
set -eu
mount --make-rprivate /
while mountpoint -q /sys/fs/cgroup; do umount -R -l /sys/fs/cgroup; done
mount -t cgroup2 none /sys/fs/cgroup
mount --bind "$1/run" /run
mount --bind "$1/var-lib" /var/lib
mount --bind "$1/var-log" /var/log
mount --make-rshared /
ip link set lo up
exec sleep infinity
"#;

/// Dropping it kills everything that runs on it.
pub struct Machine {
    folder: tempfile::TempDir,
    cgroup: PathBuf,
    holder: Child,
}

impl Machine {
    pub fn new(name: &str) -> Result<Self> {
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests make namespaces and cgroups: run them as root"
        );
        let folder = tempfile::tempdir()?;
        for part in ["run", "var-lib", "var-log", "manifests", "cni", "logs"] {
            fs::create_dir(folder.path().join(part))?;
        }
        let unified = Path::new("/sys/fs/cgroup/unified");
        let tree = if unified.join("cgroup.procs").exists() { unified } else { Path::new("/sys/fs/cgroup") };
        let cgroup = tree.join(format!("orlop-programs-{}-{name}", std::process::id()));
        fs::create_dir(&cgroup).with_context(|| format!("make cgroup {}", cgroup.display()))?;
        let holder = Command::new("sh")
            .args([
                "-c",
                r#"echo $$ > "$1/cgroup.procs"; exec unshare --mount --net --cgroup sh -c "$3" holder "$2""#,
                "enter",
            ])
            .arg(&cgroup)
            .arg(folder.path())
            .arg(HOLDER)
            .stdin(Stdio::null())
            .spawn()
            .context("start the holder of the namespaces")?;
        let mut machine = Self { folder, cgroup, holder };
        let comm = format!("/proc/{}/comm", machine.holder.id());
        until("the machine's namespaces", || {
            if let Some(status) = machine.holder.try_wait()? {
                return Ok(Err(format!("the holder ended: {status}")));
            }
            let name = fs::read_to_string(&comm)?;
            Ok(if name.trim() == "sleep" { Ok(()) } else { Err(format!("the holder is still {name}")) })
        })?;
        Ok(machine)
    }

    /// A place on the machine that is visible from outside under the same name.
    pub fn path(&self, part: &str) -> PathBuf {
        self.folder.path().join(part)
    }

    /// A command that will run on the machine, in a cgroup of its own.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let name =
            program.as_ref().file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.holder.id().to_string(), "--mount", "--net", "--cgroup", "--"]);
        command.args([
            "sh",
            "-c",
            "mkdir -p /sys/fs/cgroup/$0 && echo $$ > /sys/fs/cgroup/$0/cgroup.procs && exec \"$@\"",
            &name,
        ]);
        command.arg(program.as_ref()).env("ORLOP_MISSING_CONTROLLERS", "warn").stdin(Stdio::null());
        command
    }

    pub fn start(&self, log: &str, mut command: Command) -> Result<Program> {
        let log = self.path("logs").join(log);
        let file = File::create(&log)?;
        let child =
            command.stdout(file.try_clone()?).stderr(file).spawn().with_context(|| format!("{command:?}"))?;
        Ok(Program { child, log })
    }

    /// What a command on the machine prints.
    pub fn output(&self, mut command: Command) -> Result<String> {
        let output = command.output()?;
        if !output.status.success() {
            bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Cgroups of the machine that are there now, by their names.
    pub fn cgroups(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.cgroup).into_iter().flatten().flatten();
        entries.filter(|e| e.path().is_dir()).map(|e| e.file_name().to_string_lossy().into_owned()).collect()
    }

    /// The CRI that is served on the machine.
    pub async fn runtime(&self) -> Result<RuntimeServiceClient<Channel>> {
        let socket = self.path("run/orlop/cri.sock");
        Ok(RuntimeServiceClient::new(
            Endpoint::from_shared(format!("unix://{}", socket.display()))?.connect().await?,
        ))
    }

    /// An OCI layout of busybox, in a folder of the machine.
    pub fn image(&self) -> Result<PathBuf> {
        let (root, layout) = (self.path("rootfs"), self.path("images/busybox"));
        let blobs = layout.join("blobs/sha256");
        for folder in [root.join("bin"), root.join("tmp"), root.join("etc"), root.join("proc"), blobs.clone()]
        {
            fs::create_dir_all(folder)?;
        }
        fs::copy("/bin/busybox", root.join("bin/busybox"))
            .context("copy busybox: install the package busybox-static")?;
        std::os::unix::fs::symlink("busybox", root.join("bin/sh"))?;
        let layer = self.path("layer.tar");
        self.output({
            let mut tar = Command::new("tar");
            tar.arg("-C").arg(&root).arg("-cf").arg(&layer).arg(".");
            tar
        })?;
        let layer = self.blob(&blobs, &fs::read(&layer)?)?;
        let config = self.blob(
            &blobs,
            &serde_json::to_vec(&json!({
                "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
                "os": "linux",
                "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]},
                "rootfs": {"type": "layers", "diff_ids": [layer.0]},
            }))?,
        )?;
        let part = |kind: &str, (digest, size): &(String, usize)| json!({"mediaType": kind, "digest": digest, "size": size});
        let manifest = self.blob(
            &blobs,
            &serde_json::to_vec(&json!({
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": part("application/vnd.oci.image.config.v1+json", &config),
                "layers": [part("application/vnd.oci.image.layer.v1.tar", &layer)],
            }))?,
        )?;
        let mut entry = part("application/vnd.oci.image.manifest.v1+json", &manifest);
        entry["annotations"] =
            json!({"io.containerd.image.name": IMAGE, "org.opencontainers.image.ref.name": IMAGE});
        fs::write(layout.join("index.json"), json!({"schemaVersion": 2, "manifests": [entry]}).to_string())?;
        fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(layout)
    }

    fn blob(&self, blobs: &Path, content: &[u8]) -> Result<(String, usize)> {
        let new = blobs.join("new");
        fs::write(&new, content)?;
        let mut sum = Command::new("sha256sum");
        sum.arg(&new);
        let printed = self.output(sum)?;
        let digest = printed.split_whitespace().next().context("sha256sum printed nothing")?;
        fs::rename(&new, blobs.join(digest))?;
        Ok((format!("sha256:{digest}"), content.len()))
    }

    /// A static pod that says something and stays.
    pub fn manifest(&self, name: &str, host_network: bool) -> Result<()> {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"},
            "spec": {
                "hostNetwork": host_network,
                "terminationGracePeriodSeconds": 1,
                "containers": [{
                    "name": "main", "image": IMAGE, "imagePullPolicy": "Never",
                    "command": ["/bin/busybox", "sh", "-c", "echo the pod speaks; exec /bin/busybox sleep 1000"],
                }],
            },
        });
        Ok(fs::write(self.path("manifests").join(format!("{name}.json")), pod.to_string())?)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // What is gone already needs no killing.
        drop(fs::write(self.cgroup.join("cgroup.kill"), "1"));
        drop(self.holder.kill());
        drop(self.holder.wait());
        drop(until("the machine's cgroups to go", || {
            remove_cgroups(&self.cgroup);
            Ok(if self.cgroup.exists() { Err("processes are still dying".to_owned()) } else { Ok(()) })
        }));
    }
}

fn remove_cgroups(at: &Path) {
    for entry in fs::read_dir(at).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroups(&entry.path());
        }
    }
    drop(fs::remove_dir(at));
}

/// A program that runs on the machine.
pub struct Program {
    child: Child,
    log: PathBuf,
}

impl Program {
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Fails with the log when the program has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            Some(status) => bail!("ended with {status}:\n{}", self.log()),
            None => Ok(()),
        }
    }

    pub fn stop(mut self, signal: Signal) -> Result<(ExitStatus, String)> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?;
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok((status, self.log()));
            }
            if begun.elapsed() > Duration::from_secs(30) {
                bail!("does not stop:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Waits until the condition holds; an error is final, an inner one is why it doesn't hold yet.
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Result<Result<T, String>>) -> Result<T> {
    let begun = Instant::now();
    loop {
        match condition().with_context(|| format!("wait for {what}"))? {
            Ok(value) => return Ok(value),
            Err(why) if begun.elapsed() > Duration::from_secs(60) => bail!("{what}: {why}"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
