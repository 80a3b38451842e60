//! Pods driven end to end: a real manager, real workers and a real executor on a runtime in memory, fed from a static pod
//! directory. Killing the kubelet is dropping all of it; the runtime stays.

mod api;
mod api_pods;
mod breakdowns;
mod fake_runtime;

use super::credentials::Keyring;
use super::directory::{LookupError, PodDirectory, PodKey};
use super::events::Events;
use super::executor::Services;
use super::images::ImageManager;
use super::manager;
use super::parts::{
    ContainerRequest, PartError, PodParts, ProbeKind, ProbeOutcome, ProbeTarget, SandboxPlan,
};
use super::runtime_client::RuntimeClient;
use super::runtime_state::RunState;
use crate::context::{Context, MissingControllers, Settings};
use fake_runtime::{FakeRuntime, carries_identity};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use k8s_openapi::api::core::v1::{Container, ContainerStatus, LifecycleHandler, Pod, PodStatus};
use orlop_proto::cri;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// Neighbours that do nothing but remember.
#[derive(Default)]
struct MemoryParts {
    notes: Mutex<Vec<String>>,
    pods_dir: Mutex<PathBuf>,
    /// The next container's configuration panics.
    breaks_down: AtomicBool,
    probed: Mutex<Vec<ProbeTarget>>,
}

impl MemoryParts {
    fn note(&self, text: String) {
        self.notes.lock().unwrap().push(text);
    }

    fn notes(&self) -> Vec<String> {
        self.notes.lock().unwrap().clone()
    }
}

impl PodParts for MemoryParts {
    fn sandbox_config<'a>(
        &'a self,
        _: &'a Arc<Pod>,
        _: u32,
    ) -> BoxFuture<'a, Result<SandboxPlan, PartError>> {
        async { Ok(SandboxPlan { config: cri::PodSandboxConfig::default(), runtime_handler: String::new() }) }
            .boxed()
    }

    fn container_config(
        &self,
        _: ContainerRequest,
    ) -> BoxFuture<'_, Result<cri::ContainerConfig, PartError>> {
        let breaks_down = self.breaks_down.swap(false, Ordering::SeqCst);
        async move {
            assert!(!breaks_down, "as told by the test");
            Ok(cri::ContainerConfig::default())
        }
        .boxed()
    }

    fn mount<'a>(&'a self, _: &'a Arc<Pod>) -> BoxFuture<'a, Result<(), PartError>> {
        self.note("mount".into());
        async { Ok(()) }.boxed()
    }

    fn unmount<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<(), PartError>> {
        self.note("unmount".into());
        async { Ok(()) }.boxed()
    }

    fn remove<'a>(&'a self, pod_uid: &'a str) -> BoxFuture<'a, Result<(), PartError>> {
        let directory = self.pods_dir.lock().unwrap().join(pod_uid);
        async move {
            std::fs::remove_dir_all(directory).ok();
            Ok(())
        }
        .boxed()
    }

    fn hook<'a>(
        &'a self,
        _: &'a Arc<Pod>,
        container: &'a Container,
        _: &'a str,
        _: &'a LifecycleHandler,
    ) -> BoxFuture<'a, Result<(), PartError>> {
        self.note(format!("hook {}", container.name));
        async { Ok(()) }.boxed()
    }

    fn start_probes(&self, target: ProbeTarget) {
        self.probed.lock().unwrap().push(target);
    }

    fn stop_probes(&self, _: &str) {}

    fn terminate_probes(&self, _: &str) {
        self.note("only readiness".into());
    }
}

/// A node: its runtime and disk outlive its kubelet.
struct Node {
    root: tempfile::TempDir,
    runtime: FakeRuntime,
    parts: Arc<MemoryParts>,
    api: Option<orlop_api::Client>,
    kubelet: Option<Kubelet>,
}

struct Kubelet {
    task: JoinHandle<()>,
    directory: PodDirectory,
    probes: mpsc::Sender<ProbeOutcome>,
    /// All tasks of one kubelet, so that killing it kills every one.
    executor: Option<tokio::runtime::Runtime>,
}

impl Node {
    fn new() -> Self {
        Self::of(None)
    }

    fn with_api(api: &api::Api) -> Self {
        Self::of(Some(api.client()))
    }

    fn of(api: Option<orlop_api::Client>) -> Self {
        let root = tempfile::tempdir().unwrap();
        for name in ["manifests", "cgroup"] {
            std::fs::create_dir(root.path().join(name)).unwrap();
        }
        let mut node = Self { root, runtime: FakeRuntime::new(), parts: Arc::default(), api, kubelet: None };
        *node.parts.pods_dir.lock().unwrap() = node.path("kubelet/pods");
        node.start_kubelet();
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn start_kubelet(&mut self) {
        let executor =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let settings = Settings {
            root_dir: self.path("kubelet"),
            pod_logs_dir: self.path("logs"),
            container_links_dir: self.path("links"),
            static_pod_path: Some(self.path("manifests")),
            cgroup_mount: self.path("cgroup"),
            missing_controllers: MissingControllers::Warn,
            node_ips: vec!["192.0.2.1".parse().unwrap()],
            ..Settings::default()
        };
        let cri = self.runtime.cri();
        let runtime = RuntimeClient::new(cri.clone(), Duration::from_secs(5));
        let keyring = Keyring::new(None, &self.path("kubelet"));
        let images = ImageManager::new(runtime.clone(), Events::log_only(), keyring, 4, 0, 1);
        let context = Context {
            settings,
            node_name: "me".into(),
            api: self.api.clone(),
            cri,
            events: Events::log_only(),
            node: watch::channel(None).1,
        };
        let parts: Arc<dyn PodParts> = Arc::clone(&self.parts) as Arc<dyn PodParts>;
        let services = Services { context: Arc::new(context), runtime, parts, images: Arc::new(images) };
        let directory = PodDirectory::default();
        let (probes, outcomes) = mpsc::channel(16);
        let task = executor.spawn(manager::run(services, directory.clone(), outcomes));
        self.kubelet = Some(Kubelet { task, directory, probes, executor: Some(executor) });
    }

    /// As by SIGKILL: nothing gets to finish.
    fn kill_kubelet(&mut self) {
        let mut kubelet = self.kubelet.take().unwrap();
        kubelet.task.abort();
        kubelet.executor.take().unwrap().shutdown_timeout(Duration::from_secs(5));
    }

    fn write_pod(&self, name: &str, spec: Value) {
        let manifest = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec});
        let temporary = self.path("manifest.new");
        std::fs::write(&temporary, manifest.to_string()).unwrap();
        std::fs::rename(temporary, self.manifest(name)).unwrap();
    }

    fn manifest(&self, name: &str) -> PathBuf {
        self.path("manifests").join(format!("{name}.json"))
    }

    fn directory(&self) -> &PodDirectory {
        &self.kubelet.as_ref().unwrap().directory
    }

    fn key(name: &str) -> PodKey<'_> {
        PodKey { namespace: "default", name, uid: None }
    }

    fn status(&self, name: &str) -> Option<PodStatus> {
        self.directory().pod(Self::key(&format!("{name}-me"))).ok()?.status.clone()
    }

    fn container(&self, pod: &str, container: &str) -> Option<ContainerStatus> {
        let status = self.status(pod)?;
        let all = status
            .container_statuses
            .into_iter()
            .flatten()
            .chain(status.init_container_statuses.into_iter().flatten());
        all.into_iter().find(|one| one.name == container)
    }

    fn phase(&self, pod: &str) -> String {
        self.status(pod).and_then(|status| status.phase).unwrap_or_default()
    }

    fn is_ready(&self, pod: &str) -> bool {
        let conditions = self.status(pod).and_then(|status| status.conditions).unwrap_or_default();
        conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
    }

    fn probe(&self, container: &str, kind: ProbeKind, healthy: bool) {
        let probed = self.parts.probed.lock().unwrap();
        let target =
            probed.iter().rev().find(|target| target.container == container).expect("its probes run");
        let outcome = ProbeOutcome {
            pod_uid: target.pod.metadata.uid.clone().unwrap(),
            container: container.to_owned(),
            container_id: target.container_id.clone(),
            kind,
            healthy,
            grace_seconds: None,
        };
        self.kubelet.as_ref().unwrap().probes.blocking_send(outcome).unwrap();
    }

    fn wait(&self, what: &str, is_so: impl Fn() -> bool) {
        let begin = Instant::now();
        while !is_so() {
            if begin.elapsed() > Duration::from_secs(20) {
                let pods = serde_json::to_string_pretty(
                    &self.kubelet.as_ref().map(|kubelet| kubelet.directory.list()),
                );
                panic!("never: {what}\ncalls: {:#?}\npods: {}", self.runtime.calls(), pods.unwrap());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.kubelet.is_some() {
            self.kill_kubelet();
        }
    }
}

fn one(name: &str) -> Value {
    json!({"name": name, "image": "image:1"})
}

fn exists(path: &Path) -> bool {
    std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some())
}

#[test]
fn a_pod_runs_is_ready_has_an_address_and_can_be_found() {
    let node = Node::new();
    node.write_pod("web", json!({"containers": [one("c")]}));
    node.wait("ready", || node.is_ready("web"));
    assert_eq!(node.phase("web"), "Running");
    let status = node.status("web").unwrap();
    assert!(status.pod_ip.unwrap().starts_with("10.0.0."));
    assert_eq!(status.host_ip.as_deref(), Some("192.0.2.1"));
    assert_eq!(status.qos_class.as_deref(), Some("BestEffort"));
    assert!(carries_identity(&node.runtime));
    let found = node.directory().container(Node::key("web-me"), "c", false).unwrap();
    assert_eq!(found.state, RunState::Running);
    assert!(found.log_path.ends_with("c/0.log"), "{:?}", found.log_path);
    let unknown = node.directory().container(Node::key("web-me"), "x", false).unwrap_err();
    assert_eq!(unknown, LookupError::NoContainer { name: "web-me".into(), container: "x".into() });
    assert_eq!(std::fs::read_dir(node.path("links")).unwrap().count(), 1);
}

#[test]
fn a_crashing_container_is_restarted_once_at_once_and_then_backs_off() {
    let node = Node::new();
    node.runtime.exits_at_once("c", 3);
    node.write_pod("crash", json!({"containers": [one("c")]}));
    let waiting = || node.container("crash", "c")?.state?.waiting?.reason;
    node.wait("back-off", || waiting().as_deref() == Some("CrashLoopBackOff"));
    assert_eq!(node.runtime.count("start c"), 2);
    let status = node.container("crash", "c").unwrap();
    assert_eq!(status.restart_count, 1);
    assert_eq!(status.last_state.unwrap().terminated.unwrap().exit_code, 3);
    assert_eq!(node.phase("crash"), "Running");
    assert!(!node.is_ready("crash"));
    let previous = node.directory().container(Node::key("crash-me"), "c", true).unwrap();
    assert_eq!(previous.attempt, 1, "the one that ended last");
}

#[test]
fn a_back_off_survives_the_kubelet() {
    let mut node = Node::new();
    node.runtime.exits_at_once("c", 3);
    node.write_pod("crash", json!({"containers": [one("c")]}));
    let backs_off = |node: &Node| {
        let state = node.container("crash", "c").and_then(|one| one.state);
        state.and_then(|state| state.waiting).and_then(|w| w.reason).as_deref() == Some("CrashLoopBackOff")
    };
    node.wait("back-off", || backs_off(&node));
    node.kill_kubelet();
    node.start_kubelet();
    node.wait("back-off again", || backs_off(&node));
    assert_eq!(node.runtime.count("start c"), 2, "the restart of the kubelet did not restart the container");
}

#[test]
fn init_containers_run_one_after_the_other_and_before_the_others() {
    let node = Node::new();
    node.runtime.exits_at_once("second", 0);
    let side = json!({"name": "side", "image": "image:1", "restartPolicy": "Always"});
    node.write_pod(
        "p",
        json!({"initContainers": [one("first"), side, one("second")], "containers": [one("main")]}),
    );
    node.wait("first runs", || node.runtime.running() == ["first"]);
    assert_eq!(node.phase("p"), "Pending");
    let state = node.container("p", "main").unwrap().state.unwrap();
    assert_eq!(state.waiting.unwrap().reason.as_deref(), Some("PodInitializing"));
    node.runtime.exit("first", 0);
    node.wait("ready", || node.is_ready("p"));
    let starts: Vec<_> = node.runtime.calls().into_iter().filter(|call| call.starts_with("start")).collect();
    assert_eq!(starts, ["start first", "start side", "start second", "start main"]);
}

#[test]
fn a_job_pod_ends_with_its_exit_code_once_although_the_kubelet_dies_in_between() {
    let mut node = Node::new();
    node.write_pod("job", json!({"restartPolicy": "Never", "containers": [one("c")]}));
    node.wait("runs", || node.runtime.running() == ["c"]);
    node.kill_kubelet();
    node.runtime.exit("c", 7);
    node.start_kubelet();
    node.wait("failed", || node.phase("job") == "Failed");
    let ended = node.container("job", "c").unwrap().state.unwrap().terminated.unwrap();
    assert_eq!(ended.exit_code, 7);
    node.wait("volumes unmounted", || node.parts.notes().contains(&"unmount".to_owned()));
    node.kill_kubelet();
    node.start_kubelet();
    node.wait("failed again", || node.phase("job") == "Failed");
    assert_eq!(node.runtime.count("start c"), 1);
}

#[test]
fn a_restarted_kubelet_restarts_nothing_and_keeps_readiness_until_a_probe_says_otherwise() {
    let mut node = Node::new();
    let probed = json!({"name": "c", "image": "image:1", "readinessProbe": {"tcpSocket": {"port": 1}}});
    node.write_pod("p", json!({"containers": [probed]}));
    node.wait("probed", || !node.parts.probed.lock().unwrap().is_empty());
    assert!(!node.is_ready("p"));
    node.probe("c", ProbeKind::Readiness, true);
    node.wait("ready", || node.is_ready("p"));
    let began = node.status("p").unwrap().start_time;
    node.kill_kubelet();
    node.start_kubelet();
    node.wait("seen", || node.status("p").is_some());
    assert!(node.is_ready("p"), "the first status after the restart is already ready");
    assert_eq!(node.status("p").unwrap().start_time, began);
    node.wait("probed again", || node.parts.probed.lock().unwrap().len() == 2);
    assert!(node.parts.probed.lock().unwrap()[1].seed.ready);
    assert_eq!((node.runtime.count("create"), node.runtime.count("sandbox")), (1, 1));
    node.probe("c", ProbeKind::Readiness, false);
    node.wait("not ready", || !node.is_ready("p"));
}

#[test]
fn a_container_that_fails_its_liveness_probe_is_killed_and_restarted() {
    let node = Node::new();
    let probed = json!({"name": "c", "image": "image:1", "livenessProbe": {"tcpSocket": {"port": 1}}});
    node.write_pod("p", json!({"containers": [probed], "terminationGracePeriodSeconds": 7}));
    node.wait("probed", || !node.parts.probed.lock().unwrap().is_empty());
    node.probe("c", ProbeKind::Liveness, false);
    node.wait("restarted", || {
        node.container("p", "c").is_some_and(|one| one.restart_count == 1 && one.ready)
    });
    assert!(node.runtime.calls().contains(&"stop c 7".to_owned()), "{:?}", node.runtime.calls());
}

#[test]
fn a_removed_pod_runs_its_hook_gets_its_grace_and_leaves_nothing() {
    let node = Node::new();
    let hooked =
        json!({"name": "main", "image": "image:1", "lifecycle": {"preStop": {"sleep": {"seconds": 1}}}});
    let side = json!({"name": "side", "image": "image:1", "restartPolicy": "Always"});
    node.runtime.is_stubborn("main");
    node.write_pod(
        "p",
        json!({"initContainers": [side], "containers": [hooked], "terminationGracePeriodSeconds": 3}),
    );
    node.wait("ready", || node.is_ready("p"));
    let uid = node.directory().pod(Node::key("p-me")).unwrap().metadata.uid.clone().unwrap();
    let begin = Instant::now();
    std::fs::remove_file(node.manifest("p")).unwrap();
    node.wait("gone", || node.runtime.is_empty() && node.directory().list().is_empty());
    assert!(begin.elapsed() >= Duration::from_secs(2), "it was given its grace");
    let calls = node.runtime.calls();
    let at = |prefix: &str| calls.iter().position(|call| call.starts_with(prefix)).unwrap();
    assert!(at("stop main") < at("stop side") && at("stop side") < at("stop-sandbox"), "{calls:?}");
    let notes = node.parts.notes();
    for note in ["hook main", "unmount", "only readiness"] {
        assert!(notes.contains(&note.to_owned()), "{notes:?}");
    }
    assert!(!node.path("kubelet/pods").join(uid).exists());
    assert!(!exists(&node.path("logs")) && !exists(&node.path("links")));
    assert!(!exists(&node.path("cgroup/kubepods/besteffort")));
}

#[test]
fn a_pod_whose_manifest_went_away_while_the_kubelet_was_dead_is_ended() {
    let mut node = Node::new();
    node.write_pod("p", json!({"containers": [one("c")]}));
    node.write_pod("q", json!({"containers": [one("d")]}));
    node.wait("both run", || node.runtime.running().len() == 2);
    node.kill_kubelet();
    std::fs::remove_file(node.manifest("p")).unwrap();
    node.start_kubelet();
    node.wait("only one runs", || {
        node.runtime.running() == ["d"] && node.runtime.count("remove-sandbox") == 1
    });
    assert_eq!(node.runtime.count("start"), 2);
}

#[test]
fn a_lost_sandbox_is_replaced_and_its_containers_with_it() {
    let node = Node::new();
    node.write_pod("p", json!({"containers": [one("c")]}));
    node.wait("ready", || node.is_ready("p"));
    node.runtime.lose_sandboxes();
    node.wait("ready again", || node.is_ready("p") && node.runtime.count("sandbox 1") == 1);
    assert_eq!(node.container("p", "c").unwrap().restart_count, 1);
}

#[test]
fn an_image_that_cannot_be_pulled_is_waited_for_with_back_off() {
    let node = Node::new();
    node.runtime.lacks_image("image:1");
    node.write_pod("p", json!({"containers": [one("c")]}));
    let reason = || node.container("p", "c")?.state?.waiting?.reason;
    node.wait("failed pull", || reason().as_deref() == Some("ErrImagePull"));
    node.wait("back-off", || reason().as_deref() == Some("ImagePullBackOff"));
    assert_eq!(node.phase("p"), "Pending");
    node.runtime.has_image_now("image:1");
    node.wait("ready", || node.is_ready("p"));
    assert_eq!(node.runtime.count("pull"), 2);
}

#[test]
fn a_changed_manifest_replaces_the_pod_after_the_old_one_is_gone() {
    let node = Node::new();
    node.write_pod("p", json!({"containers": [one("c")], "terminationGracePeriodSeconds": 1}));
    node.wait("ready", || node.is_ready("p"));
    node.write_pod("p", json!({"containers": [one("d")], "terminationGracePeriodSeconds": 1}));
    node.wait("the new one runs", || node.runtime.running() == ["d"] && node.is_ready("p"));
    let calls = node.runtime.calls();
    let at = |wanted: &str| calls.iter().position(|call| call == wanted).unwrap();
    assert!(at("remove-sandbox") < at("start d"), "{calls:?}");
}

#[test]
fn a_pod_that_wants_a_taken_host_port_is_rejected_and_others_are_not_concerned() {
    let node = Node::new();
    let with_port = |name: &str| json!({"name": name, "image": "image:1", "ports": [{"containerPort": 80, "hostPort": 80}]});
    node.write_pod("a", json!({"containers": [with_port("c")]}));
    node.wait("ready", || node.is_ready("a"));
    node.write_pod("b", json!({"containers": [with_port("d")]}));
    node.wait("rejected", || node.phase("b") == "Failed");
    assert_eq!(node.status("b").unwrap().reason.as_deref(), Some("NodePorts"));
    assert_eq!(node.runtime.running(), ["c"]);
}
