//! PCI as a driver sees it: functions, capabilities, BARs.

mod bar;
mod capability;
mod msix;
mod scan;

pub use bar::{Bar, BarKind, bars, set_bar_address};
pub use capability::{
    Capability, CapabilityLoop, ExtendedCapability, capabilities, extended_capabilities,
    find_capability, find_extended_capability,
};
pub use msix::{MsiX, VectorEntry};
pub use scan::{Address, Found, scan};

use crate::access::{Function, FunctionExt};

/// Offsets in the configuration header (PCI Local Bus 3.0, 6.1; PCI-to-PCI Bridge 1.2, 3.2).
pub mod header {
    /// Vendor ID, 16 bits; all ones where there is no function.
    pub const VENDOR_ID: u16 = 0x00;
    /// Device ID, 16 bits.
    pub const DEVICE_ID: u16 = 0x02;
    /// Command, 16 bits.
    pub const COMMAND: u16 = 0x04;
    /// Status, 16 bits.
    pub const STATUS: u16 = 0x06;
    /// Revision ID, 8 bits.
    pub const REVISION: u16 = 0x08;
    /// Class code, 24 bits.
    pub const CLASS: u16 = 0x09;
    /// Header type, 8 bits: layout in bits 6:0, multifunction in bit 7.
    pub const HEADER_TYPE: u16 = 0x0e;
    /// Base address register 0, 32 bits.
    pub const BAR0: u16 = 0x10;
    /// Secondary bus number of a bridge, 8 bits.
    pub const SECONDARY_BUS: u16 = 0x19;
    /// Subsystem vendor ID, 16 bits.
    pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2c;
    /// Subsystem ID, 16 bits.
    pub const SUBSYSTEM_ID: u16 = 0x2e;
    /// First capability, 8 bits.
    pub const CAPABILITIES: u16 = 0x34;
    /// Interrupt pin, 8 bits.
    pub const INTERRUPT_PIN: u16 = 0x3d;
}

/// Bits of the Command register.
pub mod command {
    /// The function answers in its memory BARs.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may reach memory and send MSI.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// The function sends no INTx.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

/// Capability IDs.
pub mod id {
    /// Power management.
    pub const POWER_MANAGEMENT: u8 = 0x01;
    /// Vendor specific; virtio's structures are described by these.
    pub const VENDOR: u8 = 0x09;
    /// PCI Express.
    pub const EXPRESS: u8 = 0x10;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
    /// Alternative routing ID interpretation (extended).
    pub const EXT_ARI: u16 = 0x000e;
    /// Single root I/O virtualization (extended).
    pub const EXT_SRIOV: u16 = 0x0010;
}

/// Offsets in the PCI Express capability (PCIe Base, 7.5.3).
pub mod express {
    /// Device Capabilities, 32 bits; bit 28: function level reset.
    pub const DEVICE_CAPABILITIES: u16 = 0x04;
    /// Device Control, 16 bits; bit 15: start a function level reset, reads 0.
    pub const DEVICE_CONTROL: u16 = 0x08;
    /// Device Status, 16 bits; bit 5: transactions pending.
    pub const DEVICE_STATUS: u16 = 0x0a;
    /// In Device Capabilities.
    pub const CAPABLE_OF_FLR: u32 = 1 << 28;
    /// In Device Control.
    pub const INITIATE_FLR: u16 = 1 << 15;
    /// In Device Status.
    pub const TRANSACTIONS_PENDING: u16 = 1 << 5;
}

/// Sets and clears bits of the Command register.
pub fn change_command(function: &impl Function, set: u16, clear: u16) {
    let old: u16 = function.config(header::COMMAND);
    function.set_config(header::COMMAND, old & !clear | set);
}

/// Requests a function level reset. False if the function has none to offer.
///
/// The function may take 100 ms; Transactions Pending tells when nothing is in flight any more.
pub fn request_flr(function: &impl Function) -> bool {
    let Ok(Some(cap)) = find_capability(function, id::EXPRESS) else {
        return false;
    };
    let capable: u32 = function.config(cap.offset + express::DEVICE_CAPABILITIES);
    if capable & express::CAPABLE_OF_FLR == 0 {
        return false;
    }
    let at = cap.offset + express::DEVICE_CONTROL;
    let control: u16 = function.config(at);
    function.set_config(at, control | express::INITIATE_FLR);
    true
}
