//! The CRI's two gRPC services: requests in, the work done elsewhere, answers and codes out.

mod images;
mod node;
mod runtime;
mod serve;

use crate::config::Config;
use crate::error::CriError;
use crate::network::SandboxNetwork;
use crate::runtime::Runtime;
use crate::streaming::target::Target;
use crate::streaming::{StreamServer, StreamTarget};
use orlop_image::ImageStore;
use orlop_keeper::client::Keeper;
use orlop_proto::cri::image_service_server::ImageServiceServer;
use orlop_proto::cri::runtime_service_server::RuntimeServiceServer;
pub use serve::{ServeError, serve};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// The largest message either way, as the kubelet and containerd have it.
pub const MAX_MESSAGE: usize = 16 << 20;
/// How many items a message of a streamed list carries.
const STREAM_CHUNK: usize = 256;

/// The CRI on this node. Clones share everything.
#[derive(Debug, Clone)]
pub struct CriService {
    pub(crate) runtime: Arc<Runtime>,
}

impl CriService {
    /// Brings records, keeper and kernel into agreement, then serves.
    pub async fn open(
        config: Config,
        keeper: Keeper,
        images: Arc<ImageStore>,
        network: Arc<dyn SandboxNetwork>,
    ) -> Result<Self, CriError> {
        // Subscribed before the state is read: an exit in between comes twice rather than never.
        let events = keeper.events();
        let stream_address = config.stream_address;
        let runtime = Arc::new(Runtime::new(config, keeper, images, network)?);
        runtime.reconcile().await?;
        runtime.watch_exits(events);
        let target: Arc<dyn StreamTarget> = Arc::new(Target(Arc::downgrade(&runtime)));
        let streams = StreamServer::start(stream_address, target)
            .await
            .map_err(|e| CriError::io("listen for streams at", stream_address.to_string(), e))?;
        let _ = runtime.streams.set(streams);
        Ok(Self { runtime })
    }

    /// What the streaming server runs against, for who serves streams in this process without the detour of a URL.
    #[must_use]
    pub fn stream_target(&self) -> Arc<dyn StreamTarget> {
        Arc::new(Target(Arc::downgrade(&self.runtime)))
    }

    /// For laying a client directly on the service, or for a server.
    #[must_use]
    pub fn runtime_server(&self) -> RuntimeServiceServer<Self> {
        RuntimeServiceServer::new(self.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    #[must_use]
    pub fn image_server(&self) -> ImageServiceServer<Self> {
        ImageServiceServer::new(self.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }
}

/// A stream of answers.
pub(crate) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Runs a change to its end even when the caller goes away half way, and tells it that the caller has gone.
async fn shielded<T, F>(work: impl FnOnce(CancellationToken) -> F) -> Result<T, Status>
where
    T: Send + 'static,
    F: Future<Output = Result<T, CriError>> + Send + 'static,
{
    let token = CancellationToken::new();
    let caller = token.clone().drop_guard();
    let result = tokio::spawn(work(token)).await;
    caller.disarm();
    match result {
        Ok(result) => result.map_err(Status::from),
        Err(error) => Err(CriError::Panicked(error.to_string()).into()),
    }
}

/// Cuts a list into messages of a stream.
fn chunks<T: Clone + Send + 'static, M: Send + 'static>(
    items: &[T],
    message: impl Fn(Vec<T>) -> M,
) -> Answers<M> {
    let messages: Vec<_> = items.chunks(STREAM_CHUNK).map(|chunk| Ok(message(chunk.to_vec()))).collect();
    Box::pin(tokio_stream::iter(messages))
}
