//! Machines in this process, as the monitor builds them but for KVM: over memory and interrupts of the test's own.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use devices::gate::Reasons;
use driver::access::{Function, FunctionExt};
use driver::host::{HostDma, HostFunction, Machine, VirtualFunction};
use driver::pci::{Address, change_command, command, find_extended_capability, id};
use vmm::config::{Config, MachineSpec};
use vmm::console::output::Loss;
use vmm::machine::functions::{Backends, Functions};
use vmm::machine::owner::Group;
use vmm::snapshot::devices::{self as bus, DeviceError};
use vmm::snapshot::format::function;
use vmm::snapshot::format::machine::Machine as MachineJson;
use vmm::snapshot::format::owner::Owner;
use vmm::snapshot::format::pci::Pci;
use vmm::snapshot::format::state::State;
use vmm::snapshot::format::{parse, write};

/// Bytes of memory: the least that a machine has.
pub const MEMORY: usize = 64 << 20;
/// How long requests may take to come to rest.
const PATIENCE: Duration = Duration::from_secs(20);

/// A document with something of everything. Its devices are none of any machine; everything else is taken from it.
pub fn whole() -> State {
    parse(include_bytes!("../golden/v1/whole.json")).unwrap()
}

/// Memory for a machine.
pub fn memory() -> HostDma {
    HostDma::new(0, MEMORY).unwrap()
}

/// The specification of a machine with the least memory.
pub fn spec(config: Config) -> MachineSpec {
    let config = Config {
        kernel: Some("/boot/vmlinuz".into()),
        memory: Some("64M".to_owned()),
        console: Some("none".parse().unwrap()),
        ..config
    };
    config.resolve().unwrap()
}

/// What a snapshot has of the devices.
#[derive(Clone, Debug, PartialEq)]
pub struct Devices {
    pub pci: Pci,
    pub functions: Vec<function::Function>,
    pub owners: Vec<Owner>,
}

impl Devices {
    pub fn of(state: &State) -> Self {
        Self {
            pci: state.pci.clone(),
            functions: state.functions.clone(),
            owners: state.owners.clone(),
        }
    }

    /// A whole document with these devices, of machine `spec`.
    pub fn document(&self, spec: &MachineSpec) -> State {
        State {
            machine: MachineJson::of(spec),
            pci: self.pci.clone(),
            functions: self.functions.clone(),
            owners: self.owners.clone(),
            ..whole()
        }
    }
}

/// A machine.
pub struct Rig {
    pub machine: Machine,
    pub functions: Functions,
}

impl Rig {
    /// The machine of `spec` over `memory`, its devices closed as for a pause.
    pub fn build(spec: &MachineSpec, memory: &HostDma) -> Result<Self, String> {
        let backends = Backends::open(spec, None, &Loss::default()).map_err(|e| e.to_string())?;
        let machine = Machine::with_memory(memory.clone()).unwrap();
        let (ram, msi) = (machine.dma().ram(), machine.msi());
        let functions = Functions::plug(backends, ram, machine.root(), msi)
            .map_err(|error| error.to_string())?;
        for function in functions.all() {
            function.close(Reasons::PAUSED);
        }
        machine.power_on().unwrap();
        Ok(Self { machine, functions })
    }

    pub fn pause(&self) {
        self.functions
            .close_and_drain(Reasons::PAUSED, PATIENCE)
            .unwrap();
    }

    pub fn resume(&self) {
        self.functions.reopen(Reasons::PAUSED);
    }

    pub fn save(&self) -> Devices {
        Devices {
            pci: bus::save_pci(self.machine.root()),
            functions: bus::save_functions(&self.functions).unwrap(),
            owners: bus::save_owners(&self.functions),
        }
    }

    pub fn restore(&self, state: &State) -> Result<(), DeviceError> {
        let root = self.machine.root();
        bus::restore(
            root,
            &self.functions,
            &state.pci,
            &state.functions,
            &state.owners,
        )
    }

    pub fn group(&self) -> &Group {
        &self.functions.groups()[0]
    }
}

/// A function as its driver has it, whatever machine it is in at present.
#[derive(Clone)]
pub struct Seat(Rc<RefCell<Box<dyn Function>>>);

impl Function for Seat {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.0.borrow().read_config(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.0.borrow().write_config(offset, data);
    }

    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.0.borrow().read_bar(bar, offset, data);
    }

    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) {
        self.0.borrow().write_bar(bar, offset, data);
    }

    fn relax(&self) {
        self.0.borrow().relax();
    }
}

/// A function of no machine.
struct Nowhere;

impl Function for Nowhere {
    fn read_config(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_config(&self, _: u16, _: &[u8]) {}

    fn read_bar(&self, _: u8, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_bar(&self, _: u8, _: u64, _: &[u8]) {}

    fn relax(&self) {}
}

/// Where a function is.
#[derive(Clone, Copy)]
pub enum Place {
    At(Address),
    /// A virtual function of the owner there, from 1.
    Member(Address, u8),
}

/// A machine that is in use, and what its guest has of it.
pub struct World {
    pub spec: MachineSpec,
    pub memory: HostDma,
    rig: Option<Rig>,
    seats: Vec<(Seat, Place)>,
}

impl World {
    pub fn new(spec: MachineSpec) -> Self {
        let memory = memory();
        let rig = Rig::build(&spec, &memory).unwrap();
        rig.resume();
        Self {
            spec,
            memory,
            rig: Some(rig),
            seats: Vec::new(),
        }
    }

    pub fn rig(&self) -> &Rig {
        self.rig.as_ref().unwrap()
    }

    pub fn at(&self, bus: u8, devfn: u8) -> HostFunction {
        self.rig().machine.function(Address { bus, devfn })
    }

    /// The function at `place`, with memory decoding and bus mastering on.
    pub fn seat(&mut self, place: Place) -> Seat {
        let seat = Seat(Rc::new(RefCell::new(Box::new(Nowhere))));
        bind(self.rig(), &seat, place);
        change_command(&seat, command::MEMORY | command::BUS_MASTER, 0);
        self.seats.push((seat.clone(), place));
        seat
    }

    pub fn device(&mut self, bus: u8, device: u8) -> Seat {
        self.seat(Place::At(Address::new(bus, device, 0)))
    }

    /// Enables `count` members of the owner at `pf`, whose port is at `port`.
    pub fn enable_members(&self, pf: Address, count: u16) {
        let at = find_extended_capability(&self.rig().machine.function(pf), id::EXT_SRIOV)
            .unwrap()
            .unwrap()
            .offset;
        let pf = self.rig().machine.function(pf);
        // NumVFs, then VF Enable and VF MSE.
        pf.set_config(at + 0x10, count);
        pf.set_config(at + 0x08, 1u16 | 1 << 3);
    }

    /// Saves the machine, moves it into another one, and lets that go on. What the other one saves is the same.
    /// Returns the document.
    pub fn move_on(&mut self) -> State {
        self.rig().pause();
        let saved = self.rig().save();
        let document = saved.document(&self.spec);
        let text = write(&document).unwrap();
        let read: State = parse(&text).unwrap();
        assert_eq!(read, document);

        // A file can be open in one machine only.
        for (seat, _) in &self.seats {
            *seat.0.borrow_mut() = Box::new(Nowhere);
        }
        self.rig = None;
        let spec = read.machine.to_spec().unwrap();
        assert_eq!(spec, self.spec);
        let rig = Rig::build(&spec, &self.memory).unwrap();
        rig.restore(&read).unwrap();
        let again = rig.save();
        let text_again = write(&again.document(&spec)).unwrap();
        assert_eq!(
            String::from_utf8(text_again).unwrap(),
            String::from_utf8(text).unwrap()
        );
        assert_eq!(again, saved);

        for function in rig.functions.all() {
            function.signal_again();
        }
        for (seat, place) in &self.seats {
            bind(&rig, seat, *place);
        }
        rig.resume();
        self.rig = Some(rig);
        document
    }
}

fn bind(rig: &Rig, seat: &Seat, place: Place) {
    let function: Box<dyn Function> = match place {
        Place::At(address) => Box::new(rig.machine.function(address)),
        Place::Member(owner, number) => {
            let owner = rig.machine.function(owner);
            Box::new(VirtualFunction::new(&owner, number).unwrap().unwrap())
        }
    };
    *seat.0.borrow_mut() = function;
}

/// A file of `bytes` bytes.
pub fn file(path: &Path, bytes: u64) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(bytes).unwrap();
}
