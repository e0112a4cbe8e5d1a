//! Single Root I/O Virtualization (PCIe Base, 9.3.3): the registers that say which virtual functions exist (D1).
//!
//! | offset | bytes | register | value |
//! |---|---|---|---|
//! | `0x04` | 4 | SR-IOV Capabilities | 0: no VF migration |
//! | `0x08` | 2 | SR-IOV Control: VF Enable (0), VF MSE (3), ARI Capable Hierarchy (4) | 0, writable |
//! | `0x0a` | 2 | SR-IOV Status | 0 |
//! | `0x0c` | 2 | InitialVFs | TotalVFs |
//! | `0x0e` | 2 | TotalVFs | as declared |
//! | `0x10` | 2 | NumVFs | 0, writable |
//! | `0x12` | 1 | Function Dependency Link | 0: function 0 |
//! | `0x14` | 2 | First VF Offset | 1 |
//! | `0x16` | 2 | VF Stride | 1 |
//! | `0x1a` | 2 | VF Device ID | as declared |
//! | `0x1c` | 4 | Supported Page Sizes: bit n is 4 KiB << n | 4, 8, 64, 256 KiB, 1, 4 MiB |
//! | `0x20` | 4 | System Page Size | 4 KiB, writable |
//! | `0x24` | 24 | VF BARs | one 64-bit prefetchable |
//! | `0x3c` | 4 | VF Migration State Array | 0 |
//!
//! What PCIe leaves undefined, and what happens here:
//!
//! * NumVFs, System Page Size and ARI Capable Hierarchy change only while VF Enable is 0. Other writes to them are
//!   ignored.
//! * A NumVFs above TotalVFs is ignored: the old value stays.
//! * A System Page Size that is not exactly one of the supported ones is ignored.
//! * VF Enable with NumVFs 0 enables nothing.
//!
//! The VF BAR registers size as *one* VF's BAR. That is the declared size, or the system page size if it is larger,
//! so that no two VFs share a page.

use std::ops::Range;

use crate::bar::{BadBar, Bar, BarIndex, BarKind, Bars};
use crate::config::{Block, ConfigBuilder, ConfigError, ConfigSpace, Register, Written};
use crate::function::{BarSlot, Decoded, Resource};
use crate::topology::DevFn;

/// Extended capability ID.
pub const ID: u16 = 0x0010;
/// Capability version.
pub const VERSION: u8 = 1;
/// Length in bytes.
pub const LEN: u16 = 0x40;

/// Byte offsets within the capability.
mod at {
    pub const CONTROL: u16 = 0x08;
    pub const INITIAL_VFS: u16 = 0x0c;
    pub const TOTAL_VFS: u16 = 0x0e;
    pub const NUM_VFS: u16 = 0x10;
    pub const FIRST_VF_OFFSET: u16 = 0x14;
    pub const VF_STRIDE: u16 = 0x16;
    pub const VF_DEVICE_ID: u16 = 0x1a;
    pub const SUPPORTED_PAGE_SIZES: u16 = 0x1c;
    pub const SYSTEM_PAGE_SIZE: u16 = 0x20;
    pub const VF_BAR0: u16 = 0x24;
}

const VF_ENABLE: u16 = 1 << 0;
const VF_MEMORY_SPACE_ENABLE: u16 = 1 << 3;
const ARI_CAPABLE_HIERARCHY: u16 = 1 << 4;
const CONTROL_RW: u16 = VF_ENABLE | VF_MEMORY_SPACE_ENABLE | ARI_CAPABLE_HIERARCHY;

/// The page sizes every SR-IOV device must support (PCIe Base, 9.3.3.12).
const PAGE_SIZES: u32 = 0x553;
/// System Page Size after reset: 4 KiB.
const PAGE_SIZE_RESET: u32 = 1;
/// Bytes that bit 0 of the page size registers stands for.
const SMALLEST_PAGE: u64 = 4096;

/// First VF Offset and VF Stride: with ARI, the VFs follow their PF one by one.
const FIRST_VF_OFFSET: u8 = 1;
const VF_STRIDE: u8 = 1;

/// The most VFs that fit on a bus with their PF.
pub const MAX_VFS: u16 = 255;

/// The BAR each VF has.
const BAR: BarIndex = BarIndex::ZERO;

/// What is particular to one PF's capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Declaration {
    /// TotalVFs, 1 to [`MAX_VFS`].
    pub total_vfs: u16,
    /// VF Device ID.
    pub vf_device: u16,
    /// Bytes of one VF's BAR 0; a power of two, at least 4096.
    pub vf_bar_size: u64,
}

/// Why a capability cannot be declared. A mistake of the program, not of a guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SriovError {
    /// A PF has 1 to 255 VFs.
    #[error("{0} virtual functions are not 1 to {MAX_VFS}")]
    Count(usize),
    /// The VF BAR cannot be declared.
    #[error(transparent)]
    Bar(#[from] BadBar),
    /// The capability does not fit.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// Why saved SR-IOV registers were refused: no guest can bring them about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SriovStateError {
    /// More VFs than there can be.
    #[error("NumVFs is {num_vfs}, more than TotalVFs, {total}")]
    NumVfs {
        /// NumVFs.
        num_vfs: u16,
        /// TotalVFs.
        total: u16,
    },
    /// Not exactly one of the supported page sizes.
    #[error("System Page Size is {0:#x}, which is none of the supported ones")]
    PageSize(u32),
    /// An address with bits below the size of a VF's BAR.
    #[error("the VF BAR has address {address:#x}, which is not a multiple of its size, {size:#x}")]
    Bar {
        /// The address.
        address: u64,
        /// Bytes of one VF's BAR, at the saved page size.
        size: u64,
    },
}

/// The capability's registers at their place in a configuration space.
///
/// It holds nothing but that place: every answer is read from the registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sriov {
    at: u16,
    total_vfs: u16,
    bar: Bar,
    bars: Bars,
}

/// The registers whose change depends on others.
struct Guarded {
    control: u16,
    num_vfs: u16,
    page_size: u32,
}

impl Sriov {
    /// Adds the capability to a configuration space.
    pub fn add(builder: &mut ConfigBuilder, declaration: &Declaration) -> Result<Self, SriovError> {
        let total_vfs = declaration.total_vfs;
        if !(1..=MAX_VFS).contains(&total_vfs) {
            return Err(SriovError::Count(total_vfs.into()));
        }
        let bar = Bar {
            index: BAR,
            kind: BarKind::Prefetchable64,
            size: declaration.vf_bar_size,
        };
        let bars = Bars::new(&[bar])?.moved_to(at::VF_BAR0);
        let mut registers = vec![
            Register::word(at::CONTROL).writable(CONTROL_RW.into()),
            Register::word(at::INITIAL_VFS).reset(total_vfs.into()),
            Register::word(at::TOTAL_VFS).reset(total_vfs.into()),
            Register::word(at::NUM_VFS).writable(0xffff),
            Register::word(at::FIRST_VF_OFFSET).reset(FIRST_VF_OFFSET.into()),
            Register::word(at::VF_STRIDE).reset(VF_STRIDE.into()),
            Register::word(at::VF_DEVICE_ID).reset(declaration.vf_device.into()),
            Register::dword(at::SUPPORTED_PAGE_SIZES).reset(PAGE_SIZES),
            Register::dword(at::SYSTEM_PAGE_SIZE)
                .reset(PAGE_SIZE_RESET)
                .writable(u32::MAX),
        ];
        registers.extend(bars.registers());
        let block = Block {
            len: LEN,
            registers,
        };
        let at = builder.extended(ID, VERSION, &block)?;
        Ok(Self {
            at,
            total_vfs,
            bar,
            bars: bars.moved_to(at + at::VF_BAR0),
        })
    }

    /// A guest's write anywhere in the configuration space, with the rules of this capability.
    pub fn write(&self, config: &mut ConfigSpace, offset: u16, data: &[u8]) -> Written {
        let before = self.guarded(config);
        let written = config.write(offset, data);
        if written.touches(self.at, LEN) {
            self.keep_rules(config, &before);
        }
        written
    }

    /// Takes back what of a write was not allowed.
    fn keep_rules(&self, config: &mut ConfigSpace, before: &Guarded) {
        let after = self.guarded(config);
        let enabled = before.control & VF_ENABLE != 0;
        if enabled || after.num_vfs > self.total_vfs {
            config.set_word(self.at + at::NUM_VFS, before.num_vfs);
        }
        if enabled || !is_page_size(after.page_size) {
            config.set_dword(self.at + at::SYSTEM_PAGE_SIZE, before.page_size);
        }
        if enabled {
            let kept = before.control & ARI_CAPABLE_HIERARCHY;
            let control = after.control & !ARI_CAPABLE_HIERARCHY | kept;
            config.set_word(self.at + at::CONTROL, control);
        }
        // A page larger than the declared size takes away address bits.
        let address = self.bars.address(config, &self.bar);
        self.assign(config, address & !(self.vf_size(config) - 1));
    }

    /// Whether the rules of this capability allow its registers in `saved`, whose read-only bits are good.
    pub fn check(&self, saved: &ConfigSpace) -> Result<(), SriovStateError> {
        let Guarded {
            num_vfs, page_size, ..
        } = self.guarded(saved);
        if num_vfs > self.total_vfs {
            return Err(SriovStateError::NumVfs {
                num_vfs,
                total: self.total_vfs,
            });
        }
        if !is_page_size(page_size) {
            return Err(SriovStateError::PageSize(page_size));
        }
        let address = self.bars.address(saved, &self.bar);
        let size = self.vf_size(saved);
        if !address.is_multiple_of(size) {
            return Err(SriovStateError::Bar { address, size });
        }
        Ok(())
    }

    fn guarded(&self, config: &ConfigSpace) -> Guarded {
        Guarded {
            control: config.word(self.at + at::CONTROL),
            num_vfs: config.word(self.at + at::NUM_VFS),
            page_size: config.dword(self.at + at::SYSTEM_PAGE_SIZE),
        }
    }

    /// NumVFs while VF Enable is set: these VFs exist, and no others. `None` while it is clear.
    pub fn enabled_vfs(&self, config: &ConfigSpace) -> Option<u16> {
        let registers = self.guarded(config);
        (registers.control & VF_ENABLE != 0).then_some(registers.num_vfs)
    }

    /// Bytes between the BARs of neighbouring VFs, and of each: the declared size or the system page size.
    pub fn vf_size(&self, config: &ConfigSpace) -> u64 {
        let page_size = self.guarded(config).page_size;
        self.bar
            .size
            .max(SMALLEST_PAGE.saturating_mul(page_size.into()))
    }

    /// The addresses the existing VFs decode. `None` if VF MSE is clear, no VF exists, or they would wrap around.
    pub fn decoded(&self, config: &ConfigSpace) -> Option<Decoded> {
        if config.word(self.at + at::CONTROL) & VF_MEMORY_SPACE_ENABLE == 0 {
            return None;
        }
        let vfs = self.enabled_vfs(config).filter(|vfs| *vfs != 0)?;
        let start = self.bars.address(config, &self.bar);
        let len = self.vf_size(config).checked_mul(vfs.into())?;
        Some(Decoded {
            slot: BarSlot::Members(BAR),
            range: Range {
                start,
                end: start.checked_add(len)?,
            },
        })
    }

    /// The index of the VF that has byte `offset` of [`Self::decoded`], and the offset in its BAR. `None` for a VF
    /// that does not exist, or while VFs do not decode.
    pub fn locate(&self, config: &ConfigSpace, offset: u64) -> Option<(u16, u64)> {
        let range = self.decoded(config)?.range;
        if offset >= range.end - range.start {
            return None;
        }
        let size = self.vf_size(config);
        let index = u16::try_from(offset / size).ok()?;
        Some((index, offset % size))
    }

    /// The address space firmware sets aside: for every VF there can be, at the declared size.
    pub fn resource(&self) -> Resource {
        Resource {
            slot: BarSlot::Members(BAR),
            kind: self.bar.kind,
            size: self.bar.size * u64::from(self.total_vfs),
            align: self.bar.size,
        }
    }

    /// Gives the VF BAR its address.
    pub fn assign(&self, config: &mut ConfigSpace, address: u64) {
        self.bars.assign(config, BAR, address);
    }
}

/// True for a System Page Size that is exactly one of the supported ones.
fn is_page_size(value: u32) -> bool {
    value.is_power_of_two() && value & PAGE_SIZES != 0
}

/// The place of VF `index` on its PF's bus; the reverse of [`vf_index`].
pub fn vf_place(index: u16) -> Option<DevFn> {
    let distance = u8::try_from(index).ok()?.checked_mul(VF_STRIDE)?;
    Some(DevFn(distance.checked_add(FIRST_VF_OFFSET)?))
}

/// The index of the VF at `devfn` of its PF's bus, if that is a VF's place at all. The PF is function 0.
pub fn vf_index(devfn: DevFn) -> Option<u16> {
    devfn
        .0
        .checked_sub(FIRST_VF_OFFSET)
        .map(|distance| u16::from(distance / VF_STRIDE))
}

#[cfg(test)]
mod tests;
