//! Manifests and indexes, and the choice of a platform.
//!
//! Own structures rather than oci-spec's: registries serve manifests with fields it insists on left out.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;

use crate::digest::Digest;

/// What is asked for; the last one is for registries that label manifests oddly.
pub(crate) const ACCEPTED: &str = "application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.oci.image.index.v1+json, */*";
const MAX_LAYERS: usize = 512;

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    pub(crate) platform: Option<Platform>,
    #[serde(default, deserialize_with = "or_default")]
    pub(crate) annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Platform {
    pub(crate) os: String,
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) variant: String,
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    schema_version: u32,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
    #[serde(default, deserialize_with = "or_default")]
    annotations: BTreeMap<String, String>,
}

fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Debug)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    pub(crate) layers: Vec<Descriptor>,
    pub(crate) annotations: BTreeMap<String, String>,
}

#[derive(Debug)]
pub(crate) enum Document {
    Manifest(Manifest),
    Index(Vec<Descriptor>),
}

/// Tells a manifest from an index by its fields. The reason is for a person.
pub(crate) fn parse(bytes: &[u8]) -> Result<Document, String> {
    let raw: Raw =
        serde_json::from_slice(bytes).map_err(|cause| format!("its manifest cannot be read: {cause}"))?;
    if raw.schema_version == 1 {
        return Err(
            "its manifest has schema version 1, which is no longer supported: push it anew".to_owned()
        );
    }
    match (raw.manifests, raw.config, raw.layers) {
        (Some(manifests), None, None) => Ok(Document::Index(manifests)),
        (None, Some(config), layers) => {
            let layers = layers.unwrap_or_default();
            check_kind(&config, &layers)?;
            Ok(Document::Manifest(Manifest { config, layers, annotations: raw.annotations }))
        }
        _ => Err("its manifest is neither that of an image nor an index".to_owned()),
    }
}

fn check_kind(config: &Descriptor, layers: &[Descriptor]) -> Result<(), String> {
    let known =
        ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json", ""];
    if !known.contains(&config.media_type.as_str()) {
        return Err(format!("it is not a container image but an artifact of type {:?}", config.media_type));
    }
    if layers.len() > MAX_LAYERS {
        return Err(format!("it has {} layers; at most {MAX_LAYERS} are possible", layers.len()));
    }
    match layers.iter().find(|layer| layer.media_type.ends_with("+encrypted")) {
        Some(_) => Err("its layers are encrypted".to_owned()),
        None => Ok(()),
    }
}

/// The platforms this machine runs, the best first.
pub(crate) fn host_platforms() -> Vec<Platform> {
    let list = |names: &[(&str, &str)]| {
        let platform = |(architecture, variant): &(&str, &str)| Platform {
            os: "linux".to_owned(),
            architecture: (*architecture).to_owned(),
            variant: (*variant).to_owned(),
        };
        names.iter().map(platform).collect::<Vec<Platform>>()
    };
    match std::env::consts::ARCH {
        "x86_64" => list(&[("amd64", ""), ("amd64", "v1"), ("amd64", "v2"), ("amd64", "v3"), ("386", "")])
            .into_iter()
            .filter(|platform| x86_level() >= level(&platform.variant))
            .collect(),
        "aarch64" => {
            list(&[("arm64", ""), ("arm64", "v8"), ("arm", "v8"), ("arm", "v7"), ("arm", "v6"), ("arm", "")])
        }
        other => list(&[(other, "")]),
    }
}

fn level(variant: &str) -> u32 {
    variant.strip_prefix('v').and_then(|number| number.parse().ok()).unwrap_or(1)
}

/// The x86-64 microarchitecture level, as far as it decides whether a program runs.
#[cfg(target_arch = "x86_64")]
fn x86_level() -> u32 {
    let v2 = std::arch::is_x86_feature_detected!("sse4.2") && std::arch::is_x86_feature_detected!("popcnt");
    let v3 = std::arch::is_x86_feature_detected!("avx2")
        && std::arch::is_x86_feature_detected!("bmi2")
        && std::arch::is_x86_feature_detected!("fma")
        && std::arch::is_x86_feature_detected!("movbe");
    1 + u32::from(v2) + u32::from(v2 && v3)
}

#[cfg(not(target_arch = "x86_64"))]
fn x86_level() -> u32 {
    1
}

/// The entry of an index for the first platform of `wanted` it has. An entry without a platform is the last resort.
pub(crate) fn choose<'a>(entries: &'a [Descriptor], wanted: &[Platform]) -> Option<&'a Descriptor> {
    let offered =
        |platform: &Platform| entries.iter().find(|entry| entry.platform.as_ref() == Some(platform));
    wanted
        .iter()
        .find_map(offered)
        .or_else(|| entries.iter().find(|entry| entry.platform.is_none() && !is_attestation(entry)))
}

fn is_attestation(entry: &Descriptor) -> bool {
    entry.annotations.contains_key("vnd.docker.reference.type")
}

/// What an index offers, for a person: attestations (`unknown/unknown`) left out.
pub(crate) fn offered(entries: &[Descriptor]) -> String {
    let names: Vec<String> = entries
        .iter()
        .filter(|entry| !is_attestation(entry))
        .filter_map(|entry| entry.platform.as_ref())
        .filter(|platform| platform.os != "unknown")
        .map(Platform::to_string)
        .collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn platform(text: &str) -> Platform {
        let mut parts = text.split('/').map(str::to_owned);
        let mut next = || parts.next().unwrap_or_default();
        Platform { os: next(), architecture: next(), variant: next() }
    }

    fn entry(of: &str, number: u64) -> Descriptor {
        Descriptor {
            media_type: String::new(),
            digest: Digest::of(of.as_bytes()),
            size: number,
            platform: Some(platform(of)),
            annotations: BTreeMap::new(),
        }
    }

    #[test]
    fn the_best_platform_wins_whatever_the_order() {
        let entries = [
            entry("unknown/unknown", 0),
            entry("linux/arm/v6", 1),
            entry("linux/arm/v7", 2),
            entry("linux/amd64", 3),
        ];
        let arm = [platform("linux/arm64/v8"), platform("linux/arm/v7"), platform("linux/arm/v6")];
        assert_eq!(choose(&entries, &arm).unwrap().size, 2);
        assert_eq!(choose(&entries, &[platform("linux/amd64")]).unwrap().size, 3);
        assert!(choose(&entries, &[platform("linux/riscv64")]).is_none());
        assert_eq!(offered(&entries), "linux/arm/v6, linux/arm/v7, linux/amd64");
    }

    #[test]
    fn this_machine_runs_its_own_architecture() {
        assert_eq!(host_platforms()[0].os, "linux");
        assert_eq!(host_platforms()[0].variant, "");
    }

    #[test]
    fn old_schemas_artifacts_and_encrypted_layers_are_refused_with_a_reason() {
        let zero = format!("sha256:{}", "0".repeat(64));
        let image = |config: &str, layer: &str| {
            format!(
                r#"{{"schemaVersion":2,"config":{{"mediaType":"{config}","digest":"{zero}","size":1}},
                "layers":[{{"mediaType":"{layer}","digest":"{zero}","size":1}}]}}"#
            )
        };
        for (text, reason) in [
            (r#"{"schemaVersion":1}"#.to_owned(), "schema version 1"),
            (image("application/vnd.cncf.helm.config.v1+json", ""), "artifact"),
            (image("", "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"), "encrypted"),
            ("{}".to_owned(), "neither"),
            ("[".to_owned(), "cannot be read"),
        ] {
            assert!(parse(text.as_bytes()).unwrap_err().contains(reason), "{text}");
        }
        assert!(matches!(parse(image("", "").as_bytes()), Ok(Document::Manifest(_))));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_without_a_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
