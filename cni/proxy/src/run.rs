//! The loop: watches in, transactions out.
//!
//! ```text
//! services ─┐
//! slices ───┼─> ServiceMap ──(at once, then at most every few tens of ms)──> Planner ──> nftables ──> conntrack
//! own node ─┘                                                   ^
//!                            audit each hour, retry after failure: everything anew
//! ```
//!
//! Nothing is written before services and slices have both been listed once: half of the picture would cut connections.
//! While the API server is away, and after the loop has ended, rules stay as they are.

use crate::config::ProxyConfig;
use crate::conntrack::{Conntrack, ConntrackError, StaleFlows};
use crate::health::Health;
use crate::layout::{Map, table};
use crate::model::{Changes, Frontend, Route, ServiceMap};
use crate::objects::{EndpointSlice, Node, Service};
use crate::plan::{Held, Planner, cleanup, held};
use crate::select::Place;
use orlop_api::Client;
use orlop_api::watch::{WatchEvent, WatchRequest, watch};
use orlop_net::nft::{Batch, NftError, NftSocket, Op};
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::Receiver;
use tokio::task::JoinError;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    #[error("cannot reach nftables (are we root, and does the kernel have nf_tables?)")]
    Nft(#[from] NftError),
    #[error(transparent)]
    Conntrack(#[from] ConntrackError),
    #[error("the task that talks to the kernel died")]
    Task(#[from] JoinError),
}

const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// The service proxy of this node, in the calling thread's network namespace.
#[derive(Debug, Clone, Copy)]
pub struct Proxy;

impl Proxy {
    /// Runs until told to stop; rules stay then.
    ///
    /// # Errors
    /// [`ProxyError`] when the kernel cannot be reached at all. What fails later is logged and tried again.
    pub async fn run(
        client: Client,
        config: ProxyConfig,
        shutdown: CancellationToken,
    ) -> Result<(), ProxyError> {
        Self::run_with_health(client, config, Health::default(), shutdown).await
    }

    /// As [`Self::run`], for a caller that wants to know how it goes.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub async fn run_with_health(
        client: Client,
        config: ProxyConfig,
        health: Health,
        shutdown: CancellationToken,
    ) -> Result<(), ProxyError> {
        let kernel = Kernel::open(&config)?;
        let running = Loop::new(&config, kernel, health.clone()).run(&client, &config);
        let serving = async {
            match config.healthz {
                Some(address) => health.serve(address).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            () = serving => Ok(()),
            result = running => result,
        }
    }

    /// Removes our tables, whoever wrote them.
    ///
    /// # Errors
    /// [`ProxyError::Nft`]
    pub fn cleanup() -> Result<(), ProxyError> {
        Ok(NftSocket::open()?.commit(&cleanup())?)
    }
}

/// What is to happen in the kernel.
enum Work {
    /// The whole table, and the frontends whose flows may be stale.
    Replace(Vec<(Frontend, Arc<Route>)>, Changes),
    Update(Changes),
    Audit,
}

/// How a piece of work ended.
#[derive(Debug, Default)]
struct Outcome {
    elements: usize,
    flows: usize,
    /// The audit found something else than we wrote.
    differs: bool,
}

/// The sockets, and what the kernel was told.
struct Kernel {
    nft: NftSocket,
    conntrack: Conntrack,
    planner: Planner,
    node_ips: Vec<IpAddr>,
    /// Rules written since the table was replaced.
    rules: HashMap<orlop_net::nft::Table, usize>,
}

impl Kernel {
    fn open(config: &ProxyConfig) -> Result<Self, ProxyError> {
        Ok(Self {
            nft: NftSocket::open()?,
            conntrack: Conntrack::open()?,
            planner: Planner::new(config.settings(), config.ipv6()),
            node_ips: config.node_ips.clone(),
            rules: HashMap::new(),
        })
    }

    fn perform(&mut self, work: Work) -> Result<Outcome, NftError> {
        match work {
            Work::Replace(routes, mut changes) => {
                let batch = self.planner.replace(routes.into_iter());
                self.rules.clear();
                for frontend in self.planner.frontends() {
                    changes.entry(*frontend).or_insert_with(|| self.planner.route(frontend).cloned());
                }
                self.commit(&batch, changes)
            }
            Work::Update(changes) => {
                let batch = self.planner.update(&changes);
                self.commit(&batch, changes)
            }
            Work::Audit => Ok(Outcome { differs: !self.is_as_written()?, ..Outcome::default() }),
        }
    }

    fn commit(&mut self, batch: &Batch, changes: Changes) -> Result<Outcome, NftError> {
        self.nft.commit(batch)?;
        let mut elements = 0;
        for op in &batch.ops {
            match op {
                Op::AddRule { table, .. } => *self.rules.entry(table.clone()).or_default() += 1,
                Op::AddElements { elements: list, .. } | Op::DeleteElements { elements: list, .. } => {
                    elements += list.len();
                }
                _ => {}
            }
        }
        let mut stale = StaleFlows::new(self.node_ips.iter().copied());
        for (frontend, route) in changes {
            stale.add(&frontend, route);
        }
        let flows = self.conntrack.forget(&stale).unwrap_or_else(|error| {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "UDP clients may stick to endpoints that are gone"
            );
            0
        });
        Ok(Outcome { elements, flows, differs: false })
    }

    fn is_as_written(&mut self) -> Result<bool, NftError> {
        let present = self.nft.tables()?;
        let mut expected: HashMap<_, HashSet<Held>> = HashMap::new();
        for entry in self.planner.expected() {
            expected.entry((entry.family, entry.map)).or_default().insert(held(entry.element));
        }
        for family in self.planner.families().to_vec() {
            let table = table(family.into());
            if !present.iter().any(|info| info.table == table)
                || self.nft.rules(&table)?.len() != self.rules.get(&table).copied().unwrap_or(0)
            {
                return Ok(false);
            }
            for map in Map::ALL {
                let found: HashSet<Held> =
                    self.nft.elements(&table, map.name())?.into_iter().map(held).collect();
                if found != expected.remove(&(family, map)).unwrap_or_default() {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}

/// Where the loop stands.
struct Loop {
    map: ServiceMap,
    /// Away while it works.
    kernel: Option<Kernel>,
    health: Health,
    services_listed: bool,
    slices_listed: bool,
    /// The kernel holds what the planner thinks it does.
    in_step: bool,
    /// Changes that a failed commit did not make; their flows are still to be looked at.
    missed: Changes,
    min_period: Duration,
    /// No commit before.
    not_before: Instant,
    retry: Duration,
}

impl Loop {
    fn new(config: &ProxyConfig, kernel: Kernel, health: Health) -> Self {
        let place = Place { node: config.node_name.as_str().into(), zone: None };
        Self {
            map: ServiceMap::new(place, config.ipv6(), config.node_ips.clone()),
            kernel: Some(kernel),
            health,
            services_listed: false,
            slices_listed: false,
            in_step: false,
            missed: Changes::new(),
            min_period: config.min_sync_period,
            not_before: Instant::now(),
            retry: FIRST_RETRY,
        }
    }

    async fn run(mut self, client: &Client, config: &ProxyConfig) -> Result<(), ProxyError> {
        let mut services = watch::<Service>(client, services_request());
        let mut slices = watch::<EndpointSlice>(client, slices_request());
        let mut nodes = watch::<Node>(client, node_request(&config.node_name));
        let mut audit = Instant::now() + config.audit_period;
        loop {
            let wanted = self.services_listed && self.slices_listed && (self.map.is_dirty() || !self.in_step);
            tokio::select! {
                Some(event) = services.recv() => self.service_events(event, &mut services),
                Some(event) = slices.recv() => self.slice_events(event, &mut slices),
                Some(event) = nodes.recv() => self.node_event(event),
                () = sleep_until(self.not_before), if wanted => self.sync().await?,
                () = sleep_until(audit), if self.in_step => {
                    audit = Instant::now() + config.audit_period;
                    self.audit().await?;
                }
                // Watches end only with their receivers.
                else => return Ok(()),
            }
        }
    }

    fn service_events(&mut self, first: WatchEvent<Service>, more: &mut Receiver<WatchEvent<Service>>) {
        for event in std::iter::once(first).chain(std::iter::from_fn(|| more.try_recv().ok())) {
            match event {
                WatchEvent::Listed(services) => {
                    self.services_listed = true;
                    self.map.replace_services(services);
                }
                WatchEvent::Applied(service) => self.map.apply_service(service),
                WatchEvent::Deleted(service) => self.map.delete_service(&service.key),
            }
        }
        self.note_changes();
    }

    fn slice_events(
        &mut self,
        first: WatchEvent<EndpointSlice>,
        more: &mut Receiver<WatchEvent<EndpointSlice>>,
    ) {
        for event in std::iter::once(first).chain(std::iter::from_fn(|| more.try_recv().ok())) {
            match event {
                WatchEvent::Listed(slices) => {
                    self.slices_listed = true;
                    self.map.replace_slices(slices);
                }
                WatchEvent::Applied(slice) => self.map.apply_slice(slice),
                WatchEvent::Deleted(slice) => self.map.delete_slice(&slice.key),
            }
        }
        self.note_changes();
    }

    fn node_event(&mut self, event: WatchEvent<Node>) {
        let node = match event {
            WatchEvent::Listed(mut nodes) => nodes.pop(),
            WatchEvent::Applied(node) => Some(node),
            WatchEvent::Deleted(_) => None,
        };
        self.health.node_eligible(node.as_ref().is_some_and(|node| !node.to_be_deleted));
        if let Some(node) = node {
            self.map.set_zone(node.zone);
        }
        self.note_changes();
    }

    fn note_changes(&self) {
        if self.map.is_dirty() {
            self.health.queued();
        }
    }

    async fn sync(&mut self) -> Result<(), ProxyError> {
        let started = Instant::now();
        let changes = self.map.take_changes();
        if self.in_step && changes.is_empty() {
            self.health.updated();
            return Ok(());
        }
        let full = !self.in_step;
        let frontends = changes.len();
        let work = if full {
            self.missed.extend(changes);
            Work::Replace(self.map.routes().collect(), std::mem::take(&mut self.missed))
        } else {
            Work::Update(changes)
        };
        let attempted: Changes = match &work {
            Work::Replace(_, changes) | Work::Update(changes) => changes.clone(),
            Work::Audit => Changes::new(),
        };
        match self.perform(work).await? {
            Ok(Outcome { elements, flows, .. }) => {
                self.in_step = true;
                self.retry = FIRST_RETRY;
                self.not_before = Instant::now() + self.min_period;
                self.health.updated();
                let took_us = started.elapsed().as_micros();
                if full {
                    tracing::info!(
                        services = self.map.services(),
                        elements,
                        flows,
                        took_us,
                        "all rules written"
                    );
                } else {
                    tracing::debug!(frontends, elements, flows, took_us, "rules changed");
                }
            }
            Err(error) => {
                self.in_step = false;
                self.missed = attempted;
                self.not_before = Instant::now() + self.retry;
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    retry_ms = self.retry.as_millis(),
                    "cannot change the rules, writing all of them anew"
                );
                self.retry = (self.retry * 2).min(LONGEST_RETRY);
            }
        }
        Ok(())
    }

    async fn audit(&mut self) -> Result<(), ProxyError> {
        match self.perform(Work::Audit).await? {
            Ok(Outcome { differs: false, .. }) => {}
            Ok(_) => {
                tracing::warn!("somebody changed the table {}, writing it anew", crate::layout::TABLE);
                self.in_step = false;
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "cannot read the rules back, writing them anew");
                self.in_step = false;
            }
        }
        Ok(())
    }

    /// On a thread where it may block; events wait meanwhile.
    async fn perform(&mut self, work: Work) -> Result<Result<Outcome, NftError>, ProxyError> {
        let mut kernel =
            self.kernel.take().expect("work is done one piece at a time, and an error ends the loop");
        let (kernel, result) = tokio::task::spawn_blocking(move || {
            let result = kernel.perform(work);
            (kernel, result)
        })
        .await?;
        self.kernel = Some(kernel);
        Ok(result)
    }
}

fn services_request() -> WatchRequest {
    WatchRequest {
        path: "/api/v1/services".to_owned(),
        label_selector: "!service.kubernetes.io/service-proxy-name".to_owned(),
        field_selector: "spec.clusterIP!=None".to_owned(),
    }
}

fn slices_request() -> WatchRequest {
    WatchRequest {
        path: "/apis/discovery.k8s.io/v1/endpointslices".to_owned(),
        label_selector: "!service.kubernetes.io/headless".to_owned(),
        field_selector: String::new(),
    }
}

fn node_request(name: &str) -> WatchRequest {
    WatchRequest {
        path: "/api/v1/nodes".to_owned(),
        label_selector: String::new(),
        field_selector: format!("metadata.name={name}"),
    }
}
