//! The gRPC health protocol's one call, `grpc.health.v1.Health/Check`.

use crate::probes::state::Outcome;
use crate::probes::target::Address;
use http::uri::PathAndQuery;
use std::time::Duration;
use tonic::transport::Endpoint;
use tonic::{Code, Request};

const SERVING: i32 = 1;

#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

pub(super) async fn check(address: &Address, service: &str, agent: &str, timeout: Duration) -> Outcome {
    let failure = |message: String| Outcome::Failure { message };
    let authority = address.authority();
    let endpoint = Endpoint::from_shared(format!("http://{authority}"));
    let Ok(endpoint) = endpoint.and_then(|endpoint| endpoint.user_agent(agent.to_owned())) else {
        return Outcome::Unknown { message: format!("{authority} is not an address") };
    };
    let channel = match endpoint.connect_timeout(timeout).connect().await {
        Ok(channel) => channel,
        Err(_) => {
            return failure(format!("timeout: failed to connect service {authority:?} within {timeout:?}"));
        }
    };
    let mut client = tonic::client::Grpc::new(channel);
    if let Err(error) = client.ready().await {
        return failure(format!("error: health rpc failed: {error}"));
    }
    let request = Request::new(HealthCheckRequest { service: service.to_owned() });
    let path = PathAndQuery::from_static("/grpc.health.v1.Health/Check");
    let codec = tonic_prost::ProstCodec::<HealthCheckRequest, HealthCheckResponse>::default();
    match client.unary(request, path, codec).await {
        Ok(response) if response.get_ref().status == SERVING => Outcome::Success,
        Ok(response) => {
            let status = match response.get_ref().status {
                0 => "UNKNOWN",
                2 => "NOT_SERVING",
                3 => "SERVICE_UNKNOWN",
                _ => "an unknown status",
            };
            failure(format!("service unhealthy (responded with {status:?})"))
        }
        Err(status) if status.code() == Code::Unimplemented => failure(
            "error: this server does not implement the grpc health protocol (grpc.health.v1.Health)"
                .to_owned(),
        ),
        Err(status) => failure(format!("error: health rpc failed: {}", status.message())),
    }
}
