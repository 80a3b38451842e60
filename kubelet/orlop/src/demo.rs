//! The program inside the demo image: answers every request with who and where it is.

use anyhow::{Context, Result};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::net::{Ipv6Addr, SocketAddr};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// Serves until asked to stop.
pub async fn serve(port: u16) -> Result<()> {
    let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
    println!("listening on {address}");
    let mut terminate = signal(SignalKind::terminate())?;
    loop {
        tokio::select! {
            _ = terminate.recv() => {
                println!("asked to stop, going");
                return Ok(());
            }
            accepted = listener.accept() => {
                let (stream, peer) = accepted?;
                tokio::spawn(async move {
                    let service = service_fn(move |request| async move { answer(&request, peer) });
                    // A client that breaks off is its own business.
                    drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
                });
            }
        }
    }
}

fn answer(request: &Request<Incoming>, peer: SocketAddr) -> Result<Response<Full<Bytes>>, Infallible> {
    println!("{} {} from {peer}", request.method(), request.uri());
    let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "unknown".into());
    let text = format!("Hello from pod {host}: {} {} seen from {peer}\n", request.method(), request.uri());
    Ok(Response::new(Full::new(Bytes::from(text))))
}
