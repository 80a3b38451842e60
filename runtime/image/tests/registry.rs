//! Pulls from a real registry, and what the store makes of them.

// Helpers outside test functions may fail by panicking, too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use common::{Layout, Registry, free_port, run, store};
use orlop_image::{Auth, ErrorKind, Image, ImageError, ImageStore};

struct Lab {
    base: tempfile::TempDir,
    registry: Registry,
    layout: Layout,
}

impl Lab {
    fn new() -> Self {
        Self::with("")
    }

    fn with(extra: &str) -> Self {
        let base = tempfile::tempdir().unwrap();
        let registry = Registry::start(base.path(), extra);
        let layout = Layout::build(base.path());
        Self { base, registry, layout }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    fn name(&self, rest: &str) -> String {
        format!("{}/{rest}", self.registry.host())
    }
}

type Tree = BTreeMap<PathBuf, (u32, u64, u32, u32, Option<PathBuf>)>;

/// Type and mode, size, owner and link target of everything below `root`, whiteouts included.
fn tree(root: &Path) -> Tree {
    let mut found = Tree::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let size = if metadata.is_file() { metadata.len() } else { 0 };
            let value = (metadata.mode(), size, metadata.uid(), metadata.gid(), fs::read_link(&path).ok());
            found.insert(path.strip_prefix(root).unwrap().to_owned(), value);
            if metadata.is_dir() {
                pending.push(path);
            }
        }
    }
    found
}

/// Lays the layers over each other the way overlayfs does, as far as these images need it.
fn merged(image: &Image) -> Tree {
    let mut merged = Tree::new();
    for layer in image.layers.iter().rev() {
        for (path, value) in tree(layer) {
            let file_type = fs::symlink_metadata(layer.join(&path)).unwrap().file_type();
            if file_type.is_char_device() {
                merged.retain(|known, _| !known.starts_with(&path));
            } else {
                merged.insert(path, value);
            }
        }
    }
    merged
}

fn reference_tree(lab: &Lab) -> Tree {
    let bundle = lab.path("reference");
    let image = format!("{}:v1", lab.layout.path.display());
    run("umoci", &["unpack", "--image", &image, bundle.to_str().unwrap()]);
    tree(&bundle.join("rootfs"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pulled_image_has_the_tree_umoci_unpacks() {
    let lab = Lab::new();
    lab.layout.push(&lab.name("app:v1"));
    let store = store(&lab.path("state"), None).await;
    let image = store.pull(&lab.name("app:v1"), None).await.unwrap();
    assert_eq!(merged(&image), reference_tree(&lab));
    assert_eq!(image.layers.len(), 2);
    assert_eq!(image.repo_tags, [lab.name("app:v1")]);
    assert_eq!(image.repo_digests.len(), 1);
    assert_eq!(image.config.config().as_ref().unwrap().user().as_deref(), Some("1000:1000"));
    assert!(image.size > 70_000);
    for private in ["state/images", "state/containers"] {
        assert_eq!(fs::metadata(lab.path(private)).unwrap().mode() & 0o777, 0o700, "{private}");
    }
    for known in [&image.id, &lab.name("app:v1"), &image.repo_digests[0], &image.id[7..20].to_owned()] {
        assert_eq!(store.find(known).unwrap().id, image.id, "{known}");
    }
    assert!(store.find(&lab.name("app:v2")).is_none());
    assert!(store.usage().await.unwrap().bytes > 70_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_by_digest_records_no_tag_and_shares_the_layers() {
    let lab = Lab::new();
    lab.layout.push(&lab.name("app:v1"));
    lab.layout.push(&lab.name("other:v1"));
    let store = store(&lab.path("state"), None).await;
    let tagged = store.pull(&lab.name("app:v1"), None).await.unwrap();
    let digest = tagged.repo_digests[0].split_once('@').unwrap().1;
    store.remove(&tagged.id).await.unwrap();
    let by_digest = store.pull(&lab.name(&format!("app:ignored@{digest}")), None).await.unwrap();
    assert!(by_digest.repo_tags.is_empty());
    assert_eq!(by_digest.repo_digests, tagged.repo_digests);
    let other = store.pull(&lab.name("other:v1"), None).await.unwrap();
    assert_eq!(other.layers, by_digest.layers);
    assert_eq!(other.repo_digests.len(), 2);
    assert_eq!(store.list().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moved_tag_leaves_the_old_image_without_it() {
    let lab = Lab::new();
    lab.layout.push(&lab.name("app:v1"));
    let store = store(&lab.path("state"), None).await;
    let old = store.pull(&lab.name("app:v1"), None).await.unwrap();
    run("umoci", &["config", "--image", &format!("{}:v1", lab.layout.path.display()), "--config.user", "0"]);
    lab.layout.push(&lab.name("app:v1"));
    let new = store.pull(&lab.name("app:v1"), None).await.unwrap();
    assert_ne!(new.id, old.id);
    assert_eq!(new.layers, old.layers);
    assert!(store.find(&old.id).unwrap().repo_tags.is_empty());
    assert_eq!(store.find(&lab.name("app:v1")).unwrap().id, new.id);
    store.remove(&old.id).await.unwrap();
    assert!(new.layers.iter().all(|layer| layer.is_dir()), "shared layers must stay");
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_pulls_share_one_result_and_a_dropped_one_leaves_nothing_half() {
    let lab = Lab::new();
    lab.layout.push(&lab.name("app:v1"));
    let store = store(&lab.path("state"), None).await;
    let name = lab.name("app:v1");
    let cancelled = tokio::time::timeout(std::time::Duration::from_millis(1), store.pull(&name, None)).await;
    assert!(cancelled.is_err(), "one millisecond must not suffice");
    let pulls = (0..8).map(|_| {
        let (store, name) = (store.clone(), name.clone());
        tokio::spawn(async move { store.pull(&name, None).await.unwrap().layers.clone() })
    });
    let pulls: Vec<_> = pulls.collect();
    let mut results = Vec::new();
    for pull in pulls {
        results.push(pull.await.unwrap());
    }
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(fs::read_dir(lab.path("state/images/layers")).unwrap().count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_blob_is_refused_and_nothing_of_it_stays() {
    let lab = Lab::new();
    lab.layout.push(&lab.name("app:v1"));
    let blobs = lab.registry.data.join("docker/registry/v2/blobs/sha256");
    let mut largest = (0, PathBuf::new());
    for path in tree(&blobs).keys().filter(|path| path.ends_with("data")) {
        let size = fs::metadata(blobs.join(path)).unwrap().len();
        largest = largest.max((size, blobs.join(path)));
    }
    let mut bytes = fs::read(&largest.1).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    fs::write(&largest.1, bytes).unwrap();
    let store = store(&lab.path("state"), None).await;
    let error = store.pull(&lab.name("app:v1"), None).await.unwrap_err();
    assert!(error.to_string().contains("blob is damaged: expected sha256:"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(store.list().is_empty());
    for layer in fs::read_dir(lab.path("state/images/layers")).unwrap() {
        assert!(!layer.unwrap().path().join("fs/bin/busybox").exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_tell_unreachable_from_absent() {
    let lab = Lab::new();
    let store = store(&lab.path("state"), None).await;
    let port = free_port();
    let error = store.pull(&format!("127.0.0.1:{port}/app:v1"), None).await.unwrap_err();
    assert!(error.is_registry_unavailable() && error.is_retryable());
    let text = error.to_string();
    assert!(
        text.starts_with(&format!("cannot reach registry 127.0.0.1:{port} for app:v1: connection refused; ")),
        "{text}"
    );
    let error = store.pull(&lab.name("absent:v1"), None).await.unwrap_err();
    assert!(matches!(error, ImageError::NotInRegistry { .. }), "{error}");
    assert!(error.is_not_found() && !error.is_retryable());
}

fn certificate_request<'a>(rest: &[&'a str]) -> Vec<&'a str> {
    [&["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"][..], rest].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn https_needs_the_registrys_ca_from_hosts_toml() {
    let base = tempfile::tempdir().unwrap();
    let file = |name: &str| base.path().join(name).to_str().unwrap().to_owned();
    let (ca, ca_key, key, request, certificate) =
        (file("ca.crt"), file("ca.key"), file("s.key"), file("s.csr"), file("s.crt"));
    fs::write(file("ext"), "subjectAltName=IP:127.0.0.1\n").unwrap();
    run(
        "openssl",
        &certificate_request(&[
            "-x509",
            "-keyout",
            &ca_key,
            "-out",
            &ca,
            "-days",
            "2",
            "-subj",
            "/CN=test ca",
        ]),
    );
    run("openssl", &certificate_request(&["-keyout", &key, "-out", &request, "-subj", "/CN=registry"]));
    let signing = ["-CA", &ca, "-CAkey", &ca_key, "-CAcreateserial", "-days", "2", "-extfile", &file("ext")];
    run("openssl", &[&["x509", "-req", "-in", &request, "-out", &certificate][..], &signing[..]].concat());
    let lab = Lab::with(&format!("  tls:\n    certificate: {certificate}\n    key: {key}\n"));
    lab.layout.push(&lab.name("app:v1"));

    let hosts = base.path().join("hosts");
    let directory = hosts.join(lab.registry.host());
    fs::create_dir_all(&directory).unwrap();
    let server = format!("server = \"https://{}\"\n", lab.registry.host());
    fs::write(directory.join("hosts.toml"), &server).unwrap();
    let store = store(&lab.path("state"), Some(hosts)).await;
    let error = store.pull(&lab.name("app:v1"), None).await.unwrap_err().to_string();
    assert!(error.contains("certificate") && error.contains("hosts.toml"), "{error}");
    // Read again for each pull: no reopening.
    fs::write(directory.join("hosts.toml"), format!("{server}ca = \"{ca}\"\n")).unwrap();
    let image = store.pull(&lab.name("app:v1"), None).await.unwrap();
    assert_eq!(image.layers.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_is_asked_first_and_the_registry_after_it() {
    let lab = Lab::new();
    lab.layout.push(&lab.name("library/app:v1"));
    let hosts = lab.path("hosts");
    fs::create_dir_all(hosts.join("docker.io")).unwrap();
    let dead = free_port();
    let text = format!(
        "server = \"http://127.0.0.1:{dead}\"\n[host.\"http://127.0.0.1:{dead}\"]\n[host.\"http://{}\"]\n",
        lab.registry.host()
    );
    fs::write(hosts.join("docker.io/hosts.toml"), text).unwrap();
    let store = store(&lab.path("state"), Some(hosts)).await;
    let image = store.pull("app:v1", None).await.unwrap();
    assert_eq!(image.repo_tags, ["docker.io/library/app:v1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn basic_credentials_are_wanted_rejected_and_accepted() {
    let base = tempfile::tempdir().unwrap();
    let htpasswd = base.path().join("htpasswd");
    // bcrypt of "geheim", cost 5: the registry accepts nothing else.
    let line = run(
        "python3",
        &["-c", "import crypt;print('u:'+crypt.crypt('geheim','$2b$05$abcdefghijklmnopqrstuu'))"],
    );
    fs::write(&htpasswd, line).unwrap();
    let lab = Lab::with(&format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", htpasswd.display()));
    let source = format!("oci:{}:v1", lab.layout.path.display());
    let target = format!("docker://{}", lab.name("app:v1"));
    let copy =
        ["--insecure-policy", "copy", "--dest-tls-verify=false", "--dest-creds=u:geheim", &source, &target];
    run("skopeo", &copy);
    let store = store(&lab.path("state"), None).await;
    let auth = |password: &str, server: &str| Auth {
        username: "u".into(),
        password: password.into(),
        server_address: server.into(),
        ..Auth::default()
    };
    let name = lab.name("app:v1");
    for wrong in [None, Some(auth("falsch", "")), Some(auth("geheim", "elsewhere.example"))] {
        let error = store.pull(&name, wrong.as_ref()).await.unwrap_err();
        assert!(error.is_unauthorized(), "{error}");
    }
    store.pull(&name, Some(&auth("geheim", &lab.registry.host()))).await.unwrap();
    // The image is here now, but that is no reason to hand it to someone without credentials.
    assert!(store.pull(&name, None).await.unwrap_err().is_unauthorized());
}

#[tokio::test(flavor = "multi_thread")]
async fn removal_is_immediate_frees_the_disk_and_spares_containers() {
    let lab = Lab::new();
    lab.layout.push(&lab.name("app:v1"));
    let store = store(&lab.path("state"), None).await;
    let image = store.pull(&lab.name("app:v1"), None).await.unwrap();
    let snapshot = store.prepare(&image, "container-1").await.unwrap();
    assert_eq!(snapshot.lower, image.layers);
    assert_eq!(store.prepare(&image, "container-1").await.unwrap().upper, snapshot.upper);
    fs::write(snapshot.upper.join("written"), vec![1u8; 100_000]).unwrap();
    assert!(store.snapshot_usage("container-1").await.unwrap().bytes >= 100_000);
    let removals: Vec<_> = (0..5)
        .map(|_| {
            let (s, id) = (store.clone(), image.id.clone());
            tokio::spawn(async move { s.remove(&id).await })
        })
        .collect();
    for removal in removals {
        removal.await.unwrap().unwrap();
    }
    assert!(store.list().is_empty());
    assert!(image.layers.iter().all(|layer| layer.is_dir()), "the container still needs them");
    assert!(matches!(store.prepare(&image, "container-2").await, Err(ImageError::LayersGone { .. })));
    store.release("container-1").await.unwrap();
    store.release("container-1").await.unwrap();
    assert!(!snapshot.upper.exists());
    for _ in 0..100 {
        if !image.layers.iter().any(|layer| layer.exists()) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert!(!image.layers.iter().any(|layer| layer.exists()), "unused layers must go");
    for key in ["", "..", "a/b", ".trash"] {
        assert!(matches!(store.prepare(&image, key).await, Err(ImageError::InvalidKey { .. })), "{key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_reopens_after_a_crash_with_what_was_complete() {
    let lab = Lab::new();
    lab.layout.push(&lab.name("app:v1"));
    let state = lab.path("state");
    let (image, kept) = {
        let store = store(&state, None).await;
        let image = store.pull(&lab.name("app:v1"), None).await.unwrap();
        store.prepare(&image, "gone").await.unwrap();
        let kept = store.prepare(&image, "kept").await.unwrap();
        (image, kept)
    };
    // What a kill leaves: unfinished layers, half-written records, an uncommitted layer.
    let images = state.join("images");
    fs::create_dir_all(images.join("tmp/999/fs/bin")).unwrap();
    fs::create_dir_all(images.join("layers/998/fs")).unwrap();
    fs::create_dir_all(images.join("trash/997/deep/er")).unwrap();
    fs::write(images.join("images/.tmp-x.json"), "{").unwrap();
    fs::write(images.join("images/bad.json"), "{").unwrap();
    let store = reopen(&state).await;
    assert_eq!(store.list().len(), 1);
    assert_eq!(store.find(&image.id).unwrap().layers, image.layers);
    assert!(!images.join("layers/998").exists() && !images.join("images/bad.json").exists());
    store.retain_snapshots(&["kept".to_owned()]).await.unwrap();
    assert!(kept.upper.is_dir() && !state.join("containers/gone").exists());
    assert!(matches!(
        ImageStore::open(orlop_image::Config::below(&state)).await,
        Err(ImageError::InUse { .. })
    ));
    drop(store);

    // A reboot that lost a file of a layer: that layer and its image go, and a pull brings them back.
    let store = reopen(&state).await;
    drop(store);
    let record = images.join("state.json");
    let text = fs::read_to_string(&record).unwrap();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    fs::write(&record, text.replace(boot.trim(), "another-boot")).unwrap();
    fs::remove_file(image.layers[1].join("etc/passwd")).unwrap();
    let store = reopen(&state).await;
    assert!(store.list().is_empty());
    let again = store.pull(&lab.name("app:v1"), None).await.unwrap();
    assert_eq!(merged(&again), reference_tree(&lab));
}

/// The last store's background work may still hold the lock for a moment.
async fn reopen(state: &Path) -> ImageStore {
    for _ in 0..100 {
        match ImageStore::open(orlop_image::Config::below(state)).await {
            Ok(store) => return store,
            Err(ImageError::InUse { .. }) => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the store stays locked");
}

#[tokio::test(flavor = "multi_thread")]
async fn layouts_and_archives_import_alike() {
    let base = tempfile::tempdir().unwrap();
    let layout = Layout::build(base.path());
    let path = |name: &str| base.path().join(name).to_str().unwrap().to_owned();
    let source = format!("oci:{}:v1", layout.path.display());
    let copy = |target: &str| run("skopeo", &["--insecure-policy", "copy", &source, target]);
    copy(&format!("docker-archive:{}:example.com/docker:v1", path("docker.tar")));
    copy(&format!("oci-archive:{}:v1", path("oci.tar")));
    run("gzip", &["-k", &path("docker.tar")]);
    let mut trees = Vec::new();
    for (number, (source, name, tag)) in [
        (path("layout"), Some("named:1"), "docker.io/library/named:1"),
        (path("oci.tar"), Some("named:1"), "docker.io/library/named:1"),
        (path("docker.tar"), None, "example.com/docker:v1"),
        (path("docker.tar.gz"), None, "example.com/docker:v1"),
    ]
    .into_iter()
    .enumerate()
    {
        let store = store(&base.path().join(format!("state-{number}")), None).await;
        let images = store.import(Path::new(&source), name).await.unwrap();
        assert_eq!(images.len(), 1);
        assert_eq!(images[0].repo_tags, [tag]);
        assert_eq!(store.find(tag).unwrap().id, images[0].id);
        trees.push(merged(&images[0]));
    }
    assert!(trees[0].len() > 10);
    assert!(trees.windows(2).all(|pair| pair[0] == pair[1]));
    let store = store(&base.path().join("state-x"), None).await;
    fs::write(path("garbage"), "not an archive").unwrap();
    let error = store.import(Path::new(&path("garbage")), None).await.unwrap_err().to_string();
    assert!(error.contains("cannot import"), "{error}");
}
