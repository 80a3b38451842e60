//! Renews a certificate before it expires and puts the new one into use without a restart.

use super::{CertificateError, CertificateStore, Pair, Purpose, request};
use crate::backoff::{Backoff, chance};
use crate::client::Client;
use crate::credentials::CertificateSlot;
use jiff::{SignedDuration, Timestamp};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The wall clock may jump, so a long wait is cut into pieces.
const LONGEST_SLEEP: Duration = Duration::from_secs(10 * 60);
/// After a refusal by a person or a policy, asking again soon would only pile up requests.
const AFTER_DENIAL: Duration = Duration::from_secs(5 * 60);

/// Where a new certificate goes.
#[derive(Debug, Clone)]
pub enum Sink {
    /// Into the client's own credentials.
    Client,
    /// Into the server that shows it.
    Server(Arc<CertificateSlot>),
}

/// When to renew: after 70 to 90 % of the certificate's life, spread by `chance` in 0..1.
#[must_use]
pub fn rotate_at(not_before: Timestamp, not_after: Timestamp, chance: f64) -> Timestamp {
    let life = not_after.duration_since(not_before).as_secs_f64().max(0.0);
    let share = 0.7 + 0.2 * chance.clamp(0.0, 1.0);
    SignedDuration::try_from_secs_f64(life * share)
        .ok()
        .and_then(|after| not_before.checked_add(after).ok())
        .unwrap_or(not_after)
}

/// A certificate that is kept fresh.
#[derive(Debug)]
pub struct Rotation {
    pub client: Client,
    pub store: CertificateStore,
    /// A change that the current certificate doesn't cover, such as a new address, renews at once.
    pub purpose: watch::Receiver<Purpose>,
    pub sink: Sink,
    /// Asked when the client certificate has expired, so that a node that slept too long finds back by itself.
    pub bootstrap_kubeconfig: Option<PathBuf>,
}

/// The last certificate that this rotation obtained.
struct Issued {
    at: Timestamp,
    purpose: Purpose,
}

impl Rotation {
    /// Runs until told to stop. Failures are logged and tried again.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut current = match self.store.current() {
            Ok(current) => current,
            Err(error) => {
                tracing::warn!(%error, "certificate in use cannot be read, asking for a new one");
                None
            }
        };
        if let Some(pair) = &current {
            self.install(pair);
        }
        let mut backoff = Backoff::default();
        let mut spread = chance();
        let mut issued: Option<Issued> = None;
        loop {
            let due = self.due(current.as_ref(), issued.as_ref(), spread);
            if !self.sleep_until(due, &stop).await {
                return;
            }
            if self.due(current.as_ref(), issued.as_ref(), spread) > Timestamp::now() {
                continue;
            }
            let purpose = self.purpose.borrow().clone();
            let result = tokio::select! {
                () = stop.cancelled() => return,
                result = self.renew(current.as_ref(), &purpose) => result,
            };
            match result {
                Ok(pair) => {
                    tracing::info!(not_after = %pair.not_after, "certificate renewed");
                    self.install(&pair);
                    issued = Some(Issued { at: Timestamp::now(), purpose });
                    current = Some(pair);
                    backoff.reset();
                    spread = chance();
                }
                Err(error) => {
                    let delay = match error {
                        CertificateError::Denied { .. } | CertificateError::Failed { .. } => AFTER_DENIAL,
                        _ => backoff.next(chance()),
                    };
                    tracing::warn!(%error, delay_s = delay.as_secs(), "certificate not renewed, trying again");
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(delay) => {}
                    }
                }
            }
        }
    }

    fn install(&self, pair: &Pair) {
        match &self.sink {
            Sink::Client => {
                let credentials = self.client.credentials();
                if credentials.certificate().is_none_or(|used| used.cert != pair.certified.cert) {
                    credentials.swap_certificate(Arc::clone(&pair.certified));
                }
            }
            Sink::Server(slot) => slot.set(Arc::clone(&pair.certified)),
        }
    }

    fn due(&self, current: Option<&Pair>, issued: Option<&Issued>, spread: f64) -> Timestamp {
        let purpose = self.purpose.borrow();
        match (current, issued) {
            (None, _) => Timestamp::MIN,
            (Some(pair), None) if covers(pair, &purpose) => {
                rotate_at(pair.not_before, pair.not_after, spread)
            }
            (Some(pair), Some(issued)) if covers(pair, &purpose) => {
                // Signers date certificates back; a very short one could be due the moment it is issued.
                rotate_at(pair.not_before, pair.not_after, spread).max(halfway(issued.at, pair.not_after))
            }
            // The signer left something out; it would do so again.
            (Some(_), Some(issued)) if issued.purpose == *purpose => {
                issued.at.checked_add(AFTER_DENIAL).unwrap_or(issued.at)
            }
            _ => Timestamp::MIN,
        }
    }

    /// Sleeps until then, or until the purpose changes. False when it is time to stop.
    async fn sleep_until(&mut self, due: Timestamp, stop: &CancellationToken) -> bool {
        loop {
            let left = due.duration_since(Timestamp::now());
            let Ok(left) = Duration::try_from(left) else { return !stop.is_cancelled() };
            if left.is_zero() {
                return !stop.is_cancelled();
            }
            tokio::select! {
                () = stop.cancelled() => return false,
                () = tokio::time::sleep(left.min(LONGEST_SLEEP)) => {}
                Ok(()) = self.purpose.changed() => return true,
            }
        }
    }

    async fn renew(&self, current: Option<&Pair>, purpose: &Purpose) -> Result<Pair, CertificateError> {
        let expired = current.is_none_or(|pair| pair.is_expired(Timestamp::now()));
        let client = match (&self.sink, &self.bootstrap_kubeconfig) {
            (Sink::Client, Some(file)) if expired => {
                tracing::warn!(file = %file.display(), "client certificate has expired, falling back to the bootstrap token");
                Client::from_kubeconfig(file)?
            }
            _ => self.client.clone(),
        };
        obtain(&client, &self.store, purpose).await
    }
}

/// Asks for a certificate with the key of an earlier attempt if there is one, and stores it.
pub(super) async fn obtain(
    client: &Client,
    store: &CertificateStore,
    purpose: &Purpose,
) -> Result<Pair, CertificateError> {
    let key = store.pending_key()?;
    match request(client, purpose, &key).await {
        Ok(chain) => store.store(&chain, &key, Timestamp::now()),
        Err(error) => {
            // The same key would only meet the same answer.
            if matches!(
                error,
                CertificateError::Denied { .. }
                    | CertificateError::Failed { .. }
                    | CertificateError::Issued { .. }
            ) {
                store.forget_pending()?;
            }
            Err(error)
        }
    }
}

/// Whether a certificate bears every name and address it is needed for.
fn covers(pair: &Pair, purpose: &Purpose) -> bool {
    match purpose {
        Purpose::Client { .. } => true,
        Purpose::Serving { addresses, names, .. } => {
            addresses.iter().all(|address| pair.addresses.contains(address))
                && names.iter().all(|name| pair.names.contains(name))
        }
    }
}

fn halfway(from: Timestamp, to: Timestamp) -> Timestamp {
    from.checked_add(to.duration_since(from) / 2).unwrap_or(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn renewal_falls_between_seventy_and_ninety_percent_of_life() {
        assert_eq!(rotate_at(at(1000), at(2000), 0.0), at(1700));
        assert_eq!(rotate_at(at(1000), at(2000), 1.0), at(1900));
        assert_eq!(rotate_at(at(1000), at(2000), 0.5), at(1800));
    }

    #[test]
    fn a_certificate_with_no_life_is_due_at_once() {
        assert_eq!(rotate_at(at(1000), at(1000), 0.5), at(1000));
        assert_eq!(rotate_at(at(2000), at(1000), 0.5), at(2000));
    }

    #[test]
    fn a_certificate_never_lasting_still_waits_half_of_what_is_left() {
        assert_eq!(halfway(at(0), at(100)), at(50));
    }

    proptest::proptest! {
        #[test]
        fn renewal_is_never_outside_the_certificates_life(start in 0i64..4_000_000_000, life in 0i64..2_000_000_000, chance in 0.0f64..1.0) {
            let due = rotate_at(at(start), at(start + life), chance);
            proptest::prop_assert!(due >= at(start) && due <= at(start + life));
        }
    }
}
