//! The kubelet's configuration file and the drop-ins laid over it: a JSON merge patch (RFC 7396) each, in the order of
//! their paths.

use anyhow::{Context, Result, bail};
use orlop_kubelet::config::{API_VERSION, KIND, KubeletConfiguration, from_map, parse};
use serde_json::{Map, Value};
use std::fs;
use std::path::{Path, PathBuf};

/// Reads file and folder; the defaults where neither is given.
pub fn read(file: Option<&Path>, folder: Option<&Path>) -> Result<KubeletConfiguration> {
    let base = match file {
        None => None,
        Some(file) => {
            let text = fs::read_to_string(file).with_context(|| {
                format!("read the kubelet's configuration {}: correct --config", file.display())
            })?;
            Some((file.display().to_string(), text))
        }
    };
    let Some(folder) = folder else {
        return Ok(match &base {
            None => KubeletConfiguration::default(),
            Some((origin, text)) => parse(origin, text)?,
        });
    };
    let mut all = Value::Object(Map::new());
    let mut origin = folder.display().to_string();
    if let Some((file, text)) = &base {
        // For its own errors under its own name.
        parse(file, text)?;
        merge(&mut all, serde_saphyr::from_str(text).with_context(|| format!("read {file}"))?);
        origin = format!("{file} with {origin}");
    }
    for path in drop_ins(folder)? {
        merge(&mut all, drop_in(&path)?.into());
    }
    match all {
        Value::Object(map) => Ok(from_map(&origin, map)?),
        _ => bail!("{origin}: is no object"),
    }
}

/// Every `*.conf` below the folder, in the order of their paths.
fn drop_ins(folder: &Path) -> Result<Vec<PathBuf>> {
    let list = || -> std::io::Result<Vec<PathBuf>> {
        let mut entries: Vec<PathBuf> =
            fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?;
        entries.sort();
        Ok(entries)
    };
    let entries =
        list().with_context(|| format!("read the folder {}: correct --config-dir", folder.display()))?;
    let mut found = Vec::new();
    for path in entries {
        if path.is_dir() {
            found.extend(drop_ins(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "conf") {
            found.push(path);
        }
    }
    Ok(found)
}

fn drop_in(path: &Path) -> Result<Map<String, Value>> {
    let name = path.display();
    let text = fs::read_to_string(path).with_context(|| format!("read {name}"))?;
    let map: Map<String, Value> = serde_saphyr::from_str(&text)
        .map_err(|error| anyhow::anyhow!("{name} is not a YAML object: {error}"))?;
    for (key, wanted) in [("apiVersion", API_VERSION), ("kind", KIND)] {
        if map.get(key).and_then(Value::as_str) != Some(wanted) {
            bail!("{name}: {key} must be {wanted}");
        }
    }
    Ok(map)
}

fn merge(base: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *base = patch;
        return;
    };
    if !base.is_object() {
        *base = Value::Object(Map::new());
    }
    if let Value::Object(base) = base {
        for (key, value) in patch {
            if value.is_null() {
                base.remove(&key);
            } else {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n";

    #[test]
    fn drop_ins_are_laid_over_the_file_in_the_order_of_their_paths() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (file, drop_ins) = (folder.path().join("config"), folder.path().join("d"));
        fs::create_dir_all(drop_ins.join("20-sub"))?;
        let write = |path: &Path, text: &str| fs::write(path, format!("{HEAD}{text}"));
        write(&file, "maxPods: 5\nclusterDNS: [10.0.0.10]\nfeatureGates: {A: true}\nclusterDomain: x.y\n")?;
        write(&drop_ins.join("10-a.conf"), "maxPods: 6\nfeatureGates: {B: false}\nclusterDomain: null\n")?;
        write(&drop_ins.join("20-sub/b.conf"), "maxPods: 7\nclusterDNS: [10.0.0.11]\n")?;
        fs::write(drop_ins.join("90-readme.txt"), "maxPods: 9")?;
        let config = read(Some(&file), Some(&drop_ins))?;
        assert_eq!(config.max_pods, 7);
        assert_eq!(config.cluster_dns, ["10.0.0.11"]);
        assert_eq!((config.feature_gates.len(), config.cluster_domain.as_str()), (2, ""));
        assert_eq!(read(None, Some(&drop_ins))?.max_pods, 7);
        assert_eq!(read(None, None)?, KubeletConfiguration::default());
        Ok(())
    }

    #[test]
    fn a_file_that_is_wrong_is_named() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let told = |result: Result<KubeletConfiguration>, part: &str| {
            let message = format!("{:#}", result.unwrap_err());
            assert!(message.contains(part), "{message}");
        };
        fs::write(folder.path().join("a.conf"), "maxPods: 1\n")?;
        told(read(None, Some(folder.path())), "a.conf: apiVersion must be");
        fs::write(folder.path().join("a.conf"), format!("{HEAD}maxPod: 1\n"))?;
        told(read(None, Some(folder.path())), "maxPod");
        told(read(Some(Path::new("/nonexistent")), None), "--config");
        told(read(None, Some(Path::new("/nonexistent"))), "--config-dir");
        Ok(())
    }
}
