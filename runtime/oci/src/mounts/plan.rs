//! Which mounts a container gets, in order.

use super::Error;
use super::options::{self, Options};
use oci_spec::runtime::Mount;
use std::path::{Component, Path, PathBuf};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    Bind {
        source: PathBuf,
        recursive: bool,
    },
    /// The container's own cgroup.
    Cgroup,
    /// A new file system of this type, with this source.
    Filesystem {
        fs: String,
        source: String,
    },
    /// Changes attributes of what is mounted there already.
    Remount,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) destination: PathBuf,
    pub(crate) kind: Kind,
    pub(crate) options: Options,
}

/// Files below /proc that may be covered (by LXCFS, mostly); anything else there could fake what the kernel says about
/// a process, and with it defeat a check.
const PROC_FILES: &[&str] = &[
    "cpuinfo",
    "diskstats",
    "meminfo",
    "stat",
    "swaps",
    "uptime",
    "loadavg",
    "slabinfo",
    "sys/kernel/ns_last_pid",
    "sys/crypto/fips_enabled",
];

pub(crate) fn allowed_inside_proc(destination: &Path) -> bool {
    destination.strip_prefix("/proc").is_ok_and(|rest| PROC_FILES.iter().any(|file| rest == Path::new(file)))
}

/// The absolute form of a destination, without `.` and `..`.
fn normalise(destination: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in destination.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

pub(crate) fn plan(mounts: &[Mount], bundle: &Path) -> Result<Vec<Planned>, Error> {
    mounts.iter().map(|mount| one(mount, bundle)).collect()
}

fn one(mount: &Mount, bundle: &Path) -> Result<Planned, Error> {
    let destination = normalise(mount.destination());
    if destination == Path::new("/") {
        return Err(Error::Root(mount.destination().clone()));
    }
    let refuse = |reason: &str| Error::Option { destination: destination.clone(), reason: reason.to_owned() };
    let options = options::parse(mount.options().as_deref().unwrap_or_default());
    let typ = mount.typ().as_deref().unwrap_or_default();
    if options.idmap.is_some()
        || mount.uid_mappings().as_ref().is_some_and(|maps| !maps.is_empty())
        || mount.gid_mappings().as_ref().is_some_and(|maps| !maps.is_empty())
    {
        return Err(refuse("id-mapped mounts are not supported yet"));
    }
    if options.copy_up {
        return Err(refuse("tmpcopyup is not supported yet"));
    }
    let kind = if options.remount {
        Kind::Remount
    } else if let Some(recursive) = options.bind.or_else(|| (typ == "bind").then_some(false)) {
        let source = mount.source().as_ref().ok_or_else(|| refuse("a bind mount needs a source"))?;
        Kind::Bind { source: bundle.join(source), recursive }
    } else {
        match typ {
            "cgroup" | "cgroup2" => Kind::Cgroup,
            "" | "none" => return Err(refuse("neither a file system type nor bind is given")),
            fs => Kind::Filesystem {
                fs: fs.to_owned(),
                source: mount
                    .source()
                    .as_ref()
                    .map_or_else(|| fs.to_owned(), |source| source.to_string_lossy().into_owned()),
            },
        }
    };
    let proc_itself = destination == Path::new("/proc")
        && match &kind {
            Kind::Filesystem { fs, .. } => fs == "proc",
            Kind::Bind { .. } | Kind::Remount => true,
            Kind::Cgroup => false,
        };
    if destination.starts_with("/proc") && !proc_itself && !allowed_inside_proc(&destination) {
        return Err(Error::InsideProc(destination));
    }
    Ok(Planned { destination, kind, options })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(json: &str) -> Result<Planned, Error> {
        one(&serde_json::from_str(json).unwrap(), Path::new("/bundle"))
    }

    #[test]
    fn sources_of_binds_are_relative_to_the_bundle() {
        let mount = planned(r#"{"destination":"data/../x","source":"vol","options":["bind"]}"#).unwrap();
        assert_eq!(mount.destination, Path::new("/x"));
        assert_eq!(mount.kind, Kind::Bind { source: "/bundle/vol".into(), recursive: false });
    }

    #[test]
    fn proc_cannot_be_covered() {
        for bad in [
            r#"{"destination":"/proc/self","source":"/x","options":["bind"]}"#,
            r#"{"destination":"/sys/../proc/sys","type":"tmpfs"}"#,
            r#"{"destination":"/proc","type":"tmpfs"}"#,
        ] {
            assert!(matches!(planned(bad), Err(Error::InsideProc(_))), "{bad}");
        }
        planned(r#"{"destination":"/proc/cpuinfo","source":"/x","options":["bind"]}"#).unwrap();
        planned(r#"{"destination":"/proc","type":"proc"}"#).unwrap();
    }

    #[test]
    fn the_root_is_no_destination() {
        assert!(matches!(planned(r#"{"destination":"/a/..","type":"tmpfs"}"#), Err(Error::Root(_))));
    }
}
