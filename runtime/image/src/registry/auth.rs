//! Credentials and challenges: who gets which secret, and what a registry's 401 asks for.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;

use crate::Auth;

/// What to present to a registry.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credentials {
    Anonymous,
    Basic {
        username: String,
        password: String,
    },
    /// A refresh token, exchanged for an access token by POST.
    Identity(String),
    /// An access token, sent as it is.
    Registry(String),
}

impl Credentials {
    /// The part of `auth` that may go to `domain`: everything, unless it is meant for another host.
    pub(crate) fn for_domain(auth: Option<&Auth>, domain: &str) -> Self {
        let Some(auth) = auth else { return Self::Anonymous };
        if !auth.server_address.is_empty() && canonical(&auth.server_address) != canonical(domain) {
            return Self::Anonymous;
        }
        if !auth.registry_token.is_empty() {
            Self::Registry(auth.registry_token.clone())
        } else if !auth.identity_token.is_empty() {
            Self::Identity(auth.identity_token.clone())
        } else if !auth.username.is_empty() || !auth.password.is_empty() {
            Self::Basic { username: auth.username.clone(), password: auth.password.clone() }
        } else {
            Self::Anonymous
        }
    }

    pub(crate) fn basic_header(&self) -> Option<HeaderValue> {
        let Self::Basic { username, password } = self else { return None };
        let text = format!("Basic {}", STANDARD.encode(format!("{username}:{password}")));
        sensitive(&text)
    }
}

pub(crate) fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// The host of an address as docker's configuration writes it, with docker.io's several names made one.
fn canonical(address: &str) -> &str {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    let host = rest.split('/').next().unwrap_or(rest);
    match host {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        other => other,
    }
}

/// One `WWW-Authenticate` challenge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Challenge {
    /// Lower case.
    pub(crate) scheme: String,
    pub(crate) parameters: BTreeMap<String, String>,
}

/// Parses a header that may hold several challenges. What cannot be understood is left out.
pub(crate) fn challenges(header: &str) -> Vec<Challenge> {
    let mut found: Vec<Challenge> = Vec::new();
    let mut rest = header.trim_start_matches([' ', ',', '\t']);
    while !rest.is_empty() {
        let token_end = rest.find([' ', '=', ',', '\t']).unwrap_or(rest.len());
        let (token, after) = rest.split_at(token_end);
        if token.is_empty() {
            break;
        }
        if let Some(value_text) = after.trim_start().strip_prefix('=') {
            let (value, after) = parameter_value(value_text.trim_start());
            if let Some(challenge) = found.last_mut() {
                challenge.parameters.insert(token.to_ascii_lowercase(), value);
            }
            rest = after;
        } else {
            found.push(Challenge { scheme: token.to_ascii_lowercase(), parameters: BTreeMap::new() });
            rest = after;
        }
        rest = rest.trim_start_matches([' ', ',', '\t']);
    }
    found
}

/// A token or a quoted string, and what follows it.
fn parameter_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((position, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[position + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (value, "")
}

/// Percent-encodes for a query or a form.
pub(crate) fn encode(text: &str) -> String {
    use std::fmt::Write as _;
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            encoded.push(char::from(byte));
        } else {
            write!(encoded, "%{byte:02X}").expect("writing to a string cannot fail");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn challenges_with_quotes_commas_and_company_are_parsed() {
        let parsed = challenges(
            r#"Basic realm="a, \"b\"", Bearer realm="https://auth.example/token",service=reg,scope="repository:a/b:pull,push""#,
        );
        assert_eq!(parsed[0].scheme, "basic");
        assert_eq!(parsed[0].parameters["realm"], "a, \"b\"");
        assert_eq!(parsed[1].scheme, "bearer");
        assert_eq!(parsed[1].parameters["service"], "reg");
        assert_eq!(parsed[1].parameters["scope"], "repository:a/b:pull,push");
    }

    #[test]
    fn credentials_go_only_to_the_host_they_are_meant_for() {
        let auth = |server: &str| Auth {
            username: "u".into(),
            password: "p".into(),
            server_address: server.into(),
            ..Auth::default()
        };
        let given = |server: &str, domain: &str| {
            Credentials::for_domain(Some(&auth(server)), domain) != Credentials::Anonymous
        };
        assert!(given("", "any.example"));
        assert!(given("https://index.docker.io/v1/", "docker.io"));
        assert!(given("reg.example:5000", "reg.example:5000"));
        assert!(!given("reg.example:5000", "reg.example"));
        assert!(!given("https://reg.example", "reg.example.evil"));
    }

    #[test]
    fn credentials_are_not_printed() {
        let auth = Auth { username: "u".into(), password: "geheim".into(), ..Auth::default() };
        assert!(!format!("{auth:?}").contains("geheim"));
    }

    proptest! {
        #[test]
        fn any_header_is_answered_without_a_panic(header in "\\PC{0,120}") {
            let _ = challenges(&header);
        }
    }
}
