//! A bundle with a small root file system, a cgroup and a state directory of its own; everything is removed at the end,
//! also when a test fails. Needs root and /bin/busybox, linked statically.
#![allow(dead_code, clippy::unwrap_used, reason = "each test program uses its own part; a test may panic")]

use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

pub(crate) struct Lab {
    dir: tempfile::TempDir,
    pub(crate) cgroup: PathBuf,
    pub(crate) config: Value,
}

/// The cgroup v2 tree: at the usual place, or beside the v1 hierarchies.
pub(crate) fn cgroup_root() -> PathBuf {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(PathBuf::from)
        .into_iter()
        .find(|root| root.join("cgroup.controllers").exists())
        .expect("these tests need a cgroup v2 tree at /sys/fs/cgroup or /sys/fs/cgroup/unified")
}

impl Lab {
    pub(crate) fn new(script: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(rustix::process::geteuid().is_root(), "these tests need root");
        let busybox = Path::new("/bin/busybox");
        assert!(busybox.exists(), "these tests need busybox-static");
        let dir = tempfile::Builder::new().prefix("orlop-oci").tempdir().unwrap();
        let rootfs = dir.path().join("bundle/rootfs");
        for name in ["bin", "etc", "tmp"] {
            fs::create_dir_all(rootfs.join(name)).unwrap();
        }
        fs::copy(busybox, rootfs.join("bin/busybox")).unwrap();
        for applet in
            ["sh", "cat", "echo", "grep", "id", "ls", "mkdir", "mount", "sleep", "touch", "true", "tty"]
        {
            symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
        let name = format!("orlop-oci-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let cgroup = cgroup_root().join(&name);
        let config = config(script, &format!("/{name}"));
        Self { dir, cgroup, config }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.bundle().join("rootfs")
    }

    pub(crate) fn bundle(&self) -> PathBuf {
        self.path().join("bundle")
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.path().join("state")
    }

    /// Runs the command line; standard input is empty.
    pub(crate) fn oci(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        fs::write(self.bundle().join("config.json"), self.config.to_string()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_orlop-oci"));
        command.env("ORLOP_MISSING_CONTROLLERS", "warn").stdin(Stdio::null());
        command.arg("--root").arg(self.state()).arg("--cgroup-root").arg(cgroup_root());
        command.args(args).current_dir(self.bundle());
        command
    }

    /// Runs the container in the foreground: exit code, standard output, standard error.
    pub(crate) fn run(&self) -> (i32, String, String) {
        taken(&self.oci(&["run", "x"]))
    }

    /// `create` with output thrown away: a container that lives on would hold a pipe open.
    pub(crate) fn create(&self) -> (i32, String) {
        let log = self.path().join("log.json");
        let _ = fs::remove_file(&log);
        let mut command =
            self.command(&["--log", log.to_str().unwrap(), "--log-format", "json", "create", "x"]);
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        (status.code().unwrap(), fs::read_to_string(log).unwrap_or_default())
    }

    pub(crate) fn status(&self) -> String {
        let (code, out, err) = taken(&self.oci(&["state", "x"]));
        assert_eq!(code, 0, "{err}");
        let state: Value = serde_json::from_str(&out).unwrap();
        state["status"].as_str().unwrap().to_owned()
    }

    /// Fails unless nothing of the container is left.
    pub(crate) fn assert_no_trace(&self) {
        assert!(!self.cgroup.exists(), "cgroup left");
        let states = fs::read_dir(self.state()).map(Iterator::count).unwrap_or(0);
        assert_eq!(states, 0, "state left");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.path().to_str().unwrap()), "mount left");
    }

    /// Repeats while the file is being executed (ETXTBSY).
    pub(crate) fn until_not_busy<T>(open: impl Fn() -> std::io::Result<T>) -> std::io::Result<T> {
        loop {
            match open() {
                Err(error) if error.raw_os_error() == Some(26) => {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
                other => return other,
            }
        }
    }

    /// Polls for what another process is about to do.
    pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
        for _ in 0..500 {
            if condition() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("not within five seconds: {what}");
    }
}

pub(crate) fn taken(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
        for _ in 0..100 {
            if !self.cgroup.exists() || fs::remove_dir(&self.cgroup).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

fn config(script: &str, cgroup: &str) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["sh", "-c", script],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs"},
        "hostname": "testbox",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
        ],
        "linux": {
            "cgroupsPath": cgroup,
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "cgroup"}],
        },
    })
}
