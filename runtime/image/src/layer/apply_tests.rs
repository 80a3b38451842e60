//! What the applier writes, and what it refuses.

use std::io::Write as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};

use proptest::prelude::*;
use tar::{Builder, EntryType, Header};

use super::*;

struct Layer {
    base: tempfile::TempDir,
}

impl Layer {
    fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        std::fs::create_dir(base.path().join("fs")).unwrap();
        std::fs::create_dir(base.path().join("scratch")).unwrap();
        Self { base }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.base.path().join("fs").join(name)
    }

    fn apply(&self, archive: &[u8]) -> Result<Applied, LayerError> {
        Applier::new(&self.path(""), &self.base.path().join("scratch"))?.apply(archive)
    }
}

/// Writes names as they are: `tar::Builder::append_data` would clean them.
fn entry(kind: EntryType, name: &str, link: &str, mode: u32, data: &[u8]) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_000_000);
    header.set_size(data.len() as u64);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.name[..name.len()].copy_from_slice(name.as_bytes());
    gnu.linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn dir(name: &str) -> Vec<u8> {
    entry(EntryType::Directory, name, "", 0o755, b"")
}

fn file(name: &str, data: &[u8]) -> Vec<u8> {
    entry(EntryType::Regular, name, "", 0o644, data)
}

fn symlink(name: &str, target: &str) -> Vec<u8> {
    entry(EntryType::Symlink, name, target, 0o777, b"")
}

fn hardlink(name: &str, target: &str) -> Vec<u8> {
    entry(EntryType::Link, name, target, 0o644, b"")
}

fn opaque(path: &Path) -> bool {
    let mut value = [0u8; 8];
    rustix::fs::getxattr(path, "trusted.overlay.opaque", &mut value[..])
        .is_ok_and(|length| &value[..length] == b"y")
}

fn is_whiteout(path: &Path) -> bool {
    let metadata = std::fs::symlink_metadata(path).unwrap();
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

#[test]
fn files_keep_owner_set_id_bits_time_and_binary_attributes() {
    let layer = Layer::new();
    let mut builder = Builder::new(Vec::new());
    let capability = b"\x01\0\0\x02\x0a\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    builder
        .append_pax_extensions([
            ("SCHILY.xattr.security.capability", &capability[..]),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("mtime", b"123.25"),
        ])
        .unwrap();
    let mut header = Header::new_ustar();
    header.set_mode(0o4755);
    header.set_uid(1234);
    header.set_gid(4321);
    header.set_size(2);
    header.set_path("su").unwrap();
    header.set_cksum();
    builder.append(&header, &b"hi"[..]).unwrap();
    layer.apply(&builder.into_inner().unwrap()).unwrap();
    let metadata = std::fs::metadata(layer.path("su")).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o4755);
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 4321));
    assert_eq!((metadata.mtime(), metadata.mtime_nsec()), (123, 250_000_000));
    let mut value = [0u8; 64];
    let length = rustix::fs::getxattr(layer.path("su"), "security.capability", &mut value[..]).unwrap();
    assert_eq!(&value[..length], capability);
    assert!(rustix::fs::getxattr(layer.path("su"), "trusted.overlay.redirect", &mut value[..]).is_err());
}

#[test]
fn special_files_links_and_directory_times_are_kept() {
    let layer = Layer::new();
    let archive = [
        dir("d/"),
        file("d/a", b"abc"),
        hardlink("d/b", "d/a"),
        symlink("d/c", "/nowhere"),
        entry(EntryType::Fifo, "d/p", "", 0o620, b""),
        entry(EntryType::Char, "d/n", "", 0o666, b""),
    ]
    .concat();
    layer.apply(&archive).unwrap();
    let a = std::fs::metadata(layer.path("d/a")).unwrap();
    assert_eq!(a.ino(), std::fs::metadata(layer.path("d/b")).unwrap().ino());
    assert_eq!(std::fs::read_link(layer.path("d/c")).unwrap(), Path::new("/nowhere"));
    let fifo = std::fs::symlink_metadata(layer.path("d/p")).unwrap();
    assert!(fifo.file_type().is_fifo() && fifo.permissions().mode() & 0o777 == 0o620);
    assert!(std::fs::symlink_metadata(layer.path("d/n")).unwrap().file_type().is_char_device());
    assert_eq!(std::fs::metadata(layer.path("d")).unwrap().mtime(), 1_000_000);
}

#[test]
fn deletions_become_whiteouts_and_opaque_directories() {
    let layer = Layer::new();
    let archive = [
        dir("etc"),
        file("etc/.wh.gone", b""),
        dir("var"),
        file("var/.wh..wh..opq", b""),
        file(".wh..wh.plnk", b""),
        // Deleted below and made anew here: the new directory must not show the old one's content.
        file(".wh.fresh", b""),
        dir("fresh"),
        // The same, in the other order.
        dir("kept"),
        file(".wh.kept", b""),
    ]
    .concat();
    layer.apply(&archive).unwrap();
    assert!(is_whiteout(&layer.path("etc/gone")));
    assert!(opaque(&layer.path("var")) && opaque(&layer.path("fresh")) && opaque(&layer.path("kept")));
    assert!(!opaque(&layer.path("etc")));
    assert!(!layer.path(".wh..wh.plnk").exists());
}

#[test]
fn nothing_is_written_outside_the_layer() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap().to_owned();
    std::fs::write(outside.path().join("victim"), b"safe").unwrap();
    for archive in [
        file("../victim", b"bad"),
        file("a/../../victim", b"bad"),
        hardlink("x", "../victim"),
        file(".wh...", b""),
        [symlink("out", &target), file("out/victim", b"bad")].concat(),
        [symlink("out", &target), hardlink("x", "out/victim"), file("x", b"bad")].concat(),
        [symlink("out", "../../../../../../../.."), file("out/victim", b"bad")].concat(),
        [symlink("x", &format!("{target}/victim")), file("x", b"bad")].concat(),
        [symlink("x", &format!("{target}/victim")), hardlink("y", "x"), file("y", b"bad")].concat(),
        [dir("d"), symlink("d", &target), file("d/.wh.victim", b"")].concat(),
    ] {
        let layer = Layer::new();
        // Some are refused, some land inside the layer; either is right.
        let _ = layer.apply(&archive);
        assert_eq!(std::fs::read(outside.path().join("victim")).unwrap(), b"safe");
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
    }
}

#[test]
fn parent_references_and_absent_link_targets_are_refused() {
    assert!(matches!(Layer::new().apply(&file("a/../b", b"")), Err(LayerError::Escape { .. })));
    assert!(matches!(Layer::new().apply(&hardlink("a", "b")), Err(LayerError::MissingLinkTarget { .. })));
    assert!(matches!(
        Layer::new().apply(&[symlink("s", "/etc"), hardlink("a", "s/passwd")].concat()),
        Err(LayerError::MissingLinkTarget { .. })
    ));
}

#[test]
fn links_inside_the_layer_lead_where_they_would_in_the_container() {
    let layer = Layer::new();
    let archive = [
        dir("usr/"),
        dir("usr/lib/"),
        symlink("lib", "/usr/lib"),
        file("lib/a", b"1"),
        // The target is in a layer below.
        symlink("sbin", "usr/sbin"),
        file("sbin/init", b"2"),
    ]
    .concat();
    let applied = layer.apply(&archive).unwrap();
    assert_eq!(std::fs::read(layer.path("usr/lib/a")).unwrap(), b"1");
    assert_eq!(std::fs::read(layer.path("usr/sbin/init")).unwrap(), b"2");
    assert_eq!(applied.implied, [PathBuf::from("usr/sbin")]);
}

#[test]
fn later_members_replace_earlier_ones_of_any_type() {
    let layer = Layer::new();
    let archive = [
        dir("a"),
        file("a/deep", b"1"),
        file("a", b"now a file"),
        symlink("b", "/x"),
        dir("b"),
        file("b/in", b"2"),
    ]
    .concat();
    layer.apply(&archive).unwrap();
    assert_eq!(std::fs::read(layer.path("a")).unwrap(), b"now a file");
    assert_eq!(std::fs::read(layer.path("b/in")).unwrap(), b"2");
    assert_eq!(std::fs::read_dir(layer.base.path().join("scratch")).unwrap().count(), 0);
}

#[test]
fn undescribed_directories_and_the_root_are_reported() {
    let applied = Layer::new().apply(&file("x/y/z", b"")).unwrap();
    assert_eq!(applied.implied, [PathBuf::from("x"), PathBuf::from("x/y")]);
    assert_eq!(applied.root, None);
    let applied = Layer::new().apply(&[dir("./"), dir("./x"), file("./x/y", b"")].concat()).unwrap();
    assert!(applied.implied.is_empty());
    assert_eq!(applied.root.unwrap().mode, 0o755);
}

#[test]
fn sparse_files_have_their_holes() {
    let base = tempfile::tempdir().unwrap();
    let mut sparse = File::create(base.path().join("s")).unwrap();
    sparse.seek(SeekFrom::Start(1 << 20)).unwrap();
    sparse.write_all(b"end").unwrap();
    sparse.set_len(3 << 20).unwrap();
    drop(sparse);
    let output = std::process::Command::new("tar")
        .args(["--format=gnu", "-S", "-C", base.path().to_str().unwrap(), "-cf", "-", "s"])
        .output()
        .expect("GNU tar is needed for this test");
    assert!(output.status.success());
    let layer = Layer::new();
    layer.apply(&output.stdout).unwrap();
    assert_eq!(std::fs::read(layer.path("s")).unwrap(), std::fs::read(base.path().join("s")).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn damaged_archives_never_panic(position in 0usize..4096, value: u8, cut in 0usize..4096) {
        let mut archive = [dir("d"), file("d/f", b"data"), symlink("d/s", "f"), hardlink("d/h", "d/f")].concat();
        let position = position % archive.len();
        archive[position] = value;
        archive.truncate(cut);
        let _ = Layer::new().apply(&archive);
    }
}
