//! Going on from a snapshot: everything of it is read and checked before anything is built, and nothing runs before all of
//! it is in place.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use devices::memory::{Backing, GuestRam, MemoryError};
use migration::directory::STATE;
use migration::{Bases, Expected, Image, RamLayout, ReadError, Reader};

use super::capture::{self, Devices};
use super::devices::DeviceError;
use super::format::FormatError;
use super::format::error::Invalid;
use super::format::machine::MachineError;
use super::format::state::State;
use super::overrides::{OverrideError, Overrides};
use crate::config::MachineSpec;
use crate::console::output::Output;
use crate::kvm::model::CpuModel;
pub use crate::kvm::state::ClockChoice;
use crate::kvm::state::{self, StateError};
use crate::layout;
use crate::machine::functions::Backends;
use crate::machine::pages::{RamPages, SourceError};
use crate::machine::{Arrival, BuildError, Hardware, Host, Machine};
use crate::serial::SerialStateError;

/// What is wrong with a state.
#[derive(Debug, thiserror::Error)]
pub enum StateFault {
    /// It is not one.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Its machine is none.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A value.
    #[error(transparent)]
    Value(#[from] Invalid),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The serial port.
    #[error("serial: {0}")]
    Serial(#[from] SerialStateError),
    /// vCPUs, interrupt controllers, clock.
    #[error(transparent)]
    Cpu(#[from] StateError),
    /// Another number of vCPUs than the machine has.
    #[error("vcpus: there are {found}, and machine.cpus is {expected}")]
    Vcpus {
        /// In the state.
        found: usize,
        /// In the specification.
        expected: u8,
    },
    /// Guest memory cannot be described. A mistake of the program.
    #[error(transparent)]
    Layout(#[from] migration::layout::LayoutError),
    /// The host refused something while it was put into a machine.
    #[error(transparent)]
    Build(#[from] BuildError),
}

impl StateFault {
    /// The error for the state in the snapshot at `path`.
    pub fn at(self, path: &Path) -> RestoreError {
        RestoreError::State {
            path: path.join(STATE),
            source: self,
        }
    }
}

/// Why a snapshot cannot be restored. Nothing runs.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Its files.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Its state.
    #[error("{}: {source}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: StateFault,
    },
    /// Files it names.
    #[error(transparent)]
    Override(#[from] OverrideError),
    /// Options for what it does not have.
    #[error("{}", joined(.0))]
    Overrides(Vec<OverrideError>),
    /// A host that lacks what the guest relies on: all of it.
    #[error("this host cannot run the guest:{}", listed(.0))]
    Host(Vec<String>),
    /// The machine cannot be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Guest memory cannot be described. A mistake of the program.
    #[error(transparent)]
    Layout(#[from] migration::layout::LayoutError),
    /// What the guest writes cannot be tracked.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The host refused something.
    #[error("memory.bin cannot be read: {0}")]
    Io(#[from] std::io::Error),
}

fn listed(all: &[String]) -> String {
    all.iter().map(|one| format!("\n  {one}")).collect()
}

fn joined(all: &[OverrideError]) -> String {
    let all: Vec<_> = all.iter().map(ToString::to_string).collect();
    all.join("\n  ")
}

/// How a snapshot is restored.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What happened to the guest's clocks.
    pub clock: ClockChoice,
    /// Memory is read before the guest goes on.
    pub prefault: bool,
    /// What changes is tracked, so that this snapshot can be the base of another.
    pub track: bool,
}

/// What a state says of its machine, checked as far as that needs no host.
pub struct Described {
    /// What the machine is built from.
    pub spec: MachineSpec,
    /// The processor the guest sees.
    pub model: CpuModel,
    /// vCPUs, interrupt controllers, clock.
    pub cpu: state::State,
    /// What its memory has to be.
    pub memory: Expected,
}

impl Described {
    /// Looks at what [`parse`](super::format::parse) cannot say, since options may have replaced parts of the machine.
    pub fn of(state: &State) -> Result<Self, StateFault> {
        let spec = state.machine.to_spec()?;
        if state.vcpus.len() != usize::from(spec.cpus) {
            return Err(StateFault::Vcpus {
                found: state.vcpus.len(),
                expected: spec.cpus,
            });
        }
        let (model, cpu) = state.cpu()?;
        let memory = Expected {
            id: state.id()?,
            layout: ram_layout(&spec)?,
            digest: Some(state.digest()?),
        };
        Ok(Self {
            spec,
            model,
            cpu,
            memory,
        })
    }
}

/// A snapshot that was read and found good, as far as that can be said without a host.
pub struct Source {
    path: PathBuf,
    state: State,
    spec: MachineSpec,
    model: CpuModel,
    cpu: state::State,
    image: Image,
    /// What is wrong with the files it names.
    unfit: Option<String>,
}

/// A snapshot that this host can run.
pub struct Fit {
    source: Source,
    host: Host,
}

impl Source {
    /// Reads and checks the snapshot at `path`, with what is to be different in the machine.
    pub fn open(path: &Path, overrides: &Overrides) -> Result<Self, RestoreError> {
        let reader = Reader::open(path)?;
        let fault = |fault: StateFault| fault.at(path);
        let parsed = super::format::parse(&reader.state()?);
        let mut state: State = parsed.map_err(|error| fault(error.into()))?;
        let mut bases = Bases::Follow;
        if let Err(error) = reader.belongs_to_caller() {
            tracing::debug!(%error, "paths of the snapshot are not followed");
            overrides.check_trust(&state.machine)?;
            bases = Bases::None;
        }
        overrides.check_sizes(&state.machine)?;
        overrides
            .apply(&mut state.machine)
            .map_err(RestoreError::Overrides)?;
        let Described {
            spec,
            model,
            cpu,
            memory,
        } = Described::of(&state).map_err(fault)?;
        let image = Image::open(&reader, Some(&memory), bases)?;
        let files = overrides.check_files(&state.machine);
        Ok(Self {
            path: path.to_owned(),
            unfit: files.err().map(|error| error.to_string()),
            state,
            spec,
            model,
            cpu,
            image,
        })
    }

    /// What the machine is built from.
    pub fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    /// What is wrong with the files it names: they are not what they were. [`Self::fit`] refuses that with everything else.
    pub fn unfit(&self) -> Option<&str> {
        self.unfit.as_deref()
    }

    /// Looks whether this host can run the guest; the error has everything that it lacks.
    pub fn fit(self, host: Host) -> Result<Fit, RestoreError> {
        let mut lacking = self.model.check_host(host.cpu());
        lacking.extend(self.cpu.check_host(host.cpu()));
        let mut all: Vec<_> = lacking.iter().map(ToString::to_string).collect();
        all.extend(host.lacks(&self.spec).iter().map(ToString::to_string));
        all.extend(self.unfit.clone());
        if !all.is_empty() {
            return Err(RestoreError::Host(all));
        }
        Ok(Fit { source: self, host })
    }

    /// Guest memory as the snapshot has it.
    fn memory(&self, prefault: bool) -> Result<Arc<GuestRam>, RestoreError> {
        let (file, offsets) = self.image.lowest()?;
        let ranges = layout::ram_ranges(self.spec.memory);
        let ram = GuestRam::with_backing(&ranges, Backing::File { file, offsets })?;
        self.image.overlay(&RamPages::new(&ram)?, &mut |_| {
            std::ops::ControlFlow::Continue(())
        })?;
        if prefault {
            ram.prefault(|_| {})?;
        }
        Ok(ram)
    }
}

impl Fit {
    /// What the machine is built from.
    pub fn spec(&self) -> &MachineSpec {
        self.source.spec()
    }

    /// Builds the machine around `backends`, and puts everything into its state. It waits for its start.
    pub fn restore(
        self,
        backends: Backends,
        output: Option<&Output>,
        options: Options,
    ) -> Result<Arc<Machine>, RestoreError> {
        let Self { source, host } = self;
        let ram = source.memory(options.prefault)?;
        let id = source.image.id();
        let hardware = Hardware::create(
            host,
            source.spec,
            source.model,
            Arc::clone(&ram),
            backends,
            output,
        )?;
        let machine = hardware.finish();
        if options.track {
            // First: what follows is written to memory already.
            machine.pages().start(Some(id))?;
        }
        let state = source.state;
        let devices = Devices {
            pci: state.pci,
            functions: state.functions,
            owners: state.owners,
            serial: state.serial,
        };
        let (arrival, clock) = (Arrival::Restored, options.clock);
        capture::put(&machine, &devices, &source.cpu, arrival, clock)
            .map_err(|fault| fault.at(&source.path))?;
        Ok(machine)
    }
}

/// The RAM of a machine as the memory of a snapshot has it.
fn ram_layout(spec: &MachineSpec) -> Result<RamLayout, migration::layout::LayoutError> {
    let ranges = layout::ram_ranges(spec.memory);
    RamLayout::new(ranges.iter().map(|range| (range.start.0, range.len as u64)))
}
