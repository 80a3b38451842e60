//! The nested objects of `KubeletConfiguration`.

use super::duration::GoDuration;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// A section whose defaults are all zero, written as serde writes it.
macro_rules! section {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $kind:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
        #[serde(rename_all = "camelCase", deny_unknown_fields, default)]
        pub struct $name { $($(#[$field_meta])* pub $field: $kind,)* }
    };
}

section! {
    /// How callers of the HTTP server prove who they are.
    Authentication { x509: X509Authentication, webhook: WebhookAuthentication, anonymous: AnonymousAuthentication, }
}

section! {
    X509Authentication {
        #[serde(rename = "clientCAFile", skip_serializing_if = "String::is_empty")]
        client_ca_file: String,
    }
}

section! { AnonymousAuthentication { enabled: bool, } }

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct WebhookAuthentication {
    pub enabled: bool,
    #[serde(rename = "cacheTTL")]
    pub cache_ttl: GoDuration,
}

impl Default for WebhookAuthentication {
    fn default() -> Self {
        Self { enabled: true, cache_ttl: GoDuration::from_secs(120) }
    }
}

/// Who decides what callers of the HTTP server may do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Authorization {
    /// `Webhook` or `AlwaysAllow`.
    pub mode: String,
    pub webhook: WebhookAuthorization,
}

impl Default for Authorization {
    fn default() -> Self {
        Self { mode: "Webhook".to_owned(), webhook: WebhookAuthorization::default() }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct WebhookAuthorization {
    #[serde(rename = "cacheAuthorizedTTL")]
    pub cache_authorized_ttl: GoDuration,
    #[serde(rename = "cacheUnauthorizedTTL")]
    pub cache_unauthorized_ttl: GoDuration,
}

impl Default for WebhookAuthorization {
    fn default() -> Self {
        Self {
            cache_authorized_ttl: GoDuration::from_secs(300),
            cache_unauthorized_ttl: GoDuration::from_secs(30),
        }
    }
}

section! {
    /// A taint of the node.
    Taint {
        key: String,
        #[serde(skip_serializing_if = "String::is_empty")]
        value: String,
        effect: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        time_added: Option<String>,
    }
}

section! { MemorySwap { #[serde(skip_serializing_if = "String::is_empty")] swap_behavior: String, } }

section! { MemoryReservation { numa_node: i32, limits: BTreeMap<String, String>, } }

section! { ShutdownGracePeriodByPriority { priority: i32, shutdown_grace_period_seconds: i64, } }

section! {
    CrashLoopBackOff {
        #[serde(skip_serializing_if = "Option::is_none")]
        max_container_restart_period: Option<GoDuration>,
    }
}

section! {
    UserNamespaces {
        #[serde(rename = "idsPerPod", skip_serializing_if = "Option::is_none")]
        ids_per_pod: Option<i64>,
    }
}

section! {
    Tracing {
        #[serde(skip_serializing_if = "Option::is_none")]
        endpoint: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        sampling_rate_per_million: Option<i32>,
    }
}

/// How the kubelet logs. Kept as it came: our own log is set up by ORLOP_LOG and --log-format.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Logging {
    pub format: String,
    /// A duration, or nanoseconds as a number.
    pub flush_frequency: Value,
    pub verbosity: u32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vmodule: Vec<VModule>,
    pub options: Map<String, Value>,
}

impl Default for Logging {
    fn default() -> Self {
        let format = |name: &str| (name.to_owned(), serde_json::json!({"infoBufferSize": "0"}));
        Self {
            format: "text".to_owned(),
            flush_frequency: 5_000_000_000u64.into(),
            verbosity: 0,
            vmodule: Vec::new(),
            options: ["text", "json"].map(format).into_iter().collect(),
        }
    }
}

section! { VModule { file_pattern: String, verbosity: u32, } }
