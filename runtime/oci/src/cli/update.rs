//! `update`: new limits for a running container, from JSON or from flags.

use super::args::{Opt, Parsed};
use super::{Error, Global};
use oci_spec::runtime::LinuxResources;
use serde_json::{Value, json};
use std::io::Read;
use std::path::PathBuf;

const OPTIONS: &[Opt] = &[
    Opt(&["resources", "r"], true),
    Opt(&["blkio-weight"], true),
    Opt(&["cpu-period"], true),
    Opt(&["cpu-quota"], true),
    Opt(&["cpu-burst"], true),
    Opt(&["cpu-share"], true),
    Opt(&["cpu-rt-period"], true),
    Opt(&["cpu-rt-runtime"], true),
    Opt(&["cpu-idle"], true),
    Opt(&["cpuset-cpus"], true),
    Opt(&["cpuset-mems"], true),
    Opt(&["memory"], true),
    Opt(&["memory-reservation"], true),
    Opt(&["memory-swap"], true),
    Opt(&["pids-limit"], true),
    Opt(&["l3-cache-schema"], true),
    Opt(&["mem-bw-schema"], true),
];

pub(super) fn update(global: &Global, args: &[String]) -> Result<u8, Error> {
    let parsed = Parsed::parse(args, OPTIONS)?;
    let container = global.container(parsed.rest.first())?;
    if parsed.get("l3-cache-schema").or_else(|| parsed.get("mem-bw-schema")).is_some() {
        return Err(Error::Unsupported("Intel RDT"));
    }
    let (path, json) = match parsed.get("resources") {
        Some("-") => {
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .map_err(|source| Error::Io("read the resources from standard input", source))?;
            (PathBuf::from("standard input"), text)
        }
        Some(file) => {
            let path = PathBuf::from(file);
            let text = std::fs::read_to_string(&path).map_err(|source| Error::File {
                what: "open",
                path: path.clone(),
                source,
            })?;
            (path, text)
        }
        None => (PathBuf::from("the command line"), from_flags(&parsed)?.to_string()),
    };
    let resources: LinuxResources =
        serde_json::from_str(&json).map_err(|source| Error::Json { path, source })?;
    container.update(&resources)?;
    Ok(0)
}

/// The flags in the JSON form, so that both ways are read by the same code.
fn from_flags(parsed: &Parsed) -> Result<Value, Error> {
    let number = |name| Ok::<_, Error>(parsed.number::<i64>(name)?.map_or(Value::Null, |n| json!(n)));
    let mut resources = json!({
        "memory": {"limit": number("memory")?, "reservation": number("memory-reservation")?,
            "swap": number("memory-swap")?},
        "cpu": {"shares": number("cpu-share")?, "quota": number("cpu-quota")?, "period": number("cpu-period")?,
            "burst": number("cpu-burst")?, "idle": number("cpu-idle")?,
            "cpus": parsed.get("cpuset-cpus"), "mems": parsed.get("cpuset-mems")},
        "blockIO": {"weight": number("blkio-weight")?},
    });
    if let Some(limit) = parsed.number::<i64>("pids-limit")?
        && let Some(fields) = resources.as_object_mut()
    {
        fields.insert("pids".to_owned(), json!({"limit": limit}));
    }
    Ok(resources)
}
