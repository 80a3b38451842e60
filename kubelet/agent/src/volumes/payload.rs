//! Contents of a volume of files, collected from objects and fields.

use crate::objects::{Objects, TokenKey};
use crate::podspec::{Facts, fields, namespace, pod_name, uid};
use crate::volumes::error::VolumeCause;
use crate::volumes::ownership::Ownership;
use crate::volumes::plan::{FileSource, Files, Keyed};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{DownwardAPIVolumeFile, Pod, ServiceAccountTokenProjection};
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

const DEFAULT_TOKEN_LIFE: i64 = 3600;
const TOKEN_MODE: i32 = 0o600;
const LONGEST_PATH: usize = 4096;

/// One file: what it holds, and its mode before `fsGroup` widens it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct File {
    pub(super) content: Vec<u8>,
    pub(super) mode: u32,
    /// Owner other than root.
    pub(super) user: Option<u32>,
}

/// Files by their path in the volume. Every path was checked: relative, and of plain names only.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Payload {
    files: BTreeMap<PathBuf, File>,
}

impl Payload {
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Path, &File)> {
        self.files.iter().map(|(path, file)| (path.as_path(), file))
    }

    pub(super) fn add(
        &mut self,
        path: &str,
        content: Vec<u8>,
        mode: i32,
        user: Option<u32>,
    ) -> Result<(), VolumeCause> {
        let checked = checked_path(path)?;
        let mode = u32::try_from(mode)
            .ok()
            .filter(|mode| *mode <= 0o7777)
            .ok_or_else(|| VolumeCause::Mode { path: path.to_owned(), mode })?;
        // A file cannot be where another file's directory has to be.
        let clash = self.files.keys().any(|present| {
            present != &checked && (present.starts_with(&checked) || checked.starts_with(present))
        });
        if clash {
            return Err(VolumeCause::Path { path: path.to_owned(), cause: "both a file and a directory" });
        }
        self.files.insert(checked, File { content, mode, user });
        Ok(())
    }
}

/// A path that stays in the volume and does not touch the names that the volume's own links use.
fn checked_path(path: &str) -> Result<PathBuf, VolumeCause> {
    let fail = |cause| VolumeCause::Path { path: path.to_owned(), cause };
    if path.is_empty() {
        return Err(fail("it is empty"));
    }
    if path.len() > LONGEST_PATH || path.contains('\0') {
        return Err(fail("it is not a file name"));
    }
    let mut checked = PathBuf::new();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) if name.len() <= 255 => checked.push(name),
            Component::Normal(_) => return Err(fail("a name in it is too long")),
            Component::CurDir => {}
            Component::ParentDir => return Err(fail("it must not contain \"..\"")),
            Component::RootDir | Component::Prefix(_) => return Err(fail("it must be relative")),
        }
    }
    if checked.as_os_str().is_empty() {
        return Err(fail("it names no file"));
    }
    if checked.as_os_str().as_encoded_bytes().starts_with(b"..") {
        return Err(fail("it must not start with \"..\""));
    }
    Ok(checked)
}

/// Collects the contents, and when the first token among them is due for renewal.
pub(super) async fn build(
    objects: &Objects,
    facts: &Facts,
    pod: &Pod,
    files: &Files,
) -> Result<(Payload, Option<Timestamp>), VolumeCause> {
    let mut payload = Payload::default();
    let mut due: Option<Timestamp> = None;
    for source in &files.sources {
        match source {
            FileSource::ConfigMap(keyed) => config_map(objects, pod, keyed, &mut payload).await?,
            FileSource::Secret(keyed) => secret(objects, pod, keyed, &mut payload).await?,
            FileSource::Downward { files, default_mode } => {
                for file in files {
                    downward(facts, pod, file, *default_mode, &mut payload)?;
                }
            }
            FileSource::Token { projection, default_mode } => {
                let mode = *default_mode;
                let renew_at = token(objects, pod, projection, mode, files.ownership, &mut payload).await?;
                due = Some(due.map_or(renew_at, |due| due.min(renew_at)));
            }
        }
    }
    Ok((payload, due))
}

async fn config_map(
    objects: &Objects,
    pod: &Pod,
    keyed: &Keyed,
    payload: &mut Payload,
) -> Result<(), VolumeCause> {
    let Some(map) = objects.config_map(namespace(pod), &keyed.name).await? else {
        if keyed.optional {
            return Ok(());
        }
        return Err(VolumeCause::ConfigMapMissing { name: keyed.name.clone() });
    };
    let text = map.data.iter().flatten().map(|(key, value)| (key.as_str(), value.as_bytes()));
    let binary = map.binary_data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.as_slice()));
    let missing = |key: &str| VolumeCause::ConfigMapKeyMissing { key: key.to_owned() };
    add_keys(text.chain(binary).collect(), keyed, missing, payload)
}

async fn secret(
    objects: &Objects,
    pod: &Pod,
    keyed: &Keyed,
    payload: &mut Payload,
) -> Result<(), VolumeCause> {
    let Some(secret) = objects.secret(namespace(pod), &keyed.name).await? else {
        if keyed.optional {
            return Ok(());
        }
        return Err(VolumeCause::SecretMissing { name: keyed.name.clone() });
    };
    let data = secret.data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.as_slice()));
    let missing = |key: &str| VolumeCause::SecretKeyMissing { key: key.to_owned() };
    add_keys(data.collect(), keyed, missing, payload)
}

fn add_keys(
    data: BTreeMap<&str, &[u8]>,
    keyed: &Keyed,
    missing: impl Fn(&str) -> VolumeCause,
    payload: &mut Payload,
) -> Result<(), VolumeCause> {
    if keyed.items.is_empty() {
        for (key, value) in data {
            payload.add(key, value.to_vec(), keyed.default_mode, None)?;
        }
        return Ok(());
    }
    for item in &keyed.items {
        match data.get(item.key.as_str()) {
            Some(value) => {
                let mode = item.mode.unwrap_or(keyed.default_mode);
                payload.add(&item.path, value.to_vec(), mode, None)?;
            }
            None if keyed.optional => {}
            None => return Err(missing(&item.key)),
        }
    }
    Ok(())
}

fn downward(
    facts: &Facts,
    pod: &Pod,
    file: &DownwardAPIVolumeFile,
    default_mode: i32,
    payload: &mut Payload,
) -> Result<(), VolumeCause> {
    let text = if let Some(selector) = &file.field_ref {
        fields::field(pod, &selector.field_path, facts, &[])
    } else if let Some(selector) = &file.resource_field_ref {
        fields::resource(pod, selector, None, facts)
    } else {
        return Err(VolumeCause::NoSource);
    };
    let text = text.map_err(|source| VolumeCause::Field { path: file.path.clone(), source })?;
    payload.add(&file.path, text.into_bytes(), file.mode.unwrap_or(default_mode), None)
}

async fn token(
    objects: &Objects,
    pod: &Pod,
    projection: &ServiceAccountTokenProjection,
    default_mode: i32,
    ownership: Ownership,
    payload: &mut Payload,
) -> Result<Timestamp, VolumeCause> {
    let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone()).unwrap_or_default();
    let key = TokenKey {
        namespace: namespace(pod).to_owned(),
        account: if account.is_empty() { "default".to_owned() } else { account },
        pod_name: pod_name(pod).to_owned(),
        pod_uid: uid(pod).to_owned(),
        audience: projection.audience.clone().unwrap_or_default(),
        expiration_seconds: projection.expiration_seconds.unwrap_or(DEFAULT_TOKEN_LIFE),
    };
    let token = objects.token(&key).await?;
    // Where somebody in particular can be given the file, nobody else has to read it.
    let private = ownership.user.is_some() || ownership.fs_group.is_some();
    let mode = if private { TOKEN_MODE } else { default_mode };
    payload.add(&projection.path, token.text.as_bytes().to_vec(), mode, ownership.user)?;
    Ok(token.renew_at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_paths_are_refused() {
        let mut payload = Payload::default();
        let long = "x".repeat(256);
        for path in ["../x", "a/../../x", "/etc/passwd", "", ".", "..data", "..x/y", "a/..", "a\0b", &long] {
            assert!(payload.add(path, Vec::new(), 0o644, None).is_err(), "{path:?}");
        }
        for path in
            ["a", "b/c", "./d", "..".repeat(0).as_str(), "e/..f"].into_iter().filter(|p| !p.is_empty())
        {
            payload.add(path, Vec::new(), 0o644, None).unwrap();
        }
        assert!(payload.add("a/b", Vec::new(), 0o644, None).is_err());
        assert!(payload.add("b", Vec::new(), 0o644, None).is_err());
        assert!(payload.add("m", Vec::new(), 0o10_000, None).is_err());
        let names: Vec<_> = payload.iter().map(|(path, _)| path.to_str().unwrap().to_owned()).collect();
        assert_eq!(names, ["a", "b/c", "d", "e/..f"]);
    }
}
