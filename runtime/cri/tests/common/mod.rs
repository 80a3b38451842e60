//! A node of one's own: keeper, image store and CRI service in a private mount namespace where cgroup2 lies at
//! /sys/fs/cgroup, everything below a temporary directory.
//!
//! The namespace belongs to a thread and to what that thread starts: the async runtime's threads and the keeper. When
//! the test ends, however it ends, the keeper is killed, its containers with it, and the mounts vanish with the threads.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its part")]

use orlop_cri::network::{NetworkError, NetworkRequest, SandboxNetwork};
use orlop_cri::{Config, CriService, MissingControllers};
use orlop_image::ImageStore;
use orlop_keeper::client::Keeper;
use orlop_proto::cri;
use orlop_proto::cri::runtime_service_server::RuntimeService;
use std::fs;
use std::future::Future;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use tonic::{Request, async_trait};

pub const PATIENCE: Duration = Duration::from_secs(30);
pub const IMAGE: &str = "registry.test/busybox:1";

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// Runs `test` on a node of its own.
pub fn on_a_node<F: Future<Output = ()>>(test: impl FnOnce(Node) -> F + Send + 'static) {
    let program = keeper_program();
    let outcome = std::thread::spawn(move || {
        enter_private_mounts();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async move {
            let node = Node::start(program).await;
            Box::pin(test(node)).await;
        });
    })
    .join();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

/// The keeper as it is now: the one that `ORLOP_KEEPER` names, or else built here, since a test program of one package
/// does not get another's binary.
fn keeper_program() -> PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM
        .get_or_init(|| {
            if let Some(built) = std::env::var_os("ORLOP_KEEPER") {
                return built.into();
            }
            let built =
                Command::new(env!("CARGO")).args(["build", "-q", "-p", "orlop-keeper"]).status().unwrap();
            assert!(built.success(), "the keeper does not build");
            let test = std::env::current_exe().unwrap();
            test.ancestors().nth(2).unwrap().join("orlop-keeper")
        })
        .clone()
}

fn enter_private_mounts() {
    use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
    assert!(rustix::process::geteuid().is_root(), "this test needs root");
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    let cgroup = "/sys/fs/cgroup";
    unmount(cgroup, UnmountFlags::DETACH).unwrap();
    mount("none", cgroup, "cgroup2", MountFlags::empty(), None).unwrap();
}

/// A pod network that hands out one address and remembers what it was asked.
#[derive(Debug, Default)]
pub struct FakeNetwork {
    pub calls: Mutex<Vec<String>>,
    pub fail_attach: Mutex<Option<String>>,
}

impl FakeNetwork {
    fn note(&self, call: String) {
        self.calls.lock().unwrap().push(call);
    }
}

#[async_trait]
impl SandboxNetwork for FakeNetwork {
    async fn attach(&self, request: &NetworkRequest) -> Result<Vec<IpAddr>, NetworkError> {
        self.note(format!("attach {}", request.pod_name));
        assert!(request.netns.exists());
        match self.fail_attach.lock().unwrap().take() {
            Some(reason) => Err(NetworkError(reason)),
            None => Ok(vec!["10.88.0.2".parse().unwrap(), "fd00::2".parse().unwrap()]),
        }
    }
    async fn detach(&self, request: &NetworkRequest) -> Result<(), NetworkError> {
        self.note(format!("detach {}", request.pod_name));
        Ok(())
    }
    async fn status(&self) -> Result<(), NetworkError> {
        Ok(())
    }
    async fn retain(&self, sandbox_ids: &[String]) -> Result<(), NetworkError> {
        self.note(format!("retain {}", sandbox_ids.len()));
        Ok(())
    }
    async fn set_pod_cidrs(&self, cidrs: &str) -> Result<(), NetworkError> {
        self.note(format!("cidrs {cidrs}"));
        Ok(())
    }
}

pub struct Node {
    pub dir: tempfile::TempDir,
    pub cgroup: String,
    pub network: Arc<FakeNetwork>,
    pub images: Arc<ImageStore>,
    keeper: Child,
}

impl Node {
    async fn start(program: PathBuf) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let keeper = Command::new(program)
            .args(["--socket", dir.path().join("keeper.sock").to_str().unwrap()])
            .args(["--state", dir.path().join("keeper").to_str().unwrap()])
            .env("ORLOP_MISSING_CONTROLLERS", "warn")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let config = orlop_image::Config {
            root: dir.path().join("images"),
            containers: dir.path().join("containers"),
            registry_config_dir: None,
            max_concurrent_downloads: 1,
        };
        let images = Arc::new(ImageStore::open(config).await.unwrap());
        let node = Self {
            cgroup: format!("/orlop-cri-test-{}-{number}", std::process::id()),
            network: Arc::default(),
            images,
            keeper,
            dir,
        };
        eventually("the keeper listens", || node.dir.path().join("keeper.sock").exists()).await;
        node.make_image();
        node.images.import(&node.dir.path().join("layout"), Some(IMAGE)).await.unwrap();
        node
    }

    /// A busybox image with a user database.
    fn make_image(&self) {
        let layout = self.dir.path().join("layout");
        let bundle = self.dir.path().join("umoci");
        let image = format!("{}:1", layout.display());
        let run = |arguments: &[&str]| {
            let done = Command::new("umoci").args(arguments).stderr(Stdio::null()).status();
            assert!(done.expect("this test needs umoci").success(), "umoci {arguments:?}");
        };
        run(&["init", "--layout", layout.to_str().unwrap()]);
        run(&["new", "--image", &image]);
        run(&["unpack", "--image", &image, bundle.to_str().unwrap()]);
        let root = bundle.join("rootfs");
        for name in ["bin", "etc", "tmp", "dev", "proc", "sys"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("this test needs a static busybox in /bin");
        for name in ["sh", "sleep", "cat", "echo", "id", "true", "ls", "ps"] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nweb:x:101:102::/:/bin/sh\n").unwrap();
        fs::write(root.join("etc/group"), "root:x:0:\nweb:x:102:\nlogs:x:300:web\n").unwrap();
        run(&["repack", "--image", &image, bundle.to_str().unwrap()]);
        run(&["config", "--image", &image, "--config.env", "FROM=image", "--config.cmd", "/bin/sh"]);
    }

    pub fn config(&self) -> Config {
        Config {
            root: self.dir.path().join("lib"),
            state: self.dir.path().join("run"),
            missing_controllers: MissingControllers::Warn,
            restrict_oom_score_adj: true,
            image_root: self.dir.path().join("images"),
            container_root: self.dir.path().join("containers"),
            ..Config::default()
        }
    }

    pub async fn open(&self) -> CriService {
        let keeper = Keeper::connect(&self.dir.path().join("keeper.sock")).await.unwrap();
        CriService::open(self.config(), keeper, self.images.clone(), self.network.clone()).await.unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn sandbox(&self, name: &str) -> cri::PodSandboxConfig {
        cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: name.into(),
                uid: format!("{name}-uid"),
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            log_directory: self.path("logs").to_str().unwrap().into(),
            dns_config: Some(cri::DnsConfig { servers: vec!["10.96.0.10".into()], ..Default::default() }),
            labels: [("app".to_owned(), name.to_owned())].into(),
            linux: Some(cri::LinuxPodSandboxConfig {
                cgroup_parent: format!("{}/{name}", self.cgroup),
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(options(cri::NamespaceMode::Container)),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// What must be gone when every sandbox is removed.
    pub fn assert_nothing_left(&self) {
        let entries = |name: &str| -> Vec<PathBuf> {
            fs::read_dir(self.path(name)).unwrap().map(|e| e.unwrap().path()).collect()
        };
        for name in ["run/sandboxes", "run/bundles", "lib/cri/sandboxes", "lib/cri/containers"] {
            assert_eq!(entries(name), Vec::<PathBuf>::new(), "{name}");
        }
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let ours = self.path("run").to_str().unwrap().to_owned();
        assert!(!mounts.contains(&ours), "mounts are left:\n{mounts}");
        let cgroups = Path::new("/sys/fs/cgroup").join(&self.cgroup[1..]);
        for pod in fs::read_dir(cgroups).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
            let inside: Vec<_> = fs::read_dir(pod.path())
                .unwrap()
                .flatten()
                .map(|e| e.path())
                .filter(|p| p.is_dir())
                .collect();
            assert!(inside.is_empty(), "cgroups are left: {inside:?}");
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
        let top = Path::new("/sys/fs/cgroup").join(&self.cgroup[1..]);
        let _ = fs::write(top.join("cgroup.kill"), "1");
        let deadline = Instant::now() + Duration::from_secs(5);
        while top.exists() && Instant::now() < deadline {
            remove_cgroups(&top);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn remove_cgroups(dir: &Path) {
    for child in fs::read_dir(dir).into_iter().flatten().flatten().filter(|e| e.path().is_dir()) {
        remove_cgroups(&child.path());
    }
    let _ = fs::remove_dir(dir);
}

pub fn options(pid: cri::NamespaceMode) -> cri::NamespaceOption {
    cri::NamespaceOption { pid: pid as i32, ..Default::default() }
}

/// A container that runs a shell script.
pub fn container(name: &str, script: &str) -> cri::ContainerConfig {
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(cri::ImageSpec { image: IMAGE.into(), ..Default::default() }),
        command: vec!["/bin/sh".into(), "-c".into(), script.into()],
        log_path: format!("{name}.log"),
        labels: [("name".to_owned(), name.to_owned())].into(),
        linux: Some(cri::LinuxContainerConfig {
            resources: Some(cri::LinuxContainerResources {
                memory_limit_in_bytes: 64 << 20,
                ..Default::default()
            }),
            security_context: Some(cri::LinuxContainerSecurityContext {
                namespace_options: Some(options(cri::NamespaceMode::Container)),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

pub async fn run_sandbox(service: &CriService, config: cri::PodSandboxConfig) -> String {
    let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
    service.run_pod_sandbox(Request::new(request)).await.unwrap().into_inner().pod_sandbox_id
}

pub async fn create(service: &CriService, sandbox: &str, config: cri::ContainerConfig) -> String {
    let request = cri::CreateContainerRequest {
        pod_sandbox_id: sandbox.into(),
        config: Some(config),
        sandbox_config: None,
    };
    service.create_container(Request::new(request)).await.unwrap().into_inner().container_id
}

pub async fn start(service: &CriService, id: &str) -> Result<(), tonic::Status> {
    let request = cri::StartContainerRequest { container_id: id.into() };
    service.start_container(Request::new(request)).await.map(|_| ())
}

pub async fn status(service: &CriService, id: &str) -> cri::ContainerStatus {
    let request = cri::ContainerStatusRequest { container_id: id.into(), verbose: false };
    service.container_status(Request::new(request)).await.unwrap().into_inner().status.unwrap()
}

pub async fn exited(service: &CriService, id: &str) -> cri::ContainerStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = status(service, id).await;
        if now.state() == cri::ContainerState::ContainerExited {
            return now;
        }
        assert!(Instant::now() < deadline, "container {id} does not exit: {now:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub async fn exec(
    service: &CriService,
    id: &str,
    command: &[&str],
    timeout: i64,
) -> Result<cri::ExecSyncResponse, tonic::Status> {
    let request = cri::ExecSyncRequest {
        container_id: id.into(),
        cmd: command.iter().map(ToString::to_string).collect(),
        timeout,
    };
    service.exec_sync(Request::new(request)).await.map(tonic::Response::into_inner)
}

pub async fn stop(service: &CriService, id: &str, timeout: i64) {
    let request = cri::StopContainerRequest { container_id: id.into(), timeout };
    service.stop_container(Request::new(request)).await.unwrap();
}

pub async fn remove_sandbox(service: &CriService, id: &str) {
    let request = cri::StopPodSandboxRequest { pod_sandbox_id: id.into() };
    service.stop_pod_sandbox(Request::new(request)).await.unwrap();
    let request = cri::RemovePodSandboxRequest { pod_sandbox_id: id.into() };
    service.remove_pod_sandbox(Request::new(request)).await.unwrap();
}

pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
