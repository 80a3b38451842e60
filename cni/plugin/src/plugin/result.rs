//! Results in the shape of the version that the configuration asks for.

use super::error::{Code, PluginError};
use crate::network::{Attachment, Config};
use ipnet::IpNet;
use serde_json::{Map, Value, json};
use std::net::IpAddr;

/// The shapes results had over time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Shape {
    /// `ip4` and `ip6` objects.
    V02,
    /// `ips` with a `version` each.
    V03,
    V10,
    /// Interfaces have an MTU.
    V11,
}

pub(super) fn shape(version: &str) -> Result<Shape, PluginError> {
    match version {
        "" | "0.1.0" | "0.2.0" => Ok(Shape::V02),
        "0.3.0" | "0.3.1" | "0.4.0" => Ok(Shape::V03),
        "1.0.0" => Ok(Shape::V10),
        "1.1.0" => Ok(Shape::V11),
        other => {
            let message = format!("CNI version {other} is not supported");
            let supported = super::SUPPORTED_VERSIONS.join(", ");
            Err(PluginError::new(Code::IncompatibleVersion, message)
                .details(format!("supported: {supported}")))
        }
    }
}

fn routes(config: &Config, attachment: &Attachment) -> Vec<(IpNet, IpAddr)> {
    let mut routes = Vec::new();
    for assigned in &attachment.addresses {
        let v4 = assigned.gateway.is_ipv4();
        let everywhere = if v4 { IpNet::V4(Default::default()) } else { IpNet::V6(Default::default()) };
        routes.extend(
            config.routes.iter().filter(|dst| dst.addr().is_ipv4() == v4).map(|dst| (*dst, assigned.gateway)),
        );
        if config.default_route {
            routes.push((everywhere, assigned.gateway));
        }
    }
    routes
}

pub(super) fn build(
    version: &str,
    shape: Shape,
    (config, attachment): (&Config, &Attachment),
    (ifname, netns): (&str, &str),
) -> Value {
    let version = if version.is_empty() { "0.2.0" } else { version };
    let routes = routes(config, attachment);
    if shape == Shape::V02 {
        return oldest(version, attachment, &routes);
    }
    let mtu = |mut interface: Map<String, Value>, mtu: u32| {
        if shape == Shape::V11 {
            interface.insert("mtu".to_owned(), mtu.into());
        }
        Value::Object(interface)
    };
    let interface = |name: &str, mac: Option<String>, sandbox: Option<&str>| {
        let mut map = Map::new();
        map.insert("name".to_owned(), name.into());
        map.extend(mac.map(|mac| ("mac".to_owned(), mac.into())));
        map.extend(sandbox.map(|path| ("sandbox".to_owned(), path.into())));
        map
    };
    let bridge = &attachment.bridge;
    let interfaces = vec![
        mtu(interface(&bridge.name, bridge.mac.map(|mac| mac.to_string()), None), bridge.mtu),
        mtu(
            interface(&attachment.host_interface, attachment.host_mac.map(|mac| mac.to_string()), None),
            attachment.mtu,
        ),
        mtu(interface(ifname, Some(attachment.mac.to_string()), Some(netns)), attachment.mtu),
    ];
    let ips: Vec<Value> = attachment
        .addresses
        .iter()
        .map(|assigned| {
            let mut ip = json!({
                "address": assigned.address.to_string(),
                "gateway": assigned.gateway.to_string(),
                "interface": 2,
            });
            if shape == Shape::V03 {
                ip["version"] = if assigned.gateway.is_ipv4() { "4" } else { "6" }.into();
            }
            ip
        })
        .collect();
    let routes: Vec<Value> =
        routes.iter().map(|(dst, gw)| json!({"dst": dst.to_string(), "gw": gw.to_string()})).collect();
    json!({"cniVersion": version, "interfaces": interfaces, "ips": ips, "routes": routes, "dns": {}})
}

fn oldest(version: &str, attachment: &Attachment, routes: &[(IpNet, IpAddr)]) -> Value {
    let mut result = json!({"cniVersion": version, "dns": {}});
    for assigned in &attachment.addresses {
        let v4 = assigned.gateway.is_ipv4();
        let own: Vec<Value> = routes
            .iter()
            .filter(|(_, gw)| gw.is_ipv4() == v4)
            .map(|(dst, gw)| json!({"dst": dst.to_string(), "gw": gw.to_string()}))
            .collect();
        let key = if v4 { "ip4" } else { "ip6" };
        result[key] = json!({
            "ip": assigned.address.to_string(),
            "gateway": assigned.gateway.to_string(),
            "routes": own,
        });
    }
    result
}

/// The addresses a previous result gives to an interface, of any shape; all of them where it does not say whose.
pub(super) fn addresses(previous: &Value, ifname: &str) -> Vec<IpNet> {
    let parse = |value: &Value| value.as_str().and_then(|text| text.parse().ok());
    if let Some(ips) = previous["ips"].as_array() {
        let belongs = |ip: &&Value| {
            let index = ip["interface"].as_u64().and_then(|index| usize::try_from(index).ok());
            index.is_none_or(|index| previous["interfaces"][index]["name"].as_str() == Some(ifname))
        };
        return ips.iter().filter(belongs).filter_map(|ip| parse(&ip["address"])).collect();
    }
    ["ip4", "ip6"].iter().filter_map(|key| parse(&previous[*key]["ip"])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_found_in_results_of_all_shapes() {
        let new = json!({
            "interfaces": [{"name": "br"}, {"name": "eth0"}],
            "ips": [{"address": "10.0.0.1/24", "interface": 0}, {"address": "10.0.0.2/24", "interface": 1}],
        });
        assert_eq!(addresses(&new, "eth0"), ["10.0.0.2/24".parse().unwrap()]);
        let old = json!({"ip4": {"ip": "10.0.0.2/24"}, "ip6": {"ip": "fd00::2/64"}});
        assert_eq!(addresses(&old, "eth0").len(), 2);
        assert!(addresses(&json!({"ips": "nonsense"}), "eth0").is_empty());
    }

    #[test]
    fn unknown_versions_are_refused_with_the_known_ones() {
        let error = shape("2.0.0").unwrap_err();
        assert_eq!(error.code, Code::IncompatibleVersion);
        assert!(error.details.contains("1.1.0"));
    }
}
