//! Service-account tokens bound to pods: asked for when needed, kept until they are due for renewal.

use crate::objects::ObjectError;
use crate::objects::source::Source;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// No token is used longer than this, whatever its lifetime.
const LONGEST_USE: SignedDuration = SignedDuration::from_hours(24);
const DEADLINE: Duration = Duration::from_secs(20);

/// Whose token, for whom, for how long.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenKey {
    pub namespace: String,
    pub account: String,
    pub pod_name: String,
    pub pod_uid: String,
    /// Empty: the API server's own audience.
    pub audience: String,
    pub expiration_seconds: i64,
}

/// A token and when it should be replaced.
#[derive(Clone)]
pub struct Token {
    pub text: Arc<str>,
    pub renew_at: Timestamp,
    pub expires_at: Timestamp,
}

impl fmt::Debug for Token {
    /// Without the text: it is a credential.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token").field("renew_at", &self.renew_at).finish_non_exhaustive()
    }
}

pub(super) struct Tokens {
    source: Arc<dyn Source>,
    cached: Mutex<BTreeMap<TokenKey, Token>>,
}

impl Tokens {
    pub(super) fn new(source: Arc<dyn Source>) -> Self {
        Self { source, cached: Mutex::new(BTreeMap::new()) }
    }

    fn cached(&self) -> MutexGuard<'_, BTreeMap<TokenKey, Token>> {
        self.cached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn release(&self, pod_uid: &str) {
        self.cached().retain(|key, _| key.pod_uid != pod_uid);
    }

    pub(super) async fn get(&self, key: &TokenKey) -> Result<Token, ObjectError> {
        let now = Timestamp::now();
        let cached = self.cached().get(key).cloned();
        if let Some(token) = cached.as_ref().filter(|token| now < token.renew_at) {
            return Ok(token.clone());
        }
        match self.request(key, now).await {
            Ok(token) => {
                self.cached().insert(key.clone(), token.clone());
                Ok(token)
            }
            // An old token that still works is better than none.
            Err(error) => cached.filter(|token| now < token.expires_at).ok_or(error),
        }
    }

    async fn request(&self, key: &TokenKey, now: Timestamp) -> Result<Token, ObjectError> {
        let fail = |cause: String| ObjectError::Token {
            namespace: key.namespace.clone(),
            account: key.account.clone(),
            cause,
        };
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: (!key.audience.is_empty()).then(|| vec![key.audience.clone()]),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".to_owned()),
                    kind: Some("Pod".to_owned()),
                    name: Some(key.pod_name.clone()),
                    uid: Some(key.pod_uid.clone()),
                }),
                expiration_seconds: Some(key.expiration_seconds),
            }),
            ..Default::default()
        };
        let answer =
            tokio::time::timeout(DEADLINE, self.source.token(&key.namespace, &key.account, &request))
                .await
                .map_err(|_| fail("the API server does not answer".to_owned()))?
                .map_err(fail)?;
        let status = answer.status.and_then(|status| Some((status.token?, status.expiration_timestamp?.0)));
        let (text, expires_at) = status.ok_or_else(|| fail("the answer holds no token".to_owned()))?;
        Ok(Token { text: text.into(), renew_at: renewal(now, expires_at), expires_at })
    }
}

/// After 80 % of the token's life, or after a day.
fn renewal(now: Timestamp, expires_at: Timestamp) -> Timestamp {
    let life = now.duration_until(expires_at);
    let use_for = (life * 4 / 5).min(LONGEST_USE).max(SignedDuration::ZERO);
    now.checked_add(use_for).unwrap_or(expires_at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_renewed_after_four_fifths_of_their_life_or_a_day() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let renewed =
            |seconds| renewal(now, now + SignedDuration::from_secs(seconds)).duration_since(now).as_secs();
        assert_eq!(renewed(3600), 2880);
        assert_eq!(renewed(365 * 86_400), 86_400);
        assert_eq!(renewed(-5), 0);
    }
}
