//! Nothing is lost when the client, the keeper's program or the keeper itself goes.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Node, Options, eventually, exec_request, no_streams, output_of, wait_exit};
use orlop_keeper::protocol::Phase;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketType};
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

const LINES: u32 = 100_000;

fn count_to(lines: u32) -> String {
    format!("i=0; while [ $i -lt {lines} ]; do echo $i; i=$((i+1)); done; exit 9")
}

fn numbers(lines: u32) -> String {
    (0..lines).map(|n| format!("{n}\n")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_line_and_no_exit_is_lost_over_lost_clients_and_new_programs() {
    let (node, keeper) = Node::start().await;
    let options = Options { max_bytes: 100_000, max_files: 10_000, ..Options::default() };
    node.run(&keeper, "c", &count_to(LINES), &options).await;
    drop(keeper);
    let keeper = node.connect().await;
    let mut events = keeper.events();
    let mut replaced = 0;
    while keeper.list().await.unwrap()[0].phase == Phase::Running {
        node.signal("-HUP");
        keeper.reexec(None).await.unwrap();
        replaced += 1;
        drop(node.connect().await);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    assert!(replaced > 3, "the container was too quick: {replaced}");
    assert_eq!(wait_exit(&mut events, "c").await.code, 9);
    let files = node.log_files("c");
    for path in &files {
        let size = fs::metadata(path).unwrap().len();
        assert!(size <= 100_000, "{} has {size} bytes", path.display());
    }
    assert!(files.len() > 10, "only {} files", files.len());
    assert!(output_of(&files, "stdout") == numbers(LINES), "lines are lost or out of order");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_program_keeps_streams_execs_and_waiting_clients() {
    let (node, keeper) = Node::start().await;
    let mut events = keeper.events();
    let options = Options { stdin: true, ..Options::default() };
    let view = node.run(&keeper, "c", "printf 'no newline'; read x; echo got $x", &options).await;
    let attached = keeper.attach("c").await.unwrap();
    keeper.exec(exec_request("c", "e", "busybox sleep 1; exit 6", false), no_streams()).await.unwrap();
    let waiting = keeper.clone();
    let exec = tokio::spawn(async move { waiting.wait_exec("c", "e").await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", node.keeper_pid())).unwrap().count();
    keeper.reexec(None).await.unwrap();
    let after_one = descriptors();
    for _ in 0..5 {
        keeper.reexec(None).await.unwrap();
    }
    assert_eq!(descriptors(), after_one, "a re-exec leaks descriptors");
    assert_eq!(keeper.list().await.unwrap()[0].pid, view.pid);
    assert_eq!(exec.await.unwrap().unwrap().code, 6);
    rustix::io::write(attached.stdin.as_ref().unwrap(), b"it\n").unwrap();
    assert_eq!(wait_exit(&mut events, "c").await.code, 0);
    assert_eq!(node.output("c", "stdout"), "no newlinegot it\n");
    assert!(common::read_to_end(attached.stdout).await.ends_with("got it\n"));
    keeper.delete("c").await.unwrap();
    node.assert_gone("c", view.pid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_cannot_be_executed_changes_nothing() {
    let (node, keeper) = Node::start().await;
    let mut events = keeper.events();
    node.run(&keeper, "c", "busybox sleep 1; echo still here", &Options::default()).await;
    let error = keeper.reexec(Some(Path::new("/no/such/keeper"))).await.unwrap_err().to_string();
    assert!(error.contains("/no/such/keeper"), "{error}");
    assert_eq!(wait_exit(&mut events, "c").await.code, 0);
    assert_eq!(node.output("c", "stdout"), "still here\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_after_a_crash_finds_its_containers() {
    let (mut node, keeper) = Node::start().await;
    let mut events = keeper.events();
    node.run(&keeper, "ended", "exit 11", &Options::default()).await;
    assert_eq!(wait_exit(&mut events, "ended").await.code, 11);
    let options = Options { stdin: true, ..Options::default() };
    let script = "trap '' PIPE; echo before; busybox sleep 3; echo after; exit 12";
    let view = node.run(&keeper, "running", script, &options).await;
    eventually("the first line", || node.output("running", "stdout") == "before\n").await;
    node.crash();
    node.spawn_keeper();
    // The same client comes back by itself, and unacknowledged exits come again.
    assert_eq!(wait_exit(&mut events, "ended").await.code, 11);
    let listed = keeper.list().await.unwrap();
    let running = listed.iter().find(|c| c.id == "running").unwrap();
    assert_eq!((running.phase, running.pid), (Phase::Running, view.pid));
    let code = wait_exit(&mut events, "running").await.code;
    // Linux 6.15 tells how a process ended that was not our child; before, nobody can know.
    assert!(code == 12 || code == 255, "{code}");
    assert_eq!(node.output("running", "stdout"), "before\nafter\n");
    keeper.delete("running").await.unwrap();
    keeper.delete("ended").await.unwrap();
    node.assert_gone("running", view.pid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_keeper_that_is_told_to_end_leaves_containers_and_a_purge_does_not() {
    let (mut node, keeper) = Node::start().await;
    let view = node.run(&keeper, "c", "exec busybox sleep 1000", &Options::default()).await;
    drop(keeper);
    node.terminate();
    assert!(Path::new(&format!("/proc/{}", view.pid)).exists(), "the container went with the keeper");
    assert!(!node.socket().exists());
    assert!(node.purge());
    eventually("the end of the container", || !Path::new(&format!("/proc/{}", view.pid)).exists()).await;
    assert!(!node.state().exists() && !node.cgroup_dir("c").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_keeper_of_the_same_state_is_refused_and_so_is_a_purge() {
    let (node, keeper) = Node::start().await;
    assert!(!node.purge());
    assert!(keeper.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_messages_are_answered_and_the_keeper_goes_on() {
    let (node, keeper) = Node::start().await;
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(node.socket()).unwrap()).unwrap();
    for garbage in [&b"\0\xff\xfe"[..], b"{", b"@", br#"{"id":5,"call":{"fly":{}}}"#, &[b'['; 5000]] {
        rustix::net::send(&socket, garbage, SendFlags::empty()).unwrap();
        let mut buffer = [0; 4096];
        let count = rustix::io::read(socket.as_fd(), &mut buffer).unwrap();
        let answer = String::from_utf8(buffer[..count].to_vec()).unwrap();
        assert!(answer.contains("malformed"), "{answer}");
    }
    assert!(keeper.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_keeper_is_replaced_without_its_clients_noticing() {
    let (node, keeper) = Node::start().await;
    let pid = node.keeper_pid();
    for _ in 0..3 {
        keeper.reexec(None).await.unwrap();
        node.signal("-HUP");
        assert!(keeper.list().await.unwrap().is_empty());
    }
    assert_eq!(node.keeper_pid(), pid);
    let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
    assert_eq!(command.matches("--restore-fd").count(), 1, "{command:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_holds_up_nobody() {
    let (node, keeper) = Node::start().await;
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(node.socket()).unwrap()).unwrap();
    // Requests whose answers pile up, until the keeper takes no more from us or cuts us off.
    for _ in 0..200_000 {
        if rustix::net::send(&socket, br#"{"id":1,"call":"list"}"#, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            .is_err()
        {
            tokio::time::sleep(Duration::from_millis(1)).await;
            if rustix::net::send(
                &socket,
                br#"{"id":1,"call":"list"}"#,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) == Err(rustix::io::Errno::PIPE)
            {
                break;
            }
        }
    }
    assert!(keeper.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_keeper_itself_stays_small() {
    let (node, keeper) = Node::start().await;
    node.run(&keeper, "c", "exec busybox sleep 1000", &Options::default()).await;
    let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", node.keeper_pid())).unwrap();
    let private: u64 = rollup
        .lines()
        .filter(|line| line.starts_with("Private_Dirty"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum();
    assert!(private < 2048, "{private} KiB of its own");
}
