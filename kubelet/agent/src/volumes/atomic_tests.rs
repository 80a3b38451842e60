use super::*;
use std::fs;

fn payload(files: &[(&str, &str)]) -> Payload {
    let mut payload = Payload::default();
    for (path, content) in files {
        payload.add(path, content.as_bytes().to_vec(), 0o640, None).unwrap();
    }
    payload
}

fn now() -> Timestamp {
    "2026-01-31T12:00:00.5Z".parse().unwrap()
}

/// What a container would see: name to content through the links.
fn visible(volume: &Path) -> BTreeMap<String, String> {
    let mut seen = BTreeMap::new();
    for entry in fs::read_dir(volume).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with("..") {
            continue;
        }
        if entry.path().is_dir() {
            for inner in fs::read_dir(entry.path()).unwrap() {
                let inner = inner.unwrap();
                let path = format!("{name}/{}", inner.file_name().into_string().unwrap());
                seen.insert(path, fs::read_to_string(inner.path()).unwrap());
            }
        } else {
            seen.insert(name, fs::read_to_string(entry.path()).unwrap_or_else(|_| "dangling".to_owned()));
        }
    }
    seen
}

fn generations(volume: &Path) -> usize {
    Present::read(volume).unwrap().generations.len()
}

#[test]
fn the_plan_of_a_first_write_is_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let plan = plan(dir.path(), &payload(&[("a", "1"), ("d/b", "2")]), Ownership::default(), now()).unwrap();
    let generation = "..2026_01_31_12_00_00.500000000";
    let text: Vec<String> = plan
        .iter()
        .map(|action| match action {
            Action::MakeDirectory { path, mode, .. } => format!("mkdir {mode:o} {}", path.display()),
            Action::WriteFile { path, mode, .. } => format!("write {mode:o} {}", path.display()),
            Action::Link { path, target } => format!("link {} {}", path.display(), target.display()),
            Action::Rename { from, to } => format!("rename {} {}", from.display(), to.display()),
            Action::Remove { path } => format!("remove {}", path.display()),
        })
        .collect();
    let expected = [
        format!("mkdir 755 {generation}/"),
        format!("mkdir 755 {generation}/d"),
        format!("write 640 {generation}/a"),
        format!("write 640 {generation}/d/b"),
        "remove ..data_tmp".to_owned(),
        format!("link ..data_tmp {generation}"),
        "rename ..data_tmp ..data".to_owned(),
        "remove a".to_owned(),
        "link a ..data/a".to_owned(),
        "remove d".to_owned(),
        "link d ..data/d".to_owned(),
    ];
    assert_eq!(text, expected);
}

#[test]
fn contents_change_and_nothing_is_done_when_they_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path();
    write(volume, &payload(&[("a", "1"), ("d/b", "2")]), Ownership::default()).unwrap();
    assert_eq!(visible(volume), BTreeMap::from([("a".into(), "1".into()), ("d/b".into(), "2".into())]));
    assert_eq!(fs::metadata(volume.join("a")).unwrap().mode() & 0o7777, 0o640);
    let before = fs::read_link(volume.join(DATA)).unwrap();
    write(volume, &payload(&[("a", "1"), ("d/b", "2")]), Ownership::default()).unwrap();
    assert_eq!(fs::read_link(volume.join(DATA)).unwrap(), before);
    write(volume, &payload(&[("a", "3"), ("c", "4")]), Ownership::default()).unwrap();
    assert_eq!(visible(volume), BTreeMap::from([("a".into(), "3".into()), ("c".into(), "4".into())]));
    assert_eq!(generations(volume), 1);
}

#[test]
fn a_crash_between_any_two_steps_shows_old_or_new_and_is_mended() {
    let old = payload(&[("a", "old"), ("gone", "old"), ("d/x", "old")]);
    let new = payload(&[("a", "new"), ("fresh", "new"), ("d/x", "new")]);
    let template = tempfile::tempdir().unwrap();
    write(template.path(), &old, Ownership::default()).unwrap();
    let steps = plan(template.path(), &new, Ownership::default(), now()).unwrap().len();
    assert!(steps > 8);
    for crash in 0..=steps {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path();
        write(volume, &old, Ownership::default()).unwrap();
        for action in &plan(volume, &new, Ownership::default(), now()).unwrap()[..crash] {
            apply(volume, action).unwrap();
        }
        let seen = visible(volume);
        assert_eq!(seen["a"], seen["d/x"], "after {crash} steps");
        // The same instant again: names left behind must not be in the way.
        for action in plan(volume, &new, Ownership::default(), now()).unwrap() {
            apply(volume, &action).unwrap();
        }
        let expected: BTreeMap<String, String> =
            ["a", "fresh", "d/x"].map(|name| (name.to_owned(), "new".to_owned())).into();
        assert_eq!(visible(volume), expected, "after {crash} steps");
        assert_eq!(generations(volume), 1, "after {crash} steps");
        assert!(!volume.join(DATA_NEW).exists());
    }
}

#[test]
fn a_group_may_read_what_it_is_given() {
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path();
    let ownership = Ownership { fs_group: Some(4321), user: None };
    let mut files = Payload::default();
    files.add("token", b"t".to_vec(), 0o600, Some(1234)).unwrap();
    write(volume, &files, ownership).unwrap();
    let file = fs::metadata(volume.join("token")).unwrap();
    assert_eq!((file.uid(), file.gid(), file.mode() & 0o7777), (1234, 4321, 0o640));
    let dir = fs::metadata(volume.join(DATA)).unwrap();
    assert_eq!((dir.gid(), dir.mode() & 0o7777), (4321, 0o2755));
    assert!(plan(volume, &files, ownership, now()).unwrap().is_empty());
    let mut wider = Payload::default();
    wider.add("token", b"t".to_vec(), 0o644, Some(1234)).unwrap();
    assert!(!plan(volume, &wider, ownership, now()).unwrap().is_empty());
}

#[test]
fn what_is_not_ours_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("nested-mount")).unwrap();
    write(dir.path(), &payload(&[("a", "1")]), Ownership::default()).unwrap();
    write(dir.path(), &payload(&[("b", "1")]), Ownership::default()).unwrap();
    assert!(dir.path().join("nested-mount").is_dir());
}
