//! Figures about the node, its pods and containers, gathered at the moment somebody asks.

use super::Parts;
use super::body::{Body, text};
use http::{Response, StatusCode};

pub(super) async fn summary(_parts: &Parts) -> Result<Response<Body>, tonic::Status> {
    Ok(text(StatusCode::OK, ""))
}
pub(super) fn metrics(_parts: &Parts) -> Response<Body> {
    text(StatusCode::OK, "")
}
pub(super) async fn resource_metrics(_parts: &Parts) -> Result<Response<Body>, tonic::Status> {
    Ok(text(StatusCode::OK, ""))
}
pub(super) async fn container_metrics(_parts: &Parts) -> Result<Response<Body>, tonic::Status> {
    Ok(text(StatusCode::OK, ""))
}
pub(super) fn probe_metrics(_parts: &Parts) -> Response<Body> {
    text(StatusCode::OK, "")
}
