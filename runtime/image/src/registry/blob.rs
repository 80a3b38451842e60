//! A large blob as a stream of pieces that survives broken connections.
//!
//! When a transfer breaks off or stalls, it is taken up where it stopped (`Range`); a server that ignores the range
//! sends everything again and the known part is passed over. Only attempts without any progress count as failures.

use bytes::Bytes;
use http::{Method, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use super::session::Session;
use super::transport::root_cause;
use crate::digest::Digest;
use crate::error::ImageError;

pub(crate) struct BlobStream<'a> {
    session: &'a Session,
    path: String,
    size: u64,
    offset: u64,
    /// Index of the host in use.
    peer: usize,
    body: Option<Incoming>,
    /// Bytes to pass over in the current body.
    skip: u64,
    failures: u32,
}

impl<'a> BlobStream<'a> {
    pub(crate) fn new(session: &'a Session, digest: &Digest, size: u64) -> Self {
        let path = format!("blobs/{digest}");
        Self { session, path, size, offset: 0, peer: 0, body: None, skip: 0, failures: 0 }
    }

    /// The next piece; nothing at the end. Verification is the receiver's.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, ImageError> {
        loop {
            if self.offset >= self.size {
                return Ok(None);
            }
            if self.body.is_none() {
                self.connect().await?;
            }
            let Some(body) = &mut self.body else { continue };
            let frame = tokio::time::timeout(self.session.timing.stall, body.frame()).await;
            let cause = match frame {
                Ok(Some(Ok(frame))) => {
                    let Ok(mut data) = frame.into_data() else { continue };
                    let passed = usize::try_from(self.skip).unwrap_or(usize::MAX).min(data.len());
                    let _known = data.split_to(passed);
                    self.skip -= passed as u64;
                    if data.is_empty() {
                        continue;
                    }
                    self.offset += data.len() as u64;
                    self.failures = 0;
                    return Ok(Some(data));
                }
                Ok(Some(Err(error))) => root_cause(&error),
                Ok(None) => format!("it ended after {} of {} bytes", self.offset, self.size),
                Err(_) => format!("no data for {} s", self.session.timing.stall.as_secs()),
            };
            self.body = None;
            self.failures += 1;
            if self.failures >= self.session.timing.attempts {
                let peer = &self.session.peers[self.peer];
                return Err(self.session.unavailable(peer, &self.path, cause));
            }
            tracing::debug!(blob = self.path, offset = self.offset, cause, "resuming a transfer");
            tokio::time::sleep(self.session.timing.delay(self.failures, None)).await;
        }
    }

    async fn connect(&mut self) -> Result<(), ImageError> {
        let mut last = None;
        let range = (self.offset > 0).then_some(self.offset);
        while let Some(peer) = self.session.peers.get(self.peer) {
            let error = if peer.host.pull {
                match self.session.request(peer, &Method::GET, &self.path, range).await {
                    Ok(response) => {
                        // A partial answer that starts elsewhere would fail verification; asking anew is cheaper.
                        let partial = response.status() == StatusCode::PARTIAL_CONTENT
                            && content_start(response.headers()) == range;
                        self.skip = if partial { 0 } else { self.offset };
                        self.body = Some(response.into_body());
                        return Ok(());
                    }
                    Err(error) => Some(error),
                }
            } else {
                None
            };
            last = error.or(last);
            if self.peer + 1 == self.session.peers.len() {
                break;
            }
            self.peer += 1;
        }
        Err(last.unwrap_or_else(|| ImageError::HostsConfig {
            path: self.path.clone().into(),
            reason: "no host has the capability to pull".to_owned(),
        }))
    }
}

fn content_start(headers: &http::HeaderMap) -> Option<u64> {
    let value = headers.get(http::header::CONTENT_RANGE)?.to_str().ok()?;
    value.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}
