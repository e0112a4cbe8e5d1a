//! One machine: everything wired together.
//!
//! | module | what it does |
//! |---|---|
//! | [`functions`] | the virtio functions a configuration asks for |
//! | [`owner`] | SR-IOV owners and their members |
//! | [`run`] | the main loop: console, signals, the end of the guest |
//!
//! Pause: vCPUs out of the guest, then the gates of the devices closed and drained. Resume: the reverse.

pub mod functions;
pub mod owner;
pub mod run;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::bus::{Bus, BusError};
use devices::gate::Reasons;
use devices::memory::{GuestRam, MemoryError};
use kvm_ioctls::Cap;
use pci::root::{AssignError, PciRoot};
use pci::topology::{LayoutError, PciLayout};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::acpi::{self, AcpiError};
use crate::boot::load::{LoadError, Prepared};
use crate::boot::long_mode;
use crate::chipset;
use crate::config;
use crate::config::check::HostError;
use crate::console::output::Output;
use crate::exit::Outcome;
use crate::kvm::{self, KvmError, Vm, cpu, cpuid, doorbells::Doorbells, msi::KvmMsi, speed};
use crate::layout;
use crate::serial::SerialPort;
use crate::vcpu::{self, Control, ControlError, RunState, Wiring, kick};
use functions::{Backends, FunctionError, Functions};

/// How long a pause waits for what devices have in flight, all of them together.
pub const DRAIN: Duration = Duration::from_secs(10);

/// How long a pause waits for vCPUs to leave the guest.
const LEAVE: Duration = Duration::from_secs(5);

/// Why a machine could not be built. Exit status 1.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initial RAM disk or command line.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Something the host does not have or allow.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A virtio function.
    #[error(transparent)]
    Function(#[from] FunctionError),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The address map contradicts itself.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The PCI address map contradicts itself.
    #[error(transparent)]
    Pci(#[from] LayoutError),
    /// The PCI functions do not fit into it.
    #[error(transparent)]
    Assign(#[from] AssignError),
    /// Guest memory could not be written.
    #[error("cannot write to guest memory: {0}")]
    Write(#[from] vm_memory::GuestMemoryError),
    /// A thread, event or alarm.
    #[error("the host refused a thread or an event")]
    Resource(#[from] std::io::Error),
}

/// Why a machine could not be paused or resumed.
#[derive(Debug, thiserror::Error)]
pub enum TransitionError {
    /// The guest has ended, or a vCPU does not leave it.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// Devices did not finish what they had begun.
    #[error("requests are still in flight in {0}; the guest goes on running")]
    Busy(String),
}

/// A machine. See the [module documentation](self).
pub struct Machine {
    config: config::Machine,
    control: Arc<Control>,
    serial: Arc<SerialPort>,
    power_button: EventFd,
    pci: Arc<PciRoot>,
    functions: Functions,
    /// Registers the doorbells that should exist, and removes those that should not.
    layout_changed: Arc<dyn Fn() + Send + Sync>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Held during a transition between running and paused.
    transition: Mutex<()>,
    // Dropped last: vCPUs and devices use them.
    _vm: Vm,
}

impl Machine {
    /// Builds a machine around devices that are open already, paused at the kernel's entry.
    ///
    /// `output` takes the serial console's output. `force` accepts a KVM that only interprets.
    pub fn build(
        config: config::Machine,
        backends: Backends,
        output: Option<&Output>,
        force: bool,
    ) -> Result<Arc<Self>, BuildError> {
        kick::install()?;
        let boot = Prepared::open(config.memory, &config.boot)?;
        let kvm = kvm::open()?;
        let supported = cpu::supported_cpuid(&kvm)?;
        check_limits(
            &config,
            kvm.get_max_vcpus(),
            cpuid::physical_address_bits(&supported),
        )?;

        let ram = GuestRam::new(&layout::ram_ranges(config.memory))?;
        let memory = ram.view()?;
        let vm = Vm::new(kvm, &ram)?;
        let mut vcpus = Vec::with_capacity(usize::from(config.cpus));
        for id in 0..config.cpus {
            vcpus.push(vm.create_vcpu(id)?);
        }
        for (id, vcpu) in (0..config.cpus).zip(&vcpus) {
            cpu::configure(vm.kvm(), vcpu, &supported, id, config.cpus)?;
        }
        // Only now: KVM takes no other features once a vCPU has run.
        if let Some(first) = vcpus.first_mut().filter(|_| !force) {
            speed::check(first, &memory)?;
        }

        let entry = boot.load(&memory)?;
        long_mode::write_tables(&memory)?;
        let mmio64 = layout::pci_mmio64(config.memory);
        let tables = acpi::build(&acpi::Platform {
            cpus: config.cpus,
            buses: config.bus_count(),
            mmio64: mmio64.clone(),
        })?;
        memory.write_slice(&tables, GuestAddress(layout::ACPI.start))?;
        memory.write_slice(&chipset::RESET_STUB, GuestAddress(layout::RESET_VECTOR))?;
        if let Some(first) = vcpus.first() {
            cpu::enter(first, entry)?;
        }

        let control = Arc::new(Control::new(vcpus.len())?);
        let (ports, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        chipset::attach(&ports, &control)?;
        let line = vm.interrupt_line(chipset::COM1_IRQ)?;
        let serial = SerialPort::new(line, output.map(Output::sender))?;
        serial.attach(&ports)?;
        let power_button = vm.interrupt_line(chipset::POWER_BUTTON_IRQ)?;

        let pci = PciRoot::new(PciLayout {
            ecam: layout::pci_ecam(config.bus_count()),
            mmio32: layout::PCI_MMIO32,
            mmio64,
        })?;
        let msi = KvmMsi::new(Arc::clone(vm.fd()));
        let functions = Functions::plug(backends, &ram, &pci, &msi)?;
        pci.assign_resources()?;
        mmio.insert(pci.layout().ecam.clone(), pci.ecam())?;
        for (range, device) in pci.mmio_windows() {
            mmio.insert(range, device)?;
        }

        let doorbells = Doorbells::new(Arc::clone(vm.fd()));
        let root = Arc::clone(&pci);
        let ending = Arc::clone(&control);
        let layout_changed: Arc<dyn Fn() + Send + Sync> = Arc::new(move || {
            if let Err(error) = doorbells.reconcile(|| root.doorbells()) {
                ending.finish(Outcome::KvmFailure(error.to_string()));
            }
        });
        let wiring = Wiring {
            ports,
            mmio,
            control: Arc::clone(&control),
            tells_pause: vm.fd().check_extension(Cap::KvmclockCtrl),
            layout_changed: Arc::clone(&layout_changed),
        };
        let mut threads = Vec::with_capacity(vcpus.len());
        for (id, vcpu) in (0..config.cpus).zip(vcpus) {
            threads.push(vcpu::spawn(id, vcpu, wiring.clone())?);
        }
        Ok(Arc::new(Self {
            config,
            control,
            serial,
            power_button,
            pci,
            functions,
            layout_changed,
            threads: Mutex::new(threads),
            transition: Mutex::default(),
            _vm: vm,
        }))
    }

    /// What it was built from.
    pub fn config(&self) -> &config::Machine {
        &self.config
    }

    /// Its PCI root complex.
    pub fn pci(&self) -> &Arc<PciRoot> {
        &self.pci
    }

    /// Its virtio functions.
    pub fn functions(&self) -> &Functions {
        &self.functions
    }

    /// What its vCPUs do now.
    pub fn state(&self) -> RunState {
        self.control.state()
    }

    /// How the guest ended, if it has.
    pub fn outcome(&self) -> Option<Outcome> {
        self.control.outcome()
    }

    /// Ends the guest; the first outcome counts.
    pub fn finish(&self, outcome: Outcome) {
        self.control.finish(outcome);
    }

    fn transition(&self) -> MutexGuard<'_, ()> {
        self.transition
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the guest run. No effect on a running machine.
    pub fn resume(&self) -> Result<(), TransitionError> {
        let _transition = self.transition();
        self.functions.reopen(Reasons::PAUSED);
        Ok(self.control.resume()?)
    }

    /// Stops vCPUs, then devices; returns when nothing of the guest happens any more. No effect on a paused machine.
    ///
    /// If a vCPU or a device does not come to rest the guest goes on running, as if nothing had been asked.
    pub fn pause(&self) -> Result<(), TransitionError> {
        let _transition = self.transition();
        self.control.pause(LEAVE)?;
        let Err(stuck) = self.functions.close_and_drain(Reasons::PAUSED, DRAIN) else {
            return Ok(());
        };
        self.control.resume()?;
        Err(TransitionError::Busy(stuck.join(", ")))
    }

    /// Registers the doorbells of functions that became live without a write of their drivers.
    fn register_doorbells(&self) {
        // First: whatever comes after this is seen below, or makes it readable again.
        let _ = self.functions.revived().read();
        (self.layout_changed)();
    }

    /// Presses the power button: the guest's operating system is asked to shut down.
    pub fn press_power_button(&self) -> std::io::Result<()> {
        self.power_button.write(1)
    }

    /// Ends the guest if it has not ended, and waits for its vCPUs.
    fn stop(&self) {
        self.control
            .finish(Outcome::Stopped("the end of the process"));
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What only the host can say about sizes.
fn check_limits(
    config: &config::Machine,
    max_cpus: usize,
    address_bits: u32,
) -> Result<(), HostError> {
    if usize::from(config.cpus) > max_cpus {
        return Err(HostError::Cpus(format!(
            "{} is more than this host's KVM runs; ask for at most {max_cpus}",
            config.cpus
        )));
    }
    let end = layout::pci_mmio64(config.memory).end;
    if address_bits < 64 && end > 1 << address_bits {
        return Err(HostError::Memory(format!(
            "{} needs guest addresses of more than the {address_bits} bits this processor has; ask for less",
            layout::format_memory_size(config.memory)
        )));
    }
    Ok(())
}
