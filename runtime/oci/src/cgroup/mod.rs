//! cgroup v2: the hierarchy, limits, statistics, events, freezing and killing. Nothing here knows containers.

mod devices;
mod files;
mod hierarchy;
mod plan;
mod stats;

use std::path::{Path, PathBuf};

pub use stats::{CpuStats, Events, IoStats, MemoryStats, PidsStats, Pressure, PressureLine, Stats};

pub const DEFAULT_ROOT: &str = "/sys/fs/cgroup";

/// What to do with a limit whose controller the tree does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MissingControllers {
    /// Fail and name the controller.
    #[default]
    Refuse,
    /// Skip the limit and say so in the log.
    Warn,
}

impl MissingControllers {
    /// `ORLOP_MISSING_CONTROLLERS=warn` asks for [`MissingControllers::Warn`].
    pub fn from_env() -> Self {
        match std::env::var_os("ORLOP_MISSING_CONTROLLERS") {
            Some(value) if value == "warn" => Self::Warn,
            _ => Self::Refuse,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cgroup {} does not exist", .0.display())]
    NotExist(PathBuf),
    #[error("cgroup path {} must not contain `..`", .0.display())]
    Path(PathBuf),
    #[error("{} is not on a cgroup v2 file system; mount cgroup2 there or name its root", .0.display())]
    NotCgroup2(PathBuf),
    #[error("create cgroup {}", .dir.display())]
    Create { dir: PathBuf, source: std::io::Error },
    #[error("read {}", .file.display())]
    Read { file: PathBuf, source: std::io::Error },
    #[error("write {value:?} to {}", .file.display())]
    Write { file: PathBuf, value: String, source: std::io::Error },
    #[error(
        "set {file}: the {controller} controller is not available in {}; enable it in the cgroup v2 tree, or run with \
         ORLOP_MISSING_CONTROLLERS=warn",
        .dir.display()
    )]
    MissingController { controller: String, file: String, dir: PathBuf },
    #[error("invalid cgroup resource {field}: {reason}")]
    Invalid { field: String, reason: String },
    #[error(
        "memory limit {limit} is below the current usage {usage}; refused because checkBeforeUpdate is set"
    )]
    BelowUsage { limit: i64, usage: u64 },
    #[error("attach the device filter to cgroup {}", .dir.display())]
    DeviceFilter { dir: PathBuf, source: std::io::Error },
    #[error("kill the processes of cgroup {}", .dir.display())]
    Kill { dir: PathBuf, source: std::io::Error },
    #[error("remove cgroup {}: processes are left in it", .0.display())]
    Busy(PathBuf),
    #[error("remove cgroup {}", .dir.display())]
    Remove { dir: PathBuf, source: std::io::Error },
}

/// One cgroup, named by its directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    dir: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup and its missing parents, and enables every available controller on the way down.
    pub fn create(root: &Path, relative: &Path) -> Result<Self, Error> {
        let dir = hierarchy::join(root, relative)?;
        hierarchy::create(root, &dir)?;
        Ok(Self { dir })
    }

    /// A cgroup that exists already.
    pub fn open(root: &Path, relative: &Path) -> Result<Self, Error> {
        let dir = hierarchy::join(root, relative)?;
        if dir.is_dir() { Ok(Self { dir }) } else { Err(Error::NotExist(dir)) }
    }

    /// A cgroup by its full path, which need not exist (any more).
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether the directory is there.
    pub fn exists(&self) -> bool {
        self.dir.is_dir()
    }

    /// Writes the limits; used for create and update alike. What `resources` leaves out stays as it is; the device
    /// filter is touched only when `resources` lists device rules.
    pub fn apply(
        &self,
        resources: &oci_spec::runtime::LinuxResources,
        missing: MissingControllers,
    ) -> Result<(), Error> {
        plan::apply(&self.dir, resources, missing)?;
        match resources.devices() {
            Some(rules) if !rules.is_empty() => self.filter_devices(rules, missing),
            _ => Ok(()),
        }
    }

    /// Attaches the device filter for these rules (in order, the last match wins, denied when none matches), followed
    /// by the devices every container may use. A filter attached before is replaced.
    pub fn filter_devices(
        &self,
        rules: &[oci_spec::runtime::LinuxDeviceCgroup],
        missing: MissingControllers,
    ) -> Result<(), Error> {
        devices::apply(&self.dir, rules, missing)
    }

    pub fn stats(&self) -> Result<Stats, Error> {
        stats::read(&self.dir)
    }

    pub fn events(&self) -> Result<Events, Error> {
        stats::events(&self.dir)
    }

    /// Every process of the cgroup and of those below it.
    pub fn processes(&self) -> Result<Vec<u32>, Error> {
        hierarchy::processes(&self.dir)
    }

    /// Asks the kernel to freeze; [`Events::frozen`] tells when it has.
    pub fn freeze(&self) -> Result<(), Error> {
        files::write(&self.dir, "cgroup.freeze", "1")
    }

    pub fn thaw(&self) -> Result<(), Error> {
        files::write(&self.dir, "cgroup.freeze", "0")
    }

    /// Whether a freeze was asked for and not taken back.
    pub fn freezing(&self) -> Result<bool, Error> {
        Ok(files::read_optional(&self.dir, "cgroup.freeze")?.is_some_and(|text| text.trim() == "1"))
    }

    /// SIGKILL to every process in it, frozen or not.
    pub fn kill(&self) -> Result<(), Error> {
        hierarchy::kill(&self.dir)
    }

    /// Removes the cgroup and those below it; absence is success. [`Error::Busy`] while processes remain.
    pub fn remove(&self) -> Result<(), Error> {
        hierarchy::remove(&self.dir)
    }

    /// `cgroup.events`: poll it for `PRI` to learn of changes of [`Events::populated`] and [`Events::frozen`].
    pub fn events_file(&self) -> PathBuf {
        self.dir.join("cgroup.events")
    }

    /// `memory.events`: poll it for `PRI` to learn of out-of-memory kills.
    pub fn memory_events_file(&self) -> PathBuf {
        self.dir.join("memory.events")
    }
}
