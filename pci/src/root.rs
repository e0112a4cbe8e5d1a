//! The root complex: the root bus with its host bridge, endpoints and ports, and the ways guest accesses take in.
//!
//! ```text
//! ECAM store ──► PciRoot (bus, device, function) ──► port? ──► ConfigTarget ──► Effect ──► decode table rebuilt
//! BAR access ──► window ──► decode table (no lock) ──► PciFunction
//! ```
//!
//! Nothing here is a copy of what registers say, except the decode table, which is rebuilt from them whenever a write
//! returns [`Effect::LayoutChanged`].

mod assign;
mod saved;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use devices::bus::{BusDevice, Effect};
use vmm_sys_util::eventfd::EventFd;

pub use assign::AssignError;

use crate::cap::pcie::PortType;
use crate::config::ConfigError;
use crate::decode::DecodeTable;
use crate::function::{Children, ConfigTarget, PciFunction};
use crate::host_bridge::HostBridge;
use crate::root_port::RootPort;
use crate::topology::{
    Bdf, BusNumber, CONFIG_SPACE_SIZE, DevFn, DeviceNumber, FunctionNumber, LayoutError, PciLayout,
    Rid,
};

/// The bus the host bridge is on.
const ROOT_BUS: BusNumber = BusNumber(0);

/// A guest address whose write only signals an event: a candidate for an ioeventfd.
#[derive(Clone, Debug)]
pub struct Doorbell {
    /// Guest physical address.
    pub address: u64,
    /// The 16-bit value that must be written; `None` for any write of any length.
    pub datamatch: Option<u16>,
    /// What the write signals.
    pub event: Arc<EventFd>,
}

/// Why a function cannot be plugged in. A mistake of the configuration, not of a guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// All 255 places on the root bus are taken.
    #[error("the PCI root bus is full; use fewer devices")]
    Full,
    /// An endpoint that says it is behind a port was put on the root bus, or the other way round.
    #[error("PCI function {0} is of a type that does not belong on this bus")]
    WrongBus(String),
    /// A port cannot be laid out.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

#[derive(Clone)]
enum Occupant {
    HostBridge(Arc<HostBridge>),
    Endpoint(Arc<dyn PciFunction>),
    Port(Arc<RootPort>),
}

impl Occupant {
    fn config(&self) -> Arc<dyn ConfigTarget> {
        match self {
            Self::HostBridge(bridge) => Arc::clone(bridge) as _,
            Self::Endpoint(function) => Arc::clone(function) as _,
            Self::Port(port) => Arc::clone(port) as _,
        }
    }
}

/// See the [module documentation](self).
pub struct PciRoot {
    layout: PciLayout,
    bus: Mutex<BTreeMap<DevFn, Occupant>>,
    decode: ArcSwap<DecodeTable>,
    /// Serialises rebuilds, so that the last one to finish has seen every register write before it.
    rebuild: Mutex<()>,
}

impl PciRoot {
    /// A root complex with only its host bridge.
    pub fn new(layout: PciLayout) -> Result<Arc<Self>, LayoutError> {
        layout.validate()?;
        let bridge = Occupant::HostBridge(Arc::new(HostBridge::new()));
        Ok(Arc::new(Self {
            layout,
            bus: Mutex::new(BTreeMap::from([(DevFn(0), bridge)])),
            decode: ArcSwap::default(),
            rebuild: Mutex::new(()),
        }))
    }

    /// The address ranges this root complex was made for.
    pub fn layout(&self) -> &PciLayout {
        &self.layout
    }

    /// Plugs an endpoint of type [`PortType::RootComplexIntegratedEndpoint`] into the root bus.
    ///
    /// Each gets a device of its own as long as there are any; then further functions of those devices are used.
    pub fn add_endpoint(&self, function: Arc<dyn PciFunction>) -> Result<Bdf, AddError> {
        if function.port_type() != PortType::RootComplexIntegratedEndpoint {
            return Err(AddError::WrongBus(function.name().to_string()));
        }
        self.plug(|_| Ok(Occupant::Endpoint(Arc::clone(&function))))
    }

    /// Plugs a root port with `children` behind it, all of type [`PortType::Endpoint`], into the root bus. Returns
    /// the place of the port; the bus behind it gets its number in [`Self::assign_resources`].
    pub fn add_root_port(&self, children: Arc<dyn Children>) -> Result<Bdf, AddError> {
        for function in children.functions() {
            if function.port_type() != PortType::Endpoint {
                return Err(AddError::WrongBus(function.name().to_string()));
            }
        }
        self.plug(|devfn| {
            let port = RootPort::new(devfn.0, Arc::clone(&children))?;
            Ok(Occupant::Port(Arc::new(port)))
        })
    }

    fn plug(
        &self,
        occupant: impl FnOnce(DevFn) -> Result<Occupant, AddError>,
    ) -> Result<Bdf, AddError> {
        let mut bus = self.bus();
        let devfn = FunctionNumber::all()
            .flat_map(|function| DeviceNumber::all().map(move |d| DevFn::new(d, function)))
            .find(|devfn| !bus.contains_key(devfn))
            .ok_or(AddError::Full)?;
        let occupant = occupant(devfn)?;
        if devfn.function() != FunctionNumber::default() {
            let first = DevFn::new(devfn.device(), FunctionNumber::default());
            if let Some(first) = bus.get(&first) {
                first.config().set_multi_function();
            }
        }
        bus.insert(devfn, occupant);
        Ok(Bdf::new(ROOT_BUS, devfn))
    }

    /// The bus behind the root port at `port`, if there is such a port and it was numbered.
    pub fn secondary_bus(&self, port: Bdf) -> Option<BusNumber> {
        match self.bus().get(&port.devfn) {
            Some(Occupant::Port(found)) if port.bus == ROOT_BUS => found.secondary_bus(),
            _ => None,
        }
    }

    /// The device to map at [`PciLayout::ecam`].
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Ecam(Arc::clone(self)))
    }

    /// The devices to map at [`PciLayout::mmio32`] and [`PciLayout::mmio64`]. Empty ranges are left out.
    pub fn mmio_windows(self: &Arc<Self>) -> Vec<(Range<u64>, Arc<dyn BusDevice>)> {
        self.windows()
            .into_iter()
            .filter(|range| !range.is_empty())
            .map(|range| {
                let window = Window {
                    root: Arc::clone(self),
                    base: range.start,
                };
                (range, Arc::new(window) as _)
            })
            .collect()
    }

    /// The doorbells that should exist now: those of live functions, at addresses that reach them.
    ///
    /// To be compared with the previous answer whenever a write returned [`Effect::LayoutChanged`]: ask and compare
    /// under one lock, so that of two vCPUs the one that comes last sees the later answer. A function whose reset
    /// waits for requests in flight keeps its doorbells until the next change; its gate is closed meanwhile.
    pub fn doorbells(&self) -> Vec<Doorbell> {
        let table = self.decode.load();
        let mut doorbells = Vec::new();
        for entry in table.entries() {
            let own = entry.function.doorbells().into_iter();
            doorbells.extend(own.filter(|d| d.slot == entry.slot).filter_map(|doorbell| {
                let address = entry.base.checked_add(doorbell.offset)?;
                entry.range.contains(&address).then_some(Doorbell {
                    address,
                    datamatch: doorbell.datamatch,
                    event: doorbell.event,
                })
            }));
        }
        doorbells
    }

    /// The function that answers to configuration accesses at `bdf` now.
    pub fn function_at(&self, bdf: Bdf) -> Option<Arc<dyn ConfigTarget>> {
        if bdf.bus == ROOT_BUS {
            return self.bus().get(&bdf.devfn).map(Occupant::config);
        }
        let port = self.ports().into_iter().find(|p| p.forwards_bus(bdf.bus))?;
        port.child(bdf.bus, bdf.devfn)
    }

    /// Builds the decode table anew from the registers of every function.
    fn refresh(&self) {
        let _rebuild = self.rebuild.lock().unwrap_or_else(PoisonError::into_inner);
        let occupants: Vec<_> = self.bus().values().cloned().collect();
        let mut table = DecodeTable::default();
        for occupant in &occupants {
            match occupant {
                Occupant::HostBridge(_) => {}
                Occupant::Endpoint(function) => self.claim(&mut table, None, function),
                Occupant::Port(port) => {
                    let Some(windows) = port.windows() else {
                        continue;
                    };
                    for function in port.children().functions() {
                        self.claim(&mut table, Some(&windows.memory), &function);
                        self.claim(&mut table, Some(&windows.prefetchable), &function);
                    }
                }
            }
        }
        self.decode.store(Arc::new(table));
    }

    fn claim(
        &self,
        table: &mut DecodeTable,
        bridge: Option<&Range<u64>>,
        function: &Arc<dyn PciFunction>,
    ) {
        for decoded in function.decoded() {
            for host in self.windows() {
                let window = match bridge {
                    Some(bridge) => host.start.max(bridge.start)..host.end.min(bridge.end),
                    None => host,
                };
                table.claim(&window, decoded.slot, &decoded.range, function);
            }
        }
    }

    fn windows(&self) -> [Range<u64>; 2] {
        [self.layout.mmio32.clone(), self.layout.mmio64.clone()]
    }

    fn ports(&self) -> Vec<Arc<RootPort>> {
        let port = |occupant: &Occupant| match occupant {
            Occupant::Port(port) => Some(Arc::clone(port)),
            _ => None,
        };
        self.bus().values().filter_map(port).collect()
    }

    fn bus(&self) -> MutexGuard<'_, BTreeMap<DevFn, Occupant>> {
        self.bus.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Configuration space of every bus, as memory (PCIe Base, 7.2.2): bus number in address bits 27:20, device and
/// function in 19:12, register in 11:0.
struct Ecam(Arc<PciRoot>);

impl Ecam {
    /// The place and register of byte `offset`; `None` past the last bus.
    fn locate(&self, offset: u64) -> Option<(Bdf, u16)> {
        let layout = &self.0.layout;
        if offset >= layout.ecam.end - layout.ecam.start {
            return None;
        }
        let rid = u16::try_from(offset / CONFIG_SPACE_SIZE).ok()?;
        Some((Rid(rid).into(), (offset % CONFIG_SPACE_SIZE) as u16))
    }
}

/// Lengths of the parts of an access of `len` bytes at `offset` that lie within one aligned dword each.
fn dwords(offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset.checked_add(done as u64)?;
        let part = (4 - (at % 4) as usize).min(len - done);
        let range = done..done + part;
        done += part;
        (part != 0).then_some((at, range))
    })
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        for (at, range) in dwords(offset, data.len()) {
            let target = self
                .locate(at)
                .and_then(|(bdf, register)| Some((self.0.function_at(bdf)?, register)));
            if let (Some((function, register)), Some(part)) = (target, data.get_mut(range)) {
                function.config_read(register, part);
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        let mut effect = Effect::None;
        for (at, range) in dwords(offset, data.len()) {
            let target = self
                .locate(at)
                .and_then(|(bdf, register)| Some((self.0.function_at(bdf)?, register)));
            if let (Some((function, register)), Some(part)) = (target, data.get(range)) {
                effect = effect.and(function.config_write(register, part));
            }
        }
        if effect == Effect::LayoutChanged {
            self.0.refresh();
        }
        effect
    }
}

/// One of the two memory windows.
struct Window {
    root: Arc<PciRoot>,
    base: u64,
}

impl BusDevice for Window {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let table = self.root.decode.load();
        match table.resolve(self.base.saturating_add(offset)) {
            Some((entry, offset)) => entry.function.memory_read(entry.slot, offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        let table = self.root.decode.load();
        match table.resolve(self.base.saturating_add(offset)) {
            Some((entry, offset)) => entry.function.memory_write(entry.slot, offset, data),
            None => Effect::None,
        }
    }
}

#[cfg(test)]
mod tests;
