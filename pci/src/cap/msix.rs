//! The MSI-X capability (PCIe Base, 7.7.2): where table and PBA are, and the two switches of the function.

use crate::bar::BarIndex;
use crate::config::{Block, ConfigSpace, Register};
use crate::msix::{Control, VectorCount};

/// Capability ID.
pub const ID: u8 = 0x11;
/// Length in bytes.
pub const LEN: u16 = 12;

/// Message Control, 16 bits: table size - 1 in bits 10:0, Function Mask in 14, MSI-X Enable in 15.
const MESSAGE_CONTROL: u16 = 0x02;
/// Table Offset (bits 31:3) and BIR (bits 2:0), 32 bits.
const TABLE: u16 = 0x04;
/// PBA Offset (bits 31:3) and BIR (bits 2:0), 32 bits.
const PBA: u16 = 0x08;

const FUNCTION_MASK: u16 = 1 << 14;
const ENABLE: u16 = 1 << 15;

/// The capability for `vectors` vectors whose table and PBA lie in `bar` at these byte offsets (multiples of 8).
pub fn block(vectors: VectorCount, bar: BarIndex, table: u32, pba: u32) -> Block {
    let place = |offset: u32| offset & !7 | u32::from(bar.get());
    Block {
        len: LEN,
        registers: vec![
            Register::word(MESSAGE_CONTROL)
                .reset(u32::from(vectors.get() - 1))
                .writable((FUNCTION_MASK | ENABLE).into()),
            Register::dword(TABLE).reset(place(table)),
            Register::dword(PBA).reset(place(pba)),
        ],
    }
}

/// Offset and length of Message Control of the capability at `at`, for finding writes to it.
pub fn control_span(at: u16) -> (u16, u16) {
    (at + MESSAGE_CONTROL, 2)
}

/// The switches of the capability at `at`.
pub fn control(config: &ConfigSpace, at: u16) -> Control {
    let value = config.word(at + MESSAGE_CONTROL);
    Control {
        enabled: value & ENABLE != 0,
        function_mask: value & FUNCTION_MASK != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigBuilder;

    #[test]
    fn size_and_places_are_read_only_and_the_switches_are_not() {
        let header = Block {
            len: 64,
            registers: Vec::new(),
        };
        let mut builder = ConfigBuilder::new(&header);
        let vectors = VectorCount::new(5).unwrap();
        let at = builder
            .capability(ID, &block(vectors, BarIndex::ZERO, 0x2000, 0x3000))
            .unwrap();
        let mut config = builder.build();
        let off = Control {
            enabled: false,
            function_mask: false,
        };
        assert_eq!(control(&config, at), off);
        config.write(at, &[0xff; 8]);
        config.write(at + 8, &[0xff; 4]);
        assert_eq!(config.dword(at), 0xc004_0011);
        assert_eq!(config.dword(at + TABLE), 0x2000);
        assert_eq!(config.dword(at + PBA), 0x3000);
        let on = Control {
            enabled: true,
            function_mask: true,
        };
        assert_eq!(control(&config, at), on);
    }
}
