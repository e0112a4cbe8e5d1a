//! The state of a machine but for its memory, taken from one and put into another: by a snapshot, or by a migration.

use super::devices::{self as bus, SaveError};
use super::format::function::Function;
use super::format::owner::Owner;
use super::format::pci::Pci;
use super::format::serial::Serial;
use super::restore::StateFault;
use crate::kvm::state::{self, ClockChoice, StateError};
use crate::machine::{Arrival, Machine};

/// State of all devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Devices {
    /// Registers of everything on the PCI bus.
    pub pci: Pci,
    /// Virtio functions that exist.
    pub functions: Vec<Function>,
    /// SR-IOV owners.
    pub owners: Vec<Owner>,
    /// COM1.
    pub serial: Serial,
}

impl Devices {
    /// Of `machine`, which is at rest.
    pub fn of(machine: &Machine) -> Result<Self, SaveError> {
        let functions = bus::save_functions(machine.functions())?;
        let owners = bus::save_owners(machine.functions());
        let pci = bus::save_pci(machine.pci());
        let (serial, waiting) = machine.save_serial();
        Ok(Self {
            pci,
            functions,
            owners,
            serial: Serial::of(&serial, &waiting),
        })
    }
}

/// State of vCPUs, interrupt controllers and clock of `machine`, which is at rest. KVM writes to guest memory meanwhile.
pub fn cpus(machine: &Machine) -> Result<state::State, StateError> {
    let vm = machine.vm().fd();
    state::save(vm, machine.control(), machine.model(), machine.msrs())
}

/// Puts a state into `machine`, which was not started. Its memory is there already. After an error it is in no state to be
/// used.
pub fn put(
    machine: &Machine,
    devices: &Devices,
    cpu: &state::State,
    arrival: Arrival,
    clock: ClockChoice,
) -> Result<(), StateFault> {
    machine.put(arrival, |vcpus| {
        bus::restore(
            machine.pci(),
            machine.functions(),
            &devices.pci,
            &devices.functions,
            &devices.owners,
        )?;
        let (serial, waiting) = devices.serial.plain()?;
        machine.put_serial(&serial, waiting)?;
        if arrival == Arrival::Restored {
            machine.renew_generation()?;
        }
        let vm = machine.vm().fd();
        Ok(state::restore(vm, vcpus, machine.model(), cpu, clock)?)
    })
}
