//! Layers whose archives leave directories undescribed, and tags two records claim.

use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::layer::Expected;
use crate::pull::{Layer, bases, unpack_layer};

fn archive(entries: &[(&str, u32)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, mode) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(*mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(0);
        if name.ends_with('/') {
            header.set_entry_type(tar::EntryType::Directory);
        }
        builder.append_data(&mut header, name, &b""[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

fn image(store: &Arc<Store>, archives: &[Vec<u8>], tag: &str) -> Arc<Image> {
    let diff_ids: Vec<Digest> = archives.iter().map(|archive| Digest::of(archive)).collect();
    let mut leases: Vec<Lease> = Vec::new();
    for ((archive, diff_id), base) in archives.iter().zip(&diff_ids).zip(bases(&diff_ids)) {
        let lease = store.lease_layer(diff_id, &base).unwrap_or_else(|| {
            let expected = Expected { blob: None, diff_id: diff_id.clone() };
            match unpack_layer(store, &archive[..], &expected, &base).unwrap() {
                Layer::Ready(lease) => lease,
                Layer::Pending(staged, applied) => {
                    let below: Vec<&Lease> = leases.iter().collect();
                    store.commit_layer(staged, &applied, &base, &below).unwrap()
                }
            }
        });
        leases.push(lease);
    }
    let ids: Vec<String> = diff_ids.iter().map(ToString::to_string).collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ids}
    });
    let config = config.to_string().into_bytes();
    let new = NewImage {
        id: Digest::of(&config),
        tags: vec![tag.to_owned()],
        digests: Vec::new(),
        blobs: vec![(Digest::of(&config), config)],
        annotations: Default::default(),
        layers: leases,
    };
    store.commit_image(new).unwrap()
}

fn open(base: &tempfile::TempDir) -> Arc<Store> {
    Store::open(&base.path().join("images"), &base.path().join("containers")).unwrap()
}

#[test]
fn an_undescribed_directory_takes_its_mode_from_the_layer_below() {
    let base = tempfile::tempdir().unwrap();
    let store = open(&base);
    let sticky = archive(&[("tmp/", 0o1777)]);
    let plain = archive(&[("tmp/", 0o700)]);
    let upper = archive(&[("tmp/file", 0o644)]);
    let one = image(&store, &[sticky, upper.clone()], "a.example/one:1");
    let two = image(&store, &[plain, upper.clone()], "a.example/two:1");
    let mode = |image: &Image| image.layers[0].join("tmp").metadata().unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(&one), mode(&two)), (0o1777, 0o700));
    assert_ne!(one.layers[0], two.layers[0]);
    // On the same base the layer is shared all the same.
    let again = image(&store, &[archive(&[("tmp/", 0o700)]), upper], "a.example/three:1");
    assert_eq!(again.layers, two.layers);
}

#[test]
fn a_layer_that_occurs_twice_is_mounted_once() {
    let base = tempfile::tempdir().unwrap();
    let store = open(&base);
    let (empty, other) = (archive(&[]), archive(&[("x/", 0o755)]));
    let image = image(&store, &[empty.clone(), other, empty], "a.example/twice:1");
    assert_eq!(image.layers.len(), 2);
}

#[test]
fn of_two_records_with_one_tag_the_later_has_it_after_a_crash() {
    let base = tempfile::tempdir().unwrap();
    let store = open(&base);
    let old = image(&store, &[archive(&[("a/", 0o755)])], "a.example/app:1");
    let record_path = store.layout.image(&old.id.parse().unwrap());
    let before = std::fs::read(&record_path).unwrap();
    let new = image(&store, &[archive(&[("b/", 0o755)])], "a.example/app:1");
    drop(store);
    // As if the crash came between the two records' writes.
    std::fs::write(&record_path, before).unwrap();
    let store = open(&base);
    let index = store.index();
    assert_eq!(index.find("a.example/app:1").unwrap().image.id, new.id);
    assert!(index.find(&old.id).unwrap().image.repo_tags.is_empty());
}

#[test]
fn a_pinned_mark_outlives_a_reopening() {
    let base = tempfile::tempdir().unwrap();
    let store = open(&base);
    let image = image(&store, &[archive(&[("a/", 0o755)])], "a.example/app:1");
    store.set_pinned(&image.id.parse().unwrap(), true).unwrap();
    drop(store);
    assert!(open(&base).index().find(&image.id).unwrap().image.pinned);
}
