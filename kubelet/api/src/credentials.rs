//! Who we are towards the API server: a client certificate and a bearer token, both replaceable while connections exist.
//!
//! Invariant: whoever changes the certificate raises the generation; connections of an older generation carry no new
//! request and are closed.

use crate::tls::{self, TlsError};
use rustls::client::ResolvesClientCert;
use rustls::sign::CertifiedKey;
use rustls::{SignatureScheme, server::ResolvesServerCert};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Projected tokens are renewed long before they expire, so a minute of delay is harmless.
const TOKEN_LIFETIME: Duration = Duration::from_secs(60);

/// Where the bearer token comes from.
#[derive(Clone, Default)]
pub enum TokenSource {
    #[default]
    None,
    Fixed {
        /// For messages.
        origin: String,
        token: String,
    },
    /// Read again every minute, and at once when the server refuses the token.
    File(PathBuf),
}

/// Secrets stay out of logs.
impl std::fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("None"),
            Self::Fixed { origin, .. } => write!(f, "Fixed({origin})"),
            Self::File(path) => write!(f, "File({})", path.display()),
        }
    }
}

/// A client certificate, and the files it can be read from again.
#[derive(Debug, Clone)]
pub struct CertificateSource {
    pub certified: Arc<CertifiedKey>,
    /// Certificate and key; both may be the same file.
    pub files: Option<(PathBuf, PathBuf)>,
}

/// A certificate that can be replaced under a running TLS configuration, for clients and servers alike.
#[derive(Debug, Default)]
pub struct CertificateSlot {
    current: RwLock<Option<Arc<CertifiedKey>>>,
}

impl CertificateSlot {
    #[must_use]
    pub fn new(certified: Option<Arc<CertifiedKey>>) -> Arc<Self> {
        Arc::new(Self { current: RwLock::new(certified) })
    }

    #[must_use]
    pub fn get(&self) -> Option<Arc<CertifiedKey>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set(&self, certified: Arc<CertifiedKey>) {
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(certified);
    }
}

impl ResolvesClientCert for CertificateSlot {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.get()
    }

    fn has_certs(&self) -> bool {
        self.get().is_some()
    }
}

/// As long as the slot is empty handshakes fail, which is what a kubelet without an approved certificate does.
impl ResolvesServerCert for CertificateSlot {
    fn resolve(&self, _hello: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.get()
    }
}

/// Our identity. Clones share it, so a swap reaches every client.
#[derive(Debug, Clone)]
pub struct Credentials(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    slot: Arc<CertificateSlot>,
    files: Option<(PathBuf, PathBuf)>,
    token: TokenSource,
    cached: Mutex<Option<(Instant, String)>>,
    generation: watch::Sender<u64>,
}

impl Credentials {
    #[must_use]
    pub fn new(certificate: Option<CertificateSource>, token: TokenSource) -> Self {
        let (certified, files) = certificate.map_or((None, None), |c| (Some(c.certified), c.files));
        Self(Arc::new(Shared {
            slot: CertificateSlot::new(certified),
            files,
            token,
            cached: Mutex::new(None),
            generation: watch::Sender::new(0),
        }))
    }

    /// Replaces the client certificate; connections made with the old one are closed.
    pub fn swap_certificate(&self, certified: Arc<CertifiedKey>) {
        self.0.slot.set(certified);
        self.0.generation.send_modify(|generation| *generation += 1);
    }

    /// The certificate in use.
    #[must_use]
    pub fn certificate(&self) -> Option<Arc<CertifiedKey>> {
        self.0.slot.get()
    }

    pub(crate) fn resolver(&self) -> Arc<CertificateSlot> {
        Arc::clone(&self.0.slot)
    }

    pub(crate) fn generation(&self) -> u64 {
        *self.0.generation.borrow()
    }

    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.0.generation.subscribe()
    }

    /// The bearer token to send now.
    pub(crate) fn token(&self) -> Option<String> {
        match &self.0.token {
            TokenSource::None => None,
            TokenSource::Fixed { token, .. } => Some(token.clone()),
            TokenSource::File(path) => {
                let mut cached = self.0.cached.lock().unwrap_or_else(PoisonError::into_inner);
                let fresh = cached.as_ref().is_some_and(|(read, _)| read.elapsed() < TOKEN_LIFETIME);
                if !fresh {
                    match std::fs::read_to_string(path) {
                        Ok(text) => *cached = Some((Instant::now(), text.trim().to_owned())),
                        Err(error) => {
                            tracing::warn!(file = %path.display(), %error, "cannot read the token file, going on with the last token");
                        }
                    }
                }
                cached.as_ref().map(|(_, token)| token.clone())
            }
        }
    }

    /// Reads again whatever has files, after the server refused us. True if something is new, so that trying again
    /// makes sense.
    pub(crate) fn reload(&self) -> bool {
        let before = self.0.cached.lock().unwrap_or_else(PoisonError::into_inner).take();
        let renewed = self.token() != before.map(|(_, token)| token);
        self.reload_certificate() || (renewed && matches!(self.0.token, TokenSource::File(_)))
    }

    /// Picks up a certificate that somebody else has renewed on disk. True if it is another one than before.
    pub(crate) fn reload_certificate(&self) -> bool {
        let Some((chain, key)) = &self.0.files else { return false };
        match read_pair(chain, key) {
            Ok(certified) => {
                let other = self.0.slot.get().is_none_or(|old| old.cert != certified.cert);
                if other {
                    self.swap_certificate(certified);
                }
                other
            }
            Err(error) => {
                tracing::warn!(file = %chain.display(), %error, "cannot read the client certificate again, going on with the last one");
                false
            }
        }
    }

    /// What to say to a person when the server answers 401.
    pub(crate) fn explain_refusal(&self) -> String {
        let token = match &self.0.token {
            TokenSource::None => None,
            TokenSource::Fixed { origin, .. } => Some(origin.clone()),
            TokenSource::File(path) => Some(path.display().to_string()),
        };
        match (token, self.0.slot.get().is_some()) {
            (Some(origin), _) => {
                format!("the server does not accept the token in {origin}: it has expired or was revoked, put a new one there")
            }
            (None, true) => "the server does not accept our client certificate: it has expired or another CA signed it, bootstrap this node again".to_owned(),
            (None, false) => "no credentials were given: add a token or a client certificate to the kubeconfig".to_owned(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum PairError {
    #[error("cannot read {}: {source}", file.display())]
    Read { file: PathBuf, source: std::io::Error },
    #[error("{}: {source}", file.display())]
    Content { file: PathBuf, source: TlsError },
}

/// Reads a certificate chain and its key; both may lie in one file.
pub fn read_pair(chain: &Path, key: &Path) -> Result<Arc<CertifiedKey>, PairError> {
    let read =
        |file: &Path| std::fs::read(file).map_err(|source| PairError::Read { file: file.to_owned(), source });
    let content = |file: &Path| {
        let file = file.to_owned();
        move |source| PairError::Content { file, source }
    };
    let parsed_chain = tls::certificates(&read(chain)?).map_err(content(chain))?;
    let parsed_key = tls::private_key(&read(key)?).map_err(content(key))?;
    tls::certified(parsed_chain, parsed_key).map_err(content(key))
}
