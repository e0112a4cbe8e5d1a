//! The standard headers: type 0 (a function with BARs) and what it shares with type 1 (a bridge).
//!
//! Offsets are those of PCIe Base, 7.5.1.

use crate::bar::Bars;
use crate::config::{Block, ConfigSpace, Register};

/// Vendor ID, 16 bits.
pub const VENDOR_ID: u16 = 0x00;
/// Device ID, 16 bits.
pub const DEVICE_ID: u16 = 0x02;
/// Command, 16 bits.
pub const COMMAND: u16 = 0x04;
/// Status, 16 bits.
const STATUS: u16 = 0x06;
/// Revision ID in bits 7:0, Class Code in 31:8.
const CLASS_REVISION: u16 = 0x08;
/// Header Type, 8 bits.
pub const HEADER_TYPE: u16 = 0x0e;
/// Subsystem Vendor ID, 16 bits (type 0).
pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
/// Subsystem ID, 16 bits (type 0).
pub const SUBSYSTEM_ID: u16 = 0x2e;

bitflags::bitflags! {
    /// The bits of the Command register that exist here. There is no I/O space, so I/O Space Enable reads 0.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Command: u16 {
        /// Memory Space Enable: BARs (of a bridge: windows) decode.
        const MEMORY = 1 << 1;
        /// Bus Master Enable: the function may write and read memory, and send MSI (E10).
        const BUS_MASTER = 1 << 2;
        /// Parity Error Response.
        const PARITY = 1 << 6;
        /// SERR# Enable.
        const SERR = 1 << 8;
        /// Interrupt Disable. No function here has an interrupt pin.
        const INTX_DISABLE = 1 << 10;
    }
}

impl Command {
    /// The register as it stands in `config`.
    pub fn of(config: &ConfigSpace) -> Self {
        Self::from_bits_truncate(config.word(COMMAND))
    }
}

/// Status bits that report errors; cleared by writing 1.
const STATUS_ERRORS: u32 = 0xf900;
/// Header Type: the device has more than one function.
const MULTI_FUNCTION: u8 = 1 << 7;

/// What a function says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code: base class in bits 23:16, sub-class in 15:8, programming interface in 7:0.
    pub class: u32,
    /// Subsystem vendor ID; unused in a bridge.
    pub subsystem_vendor: u16,
    /// Subsystem ID; unused in a bridge.
    pub subsystem: u16,
}

impl Identity {
    fn class_revision(&self) -> u32 {
        self.class << 8 | u32::from(self.revision)
    }
}

/// The registers both header types have.
pub(crate) fn common(identity: &Identity, header_type: u8) -> Vec<Register> {
    vec![
        Register::word(VENDOR_ID).reset(identity.vendor.into()),
        Register::word(DEVICE_ID).reset(identity.device.into()),
        Register::word(COMMAND).writable(Command::all().bits().into()),
        Register::word(STATUS).clear_by_one(STATUS_ERRORS),
        Register::dword(CLASS_REVISION).reset(identity.class_revision()),
        // Cache Line Size: no effect, but software may write it.
        Register::byte(0x0c).writable(0xff),
        Register::byte(HEADER_TYPE).reset(header_type.into()),
        // Interrupt Line: a note from firmware to software. Interrupt Pin at 0x3d stays 0: no INTx.
        Register::byte(0x3c).writable(0xff),
    ]
}

/// A type 0 header with these BARs.
pub fn type0(identity: &Identity, bars: &Bars) -> Block {
    let mut registers = common(identity, 0);
    registers.extend(bars.registers());
    registers.extend([
        Register::word(SUBSYSTEM_VENDOR_ID).reset(identity.subsystem_vendor.into()),
        Register::word(SUBSYSTEM_ID).reset(identity.subsystem.into()),
    ]);
    Block { len: 64, registers }
}

/// The header of a virtual function (PCIe Base, 9.3.4.1). Vendor and Device ID read all ones: software takes them from
/// the PF. Of the Command register only Bus Master Enable is there, and there are no BARs.
pub fn virtual_function(identity: &Identity) -> Block {
    let registers = vec![
        Register::word(VENDOR_ID).reset(0xffff),
        Register::word(DEVICE_ID).reset(0xffff),
        Register::word(COMMAND).writable(Command::BUS_MASTER.bits().into()),
        Register::word(STATUS).clear_by_one(STATUS_ERRORS),
        Register::dword(CLASS_REVISION).reset(identity.class_revision()),
        Register::word(SUBSYSTEM_VENDOR_ID).reset(identity.subsystem_vendor.into()),
        Register::word(SUBSYSTEM_ID).reset(identity.subsystem.into()),
    ];
    Block { len: 64, registers }
}

/// Says that the device has more functions than this one.
pub fn set_multi_function(config: &mut ConfigSpace) {
    let header_type = config.byte(HEADER_TYPE);
    config.hardwire_byte(HEADER_TYPE, header_type | MULTI_FUNCTION);
}
