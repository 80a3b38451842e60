//! The composition: which part is given to which. No part looks for another by itself.

use crate::config::Config;
use crate::context::Context;
use crate::cri::Cri;
use crate::node::{NodeHandle, NodeManager};
use crate::objects::{ApiSource, Objects};
use crate::pods::credentials::Keyring;
use crate::pods::directory::PodDirectory;
use crate::pods::events::{Echo, Events};
use crate::pods::executor::Services;
use crate::pods::images::ImageManager;
use crate::pods::manager;
use crate::pods::runtime_client::RuntimeClient;
use crate::probes::{ProbeEvent, Prober};
use crate::shutdown::Shutdown;
use crate::volumes::Volumes;
use crate::wiring::{self, Parts, Recorder};
use orlop_api::Client;
use orlop_api::events::{EventLimits, EventRecorder};
use std::fmt;
use std::sync::{Arc, Mutex};
use tokio::sync::mpsc;

/// Findings of probes that may wait for the pods' tasks.
const PROBE_QUEUE: usize = 256;

/// The kubelet of one node, put together and not yet running.
pub struct Kubelet {
    context: Arc<Context>,
    services: Services,
    directory: PodDirectory,
    prober: Prober,
    node: NodeManager,
    findings: mpsc::UnboundedReceiver<ProbeEvent>,
}

impl Kubelet {
    /// Must be called within a tokio runtime. Without `api` the node stands alone: static pods only.
    #[must_use]
    pub fn new(config: Arc<Config>, api: Option<Client>, cri: Cri) -> Self {
        let recorder = api.clone().map_or_else(EventRecorder::silent, |client| {
            let limit = |value: i32| u32::try_from(value).unwrap_or(0);
            let limits = EventLimits {
                per_second: limit(config.raw.event_record_qps),
                burst: limit(config.raw.event_burst),
            };
            EventRecorder::start(client, "kubelet", &config.node_name, limits)
        });
        let events = match &api {
            Some(_) => Events::new(Arc::new(Recorder { recorder: recorder.clone(), echo: Echo::default() })),
            None => Events::log_only(),
        };
        let (node, node_object) = NodeManager::new(Arc::clone(&config), api.clone(), cri.clone(), recorder);
        let settings = config.settings.clone();
        let runtime = RuntimeClient::new(cri.clone(), settings.runtime_request_timeout);
        let directory = PodDirectory::default();
        let services_file = settings.root_dir.join("services.json");
        let objects = api.clone().map_or_else(Objects::none, |client| {
            Objects::remembering(Arc::new(ApiSource::new(client)), services_file)
        });
        let facts = wiring::follow_facts(Arc::clone(&config), node_object.clone());
        let (finding, findings) = mpsc::unbounded_channel();
        let prober = Prober::new(cri.clone(), finding);
        let parts = Parts {
            api: api.clone(),
            volumes: Volumes::new(facts.clone(), objects.clone()),
            facts,
            objects,
            prober: prober.clone(),
            cri: cri.clone(),
            events: events.clone(),
            directory: directory.clone(),
            mounted: Mutex::default(),
        };
        let images = ImageManager::new(
            runtime.clone(),
            events.clone(),
            Keyring::new(api.clone(), &settings.root_dir),
            settings.max_parallel_image_pulls,
            settings.registry_qps,
            settings.registry_burst,
        );
        let node_name = config.node_name.clone();
        let context = Arc::new(Context { settings, node_name, api, cri, events, node: node_object });
        let services = Services {
            context: Arc::clone(&context),
            runtime,
            parts: Arc::new(parts),
            images: Arc::new(images),
        };
        Self { context, services, directory, prober, node, findings }
    }

    #[must_use]
    pub fn context(&self) -> Arc<Context> {
        Arc::clone(&self.context)
    }

    /// What runs here, for the HTTP server.
    #[must_use]
    pub fn directory(&self) -> PodDirectory {
        self.directory.clone()
    }

    /// What runs the probes, for their metrics.
    #[must_use]
    pub fn prober(&self) -> Prober {
        self.prober.clone()
    }

    #[must_use]
    pub fn node(&self) -> NodeHandle {
        self.node.handle()
    }

    /// Runs until told to stop. No container is touched by stopping.
    pub async fn run(self, shutdown: Shutdown) {
        let Self { context, services, directory, node, findings, .. } = self;
        let (outcome, outcomes) = mpsc::channel(PROBE_QUEUE);
        let relay = wiring::relay_probes(findings, outcome, directory.clone(), context.events.clone());
        let pods = Box::pin(manager::run(services, directory, outcomes));
        let relayed = shutdown.clone();
        let managed = shutdown.clone();
        tokio::join!(
            async move { relayed.unless_triggered(relay).await },
            async move { managed.unless_triggered(pods).await },
            Box::pin(node.run(shutdown)),
        );
    }
}

impl fmt::Debug for Kubelet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kubelet")
    }
}
