//! Our wire types against the published ones: every message, field, enum value and method must be the same.

use anyhow::{Context, Result};
use orlop_integration::peers::workspace;
use orlop_integration::process::run;
use prost_reflect::{DescriptorPool, EnumDescriptor, FieldDescriptor, MessageDescriptor, ServiceDescriptor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Our file, the module that publishes the original, and the original's path in it.
const FILES: [(&str, &str, &str); 6] = [
    ("cri.proto", "k8s.io/cri-api", "pkg/apis/runtime/v1/api.proto"),
    ("csi.proto", "github.com/container-storage-interface/spec", "csi.proto"),
    ("deviceplugin.proto", "k8s.io/kubelet", "pkg/apis/deviceplugin/v1beta1/api.proto"),
    ("dra.proto", "k8s.io/kubelet", "pkg/apis/dra/v1/api.proto"),
    ("pluginregistration.proto", "k8s.io/kubelet", "pkg/apis/pluginregistration/v1/api.proto"),
    ("podresources.proto", "k8s.io/kubelet", "pkg/apis/podresources/v1/api.proto"),
];

/// What a schema says, one line a fact, keyed by what the fact is about.
type Facts = BTreeMap<String, String>;

#[test]
fn our_wire_types_are_the_published_ones() -> Result<()> {
    for (ours, module, original) in FILES {
        let ours = facts(&workspace().join("proto/wire").join(ours))?;
        let published = facts(&module_folder(module)?.join(original))?;
        assert!(published.len() > 8, "{module}: the published schema says next to nothing");
        let differences: Vec<String> = published
            .iter()
            .filter(|(key, value)| ours.get(*key) != Some(value))
            .map(|(key, value)| format!("{key}: published {value}, ours {:?}", ours.get(key)))
            .chain(
                ours.keys()
                    .filter(|key| !published.contains_key(*key))
                    .map(|key| format!("{key}: ours only")),
            )
            .collect();
        assert!(differences.is_empty(), "{module} {original}:\n{}", differences.join("\n"));
    }
    Ok(())
}

#[test]
fn a_changed_field_number_is_a_difference() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.proto");
    let schema =
        |number: u32| format!("syntax = \"proto3\"; package a; message M {{ string s = {number}; }}");
    std::fs::write(&path, schema(1))?;
    let before = facts(&path)?;
    std::fs::write(&path, schema(2))?;
    assert_ne!(before, facts(&path)?);
    Ok(())
}

fn module_folder(module: &str) -> Result<PathBuf> {
    let go = |arguments: &[&str]| {
        run(Command::new("go").current_dir(workspace().join("integration")).args(arguments))
    };
    go(&["mod", "download", module])?;
    Ok(PathBuf::from(go(&["list", "-m", "-f", "{{.Dir}}", module])?.trim()))
}

fn facts(path: &Path) -> Result<Facts> {
    let folder = path.parent().context("a schema lies in a folder")?;
    let name = path.file_name().context("a schema has a name")?;
    let files = protox::compile([name], [folder]).with_context(|| format!("compile {}", path.display()))?;
    let pool = DescriptorPool::from_file_descriptor_set(files)?;
    let mut facts = Facts::new();
    let own = |package: &str| !package.starts_with("google.");
    pool.all_messages().filter(|m| own(m.package_name())).for_each(|m| message(&mut facts, &m));
    pool.all_enums().filter(|e| own(e.package_name())).for_each(|e| enumeration(&mut facts, &e));
    pool.services().for_each(|s| service(&mut facts, &s));
    Ok(facts)
}

fn message(facts: &mut Facts, message: &MessageDescriptor) {
    facts.insert(format!("message {}", message.full_name()), format!("map entry {}", message.is_map_entry()));
    for range in message.reserved_ranges() {
        facts.insert(format!("message {} reserves {range:?}", message.full_name()), String::new());
    }
    for field in message.fields() {
        facts.insert(format!("field {} {}", message.full_name(), field.number()), describe(&field));
    }
}

fn describe(field: &FieldDescriptor) -> String {
    let oneof = field.containing_oneof().map(|o| o.name().to_owned());
    let presence = field.supports_presence();
    format!(
        "{} {:?} {:?} packed {} presence {presence} oneof {oneof:?}",
        field.name(),
        field.cardinality(),
        field.kind(),
        field.is_packed()
    )
}

fn enumeration(facts: &mut Facts, enumeration: &EnumDescriptor) {
    for value in enumeration.values() {
        facts
            .insert(format!("enum {} {}", enumeration.full_name(), value.name()), value.number().to_string());
    }
}

fn service(facts: &mut Facts, service: &ServiceDescriptor) {
    for method in service.methods() {
        facts.insert(
            format!("method {}", method.full_name()),
            format!(
                "{}{} -> {}{}",
                if method.is_client_streaming() { "stream " } else { "" },
                method.input().full_name(),
                if method.is_server_streaming() { "stream " } else { "" },
                method.output().full_name()
            ),
        );
    }
}
