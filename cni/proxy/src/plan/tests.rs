use super::*;
use crate::model::ServiceMap;
use crate::objects::{Endpoint, EndpointPort, EndpointSlice, Protocol, Service, ServicePort, TrafficPolicy};
use crate::select::Place;
use orlop_net::nft::Op;
use proptest::prelude::*;

type Elements = HashMap<(Value, Option<RangeEnd>), Option<ElementData>>;

/// The elements of a kernel that takes batches, and as strict as it.
#[derive(Debug, Default, PartialEq)]
struct Kernel {
    sets: HashMap<(String, String), Elements>,
    chains: BTreeSet<(String, String)>,
}

impl Kernel {
    fn commit(&mut self, batch: &Batch) {
        for op in &batch.ops {
            match op {
                Op::DeleteTable { table } => {
                    self.sets.retain(|(of, _), _| *of != table.to_string());
                    self.chains.retain(|(of, _)| *of != table.to_string());
                }
                Op::AddChain { table, chain } => {
                    assert!(
                        self.chains.insert((table.to_string(), chain.name.clone())),
                        "{chain:?} is there"
                    );
                }
                Op::AddElements { table, set, elements } => {
                    for element in elements {
                        if let Some(ElementData::Verdict(Verdict::Goto(chain))) = &element.data {
                            assert!(self.chains.contains(&(table.to_string(), chain.clone())), "no {chain}");
                        }
                        let key = (element.key.clone(), element.end.clone());
                        let set = self.sets.entry((table.to_string(), set.clone())).or_default();
                        assert_eq!(
                            set.insert(key, element.data.clone()),
                            None,
                            "{element:?} is there already"
                        );
                    }
                }
                Op::DeleteElements { table, set, elements } => {
                    for element in elements {
                        let key = (element.key.clone(), element.end.clone());
                        let set = self.sets.get_mut(&(table.to_string(), set.clone())).unwrap();
                        assert!(set.remove(&key).is_some(), "{element:?} is not there");
                    }
                }
                _ => {}
            }
        }
        self.sets.retain(|_, elements| !elements.is_empty());
    }

    fn elements(&self) -> usize {
        self.sets.values().map(HashMap::len).sum()
    }
}

fn settings() -> Settings {
    Settings { masquerade_mark: 0x4000, ..Settings::default() }
}

fn map() -> ServiceMap {
    let place = Place { node: "us".into(), zone: None };
    ServiceMap::new(place, true, vec!["192.0.2.1".parse().unwrap()])
}

fn slice(service: u8, number: u8, endpoints: &[(u8, bool, bool)]) -> EndpointSlice {
    let endpoint = |(ip, ready, here): &(u8, bool, bool)| Endpoint {
        ips: vec![IpAddr::from([10, 1, 0, *ip])],
        ready: *ready,
        serving: true,
        terminating: !ready,
        node: Some(if *here { "us" } else { "them" }.into()),
        zone_hints: None,
        node_hints: None,
    };
    let port = |protocol| EndpointPort { name: "".into(), protocol, port: 8080 };
    EndpointSlice {
        key: format!("n/{service}-{number}").into(),
        service: Some(format!("n/{service}").into()),
        endpoints: endpoints.iter().map(endpoint).collect(),
        ports: vec![port(Protocol::Tcp), port(Protocol::Udp)],
    }
}

#[derive(Debug, Clone)]
enum Event {
    Service(Box<Service>),
    Gone(u8),
    Slice(EndpointSlice),
    SliceGone(u8, u8),
}

fn policy() -> impl Strategy<Value = TrafficPolicy> {
    prop_oneof![Just(TrafficPolicy::Cluster), Just(TrafficPolicy::Local)]
}

fn service() -> impl Strategy<Value = Service> {
    let port =
        (any::<bool>(), 1..3u16, prop::option::of(30_000..30_003u16)).prop_map(|(udp, port, node_port)| {
            let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
            ServicePort { name: "".into(), protocol, port, node_port }
        });
    let ip = |network: u8| (1..4u8).prop_map(move |ip| IpAddr::from([10, network, 0, ip]));
    let ranges = prop::collection::vec(prop_oneof![Just("10.0.0.0/8"), Just("10.1.0.0/16")], 0..3);
    (
        (0..4u8, 0..3u8, ip(96)),
        prop::collection::vec(port, 0..3),
        prop::collection::vec(ip(96), 0..2),
        prop::collection::vec(ip(97), 0..2),
        ranges,
        (policy(), policy(), prop::option::of(1..3u32)),
    )
        .prop_map(|((name, created, ip), ports, external_ips, load_balancer_ips, ranges, rest)| {
            Service {
                key: format!("n/{name}").into(),
                created: created.to_string().into(),
                cluster_ips: vec![ip],
                external_ips,
                load_balancer_ips,
                source_ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
                ports,
                internal_policy: rest.0,
                external_policy: rest.1,
                affinity: rest.2,
            }
        })
}

fn event() -> impl Strategy<Value = Event> {
    let endpoints = prop::collection::vec((1..8u8, any::<bool>(), any::<bool>()), 0..5);
    prop_oneof![
        3 => service().prop_map(|service| Event::Service(Box::new(service))),
        1 => (0..4u8).prop_map(Event::Gone),
        3 => (0..4u8, 0..2u8, endpoints).prop_map(|(service, number, list)| {
            Event::Slice(slice(service, number, &list))
        }),
        1 => (0..4u8, 0..2u8).prop_map(|(service, number)| Event::SliceGone(service, number)),
    ]
}

fn apply(map: &mut ServiceMap, event: Event) {
    match event {
        Event::Service(service) => map.apply_service(*service),
        Event::Gone(name) => map.delete_service(&format!("n/{name}")),
        Event::Slice(slice) => map.apply_slice(slice),
        Event::SliceGone(service, number) => map.delete_slice(&format!("n/{service}-{number}")),
    }
}

proptest! {
    #[test]
    fn changes_step_by_step_end_where_writing_everything_does(
        events in prop::collection::vec((event(), any::<bool>()), 1..40)
    ) {
        let mut map = map();
        let mut planner = Planner::new(settings(), true);
        let mut stepwise = Kernel::default();
        stepwise.commit(&planner.replace(map.routes()));
        for (event, sync) in events {
            apply(&mut map, event);
            if sync {
                stepwise.commit(&planner.update(&map.take_changes()));
            }
        }
        stepwise.commit(&planner.update(&map.take_changes()));
        let mut whole = Kernel::default();
        whole.commit(&Planner::new(settings(), true).replace(map.routes()));
        prop_assert_eq!(&stepwise.sets, &whole.sets);
        // Chains for counts that were needed once may stay.
        prop_assert!(stepwise.chains.is_superset(&whole.chains));
        prop_assert_eq!(planner.expected().count(), whole.elements());
    }
}

fn plain(name: u8) -> Service {
    Service {
        key: format!("n/{name}").into(),
        created: "".into(),
        cluster_ips: vec![IpAddr::from([10, 96, 0, name])],
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        ports: vec![ServicePort { name: "".into(), protocol: Protocol::Tcp, port: 80, node_port: None }],
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        affinity: None,
    }
}

#[test]
fn one_endpoint_more_touches_its_slot_and_the_count_of_its_service_only() {
    let mut map = map();
    for name in 1..20 {
        map.apply_service(plain(name));
        map.apply_slice(slice(name, 0, &[(1, true, false), (2, true, false), (3, true, false)]));
    }
    map.apply_slice(slice(2, 0, &[(1, true, false)]));
    map.take_changes();
    let mut planner = Planner::new(settings(), false);
    planner.replace(map.routes());
    map.apply_slice(slice(2, 0, &[(1, true, false), (2, true, false), (3, true, false)]));
    let batch = planner.update(&map.take_changes());
    let operations: Vec<String> = batch.ops.iter().map(ToString::to_string).collect();
    assert_eq!(
        operations,
        [
            "delete element ip orlop-proxy services",
            "add element ip orlop-proxy services",
            "add element ip orlop-proxy endpoints",
        ]
    );
    assert!(planner.update(&map.take_changes()).is_empty());
}

#[test]
fn the_number_of_rules_does_not_grow_with_services() {
    let rules = |services: u8| {
        let mut map = map();
        for name in 1..=services {
            map.apply_service(plain(name));
            map.apply_slice(slice(name, 0, &[(1, true, false), (2, true, false)]));
        }
        map.take_changes();
        let batch = Planner::new(settings(), false).replace(map.routes());
        batch.ops.iter().filter(|op| matches!(op, Op::AddRule { .. } | Op::AddChain { .. })).count()
    };
    assert_eq!(rules(1), rules(200));
}

#[test]
fn the_old_table_goes_in_the_batch_that_brings_the_new_one() {
    let batch = Planner::new(settings(), false).replace(std::iter::empty());
    let first: Vec<String> = batch.ops.iter().take(3).map(ToString::to_string).collect();
    assert_eq!(
        first,
        ["add table ip orlop-proxy", "delete table ip orlop-proxy", "add table ip orlop-proxy"]
    );
}
