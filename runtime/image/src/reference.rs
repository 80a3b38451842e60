//! Image references as people write them, normalised the way docker does.
//!
//! `busybox` means `docker.io/library/busybox:latest`; `name:tag@digest` means the digest. Input is whatever a pod spec
//! holds, so every part is checked against the registry grammar before it becomes part of a URL or a record.

use std::fmt;

use crate::digest::Digest;
use crate::error::ImageError;

const DEFAULT_DOMAIN: &str = "docker.io";
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// What a reference points at inside its repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    Tag(String),
    Digest(Digest),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

/// A complete, valid reference.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    domain: String,
    path: String,
    target: Target,
}

impl Reference {
    pub fn parse(text: &str) -> Result<Self, ImageError> {
        parse(text).map_err(|reason| ImageError::InvalidReference {
            reference: text.chars().take(2 * MAX_NAME).collect(),
            reason: reason.to_owned(),
        })
    }

    /// Host and port as written, such as `docker.io` or `127.0.0.1:5000`.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The repository within its registry, such as `library/busybox`.
    pub fn path(&self) -> &str {
        &self.path
    }

    pub fn target(&self) -> &Target {
        &self.target
    }

    /// `domain/path`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// The same repository, at a digest.
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { domain: self.domain.clone(), path: self.path.clone(), target: Target::Digest(digest) }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = match self.target {
            Target::Tag(_) => ':',
            Target::Digest(_) => '@',
        };
        write!(f, "{}/{}{separator}{}", self.domain, self.path, self.target)
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err("64 hexadecimal digits are an image id, not a name");
    }
    let (named, digest) = match text.split_once('@') {
        Some((named, digest)) => {
            (named, Some(digest.parse::<Digest>().map_err(|_| "the digest is malformed")?))
        }
        None => (text, None),
    };
    let (domain, rest) = split_domain(named);
    // A colon can only separate the tag: ports belong to the domain, which is already cut off.
    let (path, tag) = match rest.rsplit_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    let path = match (domain, path.contains('/')) {
        (DEFAULT_DOMAIN, false) => format!("library/{path}"),
        _ => path.to_owned(),
    };
    check_domain(domain)?;
    check_path(&path)?;
    if domain.len() + 1 + path.len() > MAX_NAME {
        return Err("the name is longer than 255 characters");
    }
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let target = match (digest, tag) {
        (Some(digest), _) => Target::Digest(digest),
        (None, tag) => Target::Tag(tag.unwrap_or("latest").to_owned()),
    };
    Ok(Reference { domain: domain.to_owned(), path, target })
}

/// The first component is a registry only if it cannot be mistaken for a docker.io user.
fn split_domain(named: &str) -> (&str, &str) {
    match named.split_once('/') {
        Some(("index.docker.io", rest)) => (DEFAULT_DOMAIN, rest),
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (first, rest)
        }
        _ => (DEFAULT_DOMAIN, named),
    }
}

fn check_domain(domain: &str) -> Result<(), &'static str> {
    let (host, port) = match domain.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest.split_once(']').ok_or("the registry's address lacks its ']'")?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| "the registry is not an IPv6 address")?;
            (
                None,
                if after.is_empty() {
                    None
                } else {
                    Some(after.strip_prefix(':').ok_or("the port is malformed")?)
                },
            )
        }
        None => match domain.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(domain), None),
        },
    };
    if let Some(port) = port
        && (port.parse::<u16>().is_err() || !port.bytes().all(|b| b.is_ascii_digit()))
    {
        return Err("the registry's port is not a number up to 65535");
    }
    let label_ok = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    match host {
        Some(host) if !host.split('.').all(label_ok) => Err("the registry is not a host name"),
        _ => Ok(()),
    }
}

fn check_path(path: &str) -> Result<(), &'static str> {
    if path.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("the repository name must be lower case");
    }
    if path.split('/').all(component_ok) { Ok(()) } else { Err("the repository name is malformed") }
}

/// Lower-case words joined by one dot, one or two underscores, or any number of dashes.
fn component_ok(component: &str) -> bool {
    let word = |b: u8| b.is_ascii_digit() || b.is_ascii_lowercase();
    let bytes = component.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    word(*first)
        && word(*last)
        && bytes
            .split(|b| word(*b))
            .filter(|separator| !separator.is_empty())
            .all(|separator| matches!(separator, b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-'))
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let ok = tag.len() <= MAX_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'));
    if ok { Ok(()) } else { Err("the tag is malformed") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_are_completed_as_docker_does() {
        for (given, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("user/app", "docker.io/user/app:latest"),
            ("index.docker.io/user/app", "docker.io/user/app:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/a/b/c:v1", "localhost:5000/a/b/c:v1"),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10"),
            ("gcr.io/a__b/c-d---e.f", "gcr.io/a__b/c-d---e.f:latest"),
        ] {
            assert_eq!(Reference::parse(given).unwrap().to_string(), full);
        }
    }

    #[test]
    fn a_digest_wins_over_the_tag_beside_it() {
        let reference = Reference::parse(&format!("busybox:1@sha256:{HEX}")).unwrap();
        assert_eq!(reference.to_string(), format!("docker.io/library/busybox@sha256:{HEX}"));
    }

    #[test]
    fn hostile_or_malformed_references_are_refused() {
        let long = "a".repeat(256);
        for text in [
            "",
            ":",
            "@",
            "a:",
            "a@",
            ":tag",
            "/a",
            "a/",
            "a//b",
            "A",
            "docker.io/A",
            "a:b:c",
            "a..b",
            "a___b",
            "../../etc",
            "host.io/../x",
            "host:99999/x",
            "host:-1/x",
            "host:+5/x",
            "a b",
            "a\n",
            "ho_st.io/x",
            "[::1/x",
            "[zz]/x",
            "a?b=c",
            "a#b",
            "a%2fb",
            "a@sha256:zz",
            HEX,
            &long,
            "x:\u{e9}",
        ] {
            assert!(Reference::parse(text).is_err(), "{text:?} was accepted");
        }
        assert!(Reference::parse(&format!("a:{}", "t".repeat(129))).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_answered_without_a_panic(text in "\\PC{0,80}") {
            if let Ok(reference) = Reference::parse(&text) {
                let again = Reference::parse(&reference.to_string()).unwrap();
                prop_assert_eq!(again, reference);
            }
        }

        #[test]
        fn normal_forms_are_fixed_points(
            domain in "([a-z][a-z0-9]{0,6}\\.[a-z]{2,4}|localhost|127\\.0\\.0\\.1)(:[1-9][0-9]{0,3})?",
            path in "[a-z0-9]{1,8}([._-][a-z0-9]{1,5}){0,2}(/[a-z0-9]{1,8}){0,2}",
            tag in "[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}",
        ) {
            let text = format!("{domain}/{path}:{tag}");
            prop_assert_eq!(Reference::parse(&text).unwrap().to_string(), text);
        }
    }
}
