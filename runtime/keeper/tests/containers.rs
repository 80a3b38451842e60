//! Real containers under a real keeper.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Node, Options, eventually, exec_request, no_streams, read_to_end, wait_exit};
use orlop_keeper::client::{ExecStreams, KeeperError};
use orlop_keeper::protocol::{Event, Phase};
use std::fs;
use std::io::Write;
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread")]
async fn a_container_lives_and_its_exit_is_kept_until_acknowledged() {
    let (node, keeper) = Node::start().await;
    let mut events = keeper.events();
    let request = node.request("c", "echo out; echo err >&2; printf rest; exit 7", &Options::default());
    let created = keeper.create(request).await.unwrap();
    assert_eq!((created.phase, created.started_at), (Phase::Created, 0));
    let started = keeper.start("c").await.unwrap();
    assert_eq!(started.phase, Phase::Running);
    assert!(started.started_at >= started.created_at);
    let exit = wait_exit(&mut events, "c").await;
    assert_eq!((exit.code, exit.oom_killed), (7, false));
    assert!(exit.finished_at >= started.started_at);
    assert_eq!(node.output("c", "stdout"), "out\nrest");
    assert_eq!(node.output("c", "stderr"), "err\n");

    // A new connection hears of it again, and after the acknowledgement no more.
    let second = node.connect().await;
    assert_eq!(wait_exit(&mut second.events(), "c").await, exit);
    second.acknowledge("c").await.unwrap();
    let third = node.connect().await;
    let mut quiet = third.events();
    let listed = third.list().await.unwrap();
    assert_eq!(listed[0].exit.as_ref(), Some(&exit));
    assert_eq!((listed[0].phase, listed[0].pid), (Phase::Exited, 0));
    assert!(quiet.try_recv().is_err(), "an acknowledged exit came again");

    keeper.delete("c").await.unwrap();
    keeper.delete("c").await.unwrap();
    node.assert_gone("c", created.pid);
    assert!(matches!(keeper.start("c").await, Err(KeeperError::NoSuchContainer(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_a_container_with_its_number() {
    let (node, keeper) = Node::start().await;
    let mut events = keeper.events();
    node.run(&keeper, "c", "exec busybox sleep 1000", &Options::default()).await;
    keeper.kill("c", 9, false).await.unwrap();
    assert_eq!(wait_exit(&mut events, "c").await.code, 137);
    keeper.kill("c", 15, true).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_a_running_container_kills_it() {
    let (node, keeper) = Node::start().await;
    let view = node.run(&keeper, "c", "busybox sleep 1000 & wait", &Options::default()).await;
    keeper.delete("c").await.unwrap();
    node.assert_gone("c", view.pid);
    assert!(keeper.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_fails_says_why_and_leaves_nothing() {
    let (node, keeper) = Node::start().await;
    let mut request = node.request("c", "true", &Options::default());
    request.rootfs.as_mut().unwrap().lower = vec![node.dir.path().join("no-such-layer")];
    let Err(KeeperError::Refused(reason)) = keeper.create(request).await else { panic!("created") };
    assert!(!reason.is_empty());
    assert!(!node.state().join("c").exists());
    assert!(!node.cgroup_dir("c").exists());
    assert!(!node.log_dir("c").join("0.log").exists());
    let mut request = node.request("c", "true", &Options::default());
    request.id = "../c".to_owned();
    assert!(matches!(keeper.create(request).await, Err(KeeperError::Refused(_))));
    // The name is free again.
    let mut events = keeper.events();
    node.run(&keeper, "c", "exit 0", &Options::default()).await;
    assert_eq!(wait_exit(&mut events, "c").await.code, 0);
    assert!(keeper.create(node.request("c", "true", &Options::default())).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_is_not_held_up_by_descendants_that_keep_the_streams() {
    let (node, keeper) = Node::start().await;
    let mut events = keeper.events();
    let options = Options { share_pids: true, ..Options::default() };
    node.run(&keeper, "c", "(busybox sleep 1; echo late; busybox sleep 1000) & echo early; exit 3", &options)
        .await;
    assert_eq!(wait_exit(&mut events, "c").await.code, 3);
    assert_eq!(node.output("c", "stdout"), "early\n");
    eventually("output after the exit", || node.output("c", "stdout") == "early\nlate\n").await;
    keeper.delete("c").await.unwrap();
    assert!(!node.cgroup_dir("c").exists(), "the descendant is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminals_output_is_logged_without_carriage_returns() {
    let (node, keeper) = Node::start().await;
    let mut events = keeper.events();
    let options = Options { tty: true, stdin: true, ..Options::default() };
    node.run(&keeper, "c", "busybox tty; read line; echo got $line", &options).await;
    let attached = keeper.attach("c").await.unwrap();
    assert!(attached.stderr.is_none() && attached.console.is_some());
    rustix::io::write(attached.stdin.as_ref().unwrap(), b"hello\n").unwrap();
    assert_eq!(wait_exit(&mut events, "c").await.code, 0);
    assert!(read_to_end(attached.stdout).await.contains("got hello\r\n"));
    let output = node.output("c", "stdout");
    assert!(output.contains("/dev/pts/0\n") && output.ends_with("got hello\n"), "{output:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attached_client_gets_copies_and_ends_the_input_when_it_goes() {
    let (node, keeper) = Node::start().await;
    let mut events = keeper.events();
    let options = Options { stdin: true, stdin_once: true, ..Options::default() };
    node.run(&keeper, "c", "busybox cat; echo end >&2", &options).await;
    let first = keeper.attach("c").await.unwrap();
    let second = keeper.attach("c").await.unwrap();
    assert!(second.stdin.is_none(), "the input was given out twice");
    rustix::io::write(first.stdin.as_ref().unwrap(), b"one\ntwo\n").unwrap();
    drop(first.stdin);
    assert_eq!(wait_exit(&mut events, "c").await.code, 0);
    assert_eq!(read_to_end(first.stdout).await, "one\ntwo\n");
    assert_eq!(read_to_end(second.stdout).await, "one\ntwo\n");
    assert_eq!(read_to_end(second.stderr.unwrap()).await, "end\n");
    assert_eq!(node.output("c", "stdout"), "one\ntwo\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn input_stays_open_for_the_next_client() {
    let (node, keeper) = Node::start().await;
    let mut events = keeper.events();
    let options = Options { stdin: true, ..Options::default() };
    node.run(&keeper, "c", "read a; read b; echo $a $b", &options).await;
    for word in [b"one\n", b"two\n"] {
        let attached = keeper.attach("c").await.unwrap();
        rustix::io::write(attached.stdin.as_ref().unwrap(), word).unwrap();
    }
    assert_eq!(wait_exit(&mut events, "c").await.code, 0);
    assert_eq!(node.output("c", "stdout"), "one two\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attached_client_that_does_not_read_is_dropped_and_the_log_is_whole() {
    let (node, keeper) = Node::start().await;
    let mut events = keeper.events();
    let script = "read go; i=0; while [ $i -lt 40000 ]; do echo line $i of many many many many letters; i=$((i+1)); done";
    let options = Options { stdin: true, ..Options::default() };
    node.run(&keeper, "c", script, &options).await;
    let attached = keeper.attach("c").await.unwrap();
    rustix::io::write(attached.stdin.as_ref().unwrap(), b"go\n").unwrap();
    assert_eq!(wait_exit(&mut events, "c").await.code, 0);
    let expected: String = (0..40000).map(|i| format!("line {i} of many many many many letters\n")).collect();
    assert_eq!(node.output("c", "stdout"), expected);
    let copy = read_to_end(attached.stdout).await;
    assert!(copy.len() < expected.len() && expected.starts_with(&copy), "a copy with a hole");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_costs_output_and_nothing_else() {
    let (node, keeper) = Node::start().await;
    let mut events = keeper.events();
    // A file system of 64 KiB that only the keeper's mount namespace has.
    let inside = node.dir.path().join("small/0.log");
    let outside = std::path::PathBuf::from(format!("/proc/{}/root{}", node.keeper_pid(), inside.display()));
    let options = Options { log: Some(inside), stdin: true, ..Options::default() };
    let script = "i=0; while [ $i -lt 5000 ]; do echo line $i of many many letters; i=$((i+1)); done; read go; echo again";
    node.run(&keeper, "c", script, &options).await;
    let attached = keeper.attach("c").await.unwrap();
    eventually("a full disk", || fs::metadata(&outside).is_ok_and(|m| m.len() > 60_000)).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let text = fs::read_to_string(&outside).unwrap();
    assert!(text.ends_with('\n'), "a torn record");
    fs::rename(&outside, outside.with_extension("old")).unwrap();
    fs::remove_file(outside.with_extension("old")).unwrap();
    keeper.reopen_log("c").await.unwrap();
    rustix::io::write(attached.stdin.as_ref().unwrap(), b"go\n").unwrap();
    assert_eq!(wait_exit(&mut events, "c").await.code, 0);
    let text = fs::read_to_string(&outside).unwrap();
    assert!(text.contains("bytes of output were lost") && text.ends_with("stdout F again\n"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_has_the_streams_it_was_given() {
    let (node, keeper) = Node::start().await;
    node.run(&keeper, "c", "exec busybox sleep 1000", &Options::default()).await;
    let (stdin, mut input) = std::io::pipe().unwrap();
    let (output, stdout) = std::io::pipe().unwrap();
    let (errors, stderr) = std::io::pipe().unwrap();
    let streams =
        ExecStreams { stdin: Some(stdin.into()), stdout: Some(stdout.into()), stderr: Some(stderr.into()) };
    let request = exec_request("c", "e", "busybox cat; echo err >&2; exit 5", false);
    let started = keeper.exec(request, streams).await.unwrap();
    assert!(started.pid > 0 && started.console.is_none());
    input.write_all(b"through").unwrap();
    drop(input);
    let exit = keeper.wait_exec("c", "e").await.unwrap();
    assert_eq!(exit.code, 5);
    assert_eq!(read_to_end(output.into()).await, "through");
    assert_eq!(read_to_end(errors.into()).await, "err\n");
    // Acknowledged, so forgotten; and its cgroup is gone.
    assert!(keeper.wait_exec("c", "e").await.is_err());
    let left = fs::read_dir(node.cgroup_dir("c")).unwrap().flatten();
    assert_eq!(left.filter(|e| e.file_type().unwrap().is_dir()).count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_with_a_terminal_hands_out_its_master() {
    let (node, keeper) = Node::start().await;
    node.run(&keeper, "c", "exec busybox sleep 1000", &Options::default()).await;
    let request = exec_request("c", "e", "busybox tty && read x && echo got $x", true);
    let started = keeper.exec(request, no_streams()).await.unwrap();
    let console = started.console.unwrap();
    rustix::io::write(&console, b"word\n").unwrap();
    let output = read_to_end(console).await;
    assert!(output.contains("/dev/pts/") && output.contains("got word"), "{output:?}");
    assert_eq!(keeper.wait_exec("c", "e").await.unwrap().code, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_of_a_missing_program_says_so() {
    let (node, keeper) = Node::start().await;
    node.run(&keeper, "c", "exec busybox sleep 1000", &Options::default()).await;
    let mut request = exec_request("c", "e", "", false);
    request.process.set_args(Some(vec!["/no/such/program".to_owned()]));
    let Err(KeeperError::Refused(reason)) = keeper.exec(request, no_streams()).await else {
        panic!("started")
    };
    assert!(reason.contains("/no/such/program"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_an_exec_reaches_what_it_has_detached() {
    let (node, keeper) = Node::start().await;
    node.run(&keeper, "c", "exec busybox sleep 1000", &Options::default()).await;
    let (output, stdout) = std::io::pipe().unwrap();
    let streams = ExecStreams { stdin: None, stdout: Some(stdout.into()), stderr: None };
    let script = "busybox setsid busybox sleep 2000 & busybox sleep 3000";
    keeper.exec(exec_request("c", "e", script, false), streams).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    keeper.kill_exec("c", "e", 9).await.unwrap();
    assert_eq!(keeper.wait_exec("c", "e").await.unwrap().code, 137);
    // The pipe ends only when the last of them is dead.
    assert_eq!(read_to_end(output.into()).await, "");
    let listed = keeper.list().await.unwrap();
    assert_eq!(listed[0].phase, Phase::Running, "the container died with its exec");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_noisy_container_does_not_hold_up_the_others() {
    let (node, keeper) = Node::start().await;
    let options = Options { max_bytes: 1 << 20, max_files: 2, ..Options::default() };
    node.run(&keeper, "noisy", "exec busybox yes", &options).await;
    let mut events = keeper.events();
    let began = Instant::now();
    node.run(&keeper, "quiet", "echo hello", &Options::default()).await;
    assert_eq!(wait_exit(&mut events, "quiet").await.code, 0);
    assert!(began.elapsed() < Duration::from_secs(5), "took {:?}", began.elapsed());
    assert_eq!(node.output("quiet", "stdout"), "hello\n");
    for path in node.log_files("noisy") {
        // A file may have been removed by a rotation in between.
        assert!(fs::metadata(&path).map_or(0, |m| m.len()) <= 1 << 20);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_that_ends_is_announced() {
    let (node, keeper) = Node::start().await;
    let mut events = keeper.events();
    node.run(&keeper, "c", "exec busybox sleep 1000", &Options::default()).await;
    keeper.exec(exec_request("c", "e", "exit 4", false), no_streams()).await.unwrap();
    let event = tokio::time::timeout(common::PATIENCE, events.recv()).await.unwrap().unwrap();
    let Event::ExecExited { container, exec_id, exit } = event else { panic!("{event:?}") };
    assert_eq!((container.as_str(), exec_id.as_str(), exit.code), ("c", "e", 4));
}
