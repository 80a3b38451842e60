//! List-watch that survives everything: expired versions, broken connections, a server that is gone for minutes.
//!
//! Invariants: after every (re)list comes a complete `Listed`; between two lists events come in the server's order without
//! a gap, because a watch always resumes at the version of the last thing delivered.

use crate::backoff::{Backoff, chance};
use crate::client::{Client, StatusObject};
use crate::error::ApiError;
use bytes::{Buf, Bytes, BytesMut};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use std::fmt::Write;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

/// Objects per page of a list: bounds the memory of one answer.
const PAGE: usize = 500;
/// A watch is asked to last this long, plus up to as much again, so that watches don't all end together.
const WATCH_SECONDS: u32 = 300;
/// How much longer than asked a watch may stay silent before it is given up.
const GRACE: Duration = Duration::from_secs(60);
/// Room for events the consumer hasn't taken yet.
const CHANNEL: usize = 64;
/// A longer line than any object can be is not an event.
const LONGEST_EVENT: usize = 16 << 20;

/// What to watch: a collection's path and selectors.
#[derive(Debug, Clone, Default)]
pub struct WatchRequest {
    /// Such as `/api/v1/pods`.
    pub path: String,
    pub label_selector: String,
    pub field_selector: String,
}

/// What a watch tells. After every (re)list comes a complete `Listed`, so a consumer replaces its state and cannot miss
/// a deletion.
#[derive(Debug, Clone)]
pub enum WatchEvent<T> {
    Listed(Vec<T>),
    Applied(T),
    Deleted(T),
}

impl WatchRequest {
    /// The collection's path with the selectors and more of a query.
    fn url(&self, more: &str) -> String {
        let mut url = self.path.clone();
        let mut mark = if url.contains('?') { '&' } else { '?' };
        for (key, value) in [("labelSelector", &self.label_selector), ("fieldSelector", &self.field_selector)]
        {
            if !value.is_empty() {
                let _ = write!(url, "{mark}{key}={}", escape(value));
                mark = '&';
            }
        }
        if !more.is_empty() {
            let _ = write!(url, "{mark}{more}");
        }
        url
    }
}

/// Percent-encodes a query value.
#[must_use]
pub fn escape(value: &str) -> String {
    value.bytes().fold(String::with_capacity(value.len()), |mut text, byte| {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                text.push(char::from(byte))
            }
            _ => {
                let _ = write!(text, "%{byte:02X}");
            }
        }
        text
    })
}

/// Starts watching in a task of its own that ends when the receiver is dropped. `T` needs `metadata.resourceVersion`
/// only on the wire; it may be any slim struct.
pub fn watch<T: DeserializeOwned + Send + 'static>(
    client: &Client,
    request: WatchRequest,
) -> mpsc::Receiver<WatchEvent<T>> {
    let (sender, receiver) = mpsc::channel(CHANNEL);
    let watcher = Watcher { client: client.clone(), request, sender, backoff: Backoff::default() };
    tokio::spawn(async move {
        let gone = watcher.sender.clone();
        tokio::select! {
            () = gone.closed() => {}
            () = watcher.run() => {}
        }
    });
    receiver
}

/// Lists a collection once, page by page.
pub async fn list<T: DeserializeOwned>(client: &Client, request: &WatchRequest) -> Result<Vec<T>, ApiError> {
    list_from(client, request).await.map(|(items, _)| items)
}

/// Where the watcher stands.
enum State {
    Unlisted,
    /// Everything up to this version has been delivered.
    At(String),
}

/// The consumer is gone.
struct Closed;

struct Watcher<T> {
    client: Client,
    request: WatchRequest,
    sender: mpsc::Sender<WatchEvent<T>>,
    backoff: Backoff,
}

impl<T: DeserializeOwned> Watcher<T> {
    async fn run(mut self) {
        let mut state = State::Unlisted;
        while let Ok(next) = self.step(state).await {
            state = next;
        }
    }

    async fn step(&mut self, state: State) -> Result<State, Closed> {
        match state {
            State::Unlisted => match list_from(&self.client, &self.request).await {
                Ok((items, version)) => {
                    self.deliver(WatchEvent::Listed(items)).await?;
                    self.backoff.reset();
                    Ok(State::At(version))
                }
                Err(error) => {
                    self.failed("list", &error).await;
                    Ok(State::Unlisted)
                }
            },
            State::At(version) => self.follow(version).await,
        }
    }

    /// Watches until the stream ends, however that happens.
    async fn follow(&mut self, mut version: String) -> Result<State, Closed> {
        let seconds = f64::from(WATCH_SECONDS) * (1.0 + chance());
        let query = format!(
            "watch=true&allowWatchBookmarks=true&timeoutSeconds={seconds:.0}&resourceVersion={}",
            escape(&version)
        );
        let started = Instant::now();
        let mut answer = match self.client.stream(&self.request.url(&query)).await {
            Ok(answer) => answer,
            Err(error) if is_expired(error.code()) => return Ok(State::Unlisted),
            Err(error) => {
                self.failed("watch", &error).await;
                return Ok(State::At(version));
            }
        };
        let deadline = started + Duration::from_secs_f64(seconds) + GRACE;
        let mut lines = Lines::default();
        loop {
            let piece = match tokio::time::timeout_at(deadline, answer.next()).await {
                Ok(Ok(Some(piece))) => piece,
                Ok(Ok(None)) | Err(_) => break,
                Ok(Err(error)) => {
                    tracing::debug!(path = %self.request.path, %error, "watch broke off");
                    break;
                }
            };
            lines.push(&piece);
            while let Some(line) = lines.next() {
                match self.event(&line, &mut version).await? {
                    Told::More => self.backoff.reset(),
                    Told::Expired => return Ok(State::Unlisted),
                    Told::Failed => {
                        sleep(self.backoff.next(chance())).await;
                        return Ok(State::At(version));
                    }
                }
            }
            if lines.pending() > LONGEST_EVENT {
                tracing::warn!(path = %self.request.path, "the server sends an event without end, watching anew");
                return Ok(State::Unlisted);
            }
        }
        // A server that closes every watch at once must not be asked in a tight loop.
        if started.elapsed() < Duration::from_secs(1) {
            sleep(self.backoff.next(chance())).await;
        }
        Ok(State::At(version))
    }

    /// Takes one line of the stream.
    async fn event(&self, line: &[u8], version: &mut String) -> Result<Told, Closed> {
        let path = &self.request.path;
        let event: Event<'_> = match serde_json::from_slice(line) {
            Ok(event) => event,
            Err(error) => {
                tracing::warn!(%path, %error, "cannot understand an event, listing anew");
                return Ok(Told::Expired);
            }
        };
        if event.kind == "ERROR" {
            let status: StatusObject = serde_json::from_str(event.object.get()).unwrap_or_default();
            if is_expired(Some(status.code)) || status.reason == "Expired" {
                return Ok(Told::Expired);
            }
            tracing::warn!(%path, code = status.code, message = %status.message, "the server ended the watch");
            return Ok(Told::Failed);
        }
        let at = serde_json::from_str::<Versioned>(event.object.get())
            .map(|object| object.metadata.resource_version)
            .unwrap_or_default();
        match event.kind.as_ref() {
            "ADDED" | "MODIFIED" => {
                if let Some(object) = decode(path, event.object) {
                    self.deliver(WatchEvent::Applied(object)).await?;
                }
            }
            "DELETED" => {
                if let Some(object) = decode(path, event.object) {
                    self.deliver(WatchEvent::Deleted(object)).await?;
                }
            }
            "BOOKMARK" => {}
            other => tracing::debug!(%path, kind = other, "event of an unknown kind"),
        }
        if !at.is_empty() {
            *version = at;
        }
        Ok(Told::More)
    }

    async fn deliver(&self, event: WatchEvent<T>) -> Result<(), Closed> {
        self.sender.send(event).await.map_err(|_| Closed)
    }

    /// Waits after a failure: as long as the back-off says, or until the server is back.
    async fn failed(&mut self, what: &str, error: &ApiError) {
        let delay = self.backoff.next(chance());
        tracing::warn!(path = %self.request.path, %error, delay_ms = delay.as_millis(), "{what} failed, trying again");
        let server_asks = match error {
            ApiError::Status { retry_after: Some(seconds), .. } => {
                Duration::from_secs(u64::from(*seconds).min(60))
            }
            _ => Duration::ZERO,
        };
        if matches!(error, ApiError::Unreachable { .. }) {
            // A second at least, or a server that accepts connections only to drop them would be asked in a tight loop.
            let first = delay.min(Duration::from_secs(1));
            sleep(first).await;
            if delay > first {
                self.client.wait_reachable(delay - first).await;
            }
        } else {
            sleep(delay.max(server_asks)).await;
        }
    }
}

/// What a line of the stream means for the watch.
enum Told {
    More,
    Expired,
    Failed,
}

fn is_expired(code: Option<u16>) -> bool {
    code == Some(410)
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(rename = "type", borrow)]
    kind: std::borrow::Cow<'a, str>,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Versioned {
    metadata: ListMeta,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ListMeta {
    resource_version: String,
    #[serde(rename = "continue")]
    more: String,
}

#[derive(Deserialize)]
struct Page<'a> {
    #[serde(default)]
    metadata: ListMeta,
    /// Go writes an empty list as null.
    #[serde(borrow, default)]
    items: Option<Vec<&'a RawValue>>,
}

/// One object that cannot be understood must not hide all others.
fn decode<T: DeserializeOwned>(path: &str, object: &RawValue) -> Option<T> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Name {
        metadata: NameMeta,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct NameMeta {
        namespace: String,
        name: String,
    }
    match serde_json::from_str(object.get()) {
        Ok(object) => Some(object),
        Err(error) => {
            let Name { metadata: NameMeta { namespace, name } } =
                serde_json::from_str(object.get()).unwrap_or_default();
            tracing::warn!(%path, %namespace, %name, %error, "cannot understand an object, leaving it out");
            None
        }
    }
}

async fn list_from<T: DeserializeOwned>(
    client: &Client,
    request: &WatchRequest,
) -> Result<(Vec<T>, String), ApiError> {
    let mut objects = Vec::new();
    let mut more = String::new();
    loop {
        // Without a version the answer is the newest state, never one that a lagging server still remembers.
        let mut query = format!("limit={PAGE}");
        if !more.is_empty() {
            let _ = write!(query, "&continue={}", escape(&more));
        }
        let url = request.url(&query);
        let body = match client.get_bytes(&url).await {
            // The list took longer than its continuation lives: from the start.
            Err(error) if is_expired(error.code()) && !more.is_empty() => {
                objects.clear();
                more.clear();
                continue;
            }
            other => other?,
        };
        let page: Page<'_> = serde_json::from_slice(&body).map_err(|error| ApiError::Malformed {
            method: "GET",
            path: url,
            cause: error.to_string(),
        })?;
        objects.extend(
            page.items.unwrap_or_default().into_iter().filter_map(|item| decode(&request.path, item)),
        );
        if page.metadata.more.is_empty() {
            return Ok((objects, page.metadata.resource_version));
        }
        more = page.metadata.more;
    }
}

/// Cuts a stream into lines.
#[derive(Default)]
struct Lines {
    buffer: BytesMut,
    /// Everything before has been searched.
    searched: usize,
}

impl Lines {
    fn push(&mut self, piece: &[u8]) {
        self.buffer.extend_from_slice(piece);
    }

    fn next(&mut self) -> Option<Bytes> {
        loop {
            let Some(at) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') else {
                self.searched = self.buffer.len();
                return None;
            };
            let line = self.buffer.split_to(self.searched + at).freeze();
            self.buffer.advance(1);
            self.searched = 0;
            if !line.is_empty() {
                return Some(line);
            }
        }
    }

    fn pending(&self) -> usize {
        self.buffer.len()
    }
}

/// Waits for the first event of a watch that `found` accepts.
pub async fn wait_for<T, R>(
    client: &Client,
    request: WatchRequest,
    longest: Duration,
    mut found: impl FnMut(T) -> Option<R>,
) -> Option<R>
where
    T: DeserializeOwned + Send + 'static,
{
    let mut events = watch::<T>(client, request);
    timeout(longest, async {
        while let Some(event) = events.recv().await {
            let result = match event {
                WatchEvent::Listed(objects) => objects.into_iter().find_map(&mut found),
                WatchEvent::Applied(object) => found(object),
                WatchEvent::Deleted(_) => None,
            };
            if result.is_some() {
                return result;
            }
        }
        None
    })
    .await
    .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_whatever_the_pieces() {
        let mut lines = Lines::default();
        lines.push(b"{\"a\"");
        assert!(lines.next().is_none());
        lines.push(b":1}\n\n{\"b\":2}\n{");
        assert_eq!(lines.next().as_deref(), Some(b"{\"a\":1}".as_slice()));
        assert_eq!(lines.next().as_deref(), Some(b"{\"b\":2}".as_slice()));
        assert!(lines.next().is_none());
        assert_eq!(lines.pending(), 1);
    }

    #[test]
    fn selectors_become_an_escaped_query() {
        let request = WatchRequest {
            path: "/api/v1/pods".to_owned(),
            field_selector: "spec.nodeName=a".to_owned(),
            ..WatchRequest::default()
        };
        assert_eq!(request.url("limit=1"), "/api/v1/pods?fieldSelector=spec.nodeName%3Da&limit=1");
        assert_eq!(WatchRequest { path: "/x".to_owned(), ..WatchRequest::default() }.url(""), "/x");
    }
}
