//! Namespaces that outlive every process: made on a thread of their own, pinned by bind mounts of `/proc/…/ns/…`.
//!
//! A thread that has unshared its namespaces must never serve anything else, so each of these operations runs on a
//! thread that ends with it. A failed creation removes what it had pinned.

use rustix::mount::{UnmountFlags, mount_bind, unmount};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::thread;
use tokio::sync::oneshot;

const NSFS_MAGIC: i64 = 0x6e73_6673;

#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    #[error("cannot {operation} {path}: {source}")]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot set sysctl {name}={value} in the sandbox: {source}")]
    Sysctl { name: String, value: String, source: io::Error },
    #[error("sysctl {name} is not allowed: it is not namespaced, or its namespace is the host's")]
    SysctlNotNamespaced { name: String },
    #[error("the namespace thread ended early")]
    Interrupted,
}

/// Which namespaces a sandbox gets, and what is set inside them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) net: bool,
    pub(crate) ipc: bool,
    pub(crate) uts: bool,
    pub(crate) hostname: Option<String>,
    pub(crate) sysctls: BTreeMap<String, String>,
}

impl Plan {
    fn kinds(&self) -> impl Iterator<Item = (&'static str, nix::sched::CloneFlags)> {
        use nix::sched::CloneFlags as F;
        [
            (self.net, "net", F::CLONE_NEWNET),
            (self.ipc, "ipc", F::CLONE_NEWIPC),
            (self.uts, "uts", F::CLONE_NEWUTS),
        ]
        .into_iter()
        .filter_map(|(wanted, name, flag)| wanted.then_some((name, flag)))
    }

    /// Each sysctl must belong to a namespace that is the sandbox's own: anything else would change the host.
    pub(crate) fn check_sysctls(&self) -> Result<(), NamespaceError> {
        for name in self.sysctls.keys() {
            let dotted = name.replace('/', ".");
            let own = if dotted.starts_with("net.") {
                self.net
            } else if is_ipc_sysctl(&dotted) {
                self.ipc
            } else if matches!(dotted.as_str(), "kernel.domainname" | "kernel.hostname") {
                self.uts
            } else {
                false
            };
            if !own || dotted.split('.').any(str::is_empty) {
                return Err(NamespaceError::SysctlNotNamespaced { name: name.clone() });
            }
        }
        Ok(())
    }
}

fn is_ipc_sysctl(name: &str) -> bool {
    const EXACT: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    EXACT.contains(&name) || name.starts_with("fs.mqueue.")
}

/// Creates and pins the namespaces of `plan` in `dir`.
pub(crate) async fn create(dir: PathBuf, plan: Plan) -> Result<(), NamespaceError> {
    plan.check_sysctls()?;
    if plan.kinds().next().is_none() {
        return Ok(());
    }
    on_own_thread(move || create_here(&dir, &plan)).await
}

/// Runs `work` inside the pinned network namespace.
pub(crate) async fn in_netns<T: Send + 'static>(
    netns: Option<PathBuf>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NamespaceError> {
    on_own_thread(move || {
        if let Some(path) = netns {
            let error =
                |source| NamespaceError::Io { operation: "enter namespace", path: path.clone(), source };
            let file = fs::File::open(&path).map_err(error)?;
            nix::sched::setns(file.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET)
                .map_err(|e| error(e.into()))?;
        }
        Ok(work())
    })
    .await
}

async fn on_own_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NamespaceError> + Send + 'static,
) -> Result<T, NamespaceError> {
    let (done, result) = oneshot::channel();
    thread::Builder::new()
        .name("namespace".into())
        .stack_size(256 << 10)
        .spawn(move || {
            let _ = done.send(work());
        })
        .map_err(|source| NamespaceError::Io {
            operation: "start a thread for",
            path: PathBuf::new(),
            source,
        })?;
    result.await.map_err(|_| NamespaceError::Interrupted)?
}

/// Unpins in `Drop` what a failed creation has pinned.
struct Pins {
    made: Vec<PathBuf>,
}

impl Drop for Pins {
    fn drop(&mut self) {
        for path in self.made.drain(..) {
            let _ = unpin(&path);
        }
    }
}

fn create_here(dir: &Path, plan: &Plan) -> Result<(), NamespaceError> {
    let error = |operation, path: &Path| {
        let path = path.to_owned();
        move |source: io::Error| NamespaceError::Io { operation, path, source }
    };
    fs::create_dir_all(dir).map_err(error("create", dir))?;
    let flags = plan.kinds().map(|(_, flag)| flag).collect();
    nix::sched::unshare(flags).map_err(|e| error("unshare for", dir)(e.into()))?;
    if plan.net {
        raise_loopback().map_err(error("raise the loopback of", dir))?;
    }
    if let (true, Some(hostname)) = (plan.uts, &plan.hostname) {
        rustix::system::sethostname(hostname.as_bytes())
            .map_err(|e| error("set the host name of", dir)(e.into()))?;
    }
    for (name, value) in &plan.sysctls {
        write_sysctl(name, value).map_err(|source| NamespaceError::Sysctl {
            name: name.clone(),
            value: value.clone(),
            source,
        })?;
    }
    let mut pins = Pins { made: Vec::new() };
    for (name, _) in plan.kinds() {
        let path = dir.join(name);
        fs::File::create(&path).map_err(error("create", &path))?;
        pins.made.push(path.clone());
        mount_bind(format!("/proc/thread-self/ns/{name}"), &path)
            .map_err(|e| error("pin namespace at", &path)(e.into()))?;
    }
    pins.made.clear();
    Ok(())
}

fn write_sysctl(name: &str, value: &str) -> io::Result<()> {
    // Names come with dots or with slashes; an interface name with a dot needs the slashes.
    let relative = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    if relative.split('/').any(|part| part == ".." || part.is_empty()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    fs::write(Path::new("/proc/sys").join(relative), value)
}

/// Sets the loopback interface (index 1 in every network namespace) up: one RTM_NEWLINK message.
fn raise_loopback() -> io::Result<()> {
    use nix::sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
    };
    use std::os::fd::AsRawFd as _;
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST_ACK: u16 = 1 | 4;
    const NLMSG_ERROR: u16 = 2;
    const IFF_UP: u32 = 1;
    let socket =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    let mut message = Vec::with_capacity(32);
    message.extend(32u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    message.extend([0; 8]); // sequence, port
    message.extend([0; 4]); // family, padding, type
    message.extend(1u32.to_ne_bytes()); // interface index
    message.extend(IFF_UP.to_ne_bytes()); // flags
    message.extend(IFF_UP.to_ne_bytes()); // which of them change
    send(socket.as_raw_fd(), &message, MsgFlags::empty())?;
    let mut reply = [0u8; 256];
    let read = recv(socket.as_raw_fd(), &mut reply, MsgFlags::empty())?;
    if read < 20 || u16::from_ne_bytes([reply[4], reply[5]]) != NLMSG_ERROR {
        return Err(io::Error::other("the kernel's answer to RTM_NEWLINK is malformed"));
    }
    match i32::from_ne_bytes([reply[16], reply[17], reply[18], reply[19]]) {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(-code)),
    }
}

/// Whether a namespace is pinned at `path`.
pub(crate) fn is_pinned(path: &Path) -> bool {
    #[allow(clippy::unnecessary_cast, clippy::cast_lossless)]
    rustix::fs::statfs(path).is_ok_and(|fs| fs.f_type as i64 == NSFS_MAGIC)
}

/// Removes the pins in `dir`. Idempotent.
pub(crate) fn remove(dir: &Path) -> Result<(), NamespaceError> {
    for name in ["net", "ipc", "uts"] {
        let path = dir.join(name);
        unpin(&path).map_err(|source| NamespaceError::Io {
            operation: "unpin namespace at",
            path,
            source,
        })?;
    }
    match fs::remove_dir(dir) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(NamespaceError::Io { operation: "remove", path: dir.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn unpin(path: &Path) -> io::Result<()> {
    detach_mount(path)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Takes every mount off `path`; succeeds when there is none.
pub(crate) fn detach_mount(path: &Path) -> io::Result<()> {
    loop {
        match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        Plan { net: true, ipc: true, uts: true, hostname: Some("web-0".into()), sysctls: BTreeMap::new() }
    }

    #[tokio::test]
    async fn pinned_namespaces_differ_from_the_hosts_and_vanish_when_removed() {
        let dir = tempfile::tempdir().unwrap();
        let ns = dir.path().join("ns");
        let mut plan = plan();
        plan.sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
        plan.sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "0".into());
        create(ns.clone(), plan).await.unwrap();
        for name in ["net", "ipc", "uts"] {
            assert!(is_pinned(&ns.join(name)));
            let host = fs::metadata(format!("/proc/self/ns/{name}")).unwrap();
            let own = fs::metadata(ns.join(name)).unwrap();
            use std::os::unix::fs::MetadataExt as _;
            assert_ne!(host.ino(), own.ino(), "{name}");
        }
        let flags = in_netns(Some(ns.join("net")), || {
            let port = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap();
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let reachable = std::net::TcpStream::connect(listener.local_addr().unwrap()).is_ok();
            (port.trim().to_owned(), reachable)
        })
        .await
        .unwrap();
        assert_eq!(flags, ("0".to_owned(), true), "sysctl is set and loopback is up");
        remove(&ns).unwrap();
        remove(&ns).unwrap();
        assert!(!ns.exists());
    }

    #[tokio::test]
    async fn a_sysctl_the_kernel_refuses_leaves_nothing_pinned() {
        let dir = tempfile::tempdir().unwrap();
        let ns = dir.path().join("ns");
        let mut plan = plan();
        plan.sysctls.insert("net.ipv4.no_such_thing".into(), "1".into());
        let error = create(ns.clone(), plan).await.unwrap_err();
        assert!(error.to_string().contains("net.ipv4.no_such_thing"), "{error}");
        assert!(!ns.join("net").exists());
    }

    #[test]
    fn sysctls_of_the_host_are_refused() {
        let with = |net, name: &str| Plan {
            net,
            ipc: true,
            sysctls: [(name.to_owned(), "1".to_owned())].into(),
            ..Plan::default()
        };
        assert!(with(true, "net.core.somaxconn").check_sysctls().is_ok());
        assert!(with(true, "net/ipv4/conf/eth0.1/forwarding").check_sysctls().is_ok());
        assert!(with(false, "net.core.somaxconn").check_sysctls().is_err());
        assert!(with(true, "kernel.shmmax").check_sysctls().is_ok());
        assert!(with(true, "vm.swappiness").check_sysctls().is_err());
        assert!(with(true, "net..core").check_sysctls().is_err());
    }
}
