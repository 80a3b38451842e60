//! The service manager's part is played by the test: it keeps the descriptors while the keeper is dead. Alone in its
//! program, because it lets descriptors through to every process started.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Node, Options, eventually, wait_exit};
use orlop_keeper::protocol::Phase;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix, SocketType,
};
use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};

/// Reads what the keeper has told its manager so far.
fn take_messages(manager: &OwnedFd, stored: &mut BTreeMap<String, OwnedFd>) -> bool {
    let mut ready = false;
    loop {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let Ok(message) = rustix::net::recvmsg(manager, &mut slices, &mut ancillary, flags) else {
            return ready;
        };
        let fd = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let text = String::from_utf8(bytes[..message.bytes].to_vec()).unwrap();
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or_default().to_owned();
        ready |= text.contains("READY=1");
        if text.contains("FDSTORE=1") {
            stored.insert(name, fd.unwrap());
        } else if text.contains("FDSTOREREMOVE=1") {
            stored.remove(&name);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_manager_keeps_brings_back_every_byte_and_the_exit() {
    let mut node = Node::prepare();
    let path = node.dir.path().join("notify");
    let manager = rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None).unwrap();
    rustix::net::bind(&manager, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    node.before = format!("export NOTIFY_SOCKET={};", path.display());
    node.spawn_keeper();
    let keeper = node.connect().await;
    let mut events = keeper.events();
    let options = Options { stdin: true, ..Options::default() };
    let script = "echo before; read x; echo while dead $x; echo err >&2; exit 13";
    node.run(&keeper, "c.1", script, &options).await;
    eventually("the first line", || node.output("c.1", "stdout") == "before\n").await;
    let attached = keeper.attach("c.1").await.unwrap();

    let mut stored = BTreeMap::new();
    assert!(take_messages(&manager, &mut stored), "the keeper never said that it is ready");
    let names: Vec<&str> = stored.keys().map(String::as_str).collect();
    assert_eq!(names, ["c.1.pidfd", "c.1.stderr", "c.1.stdin", "c.1.stdout"]);

    // The container writes and ends while there is no keeper.
    node.crash();
    rustix::io::write(attached.stdin.as_ref().unwrap(), b"it\n").unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;

    let mut names = Vec::new();
    let mut passed = Vec::new();
    for (slot, (name, fd)) in stored.iter().enumerate() {
        let copy = rustix::io::fcntl_dupfd_cloexec(fd, 20).unwrap();
        rustix::io::fcntl_setfd(&copy, rustix::io::FdFlags::empty()).unwrap();
        let number = copy.as_raw_fd();
        node.before.push_str(&format!("exec {}<&{number} {number}<&-;", slot + 3));
        names.push(name.as_str());
        passed.push(copy);
    }
    let environment =
        format!("export LISTEN_FDS={} LISTEN_FDNAMES={} LISTEN_PID=$$;", names.len(), names.join(":"));
    node.before.push_str(&environment);
    node.spawn_keeper();
    drop(passed);
    node.before.clear();
    let exit = wait_exit(&mut events, "c.1").await;
    assert!(exit.code == 13 || exit.code == 255, "{}", exit.code);
    assert_eq!(node.output("c.1", "stdout"), "before\nwhile dead it\n");
    assert_eq!(node.output("c.1", "stderr"), "err\n");
    assert_eq!(keeper.list().await.unwrap()[0].phase, Phase::Exited);
    keeper.delete("c.1").await.unwrap();
    take_messages(&manager, &mut stored);
    assert!(stored.is_empty(), "the manager still keeps {:?}", stored.keys());
    println!("exit code after adoption: {}", exit.code);
}
