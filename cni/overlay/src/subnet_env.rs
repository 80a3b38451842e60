//! `subnet.env`, by which CNI plugins (flannel's, ours, others) learn this node's subnet.

use ipnet::{IpNet, Ipv4Net};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
#[error("cannot write {}", path.display())]
pub struct SubnetEnvError {
    path: PathBuf,
    source: io::Error,
}

#[must_use]
pub fn render(network: Ipv4Net, subnet: Ipv4Net, mtu: u32, ip_masq: bool) -> String {
    let first = subnet.hosts().next().unwrap_or_else(|| subnet.network());
    let gateway = IpNet::new_assert(first.into(), subnet.prefix_len());
    format!(
        "FLANNEL_NETWORK={network}\nFLANNEL_SUBNET={gateway}\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ={ip_masq}\n"
    )
}

/// Replaces the file, if its content differs.
///
/// # Errors
/// [`SubnetEnvError`]
pub fn write(path: &Path, content: &str) -> Result<(), SubnetEnvError> {
    if fs::read_to_string(path).is_ok_and(|present| present == content) {
        return Ok(());
    }
    let replace = || -> io::Result<()> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        let temporary = path.with_file_name(name);
        let mut file = File::create(&temporary)?;
        file.write_all(content.as_bytes())?;
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    replace().map_err(|source| SubnetEnvError { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_spelled_as_other_programs_expect_it() {
        let text = render("10.244.0.0/16".parse().unwrap(), "10.244.1.0/24".parse().unwrap(), 1450, true);
        assert_eq!(
            text,
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
        );
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flannel/subnet.env");
        write(&path, &text).unwrap();
        write(&path, "FLANNEL_MTU=1\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "FLANNEL_MTU=1\n");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        assert_eq!(fs::read_dir(dir.path().join("flannel")).unwrap().count(), 1);
    }
}
