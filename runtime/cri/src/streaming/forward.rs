//! Port-forward over SPDY: for every connection the client opens an error and a data stream that carry the same request
//! id; what goes wrong is told on the error stream.

use super::spdy::{Connection, Stream};
use super::{StreamError, StreamTarget};
use orlop_proto::cri::PortForwardRequest;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::io::AsyncWriteExt;
use tokio::task::JoinSet;

pub(super) const PROTOCOLS: [&str; 1] = ["portforward.k8s.io"];
/// Connections whose second stream has not come yet.
const MAX_HALVES: usize = 128;

/// Serves one client until it goes; its connections go with it.
pub(super) async fn serve(
    mut connection: Connection,
    request: PortForwardRequest,
    target: Arc<dyn StreamTarget>,
) {
    let mut halves: HashMap<String, Stream> = HashMap::new();
    let mut forwards = JoinSet::new();
    loop {
        let stream = tokio::select! {
            stream = connection.accept() => stream,
            Some(_ended) = forwards.join_next() => continue,
        };
        let Some(stream) = stream else { return };
        let Some(id) = stream.header("requestid").map(str::to_owned) else { continue };
        let Some(other) = halves.remove(&id) else {
            if halves.len() < MAX_HALVES {
                halves.insert(id, stream);
            }
            continue;
        };
        let (data, error) =
            if stream.header("streamtype") == Some("data") { (stream, other) } else { (other, stream) };
        forwards.spawn(forward(data, error, request.clone(), target.clone()));
    }
}

async fn forward(
    data: Stream,
    mut error: Stream,
    request: PortForwardRequest,
    target: Arc<dyn StreamTarget>,
) {
    let outcome = match port(&data, &request) {
        Ok(port) => target.port_forward(&request.pod_sandbox_id, port, Box::new(data)).await,
        Err(refusal) => Err(refusal),
    };
    if let Err(reason) = outcome {
        // The client may be gone; then nobody needs the reason.
        let _gone = error.write_all(reason.to_string().as_bytes()).await;
    }
    let _gone = error.shutdown().await;
}

fn port(data: &Stream, request: &PortForwardRequest) -> Result<u16, StreamError> {
    let text = data.header("port").unwrap_or_default();
    let failed = |reason: String| StreamError::Failed { operation: format!("forward port {text:?}"), reason };
    let port: u16 =
        text.parse().ok().filter(|port| *port > 0).ok_or_else(|| failed("not a port number".to_owned()))?;
    if !request.port.is_empty() && !request.port.contains(&i32::from(port)) {
        return Err(failed(format!("the request was for {:?}", request.port)));
    }
    Ok(port)
}
