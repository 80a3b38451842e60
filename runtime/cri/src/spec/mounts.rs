//! A container's mounts: the defaults, the sandbox's files, and what the kubelet asks for.
//!
//! `resolve` looks at the host and turns the kubelet's wishes into [`Bind`]s; `plan` is pure.

use super::SpecError;
use crate::sandbox::files::SandboxDir;
use oci_spec::runtime::Mount;
use orlop_proto::cri::{self, MountPropagation};
use std::fs;
use std::path::{Path, PathBuf};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Propagation {
    Private,
    FromHost,
    Both,
}

/// Something of the host at a place in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bind {
    pub(crate) destination: PathBuf,
    pub(crate) source: Source,
    pub(crate) readonly: bool,
    pub(crate) recursive_readonly: bool,
    pub(crate) propagation: Propagation,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    Host(PathBuf),
    /// The layers of an image, the topmost first.
    Layers(Vec<PathBuf>),
}

/// Where image volumes come from.
pub(crate) trait Images {
    /// The layers of an image on this node, the topmost first.
    fn layers(&self, reference: &str) -> Option<Vec<PathBuf>>;
}

/// Checks the kubelet's mounts against the host. A missing host path becomes a directory, as every runtime does it.
pub(crate) fn resolve(
    mounts: &[cri::Mount],
    mountinfo: &str,
    images: &dyn Images,
) -> Result<Vec<Bind>, SpecError> {
    mounts.iter().map(|mount| resolve_one(mount, mountinfo, images)).collect()
}

fn resolve_one(mount: &cri::Mount, mountinfo: &str, images: &dyn Images) -> Result<Bind, SpecError> {
    let destination = PathBuf::from(&mount.container_path);
    if !destination.is_absolute() {
        return Err(SpecError::Invalid {
            field: "mount container_path",
            reason: format!("{:?} is not absolute", mount.container_path),
        });
    }
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(SpecError::NoIdMappings(destination));
    }
    let propagation = match mount.propagation() {
        MountPropagation::PropagationPrivate => Propagation::Private,
        MountPropagation::PropagationHostToContainer => Propagation::FromHost,
        MountPropagation::PropagationBidirectional => Propagation::Both,
    };
    if mount.recursive_read_only && (!mount.readonly || propagation != Propagation::Private) {
        return Err(SpecError::RecursiveReadonly(destination));
    }
    if let Some(image) = &mount.image {
        return image_volume(mount, &image.image, destination, images);
    }
    let source = host_path(&mount.host_path)?;
    check_propagation(&source, propagation, mountinfo)?;
    Ok(Bind {
        destination,
        source: Source::Host(source),
        readonly: mount.readonly,
        recursive_readonly: mount.recursive_read_only,
        propagation,
    })
}

fn host_path(path: &str) -> Result<PathBuf, SpecError> {
    let error = |source| SpecError::MountSource { path: path.into(), source };
    if !path.starts_with('/') {
        return Err(SpecError::Invalid {
            field: "mount host_path",
            reason: format!("{path:?} is not absolute"),
        });
    }
    match fs::canonicalize(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            fs::create_dir_all(path).map_err(error)?;
            fs::canonicalize(path).map_err(error)
        }
        other => other.map_err(error),
    }
}

fn image_volume(
    mount: &cri::Mount,
    reference: &str,
    destination: PathBuf,
    images: &dyn Images,
) -> Result<Bind, SpecError> {
    let refuse = |reason: &str| SpecError::ImageVolume {
        image: reference.to_owned(),
        destination: destination.clone(),
        reason: reason.to_owned(),
    };
    if !mount.host_path.is_empty() || !mount.readonly {
        return Err(refuse("an image volume has no host path and is read-only"));
    }
    let mut layers = images.layers(reference).ok_or_else(|| refuse("the image is not on this node"))?;
    if !mount.image_sub_path.is_empty() {
        // Below a single layer a sub path is a directory of it; several would need a mount of their own on the host.
        let [layer] = layers.as_slice() else {
            return Err(refuse("a sub path needs an image of one layer"));
        };
        let inside = super::image_files::ImageFiles::new(&layers)
            .directory(&mount.image_sub_path)
            .map_err(|e| refuse(&e.to_string()))?
            .ok_or_else(|| refuse("the sub path is not a directory of the image"))?;
        layers = vec![layer.join(inside)];
    }
    Ok(Bind {
        destination,
        source: Source::Layers(layers),
        readonly: true,
        recursive_readonly: false,
        propagation: Propagation::Private,
    })
}

/// Propagation into a container needs a source that takes part in it on the host.
fn check_propagation(source: &Path, wanted: Propagation, mountinfo: &str) -> Result<(), SpecError> {
    let (shared, slave) = match wanted {
        Propagation::Private => return Ok(()),
        _ => peer_groups(source, mountinfo),
    };
    let fits = match wanted {
        Propagation::Both => shared,
        _ => shared || slave,
    };
    if fits {
        return Ok(());
    }
    let needed = if wanted == Propagation::Both { "shared" } else { "shared or a slave" };
    Err(SpecError::Propagation { path: source.to_owned(), needed })
}

/// Whether the mount that holds `path` is shared, and whether it is a slave.
fn peer_groups(path: &Path, mountinfo: &str) -> (bool, bool) {
    mountinfo
        .lines()
        .filter_map(|line| {
            let (before, _) = line.split_once(" - ")?;
            let fields: Vec<_> = before.split(' ').collect();
            let point = unescape(fields.get(4)?);
            path.starts_with(&point).then(|| {
                let tags = &fields[6..];
                let shared = tags.iter().any(|t| t.starts_with("shared:"));
                (point.components().count(), (shared, tags.iter().any(|t| t.starts_with("master:"))))
            })
        })
        // Of mounts on the same point the last one is on top, and `max_by_key` keeps the last.
        .max_by_key(|(depth, _)| *depth)
        .map_or((false, false), |(_, groups)| groups)
}

fn unescape(text: &str) -> PathBuf {
    PathBuf::from(
        text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\"),
    )
}

/// What decides about the default mounts.
#[derive(Debug)]
pub(crate) struct Defaults<'a> {
    pub(crate) dir: &'a SandboxDir,
    pub(crate) privileged: bool,
    pub(crate) readonly_rootfs: bool,
    pub(crate) host_ipc: bool,
}

fn mount(destination: &str, kind: &str, source: &Path, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(destination.into())
        .set_typ(Some(kind.to_owned()))
        .set_source(Some(source.to_owned()))
        .set_options(Some(options.iter().map(ToString::to_string).collect()));
    mount
}

fn kernel_mounts(defaults: &Defaults<'_>) -> Vec<Mount> {
    let write = if defaults.privileged { "rw" } else { "ro" };
    let safe = ["nosuid", "noexec", "nodev"];
    let plain = |destination: &str, kind: &str, extra: &[&str]| {
        mount(destination, kind, Path::new(kind), &[&safe[..], extra].concat())
    };
    vec![
        plain("/proc", "proc", &[]),
        mount("/dev", "tmpfs", Path::new("tmpfs"), &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            Path::new("devpts"),
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        plain("/dev/mqueue", "mqueue", &[]),
        plain("/sys", "sysfs", &[write]),
        plain("/sys/fs/cgroup", "cgroup", &["relatime", write]),
    ]
}

fn sandbox_mounts(defaults: &Defaults<'_>) -> Vec<Mount> {
    let write = if defaults.readonly_rootfs { "ro" } else { "rw" };
    let file = |destination: &str, source: PathBuf| {
        mount(destination, "bind", &source, &["rbind", "rprivate", write, "nosuid", "nodev", "noexec"])
    };
    let shm = if defaults.host_ipc { PathBuf::from("/dev/shm") } else { defaults.dir.shm() };
    vec![
        file("/etc/hostname", defaults.dir.hostname()),
        file("/etc/hosts", defaults.dir.hosts()),
        file("/etc/resolv.conf", defaults.dir.resolv_conf()),
        mount("/dev/shm", "bind", &shm, &["rbind", "rprivate", "rw", "nosuid", "nodev", "noexec"]),
    ]
}

impl Bind {
    fn to_oci(&self) -> Mount {
        let destination = self.destination.to_string_lossy();
        let source = match &self.source {
            Source::Layers(layers) => match layers.as_slice() {
                [single] => single,
                several => {
                    let lower: Vec<_> = several.iter().map(|l| l.to_string_lossy()).collect();
                    let option = format!("lowerdir={}", lower.join(":"));
                    return mount(&destination, "overlay", Path::new("overlay"), &["ro", &option]);
                }
            },
            Source::Host(path) => path,
        };
        let propagation = match self.propagation {
            Propagation::Private => "rprivate",
            Propagation::FromHost => "rslave",
            Propagation::Both => "rshared",
        };
        let write = match (self.readonly, self.recursive_readonly) {
            (true, true) => "rro",
            (true, false) => "ro",
            _ => "rw",
        };
        mount(&destination, "bind", source, &["rbind", propagation, write])
    }
}

/// The mounts in the order in which they are made: parents first. What the kubelet mounts takes the place of a default,
/// and a mount of `/dev` also of those below it.
pub(crate) fn plan(defaults: &Defaults<'_>, binds: &[Bind]) -> Vec<Mount> {
    let taken = |destination: &Path| {
        binds.iter().any(|bind| {
            bind.destination == destination
                || (bind.destination == Path::new("/dev") && destination.starts_with("/dev"))
        })
    };
    let mut mounts: Vec<Mount> = kernel_mounts(defaults)
        .into_iter()
        .chain(sandbox_mounts(defaults))
        .filter(|m| !taken(m.destination()))
        .chain(binds.iter().map(Bind::to_oci))
        .collect();
    mounts.sort_by_key(|m| m.destination().components().count());
    mounts
}

/// The propagation of the container's root: it must let through what any mount below it needs.
pub(crate) fn root_propagation(binds: &[Bind]) -> Option<&'static str> {
    if binds.iter().any(|b| b.propagation == Propagation::Both) {
        Some("rshared")
    } else if binds.iter().any(|b| b.propagation == Propagation::FromHost) {
        Some("rslave")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct NoImages;
    impl Images for NoImages {
        fn layers(&self, reference: &str) -> Option<Vec<PathBuf>> {
            (reference == "two").then(|| vec!["/l/2".into(), "/l/1".into()])
        }
    }

    const MOUNTINFO: &str = "1 0 0:1 / / rw - ext4 a rw\n2 1 0:2 / /tmp rw shared:5 - tmpfs b rw\n\
                             3 2 0:3 / /tmp/sl\\040ave rw master:5 - tmpfs c rw\n";

    fn cri_mount(host: &str, propagation: MountPropagation) -> cri::Mount {
        cri::Mount {
            container_path: "/data".into(),
            host_path: host.into(),
            propagation: propagation as i32,
            ..Default::default()
        }
    }

    #[test]
    fn propagation_needs_a_source_that_takes_part() {
        let resolve = |host: &str, p| resolve(&[cri_mount(host, p)], MOUNTINFO, &NoImages);
        assert!(resolve("/tmp", MountPropagation::PropagationBidirectional).is_ok());
        assert!(matches!(
            resolve("/etc", MountPropagation::PropagationHostToContainer),
            Err(SpecError::Propagation { needed: "shared or a slave", .. })
        ));
        assert_eq!(peer_groups(Path::new("/tmp/sl ave/x"), MOUNTINFO), (false, true));
    }

    #[test]
    fn recursive_readonly_needs_a_private_readonly_mount() {
        let mut mount = cri_mount("/tmp", MountPropagation::PropagationPrivate);
        mount.recursive_read_only = true;
        let error = resolve(&[mount.clone()], MOUNTINFO, &NoImages).unwrap_err();
        assert!(error.to_string().starts_with("RROUnsupported"), "{error}");
        mount.readonly = true;
        let binds = resolve(&[mount], MOUNTINFO, &NoImages).unwrap();
        assert!(binds[0].to_oci().options().as_ref().unwrap().contains(&"rro".to_owned()));
    }

    #[test]
    fn image_volumes_are_overlays_of_the_image_layers() {
        let mut mount = cri_mount("", MountPropagation::PropagationPrivate);
        mount.image = Some(cri::ImageSpec { image: "two".into(), ..Default::default() });
        let error = resolve(&[mount.clone()], MOUNTINFO, &NoImages).unwrap_err();
        assert!(error.to_string().starts_with("ImageVolumeMountFailed"), "{error}");
        mount.readonly = true;
        let oci = resolve(&[mount], MOUNTINFO, &NoImages).unwrap()[0].to_oci();
        assert_eq!(oci.typ().as_deref(), Some("overlay"));
        assert_eq!(oci.options().as_ref().unwrap()[1], "lowerdir=/l/2:/l/1");
    }

    #[test]
    fn the_kubelets_mounts_replace_defaults_and_parents_come_first() {
        let dir = SandboxDir("/s".into());
        let defaults = Defaults { dir: &dir, privileged: false, readonly_rootfs: false, host_ipc: false };
        let bind = |destination: &str| Bind {
            destination: destination.into(),
            source: Source::Host("/h".into()),
            readonly: false,
            recursive_readonly: false,
            propagation: Propagation::Private,
        };
        let names = |binds: &[Bind]| -> Vec<String> {
            plan(&defaults, binds).iter().map(|m| m.destination().display().to_string()).collect()
        };
        let with_hosts = names(&[bind("/etc/hosts"), bind("/a/b/c/d")]);
        assert_eq!(with_hosts.iter().filter(|n| *n == "/etc/hosts").count(), 1);
        assert_eq!(with_hosts.last().unwrap(), "/a/b/c/d");
        assert_eq!(&with_hosts[..3], ["/proc", "/dev", "/sys"]);
        let with_dev = names(&[bind("/dev")]);
        assert_eq!(with_dev.iter().filter(|n| n.starts_with("/dev")).count(), 1);
    }
}
