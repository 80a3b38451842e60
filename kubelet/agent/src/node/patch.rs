//! The strategic merge patch from one node status to another.

use k8s_openapi::api::core::v1::{NodeCondition, NodeStatus};
use serde_json::{Map, Value, json};

/// Fields that are ours to write.
const OURS: [&str; 10] = [
    "addresses",
    "allocatable",
    "capacity",
    "conditions",
    "daemonEndpoints",
    "declaredFeatures",
    "features",
    "images",
    "nodeInfo",
    "runtimeHandlers",
];

/// Whether two statuses differ in more than heartbeats.
#[must_use]
pub(super) fn differs(before: &NodeStatus, after: &NodeStatus) -> bool {
    let still = |status: &NodeStatus| {
        let mut status = status.clone();
        for condition in status.conditions.iter_mut().flatten() {
            condition.last_heartbeat_time = None;
        }
        status
    };
    status_patch(&still(before), &still(after)).is_some()
}

/// What must be sent to turn one into the other; none if nothing.
#[must_use]
pub fn status_patch(before: &NodeStatus, after: &NodeStatus) -> Option<Value> {
    let object = |status: &NodeStatus| match serde_json::to_value(status) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    };
    let (old, new) = (object(before), object(after));
    let mut patch = Map::new();
    for key in OURS {
        let (was, is) = (old.get(key).unwrap_or(&Value::Null), new.get(key).unwrap_or(&Value::Null));
        if was == is {
            continue;
        }
        let value = match key {
            "conditions" => conditions(before, after),
            "addresses" => addresses(is),
            "capacity" | "allocatable" => changed_entries(was, is),
            _ => is.clone(),
        };
        if value != Value::Array(Vec::new()) {
            patch.insert(key.to_owned(), value);
        }
    }
    (!patch.is_empty()).then(|| json!({"status": patch}))
}

/// The server merges conditions by type, so the unchanged ones can stay away.
fn conditions(before: &NodeStatus, after: &NodeStatus) -> Value {
    let same = |condition: &&NodeCondition| !before.conditions.iter().flatten().any(|old| old == *condition);
    let changed: Vec<_> = after.conditions.iter().flatten().filter(same).collect();
    serde_json::to_value(changed).unwrap_or_default()
}

/// The server would merge addresses by type as well, although a node may have two of one type.
fn addresses(list: &Value) -> Value {
    let mut list = list.as_array().cloned().unwrap_or_default();
    list.push(json!({"$patch": "replace"}));
    list.into()
}

fn changed_entries(was: &Value, is: &Value) -> Value {
    let empty = Map::new();
    let (was, is) = (was.as_object().unwrap_or(&empty), is.as_object().unwrap_or(&empty));
    let gone = was.keys().filter(|key| !is.contains_key(*key)).map(|key| (key.clone(), Value::Null));
    let changed = is.iter().filter(|(key, value)| was.get(*key) != Some(value));
    Value::Object(gone.chain(changed.map(|(key, value)| (key.clone(), value.clone()))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::status::node_status;
    use crate::node::status::tests::facts;
    use jiff::Timestamp;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    #[test]
    fn only_heartbeats_move_when_nothing_happens() {
        let first = node_status(&facts(), &NodeStatus::default(), at(0));
        let second = node_status(&facts(), &first, at(10));
        assert!(!differs(&first, &second));
        let patch = status_patch(&first, &second).unwrap();
        assert_eq!(patch["status"].as_object().unwrap().keys().collect::<Vec<_>>(), ["conditions"]);
        assert!(status_patch(&first, &first).is_none());
    }

    #[test]
    fn addresses_are_replaced_as_a_whole() {
        let first = node_status(&facts(), &NodeStatus::default(), at(0));
        let mut facts = facts();
        facts.addresses.truncate(1);
        let patch = status_patch(&first, &node_status(&facts, &first, at(0))).unwrap();
        assert_eq!(
            patch["status"]["addresses"],
            json!([{"type": "InternalIP", "address": "10.0.0.7"}, {"$patch": "replace"}])
        );
    }

    #[test]
    fn a_resource_that_is_gone_is_removed_and_the_rest_not_repeated() {
        let first = node_status(&facts(), &NodeStatus::default(), at(0));
        let mut facts = facts();
        facts.machine.hugepages.remove(&(1 << 30));
        facts.max_pods = 9;
        let patch = status_patch(&first, &node_status(&facts, &first, at(0))).unwrap();
        assert_eq!(patch["status"]["capacity"], json!({"hugepages-1Gi": null, "pods": "9"}));
    }
}
