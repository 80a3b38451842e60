//! What each volume of a pod is to be, from the pod's specification and the node's facts alone.

use crate::podspec::quantity::Amount;
use crate::podspec::{Facts, uid};
use crate::volumes::error::{VolumeCause, VolumeError};
use crate::volumes::host_path::HostPathCheck;
use crate::volumes::ownership::Ownership;
use k8s_openapi::api::core::v1::{
    Container, DownwardAPIVolumeFile, EmptyDirVolumeSource, KeyToPath, Pod, ServiceAccountTokenProjection,
    Volume, VolumeProjection,
};
use std::path::{Path, PathBuf};

const DEFAULT_MODE: i32 = 0o644;

/// One volume: where it will be, and of which kind.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct VolumePlan {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Kind {
    EmptyDir(EmptyDir),
    HostPath(HostPathCheck),
    Files(Files),
}

impl Kind {
    pub(super) fn read_only(&self) -> bool {
        matches!(self, Self::Files(_))
    }
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct EmptyDir {
    pub(super) medium: Medium,
    pub(super) fs_group: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Medium {
    Disk,
    /// A tmpfs of at most so many bytes, if a limit is known.
    Memory(Option<u64>),
}

/// A volume of files that we write.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Files {
    /// Whether contents must not reach a disk.
    pub(super) in_memory: bool,
    pub(super) sources: Vec<FileSource>,
    pub(super) ownership: Ownership,
}

/// Where some of a volume's files come from.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum FileSource {
    ConfigMap(Keyed),
    Secret(Keyed),
    Downward { files: Vec<DownwardAPIVolumeFile>, default_mode: i32 },
    Token { projection: ServiceAccountTokenProjection, default_mode: i32 },
}

/// An object whose keys become files.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Keyed {
    pub(super) name: String,
    /// Empty: every key, by its name.
    pub(super) items: Vec<KeyToPath>,
    pub(super) optional: bool,
    pub(super) default_mode: i32,
}

/// Plans for all volumes of the pod, in its order.
pub(super) fn volumes(facts: &Facts, pod: &Pod) -> Result<Vec<VolumePlan>, VolumeError> {
    let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_deref()).unwrap_or_default();
    let base = facts.pod_dir(uid(pod)).join("volumes");
    volumes
        .iter()
        .map(|volume| one(facts, pod, volume, &base).map_err(|cause| VolumeError::setup(&volume.name, cause)))
        .collect()
}

fn one(facts: &Facts, pod: &Pod, volume: &Volume, base: &Path) -> Result<VolumePlan, VolumeCause> {
    // The API server allows only DNS labels; a manifest on disk may say anything.
    if volume.name.is_empty() || volume.name.contains('/') || volume.name.starts_with('.') {
        return Err(VolumeCause::Path { path: volume.name.clone(), cause: "not a volume name" });
    }
    let at = |kind: &str| base.join(format!("kubernetes.io~{kind}")).join(&volume.name);
    let plan = |path, kind| Ok(VolumePlan { name: volume.name.clone(), path, kind });
    let files = |in_memory, sources| Kind::Files(Files { in_memory, sources, ownership: Ownership::of(pod) });
    if let Some(source) = &volume.empty_dir {
        plan(at("empty-dir"), Kind::EmptyDir(empty_dir(facts, pod, source)?))
    } else if let Some(source) = &volume.host_path {
        let check = HostPathCheck::parse(source.type_.as_deref().unwrap_or_default())?;
        if !source.path.starts_with('/') {
            return Err(VolumeCause::Path { path: source.path.clone(), cause: "not absolute" });
        }
        plan(PathBuf::from(&source.path), Kind::HostPath(check))
    } else if let Some(source) = &volume.config_map {
        let keyed = Keyed {
            name: source.name.clone(),
            items: source.items.clone().unwrap_or_default(),
            optional: source.optional == Some(true),
            default_mode: source.default_mode.unwrap_or(DEFAULT_MODE),
        };
        plan(at("configmap"), files(false, vec![FileSource::ConfigMap(keyed)]))
    } else if let Some(source) = &volume.secret {
        let keyed = Keyed {
            name: source.secret_name.clone().unwrap_or_default(),
            items: source.items.clone().unwrap_or_default(),
            optional: source.optional == Some(true),
            default_mode: source.default_mode.unwrap_or(DEFAULT_MODE),
        };
        plan(at("secret"), files(true, vec![FileSource::Secret(keyed)]))
    } else if let Some(source) = &volume.downward_api {
        let downward = FileSource::Downward {
            files: source.items.clone().unwrap_or_default(),
            default_mode: source.default_mode.unwrap_or(DEFAULT_MODE),
        };
        plan(at("downward-api"), files(true, vec![downward]))
    } else if let Some(source) = &volume.projected {
        let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        let sources = source.sources.iter().flatten().map(|projection| projected(projection, mode));
        plan(at("projected"), files(true, sources.collect::<Result<_, _>>()?))
    } else {
        Err(unsupported(volume))
    }
}

fn projected(projection: &VolumeProjection, default_mode: i32) -> Result<FileSource, VolumeCause> {
    if let Some(source) = &projection.config_map {
        Ok(FileSource::ConfigMap(Keyed {
            name: source.name.clone(),
            items: source.items.clone().unwrap_or_default(),
            optional: source.optional == Some(true),
            default_mode,
        }))
    } else if let Some(source) = &projection.secret {
        Ok(FileSource::Secret(Keyed {
            name: source.name.clone(),
            items: source.items.clone().unwrap_or_default(),
            optional: source.optional == Some(true),
            default_mode,
        }))
    } else if let Some(source) = &projection.downward_api {
        Ok(FileSource::Downward { files: source.items.clone().unwrap_or_default(), default_mode })
    } else if let Some(source) = &projection.service_account_token {
        Ok(FileSource::Token { projection: source.clone(), default_mode })
    } else if projection.cluster_trust_bundle.is_some() {
        Err(VolumeCause::Unsupported { kind: "projected clusterTrustBundle" })
    } else if projection.pod_certificate.is_some() {
        Err(VolumeCause::Unsupported { kind: "projected podCertificate" })
    } else {
        Err(VolumeCause::NoSource)
    }
}

fn empty_dir(facts: &Facts, pod: &Pod, source: &EmptyDirVolumeSource) -> Result<EmptyDir, VolumeCause> {
    let medium = match source.medium.as_deref().unwrap_or_default() {
        "" => Medium::Disk,
        "Memory" => {
            let stated = source.size_limit.as_ref().map(|quantity| {
                Amount::try_from(quantity).map_err(|_| VolumeCause::SizeLimit { text: quantity.0.clone() })
            });
            let limits =
                [stated.transpose()?, pod_memory_limit(pod), facts.allocatable.get("memory").copied()];
            let least = limits.into_iter().flatten().filter(|amount| amount.is_positive()).min();
            Medium::Memory(least.and_then(|amount| u64::try_from(amount.value()).ok()))
        }
        _ => return Err(VolumeCause::Unsupported { kind: "emptyDir on huge pages" }),
    };
    Ok(EmptyDir { medium, fs_group: Ownership::of(pod).fs_group })
}

/// What all containers together may use, if each has a limit.
fn pod_memory_limit(pod: &Pod) -> Option<Amount> {
    let limit = |container: &Container| {
        let limits = container.resources.as_ref()?.limits.as_ref()?;
        Amount::try_from(limits.get("memory")?).ok().filter(|amount| amount.is_positive())
    };
    let containers = &pod.spec.as_ref()?.containers;
    containers.iter().map(limit).try_fold(Amount::ZERO, |sum, amount| Some(sum + amount?))
}

fn unsupported(volume: &Volume) -> VolumeCause {
    let present = [
        ("persistentVolumeClaim", volume.persistent_volume_claim.is_some()),
        ("ephemeral", volume.ephemeral.is_some()),
        ("csi", volume.csi.is_some()),
        ("nfs", volume.nfs.is_some()),
        ("image", volume.image.is_some()),
        ("iscsi", volume.iscsi.is_some()),
        ("fc", volume.fc.is_some()),
        ("flexVolume", volume.flex_volume.is_some()),
        ("gitRepo", volume.git_repo.is_some()),
        ("awsElasticBlockStore", volume.aws_elastic_block_store.is_some()),
        ("azureDisk", volume.azure_disk.is_some()),
        ("azureFile", volume.azure_file.is_some()),
        ("cephfs", volume.cephfs.is_some()),
        ("cinder", volume.cinder.is_some()),
        ("flocker", volume.flocker.is_some()),
        ("gcePersistentDisk", volume.gce_persistent_disk.is_some()),
        ("glusterfs", volume.glusterfs.is_some()),
        ("photonPersistentDisk", volume.photon_persistent_disk.is_some()),
        ("portworxVolume", volume.portworx_volume.is_some()),
        ("quobyte", volume.quobyte.is_some()),
        ("rbd", volume.rbd.is_some()),
        ("scaleIO", volume.scale_io.is_some()),
        ("storageos", volume.storageos.is_some()),
        ("vsphereVolume", volume.vsphere_volume.is_some()),
    ];
    match present.into_iter().find(|(_, present)| *present) {
        Some((kind, _)) => VolumeCause::Unsupported { kind },
        None => VolumeCause::NoSource,
    }
}
