//! Services and endpoint slices in, routes out: what each address and node port leads to.
//!
//! Pure. A change marks the services it concerns; [`ServiceMap::take_changes`] works out only those again. When two
//! services claim the same address and port, cluster addresses come before node ports and those before other addresses,
//! then the older service wins, so a newcomer cannot take traffic away, and the order of events does not matter.

use crate::objects::{EndpointSlice, Protocol, Service, ServicePort, TrafficPolicy};
use crate::select::{Backends, Choice, Place, choose};
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

/// Where clients find a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Frontend {
    Address { ip: IpAddr, protocol: Protocol, port: u16 },
    NodePort { ipv4: bool, protocol: Protocol, port: u16 },
}

impl Frontend {
    #[must_use]
    pub const fn is_ipv4(&self) -> bool {
        match self {
            Self::Address { ip, .. } => ip.is_ipv4(),
            Self::NodePort { ipv4, .. } => *ipv4,
        }
    }

    #[must_use]
    pub const fn protocol(&self) -> Protocol {
        match self {
            Self::Address { protocol, .. } | Self::NodePort { protocol, .. } => *protocol,
        }
    }
}

/// How traffic to a frontend is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// A cluster address: masqueraded only when the client is no pod.
    Internal,
    /// From outside to anywhere: always masqueraded, so that answers come back through this node.
    External,
    /// From outside to endpoints of this node, whose source address stays; pods and the node itself reach all endpoints.
    ExternalLocal,
}

/// What happens to new connections when a frontend leads nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// There is no endpoint at all.
    Reject,
    /// There are some, but a Local policy excludes them.
    Drop,
}

/// Where a frontend leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    pub class: Class,
    pub backends: Backends,
    /// With [`Class::ExternalLocal`]: what pods and the node itself reach.
    pub inside: Backends,
    pub refusal: Refusal,
    pub affinity: Option<u32>,
    /// UDP only: flows to these are left alone.
    pub serving: Backends,
    /// Backends that may be on this node, and so may reach themselves.
    pub here: Backends,
    /// Clients that may connect; empty: all.
    pub sources: Arc<[IpNet]>,
}

/// Frontends and where they lead now; `None`: they are no more.
pub type Changes = BTreeMap<Frontend, Option<Arc<Route>>>;

/// Lower wins.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Precedence {
    rank: u8,
    created: Arc<str>,
    service: Arc<str>,
}

#[derive(Debug, Clone)]
struct Claim {
    precedence: Precedence,
    route: Arc<Route>,
}

/// All services and endpoints of the cluster, and the routes that follow from them.
#[derive(Debug)]
pub struct ServiceMap {
    place: Place,
    ipv6: bool,
    node_ips: Vec<IpAddr>,
    services: HashMap<Arc<str>, Service>,
    slices: HashMap<Arc<str>, BTreeMap<Box<str>, EndpointSlice>>,
    /// By slice.
    slice_service: HashMap<Box<str>, Arc<str>>,
    /// Of each frontend, the winner first.
    claims: HashMap<Frontend, Vec<Claim>>,
    /// By service.
    claimed: HashMap<Arc<str>, Vec<Frontend>>,
    dirty: BTreeSet<Arc<str>>,
}

impl ServiceMap {
    #[must_use]
    pub fn new(place: Place, ipv6: bool, node_ips: Vec<IpAddr>) -> Self {
        Self {
            place,
            ipv6,
            node_ips,
            services: HashMap::new(),
            slices: HashMap::new(),
            slice_service: HashMap::new(),
            claims: HashMap::new(),
            claimed: HashMap::new(),
            dirty: BTreeSet::new(),
        }
    }

    #[must_use]
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    #[must_use]
    pub fn services(&self) -> usize {
        self.services.len()
    }

    /// The zone of this node is known only once its Node object is.
    pub fn set_zone(&mut self, zone: Option<Box<str>>) {
        if self.place.zone != zone {
            self.place.zone = zone;
            self.dirty.extend(self.services.keys().cloned());
        }
    }

    pub fn apply_service(&mut self, service: Service) {
        let key: Arc<str> = service.key.as_ref().into();
        if self.services.get(&key) != Some(&service) {
            self.dirty.insert(Arc::clone(&key));
            self.services.insert(key, service);
        }
    }

    pub fn delete_service(&mut self, key: &str) {
        if let Some((key, _)) = self.services.remove_entry(key) {
            self.dirty.insert(key);
        }
    }

    /// Those not in the list are gone.
    pub fn replace_services(&mut self, services: Vec<Service>) {
        let present: BTreeSet<&str> = services.iter().map(|service| &*service.key).collect();
        let gone: Vec<_> = self.services.keys().filter(|key| !present.contains(&***key)).cloned().collect();
        for key in gone {
            self.delete_service(&key);
        }
        for service in services {
            self.apply_service(service);
        }
    }

    pub fn apply_slice(&mut self, slice: EndpointSlice) {
        let owner = slice.service.as_deref();
        if self.slice_service.get(&slice.key).map(|service| &**service) != owner {
            self.delete_slice(&slice.key);
        }
        let Some(owner) = owner.map(Arc::<str>::from) else { return };
        let of_service = self.slices.entry(Arc::clone(&owner)).or_default();
        if of_service.get(&slice.key) != Some(&slice) {
            self.dirty.insert(Arc::clone(&owner));
            self.slice_service.insert(slice.key.clone(), owner);
            of_service.insert(slice.key.clone(), slice);
        }
    }

    pub fn delete_slice(&mut self, key: &str) {
        let Some(service) = self.slice_service.remove(key) else { return };
        if let Some(of_service) = self.slices.get_mut(&service) {
            of_service.remove(key);
            if of_service.is_empty() {
                self.slices.remove(&service);
            }
        }
        self.dirty.insert(service);
    }

    /// Those not in the list are gone.
    pub fn replace_slices(&mut self, slices: Vec<EndpointSlice>) {
        let present: BTreeSet<&str> = slices.iter().map(|slice| &*slice.key).collect();
        let gone: Vec<_> =
            self.slice_service.keys().filter(|key| !present.contains(&***key)).cloned().collect();
        for key in gone {
            self.delete_slice(&key);
        }
        for slice in slices {
            self.apply_slice(slice);
        }
    }

    /// Every frontend and where it leads; the frontends of services marked as changed may be old.
    pub fn routes(&self) -> impl Iterator<Item = (Frontend, Arc<Route>)> + '_ {
        self.claims.iter().filter_map(|(frontend, claims)| {
            claims.first().map(|claim| (*frontend, Arc::clone(&claim.route)))
        })
    }

    /// The frontends of services that changed since the last call.
    pub fn take_changes(&mut self) -> Changes {
        let mut touched = BTreeSet::new();
        for key in std::mem::take(&mut self.dirty) {
            self.withdraw(&key, &mut touched);
            self.claim(&key, &mut touched);
        }
        let winner =
            |frontend: &Frontend| self.claims.get(frontend)?.first().map(|claim| Arc::clone(&claim.route));
        touched.into_iter().map(|frontend| (frontend, winner(&frontend))).collect()
    }

    fn withdraw(&mut self, service: &str, touched: &mut BTreeSet<Frontend>) {
        for frontend in self.claimed.remove(service).unwrap_or_default() {
            if let Some(claims) = self.claims.get_mut(&frontend) {
                claims.retain(|claim| &*claim.precedence.service != service);
                if claims.is_empty() {
                    self.claims.remove(&frontend);
                }
            }
            touched.insert(frontend);
        }
    }

    fn claim(&mut self, key: &Arc<str>, touched: &mut BTreeSet<Frontend>) {
        let Some(service) = self.services.get(key) else { return };
        let created: Arc<str> = service.created.as_ref().into();
        let mut frontends = Vec::new();
        for (rank, frontend, route) in self.routes_of(service) {
            let precedence = Precedence { rank, created: Arc::clone(&created), service: Arc::clone(key) };
            let claims = self.claims.entry(frontend).or_default();
            if claims.iter().any(|claim| claim.precedence.service == *key) {
                continue;
            }
            let at = claims.partition_point(|claim| claim.precedence < precedence);
            claims.insert(at, Claim { precedence, route });
            if let [winner, .., loser] = &claims[..] {
                tracing::warn!(
                    ?frontend,
                    service = %loser.precedence.service,
                    owner = %winner.precedence.service,
                    "two services claim the same address and port, the later one gets no traffic there"
                );
            }
            touched.insert(frontend);
            frontends.push(frontend);
        }
        if !frontends.is_empty() {
            self.claimed.insert(Arc::clone(key), frontends);
        }
    }

    /// With the rank of the claim; the best claim to a frontend first.
    fn routes_of(&self, service: &Service) -> Vec<(u8, Frontend, Arc<Route>)> {
        let mut routes = Vec::new();
        for ipv4 in [true, false] {
            let mut cluster_ips = service.cluster_ips.iter().filter(|ip| ip.is_ipv4() == ipv4).peekable();
            if cluster_ips.peek().is_none() || !(ipv4 || self.ipv6) {
                continue;
            }
            let cluster_ips: Vec<_> = cluster_ips.collect();
            for port in &service.ports {
                let slices = self.slices.get(&*service.key).into_iter().flat_map(BTreeMap::values);
                let choice = choose(slices, &port.name, port.protocol, ipv4, &self.place);
                let at =
                    |ip: &IpAddr| Frontend::Address { ip: *ip, protocol: port.protocol, port: port.port };
                let internal = Arc::new(internal_route(service, port, &choice));
                routes.extend(cluster_ips.iter().map(|ip| (0, at(ip), Arc::clone(&internal))));
                let external = Arc::new(external_route(service, port, &choice, Arc::default()));
                if let Some(number) = port.node_port {
                    let frontend = Frontend::NodePort { ipv4, protocol: port.protocol, port: number };
                    routes.push((1, frontend, Arc::clone(&external)));
                }
                for ip in service.load_balancer_ips.iter().filter(|ip| ip.is_ipv4() == ipv4) {
                    let sources = self.sources(service, *ip);
                    let route = if sources.is_empty() {
                        Arc::clone(&external)
                    } else {
                        Arc::new(external_route(service, port, &choice, sources))
                    };
                    routes.push((2, at(ip), route));
                }
                let external_ips = service.external_ips.iter().filter(|ip| ip.is_ipv4() == ipv4);
                routes.extend(external_ips.map(|ip| (3, at(ip), Arc::clone(&external))));
            }
        }
        routes
    }

    /// Who may use a load balancer address, without overlaps; empty means everybody.
    fn sources(&self, service: &Service, address: IpAddr) -> Arc<[IpNet]> {
        let of_family = |net: &&IpNet| net.addr().is_ipv4() == address.is_ipv4();
        let mut ranges: Vec<IpNet> = service.source_ranges.iter().filter(of_family).copied().collect();
        if service.source_ranges.is_empty() || ranges.iter().any(|range| range.prefix_len() == 0) {
            return Arc::default();
        }
        // The node's own connections to the address leave with the address as their source.
        if self.node_ips.iter().any(|ip| ranges.iter().any(|range| range.contains(ip))) || ranges.is_empty() {
            ranges.push(address.into());
        }
        IpNet::aggregate(&ranges).into()
    }
}

fn internal_route(service: &Service, port: &ServicePort, choice: &Choice) -> Route {
    let local = service.internal_policy == TrafficPolicy::Local;
    let backends = if local { &choice.local } else { &choice.cluster };
    route(Class::Internal, backends, service, port, choice)
}

fn external_route(service: &Service, port: &ServicePort, choice: &Choice, sources: Arc<[IpNet]>) -> Route {
    let route = match service.external_policy {
        TrafficPolicy::Cluster => route(Class::External, &choice.cluster, service, port, choice),
        TrafficPolicy::Local => Route {
            inside: Arc::clone(&choice.cluster),
            ..route(Class::ExternalLocal, &choice.local, service, port, choice)
        },
    };
    Route { sources, ..route }
}

fn route(class: Class, backends: &Backends, service: &Service, port: &ServicePort, choice: &Choice) -> Route {
    let udp = port.protocol == Protocol::Udp;
    Route {
        class,
        backends: Arc::clone(backends),
        inside: Arc::default(),
        refusal: if choice.cluster.is_empty() { Refusal::Reject } else { Refusal::Drop },
        affinity: service.affinity,
        serving: if udp { Arc::clone(&choice.serving) } else { Arc::default() },
        here: Arc::clone(&choice.here),
        sources: Arc::default(),
    }
}

#[cfg(test)]
mod tests;
