//! The task of one pod: owns its state machine, feeds it events, hands its actions to the executor and its status on.

use super::directory::PodDirectory;
use super::executor::{Executor, Services};
use super::labels;
use super::machine::{Action, Event, Goal, Origin, PodMachine, Verdict, step};
use super::memory::Place;
use super::runtime_state::RunState;
use super::status::writer::{Desired, Target};
use super::status::{NodeFacts, compute, persist, writer};
use futures_util::FutureExt;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Node, Pod, PodStatus};
use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// How a pod's task begins.
#[derive(Debug, Clone)]
pub enum Beginning {
    Run,
    /// It was not let in.
    Reject(Verdict),
    /// It is in the runtime, but no source knows it.
    Orphan,
}

/// Everything a pod's task is started with.
#[derive(Debug)]
pub struct Assignment {
    pub pod: Arc<Pod>,
    pub origin: Origin,
    pub beginning: Beginning,
    /// The UID of the API object that shows the pod: its own, or its mirror's.
    pub object_uid: watch::Receiver<Option<String>>,
    /// From our own memory: what the API server holds is not known.
    pub is_remembered: bool,
    pub runtime_name: Arc<str>,
}

/// How the rest of the kubelet speaks to a pod's task.
#[derive(Debug)]
pub struct Handle {
    pub events: mpsc::UnboundedSender<Event>,
    pub full_name: String,
    pub origin: Origin,
    pub is_orphan: bool,
    pub is_rejected: bool,
}

/// A pod's task is over.
#[derive(Debug)]
pub struct Ending {
    pub uid: String,
    /// It broke down; the pod is as it was.
    pub is_failure: bool,
}

/// How long a pod whose task broke down rests before it gets another.
const REST: Duration = Duration::from_secs(10);

/// Starts a pod's task. `ended` is told when nothing is left of it.
pub fn spawn(
    assignment: Assignment,
    services: Services,
    directory: PodDirectory,
    ended: mpsc::UnboundedSender<Ending>,
) -> Handle {
    let (events, inbox) = mpsc::unbounded_channel();
    let handle = Handle {
        events: events.clone(),
        full_name: labels::full_name(&assignment.pod),
        origin: assignment.origin,
        is_orphan: matches!(assignment.beginning, Beginning::Orphan),
        is_rejected: matches!(assignment.beginning, Beginning::Reject(_)),
    };
    tokio::spawn(async move {
        let uid = labels::identity(&assignment.pod).2.to_owned();
        let worker = Worker::new(assignment, services, directory.clone(), events);
        let is_failure = AssertUnwindSafe(worker.run(inbox)).catch_unwind().await.is_err();
        if is_failure {
            // One pod's trouble must not become the node's: it is looked at anew by a fresh task.
            tracing::error!(pod_uid = uid, "the pod's task broke down and is started again in a moment");
            tokio::time::sleep(REST).await;
        }
        directory.forget(&uid);
        // Nobody listens any more only when the kubelet itself ends.
        ended.send(Ending { uid, is_failure }).ok();
    });
    handle
}

struct Worker {
    machine: PodMachine,
    executor: Executor,
    services: Services,
    directory: PodDirectory,
    runtime_name: Arc<str>,
    node: watch::Receiver<Option<Arc<Node>>>,
    desired: Option<watch::Sender<Desired>>,
    published: Option<PodStatus>,
    first_events: Vec<Event>,
    is_orphan: bool,
    /// Where pods of the API are remembered for a life without the API server.
    place: Option<Place>,
    /// The states of containers as last told in the log.
    told: Option<HashMap<String, RunState>>,
}

impl Worker {
    fn new(
        assignment: Assignment,
        services: Services,
        directory: PodDirectory,
        events: mpsc::UnboundedSender<Event>,
    ) -> Self {
        let Assignment { mut pod, origin, beginning, object_uid, is_remembered, runtime_name } = assignment;
        let uid = labels::identity(&pod).2.to_owned();
        let settings = &services.context.settings;
        if origin == Origin::File {
            let status = persist::load(&settings.root_dir, &uid);
            pod = Arc::new(Pod { status, ..(*pod).clone() });
        }
        let is_orphan = matches!(beginning, Beginning::Orphan);
        let is_rejected = matches!(beginning, Beginning::Reject(_));
        let has_memory = origin == Origin::Api && services.context.api.is_some();
        let place = (has_memory && !is_orphan && !is_rejected).then(|| Place::of(&settings.root_dir, &uid));
        let first_events = match beginning {
            Beginning::Run if pod.metadata.deletion_timestamp.is_some() => {
                vec![Event::Updated(Arc::clone(&pod))]
            }
            Beginning::Run => Vec::new(),
            Beginning::Reject(verdict) => vec![Event::Stop(verdict)],
            Beginning::Orphan => vec![Event::Removed],
        };
        let longest = SignedDuration::try_from(settings.max_container_restart_period)
            .unwrap_or(SignedDuration::from_secs(300));
        // What a mirror holds is not known here, nor what has become of an object since it was remembered.
        let held = pod.status.clone().filter(|_| origin == Origin::Api && !is_remembered);
        let desired =
            (!is_orphan).then(|| start_writer(&services, &pod, held, object_uid, events.clone())).flatten();
        Self {
            machine: PodMachine::new(pod, origin, longest, Timestamp::now()),
            executor: Executor::new(services.clone(), &uid, events),
            node: services.context.node.clone(),
            services,
            directory,
            runtime_name,
            desired,
            published: None,
            first_events,
            is_orphan,
            place,
            told: None,
        }
    }

    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Event>) {
        let first = std::mem::take(&mut self.first_events);
        if first.is_empty() {
            self = self.turn(Event::Tick);
        }
        for event in first {
            self = self.turn(event);
        }
        let mut node = self.node.clone();
        let mut node_alive = true;
        while !self.machine.is_over() {
            let wake = self.machine.wake.map(|at| until(at, Timestamp::now()));
            let sleep = async {
                match wake {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            let event = tokio::select! {
                event = inbox.recv() => match event {
                    Some(event) => event,
                    None => return,
                },
                () = sleep => Event::Tick,
                // Addresses of the node are part of every status.
                changed = node.changed(), if node_alive => {
                    node_alive = changed.is_ok();
                    Event::Tick
                }
            };
            self = self.turn(event);
        }
        let (name, namespace, uid) = labels::identity(&self.machine.pod);
        tracing::info!(pod = name, namespace, uid, "pod deleted");
    }

    fn turn(mut self, event: Event) -> Self {
        let now = Timestamp::now();
        // Now there is a directory to remember the pod in; and of a changed pod the change is remembered.
        let is_memorable = matches!(event, Event::HostPrepared(Ok(())) | Event::Updated(_));
        let (machine, actions) = step(self.machine, event, now);
        self.machine = machine;
        self.tell();
        self.publish(now, is_memorable);
        for action in actions {
            match action {
                Action::DeleteFromApi => self.want_deletion(),
                // There is no object an orphan's events could be about.
                Action::Report(..) if self.is_orphan => {}
                action => self.executor.begin(action, Arc::clone(&self.machine.pod)),
            }
        }
        self
    }

    /// Hands a changed status on. Nothing is told before the runtime has been seen: it would be a guess.
    fn publish(&mut self, now: Timestamp, is_memorable: bool) {
        if self.is_orphan || !(self.machine.observed || self.machine.is_rejected()) {
            return;
        }
        let host_ips = self.services.context.host_ips();
        let facts = NodeFacts { host_ips: &host_ips, runtime_name: &self.runtime_name };
        let status = compute(&self.machine, facts, now);
        let shown = self.directory.publish(&self.machine.pod, &status, &self.machine.runtime);
        let is_new = self.published.as_ref() != Some(&status);
        if let Some(place) = self.place.as_ref().filter(|_| (is_new || is_memorable) && !self.is_gone()) {
            place.put(shown);
        }
        if !is_new {
            return;
        }
        self.machine.prior = status.clone();
        self.published = Some(status.clone());
        if self.machine.origin == Origin::File {
            self.remember(&status);
        }
        if let Some(desired) = &self.desired {
            let status = Some(Arc::new(status));
            desired.send_modify(|desired| desired.status = status);
        }
    }

    fn remember(&self, status: &PodStatus) {
        if self.is_gone() {
            return;
        }
        let root = &self.services.context.settings.root_dir;
        if let Err(error) = persist::save(root, self.machine.uid(), status) {
            let (name, namespace, _) = labels::identity(&self.machine.pod);
            tracing::warn!(pod = name, namespace, %error, "status not remembered: after a restart of the kubelet readiness starts from the probes");
        }
    }

    /// Its source has it no more: nothing of it is worth remembering.
    fn is_gone(&self) -> bool {
        matches!(&self.machine.goal, Goal::Stop(stopping) if stopping.gone)
    }

    /// Says in the log what ended. What had ended before we came is old news.
    fn tell(&mut self) {
        if !self.machine.observed {
            return;
        }
        let records = &self.machine.runtime.containers;
        let now: HashMap<String, RunState> =
            records.iter().map(|record| (record.id.clone(), record.state)).collect();
        let before = self.told.replace(now);
        let Some(before) = before else { return };
        let (name, namespace, _) = labels::identity(&self.machine.pod);
        for record in records.iter().filter(|record| record.has_exited()) {
            if before.get(&record.id) != Some(&RunState::Exited) {
                tracing::info!(
                    pod = name,
                    namespace,
                    container = record.name,
                    exit_code = record.exit_code,
                    reason = record.reason,
                    attempt = record.attempt,
                    "container exited"
                );
            }
        }
    }

    fn want_deletion(&self) {
        match &self.desired {
            Some(desired) => desired.send_modify(|desired| desired.delete = true),
            None => self.executor.tell(Event::ApiDeleted),
        }
    }
}

fn start_writer(
    services: &Services,
    pod: &Arc<Pod>,
    held: Option<PodStatus>,
    object_uid: watch::Receiver<Option<String>>,
    events: mpsc::UnboundedSender<Event>,
) -> Option<watch::Sender<Desired>> {
    let client = services.context.api.clone()?;
    let (name, namespace, _) = labels::identity(pod);
    let target = Target { namespace: namespace.to_owned(), name: name.to_owned(), uid: object_uid };
    let (desired, wanted) = watch::channel(Desired::default());
    let deleted = move || {
        events.send(Event::ApiDeleted).ok();
    };
    tokio::spawn(writer::run(client, target, wanted, held, deleted));
    Some(desired)
}

fn until(at: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(at.duration_since(now)).unwrap_or(Duration::ZERO) + Duration::from_millis(1)
}
