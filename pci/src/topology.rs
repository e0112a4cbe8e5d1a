//! Names of places: bus, device and function numbers, and the address ranges of the root complex.

use std::fmt;
use std::ops::Range;

/// Bytes of configuration space of one function, and of its place in the ECAM window.
pub const CONFIG_SPACE_SIZE: u64 = 4096;
/// Bytes of ECAM window that one bus takes: 256 functions.
pub const ECAM_BYTES_PER_BUS: u64 = 256 * CONFIG_SPACE_SIZE;

/// A bus number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BusNumber(pub u8);

/// A device number, 0 to 31.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber(u8);

impl DeviceNumber {
    /// The device numbers of a bus, ascending.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..32).map(Self)
    }

    /// Device number `n`, if there is one.
    pub const fn new(n: u8) -> Option<Self> {
        if n < 32 { Some(Self(n)) } else { None }
    }

    /// The number.
    pub const fn get(self) -> u8 {
        self.0
    }
}

/// A function number within a device, 0 to 7.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FunctionNumber(u8);

impl FunctionNumber {
    /// The function numbers of a device, ascending.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..8).map(Self)
    }

    /// Function number `n`, if there is one.
    pub const fn new(n: u8) -> Option<Self> {
        if n < 8 { Some(Self(n)) } else { None }
    }

    /// The number.
    pub const fn get(self) -> u8 {
        self.0
    }
}

/// A function's place on its bus: device number in bits 7:3, function number in bits 2:0. Under ARI, all eight bits
/// are one function number (PCIe Base, 6.13).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevFn(pub u8);

impl DevFn {
    /// The place of `function` of `device`.
    pub const fn new(device: DeviceNumber, function: FunctionNumber) -> Self {
        Self(device.0 << 3 | function.0)
    }

    /// The device number (without ARI).
    pub const fn device(self) -> DeviceNumber {
        DeviceNumber(self.0 >> 3)
    }

    /// The function number (without ARI).
    pub const fn function(self) -> FunctionNumber {
        FunctionNumber(self.0 & 7)
    }
}

impl fmt::Display for DevFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{}", self.device().0, self.function().0)
    }
}

/// A routing identifier: bus number in bits 15:8, [`DevFn`] in bits 7:0 (PCIe Base, 2.2.4.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rid(pub u16);

/// Bus, device and function: where a function is. Displays as `00:01.0`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    /// The bus.
    pub bus: BusNumber,
    /// Device and function on that bus.
    pub devfn: DevFn,
}

impl Bdf {
    /// `devfn` on `bus`.
    pub const fn new(bus: BusNumber, devfn: DevFn) -> Self {
        Self { bus, devfn }
    }

    /// The same as a routing identifier.
    pub const fn rid(self) -> Rid {
        Rid((self.bus.0 as u16) << 8 | self.devfn.0 as u16)
    }
}

impl From<Rid> for Bdf {
    fn from(rid: Rid) -> Self {
        let [devfn, bus] = rid.0.to_le_bytes();
        Self::new(BusNumber(bus), DevFn(devfn))
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{}", self.bus.0, self.devfn)
    }
}

/// The guest physical addresses of the root complex. Ends are exclusive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciLayout {
    /// Configuration space of buses 0.., 1 MiB each; starts at a multiple of 1 MiB and holds 1 to 256 buses.
    pub ecam: Range<u64>,
    /// Memory window below 4 GiB, for 32-bit BARs; 1 MiB-aligned. May be empty if no function has one.
    pub mmio32: Range<u64>,
    /// Memory window for 64-bit prefetchable BARs, anywhere; 1 MiB-aligned. If empty, they go into `mmio32`.
    pub mmio64: Range<u64>,
}

/// Why a [`PciLayout`] cannot be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A range is not aligned, reversed, or (ECAM) of a size that is not 1 to 256 buses.
    #[error("PCI {name} range {range:#x?} is not usable")]
    BadRange {
        /// Which of the three.
        name: &'static str,
        /// What it was.
        range: Range<u64>,
    },
    /// Two of the ranges share an address.
    #[error("PCI ranges {0:#x?} and {1:#x?} overlap")]
    Overlap(Range<u64>, Range<u64>),
}

/// Granularity of bridge windows (PCI-to-PCI Bridge Architecture, 3.2.5) and so of the ranges they are cut from.
pub(crate) const WINDOW_ALIGN: u64 = 1 << 20;

impl PciLayout {
    /// Checks the rules written at the fields.
    pub fn validate(&self) -> Result<(), LayoutError> {
        let ranges = [
            ("ECAM", &self.ecam),
            ("32-bit memory", &self.mmio32),
            ("64-bit memory", &self.mmio64),
        ];
        for (name, range) in ranges {
            let aligned =
                range.start.is_multiple_of(WINDOW_ALIGN) && range.end.is_multiple_of(WINDOW_ALIGN);
            if !aligned || range.start > range.end {
                let range = range.clone();
                return Err(LayoutError::BadRange { name, range });
            }
        }
        let buses = (self.ecam.end - self.ecam.start) / ECAM_BYTES_PER_BUS;
        if !(1..=256).contains(&buses) {
            let range = self.ecam.clone();
            return Err(LayoutError::BadRange {
                name: "ECAM",
                range,
            });
        }
        if !self.mmio32.is_empty() && self.mmio32.end > 1 << 32 {
            let range = self.mmio32.clone();
            return Err(LayoutError::BadRange {
                name: "32-bit memory",
                range,
            });
        }
        for (a, b) in [(0, 1), (0, 2), (1, 2)] {
            let (a, b) = (ranges[a].1, ranges[b].1);
            if a.start.max(b.start) < a.end.min(b.end) {
                return Err(LayoutError::Overlap(a.clone(), b.clone()));
            }
        }
        Ok(())
    }

    /// The highest bus number that has configuration space.
    pub fn last_bus(&self) -> BusNumber {
        let buses = (self.ecam.end - self.ecam.start) / ECAM_BYTES_PER_BUS;
        BusNumber(buses.clamp(1, 256).wrapping_sub(1) as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> PciLayout {
        PciLayout {
            ecam: 0xe000_0000..0xf000_0000,
            mmio32: 0xc000_0000..0xe000_0000,
            mmio64: 0x10_0000_0000..0x20_0000_0000,
        }
    }

    #[test]
    fn a_routing_identifier_is_bus_device_function() {
        let bdf = Bdf::new(
            BusNumber(3),
            DevFn::new(
                DeviceNumber::new(0x1f).unwrap(),
                FunctionNumber::new(5).unwrap(),
            ),
        );
        assert_eq!(bdf.rid(), Rid(0x03fd));
        assert_eq!(Bdf::from(Rid(0x03fd)), bdf);
        assert_eq!(bdf.to_string(), "03:1f.5");
    }

    #[test]
    fn numbers_out_of_range_do_not_exist() {
        assert_eq!(DeviceNumber::new(32), None);
        assert_eq!(FunctionNumber::new(8), None);
        assert_eq!(DeviceNumber::all().count(), 32);
        assert_eq!(FunctionNumber::all().count(), 8);
    }

    #[test]
    fn a_sane_layout_is_accepted() {
        assert_eq!(layout().validate(), Ok(()));
        assert_eq!(layout().last_bus(), BusNumber(255));
        let mut no_64 = layout();
        no_64.mmio64 = 0..0;
        assert_eq!(no_64.validate(), Ok(()));
    }

    #[test]
    fn ranges_that_break_a_rule_are_refused() {
        type Break = fn(&mut PciLayout);
        let cases: [(&str, Break); 6] = [
            ("unaligned", |l| l.mmio32.start += 0x1000),
            ("reversed", |l| l.mmio64.end = l.mmio64.start - 0x10_0000),
            ("no bus", |l| l.ecam.end = l.ecam.start),
            ("too many buses", |l| {
                l.ecam = 0x30_0000_0000..0x30_2000_0000;
            }),
            ("beyond 4 GiB", |l| l.mmio32 = 0xf000_0000..0x1_1000_0000),
            ("overlap", |l| l.mmio64 = 0xd000_0000..0xd010_0000),
        ];
        for (name, break_it) in cases {
            let mut bad = layout();
            break_it(&mut bad);
            assert!(bad.validate().is_err(), "{name}");
        }
    }
}
