//! Network counters as `/proc/<process>/net/dev` shows them.

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Counters {
    pub(super) interface: String,
    pub(super) received: Direction,
    pub(super) sent: Direction,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Direction {
    pub(super) bytes: u64,
    pub(super) packets: u64,
    pub(super) errors: u64,
    pub(super) dropped: u64,
}

/// All interfaces but the loopback and the host's ends of pods.
pub(super) fn parse(text: &str) -> Vec<Counters> {
    let counters = text.lines().filter_map(|line| {
        let (name, numbers) = line.split_once(':')?;
        let numbers: Vec<u64> = numbers.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let direction = |at: usize| {
            let number = |offset: usize| numbers.get(at + offset).copied().unwrap_or_default();
            Direction { bytes: number(0), packets: number(1), errors: number(2), dropped: number(3) }
        };
        Some(Counters { interface: name.trim().to_owned(), received: direction(0), sent: direction(8) })
    });
    counters.filter(|one| one.interface != "lo" && !one.interface.starts_with("veth")).collect()
}

/// The interface of the default route in `/proc/net/route`.
pub(super) fn default_interface(routes: &str) -> Option<&str> {
    routes.lines().skip(1).find_map(|line| {
        let mut words = line.split_whitespace();
        let name = words.next()?;
        (words.next()? == "00000000").then_some(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_where_the_kernel_writes_them() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets errs\n    lo: 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1\nveth1: 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1\n  eth0: 100 2 3 4 5 6 7 8 900 10 11 12 13 14 15 16\n";
        let received = Direction { bytes: 100, packets: 2, errors: 3, dropped: 4 };
        let sent = Direction { bytes: 900, packets: 10, errors: 11, dropped: 12 };
        assert_eq!(parse(text), [Counters { interface: "eth0".to_owned(), received, sent }]);
    }

    #[test]
    fn the_default_interface_is_that_of_the_default_route() {
        let text = "Iface\tDestination\tGateway\nbr0\t0000000A\t00000000\neno1\t00000000\t0100000A\n";
        assert_eq!(default_interface(text), Some("eno1"));
        assert_eq!(default_interface("Iface\tDestination\n"), None);
    }
}
