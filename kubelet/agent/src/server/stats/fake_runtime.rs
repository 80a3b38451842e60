//! A runtime of fixed answers; whatever it has no answer for is not implemented.

use crate::cri::Cri;
use bytes::{BufMut, Bytes};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body_util::{BodyExt, Full};
use prost::Message;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use tonic::body::Body;

/// Clones are the same runtime.
#[derive(Debug, Clone, Default)]
pub(super) struct FakeRuntime(Arc<Mutex<BTreeMap<&'static str, Bytes>>>);

impl FakeRuntime {
    pub(super) fn cri(&self) -> Cri {
        Cri::new(self.clone(), self.clone())
    }

    /// From now on this is the answer to a method.
    pub(super) fn answers(&self, method: &'static str, message: &impl Message) {
        let mut frame = vec![0];
        frame.put_u32(u32::try_from(message.encoded_len()).unwrap());
        message.encode(&mut frame).unwrap();
        self.0.lock().unwrap().insert(method, frame.into());
    }
}

impl tower::Service<Request<Body>> for FakeRuntime {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default();
        let answer = self.0.lock().unwrap().get(method).cloned();
        ready(Ok(match answer {
            Some(frame) => {
                let response = Response::builder().header("content-type", "application/grpc");
                let ended = async {
                    let status = (HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"));
                    Some(Ok(HeaderMap::from_iter([status])))
                };
                response.body(Body::new(Full::new(frame).with_trailers(ended))).unwrap()
            }
            None => tonic::Status::unimplemented(method).into_http(),
        }))
    }
}
