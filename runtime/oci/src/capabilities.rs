//! The five capability sets of a process.

use caps::{CapSet, Capability as Cap, CapsHashSet};
use oci_spec::runtime::{Capabilities, LinuxCapabilities};
use std::str::FromStr;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("set the {set:?} capabilities")]
    Set { set: CapSet, source: caps::errors::CapsError },
    #[error("drop capabilities from the bounding set")]
    Bounding { source: caps::errors::CapsError },
    #[error("drop capabilities from the bounding set")]
    Unknown { source: std::io::Error },
}

/// The sets asked for; those that this process does not have itself cannot be given and are listed apart.
#[derive(Debug, Default)]
pub(crate) struct Sets {
    bounding: CapsHashSet,
    effective: CapsHashSet,
    permitted: CapsHashSet,
    inheritable: CapsHashSet,
    ambient: CapsHashSet,
    pub(crate) ungrantable: Vec<String>,
}

fn convert(listed: Option<&Capabilities>) -> CapsHashSet {
    // The names are those of the kernel in both crates: CAP_CHOWN against CHOWN.
    listed.into_iter().flatten().filter_map(|cap| Cap::from_str(&format!("CAP_{cap}")).ok()).collect()
}

impl Sets {
    pub(crate) fn new(asked: Option<&LinuxCapabilities>) -> Self {
        let Some(asked) = asked else { return Self::default() };
        let own = caps::read(None, CapSet::Permitted).unwrap_or_default();
        let mut ungrantable = Vec::new();
        let mut keep = |set: CapsHashSet, within: &CapsHashSet| {
            let (granted, refused): (CapsHashSet, CapsHashSet) =
                set.into_iter().partition(|cap| within.contains(cap));
            ungrantable.extend(refused.iter().map(ToString::to_string));
            granted
        };
        let permitted = keep(convert(asked.permitted().as_ref()), &own);
        let inheritable = keep(convert(asked.inheritable().as_ref()), &own);
        let effective = keep(convert(asked.effective().as_ref()), &permitted);
        let both = permitted.intersection(&inheritable).copied().collect();
        let ambient = keep(convert(asked.ambient().as_ref()), &both);
        ungrantable.sort();
        ungrantable.dedup();
        Self {
            bounding: convert(asked.bounding().as_ref()),
            effective,
            permitted,
            inheritable,
            ambient,
            ungrantable,
        }
    }

    /// While still root: takes the rest out of the bounding set, capabilities unknown to this program included.
    pub(crate) fn bound(&self) -> Result<(), Error> {
        for cap in caps::all() {
            let there = caps::has_cap(None, CapSet::Bounding, cap).unwrap_or(false);
            if there && !self.bounding.contains(&cap) {
                caps::drop(None, CapSet::Bounding, cap).map_err(|source| Error::Bounding { source })?;
            }
        }
        let known = u32::try_from(caps::all().len()).unwrap_or(64);
        crate::syscall::prctl::drop_bounding_from(known).map_err(|source| Error::Unknown { source })
    }

    /// After the user has been changed. With `until_seccomp`, CAP_SYS_ADMIN stays permitted until
    /// [`Sets::finish`]: a filter without no_new_privs cannot be installed otherwise.
    pub(crate) fn apply(&self, until_seccomp: bool) -> Result<(), Error> {
        let set = |set, value: &CapsHashSet| {
            caps::set(None, set, value).map_err(|source| Error::Set { set, source })
        };
        let mut permitted = self.permitted.clone();
        if until_seccomp {
            permitted.insert(Cap::CAP_SYS_ADMIN);
        }
        // Each set is bounded by others, which gives this order.
        set(CapSet::Inheritable, &self.inheritable)?;
        set(CapSet::Effective, &self.effective)?;
        set(CapSet::Permitted, &permitted)?;
        caps::clear(None, CapSet::Ambient).map_err(|source| Error::Set { set: CapSet::Ambient, source })?;
        set(CapSet::Ambient, &self.ambient)
    }

    pub(crate) fn raise_admin(&self) -> Result<(), Error> {
        let mut effective = self.effective.clone();
        effective.insert(Cap::CAP_SYS_ADMIN);
        caps::set(None, CapSet::Effective, &effective)
            .map_err(|source| Error::Set { set: CapSet::Effective, source })
    }

    /// Gives CAP_SYS_ADMIN back unless it was asked for.
    pub(crate) fn finish(&self) -> Result<(), Error> {
        for (set, value) in [(CapSet::Effective, &self.effective), (CapSet::Permitted, &self.permitted)] {
            caps::set(None, set, value).map_err(|source| Error::Set { set, source })?;
        }
        Ok(())
    }
}
