//! Buses, memory and interrupts put together: the machine in this process.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use devices::bus::{Bus, BusError, Effect};
use devices::memory::MemoryError;
use devices::virtio::{Offer, VirtioDevice, VirtioFunction};
use pci::function::{PciFunction, SingleFunction};
use pci::root::{AddError, AssignError, Doorbell, PciRoot};
use pci::topology::{Bdf, CONFIG_SPACE_SIZE, DevFn, LayoutError, PciLayout};
use pci::virtio::{Options, VirtioPci, VirtioPciError};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{HostDma, MockMsi, Pump};
use crate::access::{Function, FunctionExt};
use crate::pci::{Address, header};

/// Bytes of RAM, from address 0 on.
pub const RAM: usize = 16 << 20;
/// Configuration space of 16 buses.
pub const ECAM: Range<u64> = 0xe000_0000..0xe100_0000;
/// Window for 32-bit BARs.
pub const MMIO32: Range<u64> = 0xc000_0000..0xd000_0000;
/// Window for 64-bit BARs.
pub const MMIO64: Range<u64> = 0x10_0000_0000..0x11_0000_0000;

/// Why the machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// An address range.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A function's events.
    #[error("cannot create events")]
    Events(#[from] std::io::Error),
    /// The transport.
    #[error(transparent)]
    Transport(#[from] VirtioPciError),
    /// A place on the root bus.
    #[error(transparent)]
    Add(#[from] AddError),
    /// Addresses for everything.
    #[error(transparent)]
    Assign(#[from] AssignError),
}

/// Where a function is plugged in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the root bus.
    RootBus,
    /// Behind a root port of its own.
    BehindPort,
}

/// How a notification gets to its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notifications {
    /// As a write to the register.
    Register,
    /// As a signal of the doorbell at that address, if one is registered; the function never sees the write.
    Doorbell,
}

struct Inner {
    bus: Bus,
    root: Arc<PciRoot>,
    dma: HostDma,
    msi: MockMsi,
    pumps: Mutex<Vec<Pump>>,
    /// As the machine last registered them; brought up to date when a write or a function says that the layout changed,
    /// and then only.
    doorbells: Mutex<Vec<Doorbell>>,
    /// Signalled when the layout changed without a write.
    revived: Arc<EventFd>,
    notifications: Mutex<Notifications>,
}

/// The machine. Clones are the same machine.
#[derive(Clone)]
pub struct Machine(Arc<Inner>);

impl Machine {
    /// A machine with an empty root bus.
    pub fn new() -> Result<Self, HostError> {
        Self::with_memory(HostDma::new(0, RAM)?)
    }

    /// The same, whose memory is `dma`, perhaps that of another machine which is no more.
    pub fn with_memory(dma: HostDma) -> Result<Self, HostError> {
        let root = PciRoot::new(PciLayout {
            ecam: ECAM,
            mmio32: MMIO32,
            mmio64: MMIO64,
        })?;
        let bus = Bus::new();
        bus.insert(ECAM, root.ecam())?;
        for (range, window) in root.mmio_windows() {
            bus.insert(range, window)?;
        }
        Ok(Self(Arc::new(Inner {
            bus,
            root,
            dma,
            msi: MockMsi::default(),
            pumps: Mutex::default(),
            doorbells: Mutex::default(),
            revived: Arc::new(EventFd::new(EFD_NONBLOCK)?),
            notifications: Mutex::new(Notifications::Register),
        })))
    }

    /// Plugs a device in. [`Self::power_on`] gives it its addresses; the result is where it will be by then.
    pub fn add(
        &self,
        name: &str,
        device: Box<dyn VirtioDevice>,
        place: Place,
    ) -> Result<Plugged, HostError> {
        self.add_offering(name, device, place, Offer::default())
    }

    /// Plugs a device in that offers its driver more.
    pub fn add_offering(
        &self,
        name: &str,
        device: Box<dyn VirtioDevice>,
        place: Place,
        offer: impl Into<Offer>,
    ) -> Result<Plugged, HostError> {
        let view = self.0.dma.ram().view()?;
        let function = VirtioFunction::offering(name, device, view, offer)?;
        let options = match place {
            Place::RootBus => Options::ROOT_BUS,
            Place::BehindPort => Options::BEHIND_PORT,
        };
        let pci = VirtioPci::new(Arc::clone(&function), &self.0.msi, options)?;
        let pci: Arc<dyn PciFunction> = pci;
        let place = match place {
            Place::RootBus => self.0.root.add_endpoint(pci)?,
            Place::BehindPort => self.0.root.add_root_port(Arc::new(SingleFunction(pci)))?,
        };
        self.serve(&function)?;
        Ok(Plugged {
            function,
            place,
            behind_port: options == Options::BEHIND_PORT,
        })
    }

    /// Lets `function`, which was plugged into [`Self::root`] by other means, work whenever the machine does.
    pub fn serve(&self, function: &Arc<VirtioFunction>) -> Result<(), HostError> {
        function.set_revived(Arc::clone(&self.0.revived));
        lock(&self.0.pumps).push(Pump::new(Arc::clone(function))?);
        Ok(())
    }

    /// Plays firmware: bus numbers, bridge windows, BARs.
    pub fn power_on(&self) -> Result<(), HostError> {
        Ok(self.0.root.assign_resources()?)
    }

    /// Where a device is, after [`Self::power_on`].
    pub fn locate(&self, plugged: &Plugged) -> Address {
        let (bus, devfn) = match self.0.root.secondary_bus(plugged.place) {
            Some(bus) if plugged.behind_port => (bus, DevFn(0)),
            _ => (plugged.place.bus, plugged.place.devfn),
        };
        Address {
            bus: bus.0,
            devfn: devfn.0,
        }
    }

    /// The function at `address`, whether there is one or not.
    pub fn function(&self, address: Address) -> HostFunction {
        HostFunction {
            machine: self.clone(),
            address,
        }
    }

    /// The memory.
    pub fn dma(&self) -> &HostDma {
        &self.0.dma
    }

    /// The interrupts.
    pub fn msi(&self) -> &MockMsi {
        &self.0.msi
    }

    /// The root complex.
    pub fn root(&self) -> &Arc<PciRoot> {
        &self.0.root
    }

    /// Chooses how notifications travel from now on.
    pub fn set_notifications(&self, how: Notifications) {
        *lock(&self.0.notifications) = how;
    }

    /// The doorbells as the machine has them registered.
    pub fn registered_doorbells(&self) -> Vec<Doorbell> {
        lock(&self.0.doorbells).clone()
    }

    /// Reads guest physical memory space, as a vCPU does when there is no RAM.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        self.0.bus.read(address, data);
    }

    /// Writes guest physical memory space, as a vCPU does when there is no RAM.
    pub fn write(&self, address: u64, data: &[u8]) {
        if *lock(&self.0.notifications) == Notifications::Doorbell {
            let value = data
                .get(..2)
                .map(|low| u16::from(low[0]) | u16::from(low[1]) << 8);
            let doorbells = lock(&self.0.doorbells);
            let rung = doorbells
                .iter()
                .find(|d| d.address == address && (d.datamatch.is_none() || d.datamatch == value));
            if let Some(doorbell) = rung {
                // Refused only if the counter is full, and then it is signalled already.
                let _ = doorbell.event.write(1);
                return;
            }
        }
        if self.0.bus.write(address, data) == Effect::LayoutChanged {
            *lock(&self.0.doorbells) = self.0.root.doorbells();
        }
    }

    /// Lets every function work once; true if any had something to do.
    pub fn pump(&self) -> bool {
        let pumps = lock(&self.0.pumps);
        let worked = pumps.iter().filter(|pump| pump.turn()).count() > 0;
        if self.0.revived.read().is_ok() {
            *lock(&self.0.doorbells) = self.0.root.doorbells();
        }
        worked
    }

    /// Lets every function work until all are idle, 4096 rounds at most; true if all are.
    pub fn settle(&self) -> bool {
        (0..4096).any(|_| !self.pump())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device that was plugged in.
#[derive(Clone)]
pub struct Plugged {
    /// Its function, for looking behind the registers.
    pub function: Arc<VirtioFunction>,
    place: Bdf,
    behind_port: bool,
}

impl Plugged {
    /// A function that was plugged into the root bus of [`Machine::root`] by other means, at `place`.
    pub fn new(function: Arc<VirtioFunction>, place: Bdf) -> Self {
        Self {
            function,
            place,
            behind_port: false,
        }
    }
}

/// A function of the machine, as its driver reaches it.
#[derive(Clone)]
pub struct HostFunction {
    machine: Machine,
    address: Address,
}

impl HostFunction {
    /// The machine it is part of.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Where it is.
    pub fn address(&self) -> Address {
        self.address
    }

    /// Guest physical address of byte `offset` of BAR `bar`, from the registers as they are now.
    pub fn bar_address(&self, bar: u8, offset: u64) -> u64 {
        let register = header::BAR0 + 4 * u16::from(bar);
        let low: u32 = self.config(register);
        let high: u32 = match low >> 1 & 3 {
            2 => self.config(register + 4),
            _ => 0,
        };
        (u64::from(high) << 32 | u64::from(low & !0xf)).wrapping_add(offset)
    }

    fn config_address(&self, offset: u16) -> u64 {
        let rid = u64::from(self.address.bus) << 8 | u64::from(self.address.devfn);
        ECAM.start + rid * CONFIG_SPACE_SIZE + u64::from(offset)
    }
}

impl Function for HostFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.machine.read(self.config_address(offset), data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.machine.write(self.config_address(offset), data);
    }

    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.machine.read(self.bar_address(bar, offset), data);
    }

    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) {
        self.machine.write(self.bar_address(bar, offset), data);
    }

    fn relax(&self) {
        if !self.machine.pump() {
            // Something works on a thread of its own.
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}
