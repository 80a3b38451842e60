//! What streams are connected to: commands, terminals, a container's own streams, a pod's ports.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use orlop_cri::streaming::StreamIo;
use orlop_proto::cri;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::sync::mpsc;

async fn read_until(stream: &mut DuplexStream, wanted: &str) -> String {
    let mut seen = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        let read = tokio::time::timeout(PATIENCE, stream.read(&mut buffer)).await;
        let read = read.unwrap_or_else(|_| panic!("{wanted:?} not in {:?}", String::from_utf8_lossy(&seen)));
        let read = read.unwrap();
        seen.extend_from_slice(&buffer[..read]);
        let text = String::from_utf8_lossy(&seen).into_owned();
        if text.contains(wanted) {
            return text;
        }
        assert_ne!(read, 0, "the stream ended before {wanted:?}: {text:?}");
    }
}

#[test]
fn a_command_gets_input_and_gives_output_and_code() {
    on_a_node(|node| async move {
        let service = node.open().await;
        let sandbox = run_sandbox(&service, node.sandbox("exec")).await;
        let id = create(&service, &sandbox, container("main", "sleep 1000")).await;
        start(&service, &id).await.unwrap();
        let target = service.stream_target();
        let (mut stdin, stdin_far) = duplex(1024);
        let (mut stdout, stdout_far) = duplex(1024);
        let (mut stderr, stderr_far) = duplex(1024);
        let io = StreamIo {
            stdin: Some(Box::new(stdin_far)),
            stdout: Some(Box::new(stdout_far)),
            stderr: Some(Box::new(stderr_far)),
            resize: None,
        };
        let request = cri::ExecRequest {
            container_id: id.clone(),
            cmd: ["/bin/sh", "-c", "cat; echo problem >&2; exit 6"].map(str::to_owned).to_vec(),
            stdin: true,
            stdout: true,
            stderr: true,
            ..Default::default()
        };
        let running = tokio::spawn(async move { target.exec(request, io).await });
        stdin.write_all(b"through and back").await.unwrap();
        read_until(&mut stdout, "through and back").await;
        drop(stdin);
        read_until(&mut stderr, "problem\n").await;
        assert_eq!(running.await.unwrap().unwrap(), 6);
        remove_sandbox(&service, &sandbox).await;
        node.assert_nothing_left();
    });
}

#[test]
fn a_terminal_has_the_size_of_the_client() {
    on_a_node(|node| async move {
        let service = node.open().await;
        let sandbox = run_sandbox(&service, node.sandbox("tty")).await;
        let id = create(&service, &sandbox, container("main", "sleep 1000")).await;
        start(&service, &id).await.unwrap();
        let target = service.stream_target();
        let (mut stdin, stdin_far) = duplex(1024);
        let (mut stdout, stdout_far) = duplex(1024);
        let (sizes, resize) = mpsc::channel(4);
        let io = StreamIo {
            stdin: Some(Box::new(stdin_far)),
            stdout: Some(Box::new(stdout_far)),
            stderr: None,
            resize: Some(resize),
        };
        let request = cri::ExecRequest {
            container_id: id.clone(),
            cmd: vec!["/bin/sh".into()],
            tty: true,
            stdin: true,
            stdout: true,
            stderr: false,
        };
        let running = tokio::spawn(async move { target.exec(request, io).await });
        sizes.send((132, 43)).await.unwrap();
        stdin
            .write_all(b"while ! busybox stty size | busybox grep -q '43 132'; do :; done; echo si''zed\n")
            .await
            .unwrap();
        read_until(&mut stdout, "sized").await;
        stdin.write_all(b"exit 8\n").await.unwrap();
        assert_eq!(running.await.unwrap().unwrap(), 8);
        remove_sandbox(&service, &sandbox).await;
        node.assert_nothing_left();
    });
}

#[test]
fn attaching_reaches_the_containers_own_streams() {
    on_a_node(|node| async move {
        let service = node.open().await;
        let sandbox = run_sandbox(&service, node.sandbox("attach")).await;
        let mut config = container("main", "while read line; do echo heard $line; done");
        config.stdin = true;
        let id = create(&service, &sandbox, config).await;
        start(&service, &id).await.unwrap();
        let target = service.stream_target();
        let (mut stdin, stdin_far) = duplex(1024);
        let (mut stdout, stdout_far) = duplex(1024);
        let io = StreamIo {
            stdin: Some(Box::new(stdin_far)),
            stdout: Some(Box::new(stdout_far)),
            ..StreamIo::default()
        };
        let request =
            cri::AttachRequest { container_id: id.clone(), stdin: true, stdout: true, ..Default::default() };
        let attached = tokio::spawn(async move { target.attach(request, io).await });
        stdin.write_all(b"you\n").await.unwrap();
        read_until(&mut stdout, "heard you\n").await;
        stop(&service, &id, 0).await;
        tokio::time::timeout(PATIENCE, attached).await.unwrap().unwrap().unwrap();
        remove_sandbox(&service, &sandbox).await;
        node.assert_nothing_left();
    });
}

#[test]
fn a_port_is_reached_inside_the_pods_network() {
    on_a_node(|node| async move {
        let service = node.open().await;
        let sandbox = run_sandbox(&service, node.sandbox("port")).await;
        let script = "exec busybox nc -ll -p 8080 -e /bin/cat";
        let id = create(&service, &sandbox, container("main", script)).await;
        start(&service, &id).await.unwrap();
        let target = service.stream_target();
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            let (mut near, far) = duplex(1024);
            let (target, of) = (target.clone(), sandbox.clone());
            let carried = tokio::spawn(async move { target.port_forward(&of, 8080, Box::new(far)).await });
            // Until the pod listens, the connection is refused and this end is broken.
            let _ = near.write_all(b"echo this").await;
            let mut answer = vec![0; 9];
            if near.read_exact(&mut answer).await.is_ok() {
                assert_eq!(answer, b"echo this");
                drop(near);
                carried.await.unwrap().unwrap();
                break;
            }
            assert!(std::time::Instant::now() < deadline, "{:?}", carried.await);
        }
        let (_near, far) = duplex(1024);
        let refused = target.port_forward(&sandbox, 9, Box::new(far)).await.unwrap_err();
        assert!(refused.to_string().contains("port 9"), "{refused}");
        remove_sandbox(&service, &sandbox).await;
        node.assert_nothing_left();
    });
}
