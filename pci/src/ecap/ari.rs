//! Alternative Routing-ID Interpretation (PCIe Base, 7.8.8): device and function number become one 8-bit number.
//!
//! A driver enables ARI forwarding in the port above only if function 0 below it has this capability (D1).

use crate::config::{Block, ConfigSpace, Register};
use crate::topology::DevFn;

/// Extended capability ID.
pub const ID: u16 = 0x000e;
/// Capability version.
pub const VERSION: u8 = 1;
/// Length in bytes.
pub const LEN: u16 = 8;

/// ARI Capability register, 16 bits: Next Function Number in bits 15:8, 0 at the end of the list.
const CAPABILITY: u16 = 0x04;
/// ARI Control register, 16 bits. No function groups are supported, so it reads 0.
const CONTROL: u16 = 0x06;

/// The capability of a function whose successor on the bus is `next`. VFs are in no such list.
pub fn block(next: Option<DevFn>) -> Block {
    let next = next.map_or(0, |devfn| devfn.0);
    Block {
        len: LEN,
        registers: vec![
            Register::word(CAPABILITY).reset(u32::from(next) << 8),
            Register::word(CONTROL),
        ],
    }
}

/// Makes `next` the successor of the function whose capability is at `at`, for good.
pub fn set_next(config: &mut ConfigSpace, at: u16, next: DevFn) {
    config.hardwire_byte(at + CAPABILITY + 1, next.0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigBuilder;

    #[test]
    fn the_next_function_is_in_bits_15_to_8_and_nothing_is_writable() {
        for (next, expected) in [(None, 0), (Some(DevFn(3)), 0x0300)] {
            let header = Block {
                len: 64,
                registers: Vec::new(),
            };
            let mut builder = ConfigBuilder::new(&header);
            let at = builder.extended(ID, VERSION, &block(next)).unwrap();
            let mut config = builder.build();
            config.write(at + 4, &[0xff; 4]);
            assert_eq!(config.dword(at), 0x0001_000e);
            assert_eq!(config.dword(at + CAPABILITY), expected);
            set_next(&mut config, at, DevFn(9));
            config.reset();
            assert_eq!(config.dword(at + CAPABILITY), 0x0900);
        }
    }
}
