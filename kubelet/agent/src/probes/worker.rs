//! One probe's task.

use crate::cri::Cri;
use crate::probes::counts::Counts;
use crate::probes::exec::{self, Ended};
use crate::probes::state::{Outcome, ProbeKind, ProbeState, Transition};
use crate::probes::target::{Address, HttpTarget, TargetError, host, port};
use crate::probes::{ProbeEvent, Seed, grpc, http_client, seconds, timeout};
use futures_util::FutureExt;
use k8s_openapi::api::core::v1::{Container, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

const AGENT: &str = "kube-probe/1.36";
/// A probe that did not work is tried again at once so often.
const ATTEMPTS: u32 = 3;
/// A container that has been running for longer was not started by this process just now.
const ALREADY_RUNNING: Duration = Duration::from_secs(2);

pub(super) struct Job {
    pub(super) cri: Cri,
    pub(super) events: mpsc::UnboundedSender<ProbeEvent>,
    pub(super) pod_uid: String,
    pub(super) container: Container,
    pub(super) container_id: String,
    pub(super) pod_ip: Option<IpAddr>,
    pub(super) kind: ProbeKind,
    pub(super) probe: Probe,
    pub(super) seed: Seed,
    /// How long this process has been probing.
    pub(super) prober_age: Duration,
    /// Set by the startup probe's success.
    pub(super) started: Arc<watch::Sender<bool>>,
    pub(super) gate: watch::Receiver<bool>,
    pub(super) counts: Arc<Counts>,
}

impl Job {
    /// Probes until the container has to be killed, has started, or the task is aborted.
    pub(super) async fn run(mut self) {
        let passing = match self.kind {
            ProbeKind::Startup => false,
            ProbeKind::Liveness => true,
            ProbeKind::Readiness => self.seed.ready,
        };
        let mut state = ProbeState::new(self.kind, &self.probe, passing);
        let period = seconds(self.probe.period_seconds, 10).max(Duration::from_secs(1));
        let delay = seconds(self.probe.initial_delay_seconds, 0).saturating_sub(self.seed.running_for);
        tokio::time::sleep(delay + self.jitter(period)).await;
        // The startup probe itself opens the gate; it can close no more.
        if self.kind != ProbeKind::Startup && self.gate.wait_for(|started| *started).await.is_err() {
            return;
        }
        let mut ticks = tokio::time::interval(period);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let outcome = self.probe_with_retries().await;
            self.counts.add(&outcome);
            let transition = state.record(&outcome);
            if transition == Some(Transition::Started) {
                self.started.send_replace(true);
            }
            if (transition.is_some() || outcome != Outcome::Success) && !self.tell(outcome, transition) {
                return;
            }
            if matches!(transition, Some(Transition::Started | Transition::Kill { .. })) {
                return;
            }
        }
    }

    /// After a restart of ours all probes of the node would begin at once. They are spread over their periods, each
    /// always by the same part. Containers that we have just started ourselves are probed without delay.
    fn jitter(&self, period: Duration) -> Duration {
        if self.seed.running_for < ALREADY_RUNNING || self.prober_age >= period {
            return Duration::ZERO;
        }
        let kind = self.kind.to_string();
        let hash = self
            .container_id
            .bytes()
            .chain(kind.bytes())
            .fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        period.mul_f64(f64::from(hash) / f64::from(u32::MAX))
    }

    /// Whether anybody still listens.
    fn tell(&self, outcome: Outcome, transition: Option<Transition>) -> bool {
        let event = ProbeEvent {
            pod_uid: self.pod_uid.clone(),
            container: self.container.name.clone(),
            container_id: self.container_id.clone(),
            kind: self.kind,
            outcome,
            transition,
        };
        self.events.send(event).is_ok()
    }

    async fn probe_with_retries(&self) -> Outcome {
        // In boxes: they live only while a probe runs, so a sleeping task stays small.
        let mut outcome = self.probe().boxed().await;
        for _ in 1..ATTEMPTS {
            if !matches!(outcome, Outcome::Unknown { .. }) {
                break;
            }
            outcome = self.probe().boxed().await;
        }
        outcome
    }

    async fn probe(&self) -> Outcome {
        let timeout = timeout(&self.probe);
        let unknown = |error: TargetError| Outcome::Unknown { message: error.to_string() };
        if let Some(action) = &self.probe.exec {
            let command = action.command.as_deref().unwrap_or_default();
            return self.exec(command, timeout).await;
        }
        if let Some(action) = &self.probe.http_get {
            return match HttpTarget::new(action, &self.container, self.pod_ip) {
                Ok(target) => http_get(&target, timeout).await,
                Err(error) => unknown(error),
            };
        }
        if let Some(action) = &self.probe.tcp_socket {
            let address = self.address(action.host.as_deref(), &action.port);
            return match address {
                Ok(address) => tcp_socket(&address, timeout).await,
                Err(error) => unknown(error),
            };
        }
        if let Some(action) = &self.probe.grpc {
            let service = action.service.as_deref().unwrap_or_default();
            let address = match self.address(None, &IntOrString::Int(action.port)) {
                Ok(address) => address,
                Err(error) => return unknown(error),
            };
            let check = grpc::check(&address, service, AGENT, timeout);
            return tokio::time::timeout(timeout, check).await.unwrap_or_else(|_| Outcome::Failure {
                message: format!("timeout: health rpc did not complete within {timeout:?}"),
            });
        }
        Outcome::Unknown { message: "the probe names no handler".to_owned() }
    }

    fn address(&self, stated: Option<&str>, number: &IntOrString) -> Result<Address, TargetError> {
        Ok(Address { host: host(stated, self.pod_ip)?, port: port(number, &self.container)? })
    }

    async fn exec(&self, command: &[String], timeout: Duration) -> Outcome {
        match exec::run(&self.cri, &self.container_id, command, timeout).await {
            Ended::Exit { code: 0, .. } => Outcome::Success,
            Ended::Exit { output, .. } => Outcome::Failure { message: output },
            Ended::TimedOut => Outcome::Failure {
                message: format!("command timed out: {:?} timed out after {timeout:?}", command.join(" ")),
            },
            Ended::Error { message } => Outcome::Unknown { message },
        }
    }
}

async fn http_get(target: &HttpTarget, timeout: Duration) -> Outcome {
    let failure = |cause: String| Outcome::Failure { message: format!("Get {:?}: {cause}", target.url()) };
    match tokio::time::timeout(timeout, http_client::get(target, AGENT)).await {
        Err(_) => {
            failure("context deadline exceeded (Client.Timeout exceeded while awaiting headers)".to_owned())
        }
        Ok(Err(error)) => failure(error.to_string()),
        Ok(Ok(answer)) if answer.left_redirect => {
            Outcome::Warning { message: "Probe terminated redirects".to_owned() }
        }
        Ok(Ok(answer)) if (200..400).contains(&answer.status.as_u16()) => Outcome::Success,
        Ok(Ok(answer)) => Outcome::Failure {
            message: format!("HTTP probe failed with statuscode: {}", answer.status.as_u16()),
        },
    }
}

async fn tcp_socket(address: &Address, timeout: Duration) -> Outcome {
    match tokio::time::timeout(timeout, http_client::connect(address)).await {
        Err(_) => Outcome::Failure { message: format!("dial tcp {}: i/o timeout", address.authority()) },
        Ok(Err(error)) => Outcome::Failure { message: error.to_string() },
        Ok(Ok(_)) => Outcome::Success,
    }
}
