//! Real containers through the command line.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic")]

mod lab;

use lab::{Lab, taken};
use serde_json::json;
use std::fs;
use std::os::unix::fs::symlink;

#[test]
fn run_returns_the_programs_output_and_exit_code_and_leaves_nothing() {
    let lab = Lab::new("echo $$ $(cat /proc/sys/kernel/hostname); exit 7");
    let (code, out, err) = lab.run();
    assert_eq!((code, out.as_str()), (7, "1 testbox\n"), "{err}");
    lab.assert_no_trace();
}

#[test]
fn a_container_lives_through_create_start_kill_and_delete() {
    let lab = Lab::new("exec sleep 600");
    assert_eq!(lab.create().0, 0);
    assert_eq!(lab.status(), "created");
    let (code, log) = lab.create();
    assert_eq!(code, 1);
    assert!(log.contains("container with given ID already exists"), "{log}");
    assert_eq!(lab.oci(&["start", "x"]).status.code(), Some(0));
    assert_eq!(lab.status(), "running");
    let (code, _, err) = taken(&lab.oci(&["start", "x"]));
    assert!(code == 1 && err.contains("cannot start a container that is running"), "{err}");
    let (code, _, err) = taken(&lab.oci(&["delete", "x"]));
    assert!(code == 1 && err.contains("that is not stopped: running"), "{err}");
    assert_eq!(lab.oci(&["kill", "x", "KILL"]).status.code(), Some(0));
    Lab::eventually("stopped", || lab.status() == "stopped");
    let (code, _, err) = taken(&lab.oci(&["kill", "x", "KILL"]));
    assert!(code == 1 && err.contains("container not running"), "{err}");
    assert_eq!(lab.oci(&["delete", "x"]).status.code(), Some(0));
    let (code, _, err) = taken(&lab.oci(&["state", "x"]));
    assert!(code == 1 && err.contains("does not exist"), "{err}");
    assert_eq!(lab.oci(&["delete", "--force", "x"]).status.code(), Some(0));
    lab.assert_no_trace();
}

#[test]
fn exec_joins_the_container_and_returns_its_own_code() {
    let lab = Lab::new("exec sleep 600");
    assert_eq!(lab.create().0, 0);
    assert_eq!(lab.oci(&["start", "x"]).status.code(), Some(0));
    let (code, out, err) = taken(&lab.oci(&[
        "exec",
        "-e",
        "A=b",
        "x",
        "sh",
        "-c",
        "echo $A $(cat /proc/1/comm /proc/sys/kernel/hostname); exit 3",
    ]));
    assert_eq!((code, out.as_str()), (3, "b sleep testbox\n"), "{err}");
    let (_, members, _) = taken(&lab.oci(&["exec", "x", "grep", "-c", "0::/", "/proc/self/cgroup"]));
    assert_eq!(members.trim(), "1");
    let (code, _, err) = taken(&lab.oci(&["exec", "x", "nope"]));
    assert!(code == 255 && err.contains("executable file not found in $PATH"), "{err}");
    let (code, ..) = taken(&lab.oci(&["exec", "x", "sh", "-c", "kill -9 $$"]));
    assert_eq!(code, 137, "128 and the number of the signal");
    assert_eq!(lab.oci(&["pause", "x"]).status.code(), Some(0));
    assert_eq!(lab.status(), "paused");
    let (code, _, err) = taken(&lab.oci(&["exec", "x", "true"]));
    assert!(code == 255 && err.contains("cannot exec in a paused container"), "{err}");
    assert_eq!(lab.oci(&["resume", "x"]).status.code(), Some(0));
    assert_eq!(lab.status(), "running");
    assert_eq!(lab.oci(&["delete", "-f", "x"]).status.code(), Some(0));
    lab.assert_no_trace();
}

#[test]
fn hooks_run_in_their_order_with_the_state_on_standard_input() {
    let mut lab = Lab::new("echo program >> /shared/log");
    let shared = lab.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let log = shared.join("log");
    let outside = |name: &str| {
        let script = format!(
            "grep -o '\"status\":\"[a-z]*\"' | while read s; do echo {name} $s; done >> {}",
            log.display()
        );
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"], "timeout": 20}])
    };
    let inside = json!([{"path": "/bin/sh", "args": ["sh", "-c", "echo startContainer >> /shared/log"]}]);
    lab.config["hooks"] = json!({"prestart": outside("prestart"), "createRuntime": outside("createRuntime"),
        "createContainer": outside("createContainer"), "startContainer": inside,
        "poststart": outside("poststart"), "poststop": outside("poststop")});
    let mount = json!({"destination": "/shared", "source": shared, "options": ["bind"]});
    lab.config["mounts"].as_array_mut().unwrap().push(mount);
    assert_eq!(lab.create().0, 0);
    assert_eq!(lab.oci(&["start", "x"]).status.code(), Some(0));
    Lab::eventually("stopped", || lab.status() == "stopped");
    assert_eq!(lab.oci(&["delete", "x"]).status.code(), Some(0));
    let text = fs::read_to_string(&log).unwrap();
    let mut lines: Vec<&str> = text.lines().collect();
    // The program runs beside poststart.
    lines.retain(|line| *line != "program");
    assert_eq!(
        lines,
        [
            "prestart \"status\":\"creating\"",
            "createRuntime \"status\":\"creating\"",
            "createContainer \"status\":\"creating\"",
            "startContainer",
            "poststart \"status\":\"running\"",
            "poststop \"status\":\"stopped\"",
        ]
    );
    assert!(text.contains("program"));
    lab.assert_no_trace();
}

#[test]
fn a_create_that_fails_says_why_and_leaves_nothing() {
    type Change = fn(&mut serde_json::Value);
    let break_it: [(&str, Change, &str); 5] = [
        (
            "hook",
            |c| c["hooks"] = json!({"createRuntime": [{"path": "/bin/false"}]}),
            "error running createRuntime hook",
        ),
        ("program", |c| c["process"]["args"] = json!(["/no/such"]), r"no such file or directory"),
        (
            "mount",
            |c| {
                c["mounts"] =
                    json!([{"destination": "/x", "type": "bind", "source": "/no/such", "options": ["bind"]}])
            },
            "open the source",
        ),
        (
            "fs",
            |c| c["mounts"] = json!([{"destination": "/x", "type": "nosuchfs", "source": "y"}]),
            "nosuchfs",
        ),
        (
            "sysctl",
            |c| c["linux"]["sysctl"] = json!({"kernel.core_pattern": "x"}),
            "not in a separate kernel namespace",
        ),
    ];
    for (name, change, expected) in break_it {
        let mut lab = Lab::new("true");
        change(&mut lab.config);
        let (code, log) = lab.create();
        assert_eq!(code, 1, "{name}");
        let line: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
        assert_eq!(line["level"], "error");
        assert!(line["msg"].as_str().unwrap().contains(expected), "{name}: {log}");
        lab.assert_no_trace();
    }
}

#[test]
fn masked_paths_are_empty_and_readonly_paths_refuse_writing() {
    let mut lab = Lab::new(
        "cat /proc/keys; ls /tmp/secret; cat /etc/hidden; echo 1 > /proc/sys/kernel/domainname || echo refused",
    );
    fs::create_dir(lab.rootfs().join("tmp/secret")).unwrap();
    fs::write(lab.rootfs().join("tmp/secret/file"), "x").unwrap();
    fs::write(lab.rootfs().join("etc/hidden"), "hidden").unwrap();
    lab.config["linux"]["maskedPaths"] = json!(["/proc/keys", "/tmp/secret", "/etc/hidden", "/no/such"]);
    lab.config["linux"]["readonlyPaths"] = json!(["/proc/sys", "/no/such"]);
    let (code, out, err) = lab.run();
    assert_eq!((code, out.as_str()), (0, "refused\n"), "{err}");
}

#[test]
fn a_read_only_root_refuses_writing_and_tmpfs_below_it_does_not() {
    let mut lab =
        Lab::new("touch /x || echo ro; touch /scratch/x && echo rw; touch /sealed/x || echo sealed");
    lab.config["root"]["readonly"] = json!(true);
    let mounts = lab.config["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/scratch", "type": "tmpfs", "source": "tmpfs"}));
    mounts.push(json!({"destination": "/sealed", "type": "tmpfs", "source": "tmpfs", "options": ["ro"]}));
    assert_eq!(lab.run().1, "ro\nrw\nsealed\n");
}

#[test]
fn identity_and_capabilities_are_exactly_those_asked_for() {
    let mut lab = Lab::new("id -u; id -G; grep -E 'Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs' /proc/self/status");
    lab.config["process"]["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 7], "umask": 63});
    let caps = json!(["CAP_NET_BIND_SERVICE"]);
    lab.config["process"]["capabilities"] =
        json!({"bounding": caps, "effective": caps, "permitted": caps, "inheritable": caps, "ambient": caps});
    let (code, out, err) = lab.run();
    assert_eq!(code, 0, "{err}");
    let bit = "0000000000000400";
    let expected = format!(
        "1000\n1001 5 7\nCapInh:\t{bit}\nCapPrm:\t{bit}\nCapEff:\t{bit}\nCapBnd:\t{bit}\nCapAmb:\t{bit}\nNoNewPrivs:\t1\n"
    );
    assert_eq!(out, expected);
}

#[test]
fn seccomp_refuses_what_the_profile_does_not_allow_with_and_without_no_new_privs() {
    for no_new_privs in [true, false] {
        let mut lab = Lab::new(
            "mkdir /tmp/x || echo refused; grep Seccomp: /proc/self/status; grep CapPrm /proc/self/status",
        );
        lab.config["process"]["noNewPrivileges"] = json!(no_new_privs);
        lab.config["process"]["user"]["uid"] = json!(1000);
        lab.config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat", "accept4", "socket"], "action": "SCMP_ACT_ERRNO"}]});
        let (code, out, err) = lab.run();
        assert_eq!(code, 0, "{err}");
        assert_eq!(out, "refused\nSeccomp:\t2\nCapPrm:\t0000000000000000\n", "{no_new_privs} {err}");
    }
}

#[test]
fn links_of_the_image_cannot_move_a_mount_out_of_it() {
    let mut lab = Lab::new("ls /escape/made /escape/file");
    let outside = lab.path().join("outside");
    fs::create_dir(&outside).unwrap();
    symlink(&outside, lab.rootfs().join("escape")).unwrap();
    symlink("/proc/self/root", lab.rootfs().join("magic")).unwrap();
    fs::write(lab.path().join("payload"), "x").unwrap();
    let mounts = lab.config["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/escape/made", "type": "tmpfs", "source": "tmpfs"}));
    mounts.push(json!({"destination": "/escape/file", "source": "../payload", "options": ["bind"]}));
    let (code, out, err) = lab.run();
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("/escape/file"), "{out}");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "made outside of the image");

    let destination = json!({"destination": "/magic/tmp/x", "type": "tmpfs", "source": "tmpfs"});
    *lab.config["mounts"].as_array_mut().unwrap().last_mut().unwrap() = destination;
    let (code, _, err) = lab.run();
    assert_eq!(code, 1, "a magic link must not be followed: {err}");
    lab.assert_no_trace();
}

#[test]
fn a_dev_that_is_a_link_stays_inside_the_image() {
    let mut lab = Lab::new("true");
    let outside = lab.path().join("outside");
    fs::create_dir(&outside).unwrap();
    symlink(&outside, lab.rootfs().join("dev")).unwrap();
    lab.config["mounts"] = json!([{"destination": "/proc", "type": "proc", "source": "proc"}]);
    lab.run();
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "nodes made on the host");
}

#[test]
fn a_user_namespace_maps_ids_and_can_be_joined() {
    let mut lab = Lab::new("id -u; cat /proc/self/uid_map; echo ok > /dev/null && exec sleep 600");
    lab.config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    lab.config["linux"]["uidMappings"] = map.clone();
    lab.config["linux"]["gidMappings"] = map;
    rustix::fs::chmod(lab.path(), rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
    // As an unpacker for this map would leave it.
    for entry in ["", "bin", "etc", "tmp"] {
        let owner =
            (Some(rustix::process::Uid::from_raw(100_000)), Some(rustix::process::Gid::from_raw(100_000)));
        rustix::fs::chown(lab.rootfs().join(entry), owner.0, owner.1).unwrap();
    }
    let (code, log) = lab.create();
    assert_eq!(code, 0, "{log}");
    let (code, _, err) = taken(&lab.oci(&["start", "x"]));
    assert_eq!(code, 0, "{err}");
    let (code, out, err) = taken(&lab.oci(&["exec", "x", "sh", "-c", "id -u; cat /proc/self/uid_map"]));
    assert_eq!(code, 0, "{err}");
    assert_eq!(out.split_whitespace().collect::<Vec<_>>(), ["0", "0", "100000", "65536"]);
    assert_eq!(lab.oci(&["delete", "-f", "x"]).status.code(), Some(0));
    lab.assert_no_trace();
}

#[test]
fn a_container_joins_the_user_namespace_of_another_and_gets_a_pid_namespace_owned_by_it() {
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    let mut first = Lab::new("exec sleep 600");
    let mut second =
        Lab::new("echo $$; id -u; cat /proc/self/uid_map; cat /proc/sys/kernel/hostname; exit 4");
    for lab in [&mut first, &mut second] {
        rustix::fs::chmod(lab.path(), rustix::fs::Mode::from_raw_mode(0o755)).unwrap();
        let owner =
            (Some(rustix::process::Uid::from_raw(100_000)), Some(rustix::process::Gid::from_raw(100_000)));
        rustix::fs::chown(lab.rootfs(), owner.0, owner.1).unwrap();
    }
    first.config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    first.config["linux"]["uidMappings"] = map.clone();
    first.config["linux"]["gidMappings"] = map;
    assert_eq!(first.create().0, 0);
    assert_eq!(first.oci(&["start", "x"]).status.code(), Some(0));
    let (_, out, _) = taken(&first.oci(&["state", "x"]));
    let pid = serde_json::from_str::<serde_json::Value>(&out).unwrap()["pid"].as_u64().unwrap();
    second.config.as_object_mut().unwrap().remove("hostname");
    second.config["linux"]["namespaces"] = json!([
        {"type": "mount"},
        {"type": "pid"},
        {"type": "cgroup"},
        {"type": "user", "path": format!("/proc/{pid}/ns/user")},
        {"type": "uts", "path": format!("/proc/{pid}/ns/uts")},
        {"type": "network", "path": format!("/proc/{pid}/ns/net")},
        {"type": "ipc", "path": format!("/proc/{pid}/ns/ipc")},
    ]);
    let (code, out, err) = second.run();
    assert_eq!(
        out.split_whitespace().collect::<Vec<_>>(),
        ["1", "0", "0", "100000", "65536", "testbox"],
        "{err}"
    );
    assert_eq!(code, 4, "{err}");
    assert_eq!(first.oci(&["delete", "-f", "x"]).status.code(), Some(0));
    first.assert_no_trace();
    second.assert_no_trace();
}

#[test]
fn a_container_joins_the_namespaces_of_another() {
    let first = Lab::new("exec sleep 600");
    assert_eq!(first.create().0, 0);
    assert_eq!(first.oci(&["start", "x"]).status.code(), Some(0));
    let (_, out, _) = taken(&first.oci(&["state", "x"]));
    let pid = serde_json::from_str::<serde_json::Value>(&out).unwrap()["pid"].as_u64().unwrap();
    let mut second = Lab::new("cat /proc/sys/kernel/hostname /proc/1/comm");
    second.config.as_object_mut().unwrap().remove("hostname");
    second.config["linux"]["namespaces"] = json!([
        {"type": "mount"},
        {"type": "pid", "path": format!("/proc/{pid}/ns/pid")},
        {"type": "uts", "path": format!("/proc/{pid}/ns/uts")},
        {"type": "network", "path": format!("/proc/{pid}/ns/net")},
        {"type": "ipc", "path": format!("/proc/{pid}/ns/ipc")},
    ]);
    let (code, out, err) = second.run();
    assert_eq!((code, out.as_str()), (0, "testbox\nsleep\n"), "{err}");
    assert_eq!(first.oci(&["delete", "-f", "x"]).status.code(), Some(0));
    first.assert_no_trace();
    second.assert_no_trace();
}

#[test]
fn the_runtimes_executable_cannot_be_written_through_a_waiting_container() {
    let lab = Lab::new("true");
    assert_eq!(lab.create().0, 0);
    let (_, out, _) = taken(&lab.oci(&["state", "x"]));
    let pid = serde_json::from_str::<serde_json::Value>(&out).unwrap()["pid"].as_u64().unwrap();
    // What a neighbour in the container would do: hold the file open until nobody executes it any more.
    let held = fs::File::open(format!("/proc/{pid}/exe")).unwrap();
    assert_eq!(lab.oci(&["delete", "-f", "x"]).status.code(), Some(0));
    let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&held));
    let error = Lab::until_not_busy(|| fs::OpenOptions::new().write(true).open(&again));
    assert_eq!(error.map(drop).unwrap_err().raw_os_error(), Some(30), "read-only file system");
}

#[test]
fn a_terminal_reaches_the_console_socket() {
    let mut lab = Lab::new("tty; ls -l /dev/console; exec sleep 600");
    lab.config["process"]["terminal"] = json!(true);
    lab.config["process"]["consoleSize"] = json!({"height": 33, "width": 111});
    let path = lab.path().join("console.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let receiver = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
        let mut name = [0u8; 64];
        let mut parts = [std::io::IoSliceMut::new(&mut name)];
        rustix::net::recvmsg(&stream, &mut parts, &mut control, rustix::net::RecvFlags::empty()).unwrap();
        let fds: Vec<_> = control
            .drain()
            .filter_map(|message| match message {
                rustix::net::RecvAncillaryMessage::ScmRights(fds) => Some(fds.collect::<Vec<_>>()),
                _ => None,
            })
            .flatten()
            .collect();
        fds.into_iter().next().unwrap()
    });
    let output = lab.oci(&["create", "--console-socket", path.to_str().unwrap(), "x"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let master = receiver.join().unwrap();
    let size = rustix::termios::tcgetwinsize(&master).unwrap();
    assert_eq!((size.ws_row, size.ws_col), (33, 111));
    assert_eq!(lab.oci(&["start", "x"]).status.code(), Some(0));
    let mut text = Vec::new();
    Lab::eventually("output of tty", || true);
    let mut buffer = [0u8; 256];
    while !String::from_utf8_lossy(&text).contains("/dev/console") {
        let length = rustix::io::read(&master, &mut buffer).unwrap();
        text.extend_from_slice(&buffer[..length]);
    }
    assert!(String::from_utf8_lossy(&text).contains("/dev/pts/0"), "{}", String::from_utf8_lossy(&text));
    assert_eq!(lab.oci(&["delete", "-f", "x"]).status.code(), Some(0));
}
