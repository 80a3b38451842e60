//! The last status of a pod that has no API object to remember it: static pods, standalone nodes.
//!
//! `<root>/pods/<uid>/status.json`. What a restarted kubelet takes from it is what it would take from the API server:
//! start time, restart counts, readiness until the first probe.

use k8s_openapi::api::core::v1::PodStatus;
use std::io;
use std::io::Write;
use std::path::{Path, PathBuf};

fn file(root: &Path, uid: &str) -> PathBuf {
    root.join("pods").join(uid).join("status.json")
}

/// None when there is none or it cannot be understood: then the pod starts without a memory.
#[must_use]
pub fn load(root: &Path, uid: &str) -> Option<PodStatus> {
    let bytes = std::fs::read(file(root, uid)).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// Replaces the file in one step.
pub fn save(root: &Path, uid: &str, status: &PodStatus) -> io::Result<()> {
    let path = file(root, uid);
    let directory = path.parent().unwrap_or(root);
    std::fs::create_dir_all(directory)?;
    let temporary = path.with_extension("json.new");
    let mut out = std::fs::File::create(&temporary)?;
    out.write_all(&serde_json::to_vec(status)?)?;
    out.sync_all()?;
    std::fs::rename(&temporary, &path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_status_is_read_back_and_a_broken_one_is_no_status() {
        let root = tempfile::tempdir().unwrap();
        let status = PodStatus { phase: Some("Running".into()), ..PodStatus::default() };
        save(root.path(), "u", &status).unwrap();
        assert_eq!(load(root.path(), "u"), Some(status));
        std::fs::write(file(root.path(), "u"), b"{").unwrap();
        assert_eq!(load(root.path(), "u"), None);
    }
}
