//! Pods of the API: what happens to them while the API server, the kubelet, or both are away.

use super::*;
use api::Api;

fn by_name(node: &Node, name: &str) -> Option<Arc<Pod>> {
    node.directory().pod(Node::key(name)).ok()
}

fn restarts(node: &Node, pod: &str) -> Option<i32> {
    let status = by_name(node, pod)?.status.clone()?;
    Some(status.container_statuses?.first()?.restart_count)
}

#[test]
fn a_kubelet_started_while_the_api_server_is_away_runs_its_pods_on_until_the_server_says_otherwise() {
    let mut api = Api::new();
    api.put("keep", "uid-keep", json!({"containers": [one("c")]}));
    api.put("drop", "uid-drop", json!({"containers": [one("d")], "terminationGracePeriodSeconds": 1}));
    let mut node = Node::with_api(&api);
    node.wait("both run", || node.runtime.running().len() == 2);
    let files = ["uid-keep", "uid-drop"].map(|uid| node.path("kubelet/pods").join(uid).join("pod.json"));
    let is_remembered = |file: &PathBuf| {
        std::fs::read_to_string(file).is_ok_and(|text| text.contains("\"phase\":\"Running\""))
    };
    node.wait("both are remembered", || files.iter().all(is_remembered));
    node.kill_kubelet();
    api.go_away();
    api.take("drop");
    node.start_kubelet();
    node.wait("both are known", || node.directory().list().len() == 2);
    assert_eq!(node.runtime.count("start"), 2, "nothing was restarted");
    node.runtime.exit("c", 1);
    node.wait("restarted by its policy", || restarts(&node, "keep") == Some(1));
    node.wait("it runs", || node.runtime.running().len() == 2);
    api.come_back();
    node.wait("the deleted one is gone", || node.runtime.running() == ["c"]);
    node.wait("with all it had", || !files[1].parent().unwrap().exists());
    assert!(files[0].exists());
    node.wait("the server is told", || api.phase("keep") == "Running");
}

#[test]
fn a_pod_made_anew_under_its_name_begins_when_the_old_one_is_gone() {
    let mut api = Api::new();
    let spec = json!({"containers": [one("c")], "terminationGracePeriodSeconds": 2});
    api.put("db-0", "uid-1", spec.clone());
    let node = Node::with_api(&api);
    node.wait("runs", || node.runtime.running() == ["c"]);
    node.runtime.is_stubborn("c");
    // Gone and made anew while the watch was broken: one list tells of both.
    api.put("db-0", "uid-2", spec);
    api.go_away();
    api.come_back();
    let uid = || by_name(&node, "db-0").and_then(|pod| pod.metadata.uid.clone());
    node.wait("the new one runs", || uid().as_deref() == Some("uid-2") && node.runtime.running() == ["c"]);
    let calls = node.runtime.calls();
    let second = calls.iter().rposition(|call| call == "start c").unwrap();
    let removed = calls.iter().position(|call| call == "remove-sandbox").unwrap();
    assert!(removed < second, "{calls:?}");
    assert_eq!(node.runtime.count("start c"), 2);
}

#[test]
fn a_pod_that_must_not_restart_stays_ended_and_keeps_its_exit_code_while_everybody_was_away() {
    let mut api = Api::new();
    api.put("job", "uid-job", json!({"restartPolicy": "Never", "containers": [one("c")]}));
    let mut node = Node::with_api(&api);
    let file = node.path("kubelet/pods/uid-job/pod.json");
    node.wait("is remembered", || std::fs::read_to_string(&file).is_ok_and(|text| text.contains("Running")));
    node.kill_kubelet();
    api.go_away();
    node.runtime.exit("c", 9);
    node.start_kubelet();
    let phase = |node: &Node| by_name(node, "job").and_then(|pod| pod.status.clone()?.phase);
    node.wait("failed", || phase(&node).as_deref() == Some("Failed"));
    node.kill_kubelet();
    node.start_kubelet();
    node.wait("failed again", || phase(&node).as_deref() == Some("Failed"));
    let status = by_name(&node, "job").unwrap().status.clone().unwrap();
    let one = &status.container_statuses.unwrap()[0];
    assert_eq!((one.restart_count, one.ready, one.started), (0, false, Some(false)));
    assert_eq!(one.state.as_ref().unwrap().terminated.as_ref().unwrap().exit_code, 9);
    assert_eq!(one.last_state, None);
    api.come_back();
    node.wait("the server is told", || api.phase("job") == "Failed");
    assert_eq!(node.runtime.count("start"), 1);
}
