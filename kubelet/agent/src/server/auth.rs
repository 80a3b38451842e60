//! Who a caller is, and whether they may: certificates and tokens, and the API server's word on access.

use super::attributes::Attributes;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use k8s_openapi::api::authentication::v1::UserInfo;
use k8s_openapi::api::authorization::v1::ResourceAttributes;
use orlop_api::auth::{Access, review_access, review_token};
use orlop_api::{ApiError, Client};
use rustls_pki_types::CertificateDer;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use x509_cert::Certificate;
use x509_cert::der::Decode;
use x509_cert::der::asn1::{PrintableStringRef, Utf8StringRef};

/// How callers are known and judged.
#[derive(Debug, Clone)]
pub struct AuthConfig {
    pub anonymous: bool,
    /// Ask the API server about tokens; None leaves tokens unknown.
    pub token_ttl: Option<Duration>,
    /// None: everybody who is known may do everything.
    pub access: Option<AccessTtl>,
}

/// For how long the API server's word is taken.
#[derive(Debug, Clone, Copy)]
pub struct AccessTtl {
    pub allowed: Duration,
    pub denied: Duration,
}

/// The answer to a request that may not pass.
#[derive(Debug)]
pub(super) enum Refusal {
    /// 401.
    Unknown,
    /// 403, with the text the kubelet gives.
    Forbidden(String),
    /// 500: the API server could not be asked.
    CannotTell(ApiError),
}

#[derive(Debug)]
pub(super) struct Auth {
    config: AuthConfig,
    api: Option<Client>,
    node_name: String,
    users: Cache<String, Option<UserInfo>>,
    decisions: Cache<(String, Vec<String>, &'static str, &'static str), bool>,
}

impl Auth {
    pub(super) fn new(config: AuthConfig, api: Option<Client>, node_name: String) -> Self {
        Self { config, api, node_name, users: Cache::default(), decisions: Cache::default() }
    }

    /// Lets a request pass or says why not. `certificate` has been verified by TLS.
    pub(super) async fn check(
        &self,
        certificate: Option<&CertificateDer<'_>>,
        headers: &HeaderMap,
        attributes: &Attributes,
    ) -> Result<(), Refusal> {
        let user = self.identify(certificate, headers).await?;
        self.authorize(&user, attributes).await
    }

    async fn identify(
        &self,
        certificate: Option<&CertificateDer<'_>>,
        headers: &HeaderMap,
    ) -> Result<UserInfo, Refusal> {
        if let Some(user) = certificate.and_then(user_of_certificate) {
            return Ok(user);
        }
        if let Some(token) = bearer_token(headers) {
            return self.review_token(token).await?.ok_or(Refusal::Unknown);
        }
        if self.config.anonymous {
            return Ok(user("system:anonymous", vec!["system:unauthenticated".to_owned()]));
        }
        Err(Refusal::Unknown)
    }

    async fn review_token(&self, token: &str) -> Result<Option<UserInfo>, Refusal> {
        let (Some(ttl), Some(api)) = (self.config.token_ttl, &self.api) else { return Ok(None) };
        let now = Instant::now();
        if let Some(known) = self.users.get(&token.to_owned(), now) {
            return Ok(known);
        }
        let found = review_token(api, token, &[]).await.map_err(Refusal::CannotTell)?;
        self.users.put(token.to_owned(), found.clone(), now + ttl, now);
        Ok(found)
    }

    async fn authorize(&self, user: &UserInfo, attributes: &Attributes) -> Result<(), Refusal> {
        let Some(ttl) = self.config.access else { return Ok(()) };
        for subresource in attributes.subresources {
            if self.may(user, attributes.verb, subresource, ttl).await? {
                return Ok(());
            }
        }
        Err(Refusal::Forbidden(format!(
            "Forbidden (user={}, verb={}, resource=nodes, subresource(s)=[{}])",
            user.username.as_deref().unwrap_or_default(),
            attributes.verb,
            attributes.subresources.join(" ")
        )))
    }

    async fn may(
        &self,
        user: &UserInfo,
        verb: &'static str,
        subresource: &'static str,
        ttl: AccessTtl,
    ) -> Result<bool, Refusal> {
        let name = user.username.clone().unwrap_or_default();
        let key = (name, user.groups.clone().unwrap_or_default(), verb, subresource);
        let now = Instant::now();
        if let Some(known) = self.decisions.get(&key, now) {
            return Ok(known);
        }
        // Without an API server nobody vouches for anybody.
        let Some(api) = &self.api else { return Ok(false) };
        let wanted = ResourceAttributes {
            version: Some("v1".to_owned()),
            resource: Some("nodes".to_owned()),
            name: Some(self.node_name.clone()),
            verb: Some(verb.to_owned()),
            subresource: Some(subresource.to_owned()),
            ..ResourceAttributes::default()
        };
        let decision = review_access(api, user, Access::Resource(Box::new(wanted)))
            .await
            .map_err(Refusal::CannotTell)?;
        let life = if decision.allowed { ttl.allowed } else { ttl.denied };
        self.decisions.put(key, decision.allowed, now + life, now);
        Ok(decision.allowed)
    }
}

fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    (scheme.eq_ignore_ascii_case("bearer") && !token.trim().is_empty()).then(|| token.trim())
}

fn user(name: &str, groups: Vec<String>) -> UserInfo {
    UserInfo { username: Some(name.to_owned()), groups: Some(groups), ..UserInfo::default() }
}

/// The common name is the user, the organisations are the groups.
fn user_of_certificate(certificate: &CertificateDer<'_>) -> Option<UserInfo> {
    const COMMON_NAME: &str = "2.5.4.3";
    const ORGANIZATION: &str = "2.5.4.10";
    let certificate = Certificate::from_der(certificate).ok()?;
    let mut name = None;
    let mut groups = Vec::new();
    for attribute in certificate.tbs_certificate().subject().iter() {
        let value = &attribute.value;
        let text = value
            .decode_as::<Utf8StringRef<'_>>()
            .map(|s| s.as_str().to_owned())
            .or_else(|_| value.decode_as::<PrintableStringRef<'_>>().map(|s| s.as_str().to_owned()))
            .ok()?;
        match attribute.oid.to_string().as_str() {
            COMMON_NAME => name = Some(text),
            ORGANIZATION => groups.push(text),
            _ => {}
        }
    }
    let name = name.filter(|name| !name.is_empty())?;
    groups.push("system:authenticated".to_owned());
    Some(user(&name, groups))
}

/// Answers that are good for a while. Bounded, since tokens come from strangers.
#[derive(Debug)]
struct Cache<K, V>(Mutex<HashMap<K, (V, Instant)>>);

const MAX_CACHED: usize = 1024;

impl<K, V> Default for Cache<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Hash + Eq, V: Clone> Cache<K, V> {
    fn get(&self, key: &K, now: Instant) -> Option<V> {
        let map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        map.get(key).filter(|(_, until)| now < *until).map(|(value, _)| value.clone())
    }

    fn put(&self, key: K, value: V, until: Instant, now: Instant) {
        let mut map = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if map.len() >= MAX_CACHED {
            map.retain(|_, (_, until)| now < *until);
        }
        if map.len() >= MAX_CACHED {
            map.clear();
        }
        map.insert(key, (value, until));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use rcgen::{CertificateParams, DnType, KeyPair};

    fn certificate(name: &str, groups: &[&str]) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        for group in groups {
            params.distinguished_name.push(DnType::OrganizationName, *group);
        }
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn a_certificate_names_its_user_and_groups() {
        let user = user_of_certificate(&certificate("system:node:a", &["system:nodes"])).unwrap();
        assert_eq!(user.username.as_deref(), Some("system:node:a"));
        assert_eq!(user.groups.unwrap(), ["system:nodes", "system:authenticated"]);
        assert!(user_of_certificate(&certificate("", &["x"])).is_none());
        assert!(user_of_certificate(&CertificateDer::from(vec![1, 2, 3])).is_none());
    }

    fn auth(anonymous: bool, access: Option<AccessTtl>) -> Auth {
        Auth::new(AuthConfig { anonymous, token_ttl: Some(Duration::from_secs(1)), access }, None, "a".into())
    }

    const MINUTE: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn strangers_are_unknown_and_with_nobody_to_vouch_the_known_are_refused() {
        let attributes = Attributes::of(&http::Method::GET, "/exec/a/b/c");
        let none = HeaderMap::new();
        let some = Some(AccessTtl { allowed: MINUTE, denied: MINUTE });
        assert!(matches!(auth(false, some).check(None, &none, &attributes).await, Err(Refusal::Unknown)));
        let mut token = HeaderMap::new();
        token.insert(AUTHORIZATION, HeaderValue::from_static("Bearer abc"));
        assert!(matches!(auth(true, some).check(None, &token, &attributes).await, Err(Refusal::Unknown)));
        let refused = auth(true, some).check(None, &none, &attributes).await;
        let Err(Refusal::Forbidden(text)) = refused else { panic!("{refused:?}") };
        assert_eq!(
            text,
            "Forbidden (user=system:anonymous, verb=get, resource=nodes, subresource(s)=[proxy])"
        );
        assert!(auth(true, None).check(None, &none, &attributes).await.is_ok());
    }

    #[test]
    fn an_answer_is_good_until_its_time_is_over() {
        let cache: Cache<&str, bool> = Cache::default();
        let now = Instant::now();
        cache.put("a", true, now + MINUTE, now);
        assert_eq!(cache.get(&"a", now), Some(true));
        assert_eq!(cache.get(&"a", now + MINUTE), None);
    }
}
