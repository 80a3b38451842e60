//! The program itself, as a runtime calls it.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use orlop_net::netns::Netns;
use serde_json::{Value, json};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

struct Call<'a> {
    node: &'a Netns,
    program: &'a str,
    id: &'a str,
    netns: String,
}

impl Call<'_> {
    /// Exit status and what was on standard output.
    fn run(&self, command: &str, stdin: &str) -> (bool, Value) {
        let child = || {
            let mut child = Command::new(env!("CARGO_BIN_EXE_orlop-cni"))
                .arg0(self.program)
                .env("CNI_COMMAND", command)
                .env("CNI_CONTAINERID", self.id)
                .env("CNI_NETNS", &self.netns)
                .env("CNI_IFNAME", "eth0")
                .env("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAME=p")
                .env("CNI_PATH", "/opt/cni/bin")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            // A program that fails early does not read it.
            let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
            child.wait_with_output().unwrap()
        };
        let out = self.node.run(child).unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        let value = if text.is_empty() { Value::Null } else { serde_json::from_str(&text).expect(&text) };
        (out.status.success(), value)
    }
}

fn config(version: &str, dir: &std::path::Path, more: &Value) -> Value {
    let mut config = json!({
        "cniVersion": version, "name": "test", "type": "orlop-cni", "bridge": "cni9", "mtu": 1400,
        "isDefaultGateway": true, "ipMasq": true, "hairpinMode": true,
        "ipam": {"type": "host-local", "dataDir": dir, "ranges": [[{"subnet": "10.5.0.0/24", "rangeStart": "10.5.0.20"}]]},
        "capabilities": {"portMappings": true},
    });
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

#[test]
fn a_pod_is_added_checked_and_deleted_in_every_version() {
    let (node, _outside) = node_and_outside();
    let dir = tempfile::tempdir().unwrap();
    for version in ["0.2.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let pod = Netns::create().unwrap();
        let path = path_of(&pod).display().to_string();
        let call = Call { node: &node, program: "orlop-cni", id: "pod", netns: path.clone() };
        let conf = config(version, dir.path(), &json!({})).to_string();
        let (ok, result) = call.run("ADD", &conf);
        assert!(ok, "{version}: {result}");
        assert_eq!(result["cniVersion"], version);
        let address = if version == "0.2.0" { &result["ip4"]["ip"] } else { &result["ips"][0]["address"] };
        let address = address.as_str().unwrap().to_owned();
        assert!(address.starts_with("10.5.0.2") && address.ends_with("/24"), "{address}");
        if version != "0.2.0" {
            assert_eq!(result["interfaces"][2]["name"], "eth0");
            assert_eq!(result["interfaces"][2]["sandbox"], path);
            assert_eq!(result["routes"][0], json!({"dst": "0.0.0.0/0", "gw": "10.5.0.1"}));
            assert_eq!(result["ips"][0].get("version").is_some(), version.starts_with("0."));
            assert_eq!(result["interfaces"][2].get("mtu").is_some(), version == "1.1.0");
        }
        assert!(output(&pod, "ip", &["addr", "show", "eth0"]).contains(&address));
        assert!(output(&pod, "ip", &["link", "show", "eth0"]).contains("mtu 1400"));

        let (ok, twice) = call.run("ADD", &conf);
        assert!(!ok && twice["code"].as_u64().unwrap() >= 100, "{twice}");
        let with_result = config(version, dir.path(), &json!({"prevResult": result})).to_string();
        let (ok, answer) = call.run("CHECK", &with_result);
        assert!(ok, "{version}: {answer}");
        output(&pod, "ip", &["addr", "flush", "dev", "eth0"]);
        let (ok, answer) = call.run("CHECK", &with_result);
        assert!(!ok && answer["msg"].as_str().unwrap().contains("lacks"), "{answer}");
        for _ in 0..2 {
            let (ok, answer) = call.run("DEL", &with_result);
            assert!(ok && answer.is_null(), "{answer}");
        }
        assert!(!output(&node, "ip", &["-br", "link"]).contains("veth"));
    }
}

#[test]
fn deleting_works_when_the_namespace_is_gone_and_collecting_drops_the_rest() {
    let (node, _outside) = node_and_outside();
    let dir = tempfile::tempdir().unwrap();
    let conf = config("1.1.0", dir.path(), &json!({})).to_string();
    let pods: Vec<Netns> = (0..3).map(|_| Netns::create().unwrap()).collect();
    for (id, pod) in ["a", "b", "c"].iter().zip(&pods) {
        let call = Call { node: &node, program: "orlop-cni", id, netns: path_of(pod).display().to_string() };
        let (ok, answer) = call.run("ADD", &conf);
        assert!(ok, "{answer}");
    }
    drop(pods);
    let call = Call { node: &node, program: "orlop-cni", id: "a", netns: String::new() };
    assert!(call.run("DEL", &conf).0);
    let valid = json!({"cni.dev/valid-attachments": [{"containerID": "c", "ifname": "eth0"}]});
    let (ok, answer) = call.run("GC", &config("1.1.0", dir.path(), &valid).to_string());
    assert!(ok, "{answer}");
    let left: Vec<String> = std::fs::read_dir(dir.path().join("test"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("10."))
        .collect();
    assert_eq!(left, ["10.5.0.22"]);
    assert!(call.run("STATUS", &conf).0);
}

#[test]
fn as_flannel_it_takes_its_subnet_from_the_overlay() {
    let (node, _outside) = node_and_outside();
    let dir = tempfile::tempdir().unwrap();
    let env = dir.path().join("subnet.env");
    let conf = json!({
        "cniVersion": "0.3.1", "name": "cbr0", "type": "flannel", "subnetFile": env, "stateDir": dir.path(),
        "delegate": {"hairpinMode": true, "isDefaultGateway": true},
    })
    .to_string();
    let pod = Netns::create().unwrap();
    let call = Call {
        node: &node,
        program: "/opt/cni/bin/flannel",
        id: "pod",
        netns: path_of(&pod).display().to_string(),
    };
    let (ok, answer) = call.run("ADD", &conf);
    assert!(!ok && answer["code"] == 11, "{answer}");
    let text =
        "FLANNEL_NETWORK=10.6.0.0/16\nFLANNEL_SUBNET=10.6.3.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
    std::fs::write(&env, text).unwrap();
    let (ok, result) = call.run("ADD", &conf);
    assert!(ok, "{result}");
    assert_eq!(result["ips"][0]["address"], "10.6.3.2/24");
    assert_eq!(result["interfaces"][0]["name"], "cni0");
    let routes = output(&pod, "ip", &["route"]);
    assert!(
        routes.contains("10.6.0.0/16 via 10.6.3.1") && routes.contains("default via 10.6.3.1"),
        "{routes}"
    );
    // The overlay masquerades.
    assert!(!output(&node, "nft", &["list", "ruleset"]).contains("orlop-egress"));
    std::fs::remove_file(&env).unwrap();
    assert!(call.run("DEL", &conf).0);
}

#[test]
fn host_ports_of_the_runtime_are_mapped() {
    let (node, outside) = node_and_outside();
    let dir = tempfile::tempdir().unwrap();
    let pod = Netns::create().unwrap();
    let _server = Server::start(&pod, "0.0.0.0:80");
    let more = json!({"runtimeConfig": {"portMappings": [
        {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
        {"hostPort": 0, "containerPort": 81, "protocol": "tcp"},
    ]}});
    let conf = config("1.0.0", dir.path(), &more).to_string();
    let call =
        Call { node: &node, program: "orlop-cni", id: "pod", netns: path_of(&pod).display().to_string() };
    assert!(call.run("ADD", &conf).0);
    assert_eq!(connect(&outside, ip("192.0.2.1"), 8080).unwrap(), "192.0.2.2");
    assert!(call.run("DEL", &conf).0);
    assert!(connect(&outside, ip("192.0.2.1"), 8080).is_err());
}

#[test]
fn garbage_is_answered_with_a_code() {
    let (node, _outside) = node_and_outside();
    let dir = tempfile::tempdir().unwrap();
    let good = config("1.0.0", dir.path(), &json!({})).to_string();
    let call = |id, netns: &str| Call { node: &node, program: "orlop-cni", id, netns: netns.to_owned() };
    let code = |answer: (bool, Value)| {
        assert!(!answer.0);
        answer.1["code"].as_u64().unwrap()
    };
    for (stdin, expected) in [
        ("", 6),
        ("{", 6),
        ("[]", 6),
        ("null", 6),
        ("{\"name\": 5}", 6),
        ("{}", 7),
        ("{\"cniVersion\": \"9.9.9\", \"name\": \"x\"}", 1),
        ("{\"cniVersion\": \"1.0.0\", \"name\": \"x\"}", 7),
        (
            "{\"cniVersion\": \"1.0.0\", \"name\": \"x\", \"ipam\": {\"ranges\": [[{\"subnet\": \"10.0.0.0/31\"}]]}}",
            7,
        ),
    ] {
        assert_eq!(code(call("pod", "/proc/self/ns/net").run("ADD", stdin)), expected, "{stdin}");
    }
    assert_eq!(code(call("", "/n").run("ADD", &good)), 4);
    assert_eq!(code(call("../x", "/n").run("ADD", &good)), 4);
    assert_eq!(code(call("pod", "").run("ADD", &good)), 4);
    assert_eq!(code(call("pod", "/nothing/there").run("ADD", &good)), 5);
    assert_eq!(code(call("pod", "/n").run("SING", &good)), 4);
    assert_eq!(code(call("pod", "/n").run("CHECK", &good)), 7);
    assert_eq!(code(call("pod", "/n").run("GC", &good)), 7);
    let escape = config("1.0.0", dir.path(), &json!({"name": "../../x"})).to_string();
    assert_eq!(code(call("pod", "/n").run("ADD", &escape)), 7);
    let (ok, version) = call("", "").run("VERSION", "{\"cniVersion\": \"0.4.0\"}");
    assert!(ok);
    assert_eq!(version["supportedVersions"].as_array().unwrap().len(), 7);
    assert!(!output(&node, "ip", &["-br", "link"]).contains("veth"));
}
