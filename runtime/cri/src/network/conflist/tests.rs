//! Against plugins that are shell scripts: each appends what it was told to a journal.

use super::super::PortMapping;
use super::*;
use std::os::unix::fs::PermissionsExt as _;

struct Lab {
    dir: tempfile::TempDir,
    network: Conflist,
}

const PLUGIN: &str = r#"#!/bin/sh
dir=$(dirname "$0")
config=$(cat)
echo "$CNI_COMMAND $(basename "$0") id=$CNI_CONTAINERID if=$CNI_IFNAME ns=$CNI_NETNS $CNI_ARGS $config" >> "$dir/journal"
if [ -e "$dir/fail-$(basename "$0")-$CNI_COMMAND" ]; then
  echo '{"cniVersion":"1.1.0","code":11,"msg":"no address left","details":"range is full"}'
  exit 1
fi
if [ "$CNI_COMMAND" = ADD ]; then
  echo "{\"cniVersion\":\"1.1.0\",\"ips\":[{\"address\":\"10.9.0.7/24\"}],\"from\":\"$(basename "$0")\"}"
fi
"#;

fn lab() -> Lab {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for name in ["conf", "bin", "ns"] {
        fs::create_dir(path(name)).unwrap();
    }
    for name in ["bin/first", "bin/second"] {
        fs::write(path(name), PLUGIN).unwrap();
        fs::set_permissions(path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::write(path("conf/00-readme.txt"), "not a network").unwrap();
    fs::write(path("conf/20-later.conflist"), "{}").unwrap();
    fs::write(
        path("conf/10-net.conflist"),
        r#"{"cniVersion":"1.1.0","name":"pods","plugins":[
            {"type":"first","mtu":1400},
            {"type":"second","capabilities":{"portMappings":true,"bandwidth":false}}]}"#,
    )
    .unwrap();
    let network = Conflist::open(path("conf"), vec![path("nowhere"), path("bin")], path("cache")).unwrap();
    Lab { network, dir }
}

impl Lab {
    fn request(&self) -> NetworkRequest {
        NetworkRequest {
            sandbox_id: "sb1".into(),
            netns: self.dir.path().join("ns"),
            pod_name: "web-0".into(),
            pod_namespace: "default".into(),
            pod_uid: "u1".into(),
            port_mappings: vec![PortMapping {
                host_ip: None,
                host_port: 8080,
                container_port: 80,
                protocol: Protocol::Tcp,
            }],
            annotations: [("kubernetes.io/ingress-bandwidth".to_owned(), "10M".to_owned())].into(),
            cgroup_parent: String::new(),
        }
    }

    fn journal(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.path().join("bin/journal")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn fail(&self, what: &str) -> PathBuf {
        let path = self.dir.path().join("bin").join(format!("fail-{what}"));
        fs::write(&path, "").unwrap();
        path
    }
}

#[tokio::test]
async fn plugins_are_chained_and_undone_in_reverse_after_a_restart() {
    let lab = lab();
    let found = lab.network.attach(&lab.request()).await.unwrap();
    assert_eq!(found, ["10.9.0.7".parse::<IpAddr>().unwrap()]);
    let journal = lab.journal();
    assert!(journal[0].starts_with("ADD first id=sb1 if=eth0 ns=/"), "{}", journal[0]);
    assert!(journal[0].contains("K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=sb1;K8S_POD_UID=u1"));
    assert!(journal[0].contains(r#""mtu":1400"#) && !journal[0].contains("runtimeConfig"));
    assert!(journal[1].contains(r#""prevResult":{"cniVersion":"1.1.0","from":"first""#), "{}", journal[1]);
    assert!(journal[1].contains(r#""hostPort":8080"#) && !journal[1].contains("bandwidth"));

    // The configuration is gone and the service has been restarted: the cache knows what to undo.
    fs::remove_file(lab.dir.path().join("conf/10-net.conflist")).unwrap();
    let path = |name: &str| lab.dir.path().join(name);
    let again = Conflist::open(path("conf"), vec![path("bin")], path("cache")).unwrap();
    fs::remove_dir(path("ns")).unwrap();
    again.detach(&lab.request()).await.unwrap();
    let journal = lab.journal();
    assert!(journal[2].starts_with("DEL second id=sb1 if=eth0 ns= "), "{}", journal[2]);
    assert!(journal[2].contains(r#""from":"second""#));
    assert!(journal[3].starts_with("DEL first"));
    again.detach(&lab.request()).await.unwrap();
    assert_eq!(lab.journal().len(), 4, "a second detach has nothing to do");
}

#[tokio::test]
async fn a_plugins_error_object_becomes_the_message_and_the_chain_is_undone() {
    let lab = lab();
    lab.fail("second-ADD");
    let error = lab.network.attach(&lab.request()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        r#"network "pods": plugin second failed ADD: no address left: range is full (code 11)"#
    );
    let commands: Vec<_> =
        lab.journal().iter().map(|l| l.split(' ').take(2).collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(commands, ["ADD first", "ADD second", "DEL second", "DEL first"]);
    assert_eq!(fs::read_dir(lab.dir.path().join("cache")).unwrap().count(), 0);
}

#[tokio::test]
async fn what_belongs_to_no_sandbox_is_detached() {
    let lab = lab();
    lab.network.attach(&lab.request()).await.unwrap();
    lab.network.retain(&["sb1".to_owned()]).await.unwrap();
    assert_eq!(lab.journal().len(), 2);
    let failing = lab.fail("first-DEL");
    assert!(lab.network.retain(&[]).await.is_err());
    fs::remove_file(failing).unwrap();
    lab.network.retain(&[]).await.unwrap();
    assert_eq!(fs::read_dir(lab.dir.path().join("cache")).unwrap().count(), 0);
}

#[tokio::test]
async fn the_status_says_what_is_missing() {
    let lab = lab();
    lab.network.status().await.unwrap();
    assert!(lab.journal()[0].starts_with("STATUS first"));
    lab.fail("second-STATUS");
    assert!(lab.network.status().await.unwrap_err().to_string().contains("no address left"));
    fs::remove_dir_all(lab.dir.path().join("conf")).unwrap();
    assert!(lab.network.status().await.unwrap_err().to_string().contains("no network configuration"));
}

#[test]
fn bandwidth_quantities_are_bits_per_second() {
    assert_eq!(quantity("10M"), Some(10_000_000));
    assert_eq!(quantity("1Ki"), Some(1024));
    assert_eq!(quantity("7"), Some(7));
    assert_eq!((quantity("fast"), quantity("1.5M"), quantity("")), (None, None, None));
}
