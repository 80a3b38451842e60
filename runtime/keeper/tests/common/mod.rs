//! A keeper of one's own: in a private mount namespace where cgroup2 lies at /sys/fs/cgroup, with everything below a
//! temporary directory, and gone with the test whether that passes or not.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its part")]

use orlop_keeper::client::{ExecStreams, Keeper};
use orlop_keeper::protocol::{ContainerView, CreateContainer, Event, ExecProcess, Exit, LogTarget, Overlay};
use serde_json::{Value, json};
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::broadcast;

/// Long enough for a loaded machine, short enough to fail.
pub const PATIENCE: Duration = Duration::from_secs(30);

static COUNTER: AtomicU32 = AtomicU32::new(0);

pub struct Node {
    pub dir: tempfile::TempDir,
    pub cgroup: String,
    /// Shell commands run just before the keeper, in its process.
    pub before: String,
    keeper: Option<Child>,
}

/// How a container differs from the plain one: one that runs a shell command and logs.
#[derive(Default)]
pub struct Options {
    pub tty: bool,
    pub stdin: bool,
    pub stdin_once: bool,
    pub max_bytes: u64,
    pub max_files: u32,
    pub log: Option<PathBuf>,
    pub share_pids: bool,
    pub arguments: Option<Vec<String>>,
}

impl Node {
    pub async fn start() -> (Self, Keeper) {
        let mut node = Self::prepare();
        node.spawn_keeper();
        let keeper = node.connect().await;
        (node, keeper)
    }

    pub fn prepare() -> Self {
        assert!(rustix::process::geteuid().is_root(), "this test needs root");
        assert!(Path::new("/bin/busybox").exists(), "this test needs a static busybox in /bin");
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let node = Self {
            dir: tempfile::tempdir().unwrap(),
            cgroup: format!("orlop-keeper-test-{}-{number}", std::process::id()),
            before: String::new(),
            keeper: None,
        };
        node.make_rootfs();
        node
    }

    pub async fn connect(&self) -> Keeper {
        Keeper::connect(&self.socket()).await.unwrap()
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("keeper.sock")
    }

    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub fn log_dir(&self, id: &str) -> PathBuf {
        self.dir.path().join("logs").join(id)
    }

    pub fn spawn_keeper(&mut self) {
        self.keeper = Some(self.keeper_command("").spawn().unwrap());
    }

    pub fn keeper_pid(&self) -> u32 {
        self.keeper.as_ref().unwrap().id()
    }

    fn keeper_command(&self, more: &str) -> Command {
        let script = format!(
            "mount --make-rprivate / && umount -R -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && \
             mkdir -p {mnt} && mount -t tmpfs -o size=64k none {mnt} && \
             {before} exec {program} --socket {socket} --state {state} {more}",
            mnt = self.dir.path().join("small").display(),
            before = self.before,
            program = env!("CARGO_BIN_EXE_orlop-keeper"),
            socket = self.socket().display(),
            state = self.state().display(),
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "bash", "-c", &script]).env("ORLOP_MISSING_CONTROLLERS", "warn");
        command.stdin(Stdio::null());
        command
    }

    pub fn signal(&self, signal: &str) {
        let done = Command::new("kill").args([signal, &self.keeper_pid().to_string()]).status().unwrap();
        assert!(done.success());
    }

    /// Ends the keeper at once, as a crash would.
    pub fn crash(&mut self) {
        let mut keeper = self.keeper.take().unwrap();
        keeper.kill().unwrap();
        keeper.wait().unwrap();
    }

    pub fn terminate(&mut self) {
        self.signal("-TERM");
        assert!(self.keeper.take().unwrap().wait().unwrap().success());
    }

    pub fn purge(&self) -> bool {
        self.keeper_command("--purge").status().unwrap().success()
    }

    fn make_rootfs(&self) {
        let root = self.dir.path().join("image");
        for name in ["bin", "proc", "dev", "tmp", "sys", "etc"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        std::os::unix::fs::symlink("busybox", root.join("bin/sh")).unwrap();
    }

    /// Writes the bundle of a container that runs `script` and returns the request for it.
    pub fn request(&self, id: &str, script: &str, options: &Options) -> CreateContainer {
        let bundle = self.dir.path().join("bundles").join(id);
        let layer = self.dir.path().join("layers").join(id);
        for dir in [&bundle.join("rootfs"), &layer.join("upper"), &layer.join("work")] {
            fs::create_dir_all(dir).unwrap();
        }
        let mut spec = specification(&format!("/{}/{id}", self.cgroup), script, options.share_pids);
        if let Some(arguments) = &options.arguments {
            spec["process"]["args"] = json!(arguments);
        }
        spec["process"]["terminal"] = json!(options.tty);
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        CreateContainer {
            id: id.to_owned(),
            bundle,
            rootfs: Some(Overlay {
                lower: vec![self.dir.path().join("image")],
                upper: layer.join("upper"),
                work: layer.join("work"),
            }),
            log: Some(LogTarget {
                path: options.log.clone().unwrap_or_else(|| self.log_dir(id).join("0.log")),
                max_bytes: options.max_bytes,
                max_files: options.max_files.max(2),
            }),
            tty: options.tty,
            stdin: options.stdin,
            stdin_once: options.stdin_once,
        }
    }

    pub async fn run(&self, keeper: &Keeper, id: &str, script: &str, options: &Options) -> ContainerView {
        let created = keeper.create(self.request(id, script, options)).await.unwrap();
        assert!(created.pid > 0);
        keeper.start(id).await.unwrap()
    }

    /// What the container wrote, put together from all files of its log, oldest first.
    pub fn output(&self, id: &str, stream: &str) -> String {
        output_of(&self.log_files(id), stream)
    }

    pub fn log_files(&self, id: &str) -> Vec<PathBuf> {
        let mut rotated: Vec<((String, u32), PathBuf)> = Vec::new();
        let mut current = None;
        for entry in fs::read_dir(self.log_dir(id)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            match name.strip_prefix("0.log.") {
                None => current = Some(path),
                Some(rest) => {
                    let (time, nth) = rest.split_once('.').unwrap_or((rest, "0"));
                    rotated.push(((time.to_owned(), nth.parse().unwrap()), path));
                }
            }
        }
        rotated.sort();
        rotated.into_iter().map(|(_, path)| path).chain(current).collect()
    }

    pub fn cgroup_dir(&self, id: &str) -> PathBuf {
        Path::new("/sys/fs/cgroup/unified").join(&self.cgroup).join(id)
    }

    /// Nothing of a deleted container may be left.
    pub fn assert_gone(&self, id: &str, pid: u32) {
        assert!(!self.state().join(id).exists(), "the record is left");
        assert!(!self.cgroup_dir(id).exists(), "the cgroup is left");
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "the process is left");
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", self.keeper_pid())).unwrap();
        assert!(!mounts.contains(&format!("bundles/{id}")), "a mount is left");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.keeper.is_some() {
            self.crash();
        }
        if !self.purge() {
            eprintln!("cannot purge the test's keeper");
        }
        let root = Path::new("/sys/fs/cgroup/unified").join(&self.cgroup);
        let _ = fs::remove_dir(root);
    }
}

pub fn output_of(files: &[PathBuf], stream: &str) -> String {
    let mut out = String::new();
    for path in files {
        for line in fs::read_to_string(path).unwrap().split_inclusive('\n') {
            let mut parts = line.splitn(4, ' ');
            let (time, name, tag) = (parts.next().unwrap(), parts.next().unwrap(), parts.next().unwrap());
            assert_eq!(time.len(), 30, "{line}");
            let content = parts.next().unwrap();
            if name == stream {
                out.push_str(if tag == "F" { content } else { content.trim_end_matches('\n') });
            }
        }
    }
    out
}

fn specification(cgroup: &str, script: &str, share_pids: bool) -> Value {
    let capabilities = json!(["CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_CHOWN"]);
    let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "ipc"}), json!({"type": "uts"})];
    if !share_pids {
        namespaces.push(json!({"type": "pid"}));
    }
    json!({
        "ociVersion": "1.2.0",
        "process": process(script, &capabilities),
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "c",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]}
        ],
        "linux": {"cgroupsPath": cgroup, "namespaces": namespaces}
    })
}

fn process(script: &str, capabilities: &Value) -> Value {
    json!({
        "terminal": false,
        "user": {"uid": 0, "gid": 0},
        "args": ["/bin/busybox", "sh", "-c", script],
        "env": ["PATH=/bin"],
        "cwd": "/",
        "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
        "noNewPrivileges": true
    })
}

pub fn exec_request(container: &str, exec_id: &str, script: &str, tty: bool) -> ExecProcess {
    let mut process = process(script, &json!([]));
    process["terminal"] = json!(tty);
    ExecProcess {
        container: container.to_owned(),
        exec_id: exec_id.to_owned(),
        process: Box::new(serde_json::from_value(process).unwrap()),
        tty,
    }
}

pub fn no_streams() -> ExecStreams {
    ExecStreams { stdin: None, stdout: None, stderr: None }
}

pub async fn wait_exit(events: &mut broadcast::Receiver<Event>, container: &str) -> Exit {
    let wait = async {
        loop {
            if let Event::ContainerExited { id, exit } = events.recv().await.unwrap()
                && id == container
            {
                return exit;
            }
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("the container did not exit")
}

/// Reads to the end on a thread, whether the descriptor blocks or not.
pub async fn read_to_end(fd: OwnedFd) -> String {
    let read = tokio::task::spawn_blocking(move || {
        rustix::io::ioctl_fionbio(&fd, false).unwrap();
        let mut bytes = Vec::new();
        let mut file = fs::File::from(fd);
        // A terminal ends with an error.
        let _ = file.read_to_end(&mut bytes);
        String::from_utf8(bytes).unwrap()
    });
    tokio::time::timeout(PATIENCE, read).await.expect("the stream did not end").unwrap()
}

pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
