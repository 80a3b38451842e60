//! Small images made of programs that are on the machine, as OCI layouts.

use anyhow::{Context, Result, bail};
use aws_lc_rs::digest::{SHA256, digest};
use serde_json::json;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What an image runs and contains.
#[derive(Debug, Clone, Default)]
pub struct Recipe {
    pub name: String,
    /// Programs copied in: where from, where to. Their shared libraries come along.
    pub programs: Vec<(PathBuf, String)>,
    /// Symbolic links: name, target.
    pub links: Vec<(String, String)>,
    pub entrypoint: Vec<String>,
    pub command: Vec<String>,
}

impl Recipe {
    /// Debian's static busybox with a link for each of its applets that tests use.
    pub fn busybox(name: &str) -> Self {
        const APPLETS: &str = "sh cat echo ls sleep true false env id hostname wget nc httpd dd mount ps top tar \
                               touch mkdir rm stat head tail seq date grep kill test printf wc nslookup ip df vi usleep tr sed awk";
        Self {
            name: name.to_owned(),
            programs: vec![("/bin/busybox".into(), "/bin/busybox".into())],
            links: APPLETS
                .split_whitespace()
                .map(|a| (format!("/bin/{a}"), "/bin/busybox".to_owned()))
                .collect(),
            entrypoint: Vec::new(),
            command: vec!["/bin/sh".into()],
        }
    }

    /// The image that shows orlop itself: its own program answering requests.
    pub fn demo(name: &str, orlop: &Path) -> Self {
        Self {
            name: name.to_owned(),
            programs: vec![(orlop.to_owned(), "/orlop".into())],
            entrypoint: vec!["/orlop".into()],
            command: vec!["demo".into()],
            ..Self::default()
        }
    }

    /// Writes an OCI layout into a new folder.
    pub fn write_layout(&self, folder: &Path) -> Result<()> {
        let blobs = folder.join("blobs/sha256");
        std::fs::create_dir_all(&blobs)?;
        let layer = self.layer()?;
        let layer_digest = put(&blobs, &layer)?;
        let config = serde_json::to_vec(&json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
            "os": "linux",
            "config": {"Entrypoint": self.entrypoint, "Cmd": self.command, "Env": ["PATH=/bin:/usr/bin:/sbin:/usr/sbin"]},
            "rootfs": {"type": "layers", "diff_ids": [layer_digest]},
        }))?;
        let config_digest = put(&blobs, &config)?;
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config.len()},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer_digest, "size": layer.len()}],
        }))?;
        let manifest_digest = put(&blobs, &manifest)?;
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [{
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": manifest_digest,
                "size": manifest.len(),
                "annotations": {"org.opencontainers.image.ref.name": self.name, "io.containerd.image.name": self.name},
            }],
        });
        std::fs::write(folder.join("index.json"), serde_json::to_vec(&index)?)?;
        std::fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(())
    }

    fn layer(&self) -> Result<Vec<u8>> {
        let mut archive = tar::Builder::new(Vec::new());
        let mut folders = BTreeSet::new();
        for folder in ["tmp", "etc", "proc", "sys", "dev", "root"] {
            add_folder(&mut archive, &mut folders, folder)?;
        }
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
        add_file(&mut archive, &mut folders, "etc/passwd", passwd, 0o644)?;
        add_file(&mut archive, &mut folders, "etc/group", b"root:x:0:\nnogroup:x:65534:\n", 0o644)?;
        let mut files: BTreeSet<(PathBuf, String)> = BTreeSet::new();
        for (source, target) in &self.programs {
            files.insert((source.clone(), target.clone()));
            for library in shared_libraries(source)? {
                files.insert((library.clone(), library.display().to_string()));
            }
        }
        for (source, target) in &files {
            let content = std::fs::read(source).with_context(|| format!("read {}", source.display()))?;
            add_file(&mut archive, &mut folders, target.trim_start_matches('/'), &content, 0o755)?;
        }
        for (name, target) in &self.links {
            let mut header = header(tar::EntryType::Symlink, 0, 0o777);
            archive.append_link(&mut header, name.trim_start_matches('/'), target)?;
        }
        Ok(archive.into_inner()?)
    }
}

fn header(kind: tar::EntryType, size: u64, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

type Archive = tar::Builder<Vec<u8>>;

fn add_folder(archive: &mut Archive, known: &mut BTreeSet<String>, folder: &str) -> Result<()> {
    if let Some((parent, _)) = folder.rsplit_once('/') {
        add_folder(archive, known, parent)?;
    }
    if known.insert(folder.to_owned()) {
        let mode = if folder == "tmp" { 0o1777 } else { 0o755 };
        archive.append_data(&mut header(tar::EntryType::Directory, 0, mode), folder, std::io::empty())?;
    }
    Ok(())
}

fn add_file(
    archive: &mut Archive,
    known: &mut BTreeSet<String>,
    path: &str,
    content: &[u8],
    mode: u32,
) -> Result<()> {
    if let Some((folder, _)) = path.rsplit_once('/') {
        add_folder(archive, known, folder)?;
    }
    archive.append_data(&mut header(tar::EntryType::Regular, content.len() as u64, mode), path, content)?;
    Ok(())
}

/// Every shared object a program needs, its loader included; none for a static one.
fn shared_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if text.contains("not found") {
        bail!("{} needs a library that is not here: {text}", program.display());
    }
    Ok(text
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect())
}

fn put(blobs: &Path, content: &[u8]) -> Result<String> {
    let mut hex = String::new();
    for byte in digest(&SHA256, content).as_ref() {
        write!(hex, "{byte:02x}")?;
    }
    std::fs::write(blobs.join(&hex), content)?;
    Ok(format!("sha256:{hex}"))
}
