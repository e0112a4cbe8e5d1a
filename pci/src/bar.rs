//! Base address registers: declaration, sizing protocol, and the range each one decodes.
//!
//! The registers in configuration space are the only copy of a BAR's address. Writing ones to a register and reading
//! back gives the size, in any order of the two halves, because the bits below the size are read-only.

use std::ops::Range;

use crate::config::{ConfigSpace, Register};

/// Offset of BAR 0 in the header.
const BAR0: u16 = 0x10;
/// Number of BAR registers in a type 0 header.
const COUNT: u8 = 6;
/// Smallest BAR, so that functions never share a page.
const MIN_SIZE: u64 = 4096;

/// Index of a BAR register, 0 to 5. A 64-bit BAR is named by its lower register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BarIndex(u8);

impl BarIndex {
    /// BAR 0.
    pub const ZERO: Self = Self(0);

    /// BAR `n`, if there is one.
    pub const fn new(n: u8) -> Option<Self> {
        if n < COUNT { Some(Self(n)) } else { None }
    }

    /// The index.
    pub const fn get(self) -> u8 {
        self.0
    }
}

/// Where a BAR can be and how it may be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// 32-bit, non-prefetchable.
    Memory32,
    /// 64-bit, prefetchable. Takes two registers.
    Prefetchable64,
}

/// A BAR: register, kind and size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its (lower) register.
    pub index: BarIndex,
    /// Its kind.
    pub kind: BarKind,
    /// Bytes; a power of two, at least 4096.
    pub size: u64,
}

/// Why BARs cannot be declared. A mistake of the program, not of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("BAR {0:?} has a bad size or no room")]
pub struct BadBar(pub Bar);

/// The BARs of one function.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bars {
    bars: Vec<Bar>,
    /// Offset of BAR 0: 0x10 in a header, elsewhere for the VF BARs of an SR-IOV capability.
    base: u16,
}

impl Bars {
    /// BARs whose registers start at `BAR0` of a type 0 header.
    pub fn new(bars: &[Bar]) -> Result<Self, BadBar> {
        let mut taken = [false; COUNT as usize];
        for bar in bars {
            let max = match bar.kind {
                BarKind::Memory32 => 1 << 31,
                BarKind::Prefetchable64 => 1 << 62,
            };
            let registers = bar.registers();
            let slots = taken.get_mut(registers).ok_or(BadBar(*bar))?;
            let good = bar.size.is_power_of_two() && (MIN_SIZE..=max).contains(&bar.size);
            if !good || slots.contains(&true) {
                return Err(BadBar(*bar));
            }
            slots.fill(true);
        }
        Ok(Self {
            bars: bars.to_vec(),
            base: BAR0,
        })
    }

    /// The same BARs with BAR 0 at byte `base` instead: of configuration space, or of the block that holds them.
    pub(crate) fn moved_to(self, base: u16) -> Self {
        Self { base, ..self }
    }

    /// The BARs, in the order they were declared.
    pub fn iter(&self) -> impl Iterator<Item = &Bar> {
        self.bars.iter()
    }

    /// The BAR whose (lower) register is `index`.
    pub fn get(&self, index: BarIndex) -> Option<&Bar> {
        self.bars.iter().find(|bar| bar.index == index)
    }

    /// Bytes of configuration space that hold BAR registers: offset and length.
    pub fn span(&self) -> (u16, u16) {
        (self.base, u16::from(COUNT) * 4)
    }

    /// Declarations of the BAR registers.
    pub(crate) fn registers(&self) -> Vec<Register> {
        let mut registers = Vec::new();
        for bar in &self.bars {
            let at = self.offset(bar.index);
            let mask = !(bar.size - 1);
            // Type in bits 2:1 (0: 32-bit, 2: 64-bit), prefetchable in bit 3 (PCIe Base, 7.5.1.2.1).
            let flags = match bar.kind {
                BarKind::Memory32 => 0x0,
                BarKind::Prefetchable64 => 0xc,
            };
            registers.push(
                Register::dword(at)
                    .reset(flags)
                    .writable(mask as u32 & !0xf),
            );
            if bar.kind == BarKind::Prefetchable64 {
                registers.push(Register::dword(at + 4).writable((mask >> 32) as u32));
            }
        }
        registers
    }

    /// The address in the registers of `bar`. During sizing this is whatever the guest wrote.
    pub fn address(&self, config: &ConfigSpace, bar: &Bar) -> u64 {
        let at = self.offset(bar.index);
        let low = u64::from(config.dword(at) & !0xf);
        match bar.kind {
            BarKind::Memory32 => low,
            BarKind::Prefetchable64 => u64::from(config.dword(at + 4)) << 32 | low,
        }
    }

    /// The addresses `bar` decodes when decoding is enabled. `None` if they would wrap around.
    pub fn range(&self, config: &ConfigSpace, bar: &Bar) -> Option<Range<u64>> {
        let start = self.address(config, bar);
        let limit = match bar.kind {
            BarKind::Memory32 => 1 << 32,
            BarKind::Prefetchable64 => u64::MAX,
        };
        let end = start.checked_add(bar.size).filter(|end| *end <= limit)?;
        Some(start..end)
    }

    /// Writes an address into the registers of BAR `index`, as firmware does.
    pub fn assign(&self, config: &mut ConfigSpace, index: BarIndex, address: u64) {
        let Some(bar) = self.get(index) else {
            return;
        };
        let at = self.offset(index);
        config.write(at, &(address as u32).to_le_bytes());
        if bar.kind == BarKind::Prefetchable64 {
            config.write(at + 4, &((address >> 32) as u32).to_le_bytes());
        }
    }

    fn offset(&self, index: BarIndex) -> u16 {
        self.base + u16::from(index.0) * 4
    }
}

impl Bar {
    fn registers(&self) -> Range<usize> {
        let first = usize::from(self.index.0);
        match self.kind {
            BarKind::Memory32 => first..first + 1,
            BarKind::Prefetchable64 => first..first + 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Block, ConfigBuilder};

    fn bar(index: u8, kind: BarKind, size: u64) -> Bar {
        Bar {
            index: BarIndex::new(index).unwrap(),
            kind,
            size,
        }
    }

    fn space(bars: &Bars) -> ConfigSpace {
        ConfigBuilder::new(&Block {
            len: 64,
            registers: bars.registers(),
        })
        .build()
    }

    #[test]
    fn sizing_works_with_either_half_first() {
        let big = bar(0, BarKind::Prefetchable64, 1 << 33);
        let small = bar(2, BarKind::Prefetchable64, 1 << 14);
        let bars = Bars::new(&[big, small]).unwrap();
        for order in [[0u16, 4], [4, 0]] {
            let mut config = space(&bars);
            for half in order {
                config.write(0x10 + half, &[0xff; 4]);
                config.write(0x18 + half, &[0xff; 4]);
            }
            assert_eq!(config.dword(0x10), 0xc);
            assert_eq!(config.dword(0x14), 0xffff_fffe);
            assert_eq!(config.dword(0x18), 0xffff_c00c);
            assert_eq!(config.dword(0x1c), 0xffff_ffff);
        }
    }

    #[test]
    fn sizing_a_32_bit_bar_leaves_its_neighbours_at_zero() {
        let bars = Bars::new(&[bar(1, BarKind::Memory32, 0x2000)]).unwrap();
        let mut config = space(&bars);
        for at in (0x10..0x28).step_by(4) {
            config.write(at, &[0xff; 4]);
        }
        let found: Vec<_> = (0..6).map(|i| config.dword(0x10 + i * 4)).collect();
        assert_eq!(found, [0, 0xffff_e000, 0, 0, 0, 0]);
    }

    #[test]
    fn an_assigned_address_is_what_decodes() {
        let wide = bar(0, BarKind::Prefetchable64, 0x4000);
        let bars = Bars::new(&[wide]).unwrap();
        let mut config = space(&bars);
        bars.assign(&mut config, BarIndex::ZERO, 0x12_3456_4000);
        let range = bars.range(&config, &wide);
        assert_eq!(range, Some(0x12_3456_4000..0x12_3456_8000));
    }

    #[test]
    fn a_range_that_would_wrap_decodes_nothing() {
        let wide = bar(0, BarKind::Prefetchable64, 0x4000);
        let narrow = bar(2, BarKind::Memory32, 0x4000);
        let bars = Bars::new(&[wide, narrow]).unwrap();
        let mut config = space(&bars);
        bars.assign(&mut config, wide.index, u64::MAX);
        assert_eq!(bars.range(&config, &wide), None);
        bars.assign(&mut config, narrow.index, 0xffff_ffff);
        assert_eq!(
            bars.range(&config, &narrow),
            Some(0xffff_c000..0x1_0000_0000)
        );
    }

    #[test]
    fn bad_declarations_are_refused() {
        let good = bar(0, BarKind::Prefetchable64, 4096);
        for bad in [
            bar(1, BarKind::Memory32, 4096),
            bar(5, BarKind::Prefetchable64, 4096),
            bar(2, BarKind::Memory32, 2048),
            bar(2, BarKind::Memory32, 5000),
            bar(2, BarKind::Memory32, 1 << 32),
        ] {
            assert_eq!(Bars::new(&[good, bad]), Err(BadBar(bad)));
        }
    }
}
