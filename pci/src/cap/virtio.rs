//! The vendor-specific capabilities of virtio over PCI (virtio 1.4, "Virtio Structure PCI Capabilities").

use crate::bar::BarIndex;
use crate::config::{Block, ConfigSpace, Register};

/// Capability ID: vendor-specific.
pub const ID: u8 = 0x09;

/// Byte offsets within a capability.
mod at {
    pub const CAP_LEN: u16 = 2;
    pub const CFG_TYPE: u16 = 3;
    pub const BAR: u16 = 4;
    pub const OFFSET: u16 = 8;
    pub const LENGTH: u16 = 12;
    /// Of the notification capability.
    pub const NOTIFY_OFF_MULTIPLIER: u16 = 16;
    /// Of the configuration access capability.
    pub const PCI_CFG_DATA: u16 = 16;
}

/// Length of a plain capability in bytes.
const LEN: u16 = 16;
/// Length of one with a fifth dword.
const LONG: u16 = 20;

/// Which structure a capability points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum CfgType {
    /// Common configuration.
    Common = 1,
    /// Notifications.
    Notify = 2,
    /// ISR status.
    Isr = 3,
    /// Device-specific configuration.
    Device = 4,
    /// Access to a BAR through configuration space.
    Pci = 5,
    /// Device state (S0-1). Virtio 1.4 leaves this number free, and drivers pass over what they do not know.
    DeviceState = 10,
}

/// Where a structure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Structure {
    /// The BAR that holds it.
    pub bar: BarIndex,
    /// Byte offset in the BAR.
    pub offset: u32,
    /// Length in bytes.
    pub len: u32,
}

/// A capability that points to `structure`.
pub fn block(cfg_type: CfgType, structure: Structure) -> Block {
    Block {
        len: LEN,
        registers: pointer(cfg_type, structure, LEN),
    }
}

/// The notification capability: queue `q` is notified at `structure.offset + q's queue_notify_off * multiplier`.
pub fn notify_block(structure: Structure, multiplier: u32) -> Block {
    let mut registers = pointer(CfgType::Notify, structure, LONG);
    registers.push(Register::dword(at::NOTIFY_OFF_MULTIPLIER).reset(multiplier));
    Block {
        len: LONG,
        registers,
    }
}

fn pointer(cfg_type: CfgType, structure: Structure, cap_len: u16) -> Vec<Register> {
    vec![
        Register::byte(at::CAP_LEN).reset(cap_len.into()),
        Register::byte(at::CFG_TYPE).reset(cfg_type as u32),
        Register::byte(at::BAR).reset(structure.bar.get().into()),
        Register::dword(at::OFFSET).reset(structure.offset),
        Register::dword(at::LENGTH).reset(structure.len),
    ]
}

/// The configuration access capability: `bar`, `offset` and `length` are the driver's, and so are 4 data bytes.
pub fn access_block() -> Block {
    Block {
        len: LONG,
        registers: vec![
            Register::byte(at::CAP_LEN).reset(LONG.into()),
            Register::byte(at::CFG_TYPE).reset(CfgType::Pci as u32),
            Register::byte(at::BAR).writable(0xff),
            Register::dword(at::OFFSET).writable(u32::MAX),
            Register::dword(at::LENGTH).writable(u32::MAX),
            Register::dword(at::PCI_CFG_DATA).writable(u32::MAX),
        ],
    }
}

/// An access the driver set up through the configuration access capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// The BAR.
    pub bar: BarIndex,
    /// Byte offset in the BAR; a multiple of `len`.
    pub offset: u32,
    /// 1, 2 or 4 bytes.
    pub len: u8,
}

/// The access the capability at `cap` describes. `None` if the driver broke a rule: no such BAR, a length other than
/// 1, 2 or 4, or an offset that is not a multiple of it. Whether the BAR is that long is the caller's to check.
pub fn access(config: &ConfigSpace, cap: u16) -> Option<Access> {
    let (offset, len) = (
        config.dword(cap + at::OFFSET),
        config.dword(cap + at::LENGTH),
    );
    if !matches!(len, 1 | 2 | 4) || !offset.is_multiple_of(len) {
        return None;
    }
    Some(Access {
        bar: BarIndex::new(config.byte(cap + at::BAR))?,
        offset,
        len: len as u8,
    })
}

/// Where the configuration access capability at `cap` is.
pub fn access_span(cap: u16) -> std::ops::Range<u16> {
    cap..cap + LONG
}

/// Offset and length of the data bytes of the configuration access capability at `cap`.
pub fn data_span(cap: u16) -> (u16, u16) {
    (cap + at::PCI_CFG_DATA, 4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigBuilder;

    fn config(block: &Block) -> (ConfigSpace, u16) {
        let header = Block {
            len: 64,
            registers: Vec::new(),
        };
        let mut builder = ConfigBuilder::new(&header);
        let at = builder.capability(ID, block).unwrap();
        (builder.build(), at)
    }

    fn bytes(config: &ConfigSpace, at: u16, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        config.read(at, &mut bytes);
        bytes
    }

    const WHERE: Structure = Structure {
        bar: BarIndex::ZERO,
        offset: 0x1000,
        len: 0x24,
    };

    #[test]
    fn a_structure_is_described_in_16_read_only_bytes() {
        let (mut config, cap) = config(&block(CfgType::Isr, WHERE));
        let expected = [9, 0, 16, 3, 0, 0, 0, 0, 0, 0x10, 0, 0, 0x24, 0, 0, 0];
        for at in (0..16).step_by(4) {
            config.write(cap + at, &[0xff; 4]);
        }
        assert_eq!(bytes(&config, cap, 16), expected);
    }

    #[test]
    fn notifications_add_their_multiplier() {
        let (config, cap) = config(&notify_block(WHERE, 4));
        assert_eq!(bytes(&config, cap, 4), [9, 0, 20, 2]);
        assert_eq!(bytes(&config, cap + 16, 4), [4, 0, 0, 0]);
    }

    #[test]
    fn an_access_is_what_the_driver_wrote() {
        let (mut config, cap) = config(&access_block());
        assert_eq!(access(&config, cap), None, "length 0");
        config.write(cap + 4, &[0]);
        config.write(cap + 8, &0x14u32.to_le_bytes());
        config.write(cap + 12, &1u32.to_le_bytes());
        let expected = Access {
            bar: BarIndex::ZERO,
            offset: 0x14,
            len: 1,
        };
        assert_eq!(access(&config, cap), Some(expected));
    }

    #[test]
    fn accesses_that_break_a_rule_are_none() {
        for (bar, offset, len) in [
            (6u8, 0u32, 4u32),
            (0xff, 0, 1),
            (0, 0, 3),
            (0, 0, 8),
            (0, 0, u32::MAX),
            (0, 2, 4),
            (0, u32::MAX, 2),
        ] {
            let (mut config, cap) = config(&access_block());
            config.write(cap + 4, &[bar]);
            config.write(cap + 8, &offset.to_le_bytes());
            config.write(cap + 12, &len.to_le_bytes());
            assert_eq!(access(&config, cap), None, "{bar} {offset:#x} {len}");
        }
    }
}
