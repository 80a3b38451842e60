//! Tokens: answering a registry's challenge and keeping what the token server gives.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use http::header::{AUTHORIZATION, CONTENT_TYPE, USER_AGENT};
use http::{HeaderValue, Request, Response, Uri};
use hyper::body::Incoming;
use serde::Deserialize;

use super::auth::{Challenge, Credentials, challenges, encode, sensitive};
use super::hosts::is_loopback;
use super::session::{AGENT, Peer, Session, collect};
use super::transport::{Body, SendError};
use crate::error::ImageError;

const MAX_TOKEN: usize = 1 << 20;
/// The token protocol's default lifetime, and what is held back from any.
const TOKEN_LIFETIME: u64 = 60;
const TOKEN_MARGIN: u64 = 5;

struct Token {
    header: HeaderValue,
    until: Option<Instant>,
}

#[derive(Default)]
pub(super) struct AuthState {
    /// What the host last asked for; nothing until its first 401.
    challenge: Option<Challenge>,
    /// By scope.
    tokens: HashMap<String, Token>,
}

#[derive(Deserialize)]
struct TokenResponse {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl Session {
    fn scope(&self) -> String {
        format!("repository:{}:pull", self.reference.path())
    }

    /// The header to send now; renews a token that is about to end.
    pub(super) async fn authorization(&self, peer: &Peer) -> Result<Option<HeaderValue>, ImageError> {
        if let Credentials::Registry(token) = &peer.credentials {
            return Ok(sensitive(&format!("Bearer {token}")));
        }
        let mut auth = peer.auth.lock().await;
        let Some(challenge) = auth.challenge.clone() else { return Ok(None) };
        if challenge.scheme == "basic" {
            return Ok(peer.credentials.basic_header());
        }
        let scope = self.scope();
        match auth.tokens.get(&scope) {
            Some(token) if token.until.is_none_or(|until| Instant::now() < until) => {
                Ok(Some(token.header.clone()))
            }
            _ => {
                let token = self.fetch_token(peer, &challenge).await?;
                let header = token.header.clone();
                auth.tokens.insert(scope, token);
                Ok(Some(header))
            }
        }
    }

    /// Notes what a 401 asks for, so that the next attempt can satisfy it.
    pub(super) async fn answer_challenge(
        &self,
        peer: &Peer,
        path: &str,
        response: &Response<Incoming>,
        sent: Option<&HeaderValue>,
    ) -> Result<(), ImageError> {
        let offered: Vec<Challenge> = response
            .headers()
            .get_all(http::header::WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(challenges)
            .collect();
        let basic = matches!(peer.credentials, Credentials::Basic { .. });
        let chosen = offered
            .iter()
            .find(|challenge| challenge.scheme == "bearer")
            .or_else(|| offered.iter().find(|challenge| challenge.scheme == "basic" && basic));
        let Some(chosen) = chosen.filter(|_| !matches!(peer.credentials, Credentials::Registry(_))) else {
            let reason = if sent.is_some() { "it rejects the credentials" } else { "it wants credentials" };
            return Err(self.unauthorized(peer, path, reason.to_owned()));
        };
        let mut auth = peer.auth.lock().await;
        // Another request of this pull may have renewed the token meanwhile: only the one that was sent is bad.
        let scope = self.scope();
        if auth.tokens.get(&scope).is_some_and(|token| Some(&token.header) == sent) {
            auth.tokens.remove(&scope);
        }
        auth.challenge = Some(chosen.clone());
        Ok(())
    }

    async fn fetch_token(&self, peer: &Peer, challenge: &Challenge) -> Result<Token, ImageError> {
        let broken = |reason: String| ImageError::InvalidResponse {
            registry: peer.host.authority.to_string(),
            object: "authentication".to_owned(),
            reason,
        };
        let realm = challenge.parameters.get("realm").map_or("", String::as_str);
        let realm_uri: Uri =
            realm.parse().map_err(|_| broken(format!("its token server {realm:?} is not a URL")))?;
        let secure = realm_uri.scheme_str() == Some("https") || is_loopback(realm_uri.host().unwrap_or(""));
        let same_host = realm_uri.host() == Some(peer.host.authority.host())
            && peer.host.scheme == http::uri::Scheme::HTTP;
        if peer.credentials != Credentials::Anonymous && !secure && !same_host {
            return Err(broken(format!("its token server {realm:?} would get the credentials unencrypted")));
        }
        let mut scopes = vec![self.scope()];
        if let Some(asked) = challenge.parameters.get("scope") {
            scopes.extend(
                asked.split(' ').filter(|scope| *scope != scopes[0]).map(str::to_owned).collect::<Vec<_>>(),
            );
        }
        let service = challenge.parameters.get("service").map(String::as_str);
        let request = match &peer.credentials {
            Credentials::Identity(token) => {
                let grant = format!("grant_type=refresh_token&refresh_token={}", encode(token));
                form_request(&realm_uri, &grant, service, &scopes)
            }
            _ => query_request(realm, &peer.credentials, service, &scopes),
        };
        let mut request =
            request.ok_or_else(|| broken(format!("its token server {realm:?} is not a usable URL")))?;
        request.headers_mut().insert(USER_AGENT, HeaderValue::from_static(AGENT));
        let sent = tokio::time::timeout(self.timing.response, peer.transport.send(request)).await;
        let path = format!("a token from {realm}");
        let response = match sent {
            Ok(Ok(response)) => response,
            Ok(Err(SendError::Setup(error))) => return Err(error),
            Ok(Err(SendError::Failed { cause, .. })) => return Err(self.unavailable(peer, &path, cause)),
            Err(_) => return Err(self.unavailable(peer, &path, "no response in time".to_owned())),
        };
        if !response.status().is_success() {
            return Err(self.refusal(peer, &path, response).await);
        }
        let body = collect(response, MAX_TOKEN).await;
        let body =
            body.map_err(|cause| broken(cause.unwrap_or_else(|| "the token is too large".to_owned())))?;
        let parsed: TokenResponse =
            serde_json::from_slice(&body).map_err(|cause| broken(cause.to_string()))?;
        let token = parsed.token.or(parsed.access_token).filter(|token| !token.is_empty());
        let token = token.ok_or_else(|| broken("its token server sent no token".to_owned()))?;
        let header = sensitive(&format!("Bearer {token}"))
            .ok_or_else(|| broken("the token is malformed".to_owned()))?;
        let lifetime = parsed.expires_in.unwrap_or(TOKEN_LIFETIME).max(TOKEN_LIFETIME) - TOKEN_MARGIN;
        Ok(Token { header, until: Instant::now().checked_add(Duration::from_secs(lifetime)) })
    }
}

fn query_request(
    realm: &str,
    credentials: &Credentials,
    service: Option<&str>,
    scopes: &[String],
) -> Option<Request<Body>> {
    let mut query: Vec<String> = scopes.iter().map(|scope| format!("scope={}", encode(scope))).collect();
    query.extend(service.map(|service| format!("service={}", encode(service))));
    let separator = if realm.contains('?') { '&' } else { '?' };
    let uri: Uri = format!("{realm}{separator}{}", query.join("&")).parse().ok()?;
    uri.host()?;
    let mut request = Request::get(uri).body(Body::default()).ok()?;
    if let Some(header) = credentials.basic_header() {
        request.headers_mut().insert(AUTHORIZATION, header);
    }
    Some(request)
}

fn form_request(realm: &Uri, grant: &str, service: Option<&str>, scopes: &[String]) -> Option<Request<Body>> {
    realm.host()?;
    let scope = encode(&scopes.join(" "));
    let service = encode(service.unwrap_or_default());
    let form = format!("{grant}&service={service}&scope={scope}&client_id=orlop");
    let request = Request::post(realm).header(CONTENT_TYPE, "application/x-www-form-urlencoded");
    request.body(Body::from(form)).ok()
}
