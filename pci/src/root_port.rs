//! A PCI Express root port: a bridge from the root bus to a bus of its own (PCIe Base, 7.5.1.3).
//!
//! What is behind it can be reached only as far as the guest's registers say: configuration space by the bus numbers
//! and ARI forwarding, memory by the two windows and Memory Space Enable. Bus Master Enable of the port itself gates
//! nothing; each function has its own.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::bus::Effect;

use crate::cap::pcie::{self, PortType};
use crate::config::{Block, ConfigBuilder, ConfigError, ConfigSpace, Register};
use crate::function::{Children, ConfigTarget};
use crate::header::{self, Command, Identity};
use crate::state::{Registers, RegistersError};
use crate::topology::{BusNumber, DevFn, DeviceNumber, WINDOW_ALIGN};

/// The identity of a generic PCI Express root port (Red Hat's, which no guest has quirks for).
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x000c,
    revision: 0,
    class: 0x06_04_00,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// Registers of the type 1 header, by byte offset.
mod at {
    pub const PRIMARY: u16 = 0x18;
    pub const SECONDARY: u16 = 0x19;
    pub const SUBORDINATE: u16 = 0x1a;
    pub const SECONDARY_STATUS: u16 = 0x1e;
    /// Address bits 31:20 in bits 15:4; so does the limit, inclusive.
    pub const MEMORY_BASE: u16 = 0x20;
    pub const MEMORY_LIMIT: u16 = 0x22;
    /// The same, with bits 63:32 in the upper registers.
    pub const PREFETCH_BASE: u16 = 0x24;
    pub const PREFETCH_LIMIT: u16 = 0x26;
    pub const PREFETCH_BASE_UPPER: u16 = 0x28;
    pub const PREFETCH_LIMIT_UPPER: u16 = 0x2c;
    pub const BRIDGE_CONTROL: u16 = 0x3e;
}

/// Writable bits of the 16-bit window registers.
const WINDOW_BITS: u32 = 0xfff0;
/// Low bits of the prefetchable window registers: 64-bit addressing.
const PREFETCH_64: u32 = 1;
/// Secondary Status bits that report errors.
const STATUS_ERRORS: u32 = 0xf900;
/// Bridge Control: parity (0), SERR# (1), secondary bus reset (6).
const BRIDGE_CONTROL_RW: u32 = 0x0043;
const SECONDARY_BUS_RESET: u16 = 1 << 6;

/// The memory a port forwards to its bus. Ends are exclusive; an empty range forwards nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// The 32-bit window.
    pub memory: Range<u64>,
    /// The 64-bit prefetchable window.
    pub prefetchable: Range<u64>,
}

/// See the [module documentation](self).
pub struct RootPort {
    config: Mutex<ConfigSpace>,
    pcie: u16,
    children: Arc<dyn Children>,
}

/// What of a port's registers decides which memory reaches its bus.
#[derive(PartialEq, Eq)]
struct Forwarding {
    windows: Option<Windows>,
    in_reset: bool,
}

impl RootPort {
    /// A port with these functions behind it. `number` is unique among the ports.
    pub fn new(number: u8, children: Arc<dyn Children>) -> Result<Self, ConfigError> {
        let mut registers = header::common(&IDENTITY, 1);
        registers.extend([
            Register::byte(at::PRIMARY).writable(0xff),
            Register::byte(at::SECONDARY).writable(0xff),
            Register::byte(at::SUBORDINATE).writable(0xff),
            Register::word(at::SECONDARY_STATUS).clear_by_one(STATUS_ERRORS),
            Register::word(at::MEMORY_BASE).writable(WINDOW_BITS),
            Register::word(at::MEMORY_LIMIT).writable(WINDOW_BITS),
            Register::word(at::PREFETCH_BASE)
                .reset(PREFETCH_64)
                .writable(WINDOW_BITS),
            Register::word(at::PREFETCH_LIMIT)
                .reset(PREFETCH_64)
                .writable(WINDOW_BITS),
            Register::dword(at::PREFETCH_BASE_UPPER).writable(u32::MAX),
            Register::dword(at::PREFETCH_LIMIT_UPPER).writable(u32::MAX),
            Register::word(at::BRIDGE_CONTROL).writable(BRIDGE_CONTROL_RW),
        ]);
        let mut builder = ConfigBuilder::new(&Block { len: 64, registers });
        let port_type = PortType::RootPort { port: number };
        let pcie = builder.capability(pcie::ID, &pcie::block(port_type))?;
        Ok(Self {
            config: Mutex::new(builder.build()),
            pcie,
            children,
        })
    }

    /// The functions behind the port.
    pub fn children(&self) -> &Arc<dyn Children> {
        &self.children
    }

    /// The bus behind the port, or `None` while the guest has not numbered it.
    pub fn secondary_bus(&self) -> Option<BusNumber> {
        match self.lock().byte(at::SECONDARY) {
            0 => None,
            number => Some(BusNumber(number)),
        }
    }

    /// True if configuration accesses to `bus` go through this port.
    pub fn forwards_bus(&self, bus: BusNumber) -> bool {
        let config = self.lock();
        let (first, last) = (config.byte(at::SECONDARY), config.byte(at::SUBORDINATE));
        first != 0 && (first..=last).contains(&bus.0)
    }

    /// The function that answers at `devfn` of `bus`. Without ARI forwarding only device 0 can be addressed, and
    /// there are no buses below the secondary one.
    pub fn child(&self, bus: BusNumber, devfn: DevFn) -> Option<Arc<dyn ConfigTarget>> {
        let reachable = {
            let config = self.lock();
            let device_0 = devfn.device() == DeviceNumber::default();
            bus != BusNumber(0)
                && config.byte(at::SECONDARY) == bus.0
                && !in_reset(&config)
                && (device_0 || pcie::ari_forwarding(&config, self.pcie))
        };
        reachable.then(|| self.children.at(devfn)).flatten()
    }

    /// The memory that is forwarded now; `None` while decoding is disabled or the bus is in reset.
    pub fn windows(&self) -> Option<Windows> {
        let forwarding = forwarding(&self.lock());
        forwarding.windows.filter(|_| !forwarding.in_reset)
    }

    /// Firmware numbers the bus behind the port, opens its windows (1 MiB-aligned; empty ones are closed), and
    /// enables forwarding.
    pub fn assign(&self, secondary: BusNumber, windows: &Windows) {
        let mut config = self.lock();
        config.set_byte(at::PRIMARY, 0);
        config.set_byte(at::SECONDARY, secondary.0);
        config.set_byte(at::SUBORDINATE, secondary.0);
        let (base, limit) = inclusive(&windows.memory);
        config.set_word(at::MEMORY_BASE, address_bits(base));
        config.set_word(at::MEMORY_LIMIT, address_bits(limit));
        let (base, limit) = inclusive(&windows.prefetchable);
        let flag = PREFETCH_64 as u16;
        config.set_word(at::PREFETCH_BASE, address_bits(base) | flag);
        config.set_word(at::PREFETCH_LIMIT, address_bits(limit) | flag);
        config.set_dword(at::PREFETCH_BASE_UPPER, (base >> 32) as u32);
        config.set_dword(at::PREFETCH_LIMIT_UPPER, (limit >> 32) as u32);
        let command = Command::of(&config) | Command::MEMORY | Command::BUS_MASTER;
        config.set_word(header::COMMAND, command.bits());
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConfigTarget for RootPort {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Effect {
        let (before, after) = {
            let mut config = self.lock();
            let before = forwarding(&config);
            config.write(offset, data);
            (before, forwarding(&config))
        };
        if after.in_reset && !before.in_reset {
            for function in self.children.functions() {
                function.reset();
            }
        }
        if before == after {
            Effect::None
        } else {
            Effect::LayoutChanged
        }
    }

    fn set_multi_function(&self) {
        header::set_multi_function(&mut self.lock());
    }

    fn name(&self) -> &str {
        "root port"
    }

    fn save(&self) -> Registers {
        Registers::plain(&self.lock())
    }

    fn check(&self, saved: &Registers) -> Result<(), RegistersError> {
        saved.without_msix(&self.lock()).map(drop)
    }

    /// A secondary bus reset that is under way is not carried out again: what is behind the port has state of its own.
    fn restore(&self, saved: &Registers) -> Result<(), RegistersError> {
        let mut config = self.lock();
        *config = saved.without_msix(&config)?;
        Ok(())
    }
}

fn in_reset(config: &ConfigSpace) -> bool {
    config.word(at::BRIDGE_CONTROL) & SECONDARY_BUS_RESET != 0
}

fn forwarding(config: &ConfigSpace) -> Forwarding {
    let window = |base: u16, limit: u16, upper: Option<(u16, u16)>| {
        let low = |at: u16| u64::from(config.word(at) & WINDOW_BITS as u16) << 16;
        let high = |at: u16| u64::from(config.dword(at)) << 32;
        let (base_high, limit_high) = upper.map_or((0, 0), |(b, l)| (high(b), high(l)));
        let start = base_high | low(base);
        let last = limit_high | low(limit) | (WINDOW_ALIGN - 1);
        if start <= last {
            start..last.saturating_add(1)
        } else {
            0..0
        }
    };
    let windows = Windows {
        memory: window(at::MEMORY_BASE, at::MEMORY_LIMIT, None),
        prefetchable: window(
            at::PREFETCH_BASE,
            at::PREFETCH_LIMIT,
            Some((at::PREFETCH_BASE_UPPER, at::PREFETCH_LIMIT_UPPER)),
        ),
    };
    Forwarding {
        windows: Command::of(config)
            .contains(Command::MEMORY)
            .then_some(windows),
        in_reset: in_reset(config),
    }
}

/// Base and inclusive limit of a window; a base above the limit closes it.
fn inclusive(window: &Range<u64>) -> (u64, u64) {
    if window.is_empty() {
        (0xfff0_0000, 0)
    } else {
        (window.start, window.end - 1)
    }
}

/// Bits 31:20 of an address, in the place the 16-bit window registers have them.
fn address_bits(address: u64) -> u16 {
    (address >> 16) as u16 & WINDOW_BITS as u16
}

#[cfg(test)]
mod tests;
