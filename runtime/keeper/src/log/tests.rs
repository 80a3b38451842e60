use super::*;
use proptest::prelude::*;
use std::path::Path;

const NOW: i64 = 1_795_255_200_123_456_789;

fn target(dir: &Path, max_bytes: u64, max_files: u32) -> LogTarget {
    LogTarget { path: dir.join("pod/c/0.log"), max_bytes, max_files }
}

/// All files of a log, oldest first, as (name, content).
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found: Vec<(String, Vec<u8>)> = std::fs::read_dir(dir.join("pod/c"))
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        })
        .collect();
    found.sort_by_key(|(name, _)| {
        let mut parts = name.splitn(4, '.').skip(2);
        let time = parts.next().unwrap_or("99999999-999999").to_owned();
        (time, parts.next().map_or(0, |n| n.parse::<u32>().unwrap()))
    });
    found
}

/// Puts a stream together again from the records of all files.
fn content(dir: &Path, stream: &str) -> Vec<u8> {
    let mut out = Vec::new();
    for (_, bytes) in files(dir) {
        assert!(bytes.is_empty() || bytes.ends_with(b"\n"), "a record is torn");
        for record in bytes.split_inclusive(|&b| b == b'\n') {
            let mut parts = record.splitn(4, |&b| b == b' ');
            assert_eq!(parts.next().unwrap().len(), 30);
            if parts.next().unwrap() != stream.as_bytes() {
                continue;
            }
            let tag = parts.next().unwrap();
            let rest = parts.next().unwrap();
            out.extend_from_slice(if tag == b"F" { rest } else { &rest[..rest.len() - 1] });
        }
    }
    out
}

#[test]
fn records_look_as_the_cri_says() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = ContainerLog::open(&target(dir.path(), 0, 5), false).unwrap();
    log.append(StreamName::Stdout, b"line\nhalf", NOW);
    log.append(StreamName::Stderr, b"oops\n", NOW);
    log.flush(StreamName::Stdout, NOW);
    let expected = "2026-11-21T10:00:00.123456789Z stdout F line\n\
                    2026-11-21T10:00:00.123456789Z stderr F oops\n\
                    2026-11-21T10:00:00.123456789Z stdout P half\n";
    assert_eq!(std::fs::read_to_string(dir.path().join("pod/c/0.log")).unwrap(), expected);
}

#[test]
fn the_current_file_and_the_newest_others_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = ContainerLog::open(&target(dir.path(), 300, 3), false).unwrap();
    for number in 0..200 {
        log.append(StreamName::Stdout, format!("{number:04}\n").as_bytes(), NOW);
    }
    let found = files(dir.path());
    assert_eq!(found.len(), 3, "{found:?}");
    let kept = String::from_utf8(content(dir.path(), "stdout")).unwrap();
    assert!(kept.ends_with("0199\n"));
    let numbers: Vec<u32> = kept.lines().map(|l| l.parse().unwrap()).collect();
    assert!(numbers.windows(2).all(|w| w[1] == w[0] + 1), "a gap in {numbers:?}");
}

#[test]
fn a_clock_that_steps_back_does_not_disturb_the_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = ContainerLog::open(&target(dir.path(), 256, 1000), false).unwrap();
    for number in 0..100_i64 {
        log.append(StreamName::Stdout, format!("{number:04}\n").as_bytes(), NOW - number * 1_000_000_000);
    }
    let expected: String = (0..100).map(|n| format!("{n:04}\n")).collect();
    assert_eq!(String::from_utf8(content(dir.path(), "stdout")).unwrap(), expected);
}

#[test]
fn reopening_goes_on_in_a_new_file() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = ContainerLog::open(&target(dir.path(), 0, 5), false).unwrap();
    log.append(StreamName::Stdout, b"before\n", NOW);
    let path = dir.path().join("pod/c/0.log");
    std::fs::rename(&path, dir.path().join("pod/c/0.log.20260101-000000")).unwrap();
    log.append(StreamName::Stdout, b"between\n", NOW);
    log.reopen().unwrap();
    log.append(StreamName::Stdout, b"after\n", NOW);
    assert!(std::fs::read_to_string(&path).unwrap().ends_with("F after\n"));
    assert_eq!(content(dir.path(), "stdout"), b"before\nbetween\nafter\n");
}

#[test]
fn a_restored_log_goes_on_in_the_middle_of_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let target = target(dir.path(), 0, 5);
    let mut log = ContainerLog::open(&target, false).unwrap();
    log.append(StreamName::Stdout, b"one\ntw", NOW);
    let state = log.state();
    let descriptor = log.file().descriptor().unwrap().try_clone_to_owned().unwrap();
    drop(log);
    let file = LogFile::restore(&target, Some(descriptor), state.file);
    let mut log = ContainerLog::restore(file, false, state);
    log.append(StreamName::Stdout, b"o\n", NOW);
    assert_eq!(content(dir.path(), "stdout"), b"one\ntwo\n");
}

#[test]
fn a_file_whose_disk_is_full_counts_what_it_loses() {
    // Every write to this device fails with ENOSPC.
    let full = LogTarget { path: "/dev/full".into(), max_bytes: 0, max_files: 2 };
    let mut log = ContainerLog::open(&full, false).unwrap();
    log.append(StreamName::Stdout, b"12345\n123\n", NOW);
    log.append(StreamName::Stdout, b"12\n", NOW);
    assert_eq!(log.file().state().dropped, 10);
    let dir = tempfile::tempdir().unwrap();
    let target = target(dir.path(), 0, 2);
    let file = LogFile::restore(&target, None, log.file().state());
    let mut log = ContainerLog::restore(file, false, LogState::default());
    log.append(StreamName::Stdout, b"again\n", NOW);
    let text = std::fs::read_to_string(&target.path).unwrap();
    assert!(text.contains("stderr F orlop-keeper: 10 bytes of output were lost"), "{text}");
    assert!(text.ends_with("stdout F again\n"), "{text}");
    assert_eq!(log.file().state().dropped, 0);
}

#[test]
fn a_log_without_a_file_name_is_refused() {
    let nowhere = LogTarget { path: "/".into(), max_bytes: 0, max_files: 2 };
    assert!(matches!(LogFile::open(&nowhere), Err(LogFileError::NoFileName(_))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_file_exceeds_its_bound_and_nothing_is_lost(
        chunks in proptest::collection::vec(
            (any::<bool>(), proptest::collection::vec(prop_oneof![1 => Just(b'\n'), 9 => any::<u8>()], 0..900)),
            1..20),
        max_bytes in 256_u64..2000,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut log = ContainerLog::open(&target(dir.path(), max_bytes, 100_000), false).unwrap();
        let mut expected = [Vec::new(), Vec::new()];
        for (err, chunk) in &chunks {
            let stream = if *err { StreamName::Stderr } else { StreamName::Stdout };
            log.append(stream, chunk, NOW);
            expected[usize::from(*err)].extend_from_slice(chunk);
        }
        log.flush(StreamName::Stdout, NOW);
        log.flush(StreamName::Stderr, NOW);
        for (name, bytes) in files(dir.path()) {
            prop_assert!(bytes.len() as u64 <= max_bytes, "{} has {} bytes of {}", name, bytes.len(), max_bytes);
        }
        prop_assert_eq!(content(dir.path(), "stdout"), expected[0].clone());
        prop_assert_eq!(content(dir.path(), "stderr"), expected[1].clone());
    }
}
