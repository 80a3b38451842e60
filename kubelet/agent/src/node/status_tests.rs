use super::*;
use crate::config::{Reserved, Threshold};
use crate::node::{Machine, Pressure, RuntimeFacts};
use k8s_openapi::api::core::v1::{NodeAddress, NodeFeatures, NodeRuntimeHandler, NodeRuntimeHandlerFeatures};
use serde_json::json;

pub(crate) fn facts() -> Facts {
    Facts {
        addresses: vec![
            NodeAddress { type_: "InternalIP".to_owned(), address: "10.0.0.7".to_owned() },
            NodeAddress { type_: "Hostname".to_owned(), address: "node-a".to_owned() },
        ],
        machine: Machine {
            cpus: 2,
            memory: 4 << 30,
            swap: 0,
            hugepages: [(2 << 20, 64 << 20), (1 << 30, 0)].into(),
            storage: Some(100 << 30),
            machine_id: "m".to_owned(),
            system_uuid: "s".to_owned(),
            boot_id: "b".to_owned(),
            kernel_version: "6.1".to_owned(),
            os_image: "Debian".to_owned(),
            architecture: "amd64".to_owned(),
        },
        runtime: RuntimeFacts {
            version: "orlop://0.1.0".to_owned(),
            handlers: vec![NodeRuntimeHandler {
                name: Some(String::new()),
                features: Some(NodeRuntimeHandlerFeatures {
                    recursive_read_only_mounts: Some(true),
                    user_namespaces: Some(false),
                }),
            }],
            features: Some(NodeFeatures { supplemental_groups_policy: Some(true) }),
        },
        images: vec![
            ImageFacts { digests: vec!["a@sha256:1".to_owned()], tags: vec!["a:1".to_owned()], size: 5 },
            ImageFacts { digests: vec!["b@sha256:2".to_owned()], tags: vec!["b:1".to_owned()], size: 9 },
        ],
        max_images: Some(50),
        max_pods: 110,
        pods_per_core: 0,
        reserved: Reserved {
            cpu: Amount::from_milli(100),
            memory: Amount::from_units(1 << 30),
            ephemeral_storage: Amount::from_units(1 << 30),
            memory_threshold: Threshold::Amount(Amount::from_units(100 << 20)),
            storage_threshold: Threshold::Share(0.1),
        },
        port: 10250,
        pressure: Pressure::default(),
        health: Health::Ready,
        declared_features: Vec::new(),
    }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

fn find_ready(status: &NodeStatus) -> &NodeCondition {
    find(status, "Ready").unwrap()
}

#[test]
fn a_whole_status_as_json() {
    let status = node_status(&facts(), &NodeStatus::default(), at(0));
    let condition = |kind, status, reason, message| {
        json!({
            "type": kind, "status": status, "reason": reason, "message": message,
            "lastHeartbeatTime": "2027-01-15T08:00:00Z", "lastTransitionTime": "2027-01-15T08:00:00Z",
        })
    };
    let expected = json!({
        "addresses": [
            {"type": "InternalIP", "address": "10.0.0.7"},
            {"type": "Hostname", "address": "node-a"},
        ],
        "capacity": {
            "cpu": "2", "memory": "4194304Ki", "hugepages-2Mi": "64Mi", "hugepages-1Gi": "0",
            "ephemeral-storage": "104857600Ki", "pods": "110",
        },
        "allocatable": {
            "cpu": "1900m", "memory": "2977792Ki", "hugepages-2Mi": "64Mi", "hugepages-1Gi": "0",
            "ephemeral-storage": "95563022336", "pods": "110",
        },
        "conditions": [
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
            condition("PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
            condition("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
        ],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": 10250}},
        "nodeInfo": {
            "architecture": "amd64", "bootID": "b", "containerRuntimeVersion": "orlop://0.1.0",
            "kernelVersion": "6.1", "kubeProxyVersion": "", "kubeletVersion": "v1.36.3", "machineID": "m",
            "operatingSystem": "linux", "osImage": "Debian", "systemUUID": "s",
        },
        "images": [
            {"names": ["b@sha256:2", "b:1"], "sizeBytes": 9},
            {"names": ["a@sha256:1", "a:1"], "sizeBytes": 5},
        ],
        "runtimeHandlers": [
            {"name": "", "features": {"recursiveReadOnlyMounts": true, "userNamespaces": false}},
        ],
        "features": {"supplementalGroupsPolicy": true},
    });
    assert_eq!(serde_json::to_value(&status).unwrap(), expected);
}

#[test]
fn a_transition_time_moves_only_with_the_status() {
    let first = node_status(&facts(), &NodeStatus::default(), at(0));
    let same = node_status(&facts(), &first, at(10));
    assert_eq!(find_ready(&same).last_transition_time, Some(Time(at(0))));
    assert_eq!(find_ready(&same).last_heartbeat_time, Some(Time(at(10))));
    let broken = Facts { health: Health::NotReady(vec!["network is not ready".to_owned()]), ..facts() };
    let after = node_status(&broken, &same, at(20));
    assert_eq!(find_ready(&after).status, "False");
    assert_eq!(find_ready(&after).reason.as_deref(), Some("KubeletNotReady"));
    assert_eq!(find_ready(&after).message.as_deref(), Some("network is not ready"));
    assert_eq!(find_ready(&after).last_transition_time, Some(Time(at(20))));
}

#[test]
fn readiness_stays_as_it_was_while_nothing_is_known() {
    let unknown = Facts { health: Health::Unknown, ..facts() };
    let ready = node_status(&facts(), &NodeStatus::default(), at(0));
    let kept = node_status(&unknown, &ready, at(5));
    assert_eq!(find_ready(&kept).status, "True");
    assert_eq!(find_ready(&kept).last_transition_time, Some(Time(at(0))));
    let fresh = node_status(&unknown, &NodeStatus::default(), at(5));
    assert_eq!(find_ready(&fresh).status, "False");
}

#[test]
fn what_others_own_is_left_alone() {
    let mut previous = node_status(&facts(), &NodeStatus::default(), at(0));
    previous.volumes_in_use = Some(vec!["v".to_owned()]);
    previous.capacity.as_mut().unwrap().insert("example.com/gpu".to_owned(), Quantity("2".to_owned()));
    let foreign = NodeCondition {
        type_: "NetworkUnavailable".to_owned(),
        status: "False".to_owned(),
        ..NodeCondition::default()
    };
    previous.conditions.as_mut().unwrap().push(foreign.clone());
    let status = node_status(&facts(), &previous, at(9));
    assert_eq!(status.volumes_in_use, previous.volumes_in_use);
    assert_eq!(status.capacity.unwrap()["example.com/gpu"].0, "2");
    assert!(status.conditions.unwrap().contains(&foreign));
}

#[test]
fn reservations_larger_than_the_machine_leave_nothing_rather_than_less() {
    let mut facts = facts();
    facts.reserved.memory = Amount::from_units(1 << 40);
    facts.reserved.cpu = Amount::from_units(64);
    let allocatable = node_status(&facts, &NodeStatus::default(), at(0)).allocatable.unwrap();
    assert_eq!((allocatable["memory"].0.as_str(), allocatable["cpu"].0.as_str()), ("0", "0"));
}

#[test]
fn pods_per_core_caps_the_number_of_pods() {
    let facts = Facts { pods_per_core: 10, ..facts() };
    let status = node_status(&facts, &NodeStatus::default(), at(0));
    assert_eq!(status.capacity.unwrap()["pods"].0, "20");
}

#[test]
fn only_the_largest_images_are_listed() {
    let facts = Facts { max_images: Some(1), ..facts() };
    let images = node_status(&facts, &NodeStatus::default(), at(0)).images.unwrap();
    assert_eq!(images.len(), 1);
    assert_eq!(images[0].size_bytes, Some(9));
}

#[test]
fn several_problems_are_listed_together() {
    let facts = Facts { health: Health::NotReady(vec!["a".to_owned(), "b".to_owned()]), ..facts() };
    let status = node_status(&facts, &NodeStatus::default(), at(0));
    assert_eq!(find_ready(&status).message.as_deref(), Some("[a, b]"));
}
