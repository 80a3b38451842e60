//! A registry of Debian's `docker-registry` on loopback, filled by umoci and skopeo, and stores to pull into.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use orlop_image::{Config, ImageStore};

/// Runs a program to its successful end.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|cause| panic!("{program} is needed for this test (Debian package): {cause}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?} failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A registry process; ends with the value.
pub(crate) struct Registry {
    child: Child,
    pub(crate) port: u16,
    pub(crate) data: PathBuf,
}

impl Registry {
    /// `extra` goes into the `http:` section or after it.
    pub(crate) fn start(base: &Path, extra: &str) -> Self {
        let data = base.join("registry");
        fs::create_dir_all(&data).unwrap();
        let config = base.join("registry.yml");
        let port = free_port();
        let text = format!(
            "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n{extra}",
            data.display()
        );
        fs::write(&config, text).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("docker-registry is needed for this test (Debian package docker-registry)");
        let registry = Self { child, port, data };
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "the registry did not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An OCI layout of two layers, built by umoci from Debian's busybox: set-id files, links, odd names, a deletion.
pub(crate) struct Layout {
    pub(crate) path: PathBuf,
}

impl Layout {
    pub(crate) fn build(base: &Path) -> Self {
        let path = base.join("layout");
        let name = path.to_str().unwrap().to_owned();
        let tagged = format!("{name}:v1");
        let bundle = base.join("build");
        let rootfs = bundle.join("rootfs");
        run("umoci", &["init", "--layout", &name]);
        run("umoci", &["new", "--image", &tagged]);
        run("umoci", &["unpack", "--image", &tagged, bundle.to_str().unwrap()]);
        for directory in ["bin", "etc", "tmp", "usr/share/doc", "var/empty"] {
            fs::create_dir_all(rootfs.join(directory)).unwrap();
        }
        fs::set_permissions(rootfs.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("busybox is needed for this test");
        fs::hard_link(rootfs.join("bin/busybox"), rootfs.join("bin/sh")).unwrap();
        symlink("busybox", rootfs.join("bin/ls")).unwrap();
        fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
        fs::write(rootfs.join("etc/gone"), "deleted by the second layer\n").unwrap();
        fs::write(rootfs.join("bin/su"), "set-id").unwrap();
        fs::set_permissions(rootfs.join("bin/su"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::write(rootfs.join("usr/share/doc/caf\u{e9} \u{4e2d}"), "x".repeat(70_000)).unwrap();
        run("umoci", &["repack", "--image", &tagged, "--refresh-bundle", bundle.to_str().unwrap()]);
        fs::remove_file(rootfs.join("etc/gone")).unwrap();
        fs::write(rootfs.join("tmp/second"), "layer\n").unwrap();
        run("umoci", &["repack", "--image", &tagged, "--refresh-bundle", bundle.to_str().unwrap()]);
        run(
            "umoci",
            &["config", "--image", &tagged, "--config.user", "1000:1000", "--config.cmd", "/bin/sh"],
        );
        fs::remove_dir_all(&bundle).unwrap();
        Self { path }
    }

    pub(crate) fn push(&self, target: &str) {
        let source = format!("oci:{}:v1", self.path.display());
        run(
            "skopeo",
            &["--insecure-policy", "copy", "--dest-tls-verify=false", &source, &format!("docker://{target}")],
        );
    }
}

pub(crate) async fn store(base: &Path, hosts: Option<PathBuf>) -> ImageStore {
    let config = Config { registry_config_dir: hosts, ..Config::below(base) };
    ImageStore::open(config).await.unwrap()
}
