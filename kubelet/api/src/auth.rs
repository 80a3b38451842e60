//! Questions to the API server about who somebody is and what they may do, and tokens for pods.

use crate::client::Client;
use crate::error::ApiError;
use k8s_openapi::api::authentication::v1::{
    BoundObjectReference, TokenRequest, TokenRequestSpec, TokenRequestStatus, TokenReview, TokenReviewSpec,
    UserInfo,
};
use k8s_openapi::api::authorization::v1::{
    NonResourceAttributes, ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use std::collections::BTreeMap;

/// Whose token this is; none if the server doesn't know it. `audiences` empty means the API server's own.
pub async fn review_token(
    client: &Client,
    token: &str,
    audiences: &[String],
) -> Result<Option<UserInfo>, ApiError> {
    let review = TokenReview {
        spec: TokenReviewSpec {
            token: token.to_owned(),
            audiences: (!audiences.is_empty()).then(|| audiences.to_vec()),
        },
        ..TokenReview::default()
    };
    let answer: TokenReview = client.create("/apis/authentication.k8s.io/v1/tokenreviews", &review).await?;
    let status = answer.status.unwrap_or_default();
    Ok(status.authenticated.unwrap_or(false).then(|| status.user.unwrap_or_default()))
}

/// What somebody wants to do.
#[derive(Debug, Clone)]
pub enum Access {
    Resource(Box<ResourceAttributes>),
    Path { verb: String, path: String },
}

/// The server's decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub allowed: bool,
    pub reason: String,
}

pub async fn review_access(client: &Client, user: &UserInfo, access: Access) -> Result<Decision, ApiError> {
    let extra: Option<BTreeMap<_, _>> = user.extra.clone();
    let (resource, path) = match access {
        Access::Resource(attributes) => (Some(*attributes), None),
        Access::Path { verb, path } => {
            (None, Some(NonResourceAttributes { verb: Some(verb), path: Some(path) }))
        }
    };
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: user.username.clone(),
            groups: user.groups.clone(),
            uid: user.uid.clone(),
            extra,
            resource_attributes: resource,
            non_resource_attributes: path,
        },
        ..SubjectAccessReview::default()
    };
    let answer: SubjectAccessReview =
        client.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", &review).await?;
    let status = answer.status.unwrap_or_default();
    // An explicit denial wins over whatever else is said.
    let allowed = status.allowed && !status.denied.unwrap_or(false);
    let reason =
        [status.reason, status.evaluation_error].into_iter().flatten().collect::<Vec<_>>().join("; ");
    Ok(Decision { allowed, reason })
}

/// The object whose end makes a token worthless.
#[derive(Debug, Clone)]
pub struct BoundTo {
    pub api_version: String,
    pub kind: String,
    pub name: String,
    pub uid: String,
}

/// A token for a service account. `audiences` empty means the API server's own.
pub async fn request_token(
    client: &Client,
    namespace: &str,
    service_account: &str,
    audiences: &[String],
    expiration_seconds: i64,
    bound_to: Option<BoundTo>,
) -> Result<TokenRequestStatus, ApiError> {
    let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{service_account}/token");
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: Some(audiences.to_vec()),
            expiration_seconds: Some(expiration_seconds),
            bound_object_ref: bound_to.map(|bound| BoundObjectReference {
                api_version: Some(bound.api_version),
                kind: Some(bound.kind),
                name: Some(bound.name),
                uid: Some(bound.uid),
            }),
        }),
        ..TokenRequest::default()
    };
    let answer: TokenRequest = client.create(&path, &request).await?;
    answer.status.ok_or_else(|| ApiError::Malformed {
        method: "POST",
        path,
        cause: "it holds no token".to_owned(),
    })
}
