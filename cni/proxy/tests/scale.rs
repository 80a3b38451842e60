//! Five thousand services with ten endpoints each: how long the rules take, in a namespace of its own.

#![allow(clippy::unwrap_used)]

use orlop_net::netns::Netns;
use orlop_net::nft::NftSocket;
use orlop_proxy::layout::Settings;
use orlop_proxy::model::ServiceMap;
use orlop_proxy::objects::{EndpointSlice, Service};
use orlop_proxy::plan::Planner;
use orlop_proxy::select::Place;
use serde_json::json;
use std::time::{Duration, Instant};

const SERVICES: u32 = 5000;
const ENDPOINTS: u32 = 10;

fn service(i: u32) -> Service {
    let ip = std::net::Ipv4Addr::from(0x0a60_0000 + i);
    let spec = json!({"clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 80, "protocol": "TCP"}]});
    serde_json::from_value(json!({"metadata": {"name": format!("s{i}"), "namespace": "n"}, "spec": spec}))
        .unwrap()
}

fn slice(i: u32, count: u32) -> EndpointSlice {
    let endpoint = |j| {
        let ip = std::net::Ipv4Addr::from(0x0a01_0000 + i * ENDPOINTS + j);
        json!({"addresses": [ip], "nodeName": format!("node-{}", j % 100), "conditions": {"ready": true}})
    };
    serde_json::from_value(json!({
        "metadata": {
            "name": format!("s{i}-1"), "namespace": "n",
            "labels": {"kubernetes.io/service-name": format!("s{i}")},
        },
        "addressType": "IPv4",
        "endpoints": (0..count).map(endpoint).collect::<Vec<_>>(),
        "ports": [{"port": 8080, "protocol": "TCP"}],
    }))
    .unwrap()
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_large_cluster_is_written_in_seconds_and_changed_in_milliseconds() {
    let before = resident_kib();
    let mut map = ServiceMap::new(Place { node: "us".into(), zone: None }, false, Vec::new());
    map.replace_services((0..SERVICES).map(service).collect());
    map.replace_slices((0..SERVICES).map(|i| slice(i, ENDPOINTS)).collect());
    let namespace = Netns::create().expect("these tests need root");
    let mut nft = namespace.run(|| NftSocket::open().unwrap()).unwrap();
    let mut planner = Planner::new(Settings { masquerade_mark: 0x4000, ..Settings::default() }, false);

    let started = Instant::now();
    map.take_changes();
    let chosen = started.elapsed();
    let batch = planner.replace(map.routes());
    let planned = started.elapsed();
    nft.commit(&batch).unwrap();
    let first = started.elapsed();
    drop(batch);
    println!("first sync: chosen {chosen:?}, planned {planned:?}, committed {first:?}");

    let started = Instant::now();
    nft.commit(&planner.replace(map.routes())).unwrap();
    println!("the same over an existing table: {:?}", started.elapsed());

    let mut slowest = Duration::ZERO;
    for i in 0..20 {
        let started = Instant::now();
        map.apply_slice(slice(i * 7, ENDPOINTS - 1));
        let batch = planner.update(&map.take_changes());
        let planned = started.elapsed();
        nft.commit(&batch).unwrap();
        println!("change {i}: planned {planned:?}, committed {:?}", started.elapsed());
        slowest = slowest.max(started.elapsed());
    }
    println!("one change: {slowest:?} at most; resident {} KiB more", resident_kib() - before);
    // Generous: the profile is the unoptimised one, and other tests run beside this one.
    assert!(first < Duration::from_secs(20), "{first:?}");
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
}
