//! A status as the strategic-merge patch that brings the API server's copy to it, whatever that copy was.
//!
//! Only what a kubelet owns is in it: other writers' conditions and fields are not mentioned, so they stay. Fields that
//! are ours and empty are named with null, or they would survive from an earlier status.

use super::conditions::is_owned;
use k8s_openapi::api::core::v1::PodStatus;
use serde_json::{Map, Value, json};

/// Our fields beside the conditions.
const OWNED_FIELDS: [&str; 13] = [
    "phase",
    "reason",
    "message",
    "hostIP",
    "hostIPs",
    "podIP",
    "podIPs",
    "startTime",
    "qosClass",
    "observedGeneration",
    "containerStatuses",
    "initContainerStatuses",
    "ephemeralContainerStatuses",
];

/// Lists that merge by key on the server: without the marker an old address would stay beside the new one.
const REPLACED_LISTS: [&str; 2] = ["hostIPs", "podIPs"];

/// The part of a status that is ours, in one canonical form: equal parts need no write.
#[must_use]
pub fn owned(status: &PodStatus) -> Value {
    let full = serde_json::to_value(status).unwrap_or_default();
    let mut part = Map::new();
    for field in OWNED_FIELDS {
        part.insert(field.to_owned(), full.get(field).cloned().unwrap_or_default());
    }
    let conditions = full.get("conditions").and_then(Value::as_array).cloned().unwrap_or_default();
    let mut conditions: Vec<Value> = conditions
        .into_iter()
        .filter(|condition| condition.get("type").and_then(Value::as_str).is_some_and(is_owned))
        .map(complete)
        .collect();
    conditions.sort_by_key(|condition| condition["type"].as_str().map(ToOwned::to_owned));
    part.insert("conditions".to_owned(), Value::Array(conditions));
    Value::Object(part)
}

/// A condition merges field by field: what it lacks must be said.
fn complete(mut condition: Value) -> Value {
    if let Some(fields) = condition.as_object_mut() {
        for field in ["reason", "message", "lastProbeTime", "observedGeneration"] {
            fields.entry(field).or_insert(Value::Null);
        }
    }
    condition
}

/// The body of the PATCH. The UID makes it fail for a pod that took the name since.
#[must_use]
pub fn body(uid: &str, status: &PodStatus) -> Value {
    let mut part = owned(status);
    for field in REPLACED_LISTS {
        if let Some(list) = part.get_mut(field).and_then(Value::as_array_mut) {
            list.insert(0, json!({"$patch": "replace"}));
        }
    }
    json!({"metadata": {"uid": uid}, "status": part})
}
