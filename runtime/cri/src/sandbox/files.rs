//! The files and the shared memory that a sandbox's containers find at `/etc/resolv.conf`, `/etc/hosts`,
//! `/etc/hostname` and `/dev/shm`.

use super::namespaces::detach_mount;
use orlop_proto::cri::DnsConfig;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Size of the tmpfs at `/dev/shm`, as every container runtime has it.
const SHM_BYTES: u32 = 64 << 20;

#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {path}: {source}")]
pub struct FilesError {
    operation: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// Where one sandbox's things lie.
#[derive(Debug, Clone)]
pub(crate) struct SandboxDir(pub(crate) PathBuf);

impl SandboxDir {
    pub(crate) fn namespaces(&self) -> PathBuf {
        self.0.join("ns")
    }
    pub(crate) fn namespace(&self, kind: &str) -> PathBuf {
        self.0.join("ns").join(kind)
    }
    pub(crate) fn resolv_conf(&self) -> PathBuf {
        self.0.join("resolv.conf")
    }
    pub(crate) fn hosts(&self) -> PathBuf {
        self.0.join("hosts")
    }
    pub(crate) fn hostname(&self) -> PathBuf {
        self.0.join("hostname")
    }
    pub(crate) fn shm(&self) -> PathBuf {
        self.0.join("shm")
    }

    /// Everything but the hosts file, which needs the addresses.
    pub(crate) fn create(&self, contents: &Contents) -> Result<(), FilesError> {
        make_dir(&self.0)?;
        write(&self.resolv_conf(), &contents.resolv_conf)?;
        write(&self.hostname(), &format!("{}\n", contents.hostname))?;
        if contents.own_shm {
            let shm = self.shm();
            make_dir(&shm)?;
            use rustix::mount::{MountFlags, mount};
            let options = std::ffi::CString::new(format!("mode=1777,size={SHM_BYTES}"))
                .expect("a formatted number holds no NUL");
            mount(
                "shm",
                &shm,
                "tmpfs",
                MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
                options.as_c_str(),
            )
            .map_err(|e| FilesError {
                operation: "mount a tmpfs at",
                path: shm,
                source: e.into(),
            })?;
        }
        Ok(())
    }

    pub(crate) fn write_hosts(&self, text: &str) -> Result<(), FilesError> {
        write(&self.hosts(), text)
    }

    /// Takes everything away. Idempotent.
    pub(crate) fn remove(&self) -> Result<(), FilesError> {
        let shm = self.shm();
        detach_mount(&shm).map_err(|source| FilesError { operation: "unmount", path: shm, source })?;
        match fs::remove_dir_all(&self.0) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(FilesError { operation: "remove", path: self.0.clone(), source })
            }
            _ => Ok(()),
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Contents {
    pub(crate) resolv_conf: String,
    pub(crate) hostname: String,
    pub(crate) own_shm: bool,
}

fn make_dir(path: &Path) -> Result<(), FilesError> {
    fs::create_dir_all(path).map_err(|source| FilesError {
        operation: "create directory",
        path: path.to_owned(),
        source,
    })
}

fn write(path: &Path, text: &str) -> Result<(), FilesError> {
    fs::write(path, text).map_err(|source| FilesError { operation: "write", path: path.to_owned(), source })
}

pub(crate) fn render_resolv_conf(dns: &DnsConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    text
}

pub(crate) fn render_hosts(hostname: &str, addresses: &[IpAddr]) -> String {
    let mut text = String::from(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\n\
         fe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    if !hostname.is_empty() {
        for address in addresses {
            let _ = writeln!(text, "{address}\t{hostname}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_lists_searches_servers_and_options() {
        let dns = DnsConfig {
            servers: vec!["10.96.0.10".into(), "fd00::a".into()],
            searches: vec!["default.svc.cluster.local".into(), "svc.cluster.local".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            render_resolv_conf(&dns),
            "search default.svc.cluster.local svc.cluster.local\nnameserver 10.96.0.10\nnameserver fd00::a\noptions ndots:5\n"
        );
    }

    #[test]
    fn hosts_names_the_pod_by_each_address() {
        let text = render_hosts("web-0", &["10.1.0.4".parse().unwrap(), "fd00::4".parse().unwrap()]);
        assert!(text.starts_with("127.0.0.1\tlocalhost\n"));
        assert!(text.ends_with("10.1.0.4\tweb-0\nfd00::4\tweb-0\n"));
    }

    #[test]
    fn the_shared_memory_is_a_tmpfs_that_goes_with_the_sandbox() {
        let root = tempfile::tempdir().unwrap();
        let dir = SandboxDir(root.path().join("s"));
        let contents = Contents { resolv_conf: String::new(), hostname: "h".into(), own_shm: true };
        dir.create(&contents).unwrap();
        let fs = rustix::fs::statvfs(dir.shm()).unwrap();
        assert_eq!(fs.f_blocks * fs.f_frsize, 64 << 20);
        dir.remove().unwrap();
        dir.remove().unwrap();
        assert!(!dir.0.exists());
    }
}
