//! A machine before anything of a guest is in it: KVM's part, memory, buses, devices, all wired together.
//!
//! [`Hardware::create`] builds it from its specification. No vCPU has a thread then, and guest memory is as it was given.
//! [`Hardware::boot`] puts a kernel into it; either way [`Hardware::finish`] makes a [`Machine`] of it that has not been
//! started.

use std::sync::{Arc, Mutex};

use devices::bus::{Bus, BusError};
use devices::gate::Reasons;
use devices::memory::{Backing, GuestRam, MemoryError, View};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use pci::root::{AssignError, PciRoot};
use pci::topology::{LayoutError, PciLayout};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::functions::{Backends, FunctionError, Functions};
use super::large::LargePages;
use super::lease::Leases;
use super::pages::PageSource;
use super::{Machine, Unstarted};
use crate::acpi::{self, AcpiError};
use crate::boot::load::{LoadError, Prepared};
use crate::boot::long_mode;
use crate::chipset::{self, VmGeneration};
use crate::config::check::HostError;
use crate::config::{MachineSpec, MemoryBacking};
use crate::console::output::Output;
use crate::exit::Outcome;
use crate::kvm::model::{CpuModel, HostCpu};
use crate::kvm::speed::Trial;
use crate::kvm::{self, KvmError, Vm, cpu, doorbells::Doorbells, msi::KvmMsi};
use crate::layout;
use crate::migrate::monitor::Monitor;
use crate::serial::SerialPort;
use crate::snapshot::report::Meter;
use crate::vcpu::{Control, Wiring, kick};

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
    /// Guest memory cannot be described. A mistake of the program.
    #[error(transparent)]
    Pages(#[from] migration::layout::LayoutError),
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

/// KVM on this host, and the processor it can give a guest.
pub struct Host {
    kvm: Kvm,
    cpu: HostCpu,
}

impl Host {
    /// Opens KVM and asks what it has. `force` accepts one that only interprets guest code.
    pub fn open(force: bool) -> Result<Self, BuildError> {
        kick::install()?;
        let kvm = kvm::open()?;
        let mut trial = Trial::new(&kvm)?;
        if !force {
            trial.check()?;
        }
        let cpu = HostCpu::of(&kvm, &trial)?;
        trial.discard();
        Ok(Self { kvm, cpu })
    }

    /// The processor.
    pub fn cpu(&self) -> &HostCpu {
        &self.cpu
    }

    /// Sizes of a machine of `spec` that this host does not have.
    pub fn lacks(&self, spec: &MachineSpec) -> Vec<HostError> {
        let mut lacking = Vec::new();
        let max_cpus = self.kvm.get_max_vcpus();
        if usize::from(spec.cpus) > max_cpus {
            lacking.push(HostError::Cpus(format!(
                "{} is more than this host's KVM runs; ask for at most {max_cpus}",
                spec.cpus
            )));
        }
        let bits = self.cpu.physical_address_bits();
        let end = layout::pci_mmio64(spec.memory).end;
        if bits < 64 && end > 1 << bits {
            lacking.push(HostError::Memory(format!(
                "{} needs guest addresses of more than the {bits} bits this processor has; ask for less",
                layout::format_memory_size(spec.memory)
            )));
        }
        lacking
    }
}

/// See the [module documentation](self).
pub struct Hardware {
    pub(crate) model: CpuModel,
    /// Model-specific registers that are state of its vCPUs.
    msrs: Vec<u32>,
    pub(crate) spec: MachineSpec,
    pub(crate) vm: Vm,
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) vcpus: Vec<VcpuFd>,
    pub(crate) control: Arc<Control>,
    pub(crate) serial: Arc<SerialPort>,
    pub(crate) power_button: EventFd,
    generation: EventFd,
    pub(crate) pci: Arc<PciRoot>,
    pub(crate) functions: Functions,
    pub(crate) pages: Arc<PageSource>,
    large_pages: Option<LargePages>,
    msi: KvmMsi,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    layout_changed: Arc<dyn Fn() + Send + Sync>,
}

/// RAM for a guest that begins, or whose memory is copied here: zeroes.
pub fn fresh_ram(memory: u64, backing: MemoryBacking) -> Result<Arc<GuestRam>, MemoryError> {
    let backing = match backing {
        MemoryBacking::Anonymous => Backing::Anonymous,
        MemoryBacking::Memfd => Backing::memfd(memory)?,
    };
    GuestRam::with_backing(&layout::ram_ranges(memory), backing)
}

impl Hardware {
    /// Builds a machine around memory and devices that are there already. All devices are stopped, as in a pause.
    ///
    /// `output` takes the serial console's output.
    pub fn create(
        host: Host,
        spec: MachineSpec,
        model: CpuModel,
        ram: Arc<GuestRam>,
        backends: Backends,
        output: Option<&Output>,
    ) -> Result<Self, BuildError> {
        if let Some(error) = host.lacks(&spec).into_iter().next() {
            return Err(error.into());
        }
        let msrs = host.cpu.saved_msrs(&model);
        let vm = Vm::new(host.kvm, &ram)?;
        model.prepare_vm(vm.fd())?;
        let mut vcpus = Vec::with_capacity(usize::from(spec.cpus));
        for id in 0..spec.cpus {
            vcpus.push(vm.create_vcpu(id)?);
        }
        for (id, vcpu) in (0..spec.cpus).zip(&vcpus) {
            cpu::configure(vcpu, &model, id)?;
        }

        let pages = PageSource::new(vm.slots())?;
        let large_pages = LargePages::spawn(vm.slots())?;
        let control = Arc::new(Control::new(vcpus.len())?);
        let (ports, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));
        chipset::attach(&ports, &control)?;
        let line = vm.interrupt_line(chipset::COM1_IRQ)?;
        let serial = SerialPort::new(line, output.map(Output::sender))?;
        serial.attach(&ports)?;
        serial.pause();
        let power_button = vm.interrupt_line(chipset::POWER_BUTTON_IRQ)?;
        let generation = vm.interrupt_line(chipset::VM_GENERATION_IRQ)?;

        let pci = PciRoot::new(PciLayout {
            ecam: layout::pci_ecam(spec.bus_count()),
            mmio32: layout::PCI_MMIO32,
            mmio64: layout::pci_mmio64(spec.memory),
        })?;
        let msi = KvmMsi::new(Arc::clone(vm.fd()));
        let functions = Functions::plug(backends, &ram, &pci, &msi)?;
        for function in functions.all() {
            function.close(Reasons::PAUSED);
        }
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
        Ok(Self {
            model,
            msrs,
            spec,
            vm,
            ram,
            vcpus,
            control,
            serial,
            power_button,
            generation,
            pci,
            functions,
            pages,
            large_pages,
            msi,
            ports,
            mmio,
            layout_changed,
        })
    }

    /// Puts a kernel, and what firmware would have left for it, into memory, and the first vCPU at its entry.
    pub fn boot(&self, kernel: Prepared) -> Result<(), BuildError> {
        let memory: View = self.ram.view()?;
        let entry = kernel.load(&memory)?;
        long_mode::write_tables(&memory)?;
        let tables = acpi::build(&acpi::Platform {
            cpus: self.spec.cpus,
            buses: self.spec.bus_count(),
            mmio64: layout::pci_mmio64(self.spec.memory),
        })?;
        memory.write_slice(&tables, GuestAddress(layout::ACPI.start))?;
        memory.write_slice(&chipset::RESET_STUB, GuestAddress(layout::RESET_VECTOR))?;
        VmGeneration::random()?.write(&memory)?;
        if let Some(first) = self.vcpus.first() {
            cpu::enter(first, entry)?;
        }
        Ok(())
    }

    /// Makes a machine of it that was not started.
    pub fn finish(self) -> Arc<Machine> {
        let wiring = Wiring {
            ports: self.ports,
            mmio: self.mmio,
            control: Arc::clone(&self.control),
            tells_pause: self.vm.fd().check_extension(Cap::KvmclockCtrl),
            layout_changed: Arc::clone(&self.layout_changed),
        };
        Arc::new(Machine {
            model: self.model,
            msrs: self.msrs,
            spec: self.spec,
            leases: Leases::starting(),
            meter: Meter::default(),
            migration: Monitor::default(),
            start: Mutex::default(),
            input: Mutex::default(),
            control: self.control,
            serial: self.serial,
            power_button: self.power_button,
            generation: self.generation,
            arrival: Mutex::default(),
            pci: self.pci,
            functions: self.functions,
            pages: self.pages,
            _large_pages: self.large_pages,
            msi: self.msi,
            layout_changed: self.layout_changed,
            unstarted: Mutex::new(Some(Unstarted {
                wiring,
                vcpus: self.vcpus,
                threads: Vec::new(),
            })),
            threads: Mutex::default(),
            ram: self.ram,
            vm: self.vm,
        })
    }
}
