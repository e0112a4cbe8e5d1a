//! `state.json` as a whole.

use std::ops::RangeInclusive;
use std::time::SystemTime;

use migration::{SnapshotId, memory::Digest};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::clock::Clock;
use super::cpu::{CpuModel, Vcpu};
use super::document::Document;
use super::error::{At, Invalid, convert_all};
use super::function::Function;
use super::hex::HexBytes;
use super::irqchip::Irqchip;
use super::machine::Machine;
use super::owner::Owner;
use super::pci::Pci;
use super::sections::{FORMAT, FormatName, NEWEST};
use super::serial::Serial;
use super::version::Version;
use crate::kvm::{model, state};

/// State of a whole VM, but for its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Name of the format.
    pub format: FormatName,
    /// Version of the format.
    pub version: Version<NEWEST>,
    /// What names this snapshot, 32 hexadecimal digits: its memory has it too.
    pub id: HexBytes,
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
    /// Interrupt controllers that vCPUs share.
    pub irqchip: Irqchip,
    /// The guest's clock.
    pub clock: Clock,
    /// Registers of everything on the PCI bus.
    pub pci: Pci,
    /// Virtio functions that exist.
    pub functions: Vec<Function>,
    /// SR-IOV owners.
    pub owners: Vec<Owner>,
    /// COM1.
    pub serial: Serial,
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

/// Guest memory. It is in `memory.bin`, and its layout follows from its size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// BLAKE3 digest of the memory, in 64 hexadecimal digits, as `memory.bin` has it.
    pub digest: HexBytes,
}

impl Created {
    /// By this program, at `time`.
    pub fn now(time: SystemTime) -> Self {
        Self {
            by: format!("tern {}", env!("CARGO_PKG_VERSION")),
            at: humantime::format_rfc3339_seconds(time).to_string(),
        }
    }
}

impl Document for State {
    const FORMAT: &'static str = FORMAT;
    const VERSIONS: RangeInclusive<u64> = 1..=NEWEST as u64;

    fn validate(&self) -> Result<(), Invalid> {
        self.id()?;
        self.digest()?;
        self.cpu()?;
        self.pci.plain().field("pci")?;
        convert_all(&self.functions, |function| {
            function.context_bytes()?;
            function.transient()
        })
        .field("functions")?;
        convert_all(&self.owners, Owner::plain).field("owners")?;
        self.serial.plain().field("serial")?;
        Ok(())
    }
}

/// What a state is made of.
pub struct Parts<'a> {
    /// What names the snapshot.
    pub id: SnapshotId,
    /// Digest of its memory.
    pub digest: Digest,
    /// What the machine is built from.
    pub machine: Machine,
    /// The processor the guest sees.
    pub model: &'a model::CpuModel,
    /// vCPUs, interrupt controllers, clock.
    pub cpu: &'a state::State,
    /// Registers on the PCI bus.
    pub pci: Pci,
    /// Virtio functions.
    pub functions: Vec<Function>,
    /// SR-IOV owners.
    pub owners: Vec<Owner>,
    /// COM1.
    pub serial: Serial,
}

impl State {
    /// The state made of `parts`, now.
    pub fn of(parts: Parts<'_>) -> Self {
        Self {
            format: FormatName,
            version: Version::default(),
            id: HexBytes(parts.id.0.to_vec()),
            created: Created::now(SystemTime::now()),
            machine: parts.machine,
            memory: Memory {
                digest: HexBytes(parts.digest.0.to_vec()),
            },
            cpu_model: CpuModel::of(parts.model),
            vcpus: parts.cpu.vcpus.iter().map(Vcpu::of).collect(),
            irqchip: Irqchip::of(&parts.cpu.irqchip),
            clock: Clock::of(&parts.cpu.clock),
            pci: parts.pci,
            functions: parts.functions,
            owners: parts.owners,
            serial: parts.serial,
        }
    }

    /// What names the snapshot.
    ///
    /// # Errors
    ///
    /// Another number of bytes.
    pub fn id(&self) -> Result<SnapshotId, Invalid> {
        exactly(&self.id).map(SnapshotId).field("id")
    }

    /// The digest of its memory.
    ///
    /// # Errors
    ///
    /// Another number of bytes.
    pub fn digest(&self) -> Result<Digest, Invalid> {
        let digest = exactly(&self.memory.digest).map(Digest);
        digest.field("digest").field("memory")
    }

    /// The processor, and the state of vCPUs, interrupt controllers and clock.
    ///
    /// # Errors
    ///
    /// The first value that none has.
    pub fn cpu(&self) -> Result<(model::CpuModel, state::State), Invalid> {
        let model = self.cpu_model.plain().field("cpu_model")?;
        let state = state::State {
            irqchip: self.irqchip.plain().field("irqchip")?,
            clock: self.clock.plain().field("clock")?,
            vcpus: convert_all(&self.vcpus, |vcpu| vcpu.plain(model.xsave_size)).field("vcpus")?,
        };
        Ok((model, state))
    }
}

fn exactly<const N: usize>(bytes: &HexBytes) -> Result<[u8; N], Invalid> {
    let found = bytes.0.as_slice().try_into();
    found.map_err(|_| Invalid::new(format!("has {} bytes instead of {N}", bytes.0.len())))
}
