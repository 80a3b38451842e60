//! Kernel settings that a stock kubelet changes for the whole machine, whatever namespace it runs in: put back
//! afterwards.

use std::path::{Path, PathBuf};

const CHANGED: [&str; 6] = [
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
];

/// The settings as they were; dropping it restores them.
#[derive(Debug)]
pub struct Tunables(Vec<(PathBuf, String)>);

impl Tunables {
    #[must_use]
    pub fn remember() -> Self {
        let known = CHANGED.iter().filter_map(|name| {
            let path = Path::new("/proc/sys").join(name);
            let value = std::fs::read_to_string(&path).ok()?;
            Some((path, value))
        });
        Self(known.collect())
    }
}

impl Drop for Tunables {
    fn drop(&mut self) {
        for (path, value) in &self.0 {
            if std::fs::read_to_string(path).is_ok_and(|now| now != *value)
                && let Err(error) = std::fs::write(path, value)
            {
                eprintln!("cannot put {} back to {}: {error}", path.display(), value.trim());
            }
        }
    }
}
