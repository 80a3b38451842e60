//! A pod's network counters.

use crate::sandbox::namespaces::{self, NamespaceError};
use orlop_proto::cri::{NetworkInterfaceUsage, NetworkUsage, UInt64Value};
use std::path::PathBuf;

/// Counters of every interface but the loopback; the first, or `eth0`, is the default one.
pub(super) async fn read(netns: PathBuf, timestamp: i64) -> Result<Option<NetworkUsage>, NamespaceError> {
    let text = namespaces::in_netns(Some(netns), || {
        std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default()
    })
    .await?;
    let mut interfaces = parse(&text);
    if interfaces.is_empty() {
        return Ok(None);
    }
    let default = interfaces.iter().position(|i| i.name == "eth0").unwrap_or(0);
    let default_interface = Some(interfaces.remove(default));
    Ok(Some(NetworkUsage { timestamp, default_interface, interfaces }))
}

fn parse(text: &str) -> Vec<NetworkInterfaceUsage> {
    text.lines()
        .filter_map(|line| {
            let (name, counters) = line.split_once(':')?;
            let counters: Vec<u64> = counters.split_whitespace().map_while(|c| c.parse().ok()).collect();
            let counter = |index: usize| counters.get(index).map(|value| UInt64Value { value: *value });
            Some(NetworkInterfaceUsage {
                name: name.trim().to_owned(),
                rx_bytes: counter(0),
                rx_errors: counter(2),
                tx_bytes: counter(8),
                tx_errors: counter(10),
            })
        })
        .filter(|interface| interface.name != "lo")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_read_without_the_loopback() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes    packets\n    lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n  eth0: 100 2 3 4 5 6 7 8 900 10 11 12 13 14 15 16\n";
        let interfaces = parse(text);
        assert_eq!(interfaces.len(), 1);
        assert_eq!(interfaces[0].rx_bytes.unwrap().value, 100);
        assert_eq!(interfaces[0].tx_bytes.unwrap().value, 900);
        assert_eq!(interfaces[0].tx_errors.unwrap().value, 11);
    }
}
