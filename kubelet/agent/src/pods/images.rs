//! Images for containers: whether to pull, with what credentials, how many at once.
//!
//! All pods share one manager. Pulls of the same image with the same credentials are one pull; a pull goes on when the
//! pod that wanted it is gone, because the next one is likely to want it too.

use super::credentials::{Credentials, Keyring};
use super::events::{Events, PodEvent};
use super::machine::{PulledImage, StartFailure};
use super::runtime_client::{RuntimeClient, RuntimeError};
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use k8s_openapi::api::core::v1::{Container, Pod};
use orlop_proto::cri;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// A pull that takes longer has lost its registry without noticing.
const PULL_PATIENCE: Duration = Duration::from_secs(3600);

type Pull = Shared<BoxFuture<'static, Result<String, RuntimeError>>>;

#[derive(Debug)]
pub struct ImageManager {
    runtime: RuntimeClient,
    events: Events,
    keyring: Keyring,
    slots: Arc<Semaphore>,
    pace: Arc<Mutex<Pace>>,
    running: Arc<Mutex<HashMap<(String, u64), Pull>>>,
}

/// When a container may use an image without asking the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Policy {
    Always,
    IfNotPresent,
    Never,
}

impl Policy {
    fn of(container: &Container, image: &str) -> Self {
        match container.image_pull_policy.as_deref() {
            Some("Always") => Self::Always,
            Some("Never") => Self::Never,
            Some(_) => Self::IfNotPresent,
            None if image.ends_with(":latest") => Self::Always,
            None => Self::IfNotPresent,
        }
    }
}

impl ImageManager {
    #[must_use]
    pub fn new(
        runtime: RuntimeClient,
        events: Events,
        keyring: Keyring,
        parallel: usize,
        qps: u32,
        burst: u32,
    ) -> Self {
        Self {
            runtime,
            events,
            keyring,
            slots: Arc::new(Semaphore::new(parallel.max(1))),
            pace: Arc::new(Mutex::new(Pace::new(qps, burst, Instant::now()))),
            running: Arc::default(),
        }
    }

    /// Sees to it that a container's image is here, and says which one it is.
    pub async fn ensure(&self, pod: &Arc<Pod>, container: &Container) -> Result<PulledImage, StartFailure> {
        let result = self.obtain(pod, container).await;
        if let Err(failure) = &result {
            let image = container.image.as_deref().unwrap_or_default();
            self.tell(
                pod,
                container,
                PodEvent::warning("Failed", format!("Failed to pull image \"{image}\": {}", failure.message)),
            );
            self.tell(pod, container, PodEvent::warning("Failed", format!("Error: {}", failure.reason)));
        }
        result
    }

    async fn obtain(&self, pod: &Arc<Pod>, container: &Container) -> Result<PulledImage, StartFailure> {
        let written = container.image.as_deref().unwrap_or_default();
        let image = with_default_tag(written).ok_or_else(|| {
            fail(
                "InvalidImageName",
                format!("image name \"{written}\" is not of the form [registry/]name[:tag][@digest]"),
            )
        })?;
        let policy = Policy::of(container, &image);
        let present = self.runtime.image(spec(&image, written)).await;
        let present = present.map_err(|error| fail("ImageInspectError", error.to_string()))?;
        match (policy, present) {
            (Policy::IfNotPresent | Policy::Never, Some(found)) => {
                let message = format!("Container image \"{written}\" already present on machine");
                self.tell(pod, container, PodEvent::normal("Pulled", message));
                let image_ref = reference(&found);
                Ok(PulledImage { image: found, image_ref })
            }
            (Policy::Never, None) => Err(fail(
                "ErrImageNeverPull",
                format!("image \"{written}\" is not on this machine and its pull policy is Never"),
            )),
            _ => self.pull(pod, container, &image, written).await,
        }
    }

    async fn pull(
        &self,
        pod: &Arc<Pod>,
        container: &Container,
        image: &str,
        written: &str,
    ) -> Result<PulledImage, StartFailure> {
        self.tell(pod, container, PodEvent::normal("Pulling", format!("Pulling image \"{written}\"")));
        let begin = Instant::now();
        let (candidates, missing) = self.keyring.candidates(pod, image).await;
        for secret in missing {
            let message =
                format!("image pull secret {secret} could not be used; the pull goes on without it");
            self.events.emit(pod, PodEvent::warning("FailedToRetrieveImagePullSecret", message));
        }
        let mut last = None;
        for credentials in candidates {
            match self.shared_pull(image, written, credentials).await {
                Ok(_) => {
                    last = None;
                    break;
                }
                Err(error) => last = Some(error),
            }
        }
        if let Some(error) = last {
            return Err(fail(pull_reason(&error), error.words()));
        }
        let found = self.runtime.image(spec(image, written)).await;
        let found = found.map_err(|error| fail("ImageInspectError", error.to_string()))?;
        let found = found.ok_or_else(|| fail("ErrImagePull", "the image was pulled and is gone again"))?;
        let message = format!(
            "Successfully pulled image \"{written}\" in {:.3}s. Image size: {} bytes.",
            begin.elapsed().as_secs_f64(),
            found.size
        );
        self.tell(pod, container, PodEvent::normal("Pulled", message));
        let image_ref = reference(&found);
        Ok(PulledImage { image: found, image_ref })
    }

    async fn shared_pull(
        &self,
        image: &str,
        written: &str,
        credentials: Option<Credentials>,
    ) -> Result<String, RuntimeError> {
        let key = (image.to_owned(), credentials.as_ref().map_or(0, Credentials::fingerprint));
        let pull = {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            running
                .entry(key.clone())
                .or_insert_with(|| self.begin(&key, spec(image, written), credentials))
                .clone()
        };
        pull.await
    }

    fn begin(&self, key: &(String, u64), image: cri::ImageSpec, credentials: Option<Credentials>) -> Pull {
        let (runtime, slots, pace) = (self.runtime.clone(), Arc::clone(&self.slots), Arc::clone(&self.pace));
        let (running, key) = (Arc::clone(&self.running), key.clone());
        let request = cri::PullImageRequest {
            image: Some(image),
            auth: credentials.map(Into::into),
            sandbox_config: None,
        };
        let object = key.0.clone();
        let work = tokio::spawn(async move {
            // The semaphore is never closed; if it were, pulling without a slot is better than not at all.
            let _slot = slots.acquire_owned().await.ok();
            let wait = pace.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now());
            tokio::time::sleep(wait).await;
            let result = runtime.pull(request, PULL_PATIENCE).await;
            running.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
            result
        });
        async move {
            work.await.unwrap_or_else(|error| {
                Err(RuntimeError::Refused {
                    operation: "pull image",
                    object,
                    code: tonic::Code::Internal,
                    message: format!("the pull ended abnormally: {error}"),
                })
            })
        }
        .boxed()
        .shared()
    }

    fn tell(&self, pod: &Pod, container: &Container, event: PodEvent) {
        self.events.emit(pod, event.of_container(pod, &container.name));
    }
}

/// Lets `qps` begin per second, and `burst` at once.
#[derive(Debug)]
struct Pace {
    interval: Duration,
    burst: u32,
    /// When the bucket would be full again.
    full_at: Instant,
}

impl Pace {
    fn new(qps: u32, burst: u32, now: Instant) -> Self {
        let interval = Duration::from_secs(1).checked_div(qps).unwrap_or_default();
        Self { interval, burst: burst.max(1), full_at: now }
    }

    /// Takes one; gives how long to wait for it.
    fn take(&mut self, now: Instant) -> Duration {
        self.full_at = self.full_at.max(now) + self.interval;
        self.full_at.saturating_duration_since(now + self.interval * self.burst)
    }
}

fn spec(image: &str, written: &str) -> cri::ImageSpec {
    cri::ImageSpec {
        image: image.to_owned(),
        user_specified_image: written.to_owned(),
        ..cri::ImageSpec::default()
    }
}

/// What a pod's status names as the image's id: a digest that can be pulled, or the runtime's own id.
fn reference(image: &cri::Image) -> String {
    image.repo_digests.first().unwrap_or(&image.id).clone()
}

/// Runtimes tell an unreachable registry and a bad signature by words at the front of their message.
fn pull_reason(error: &RuntimeError) -> &'static str {
    let words = error.words();
    if words.starts_with("RegistryUnavailable") {
        "RegistryUnavailable"
    } else if words.starts_with("SignatureValidationFailed") {
        "SignatureValidationFailed"
    } else {
        "ErrImagePull"
    }
}

/// The name with `:latest` where it has neither tag nor digest; none when it cannot be an image name.
fn with_default_tag(image: &str) -> Option<String> {
    let (name, digest) = image.split_once('@').map_or((image, None), |(name, digest)| (name, Some(digest)));
    let (path, tag) = match name.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
        _ => (name, None),
    };
    let has_domain =
        path.split_once('/').is_some_and(|(first, _)| first.contains(['.', ':']) || first == "localhost");
    let repository = if has_domain { path.split_once('/').map_or(path, |(_, rest)| rest) } else { path };
    let is_part = |part: &str| {
        let bytes = part.as_bytes();
        let plain = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        bytes.first().is_some_and(plain)
            && bytes.last().is_some_and(plain)
            && bytes.iter().all(|byte| plain(byte) || matches!(byte, b'.' | b'_' | b'-'))
    };
    let tag_is_good = tag.is_none_or(|tag| {
        !tag.is_empty()
            && tag.len() <= 128
            && !tag.starts_with(['.', '-'])
            && tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
    });
    let digest_is_good = digest.is_none_or(|digest| {
        digest.split_once(':').is_some_and(|(algorithm, hex)| {
            !algorithm.is_empty() && hex.len() >= 32 && hex.bytes().all(|byte| byte.is_ascii_hexdigit())
        })
    });
    if !repository.split('/').all(is_part) || !tag_is_good || !digest_is_good {
        return None;
    }
    Some(if tag.is_none() && digest.is_none() { format!("{image}:latest") } else { image.to_owned() })
}

fn fail(reason: &str, message: impl Into<String>) -> StartFailure {
    StartFailure { reason: reason.to_owned(), message: message.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_tag_or_digest_is_the_latest() {
        assert_eq!(with_default_tag("busybox").as_deref(), Some("busybox:latest"));
        assert_eq!(with_default_tag("host:5000/a/b").as_deref(), Some("host:5000/a/b:latest"));
        assert_eq!(with_default_tag("host:5000/a/b:1").as_deref(), Some("host:5000/a/b:1"));
        let digest = format!("a@sha256:{}", "0".repeat(64));
        assert_eq!(with_default_tag(&digest), Some(digest));
    }

    #[test]
    fn what_cannot_be_an_image_is_refused() {
        for name in ["", "UPPER", "a b", "a:", "a@sha256:x", "/a", "a/", "a//b", "a:b:c/", "-a"] {
            assert_eq!(with_default_tag(name), None, "{name}");
        }
    }

    #[test]
    fn only_the_latest_tag_is_always_pulled_by_default() {
        let container = Container::default();
        assert_eq!(Policy::of(&container, "a:latest"), Policy::Always);
        assert_eq!(Policy::of(&container, "a:1"), Policy::IfNotPresent);
    }

    #[test]
    fn a_burst_begins_at_once_and_the_rest_is_paced() {
        let now = Instant::now();
        let mut pace = Pace::new(5, 2, now);
        let waits: Vec<_> = (0..4).map(|_| pace.take(now).as_millis()).collect();
        assert_eq!(waits, [0, 0, 200, 400]);
    }
}
