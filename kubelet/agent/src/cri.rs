//! The container runtime as the kubelet sees it: CRI clients over whatever carries them.

use orlop_proto::cri::image_service_client::ImageServiceClient;
use orlop_proto::cri::runtime_service_client::RuntimeServiceClient;
use std::fmt;
use tonic::body::Body;
use tonic::codegen::StdError;
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;

/// Carries CRI calls: a socket to a foreign runtime, or our own service object in this process.
pub type Transport = BoxCloneSyncService<http::Request<Body>, http::Response<Body>, TransportError>;

/// Why a call could not be carried. A type of its own, since with a bare boxed error the compiler cannot prove that a
/// call may change threads.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TransportError(StdError);

/// The largest message a runtime may send, as the kubelet has always had it.
const MAX_MESSAGE: usize = 16 << 20;

/// A runtime's two services. Clones are cheap.
#[derive(Clone)]
pub struct Cri {
    runtime: Transport,
    images: Transport,
}

impl Cri {
    /// Lays the clients on service objects: tonic's generated servers, or channels.
    pub fn new<R, I>(runtime: R, images: I) -> Self
    where
        R: tower::Service<http::Request<Body>, Response = http::Response<Body>>
            + Clone
            + Send
            + Sync
            + 'static,
        R::Error: Into<StdError>,
        R::Future: Send,
        I: tower::Service<http::Request<Body>, Response = http::Response<Body>>
            + Clone
            + Send
            + Sync
            + 'static,
        I::Error: Into<StdError>,
        I::Future: Send,
    {
        Self {
            runtime: BoxCloneSyncService::new(runtime.map_err(|error| TransportError(error.into()))),
            images: BoxCloneSyncService::new(images.map_err(|error| TransportError(error.into()))),
        }
    }

    /// Reaches runtimes at `unix://` endpoints. The connection is made at the first call and again when it breaks.
    pub fn connect(runtime: &str, images: &str) -> Result<Self, tonic::transport::Error> {
        let channel = |endpoint: &str| {
            let path = endpoint.strip_prefix("unix://").unwrap_or(endpoint);
            Ok(tonic::transport::Endpoint::from_shared(format!("unix://{path}"))?.connect_lazy())
        };
        Ok(Self::new(channel(runtime)?, channel(images)?))
    }

    #[must_use]
    pub fn runtime(&self) -> RuntimeServiceClient<Transport> {
        RuntimeServiceClient::new(self.runtime.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    #[must_use]
    pub fn images(&self) -> ImageServiceClient<Transport> {
        ImageServiceClient::new(self.images.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }
}

impl fmt::Debug for Cri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cri")
    }
}
