//! Which system calls a container may make.

use super::SpecError;
use super::seccomp_default::default_profile;
use oci_spec::runtime::{Capability, LinuxSeccomp};
use orlop_proto::cri::security_profile::ProfileType;
use orlop_proto::cri::{LinuxContainerSecurityContext, SecurityProfile};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// A choice of profile, for seccomp and AppArmor alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Profile {
    RuntimeDefault,
    Unconfined,
    Localhost(String),
}

/// The structured form wins; the string is what kubelets sent before it existed.
pub(crate) fn choose(
    profile: Option<&SecurityProfile>,
    legacy: &str,
    absent: Profile,
) -> Result<Profile, SpecError> {
    let Some(profile) = profile else {
        return Ok(match legacy {
            "" => absent,
            "unconfined" => Profile::Unconfined,
            "runtime/default" | "docker/default" => Profile::RuntimeDefault,
            other => match other.strip_prefix("localhost/") {
                Some(name) => Profile::Localhost(name.to_owned()),
                None => {
                    return Err(SpecError::Invalid {
                        field: "security profile",
                        reason: format!(
                            "{other:?} is neither runtime/default, unconfined nor localhost/NAME"
                        ),
                    });
                }
            },
        });
    };
    let kind = profile.profile_type();
    if kind != ProfileType::Localhost && !profile.localhost_ref.is_empty() {
        return Err(SpecError::Invalid {
            field: "security profile",
            reason: format!("localhost_ref {:?} goes with type Localhost only", profile.localhost_ref),
        });
    }
    Ok(match kind {
        ProfileType::RuntimeDefault => Profile::RuntimeDefault,
        ProfileType::Unconfined => Profile::Unconfined,
        ProfileType::Localhost => Profile::Localhost(profile.localhost_ref.clone()),
    })
}

/// The filter for a container with these capabilities.
pub(crate) fn resolve(
    security: &LinuxContainerSecurityContext,
    capabilities: &HashSet<Capability>,
) -> Result<Option<LinuxSeccomp>, SpecError> {
    if security.privileged {
        return Ok(None);
    }
    #[allow(deprecated)]
    let legacy = &security.seccomp_profile_path;
    match choose(security.seccomp.as_ref(), legacy, Profile::Unconfined)? {
        Profile::Unconfined => Ok(None),
        Profile::RuntimeDefault => Ok(Some(default_profile(capabilities))),
        Profile::Localhost(path) => read_profile(Path::new(&path)).map(Some),
    }
}

fn read_profile(path: &Path) -> Result<LinuxSeccomp, SpecError> {
    let error = |reason: String| SpecError::SeccompProfile { path: path.to_owned(), reason };
    if !path.is_absolute() {
        return Err(error("the path must be absolute".into()));
    }
    let bytes = std::fs::read(path).map_err(|e| error(e.to_string()))?;
    serde_json::from_slice(&bytes).map_err(|e| error(e.to_string()))
}

/// The AppArmor profile to switch to. The kernel here may have none: the default is then nothing, an explicit name is
/// an error.
pub(crate) fn apparmor(
    security: &LinuxContainerSecurityContext,
    kernel_profiles: Option<&Path>,
) -> Result<Option<String>, SpecError> {
    #[allow(deprecated)]
    let legacy = &security.apparmor_profile;
    let Profile::Localhost(name) = choose(security.apparmor.as_ref(), legacy, Profile::RuntimeDefault)?
    else {
        return Ok(None);
    };
    let Some(list) = kernel_profiles else {
        return Err(SpecError::AppArmor { profile: name, reason: "this kernel has no AppArmor" });
    };
    let loaded = std::fs::read_to_string(list).unwrap_or_default();
    if !loaded.lines().any(|line| line.rsplit_once(" (").map_or(line, |(n, _)| n) == name) {
        return Err(SpecError::AppArmor { profile: name, reason: "it is not loaded on this node" });
    }
    Ok(Some(name))
}

/// Where the kernel lists its AppArmor profiles, if it has AppArmor.
pub(crate) fn apparmor_profiles() -> Option<PathBuf> {
    let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled").ok()?;
    enabled.starts_with('Y').then(|| PathBuf::from("/sys/kernel/security/apparmor/profiles"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn security(kind: ProfileType, reference: &str) -> LinuxContainerSecurityContext {
        let profile = SecurityProfile { profile_type: kind as i32, localhost_ref: reference.to_owned() };
        LinuxContainerSecurityContext {
            seccomp: Some(profile.clone()),
            apparmor: Some(profile),
            ..Default::default()
        }
    }

    #[test]
    fn a_profile_of_the_node_is_read_from_its_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            file.path(),
            r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ERRNO"}]}"#,
        )
        .unwrap();
        let context = security(ProfileType::Localhost, file.path().to_str().unwrap());
        let filter = resolve(&context, &HashSet::new()).unwrap().unwrap();
        assert_eq!(filter.syscalls().as_ref().unwrap()[0].names(), &["mkdir"]);
        std::fs::write(file.path(), "{").unwrap();
        assert!(matches!(resolve(&context, &HashSet::new()), Err(SpecError::SeccompProfile { .. })));
    }

    #[test]
    fn privileged_and_unconfined_have_no_filter() {
        let none = HashSet::new();
        assert!(resolve(&security(ProfileType::Unconfined, ""), &none).unwrap().is_none());
        assert!(resolve(&LinuxContainerSecurityContext::default(), &none).unwrap().is_none());
        let mut privileged = security(ProfileType::RuntimeDefault, "");
        assert!(resolve(&privileged, &none).unwrap().is_some());
        privileged.privileged = true;
        assert!(resolve(&privileged, &none).unwrap().is_none());
        assert!(resolve(&security(ProfileType::Unconfined, "x"), &none).is_err());
    }

    #[test]
    fn an_explicit_apparmor_profile_must_be_loaded() {
        assert_eq!(apparmor(&security(ProfileType::RuntimeDefault, ""), None).unwrap(), None);
        assert!(apparmor(&security(ProfileType::Localhost, "web"), None).is_err());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "web (enforce)\nother (complain)\n").unwrap();
        let web = apparmor(&security(ProfileType::Localhost, "web"), Some(file.path()));
        assert_eq!(web.unwrap().as_deref(), Some("web"));
        assert!(apparmor(&security(ProfileType::Localhost, "we"), Some(file.path())).is_err());
    }
}
