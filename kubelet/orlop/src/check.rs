//! `orlop check`: what the kernel and the machine offer, what is missing, and what to do about it.

use crate::config::NodeConfig;
use anyhow::{Result, bail};
use std::net::TcpListener;
use std::path::Path;

/// What one look at the machine found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    Good(String),
    /// The node runs, something is not as it could be.
    Warning(String),
    /// The node, or what the text names, cannot run.
    Failure(String),
}

/// The oldest kernel whose interfaces orlop uses without a fall-back.
const OLDEST_KERNEL: (u32, u32) = (5, 15);
/// A limit in a pod needs each of these.
pub const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Looks everything over, prints it, and fails when something would keep the node from running.
pub fn check(config: &NodeConfig) -> Result<()> {
    let findings = look(config, Path::new("/"));
    let mut failures = 0;
    for finding in &findings {
        let (mark, text) = match finding {
            Finding::Good(text) => ("ok     ", text),
            Finding::Warning(text) => ("warning", text),
            Finding::Failure(text) => ("FAILED ", text),
        };
        failures += usize::from(matches!(finding, Finding::Failure(_)));
        println!("{mark}  {text}");
    }
    if failures > 0 {
        bail!("{failures} of {} checks failed", findings.len());
    }
    Ok(())
}

/// `root` stands before `/proc` and `/sys`, for tests.
fn look(config: &NodeConfig, root: &Path) -> Vec<Finding> {
    let read =
        |path: &str| std::fs::read_to_string(root.join(path.trim_start_matches('/'))).unwrap_or_default();
    let mut findings = vec![kernel(&read("/proc/sys/kernel/osrelease"))];
    findings.extend(cgroups(
        config,
        &read(&format!("{}/cgroup.controllers", config.runtime.cgroup_root.display())),
        root,
    ));
    findings.push(file_system("overlay", &read("/proc/filesystems")));
    findings.push(nftables());
    findings.push(swap(&read("/proc/swaps")));
    findings.push(port(10250, "the kubelet API"));
    findings.push(keeper(&config.runtime.keeper_socket));
    findings
}

fn kernel(release: &str) -> Finding {
    let release = release.trim();
    let mut numbers = release.split(['.', '-']).map_while(|n| n.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < OLDEST_KERNEL {
        let (major, minor) = OLDEST_KERNEL;
        return Finding::Failure(format!("kernel {release} is older than {major}.{minor}: boot a newer one"));
    }
    Finding::Good(format!("kernel {release}"))
}

fn cgroups(config: &NodeConfig, controllers: &str, root: &Path) -> Vec<Finding> {
    let mount = &config.runtime.cgroup_root;
    if !root.join(mount.strip_prefix("/").unwrap_or(mount)).join("cgroup.controllers").exists() {
        return vec![Finding::Failure(format!(
            "{} is no cgroup v2 tree: boot with systemd.unified_cgroup_hierarchy=1, or name the tree with runtime.cgroupRoot",
            mount.display()
        ))];
    }
    let present: Vec<&str> = controllers.split_whitespace().collect();
    CONTROLLERS
        .iter()
        .map(|name| {
            if present.contains(name) {
                Finding::Good(format!("cgroup v2 controller {name}"))
            } else {
                Finding::Failure(format!(
                    "the cgroup v2 tree at {} has no {name} controller: take it away from cgroup v1 (kernel parameter cgroup_no_v1={name}), \
                     or run without such limits by runtime.missingControllers: warn",
                    mount.display()
                ))
            }
        })
        .collect()
}

fn file_system(name: &str, known: &str) -> Finding {
    if known.lines().any(|line| line.trim_start_matches("nodev").trim() == name) {
        return Finding::Good(format!("file system {name}"));
    }
    Finding::Failure(format!("the kernel has no {name} file system: modprobe {name}"))
}

fn nftables() -> Finding {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink, socket_with};
    let socket =
        socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER));
    match socket {
        Ok(_) => Finding::Good("netfilter over netlink".to_owned()),
        Err(error) => Finding::Failure(format!("netfilter over netlink: {error}: modprobe nf_tables")),
    }
}

fn swap(swaps: &str) -> Finding {
    match swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect::<Vec<_>>()[..] {
        [] => Finding::Good("no swap is on".to_owned()),
        ref on => Finding::Warning(format!(
            "swap is on ({}): the node starts only with kubelet.failSwapOn: false; `swapoff -a` turns it off",
            on.join(", ")
        )),
    }
}

fn port(number: u16, purpose: &str) -> Finding {
    match TcpListener::bind(("0.0.0.0", number)) {
        Ok(_) => Finding::Good(format!("port {number} is free for {purpose}")),
        Err(error) => Finding::Warning(format!(
            "port {number} for {purpose}: {error}: is this node, or a kubelet, running already?"
        )),
    }
}

fn keeper(socket: &Path) -> Finding {
    if socket.exists() {
        return Finding::Good(format!("the keeper's socket {}", socket.display()));
    }
    Finding::Warning(format!("{} is not there: systemctl start orlop-keeper.service", socket.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_kernel_fails_and_a_distribution_suffix_does_not_confuse() {
        assert!(matches!(kernel("5.10.0-30-amd64\n"), Finding::Failure(_)));
        assert!(matches!(kernel("6.1-rc3"), Finding::Good(_)));
        assert!(matches!(kernel("5.15.0"), Finding::Good(_)));
    }

    #[test]
    fn a_missing_controller_is_named_with_a_remedy() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        let tree = folder.path().join("sys/fs/cgroup");
        std::fs::create_dir_all(&tree)?;
        std::fs::write(tree.join("cgroup.controllers"), "cpu pids\n")?;
        let findings = cgroups(&NodeConfig::default(), "cpu pids\n", folder.path());
        let failed: Vec<_> = findings.iter().filter(|f| matches!(f, Finding::Failure(_))).collect();
        assert_eq!(failed.len(), 1);
        assert!(format!("{failed:?}").contains("cgroup_no_v1=memory"));
        Ok(())
    }

    #[test]
    fn without_a_cgroup_v2_tree_there_is_one_failure_and_not_one_per_controller() {
        let findings = cgroups(&NodeConfig::default(), "", Path::new("/nonexistent"));
        assert_eq!(findings.len(), 1);
    }
}
