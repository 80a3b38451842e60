//! The CRI on a real keeper, with real containers.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use orlop_proto::cri;
use orlop_proto::cri::runtime_service_server::RuntimeService;
use std::fs;
use std::time::{Duration, Instant};
use tokio_stream::StreamExt as _;
use tonic::{Code, Request};

#[test]
fn a_pod_lives_and_leaves_nothing_behind() {
    on_a_node(|node| async move {
        let service = node.open().await;
        let sandbox = run_sandbox(&service, node.sandbox("web")).await;
        assert_eq!(sandbox.len(), 64);
        let again = cri::RunPodSandboxRequest { config: Some(node.sandbox("web")), ..Default::default() };
        let refused = service.run_pod_sandbox(Request::new(again)).await.unwrap_err();
        assert_eq!(refused.code(), Code::AlreadyExists, "{refused}");

        let mut config = container(
            "main",
            "echo to stdout; echo to stderr >&2; hostname; trap 'exit 3' TERM; while :; do sleep 0.1; done",
        );
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().run_as_username = "web".into();
        let id = create(&service, &sandbox, config).await;
        assert_eq!(status(&service, &id).await.state(), cri::ContainerState::ContainerCreated);
        start(&service, &id).await.unwrap();
        assert_eq!(start(&service, &id).await.unwrap_err().code(), Code::FailedPrecondition);
        let running = status(&service, &id).await;
        assert_eq!(running.state(), cri::ContainerState::ContainerRunning);
        assert!(running.started_at >= running.created_at);
        let user = running.user.unwrap().linux.unwrap();
        assert_eq!((user.uid, user.gid, user.supplemental_groups), (101, 102, vec![102, 300]));

        let answer = exec(
            &service,
            &id,
            &["/bin/sh", "-c", "id -u; cat /etc/hosts /etc/resolv.conf; echo $FROM; echo bad >&2; exit 5"],
            10,
        )
        .await
        .unwrap();
        let stdout = String::from_utf8(answer.stdout).unwrap();
        assert_eq!((answer.exit_code, answer.stderr.as_slice()), (5, b"bad\n".as_slice()));
        assert!(stdout.starts_with("101\n"), "{stdout}");
        for expected in ["10.88.0.2\tweb", "nameserver 10.96.0.10", "\nimage\n"] {
            assert!(stdout.contains(expected), "{expected:?} is not in {stdout}");
        }

        let stats = cri::ContainerStatsRequest { container_id: id.clone() };
        let stats = service.container_stats(Request::new(stats)).await.unwrap().into_inner().stats.unwrap();
        assert!(stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value > 0);

        stop(&service, &id, 10).await;
        let ended = status(&service, &id).await;
        assert_eq!((ended.exit_code, ended.reason.as_str()), (3, "Error"));
        assert!(ended.finished_at >= ended.started_at);
        let log = fs::read_to_string(node.path("logs/main.log")).unwrap();
        assert!(log.contains("stdout F to stdout\n") && log.contains("stderr F to stderr\n"), "{log}");

        remove_sandbox(&service, &sandbox).await;
        remove_sandbox(&service, &sandbox).await;
        assert!(node.path("logs/main.log").exists(), "logs belong to the kubelet");
        assert_eq!(*node.network.calls.lock().unwrap(), ["retain 0", "attach web", "detach web"]);
        node.assert_nothing_left();
    });
}

#[test]
fn exit_codes_and_reasons_are_exact() {
    on_a_node(|node| async move {
        let service = node.open().await;
        let sandbox = run_sandbox(&service, node.sandbox("codes")).await;
        for (name, script, code, reason) in [
            ("ok", "exit 0", 0, "Completed"),
            ("bad", "exit 42", 42, "Error"),
            ("killed", "kill -9 $$", 137, "Error"),
        ] {
            let mut config = container(name, script);
            // A shell that is process 1 of its namespace cannot kill itself.
            config.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options =
                Some(options(if name == "killed" {
                    cri::NamespaceMode::Node
                } else {
                    cri::NamespaceMode::Container
                }));
            let id = create(&service, &sandbox, config).await;
            start(&service, &id).await.unwrap();
            let ended = exited(&service, &id).await;
            assert_eq!((ended.exit_code, ended.reason.as_str()), (code, reason), "{name}");
            assert!(ended.started_at > 0 && ended.finished_at >= ended.started_at);
        }
        let mut missing = container("missing", "");
        missing.command = vec!["/bin/no-such-program".into()];
        let id = create(&service, &sandbox, missing).await;
        let error = start(&service, &id).await.unwrap_err();
        assert!(error.message().contains("no-such-program"), "{error}");
        let ended = status(&service, &id).await;
        assert_eq!((ended.exit_code, ended.reason.as_str()), (128, "StartError"));
        assert_eq!(ended.state(), cri::ContainerState::ContainerExited);
        remove_sandbox(&service, &sandbox).await;
        node.assert_nothing_left();
    });
}

#[test]
fn stopping_waits_then_kills_and_a_later_call_may_hurry() {
    on_a_node(|node| async move {
        let service = node.open().await;
        let sandbox = run_sandbox(&service, node.sandbox("stubborn")).await;
        let id =
            create(&service, &sandbox, container("main", "trap '' TERM; while :; do sleep 0.1; done")).await;
        start(&service, &id).await.unwrap();
        let patient = {
            let (service, id) = (service.clone(), id.clone());
            tokio::spawn(async move { stop(&service, &id, 600).await })
        };
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(status(&service, &id).await.state(), cri::ContainerState::ContainerRunning);
        let began = Instant::now();
        stop(&service, &id, 1).await;
        assert!(began.elapsed() < Duration::from_secs(10));
        patient.await.unwrap();
        assert_eq!(status(&service, &id).await.exit_code, 137);
        stop(&service, &id, 1).await;
        remove_sandbox(&service, &sandbox).await;
        node.assert_nothing_left();
    });
}

#[test]
fn a_command_past_its_time_is_killed() {
    on_a_node(|node| async move {
        let service = node.open().await;
        let sandbox = run_sandbox(&service, node.sandbox("slow")).await;
        let id = create(&service, &sandbox, container("main", "sleep 1000")).await;
        assert_eq!(
            exec(&service, &id, &["/bin/true"], 5).await.unwrap_err().code(),
            Code::FailedPrecondition
        );
        start(&service, &id).await.unwrap();
        let error = exec(&service, &id, &["/bin/sleep", "4242"], 1).await.unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
        let processes = exec(&service, &id, &["/bin/ps"], 5).await.unwrap();
        let processes = String::from_utf8(processes.stdout).unwrap();
        assert!(!processes.contains("4242"), "{processes}");
        assert_eq!(exec(&service, "nothing", &["/bin/true"], 1).await.unwrap_err().code(), Code::NotFound);
        remove_sandbox(&service, &sandbox).await;
        node.assert_nothing_left();
    });
}

#[test]
fn a_new_service_finds_what_runs_and_what_ended_meanwhile() {
    on_a_node(|node| async move {
        let service = node.open().await;
        let sandbox = run_sandbox(&service, node.sandbox("kept")).await;
        let running = create(&service, &sandbox, container("running", "sleep 1000")).await;
        let ending = create(&service, &sandbox, container("ending", "sleep 1; exit 9")).await;
        let waiting = create(&service, &sandbox, container("waiting", "exit 0")).await;
        for id in [&running, &ending] {
            start(&service, id).await.unwrap();
        }
        let before = status(&service, &running).await;
        drop(service);
        tokio::time::sleep(Duration::from_secs(2)).await;
        let service = node.open().await;
        assert_eq!(status(&service, &running).await, before);
        let ended = exited(&service, &ending).await;
        assert_eq!((ended.exit_code, ended.reason.as_str()), (9, "Error"));
        start(&service, &waiting).await.unwrap();
        assert_eq!(exited(&service, &waiting).await.exit_code, 0);
        exec(&service, &running, &["/bin/true"], 5).await.unwrap();
        let list =
            service.list_pod_sandbox(Request::new(cri::ListPodSandboxRequest::default())).await.unwrap();
        assert_eq!(list.into_inner().items[0].state(), cri::PodSandboxState::SandboxReady);
        remove_sandbox(&service, &sandbox).await;
        node.assert_nothing_left();
    });
}

#[test]
fn a_sandbox_whose_network_fails_is_undone() {
    on_a_node(|node| async move {
        let service = node.open().await;
        *node.network.fail_attach.lock().unwrap() = Some("no address left".into());
        let request =
            cri::RunPodSandboxRequest { config: Some(node.sandbox("unlucky")), ..Default::default() };
        let error = service.run_pod_sandbox(Request::new(request)).await.unwrap_err();
        assert!(error.message().contains("no address left"), "{error}");
        node.assert_nothing_left();
        let sandbox = run_sandbox(&service, node.sandbox("unlucky")).await;
        remove_sandbox(&service, &sandbox).await;
        node.assert_nothing_left();
    });
}

#[test]
fn containers_of_a_shared_pid_namespace_see_each_other() {
    on_a_node(|node| async move {
        let service = node.open().await;
        let mut config = node.sandbox("shared");
        config.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options =
            Some(options(cri::NamespaceMode::Pod));
        let sandbox = run_sandbox(&service, config).await;
        let shared = |name: &str, script: &str| {
            let mut config = container(name, script);
            config.linux.as_mut().unwrap().security_context.as_mut().unwrap().namespace_options =
                Some(options(cri::NamespaceMode::Pod));
            config
        };
        let first = create(&service, &sandbox, shared("first", "exec sleep 31337")).await;
        let second = create(&service, &sandbox, shared("second", "exec sleep 1000")).await;
        for id in [&first, &second] {
            start(&service, id).await.unwrap();
        }
        let seen = exec(&service, &second, &["/bin/ps"], 5).await.unwrap();
        let seen = String::from_utf8(seen.stdout).unwrap();
        assert!(seen.contains("31337") && seen.contains("/pause"), "{seen}");
        stop(&service, &first, 0).await;
        assert_eq!(status(&service, &second).await.state(), cri::ContainerState::ContainerRunning);
        remove_sandbox(&service, &sandbox).await;
        node.assert_nothing_left();
    });
}

#[test]
fn events_tell_of_every_step() {
    on_a_node(|node| async move {
        let service = node.open().await;
        let mut events =
            service.get_container_events(Request::new(cri::GetEventsRequest {})).await.unwrap().into_inner();
        let sandbox = run_sandbox(&service, node.sandbox("told")).await;
        let id = create(&service, &sandbox, container("main", "exit 4")).await;
        start(&service, &id).await.unwrap();
        exited(&service, &id).await;
        remove_sandbox(&service, &sandbox).await;
        let mut seen = Vec::new();
        while seen.len() < 8 {
            let event = tokio::time::timeout(PATIENCE, events.next()).await.unwrap().unwrap().unwrap();
            let who = if event.container_id == id { "container" } else { "sandbox" };
            let what = event.container_event_type().as_str_name().to_owned();
            if what == "CONTAINER_STOPPED_EVENT" && who == "container" {
                assert_eq!(event.containers_statuses[0].exit_code, 4);
            }
            seen.push(format!("{who} {what}"));
        }
        let of = |who: &str| -> Vec<String> {
            let mine = seen.iter().filter_map(|e| e.strip_prefix(who));
            mine.map(|e| e.trim_start_matches(" CONTAINER_").trim_end_matches("_EVENT").to_owned()).collect()
        };
        assert_eq!(of("sandbox"), ["CREATED", "STARTED", "STOPPED", "DELETED"]);
        assert_eq!(of("container"), ["CREATED", "STARTED", "STOPPED", "DELETED"]);
        node.assert_nothing_left();
    });
}
