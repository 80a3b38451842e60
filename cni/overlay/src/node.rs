//! Nodes as the overlay sees them, and the annotations by which they tell each other where they are.

use crate::plan::Peer;
use ipnet::Ipv4Net;
use orlop_net::rtnl::Mac;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

const PREFIX: &str = "flannel.alpha.coreos.com/";
const MANAGED: &str = "kube-subnet-manager";
const BACKEND_TYPE: &str = "backend-type";
const BACKEND_DATA: &str = "backend-data";
const PUBLIC_IP: &str = "public-ip";
const PUBLIC_IP_OVERWRITE: &str = "public-ip-overwrite";

/// The few fields of a Node that matter here.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Node {
    pub metadata: Metadata,
    pub spec: Spec,
    pub status: Status,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Metadata {
    pub name: String,
    pub uid: String,
    pub annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Spec {
    #[serde(rename = "podCIDR")]
    pub pod_cidr: String,
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Status {
    pub conditions: Vec<Condition>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Condition {
    pub r#type: String,
    pub status: String,
    pub reason: String,
}

/// The backend's annotation; field names are flannel's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct BackendData {
    #[serde(rename = "VNI")]
    vni: u32,
    #[serde(rename = "VtepMAC")]
    mac: String,
}

/// Why a node is no peer although it says it is one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAPeer {
    #[error("it has no IPv4 pod CIDR")]
    NoPodCidr,
    #[error("its backend is {0:?}")]
    Backend(String),
    #[error("its annotation {name} is {value:?}")]
    Annotation { name: &'static str, value: String },
    #[error("its VXLAN network identifier is {0}")]
    Vni(u32),
}

impl Node {
    fn annotation(&self, name: &str) -> Option<&str> {
        self.metadata.annotations.get(&format!("{PREFIX}{name}")).map(String::as_str)
    }

    fn required<T: std::str::FromStr>(&self, name: &'static str) -> Result<T, NotAPeer> {
        let value = self.annotation(name).unwrap_or_default();
        value.parse().map_err(|_| NotAPeer::Annotation { name, value: value.to_owned() })
    }

    /// The first IPv4 pod CIDR.
    #[must_use]
    pub fn pod_cidr(&self) -> Option<Ipv4Net> {
        let all = self.spec.pod_cidrs.iter().chain(std::iter::once(&self.spec.pod_cidr));
        all.filter_map(|text| text.parse().ok()).map(|net: Ipv4Net| net.trunc()).next()
    }

    /// The node as a peer; `None` if it takes no part in the overlay (yet).
    ///
    /// # Errors
    /// [`NotAPeer`] when it takes part but cannot be reached.
    pub fn peer(&self, vni: u32) -> Result<Option<Peer>, NotAPeer> {
        if self.annotation(MANAGED) != Some("true") {
            return Ok(None);
        }
        let backend = self.annotation(BACKEND_TYPE).unwrap_or_default();
        if backend != "vxlan" {
            return Err(NotAPeer::Backend(backend.to_owned()));
        }
        let text = self.annotation(BACKEND_DATA).unwrap_or_default();
        let wrong = || NotAPeer::Annotation { name: BACKEND_DATA, value: text.to_owned() };
        let data: BackendData = serde_json::from_str(text).map_err(|_| wrong())?;
        if data.vni != vni {
            return Err(NotAPeer::Vni(data.vni));
        }
        Ok(Some(Peer {
            subnet: self.pod_cidr().ok_or(NotAPeer::NoPodCidr)?,
            public_ip: self.required(PUBLIC_IP)?,
            mac: data.mac.parse().map_err(|_| wrong())?,
        }))
    }

    /// The MAC address it published last.
    #[must_use]
    pub fn published_mac(&self) -> Option<Mac> {
        let data: BackendData = serde_json::from_str(self.annotation(BACKEND_DATA)?).ok()?;
        data.mac.parse().ok()
    }

    /// The address an operator wants peers to use.
    #[must_use]
    pub fn public_ip_overwrite(&self) -> Option<Ipv4Addr> {
        self.annotation(PUBLIC_IP_OVERWRITE)?.parse().ok()
    }

    /// The annotations that are missing or different, to be merged into the node.
    #[must_use]
    pub fn annotation_changes(&self, vni: u32, mac: Mac, public_ip: Ipv4Addr) -> BTreeMap<String, String> {
        // The spelling, with no spaces, is what flannel itself writes: a mixed cluster must not see updates for nothing.
        let data = format!("{{\"VNI\":{vni},\"VtepMAC\":\"{mac}\"}}");
        let wanted = [
            (MANAGED, "true".to_owned()),
            (BACKEND_TYPE, "vxlan".to_owned()),
            (BACKEND_DATA, data),
            (PUBLIC_IP, public_ip.to_string()),
        ];
        wanted
            .into_iter()
            .filter(|(name, value)| self.annotation(name) != Some(value))
            .map(|(name, value)| (format!("{PREFIX}{name}"), value))
            .collect()
    }

    /// Whether the node already says that its network is there.
    #[must_use]
    pub fn network_is_available(&self) -> bool {
        self.status.conditions.iter().any(|c| c.r#type == "NetworkUnavailable" && c.status == "False")
    }
}

/// The same for a node for as long as its object exists, so that a lost device comes back as it was and no peer notices.
#[must_use]
pub fn derived_mac(uid: &str) -> Mac {
    // FNV-1a, 64 bits.
    let hash = uid.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let [_, _, a, b, c, d, e, f] = hash.to_be_bytes();
    // Locally administered, not a group.
    Mac([(a & 0xfc) | 0x02, b, c, d, e, f])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(annotations: &[(&str, &str)]) -> Node {
        let mut node = Node::default();
        node.spec.pod_cidr = "10.244.1.0/24".into();
        node.metadata.annotations =
            annotations.iter().map(|(k, v)| (format!("{PREFIX}{k}"), (*v).to_owned())).collect();
        node
    }

    const STOCK: [(&str, &str); 4] = [
        (MANAGED, "true"),
        (BACKEND_TYPE, "vxlan"),
        (BACKEND_DATA, r#"{"VNI":1,"VtepMAC":"be:ef:00:00:00:01"}"#),
        (PUBLIC_IP, "192.0.2.7"),
    ];

    #[test]
    fn a_stock_flannel_node_is_a_peer() {
        let peer = node(&STOCK).peer(1).unwrap().unwrap();
        assert_eq!(peer.subnet, "10.244.1.0/24".parse().unwrap());
        assert_eq!(peer.mac.to_string(), "be:ef:00:00:00:01");
    }

    #[test]
    fn nodes_that_take_no_part_are_silent_and_others_say_what_is_wrong() {
        assert_eq!(node(&[]).peer(1), Ok(None));
        assert_eq!(node(&STOCK).peer(2), Err(NotAPeer::Vni(1)));
        for (index, value) in [(1, "host-gw"), (2, "{}"), (3, "nowhere")] {
            let mut annotations = STOCK;
            annotations[index].1 = value;
            assert!(node(&annotations).peer(1).is_err());
        }
        let mut without = node(&STOCK);
        without.spec.pod_cidr = "fd00::/64".into();
        assert_eq!(without.peer(1), Err(NotAPeer::NoPodCidr));
    }

    #[test]
    fn annotations_are_written_only_when_they_differ() {
        let stock = node(&STOCK);
        let mac = stock.published_mac().unwrap();
        assert!(stock.annotation_changes(1, mac, "192.0.2.7".parse().unwrap()).is_empty());
        let changes = stock.annotation_changes(1, mac, "192.0.2.8".parse().unwrap());
        assert_eq!(
            changes.into_iter().collect::<Vec<_>>(),
            [(format!("{PREFIX}public-ip"), "192.0.2.8".to_owned())]
        );
        assert_eq!(node(&[]).annotation_changes(1, mac, "192.0.2.8".parse().unwrap()).len(), 4);
    }

    #[test]
    fn a_derived_mac_is_stable_unicast_and_local() {
        let mac = derived_mac("6f3f7ff1-9a5c-4f55-a1b2-000000000001");
        assert_eq!(mac, derived_mac("6f3f7ff1-9a5c-4f55-a1b2-000000000001"));
        assert_ne!(mac, derived_mac("6f3f7ff1-9a5c-4f55-a1b2-000000000002"));
        assert_eq!(mac.0[0] & 3, 2);
    }
}
