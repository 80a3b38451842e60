//! Addresses handed out, one file per address.
//!
//! ```text
//! <state directory>/<network>/lock          held while files are read and written
//!                             10.244.1.5    who holds the address: a JSON record
//!                             last.0        the address most recently given out of range set 0
//! ```
//!
//! A lease names the boot in which it was made. Namespaces do not survive a boot, so a lease of another one is free; for
//! the same reason nothing is synced to disk: a file that a power cut left empty belongs to a boot that is over.

use super::{PortMapping, RangeSet};
use ipnet::IpNet;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    #[error("cannot {action} {}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("all addresses of {ranges} are taken (delete pods, or give the node a larger pod CIDR)")]
    Exhausted { ranges: String },
    #[error("{sandbox} already has address {address} on {ifname}")]
    Duplicate { sandbox: String, ifname: String, address: IpAddr },
    #[error("requested address {address} is taken or outside of {ranges}")]
    Unavailable { address: IpAddr, ranges: String },
}

const VERSION: u32 = 1;

/// The content of a lease file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    version: u32,
    sandbox: String,
    ifname: String,
    boot: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ports: Vec<PortMapping>,
}

/// An address and who holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lease {
    pub(super) address: IpAddr,
    pub(super) sandbox: String,
    pub(super) ifname: String,
    pub(super) ports: Vec<PortMapping>,
}

/// Who asks for addresses.
#[derive(Debug, Clone, Copy)]
pub(super) struct Holder<'a> {
    pub(super) sandbox: &'a str,
    pub(super) ifname: &'a str,
    pub(super) ports: &'a [PortMapping],
}

/// What one range set yields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assigned {
    /// With the prefix length of the subnet.
    pub address: IpNet,
    pub gateway: IpAddr,
}

#[derive(Debug)]
pub(super) struct Leases {
    dir: PathBuf,
    boot: String,
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LeaseError {
    let path = path.to_owned();
    move |source| LeaseError::File { action, path, source }
}

impl Leases {
    /// Creates the directory if need be.
    pub(super) fn open(dir: PathBuf, boot: String) -> Result<Self, LeaseError> {
        fs::create_dir_all(&dir).map_err(file_error("create directory", &dir))?;
        Ok(Self { dir, boot })
    }

    fn lock(&self) -> Result<File, LeaseError> {
        let path = self.dir.join("lock");
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(file_error("open", &path))?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive)
            .map_err(|errno| file_error("lock", &path)(errno.into()))?;
        Ok(file)
    }

    /// One address of every range set, all or none. `requested` addresses are taken where a range set has them.
    pub(super) fn acquire(
        &self,
        holder: &Holder<'_>,
        ranges: &[RangeSet],
        requested: &[IpAddr],
    ) -> Result<Vec<Assigned>, LeaseError> {
        let _lock = self.lock()?;
        let taken = self.read()?;
        if let Some(held) = taken.values().find(|l| l.sandbox == holder.sandbox && l.ifname == holder.ifname)
        {
            return Err(LeaseError::Duplicate {
                sandbox: held.sandbox.clone(),
                ifname: held.ifname.clone(),
                address: held.address,
            });
        }
        let mut assigned: Vec<Assigned> = Vec::new();
        for (index, set) in ranges.iter().enumerate() {
            let free =
                |ip: &IpAddr| !taken.contains_key(ip) && !assigned.iter().any(|a| a.address.addr() == *ip);
            let wanted = requested.iter().find(|ip| set.contains(**ip));
            let choice = match wanted {
                Some(ip) => set
                    .assigned(*ip)
                    .filter(|a| free(&a.address.addr()))
                    .ok_or_else(|| LeaseError::Unavailable { address: *ip, ranges: set.to_string() })?,
                None => set
                    .after(self.last(index))
                    .find(|a| free(&a.address.addr()))
                    .ok_or_else(|| LeaseError::Exhausted { ranges: set.to_string() })?,
            };
            assigned.push(choice);
        }
        for (index, choice) in assigned.iter().enumerate() {
            if let Err(error) = self.write(index, choice.address.addr(), holder) {
                for undone in &assigned[..=index] {
                    let _ = fs::remove_file(self.path(undone.address.addr()));
                }
                return Err(error);
            }
        }
        Ok(assigned)
    }

    /// All leases of this boot.
    pub(super) fn all(&self) -> Result<Vec<Lease>, LeaseError> {
        let _lock = self.lock()?;
        Ok(self.read()?.into_values().collect())
    }

    /// The leases of a sandbox.
    pub(super) fn of(&self, sandbox: &str) -> Result<Vec<Lease>, LeaseError> {
        Ok(self.all()?.into_iter().filter(|lease| lease.sandbox == sandbox).collect())
    }

    /// Exactly this lease: an address that somebody else holds meanwhile stays theirs.
    pub(super) fn release(&self, lease: &Lease) -> Result<(), LeaseError> {
        let _lock = self.lock()?;
        let path = self.path(lease.address);
        let ours = parse(&path).is_some_and(|r| r.sandbox == lease.sandbox && r.ifname == lease.ifname);
        if !ours {
            return Ok(());
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(file_error("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// Reads the directory, and clears it of what other boots left.
    fn read(&self) -> Result<HashMap<IpAddr, Lease>, LeaseError> {
        let entries = fs::read_dir(&self.dir).map_err(file_error("list", &self.dir))?;
        let mut leases = HashMap::new();
        for entry in entries {
            let entry = entry.map_err(file_error("list", &self.dir))?;
            let Some(address) = entry.file_name().to_str().and_then(|name| name.parse::<IpAddr>().ok())
            else {
                continue;
            };
            match parse(&entry.path()).filter(|record| record.boot == self.boot) {
                Some(Record { sandbox, ifname, ports, .. }) => {
                    leases.insert(address, Lease { address, sandbox, ifname, ports });
                }
                None => {
                    let path = entry.path();
                    fs::remove_file(&path).map_err(file_error("remove the stale lease", &path))?;
                }
            }
        }
        Ok(leases)
    }

    fn write(&self, set: usize, address: IpAddr, holder: &Holder<'_>) -> Result<(), LeaseError> {
        let record = Record {
            version: VERSION,
            sandbox: holder.sandbox.to_owned(),
            ifname: holder.ifname.to_owned(),
            boot: self.boot.clone(),
            ports: holder.ports.to_vec(),
        };
        let path = self.path(address);
        let text = serde_json::to_vec(&record).map_err(|error| file_error("encode", &path)(error.into()))?;
        self.replace(&path, &text)?;
        self.replace(&self.dir.join(format!("last.{set}")), address.to_string().as_bytes())
    }

    /// Under the lock, so one temporary name will do.
    fn replace(&self, path: &Path, content: &[u8]) -> Result<(), LeaseError> {
        let temporary = self.dir.join("new");
        File::create(&temporary)
            .and_then(|mut file| file.write_all(content))
            .map_err(file_error("write", &temporary))?;
        fs::rename(&temporary, path).map_err(file_error("write", path))
    }

    fn last(&self, set: usize) -> Option<IpAddr> {
        fs::read_to_string(self.dir.join(format!("last.{set}"))).ok()?.trim().parse().ok()
    }

    fn path(&self, address: IpAddr) -> PathBuf {
        self.dir.join(address.to_string())
    }
}

fn parse(path: &Path) -> Option<Record> {
    let record: Record = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    (record.version == VERSION).then_some(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leases(dir: &Path, boot: &str) -> Leases {
        Leases::open(dir.join("net"), boot.to_owned()).unwrap()
    }

    fn ranges(subnet: &str) -> Vec<RangeSet> {
        vec![RangeSet::of(subnet.parse().unwrap()).unwrap()]
    }

    fn take(leases: &Leases, sandbox: &str, ranges: &[RangeSet]) -> Result<IpAddr, LeaseError> {
        let holder = Holder { sandbox, ifname: "eth0", ports: &[] };
        Ok(leases.acquire(&holder, ranges, &[])?[0].address.addr())
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_go_round_and_a_released_one_is_not_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let leases = leases(dir.path(), "boot");
        let ranges = ranges("10.1.0.0/29");
        assert_eq!(take(&leases, "a", &ranges).unwrap(), ip("10.1.0.2"));
        assert_eq!(take(&leases, "b", &ranges).unwrap(), ip("10.1.0.3"));
        leases.release(&leases.of("a").unwrap()[0]).unwrap();
        assert_eq!(take(&leases, "c", &ranges).unwrap(), ip("10.1.0.4"));
        assert_eq!(take(&leases, "d", &ranges).unwrap(), ip("10.1.0.5"));
        assert_eq!(take(&leases, "e", &ranges).unwrap(), ip("10.1.0.6"));
        assert_eq!(take(&leases, "f", &ranges).unwrap(), ip("10.1.0.2"));
        assert!(matches!(take(&leases, "g", &ranges), Err(LeaseError::Exhausted { .. })));
    }

    #[test]
    fn the_same_interface_gets_no_second_address() {
        let dir = tempfile::tempdir().unwrap();
        let leases = leases(dir.path(), "boot");
        let ranges = ranges("10.1.0.0/24");
        take(&leases, "a", &ranges).unwrap();
        assert!(matches!(take(&leases, "a", &ranges), Err(LeaseError::Duplicate { .. })));
    }

    #[test]
    fn leases_survive_a_restart_and_end_with_the_boot() {
        let dir = tempfile::tempdir().unwrap();
        let ranges = ranges("10.1.0.0/24");
        take(&leases(dir.path(), "one"), "a", &ranges).unwrap();
        let again = leases(dir.path(), "one");
        assert_eq!(again.of("a").unwrap()[0].address, ip("10.1.0.2"));
        let rebooted = leases(dir.path(), "two");
        assert!(rebooted.all().unwrap().is_empty());
        assert!(!dir.path().join("net/10.1.0.2").exists());
    }

    #[test]
    fn damaged_files_are_free_addresses() {
        let dir = tempfile::tempdir().unwrap();
        let leases = leases(dir.path(), "boot");
        fs::write(dir.path().join("net/10.1.0.2"), "").unwrap();
        fs::write(dir.path().join("net/10.1.0.3"), "{\"version\":9}").unwrap();
        fs::write(dir.path().join("net/last.0"), "garbage").unwrap();
        assert_eq!(take(&leases, "a", &ranges("10.1.0.0/24")).unwrap(), ip("10.1.0.2"));
    }

    #[test]
    fn releasing_a_lease_that_changed_hands_does_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let leases = leases(dir.path(), "boot");
        take(&leases, "a", &ranges("10.1.0.0/24")).unwrap();
        let stale =
            Lease { address: ip("10.1.0.2"), sandbox: "z".into(), ifname: "eth0".into(), ports: vec![] };
        leases.release(&stale).unwrap();
        assert_eq!(leases.all().unwrap().len(), 1);
    }

    #[test]
    fn when_one_family_is_exhausted_no_address_of_the_other_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let leases = leases(dir.path(), "boot");
        let mut both = ranges("fd00::/64");
        both.extend(ranges("10.1.0.0/30"));
        take(&leases, "a", &both).unwrap();
        assert!(matches!(take(&leases, "b", &both), Err(LeaseError::Exhausted { .. })));
        assert_eq!(leases.all().unwrap().len(), 2);
    }

    #[test]
    fn a_requested_address_is_given_once() {
        let dir = tempfile::tempdir().unwrap();
        let leases = leases(dir.path(), "boot");
        let ranges = ranges("10.1.0.0/24");
        let ask = |sandbox| {
            let holder = Holder { sandbox, ifname: "eth0", ports: &[] };
            leases.acquire(&holder, &ranges, &[ip("10.1.0.77")])
        };
        assert_eq!(ask("a").unwrap()[0].address, "10.1.0.77/24".parse().unwrap());
        assert!(matches!(ask("b"), Err(LeaseError::Unavailable { .. })));
    }

    #[test]
    fn concurrent_takers_get_different_addresses() {
        let dir = tempfile::tempdir().unwrap();
        let ranges = ranges("10.1.0.0/24");
        let taken: Vec<IpAddr> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..8)
                .map(|worker| {
                    let (leases, ranges) = (leases(dir.path(), "boot"), &ranges);
                    scope.spawn(move || {
                        (0..10)
                            .map(|n| take(&leases, &format!("{worker}-{n}"), ranges).unwrap())
                            .collect::<Vec<_>>()
                    })
                })
                .collect();
            workers.into_iter().flat_map(|w| w.join().unwrap()).collect()
        });
        let distinct: std::collections::HashSet<_> = taken.iter().collect();
        assert_eq!(distinct.len(), 80);
    }
}
