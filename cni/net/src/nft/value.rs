//! Register contents, set keys and map data: the bytes nftables compares, looked up by fields with padding done right.

use std::fmt;
use std::net::IpAddr;

/// The bytes of a key, of map data or of a comparison. A single field keeps its natural length; as soon as there are
/// several, each is padded to four bytes, as the kernel concatenates them.
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value {
    bytes: Vec<u8>,
}

impl Value {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes exactly as given, such as those a dump returned.
    #[must_use]
    pub fn raw(bytes: &[u8]) -> Self {
        Self { bytes: bytes.to_vec() }
    }

    #[must_use]
    pub fn of_ip(ip: IpAddr) -> Self {
        Self::new().ip(ip)
    }

    #[must_use]
    pub fn of_u32(value: u32) -> Self {
        Self::new().u32(value)
    }

    fn field(mut self, field: &[u8]) -> Self {
        if self.bytes.is_empty() {
            self.bytes.extend_from_slice(field);
            return self;
        }
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self.bytes.extend_from_slice(field);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    #[must_use]
    pub fn ip(self, ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => self.field(&ip.octets()),
            IpAddr::V6(ip) => self.field(&ip.octets()),
        }
    }

    /// A transport port (or anything else of two bytes in network order).
    #[must_use]
    pub fn port(self, port: u16) -> Self {
        self.field(&port.to_be_bytes())
    }

    /// A transport protocol number (or any other single byte).
    #[must_use]
    pub fn proto(self, proto: u8) -> Self {
        self.field(&[proto])
    }

    /// A number in host byte order: marks, numgen results, connection states, interface indices.
    #[must_use]
    pub fn u32(self, value: u32) -> Self {
        self.field(&value.to_ne_bytes())
    }

    #[must_use]
    pub fn ifname(self, name: &str) -> Self {
        let mut padded = [0; 16];
        let length = name.len().min(15);
        padded[..length].copy_from_slice(&name.as_bytes()[..length]);
        self.field(&padded)
    }

    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The value that follows in unsigned big-endian order, or `None` after the last one.
    pub(super) fn successor(&self) -> Option<Self> {
        let mut next = self.clone();
        for byte in next.bytes.iter_mut().rev() {
            let (sum, overflow) = byte.overflowing_add(1);
            *byte = sum;
            if !overflow {
                return Some(next);
            }
        }
        None
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in &self.bytes {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// What a field of a key or of map data is. The kernel only needs the length; the identity is for `nft list`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FieldType {
    Ipv4Addr,
    Ipv6Addr,
    /// A protocol number such as 6 for TCP.
    InetProto,
    /// A port.
    InetService,
    /// A number in host byte order; numgen results too (`nft` cannot list plain integers in a concatenation).
    Mark,
    IfName,
    EtherAddr,
}

impl FieldType {
    pub(super) const fn id(self) -> u32 {
        match self {
            Self::Ipv4Addr => 7,
            Self::Ipv6Addr => 8,
            Self::EtherAddr => 9,
            Self::InetProto => 12,
            Self::InetService => 13,
            Self::Mark => 19,
            Self::IfName => 41,
        }
    }

    pub(super) const fn length(self) -> u32 {
        match self {
            Self::InetProto => 1,
            Self::InetService => 2,
            Self::Ipv4Addr | Self::Mark => 4,
            Self::EtherAddr => 6,
            Self::Ipv6Addr | Self::IfName => 16,
        }
    }

    const fn host_order(self) -> bool {
        matches!(self, Self::Mark | Self::IfName)
    }
}

/// `nft` packs the types of a concatenation into one number, six bits each.
pub(super) fn type_id(fields: &[FieldType]) -> u32 {
    fields.iter().fold(0, |id, field| (id << 6) | field.id())
}

pub(super) fn type_length(fields: &[FieldType]) -> u32 {
    match fields {
        [single] => single.length(),
        several => several.iter().map(|f| f.length().next_multiple_of(4)).sum(),
    }
}

/// 1 is host order, 2 big endian, as `nft` stores it with a set.
pub(super) fn byte_order(fields: &[FieldType]) -> u32 {
    match fields {
        [single] if single.host_order() => 1,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_field_is_not_padded_and_several_are() {
        assert_eq!(Value::new().port(80).as_bytes(), [0, 80]);
        assert_eq!(Value::new().proto(6).port(80).as_bytes(), [6, 0, 0, 0, 0, 80, 0, 0]);
        assert_eq!(type_length(&[FieldType::InetService]), 2);
        assert_eq!(type_length(&[FieldType::InetProto, FieldType::InetService]), 8);
    }

    #[test]
    fn the_successor_of_the_last_value_does_not_exist() {
        assert_eq!(Value::raw(&[1, 255]).successor(), Some(Value::raw(&[2, 0])));
        assert_eq!(Value::raw(&[255, 255]).successor(), None);
    }
}
