//! From changes of routes to a transaction: only map elements change, besides chains for endpoint counts never seen.
//!
//! The planner remembers what the kernel was told. If a commit fails that is no longer true, and the caller starts over
//! with [`Planner::replace`], which writes the whole table in one transaction: the old rules hold until the new ones do,
//! whoever left them, so a restart needs to read nothing back and no packet meets an empty table.

use crate::layout::{IpFamilyOrd, LOCAL_SLOTS, Layout, Map, Settings, Spread, Way, table};
use crate::model::{Changes, Class, Frontend, Refusal, Route};
use orlop_net::nft::{Batch, Element, ElementData, IpFamily, RangeEnd, Value, Verdict};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// One element, and the map it belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Entry {
    pub(crate) family: IpFamilyOrd,
    pub(crate) map: Map,
    pub(crate) element: Element,
}

impl Entry {
    /// Several frontends may need the same element: it stays until the last of them goes.
    const fn is_shared(&self) -> bool {
        matches!(self.map, Map::ClusterIps | Map::Hairpin)
    }
}

/// Turns changes into transactions.
#[derive(Debug)]
pub struct Planner {
    settings: Settings,
    families: Vec<IpFamilyOrd>,
    applied: HashMap<Frontend, Arc<Route>>,
    spreads: BTreeSet<Spread>,
    shared: HashMap<Entry, u32>,
}

impl Planner {
    #[must_use]
    pub fn new(settings: Settings, ipv6: bool) -> Self {
        let families = if ipv6 { vec![IpFamilyOrd::V4, IpFamilyOrd::V6] } else { vec![IpFamilyOrd::V4] };
        Self { settings, families, applied: HashMap::new(), spreads: BTreeSet::new(), shared: HashMap::new() }
    }

    /// What a frontend leads to according to the last plan.
    #[must_use]
    pub fn route(&self, frontend: &Frontend) -> Option<&Arc<Route>> {
        self.applied.get(frontend)
    }

    pub fn frontends(&self) -> impl Iterator<Item = &Frontend> {
        self.applied.keys()
    }

    /// Everything, in place of whatever the tables held.
    pub fn replace(&mut self, routes: impl Iterator<Item = (Frontend, Arc<Route>)>) -> Batch {
        self.applied.clear();
        self.spreads.clear();
        self.shared.clear();
        let mut batch = Batch::new();
        for family in &self.families {
            batch.destroy_table(&table((*family).into()));
            Layout::new(&self.settings, (*family).into()).render(&mut batch);
        }
        let changes = routes.map(|(frontend, route)| (frontend, Some(route))).collect();
        self.extend(&mut batch, &changes);
        batch
    }

    /// Only what is different.
    pub fn update(&mut self, changes: &Changes) -> Batch {
        let mut batch = Batch::new();
        self.extend(&mut batch, changes);
        batch
    }

    fn extend(&mut self, batch: &mut Batch, changes: &Changes) {
        let mut gone = BTreeMap::<_, Vec<Element>>::new();
        let mut new = BTreeMap::<_, Vec<Element>>::new();
        let mut shared = HashMap::<Entry, i32>::new();
        for (frontend, route) in changes {
            let old = match route {
                Some(route) => self.applied.insert(*frontend, Arc::clone(route)),
                None => self.applied.remove(frontend),
            };
            if old == *route {
                continue;
            }
            let before = old.map(|route| entries(frontend, &route)).unwrap_or_default();
            let after = route.as_ref().map(|route| entries(frontend, route)).unwrap_or_default();
            if let Some(route) = route {
                self.add_spreads(batch, frontend, route);
            }
            // Sorting both would cost more than it saves: lists are short and mostly alike.
            let (mut stays, mut goes) = (Vec::with_capacity(before.len()), Vec::new());
            let fresh: std::collections::HashSet<&Entry> = after.iter().collect();
            for entry in &before {
                if fresh.contains(entry) { stays.push(entry) } else { goes.push(entry) }
            }
            let kept: std::collections::HashSet<&Entry> = stays.into_iter().collect();
            for (entry, step) in goes
                .into_iter()
                .map(|entry| (entry, -1))
                .chain(after.iter().filter(|entry| !kept.contains(entry)).map(|entry| (entry, 1)))
            {
                if entry.is_shared() {
                    *shared.entry(entry.clone()).or_default() += step;
                } else {
                    let list = if step < 0 { &mut gone } else { &mut new };
                    list.entry((entry.family, entry.map)).or_default().push(entry.element.clone());
                }
            }
        }
        self.count_shared(shared, &mut gone, &mut new);
        for ((family, map), elements) in gone {
            batch.delete_elements(&table(family.into()), map.name(), elements);
        }
        for ((family, map), elements) in new {
            batch.add_elements(&table(family.into()), map.name(), elements);
        }
    }

    fn add_spreads(&mut self, batch: &mut Batch, frontend: &Frontend, route: &Route) {
        for spread in spreads(frontend, route).into_iter().flatten() {
            if self.spreads.insert(spread) {
                Layout::new(&self.settings, spread.family.into()).spread(batch, &spread);
            }
        }
    }

    fn count_shared(
        &mut self,
        steps: HashMap<Entry, i32>,
        gone: &mut BTreeMap<(IpFamilyOrd, Map), Vec<Element>>,
        new: &mut BTreeMap<(IpFamilyOrd, Map), Vec<Element>>,
    ) {
        for (entry, step) in steps {
            let place = (entry.family, entry.map);
            let before = self.shared.get(&entry).copied().unwrap_or(0);
            let after = before.saturating_add_signed(step);
            match (before, after) {
                (0, 1..) => new.entry(place).or_default().push(entry.element.clone()),
                (1.., 0) => gone.entry(place).or_default().push(entry.element.clone()),
                _ => {}
            }
            if after == 0 {
                self.shared.remove(&entry);
            } else {
                self.shared.insert(entry, after);
            }
        }
    }

    /// Every element the kernel should hold now, for comparison with what it does.
    pub(crate) fn expected(&self) -> impl Iterator<Item = Entry> + '_ {
        let own = self.applied.iter().flat_map(|(frontend, route)| entries(frontend, route));
        own.filter(|entry| !entry.is_shared()).chain(self.shared.keys().cloned())
    }

    pub(crate) fn families(&self) -> &[IpFamilyOrd] {
        &self.families
    }
}

const fn family_of(frontend: &Frontend) -> IpFamilyOrd {
    if frontend.is_ipv4() { IpFamilyOrd::V4 } else { IpFamilyOrd::V6 }
}

/// The chains for a route's own backends and for those that only the inside reaches.
fn spreads(frontend: &Frontend, route: &Route) -> [Option<Spread>; 2] {
    let spread = |way, backends: &[SocketAddr]| {
        let count = u32::try_from(backends.len()).unwrap_or(u32::MAX).min(LOCAL_SLOTS);
        let node_port = matches!(frontend, Frontend::NodePort { .. });
        let affinity = route.affinity;
        (count > 0).then_some(Spread { family: family_of(frontend), node_port, way, count, affinity })
    };
    [spread(Way::Class(route.class), &route.backends), spread(Way::Inside, &route.inside)]
}

fn key(frontend: &Frontend) -> Value {
    match frontend {
        Frontend::Address { ip, protocol, port } => Value::of_ip(*ip).proto(protocol.number()).port(*port),
        Frontend::NodePort { protocol, port, .. } => Value::new().proto(protocol.number()).port(*port),
    }
}

/// The elements that make a route.
pub(crate) fn entries(frontend: &Frontend, route: &Route) -> Vec<Entry> {
    let node_port = matches!(frontend, Frontend::NodePort { .. });
    let pick = |address: Map, node: Map| if node_port { node } else { address };
    let family = family_of(frontend);
    let mut out = Vec::with_capacity(route.backends.len() + route.inside.len() + 3);
    let mut add = |map, element| out.push(Entry { family, map, element });
    let key = key(frontend);
    let [own, inside] = spreads(frontend, route);
    for (spread, map) in
        [(own, pick(Map::Services, Map::NodePorts)), (inside, pick(Map::Inside, Map::NodeInside))]
    {
        if let Some(spread) = spread {
            add(map, Element::new(key.clone()).verdict(Verdict::Goto(spread.to_string())));
        }
    }
    if own.is_none() {
        let verdict = match route.refusal {
            Refusal::Reject => Verdict::Goto("reject".into()),
            Refusal::Drop => Verdict::Drop,
        };
        add(pick(Map::Refused, Map::NodeRefused), Element::new(key.clone()).verdict(verdict));
    }
    let first_slot = if route.class == Class::ExternalLocal { LOCAL_SLOTS } else { 0 };
    for (backends, first_slot) in [(&route.backends, first_slot), (&route.inside, 0)] {
        for (slot, backend) in (first_slot..).zip(backends.iter()) {
            let data = Value::of_ip(backend.ip()).port(backend.port());
            add(pick(Map::Endpoints, Map::NodeEndpoints), Element::new(key.clone().u32(slot)).data(data));
        }
    }
    if route.affinity.is_some() {
        let all: BTreeSet<_> = route.backends.iter().chain(route.inside.iter()).collect();
        for backend in all {
            let element = Element::new(key.clone().ip(backend.ip()).port(backend.port()));
            add(pick(Map::Sticky, Map::NodeSticky), element);
        }
    }
    let here: BTreeSet<IpAddr> = route.here.iter().map(SocketAddr::ip).collect();
    for ip in here {
        add(Map::Hairpin, Element::new(Value::of_ip(ip).ip(ip)));
    }
    if let Frontend::Address { ip, .. } = frontend {
        if route.class == Class::Internal {
            add(Map::ClusterIps, Element::new(Value::of_ip(*ip)));
        }
        if !route.sources.is_empty() {
            add(Map::Ranged, Element::new(key.clone()));
        }
        for range in route.sources.iter() {
            let last = RangeEnd::Fields(key.clone().ip(range.broadcast()));
            add(Map::Allowed, Element { end: Some(last), ..Element::new(key.clone().ip(range.network())) });
        }
    }
    out
}

/// Removes our tables of both families.
#[must_use]
pub fn cleanup() -> Batch {
    let mut batch = Batch::new();
    for family in [IpFamily::V4, IpFamily::V6] {
        batch.destroy_table(&table(family));
    }
    batch
}

/// An element as a dump returns it: no more than its key, its end and what it maps to.
pub(crate) type Held = (Value, Option<RangeEnd>, Option<ElementData>);

pub(crate) fn held(element: Element) -> Held {
    (element.key, element.end, element.data)
}

#[cfg(test)]
mod tests;
