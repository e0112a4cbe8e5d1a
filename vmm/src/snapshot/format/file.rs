//! `state.json` as a whole.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::clock::Clock;
use super::cpu::{CpuModel, Vcpu};
use super::function::Function;
use super::hex::{Hex, HexBytes};
use super::irqchip::Irqchip;
use super::machine::{Machine, SnapshotId};
use super::owner::Owner;
use super::pci::Pci;
use super::serial::Serial;

/// What the first field of every state says.
pub const FORMAT: &str = "tern-snapshot";
/// The version of the format that is written, and the newest that is read.
pub const VERSION: u32 = 1;

/// State of a whole VM, but for its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StateFile {
    /// `tern-snapshot`.
    pub format: String,
    /// Version of the format.
    pub version: u32,
    /// What names this snapshot: its files and those who build on it have it too.
    pub id: SnapshotId,
    /// Who made it, and when.
    pub created: Created,
    /// What the machine is built from.
    pub machine: Machine,
    /// Guest memory.
    pub memory: Memory,
    /// The processor the guest sees.
    pub cpu_model: CpuModel,
    /// State of each vCPU, in their order.
    pub vcpus: Vec<Vcpu>,
    /// State of the interrupt controllers that vCPUs share.
    pub irqchip: Irqchip,
    /// State of the guest's clock.
    pub clock: Clock,
    /// Registers of everything on the PCI bus.
    pub pci: Pci,
    /// State of each virtio function that exists.
    pub functions: Vec<Function>,
    /// State of each SR-IOV owner.
    pub owners: Vec<Owner>,
    /// State of the serial port.
    pub serial: Serial,
    /// Input that was read for the serial port and not taken by it.
    pub serial_input: HexBytes,
}

/// Who made a snapshot, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Created {
    /// The program and its version.
    pub by: String,
    /// When, as in `2026-11-28T14:00:00Z`.
    pub at: String,
}

/// Where guest memory is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Ranges of guest RAM, ascending. The file has their bytes one after the other.
    pub ranges: Vec<Range>,
    /// BLAKE3 digest of the file; see the documentation of the format.
    pub digest: HexBytes,
    /// The snapshot this one builds on: its memory has the pages that this one's lacks.
    pub base: Option<Base>,
}

/// A range of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// First guest physical address.
    pub start: Hex<u64>,
    /// Bytes.
    pub size: u64,
}

/// A snapshot that another one builds on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Its directory, relative to that of this snapshot.
    pub directory: String,
    /// Its id.
    pub id: SnapshotId,
}
