//! The library as the keeper uses it: one thread, nothing that blocks, descriptors for standard streams, an overlay
//! mounted by the container itself.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic")]

mod lab;

use lab::{Lab, cgroup_root};
use orlop_oci::cgroup::MissingControllers;
use orlop_oci::{
    Container, ContainerId, CreateRequest, ExecProgress, ExecRequest, Overlay, Progress, Rootfs, Stdio,
};
use serde_json::json;
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::time::{Duration, Instant};

fn main() {
    assert_eq!(
        fs::read_dir("/proc/self/task").unwrap().count(),
        1,
        "this test needs a process of one thread"
    );
    orlop_oci::exe::protect().unwrap();
    for (name, test) in [
        ("overlay_of_many_layers", overlay_of_many_layers as fn()),
        ("create_does_not_block_on_a_hook", create_does_not_block_on_a_hook),
        ("dropping_a_creation_leaves_nothing", dropping_a_creation_leaves_nothing),
    ] {
        test();
        println!("test {name} ... ok");
    }
}

fn output() -> (File, impl Fn() -> OwnedFd) {
    let file = tempfile::tempfile().unwrap();
    let other = file.try_clone().unwrap();
    (file, move || OwnedFd::from(other.try_clone().unwrap()))
}

fn streams(output: &dyn Fn() -> OwnedFd) -> Stdio {
    Stdio::Fds { stdin: File::open("/dev/null").unwrap().into(), stdout: output(), stderr: output() }
}

fn text(file: &mut File) -> String {
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

fn wait(fd: impl AsFd) {
    let mut poll = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
    assert_ne!(rustix::event::poll(&mut poll, Some(&limit)).unwrap(), 0, "nothing happens");
}

fn exit_code(pidfd: impl AsFd) -> Option<i32> {
    let id = rustix::process::WaitId::PidFd(pidfd.as_fd());
    rustix::process::waitid(id, rustix::process::WaitIdOptions::EXITED).unwrap()?.exit_status()
}

/// More layers than fit on a page of mount options, with long names.
fn layers(lab: &Lab, count: usize) -> Vec<PathBuf> {
    let base = lab.path().join("layers-with-a-name-of-some-length-as-digests-have");
    let mut layers: Vec<PathBuf> = (0..count).map(|number| base.join(format!("{number:064}"))).collect();
    for (number, layer) in layers.iter().enumerate() {
        fs::create_dir_all(layer).unwrap();
        fs::write(layer.join(format!("file-{number}")), number.to_string()).unwrap();
        fs::write(layer.join("top"), number.to_string()).unwrap();
    }
    layers.push(lab.rootfs());
    layers
}

fn overlay_of_many_layers() {
    let lab = Lab::new("cat /top /file-119; echo; echo written > /new; sleep 600");
    let mount_point = lab.bundle().join("root");
    for dir in [&mount_point, &lab.path().join("upper"), &lab.path().join("work")] {
        fs::create_dir(dir).unwrap();
    }
    let mut config = lab.config.clone();
    config["root"]["path"] = json!("root");
    let spec = serde_json::from_value(config).unwrap();
    let id = ContainerId::new("x").unwrap();
    let (bundle, state, cgroups) = (lab.bundle(), lab.state(), cgroup_root());
    let (mut file, out) = output();
    let mut request = CreateRequest::new(&id, &bundle, &spec, &state);
    request.cgroup_root = &cgroups;
    request.missing_controllers = MissingControllers::Warn;
    request.stdio = streams(&out);
    request.rootfs = Rootfs::Overlay(Overlay {
        lower: layers(&lab, 120),
        upper: lab.path().join("upper"),
        work: lab.path().join("work"),
    });
    let mut starting = orlop_oci::create(request).unwrap();
    let container = loop {
        match starting.advance().unwrap() {
            Progress::Pending => wait(&starting),
            Progress::Created(container) => break *container,
        }
    };
    container.start().unwrap();
    Lab::eventually("the program's output", || lab.path().join("upper/new").exists());
    assert_eq!(text(&mut file), "0119\n");
    assert_eq!(fs::read_dir(&mount_point).unwrap().count(), 0, "the host must not see the overlay");
    exec_by_descriptors(&lab, &container);
    container.kill(9).unwrap();
    wait(container.pidfd().unwrap());
    exit_code(container.pidfd().unwrap());
    container.delete(false).unwrap();
    container.delete(false).unwrap();
    lab.assert_no_trace();
}

fn exec_by_descriptors(lab: &Lab, container: &Container) {
    let mut process = container.process().unwrap();
    process.set_args(Some(["sh", "-c", "echo from exec; exit 5"].map(str::to_owned).to_vec()));
    let (mut file, out) = output();
    let mut request = ExecRequest::new(&process);
    request.stdio = streams(&out);
    let mut starting = container.exec(request).unwrap();
    let running = loop {
        match starting.advance().unwrap() {
            ExecProgress::Pending => wait(&starting),
            ExecProgress::Running(process) => break process,
        }
    };
    assert_eq!(exit_code(&running.pidfd), Some(5));
    assert_eq!(text(&mut file), "from exec\n");
    // Loading by id from the state gives the same container.
    let loaded = Container::load(&lab.state(), container.id()).unwrap();
    assert_eq!((loaded.pid(), loaded.status().unwrap()), (container.pid(), orlop_oci::Status::Running));
    let own = fs::read_link("/proc/self/ns/pid").unwrap();
    assert_eq!(
        own,
        fs::read_link("/proc/self/ns/pid_for_children").unwrap(),
        "children are born at home again"
    );
}

fn with_slow_hook(lab: &mut Lab, seconds: u32) {
    lab.config["hooks"] = json!({"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", seconds.to_string()], "timeout": 1}]});
}

fn create_does_not_block_on_a_hook() {
    let mut lab = Lab::new("true");
    with_slow_hook(&mut lab, 60);
    let spec = serde_json::from_value(lab.config.clone()).unwrap();
    let id = ContainerId::new("x").unwrap();
    let (bundle, state, cgroups) = (lab.bundle(), lab.state(), cgroup_root());
    let mut request = CreateRequest::new(&id, &bundle, &spec, &state);
    request.cgroup_root = &cgroups;
    request.missing_controllers = MissingControllers::Warn;
    let mut starting = orlop_oci::create(request).unwrap();
    let began = Instant::now();
    let mut longest = Duration::ZERO;
    let error = loop {
        let step = Instant::now();
        match starting.advance() {
            Ok(Progress::Pending) => {
                longest = longest.max(step.elapsed());
                wait(&starting);
            }
            Ok(Progress::Created(_)) => panic!("the hook cannot have succeeded"),
            Err(error) => break error,
        }
    };
    assert!(error.report().contains("timed out after 1 s"), "{}", error.report());
    assert!(longest < Duration::from_millis(500), "a step took {longest:?}");
    assert!(began.elapsed() < Duration::from_secs(20));
    drop(starting);
    lab.assert_no_trace();
}

fn dropping_a_creation_leaves_nothing() {
    let mut lab = Lab::new("true");
    with_slow_hook(&mut lab, 60);
    symlink("busybox", lab.rootfs().join("bin/extra")).unwrap();
    let spec = serde_json::from_value(lab.config.clone()).unwrap();
    let id = ContainerId::new("x").unwrap();
    let (bundle, state, cgroups) = (lab.bundle(), lab.state(), cgroup_root());
    let mut request = CreateRequest::new(&id, &bundle, &spec, &state);
    request.cgroup_root = &cgroups;
    request.missing_controllers = MissingControllers::Warn;
    let mut starting = orlop_oci::create(request).unwrap();
    assert!(matches!(starting.advance().unwrap(), Progress::Pending));
    let pid = starting.pid();
    drop(starting);
    assert!(!PathBuf::from(format!("/proc/{pid}")).exists());
    lab.assert_no_trace();
}
