//! Statuses of pods in typical situations: phase, conditions, container states, and the patch that carries them.

use super::*;
use crate::pods::machine::{Blocked, Event, Origin, StartFailure, Stopping, Verdict, step};
use crate::pods::runtime_state::{ContainerRecord, PodRuntime, RunState, SandboxRecord};
use jiff::SignedDuration;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use std::sync::Arc;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

fn machine(spec: Value, status: Value) -> PodMachine {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": "p", "namespace": "n", "uid": "u", "generation": 3}, "spec": spec, "status": status,
    }))
    .unwrap();
    let mut machine = PodMachine::new(Arc::new(pod), Origin::Api, SignedDuration::from_secs(300), at(0));
    machine.runtime.sandboxes.push(SandboxRecord {
        id: "s".into(),
        attempt: 0,
        ready: true,
        created_at: at(0),
        ips: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
    });
    machine.observed = true;
    machine
}

fn record(name: &str, attempt: u32, end: Option<i32>) -> ContainerRecord {
    ContainerRecord {
        id: format!("{name}{attempt}"),
        name: name.into(),
        sandbox_id: "s".into(),
        attempt,
        state: if end.is_some() { RunState::Exited } else { RunState::Running },
        created_at: at(1),
        started_at: Some(at(1)),
        finished_at: end.map(|_| at(2)),
        exit_code: end.unwrap_or(0),
        reason: String::new(),
        message: String::new(),
        image: "docker.io/library/x:1".into(),
        image_ref: "x@sha256:1".into(),
        hash: String::new(),
        log_path: String::new(),
        message_file: None,
        falls_back_to_logs: false,
        user: None,
    }
}

fn with(mut machine: PodMachine, records: Vec<ContainerRecord>) -> PodMachine {
    machine.runtime.containers.extend(records);
    machine.runtime.sort();
    // One step lets it follow the health of what runs.
    machine.host = crate::pods::machine::Stage::Done;
    machine.volumes = crate::pods::machine::Stage::Done;
    step(machine, Event::Tick, at(3)).0
}

fn status(machine: &PodMachine) -> Value {
    let hosts = ["192.0.2.1".parse().unwrap()];
    let facts = NodeFacts { host_ips: &hosts, runtime_name: "rt" };
    serde_json::to_value(compute(machine, facts, at(5))).unwrap()
}

fn condition<'a>(status: &'a Value, name: &str) -> &'a Value {
    status["conditions"].as_array().unwrap().iter().find(|condition| condition["type"] == name).unwrap()
}

fn quiet(mut machine: PodMachine, verdict: Option<Verdict>) -> PodMachine {
    machine.runtime.sandboxes.clear();
    let mut stopping = Stopping::new(at(0));
    stopping.verdict = verdict;
    machine.goal = Goal::Stop(stopping);
    machine
}

#[test]
fn a_running_pod_in_full() {
    let spec =
        json!({"containers": [{"name": "a", "image": "x:1", "resources": {"requests": {"cpu": "1"}}}]});
    let machine = with(machine(spec, Value::Null), vec![record("a", 0, None)]);
    let expected = json!({
        "phase": "Running",
        "hostIP": "192.0.2.1", "hostIPs": [{"ip": "192.0.2.1"}],
        "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
        "startTime": at(0).to_string(), "qosClass": "Burstable", "observedGeneration": 3,
        "containerStatuses": [{
            "name": "a", "image": "docker.io/library/x:1", "imageID": "x@sha256:1", "containerID": "rt://a0",
            "ready": true, "started": true, "restartCount": 0,
            "state": {"running": {"startedAt": at(1).to_string()}},
            "allocatedResources": {"cpu": "1"}, "resources": {"requests": {"cpu": "1"}},
        }],
    });
    let mut found = status(&machine);
    let conditions = found.as_object_mut().unwrap().remove("conditions").unwrap();
    assert_eq!(found, expected);
    for condition in conditions.as_array().unwrap() {
        assert_eq!(condition["status"], "True", "{condition}");
        assert_eq!(condition["observedGeneration"], 3);
        assert_eq!(condition["lastTransitionTime"], at(5).to_string());
    }
    assert_eq!(conditions.as_array().unwrap().len(), OWNED_CONDITIONS.len());
}

#[test]
fn phases_follow_from_the_containers() {
    let two = || json!([{"name": "a"}, {"name": "b"}]);
    let spec = |policy: &str| json!({"containers": two(), "restartPolicy": policy});
    for (policy, records, expected) in [
        ("Always", vec![], "Pending"),
        ("Always", vec![record("a", 0, None)], "Pending"),
        ("Always", vec![record("a", 0, None), record("b", 0, None)], "Running"),
        ("Always", vec![record("a", 0, Some(1)), record("b", 0, None)], "Running"),
        ("Always", vec![record("a", 0, Some(1)), record("b", 0, Some(1))], "Running"),
        ("Never", vec![record("a", 0, Some(0)), record("b", 0, None)], "Running"),
        ("OnFailure", vec![record("a", 0, Some(0)), record("b", 0, Some(1))], "Running"),
    ] {
        let machine = with(machine(spec(policy), Value::Null), records);
        assert_eq!(status(&machine)["phase"], expected, "{policy} {:?}", machine.runtime.containers);
    }
}

#[test]
fn the_last_phase_waits_until_nothing_can_run_and_then_stays() {
    let spec = json!({"containers": [{"name": "a"}, {"name": "b"}], "restartPolicy": "Never"});
    for (a, b, expected) in [(0, 0, "Succeeded"), (0, 1, "Failed")] {
        let prior = json!({"phase": "Running"});
        let ended =
            with(machine(spec.clone(), prior), vec![record("a", 0, Some(a)), record("b", 0, Some(b))]);
        assert!(matches!(ended.goal, Goal::Stop(_)));
        assert_eq!(status(&ended)["phase"], "Running", "the sandbox still stands");
        let mut ended = quiet(ended, None);
        let last = status(&ended);
        assert_eq!(last["phase"], expected);
        ended.prior = serde_json::from_value(last).unwrap();
        ended.runtime = PodRuntime::default();
        assert_eq!(status(&ended)["phase"], expected);
    }
}

#[test]
fn an_always_pod_that_was_told_to_stop_succeeds_or_fails_by_its_exit_codes() {
    let spec = json!({"containers": [{"name": "a"}]});
    for (code, expected) in [(0, "Succeeded"), (143, "Failed")] {
        let mut stopped = machine(spec.clone(), json!({"phase": "Running"}));
        stopped.runtime.containers.push(record("a", 0, Some(code)));
        assert_eq!(status(&quiet(stopped, None))["phase"], expected);
    }
}

#[test]
fn unready_containers_are_named_in_the_conditions() {
    let probed = |name: &str| json!({"name": name, "readinessProbe": {"tcpSocket": {"port": 1}}});
    let spec = json!({"containers": [probed("b"), probed("a"), {"name": "c"}]});
    let records = vec![record("a", 0, None), record("b", 0, None), record("c", 0, None)];
    let found = status(&with(machine(spec, Value::Null), records));
    for name in ["Ready", "ContainersReady"] {
        let condition = condition(&found, name);
        assert_eq!(
            (&condition["status"], &condition["reason"]),
            (&json!("False"), &json!("ContainersNotReady"))
        );
        assert_eq!(condition["message"], "containers with unready status: [b a]");
    }
    assert_eq!(condition(&found, "Initialized")["status"], "True");
    let names: Vec<_> =
        found["containerStatuses"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["a", "b", "c"], "sorted by name");
}

#[test]
fn a_pod_in_its_init_containers_is_pending_and_says_which_are_missing() {
    let spec = json!({"initContainers": [{"name": "i"}, {"name": "j"}], "containers": [{"name": "a"}]});
    let found =
        status(&with(machine(spec, Value::Null), vec![record("i", 0, Some(0)), record("j", 0, None)]));
    assert_eq!(found["phase"], "Pending");
    let initialized = condition(&found, "Initialized");
    assert_eq!(initialized["reason"], "ContainersNotInitialized");
    assert_eq!(initialized["message"], "containers with incomplete status: [j]");
    assert_eq!(found["initContainerStatuses"][0]["state"]["terminated"]["reason"], "Completed");
    assert_eq!(found["containerStatuses"][0]["state"]["waiting"]["reason"], "PodInitializing");
}

#[test]
fn a_crash_loop_shows_why_it_waits_and_how_it_ended() {
    let mut crashed =
        with(machine(json!({"containers": [{"name": "a"}]}), Value::Null), vec![record("a", 1, Some(2))]);
    let failure = StartFailure { reason: "CrashLoopBackOff".into(), message: "back-off 10s".into() };
    crashed.tracks.get_mut("a").unwrap().blocked = Some(Blocked::new(failure, at(2), at(12)));
    let one = &status(&crashed)["containerStatuses"][0];
    assert_eq!(one["state"]["waiting"], json!({"reason": "CrashLoopBackOff", "message": "back-off 10s"}));
    assert_eq!(one["lastState"]["terminated"]["exitCode"], 2);
    assert_eq!(one["lastState"]["terminated"]["containerID"], "rt://a1");
    assert_eq!(one["restartCount"], 1);
}

#[test]
fn readiness_gates_hold_back_ready_but_not_containers_ready() {
    let spec = json!({"containers": [{"name": "a"}], "readinessGates": [{"conditionType": "x/y"}]});
    let found = status(&with(machine(spec.clone(), Value::Null), vec![record("a", 0, None)]));
    assert_eq!(condition(&found, "Ready")["reason"], "ReadinessGatesNotReady");
    assert_eq!(condition(&found, "ContainersReady")["status"], "True");
    let open = json!({"conditions": [{"type": "x/y", "status": "True"}]});
    let found = status(&with(machine(spec, open), vec![record("a", 0, None)]));
    assert_eq!(condition(&found, "Ready")["status"], "True");
}

#[test]
fn a_verdict_is_told_as_reason_and_message() {
    let verdict = Verdict { reason: "NodePorts".into(), message: "taken".into(), rejected: true };
    let found = status(&quiet(machine(json!({"containers": [{"name": "a"}]}), Value::Null), Some(verdict)));
    assert_eq!(
        (&found["phase"], &found["reason"], &found["message"]),
        (&json!("Failed"), &json!("NodePorts"), &json!("taken"))
    );
    assert_eq!(condition(&found, "Ready")["reason"], "PodFailed");
}

#[test]
fn transition_times_change_only_with_the_condition() {
    let before = json!({"conditions": [
        {"type": "Ready", "status": "True", "lastTransitionTime": at(1)},
        {"type": "ContainersReady", "status": "False", "lastTransitionTime": at(1)},
    ]});
    let found =
        status(&with(machine(json!({"containers": [{"name": "a"}]}), before), vec![record("a", 0, None)]));
    assert_eq!(condition(&found, "Ready")["lastTransitionTime"], at(1).to_string());
    assert_eq!(condition(&found, "ContainersReady")["lastTransitionTime"], at(5).to_string());
}

#[test]
fn a_patch_names_what_is_empty_replaces_addresses_and_leaves_foreign_conditions() {
    let running =
        with(machine(json!({"containers": [{"name": "a"}]}), Value::Null), vec![record("a", 0, None)]);
    let mut told: PodStatus = serde_json::from_value(status(&running)).unwrap();
    let foreign = serde_json::from_value(json!({"type": "x/y", "status": "True"})).unwrap();
    told.conditions.as_mut().unwrap().push(foreign);
    let body = patch::body("u", &told);
    assert_eq!(body["metadata"]["uid"], "u");
    let part = body["status"].as_object().unwrap();
    assert_eq!(part["podIPs"], json!([{"$patch": "replace"}, {"ip": "10.0.0.1"}, {"ip": "fd00::1"}]));
    assert!(part.contains_key("reason") && part["reason"].is_null());
    assert!(part["conditions"].as_array().unwrap().iter().all(|condition| condition["type"] != "x/y"));
    assert_eq!(part["conditions"][0].get("reason"), Some(&Value::Null));
}

#[test]
fn equal_statuses_have_equal_parts_whatever_else_the_server_added() {
    let running =
        with(machine(json!({"containers": [{"name": "a"}]}), Value::Null), vec![record("a", 0, None)]);
    let ours: PodStatus = serde_json::from_value(status(&running)).unwrap();
    let mut theirs = ours.clone();
    theirs.nominated_node_name = Some("x".into());
    theirs.conditions.as_mut().unwrap().reverse();
    assert_eq!(patch::owned(&ours), patch::owned(&theirs));
}
