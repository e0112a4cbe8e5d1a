//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An Ethernet address. Written, and serialised, as `02:00:5e:10:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

/// Why a text is not the address of a network device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// Not six hexadecimal octets.
    #[error("{0:?} is not a MAC address; write it like 02:00:5e:10:00:01")]
    Format(String),
    /// A group address, or all zeroes.
    #[error("{0} cannot be the address of a device; use an even, non-zero first octet such as 02")]
    NotUnicast(MacAddress),
}

impl MacAddress {
    /// The address with these octets, first on the wire first.
    pub const fn new(octets: [u8; 6]) -> Self {
        Self(octets)
    }

    /// The octets, first on the wire first.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// True for a broadcast or multicast address.
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// The locally administered address of device `index` of the VM that `seed` stands for: the same each time, and
    /// different for each index below 65536.
    pub fn derive(seed: u64, index: u16) -> Self {
        // The finaliser of MurmurHash3: spreads seeds that differ in few bits.
        let mut hash = seed;
        hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash = (hash ^ hash >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        let [a, b, c, ..] = (hash ^ hash >> 33).to_le_bytes();
        let [high, low] = index.to_be_bytes();
        Self([0x02, a, b, c, high, low])
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let malformed = || MacError::Format(text.into());
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().ok_or_else(malformed)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(malformed());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| malformed())?;
        }
        if parts.next().is_some() {
            return Err(malformed());
        }
        let mac = Self(octets);
        if mac.is_group() || octets == [0; 6] {
            return Err(MacError::NotUnicast(mac));
        }
        Ok(mac)
    }
}

impl TryFrom<String> for MacAddress {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn text_and_address_agree() {
        let mac: MacAddress = "02:0A:ff:00:10:9c".parse().unwrap();
        assert_eq!(mac.octets(), [2, 10, 255, 0, 16, 0x9c]);
        assert_eq!(mac.to_string(), "02:0a:ff:00:10:9c");
    }

    #[test]
    fn what_is_no_device_address_is_refused() {
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:00:00",
            "02:00:00:00:00:0g",
            "2:0:0:0:0:1",
            "+2:00:00:00:00:01",
        ] {
            let format = MacError::Format(text.into());
            assert_eq!(text.parse::<MacAddress>(), Err(format), "{text:?}");
        }
        for text in [
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
        ] {
            let outcome = text.parse::<MacAddress>();
            assert!(matches!(outcome, Err(MacError::NotUnicast(_))), "{text}");
        }
    }

    #[test]
    fn derived_addresses_are_local_unicast_stable_and_distinct() {
        let mut seen = HashSet::new();
        for seed in [0, 1, 2, u64::MAX] {
            for index in 0..300 {
                let mac = MacAddress::derive(seed, index);
                assert_eq!(mac, MacAddress::derive(seed, index));
                assert_eq!(mac.octets()[0], 0x02);
                assert!(seen.insert(mac), "{mac} twice");
            }
        }
    }
}
