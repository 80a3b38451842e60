//! What must not hang or be lost when a part breaks down or the runtime does not answer.

use super::*;

#[test]
fn a_part_that_panics_costs_a_try_and_not_the_pod() {
    let node = Node::new();
    node.parts.breaks_down.store(true, Ordering::SeqCst);
    node.write_pod("p", json!({"containers": [one("c")]}));
    let reason = || node.container("p", "c")?.state?.waiting?.reason;
    node.wait("told", || reason().as_deref() == Some("CreateContainerError"));
    node.wait("tried again", || node.is_ready("p"));
}

#[test]
fn a_probes_own_grace_is_the_containers_when_it_is_killed() {
    let node = Node::new();
    let probed = json!({"name": "c", "image": "image:1", "livenessProbe": {"tcpSocket": {"port": 1}}});
    node.write_pod("p", json!({"containers": [probed], "terminationGracePeriodSeconds": 30}));
    node.wait("probed", || !node.parts.probed.lock().unwrap().is_empty());
    let target = node.parts.probed.lock().unwrap()[0].clone();
    let outcome = ProbeOutcome {
        pod_uid: target.pod.metadata.uid.clone().unwrap(),
        container: "c".into(),
        container_id: target.container_id.clone(),
        kind: ProbeKind::Liveness,
        healthy: false,
        grace_seconds: Some(5),
    };
    node.kubelet.as_ref().unwrap().probes.blocking_send(outcome).unwrap();
    node.wait("restarted", || node.container("p", "c").is_some_and(|one| one.restart_count == 1));
    assert!(node.runtime.calls().contains(&"stop c 5".to_owned()), "{:?}", node.runtime.calls());
}

#[test]
fn a_runtime_that_cannot_list_everything_delays_only_the_search_for_orphans() {
    let mut node = Node::new();
    node.write_pod("a", json!({"containers": [one("c")], "terminationGracePeriodSeconds": 1}));
    node.wait("ready", || node.is_ready("a"));
    node.kill_kubelet();
    std::fs::remove_file(node.manifest("a")).unwrap();
    node.runtime.hangs_on_lists(true);
    node.start_kubelet();
    node.write_pod("b", json!({"containers": [one("d")]}));
    node.wait("another pod starts", || node.is_ready("b"));
    assert!(node.runtime.running().contains(&"c".to_owned()));
    node.runtime.hangs_on_lists(false);
    node.wait("the orphan is ended", || node.runtime.running() == ["d"]);
}
