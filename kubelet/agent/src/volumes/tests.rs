//! Volumes as the kernel has them. These tests need root: each works in a mount namespace of its own, on a thread of its
//! own, so nothing is left on the machine even when one fails.

use super::*;
use crate::objects::fake::Fake;
use serde_json::json;
use std::fs;
use std::future::Future;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::Ordering;

/// Runs `test` on a thread with private mounts. Threads that it starts share them.
pub(crate) fn in_private_mounts<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let thread = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("these tests need root");
        let flags = rustix::mount::MountPropagationFlags::REC | rustix::mount::MountPropagationFlags::PRIVATE;
        rustix::mount::mount_change("/", flags).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

struct Setup {
    _dir: tempfile::TempDir,
    facts: Facts,
    fake: Arc<Fake>,
    objects: Objects,
    volumes: Volumes,
}

impl Setup {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut facts = Facts::new("n");
        facts.root_dir = dir.path().to_owned();
        let fake = Arc::new(Fake::default());
        let objects = Objects::new(fake.clone());
        let volumes = Volumes::new(facts.clone().fixed(), objects.clone());
        Self { _dir: dir, facts, fake, objects, volumes }
    }

    fn pod_dir(&self) -> PathBuf {
        self.facts.pod_dir("u")
    }
}

fn pod(volumes: serde_json::Value) -> Pod {
    let context = json!({"fsGroup": 4242, "runAsUser": 1000});
    serde_json::from_value(
        json!({"metadata": {"name": "p", "namespace": "ns", "uid": "u", "labels": {"a": "1"}},
        "spec": {"securityContext": context, "serviceAccountName": "sa",
            "containers": [{"name": "c"}], "volumes": volumes}}),
    )
    .unwrap()
}

fn mounts(dir: &Path) -> usize {
    let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    table.lines().filter(|line| line.split(' ').nth(4).unwrap().starts_with(dir.to_str().unwrap())).count()
}

async fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    for _ in 0..500 {
        if check() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not come to pass");
}

#[test]
fn every_kind_of_volume_is_made_kept_and_removed() {
    in_private_mounts(|| async {
        let mut setup = Setup::new();
        setup.fake.put_config_map("ns", "m", &[("k", "1"), ("l", "2")]);
        setup.fake.put_secret("ns", "s", &[("pass", b"word")]);
        let pod = pod(json!([
            {"name": "scratch", "emptyDir": {}},
            {"name": "ram", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
            {"name": "etc", "hostPath": {"path": "/etc", "type": "Directory"}},
            {"name": "conf", "configMap": {"name": "m", "defaultMode": 0o440}},
            {"name": "sec", "secret": {"secretName": "s", "items": [{"key": "pass", "path": "deep/pw", "mode": 0o400}]}},
            {"name": "down", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
            {"name": "token", "projected": {"sources": [
                {"serviceAccountToken": {"path": "token"}}, {"configMap": {"name": "m", "items": [{"key": "k", "path": "ca"}]}}]}}
        ]));
        setup.objects.register(&pod);
        let mounted = setup.volumes.mount(&pod).await.unwrap();
        let path = |name: &str| mounted.get(name).unwrap().path.clone();
        let base = setup.pod_dir().join("volumes");
        assert_eq!(path("scratch"), base.join("kubernetes.io~empty-dir/scratch"));
        assert_eq!(path("sec"), base.join("kubernetes.io~secret/sec"));
        assert_eq!(path("etc"), Path::new("/etc"));
        let stat = |path: PathBuf| {
            let metadata = fs::metadata(path).unwrap();
            (metadata.gid(), metadata.mode() & 0o7777)
        };
        assert_eq!(stat(path("scratch")), (4242, 0o2777));
        assert_eq!(stat(path("ram")), (4242, 0o3777));
        assert_eq!(fs::read_to_string(path("conf").join("l")).unwrap(), "2");
        assert_eq!(stat(path("conf").join("l")), (4242, 0o440));
        assert_eq!(fs::read(path("sec").join("deep/pw")).unwrap(), b"word");
        assert_eq!(stat(path("sec").join("deep/pw")), (4242, 0o440));
        assert_eq!(fs::read_to_string(path("down").join("labels")).unwrap(), "a=\"1\"");
        assert_eq!(fs::read_to_string(path("token").join("token")).unwrap(), "token-0 of ns/sa");
        let token = fs::metadata(path("token").join("token")).unwrap();
        assert_eq!((token.uid(), token.gid(), token.mode() & 0o777), (1000, 4242, 0o640));
        assert!(mounted.get("sec").unwrap().read_only && !mounted.get("scratch").unwrap().read_only);
        assert_eq!(mounts(&base), 4, "ram, sec, down and token lie in memory");
        let full = fs::write(path("ram").join("big"), vec![0; 2 << 20]).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);

        fs::write(path("scratch").join("data"), "kept").unwrap();
        fs::write(path("ram").join("big"), "kept").unwrap();
        // As after a restart: nothing in memory, everything in the kernel.
        setup.volumes = Volumes::new(setup.facts.clone().fixed(), setup.objects.clone());
        tokio::time::sleep(Duration::from_millis(50)).await;
        let again = &setup.volumes;
        assert_eq!(again.mount(&pod).await.unwrap(), mounted);
        assert_eq!(fs::read_to_string(path("ram").join("big")).unwrap(), "kept");
        assert_eq!(fs::read_to_string(path("scratch").join("data")).unwrap(), "kept");
        assert_eq!(mounts(&base), 4);

        for _ in 0..2 {
            again.unmount("u").await.unwrap();
            assert!(!base.exists());
            assert_eq!(mounts(&setup.pod_dir()), 0);
        }
        assert!(setup.pod_dir().exists());
        again.remove("u").await.unwrap();
        assert!(!setup.pod_dir().exists() && Path::new("/etc").exists());
    });
}

#[test]
fn contents_follow_their_objects_and_stay_when_those_vanish() {
    in_private_mounts(|| async {
        let setup = Setup::new();
        setup.fake.put_config_map("ns", "m", &[("k", "1")]);
        let pod = pod(json!([{"name": "conf", "configMap": {"name": "m"}}]));
        setup.objects.register(&pod);
        let mounted = setup.volumes.mount(&pod).await.unwrap();
        let file = mounted.get("conf").unwrap().path.join("k");
        assert_eq!(fs::read_to_string(&file).unwrap(), "1");
        setup.fake.put_config_map("ns", "m", &[("k", "2"), ("l", "3")]);
        eventually("the new content", || fs::read_to_string(&file).unwrap() == "2").await;
        assert_eq!(fs::read_to_string(file.with_file_name("l")).unwrap(), "3");
        setup.volumes.unmount("u").await.unwrap();
        setup.fake.put_config_map("ns", "m", &[("k", "4")]);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!file.exists(), "an unmounted volume came back");
    });
}

#[test]
fn volumes_filled_by_an_earlier_run_serve_while_the_api_server_is_away() {
    in_private_mounts(|| async {
        let mut setup = Setup::new();
        setup.fake.put_secret("ns", "s", &[("k", b"v")]);
        let pod = pod(json!([{"name": "v", "secret": {"secretName": "s"}}]));
        let mounted = setup.volumes.mount(&pod).await.unwrap();
        setup.fake.gone.store(true, Ordering::SeqCst);
        // As after a restart: nothing in memory.
        setup.objects = Objects::new(setup.fake.clone());
        setup.volumes = Volumes::new(setup.facts.clone().fixed(), setup.objects.clone());
        tokio::time::pause();
        assert_eq!(setup.volumes.mount(&pod).await.unwrap(), mounted);
        assert_eq!(fs::read(mounted.get("v").unwrap().path.join("k")).unwrap(), b"v");
        tokio::time::resume();
        setup.volumes.unmount("u").await.unwrap();
        tokio::time::pause();
        let error = setup.volumes.mount(&pod).await.unwrap_err();
        assert!(error.to_string().contains("secret"), "{error}");
    });
}

#[test]
fn tokens_that_are_due_are_replaced_in_place() {
    in_private_mounts(|| async {
        let setup = Setup::new();
        let sources = json!([{"serviceAccountToken": {"path": "t", "expirationSeconds": 1}}]);
        let pod = pod(json!([{"name": "token", "projected": {"sources": sources}}]));
        let mounted = setup.volumes.mount(&pod).await.unwrap();
        let file = mounted.get("token").unwrap().path.join("t");
        assert_eq!(fs::read_to_string(&file).unwrap(), "token-0 of ns/sa");
        eventually("the new token", || fs::read_to_string(&file).unwrap() == "token-1 of ns/sa").await;
        assert_eq!(setup.fake.tokens.load(Ordering::SeqCst), 2);
    });
}

#[test]
fn what_cannot_be_mounted_says_so_in_the_words_of_an_event() {
    in_private_mounts(|| async {
        let setup = Setup::new();
        setup.fake.put_config_map("ns", "m", &[("k", "1"), ("..bad", "x")]);
        let prefix = "MountVolume.SetUp failed for volume \"v\" : ";
        for (volume, message) in [
            (json!({"name": "v", "secret": {"secretName": "none"}}), "secret \"none\" not found"),
            (json!({"name": "v", "configMap": {"name": "none"}}), "configmap \"none\" not found"),
            (
                json!({"name": "v", "configMap": {"name": "m", "items": [{"key": "z", "path": "z"}]}}),
                "references non-existent config key: z",
            ),
            (
                json!({"name": "v", "configMap": {"name": "m", "items": [{"key": "k", "path": "../x"}]}}),
                "invalid path \"../x\": it must not contain \"..\"",
            ),
            (
                json!({"name": "v", "configMap": {"name": "m"}}),
                "invalid path \"..bad\": it must not start with \"..\"",
            ),
            (
                json!({"name": "v", "persistentVolumeClaim": {"claimName": "c"}}),
                "volume type persistentVolumeClaim is not supported yet by this node agent; pod cannot start",
            ),
            (
                json!({"name": "v", "projected": {"sources": [{"clusterTrustBundle": {"path": "p"}}]}}),
                "volume type projected clusterTrustBundle is not supported yet by this node agent; pod cannot start",
            ),
            (
                json!({"name": "v", "hostPath": {"path": "/nowhere", "type": "File"}}),
                "hostPath type check failed: /nowhere is not a file",
            ),
            (json!({"name": "v"}), "the volume names no source; pod cannot start"),
        ] {
            let error = setup.volumes.mount(&pod(json!([volume]))).await.unwrap_err();
            assert_eq!(error.to_string(), format!("{prefix}{message}"));
            assert_eq!(error.reason(), "FailedMount");
        }
        let optional = json!([{"name": "v", "secret": {"secretName": "none", "optional": true}},
            {"name": "w", "configMap": {"name": "m", "optional": true, "items": [{"key": "z", "path": "z"}]}}]);
        assert!(setup.volumes.mount(&pod(optional)).await.is_ok());
    });
}

#[test]
fn directories_of_pods_that_are_gone_are_removed_with_their_mounts() {
    in_private_mounts(|| async {
        let mut setup = Setup::new();
        setup.fake.put_secret("ns", "s", &[("k", b"v")]);
        let old = pod(json!([{"name": "v", "secret": {"secretName": "s"}}, {"name": "e", "emptyDir": {}}]));
        let mounted = setup.volumes.mount(&old).await.unwrap();
        // Something of the host's that a container mounted into its volume must survive.
        let precious = tempfile::tempdir().unwrap();
        fs::write(precious.path().join("file"), "precious").unwrap();
        let inside = mounted.get("e").unwrap().path.join("inside");
        fs::create_dir(&inside).unwrap();
        rustix::mount::mount_bind(precious.path(), &inside).unwrap();
        fs::create_dir_all(setup.facts.pod_dir("kept")).unwrap();
        // As after a restart: nothing in memory.
        setup.volumes = Volumes::new(setup.facts.clone().fixed(), setup.objects.clone());
        tokio::time::sleep(Duration::from_millis(50)).await;
        setup.volumes.remove("u").await.unwrap();
        assert!(!setup.pod_dir().exists() && setup.facts.pod_dir("kept").exists());
        assert_eq!(mounts(&setup.pod_dir()), 0);
        assert_eq!(fs::read_to_string(precious.path().join("file")).unwrap(), "precious");
        for hostile in ["", "..", ".", "a/b"] {
            assert!(setup.volumes.remove(hostile).await.is_err(), "{hostile:?}");
        }
        assert!(setup.facts.root_dir.exists());
    });
}
