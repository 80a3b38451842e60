//! The state machine without I/O: events in, actions out, time as an argument.

use super::*;
use crate::pods::parts::{ProbeKind, ProbeOutcome};
use crate::pods::runtime_state::{ContainerRecord, RunState, SandboxRecord};
use k8s_openapi::api::core::v1::Container;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use orlop_proto::cri;
use serde_json::{Value, json};
use std::collections::VecDeque;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

/// Drives a machine and answers its actions as a runtime would in which everything succeeds at once.
struct Drive {
    machine: PodMachine,
    now: i64,
    next: usize,
    log: Vec<String>,
}

impl Drive {
    fn new(spec: Value) -> Self {
        Self::with_status(spec, Value::Null)
    }

    fn with_status(spec: Value, status: Value) -> Self {
        let pod =
            json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": spec, "status": status});
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let machine = PodMachine::new(Arc::new(pod), Origin::Api, SignedDuration::from_secs(300), at(0));
        Self { machine, now: 0, next: 0, log: Vec::new() }
    }

    /// Takes one event and all that follows from the answers to its actions.
    fn send(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let (machine, actions) = step(self.machine.clone(), event, at(self.now));
            self.machine = machine;
            for action in actions {
                events.extend(self.answer(action));
            }
        }
    }

    fn note(&mut self, text: impl Into<String>) {
        self.log.push(text.into());
    }

    fn answer(&mut self, action: Action) -> Option<Event> {
        Some(match action {
            Action::Inspect { epoch } => Event::Observed { epoch, runtime: self.machine.runtime.clone() },
            Action::PrepareHost => Event::HostPrepared(Ok(())),
            Action::Mount => {
                self.note("mount");
                Event::Mounted(Ok(()))
            }
            Action::CreateSandbox { attempt } => {
                self.note(format!("sandbox {attempt}"));
                Event::SandboxCreated(Ok(sandbox(attempt, self.now)))
            }
            Action::StopSandbox { id } => {
                self.note(format!("stop {id}"));
                Event::SandboxStopped { id, result: Ok(()) }
            }
            Action::EnsureImage { container } => {
                Event::ImageReady { container: container.name, result: Ok(image()) }
            }
            Action::StartContainer(request) => {
                self.note(format!("start {} {}", request.container.name, request.attempt));
                self.next += 1;
                let id = format!("c{}", self.next);
                let record = record(&id, &request.container, request.attempt, &request.sandbox.id, self.now);
                Event::ContainerStarted { container: request.container.name, result: Ok(record) }
            }
            Action::Kill(request) => {
                self.note(format!("kill {} {}", request.record.name, request.grace_seconds));
                return None;
            }
            Action::Remove { containers, sandboxes } => {
                let ids: Vec<String> = containers.into_iter().map(|c| c.id).chain(sandboxes).collect();
                self.note(format!("remove {}", ids.join(" ")));
                self.machine.runtime.containers.retain(|known| !ids.contains(&known.id));
                self.machine.runtime.sandboxes.retain(|known| !ids.contains(&known.id));
                Event::Removals { ids }
            }
            Action::TearDown => {
                self.note("tear down");
                Event::TornDown(Ok(()))
            }
            Action::DeleteFromApi => {
                self.note("delete from API");
                return None;
            }
            Action::Purge { .. } => {
                self.note("purge");
                Event::Purged(Ok(()))
            }
            Action::StartProbes(target) => {
                self.note(format!("probe {}", target.container));
                return None;
            }
            Action::StopProbes { .. } | Action::TerminateProbes => return None,
            Action::Report(event, _) => {
                if matches!(event.reason, "BackOff" | "SandboxChanged" | "Killing") {
                    self.note(event.reason);
                }
                return None;
            }
        })
    }

    fn wait(&mut self, seconds: i64) {
        self.now += seconds;
        self.send(Event::Tick);
    }

    /// The running container of that name ends.
    fn exit(&mut self, name: &str, code: i32) {
        let mut runtime = self.machine.runtime.clone();
        let found = runtime.containers.iter_mut().find(|c| c.name == name && c.is_running()).unwrap();
        found.state = RunState::Exited;
        found.exit_code = code;
        found.finished_at = Some(at(self.now));
        let id = found.id.clone();
        let record = found.clone();
        if self.machine.killing.contains_key(&id) {
            self.send(Event::ContainerKilled { id, result: Ok(record) });
        } else {
            self.send(Event::Observed { epoch: self.machine.epoch, runtime });
        }
    }

    fn delete(&mut self, grace: i64) {
        let mut pod = (*self.machine.pod).clone();
        pod.metadata.deletion_timestamp = Some(Time(at(self.now)));
        pod.metadata.deletion_grace_period_seconds = Some(grace);
        self.send(Event::Updated(Arc::new(pod)));
    }

    fn probe(&mut self, container: &str, kind: ProbeKind, healthy: bool) {
        let container_id = self.machine.runtime.latest(container).unwrap().id.clone();
        let pod_uid = "u".to_owned();
        let container = container.to_owned();
        self.send(Event::Probe(ProbeOutcome {
            pod_uid,
            container,
            container_id,
            kind,
            healthy,
            grace_seconds: None,
        }));
    }

    fn take_log(&mut self) -> Vec<String> {
        std::mem::take(&mut self.log)
    }

    /// A new kubelet meets the same runtime and the status it once reported.
    fn restart(self, status: Value) -> Self {
        let spec = serde_json::to_value(self.machine.spec()).unwrap();
        let mut next = Self::with_status(spec, status);
        next.now = self.now;
        next.next = self.next;
        next.machine.runtime = self.machine.runtime;
        next
    }
}

fn sandbox(attempt: u32, now: i64) -> SandboxRecord {
    SandboxRecord {
        id: format!("s{attempt}"),
        attempt,
        ready: true,
        created_at: at(now),
        ips: vec!["10.0.0.1".parse().unwrap()],
    }
}

fn image() -> PulledImage {
    PulledImage { image: cri::Image::default(), image_ref: "ref".into() }
}

fn record(id: &str, container: &Container, attempt: u32, sandbox: &str, now: i64) -> ContainerRecord {
    ContainerRecord {
        id: id.into(),
        name: container.name.clone(),
        sandbox_id: sandbox.into(),
        attempt,
        state: RunState::Running,
        created_at: at(now),
        started_at: Some(at(now)),
        finished_at: None,
        exit_code: 0,
        reason: String::new(),
        message: String::new(),
        image: String::new(),
        image_ref: String::new(),
        hash: labels::container_hash(container),
        log_path: String::new(),
        message_file: None,
        falls_back_to_logs: false,
        user: None,
    }
}

fn mains(names: &[&str]) -> Value {
    json!(names.iter().map(|name| json!({"name": name})).collect::<Vec<_>>())
}

#[test]
fn a_pod_gets_volumes_then_a_sandbox_then_its_containers() {
    let mut drive = Drive::new(json!({"containers": mains(&["a", "b"])}));
    drive.send(Event::Tick);
    let log = drive.take_log();
    assert_eq!(log[..2], ["mount", "sandbox 0"]);
    assert!(log.contains(&"start a 0".into()) && log.contains(&"start b 0".into()), "{log:?}");
}

#[test]
fn nothing_is_decided_before_the_runtime_was_seen() {
    let drive = Drive::new(json!({"containers": mains(&["a"])}));
    let (machine, actions) = step(drive.machine, Event::Tick, at(0));
    assert!(matches!(actions.as_slice(), [Action::Inspect { .. }]), "{actions:?}");
    let (machine, actions) = step(machine, Event::ObservationFailed, at(1));
    assert!(
        actions.is_empty() && machine.wake == Some(at(2)),
        "a failed look is repeated later, not at once"
    );
}

#[test]
fn restarts_follow_the_policy() {
    for (policy, code, restarts) in [
        ("Always", 0, true),
        ("Always", 1, true),
        ("OnFailure", 0, false),
        ("OnFailure", 1, true),
        ("Never", 0, false),
        ("Never", 1, false),
    ] {
        let mut drive = Drive::new(json!({"containers": mains(&["a"]), "restartPolicy": policy}));
        drive.send(Event::Tick);
        drive.exit("a", code);
        assert_eq!(drive.log.contains(&"start a 1".into()), restarts, "{policy} {code}: {:?}", drive.log);
        assert_eq!(matches!(drive.machine.goal, Goal::Stop(_)), !restarts, "{policy} {code}");
    }
}

#[test]
fn a_containers_own_rules_come_before_the_pods_policy() {
    let rules = json!([{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]);
    let container = json!({"name": "a", "restartPolicy": "Never", "restartPolicyRules": rules});
    let mut drive = Drive::new(json!({"containers": [container], "restartPolicy": "Never"}));
    drive.send(Event::Tick);
    drive.exit("a", 42);
    assert!(drive.log.contains(&"start a 1".into()));
    drive.exit("a", 1);
    assert!(!drive.log.contains(&"start a 2".into()));
}

#[test]
fn crashes_back_off_from_ten_seconds_doubling_and_a_long_run_forgets_them() {
    let mut drive = Drive::new(json!({"containers": mains(&["a"])}));
    drive.send(Event::Tick);
    drive.exit("a", 1);
    for (attempt, wait) in [(2, 10), (3, 20), (4, 40), (5, 80), (6, 160), (7, 300), (8, 300)] {
        drive.exit("a", 1);
        assert_eq!(drive.machine.wake, Some(at(drive.now + wait)), "attempt {attempt}");
        drive.wait(wait - 1);
        assert!(!drive.log.contains(&format!("start a {attempt}")), "too early: {attempt}");
        drive.wait(1);
        assert!(drive.log.contains(&format!("start a {attempt}")), "too late: {attempt}");
    }
    assert_eq!(drive.log.iter().filter(|line| *line == "BackOff").count(), 7, "told once each");
    drive.wait(601);
    drive.exit("a", 1);
    assert!(drive.log.contains(&"start a 9".into()), "restarted at once after a long run");
}

#[test]
fn init_containers_run_in_order_and_a_failed_one_ends_a_pod_that_must_not_restart() {
    let spec = |policy| json!({"initContainers": mains(&["i", "j"]), "containers": mains(&["a"]), "restartPolicy": policy});
    let mut drive = Drive::new(spec("Always"));
    drive.send(Event::Tick);
    assert_eq!(drive.take_log()[2..], ["start i 0"]);
    drive.exit("i", 1);
    assert_eq!(drive.take_log(), ["start i 1"]);
    drive.exit("i", 0);
    assert!(drive.take_log().contains(&"start j 0".into()));
    drive.exit("j", 0);
    assert_eq!(drive.take_log(), ["start a 0"]);
    let mut drive = Drive::new(spec("Never"));
    drive.send(Event::Tick);
    drive.exit("i", 1);
    assert!(matches!(&drive.machine.goal, Goal::Stop(stopping) if stopping.finished));
    assert!(!drive.log.iter().any(|line| line.starts_with("start a")));
}

#[test]
fn the_next_init_container_waits_for_a_sidecars_startup_probe() {
    let side = json!({"name": "s", "restartPolicy": "Always", "startupProbe": {"tcpSocket": {"port": 1}}});
    let mut drive =
        Drive::new(json!({"initContainers": [side], "containers": mains(&["a"]), "restartPolicy": "Never"}));
    drive.send(Event::Tick);
    assert!(!drive.log.contains(&"start a 0".into()));
    drive.probe("s", ProbeKind::Startup, true);
    assert!(drive.log.contains(&"start a 0".into()));
    drive.exit("s", 1);
    assert!(drive.log.contains(&"start s 1".into()), "a sidecar is restarted under any policy");
    drive.exit("a", 0);
    assert!(
        drive.log.iter().any(|line| line.starts_with("kill s")),
        "sidecars end with the last main: {:?}",
        drive.log
    );
}

#[test]
fn deletion_kills_mains_then_sidecars_in_reverse_within_one_grace() {
    let side = |name: &str| json!({"name": name, "restartPolicy": "Always"});
    let mut drive =
        Drive::new(json!({"initContainers": [side("s"), side("t")], "containers": mains(&["a", "b"])}));
    drive.send(Event::Tick);
    drive.take_log();
    drive.delete(30);
    let log: Vec<_> = drive.take_log().into_iter().filter(|line| line.starts_with("kill")).collect();
    assert_eq!(log, ["kill a 30", "kill b 30"]);
    drive.now += 10;
    drive.exit("a", 0);
    assert!(drive.take_log().is_empty());
    drive.exit("b", 0);
    assert_eq!(drive.take_log(), ["Killing", "kill t 20"]);
    drive.exit("t", 0);
    assert_eq!(drive.take_log(), ["Killing", "kill s 20"]);
    drive.exit("s", 0);
    assert_eq!(drive.take_log(), ["stop s0", "tear down", "delete from API"]);
    assert!(!drive.machine.is_over(), "the exit codes stay until the API server has them");
    drive.send(Event::ApiDeleted);
    assert_eq!(drive.take_log(), ["purge"]);
    assert!(drive.machine.is_over());
}

#[test]
fn a_shorter_grace_hurries_a_kill_under_way_and_a_longer_one_does_not() {
    let mut drive = Drive::new(json!({"containers": mains(&["a"])}));
    drive.send(Event::Tick);
    drive.take_log();
    drive.delete(30);
    drive.delete(60);
    assert_eq!(drive.take_log(), ["Killing", "kill a 30"]);
    drive.delete(1);
    assert_eq!(drive.take_log(), ["kill a 1"]);
}

#[test]
fn a_container_that_is_being_started_is_waited_for_before_the_sandbox_is_stopped() {
    let mut drive = Drive::new(json!({"containers": mains(&["a"])}));
    drive.machine.observed = true;
    drive.machine.host = Stage::Done;
    drive.machine.volumes = Stage::Done;
    drive.machine.runtime.sandboxes.push(sandbox(0, 0));
    let track = drive.machine.track_mut("a");
    track.work = Work::Starting;
    drive.delete(5);
    assert!(!drive.log.iter().any(|line| line.starts_with("stop")), "{:?}", drive.log);
    let container = drive.machine.container("a").unwrap().0;
    let result = Ok(record("late", &container, 0, "s0", 0));
    drive.send(Event::ContainerStarted { container: "a".into(), result });
    assert!(drive.log.contains(&"kill a 5".into()), "{:?}", drive.log);
    drive.exit("a", 0);
    assert!(drive.log.contains(&"stop s0".into()));
}

#[test]
fn a_pod_that_vanished_from_the_api_is_purged_without_asking_it() {
    let mut drive = Drive::new(json!({"containers": mains(&["a"]), "terminationGracePeriodSeconds": 3}));
    drive.send(Event::Tick);
    drive.take_log();
    drive.send(Event::Removed);
    drive.exit("a", 0);
    assert_eq!(drive.take_log(), ["Killing", "kill a 3", "stop s0", "tear down", "purge"]);
}

#[test]
fn a_deadline_ends_the_pod_and_says_why() {
    let mut drive = Drive::new(json!({"containers": mains(&["a"]), "activeDeadlineSeconds": 60}));
    drive.send(Event::Tick);
    assert_eq!(drive.machine.wake, Some(at(60)));
    drive.wait(60);
    let Goal::Stop(stopping) = &drive.machine.goal else { panic!("still running") };
    assert_eq!(stopping.verdict.as_ref().unwrap().reason, "DeadlineExceeded");
}

#[test]
fn a_lost_sandbox_is_stopped_and_replaced_and_init_containers_run_again() {
    let mut drive = Drive::new(json!({"initContainers": mains(&["i"]), "containers": mains(&["a"])}));
    drive.send(Event::Tick);
    drive.exit("i", 0);
    drive.take_log();
    let mut runtime = drive.machine.runtime.clone();
    runtime.sandboxes[0].ready = false;
    for container in runtime.containers.iter_mut().filter(|c| c.is_running()) {
        container.state = RunState::Exited;
        container.exit_code = 137;
        container.finished_at = Some(at(0));
    }
    drive.send(Event::Observed { epoch: drive.machine.epoch, runtime });
    assert_eq!(drive.take_log(), ["stop s0", "SandboxChanged", "sandbox 1", "start i 1"]);
    drive.exit("i", 0);
    assert!(drive.take_log().contains(&"start a 1".into()));
}

#[test]
fn a_changed_image_replaces_the_container() {
    let mut drive = Drive::new(json!({"containers": [{"name": "a", "image": "x:1"}]}));
    drive.send(Event::Tick);
    drive.take_log();
    let mut pod = (*drive.machine.pod).clone();
    pod.spec.as_mut().unwrap().containers[0].image = Some("x:2".into());
    drive.send(Event::Updated(Arc::new(pod)));
    assert_eq!(drive.take_log(), ["Killing", "kill a 30"]);
    drive.exit("a", 0);
    assert!(drive.take_log().contains(&"start a 1".into()));
}

#[test]
fn only_the_newest_dead_container_of_each_name_is_kept() {
    let mut drive = Drive::new(json!({"containers": mains(&["a"])}));
    drive.send(Event::Tick);
    drive.exit("a", 1);
    assert!(!drive.log.iter().any(|line| line.starts_with("remove")));
    drive.exit("a", 1);
    assert!(drive.log.contains(&"remove c1".into()), "{:?}", drive.log);
}

#[test]
fn a_restarted_kubelet_takes_running_containers_as_they_are() {
    let probed = json!({"name": "a", "readinessProbe": {"tcpSocket": {"port": 1}}});
    let mut drive = Drive::new(json!({"containers": [probed, {"name": "b"}]}));
    drive.send(Event::Tick);
    let status = json!({"phase": "Running", "containerStatuses": [
        {"name": "a", "containerID": "x://c1", "ready": true, "started": true, "image": "", "imageID": "", "restartCount": 0},
    ]});
    let mut next = drive.restart(status);
    next.send(Event::Tick);
    assert!(
        !next.log.iter().any(|line| line.starts_with("start") || line.starts_with("sandbox")),
        "{:?}",
        next.log
    );
    assert!(next.machine.track("a").unwrap().ready, "readiness is what was last reported");
    assert!(next.log.contains(&"probe a".into()));
}

#[test]
fn a_container_made_but_not_started_before_the_kubelet_died_is_made_anew() {
    let mut drive = Drive::new(json!({"containers": mains(&["a"])}));
    let container = drive.machine.container("a").unwrap().0;
    let mut half = record("half", &container, 0, "s0", 0);
    half.state = RunState::Created;
    drive.machine.runtime = PodRuntime { sandboxes: vec![sandbox(0, 0)], containers: vec![half] };
    drive.send(Event::Tick);
    let log = drive.take_log();
    assert_eq!(log, ["mount", "remove half", "start a 0"]);
}

#[test]
fn a_pod_reported_as_ended_is_never_started_again() {
    let mut drive = Drive::with_status(json!({"containers": mains(&["a"])}), json!({"phase": "Succeeded"}));
    drive.send(Event::Tick);
    assert_eq!(drive.take_log(), ["tear down"]);
    drive.delete(0);
    assert_eq!(drive.take_log(), ["delete from API"]);
}

#[test]
fn a_never_pod_whose_container_is_lost_after_it_was_reported_as_ended_stays_ended() {
    let status = json!({"phase": "Running", "containerStatuses": [
        {"name": "a", "containerID": "x://gone", "ready": false, "image": "", "imageID": "", "restartCount": 0,
         "state": {"terminated": {"exitCode": 5}}},
    ]});
    let mut drive =
        Drive::with_status(json!({"containers": mains(&["a"]), "restartPolicy": "Never"}), status);
    drive.send(Event::Tick);
    assert_eq!(drive.take_log(), ["mount", "tear down"]);
}

#[test]
fn a_late_look_neither_revives_the_dead_nor_forgets_the_new() {
    let mut drive = Drive::new(json!({"containers": mains(&["a"])}));
    drive.send(Event::Tick);
    let old = drive.machine.runtime.clone();
    let epoch = drive.machine.epoch;
    drive.exit("a", 1);
    let newest = drive.machine.runtime.latest("a").unwrap().id.clone();
    drive.send(Event::Observed { epoch, runtime: old });
    assert!(drive.machine.runtime.container("c1").unwrap().has_exited());
    assert_eq!(drive.machine.runtime.latest("a").unwrap().id, newest);
}

#[test]
fn failures_of_the_pods_own_parts_are_retried_with_growing_waits() {
    let mut drive = Drive::new(json!({"containers": mains(&["a"])}));
    drive.machine.observed = true;
    drive.machine.host = Stage::Done;
    drive.machine.inspect_again = false;
    for wait in [1, 2, 4, 8, 16, 20, 20] {
        let (machine, actions) = step(drive.machine, Event::Tick, at(drive.now));
        assert!(matches!(actions.as_slice(), [Action::Mount]), "{actions:?}");
        let (machine, _) = step(machine, Event::Mounted(Err("no".into())), at(drive.now));
        assert_eq!(machine.wake, Some(at(drive.now + wait)));
        drive.machine = machine;
        drive.now += wait;
    }
}
