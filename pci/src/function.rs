//! What the root complex asks of a function, whatever kind it is.

use std::ops::Range;
use std::sync::Arc;

use devices::bus::Effect;
use vmm_sys_util::eventfd::EventFd;

use crate::bar::{BarIndex, BarKind};
use crate::cap::pcie::PortType;
use crate::state::{Registers, RegistersError};
use crate::topology::DevFn;

/// Anything with configuration space: endpoints, virtual functions, ports, the host bridge.
///
/// Called from any vCPU thread, several at a time. The root complex splits accesses so that each lies within one
/// aligned dword of the 4096 bytes.
pub trait ConfigTarget: Send + Sync {
    /// Reads 1 to 4 bytes at byte `offset`. Every byte must be filled; unimplemented registers read 0.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Writes 1 to 4 bytes at byte `offset`. Returns [`Effect::LayoutChanged`] if the function may now decode other
    /// addresses, or have other doorbells, than before.
    fn config_write(&self, offset: u16, data: &[u8]) -> Effect;

    /// Its device has more functions than this one: function 0 says so in its Header Type, for good.
    fn set_multi_function(&self);

    /// A name for messages.
    fn name(&self) -> &str;

    /// Saved form of its registers. The function must be quiet.
    fn save(&self) -> Registers;

    /// Whether [`Self::restore`] would accept `saved`.
    fn check(&self, saved: &Registers) -> Result<(), RegistersError>;

    /// Checks all of `saved`, then takes it over, in a function in its reset state. What registers switch (bus
    /// mastering, vectors) is switched, but nothing is sent. The caller accounts for the change of the layout.
    fn restore(&self, saved: &Registers) -> Result<(), RegistersError>;
}

/// One of the address ranges a function decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BarSlot {
    /// A BAR of the function itself.
    Own(BarIndex),
    /// A VF BAR of its SR-IOV capability: the BARs of its members one after the other.
    Members(BarIndex),
}

/// Address space a function wants from firmware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resource {
    /// The range it is for.
    pub slot: BarSlot,
    /// Where it can be.
    pub kind: BarKind,
    /// Bytes.
    pub size: u64,
    /// Alignment in bytes; a power of two. For VF BARs that is the size of one member's.
    pub align: u64,
}

/// A range a function decodes now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// Which of its ranges.
    pub slot: BarSlot,
    /// Guest physical addresses.
    pub range: Range<u64>,
}

/// A register whose write only signals an event, so that the machine may do it without asking the function.
#[derive(Clone, Debug)]
pub struct FunctionDoorbell {
    /// The range that holds the register.
    pub slot: BarSlot,
    /// Byte offset in the range.
    pub offset: u64,
    /// The value that must be written; `None` for any value.
    pub datamatch: Option<u16>,
    /// What the write signals.
    pub event: Arc<EventFd>,
}

/// An endpoint: a function with BARs, on the root bus or behind a port.
///
/// All methods may be called from any vCPU thread, several at a time. None may call back into the root complex.
pub trait PciFunction: ConfigTarget {
    /// What its PCI Express capability says it is. Decides where it may be plugged in.
    fn port_type(&self) -> PortType;

    /// The address space it needs, the same in every state.
    fn resources(&self) -> Vec<Resource>;

    /// Firmware gives the range `slot` its address.
    fn assign(&self, slot: BarSlot, address: u64);

    /// The ranges it decodes now, by its registers and nothing else. Empty while decoding is disabled.
    fn decoded(&self) -> Vec<Decoded>;

    /// Reads 1 to 8 bytes at byte `offset` of a range. `offset + data.len()` may pass the end of the range; every
    /// byte must be filled.
    fn memory_read(&self, slot: BarSlot, offset: u64, data: &mut [u8]);

    /// Writes 1 to 8 bytes at byte `offset` of a range. `offset + data.len()` may pass the end of the range.
    fn memory_write(&self, slot: BarSlot, offset: u64, data: &[u8]) -> Effect;

    /// The doorbells that should exist now, whether or not their range is decoded.
    fn doorbells(&self) -> Vec<FunctionDoorbell>;

    /// Conventional reset, as after power-on: from a secondary bus reset. Requests in flight may complete later, but
    /// without a trace in registers or interrupts.
    fn reset(&self);
}

/// The functions behind a port. Looked up on every configuration access, so functions may come and go with the
/// registers of others, as VFs do with the SR-IOV capability of their PF.
pub trait Children: Send + Sync {
    /// The function at `devfn`, if there is one now.
    fn at(&self, devfn: DevFn) -> Option<Arc<dyn ConfigTarget>>;

    /// The functions that have BARs (VF BARs included) of their own, ascending. VFs are not among them.
    fn functions(&self) -> Vec<Arc<dyn PciFunction>>;

    /// Every function that can be behind the port, ascending, whether or not it exists now.
    fn seats(&self) -> Vec<(DevFn, Arc<dyn ConfigTarget>)>;

    /// How many of [`Self::seats`] exist, from the first on, if `first` is the saved configuration space of the first.
    /// At most as many as there are seats.
    fn existing(&self, first: &[u8]) -> usize;
}

/// A single endpoint at device 0, function 0.
pub struct SingleFunction(pub Arc<dyn PciFunction>);

impl Children for SingleFunction {
    fn at(&self, devfn: DevFn) -> Option<Arc<dyn ConfigTarget>> {
        (devfn == DevFn(0)).then(|| Arc::clone(&self.0) as _)
    }

    fn functions(&self) -> Vec<Arc<dyn PciFunction>> {
        vec![Arc::clone(&self.0)]
    }

    fn seats(&self) -> Vec<(DevFn, Arc<dyn ConfigTarget>)> {
        vec![(DevFn(0), Arc::clone(&self.0) as _)]
    }

    fn existing(&self, _first: &[u8]) -> usize {
        1
    }
}
