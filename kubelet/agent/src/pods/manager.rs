//! Gives each pod its task, and each task its news. Holds no pod's state itself and never waits for one.

use super::admission::Admission;
use super::directory::PodDirectory;
use super::executor::Services;
use super::machine::{Event, Origin};
use super::parts::ProbeOutcome;
use super::runtime_events::{self, Touch};
use super::store::{Change, Store};
use super::worker::{self, Assignment, Beginning, Ending, Handle};
use super::{gc, image_gc, labels, memory, mirror, source_static};
use k8s_openapi::api::core::v1::Pod;
use orlop_api::watch::{WatchEvent, WatchRequest};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// How often everything is looked at again although nothing was told.
const AUDIT: Duration = Duration::from_secs(60);
const RUNTIME_RETRY: Duration = Duration::from_secs(1);
const ORPHAN_RETRY: Duration = Duration::from_secs(5);

/// Runs all pods of this node.
#[derive(Debug)]
pub struct PodManager {
    services: Services,
    directory: PodDirectory,
    store: Store,
    workers: HashMap<String, Handle>,
    ended: mpsc::UnboundedSender<Ending>,
    runtime_name: Arc<str>,
    /// Senders of the UIDs of mirrors, by full name.
    mirror_uids: HashMap<String, watch::Sender<Option<String>>>,
    mirror_view: Option<watch::Sender<mirror::View>>,
    findings: mpsc::Sender<Finding>,
    /// Orphans have been looked for once, since every source has spoken.
    orphans_sought: bool,
    seeking: bool,
    sweep_after: bool,
    sweeping: bool,
}

/// What was found by looking for leftovers, which takes time and is done beside the manager's own work.
#[derive(Debug)]
enum Finding {
    InRuntime(BTreeMap<String, Pod>),
    OnDisk(gc::Belongings),
    Swept,
}

/// Runs until dropped or aborted. Containers go on without us: stopping the kubelet stops no pod.
pub async fn run(services: Services, directory: PodDirectory, mut probes: mpsc::Receiver<ProbeOutcome>) {
    let runtime_name = runtime_name(&services).await;
    let settings = &services.context.settings;
    let (ended, mut endings) = mpsc::unbounded_channel();
    let (touch, mut touches) = mpsc::channel(256);
    let (files_out, mut files) = mpsc::channel(4);
    let has_files = settings.static_pod_path.is_some();
    if let Some(path) = settings.static_pod_path.clone() {
        let name = services.context.node_name.clone();
        tokio::spawn(source_static::run(path, name, settings.file_check_frequency, files_out));
    }
    let mut api = services.context.api.as_ref().map(|client| {
        let request = WatchRequest {
            path: "/api/v1/pods".to_owned(),
            field_selector: format!("spec.nodeName={}", services.context.node_name),
            ..WatchRequest::default()
        };
        orlop_api::watch::watch::<Pod>(client, request)
    });
    tokio::spawn(runtime_events::run(services.runtime.clone(), touch));
    let mirror_view = services.context.api.clone().map(|client| {
        let (view, receiver) = watch::channel(mirror::View::default());
        tokio::spawn(mirror::run(client, receiver, services.context.node.clone()));
        view
    });
    let (found, mut findings) = mpsc::channel(4);
    let mut manager = PodManager {
        store: Store::new(api.is_some(), has_files),
        services,
        directory,
        workers: HashMap::new(),
        ended,
        runtime_name,
        mirror_uids: HashMap::new(),
        mirror_view,
        findings: found,
        orphans_sought: false,
        seeking: false,
        sweep_after: false,
        sweeping: false,
    };
    if api.is_some() {
        manager.remember().await;
    }
    let images = image_gc::run(manager.services.runtime.clone(), manager.services.context.settings.image_gc);
    let mut images = std::pin::pin!(images);
    let mut audit = tokio::time::interval(AUDIT);
    audit.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            Some(news) = next(&mut api) => manager.hear_api(news),
            Some(pods) = files.recv(), if has_files => manager.hear_files(pods),
            Some(touch) = touches.recv() => manager.touched(touch),
            Some(ending) = endings.recv() => manager.worker_ended(&ending),
            Some(finding) = findings.recv() => manager.found(finding),
            Some(outcome) = probes.recv() => manager.probed(outcome),
            _ = audit.tick() => manager.audit(),
            // Never ends; polled here so that it ends with us.
            () = &mut images => {}
        }
        if manager.store.is_complete() && !manager.orphans_sought {
            manager.orphans_sought = true;
            manager.sweep_after = true;
            manager.seek_orphans();
        }
    }
}

async fn next(api: &mut Option<mpsc::Receiver<WatchEvent<Pod>>>) -> Option<WatchEvent<Pod>> {
    match api {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
}

/// Asks until the runtime answers: without it there is nothing to do.
async fn runtime_name(services: &Services) -> Arc<str> {
    let mut told = false;
    loop {
        match services.runtime.name().await {
            Ok(name) => return name.into(),
            Err(error) if !told => {
                told = true;
                tracing::error!(%error, "the container runtime does not answer; no pod can be run until it does");
            }
            Err(_) => {}
        }
        tokio::time::sleep(RUNTIME_RETRY).await;
    }
}

impl PodManager {
    /// Takes up the API's pods where an earlier life left them. Until the API server answers they are run as they were.
    async fn remember(&mut self) {
        let root = self.services.context.settings.root_dir.clone();
        let recalled = tokio::task::spawn_blocking(move || memory::recall(&root)).await;
        let (pods, problems) = recalled.unwrap_or_default();
        for problem in problems {
            tracing::warn!(error = %problem, "a pod of this node is not known until the API server answers");
        }
        let changes = self.store.remember(pods);
        self.apply(changes);
    }

    fn hear_api(&mut self, news: WatchEvent<Pod>) {
        let changes = self.store.hear_api(news);
        self.apply(changes);
        self.show_mirrors();
    }

    fn hear_files(&mut self, pods: Vec<Arc<Pod>>) {
        let changes = self.store.hear_files(pods);
        self.apply(changes);
        self.show_mirrors();
    }

    fn apply(&mut self, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Removed { uid } => self.tell(&uid, Event::Removed),
                Change::Set(pod, origin) => {
                    let uid = labels::identity(&pod).2;
                    if self.workers.contains_key(uid) {
                        self.tell(uid, Event::Updated(Arc::clone(&pod)));
                    } else {
                        self.start(pod, origin);
                    }
                }
            }
        }
    }

    fn tell(&self, uid: &str, event: Event) {
        if let Some(worker) = self.workers.get(uid) {
            // A worker that has just ended needs no news.
            worker.events.send(event).ok();
        }
    }

    /// Gives a pod its task, unless an earlier pod of the same name is still on its way down.
    fn start(&mut self, pod: Arc<Pod>, origin: Origin) {
        let (_, _, uid) = labels::identity(&pod);
        let full_name = labels::full_name(&pod);
        if self.workers.values().any(|worker| worker.full_name == full_name && !worker.is_orphan) {
            return;
        }
        let beginning = match self.admit(&pod, uid) {
            Ok(()) => Beginning::Run,
            Err(verdict) => {
                tracing::warn!(pod = full_name, reason = verdict.reason, "{}", verdict.message);
                let event = super::events::PodEvent {
                    severity: super::events::Severity::Warning,
                    reason: "AdmissionRejected",
                    message: format!("{}: {}", verdict.reason, verdict.message),
                    field_path: None,
                };
                self.services.context.events.emit(&pod, event);
                Beginning::Reject(verdict)
            }
        };
        let (name, namespace, uid) = labels::identity(&pod);
        tracing::info!(pod = name, namespace, uid, source = ?origin, "pod added");
        self.spawn(pod, origin, beginning);
    }

    fn spawn(&mut self, pod: Arc<Pod>, origin: Origin, beginning: Beginning) {
        let uid = labels::identity(&pod).2.to_owned();
        let object_uid = match origin {
            Origin::Api => watch::channel(Some(uid.clone())).1,
            Origin::File => self.mirror_uid(&labels::full_name(&pod)).subscribe(),
        };
        let assignment = Assignment {
            pod,
            origin,
            beginning,
            object_uid,
            is_remembered: origin == Origin::Api && !self.store.api_heard(),
            runtime_name: Arc::clone(&self.runtime_name),
        };
        let handle =
            worker::spawn(assignment, self.services.clone(), self.directory.clone(), self.ended.clone());
        self.workers.insert(uid, handle);
    }

    fn admit(&self, pod: &Pod, uid: &str) -> Result<(), super::machine::Verdict> {
        let status = pod.status.as_ref();
        let is_ending = pod.metadata.deletion_timestamp.is_some() || is_terminal(pod);
        // Let in once already, before this kubelet was started.
        let is_known = status.is_some_and(|status| status.start_time.is_some());
        if is_ending || is_known {
            return Ok(());
        }
        let active: Vec<&Pod> = self
            .store
            .pods()
            .map(|(pod, _)| &**pod)
            .filter(|other| {
                let other_uid = labels::identity(other).2;
                let worker = self.workers.get(other_uid);
                other_uid != uid && worker.is_some_and(|worker| !worker.is_rejected) && !is_terminal(other)
            })
            .collect();
        let node = self.services.context.node.borrow().clone();
        let max_pods = self.services.context.settings.max_pods;
        Admission { node: node.as_deref(), max_pods }.admit(pod, &active)
    }

    fn worker_ended(&mut self, ending: &Ending) {
        let uid = ending.uid.as_str();
        let Some(ended) = self.workers.remove(uid) else { return };
        if ended.origin == Origin::File && !self.store.static_pods().contains_key(&ended.full_name) {
            self.mirror_uids.remove(&ended.full_name);
        }
        self.show_mirrors();
        // A pod of the same name, or a static pod whose file came back, has waited for this.
        let waiting: Vec<(Arc<Pod>, Origin)> = self
            .store
            .pods()
            .filter(|(pod, _)| !self.workers.contains_key(labels::identity(pod).2))
            .filter(|(pod, _)| labels::full_name(pod) == ended.full_name)
            .map(|(pod, origin)| (Arc::clone(pod), origin))
            .collect();
        for (pod, origin) in waiting {
            // The API object of a pod that has just been deleted may still be shown for a moment.
            if ending.is_failure || !(origin == Origin::Api && labels::identity(&pod).2 == uid) {
                self.start(pod, origin);
            }
        }
    }

    fn touched(&mut self, touch: Touch) {
        match touch {
            Touch::All => self.look_everywhere(),
            Touch::Pod(uid) if self.workers.contains_key(&uid) => self.tell(&uid, Event::Look),
            Touch::Pod(_) => self.seek_orphans(),
            Touch::Container(id) => {
                if let Some(uid) = self.directory.owner_of(&id) {
                    self.tell(&uid, Event::Look);
                }
            }
        }
    }

    fn look_everywhere(&self) {
        for worker in self.workers.values() {
            worker.events.send(Event::Look).ok();
        }
    }

    fn probed(&self, outcome: ProbeOutcome) {
        let uid = outcome.pod_uid.clone();
        self.tell(&uid, Event::Probe(outcome));
    }

    /// Asks the runtime for its pods, beside everything else: a runtime that hangs must not hold up the news of pods.
    fn seek_orphans(&mut self) {
        if !self.store.is_complete() || std::mem::replace(&mut self.seeking, true) {
            return;
        }
        let (services, findings) = (self.services.clone(), self.findings.clone());
        tokio::spawn(async move {
            let mut told = false;
            let found = loop {
                match gc::runtime_pods(&services).await {
                    Ok(found) => break found,
                    Err(error) if !told => {
                        told = true;
                        tracing::warn!(%error, "orphaned pods cannot be looked for, will be tried again");
                    }
                    Err(_) => {}
                }
                tokio::select! {
                    () = tokio::time::sleep(ORPHAN_RETRY) => {}
                    () = findings.closed() => return,
                }
            };
            // Nobody listens any more only when the kubelet itself ends.
            findings.send(Finding::InRuntime(found)).await.ok();
        });
    }

    fn found(&mut self, finding: Finding) {
        match finding {
            Finding::InRuntime(pods) => {
                self.seeking = false;
                self.adopt_orphans(pods);
                if std::mem::take(&mut self.sweep_after) {
                    self.seek_leftovers();
                }
            }
            Finding::OnDisk(belongings) => {
                let is_known = |uid: &str| self.store.contains(uid) || self.workers.contains_key(uid);
                let ownerless = belongings.without_owner(is_known);
                let (services, findings) = (self.services.clone(), self.findings.clone());
                tokio::spawn(async move {
                    if !ownerless.is_empty() {
                        gc::sweep(&services, ownerless).await;
                    }
                    findings.send(Finding::Swept).await.ok();
                });
            }
            Finding::Swept => self.sweeping = false,
        }
    }

    /// Gives pods that only the runtime knows a task that ends them.
    fn adopt_orphans(&mut self, found: BTreeMap<String, Pod>) {
        for (uid, pod) in found {
            if !self.store.contains(&uid) && !self.workers.contains_key(&uid) {
                tracing::info!(
                    pod = labels::full_name(&pod),
                    uid,
                    "ending a pod that no source knows any more"
                );
                self.spawn(Arc::new(pod), Origin::Api, Beginning::Orphan);
            }
        }
    }

    /// Only after the runtime's pods were adopted, so that none of them is taken for gone. One sweep at a time: a volume
    /// that hangs must not pile up sweeps behind it.
    fn seek_leftovers(&mut self) {
        if std::mem::replace(&mut self.sweeping, true) {
            return;
        }
        let (services, findings) = (self.services.clone(), self.findings.clone());
        tokio::spawn(async move {
            let look = tokio::task::spawn_blocking(move || gc::belongings(&services.context.settings));
            let belongings = look.await.unwrap_or_default();
            findings.send(Finding::OnDisk(belongings)).await.ok();
        });
    }

    fn audit(&mut self) {
        self.look_everywhere();
        if self.store.is_complete() {
            self.sweep_after = true;
            self.seek_orphans();
        }
    }

    fn mirror_uid(&mut self, full_name: &str) -> &watch::Sender<Option<String>> {
        let shown = self.store.mirrors().get(full_name).and_then(|mirror| mirror.metadata.uid.clone());
        self.mirror_uids.entry(full_name.to_owned()).or_insert_with(|| watch::channel(shown).0)
    }

    /// Tells the mirror task and the status writers what mirrors there are and should be.
    fn show_mirrors(&mut self) {
        let Some(view) = &self.mirror_view else { return };
        let mirrors = self.store.mirrors();
        for (name, sender) in &self.mirror_uids {
            let shown = mirrors.get(name).and_then(|mirror| mirror.metadata.uid.clone());
            sender.send_if_modified(|uid| std::mem::replace(uid, shown.clone()) != shown);
        }
        let mut wanted = self.store.static_pods();
        // While an old pod of that name is on its way down, its mirror goes on showing it.
        for worker in self.workers.values().filter(|worker| worker.origin == Origin::File) {
            let alive = |mirror: &&Arc<Pod>| mirror.metadata.deletion_timestamp.is_none();
            if !wanted.contains_key(&worker.full_name)
                && let Some(mirror) = mirrors.get(&worker.full_name).filter(alive)
            {
                wanted.insert(worker.full_name.clone(), as_wanted(mirror));
            }
        }
        view.send_replace(mirror::View {
            wanted,
            existing: mirrors.clone(),
            complete: self.store.is_complete(),
        });
    }
}

/// A mirror seen as the static pod that it shows.
fn as_wanted(mirror: &Arc<Pod>) -> Arc<Pod> {
    let mut pod = (**mirror).clone();
    let notes = pod.metadata.annotations.get_or_insert_default();
    let hash = notes.get(labels::CONFIG_MIRROR).cloned().unwrap_or_default();
    notes.insert(labels::CONFIG_HASH.to_owned(), hash);
    Arc::new(pod)
}

fn is_terminal(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}
