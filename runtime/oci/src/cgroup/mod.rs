//! cgroup v2: the hierarchy, limits, statistics, events, freezing and killing. Nothing here knows containers.

use std::path::{Path, PathBuf};

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
}

/// One cgroup, named by its path below the root of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    dir: PathBuf,
}

impl Cgroup {
    /// Makes the cgroup and its missing parents, and enables every available controller on the way down.
    pub fn create(root: &Path, relative: &Path) -> Result<Self, Error> {
        todo!("{root:?} {relative:?}")
    }

    /// A cgroup that exists already.
    pub fn open(root: &Path, relative: &Path) -> Result<Self, Error> {
        todo!("{root:?} {relative:?}")
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes the limits; used for create and update alike. What `resources` leaves out stays as it is.
    pub fn apply(
        &self,
        resources: &oci_spec::runtime::LinuxResources,
        missing: MissingControllers,
    ) -> Result<(), Error> {
        todo!("{resources:?} {missing:?}")
    }

    pub fn stats(&self) -> Result<Stats, Error> {
        todo!()
    }

    pub fn events(&self) -> Result<Events, Error> {
        todo!()
    }

    /// Every process of the cgroup and of those below it.
    pub fn processes(&self) -> Result<Vec<u32>, Error> {
        todo!()
    }

    /// Asks the kernel to freeze; [`Events::frozen`] tells when it has.
    pub fn freeze(&self) -> Result<(), Error> {
        todo!()
    }

    pub fn thaw(&self) -> Result<(), Error> {
        todo!()
    }

    /// SIGKILL to every process in it, frozen or not.
    pub fn kill(&self) -> Result<(), Error> {
        todo!()
    }

    /// Removes the cgroup and those below it; absence is success. [`Error::Busy`] while processes remain.
    pub fn remove(&self) -> Result<(), Error> {
        todo!()
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

/// What `cgroup.events` and `memory.events` say. Zero where the tree has no memory controller.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Events {
    pub populated: bool,
    pub frozen: bool,
    /// Out-of-memory situations, and processes killed for them.
    pub oom: u64,
    pub oom_kill: u64,
}

/// A reading of the statistics files. `None` where the tree lacks the controller.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stats {
    pub cpu: Option<CpuStats>,
    pub memory: Option<MemoryStats>,
    pub pids: Option<PidsStats>,
    pub io: Option<Vec<IoStats>>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuStats {
    pub usage_usec: u64,
    pub user_usec: u64,
    pub system_usec: u64,
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled_usec: u64,
    pub pressure: Option<Pressure>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryStats {
    pub current: u64,
    /// `None` means no limit.
    pub max: Option<u64>,
    pub peak: Option<u64>,
    pub swap_current: Option<u64>,
    pub swap_max: Option<u64>,
    pub anon: u64,
    pub file: u64,
    pub inactive_file: u64,
    pub page_faults: u64,
    pub major_page_faults: u64,
    /// Every line of `memory.stat`.
    pub stat: Vec<(String, u64)>,
    pub pressure: Option<Pressure>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PidsStats {
    pub current: u64,
    pub max: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IoStats {
    pub major: u32,
    pub minor: u32,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

/// Pressure stall information; averages in hundredths of a percent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressure {
    pub some: PressureLine,
    pub full: PressureLine,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PressureLine {
    pub avg10: u32,
    pub avg60: u32,
    pub avg300: u32,
    pub total_usec: u64,
}
