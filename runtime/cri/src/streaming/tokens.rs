//! The secret in a URL: stands for one request, once, for a minute.

use super::StreamError;
use orlop_proto::cri::{AttachRequest, ExecRequest, PortForwardRequest};
use std::collections::HashMap;
use std::time::{Duration, Instant};

const LIFETIME: Duration = Duration::from_secs(60);
const MAX_PENDING: usize = 1000;

/// What a URL stands for.
#[derive(Debug, Clone)]
pub(super) enum Pending {
    Exec(ExecRequest),
    Attach(AttachRequest),
    PortForward(PortForwardRequest),
}

/// Requests whose client has not come yet.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    pending: HashMap<String, (Instant, Pending)>,
}

impl Tokens {
    pub(super) fn insert(
        &mut self,
        token: String,
        request: Pending,
        now: Instant,
    ) -> Result<(), StreamError> {
        if self.pending.len() >= MAX_PENDING {
            self.pending.retain(|_, (since, _)| now.duration_since(*since) < LIFETIME);
        }
        if self.pending.len() >= MAX_PENDING {
            return Err(StreamError::TooManyPending);
        }
        self.pending.insert(token, (now, request));
        Ok(())
    }

    pub(super) fn take(&mut self, token: &str, now: Instant) -> Option<Pending> {
        let (since, request) = self.pending.remove(token)?;
        (now.duration_since(since) < LIFETIME).then_some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Pending {
        Pending::Exec(ExecRequest::default())
    }

    #[test]
    fn a_token_is_good_once_and_not_after_its_minute() {
        let (mut tokens, start) = (Tokens::default(), Instant::now());
        tokens.insert("a".into(), request(), start).unwrap();
        tokens.insert("b".into(), request(), start).unwrap();
        assert!(tokens.take("a", start).is_some());
        assert!(tokens.take("a", start).is_none());
        assert!(tokens.take("b", start + LIFETIME).is_none());
    }

    #[test]
    fn old_tokens_make_room_for_new_ones() {
        let (mut tokens, start) = (Tokens::default(), Instant::now());
        for i in 0..MAX_PENDING {
            tokens.insert(i.to_string(), request(), start).unwrap();
        }
        assert!(matches!(tokens.insert("x".into(), request(), start), Err(StreamError::TooManyPending)));
        tokens.insert("x".into(), request(), start + LIFETIME).unwrap();
    }
}
