use super::*;
use crate::probes::tests::{Command, http_server, runtime};
use http::Response;
use http_body_util::Full;
use serde_json::json;
use std::sync::{Arc, Mutex};

async fn outcome(command: Command, handler: serde_json::Value, deadline: Duration) -> Result<(), String> {
    let cri = runtime(command);
    let handler: LifecycleHandler = serde_json::from_value(handler).unwrap();
    let (pod, container) = (Pod::default(), Container { name: "c".into(), ..Container::default() });
    let pod_ip = Some("127.0.0.1".parse().unwrap());
    let target = HookTarget { pod: &pod, container: &container, container_id: "id", pod_ip };
    run(&cri, target, &handler, deadline).await.map_err(|error| error.to_string())
}

fn no_command() -> Command {
    Arc::new(|_| panic!("no command is expected"))
}

const SOON: Duration = Duration::from_secs(5);

#[tokio::test]
async fn commands_succeed_fail_and_time_out() {
    let exec = json!({"exec": {"command": ["drain", "now"]}});
    let with = |result: Result<(i32, &'static str), u32>| -> Command {
        Arc::new(move |command| {
            assert_eq!(command, ["drain", "now"]);
            result
        })
    };
    assert_eq!(outcome(with(Ok((0, ""))), exec.clone(), SOON).await, Ok(()));
    let failed = outcome(with(Ok((3, "no"))), exec.clone(), SOON).await.unwrap_err();
    assert_eq!(failed, "command \"drain now\" exited with 3: no");
    let late = outcome(with(Err(4)), exec.clone(), SOON).await.unwrap_err();
    assert_eq!(late, "hook did not finish within 5s");
    let broken = outcome(with(Err(5)), exec, SOON).await.unwrap_err();
    assert!(broken.starts_with("cannot run command \"drain now\""), "{broken}");
}

#[tokio::test]
async fn requests_carry_their_headers_and_fall_back_to_plain_http() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&seen);
    let address = http_server(move |request| {
        let header = |name: &str| {
            request.headers().get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
        };
        let line =
            [request.uri().path().to_owned(), header("user-agent"), header("x-a"), header("authorization")];
        noted.lock().unwrap().push(line.join(" "));
        let mut response = Response::new(Full::default());
        *response.status_mut() = http::StatusCode::INTERNAL_SERVER_ERROR;
        response
    })
    .await;
    for scheme in ["HTTP", "HTTPS"] {
        let get = json!({"httpGet": {"port": address.port(), "path": "stop", "scheme": scheme, "httpHeaders": [
            {"name": "X-A", "value": "1"}, {"name": "Authorization", "value": "secret"}]}});
        assert_eq!(outcome(no_command(), get, SOON).await, Ok(()));
    }
    let expected = ["/stop kube-lifecycle/1.36 1 secret", "/stop kube-lifecycle/1.36 1 "];
    assert_eq!(*seen.lock().unwrap(), expected);
    let nobody = json!({"httpGet": {"port": 1, "path": "/"}});
    let error = outcome(no_command(), nobody, SOON).await.unwrap_err();
    assert!(error.starts_with("Get \"http://127.0.0.1:1/\": dial tcp 127.0.0.1:1: connect: "), "{error}");
}

#[tokio::test(start_paused = true)]
async fn sleeping_ends_by_itself_or_at_the_deadline() {
    let sleep = json!({"sleep": {"seconds": 3}});
    assert_eq!(outcome(no_command(), sleep.clone(), SOON).await, Ok(()));
    let cut = outcome(no_command(), sleep, Duration::from_secs(2)).await.unwrap_err();
    assert_eq!(cut, "hook did not finish within 2s");
}

#[tokio::test]
async fn handlers_that_do_not_exist_are_refused() {
    let socket = outcome(no_command(), json!({"tcpSocket": {"port": 80}}), SOON).await.unwrap_err();
    assert_eq!(socket, "hook of type tcpSocket is not supported; use exec, httpGet or sleep");
    assert_eq!(outcome(no_command(), json!({}), SOON).await, Err("hook names no handler".into()));
}
