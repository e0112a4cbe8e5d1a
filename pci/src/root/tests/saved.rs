//! Whatever a guest made of a bus: its saved form, put into a fresh bus of the same make, gives the same bus.

use std::time::Duration;

use devices::admin::{self, Owner};
use devices::gate::{Patience, Reasons};
use devices::state::FunctionState;
use devices::virtio::VirtioFunction;
use proptest::prelude::*;

use super::*;
use crate::config::ConfigStateError;
use crate::ecap::sriov::SriovStateError;
use crate::msix::state::MsixStateError;
use crate::owner::{self, OwnerPci};
use crate::state::{PciState, PciStateError, Place, RegistersError};
use crate::testing::{Held, RecordingController, SinkEvent, ram};
use crate::virtio::{Options, VirtioPci};
use devices::msi::MsiMessage;

/// Virtual functions of the owner.
const VFS: u8 = 4;
/// SR-IOV capability of the owner.
const SRIOV: u64 = 0x108;
/// Message Control of the MSI-X capability of every virtio function here.
const MSIX_CONTROL: u64 = 0x7e;

/// A host bridge, two endpoints on the root bus, one behind a port, and an owner with its members behind another.
struct Machine {
    root: Arc<PciRoot>,
    controller: RecordingController,
    functions: Vec<Arc<VirtioFunction>>,
    /// The same functions, in the same order.
    pci: Vec<Arc<VirtioPci>>,
    /// The PF, as its bus knows it.
    owner: Arc<dyn ConfigTarget>,
}

fn machine() -> Machine {
    let root = PciRoot::new(layout()).unwrap();
    let controller = RecordingController::default();
    let mut functions = Vec::new();
    let mut pci = Vec::new();
    for (i, options) in [Options::ROOT_BUS, Options::ROOT_BUS, Options::BEHIND_PORT]
        .into_iter()
        .enumerate()
    {
        let (function, _, _) = Held::function(2 + i, &[7; 12]);
        let shown = VirtioPci::new(Arc::clone(&function), &controller, options).unwrap();
        match options.port_type {
            PortType::Endpoint => {
                root.add_root_port(Arc::new(SingleFunction(Arc::clone(&shown) as _)))
            }
            _ => root.add_endpoint(Arc::clone(&shown) as _),
        }
        .unwrap();
        functions.push(function);
        pci.push(shown);
    }
    let ram = ram();
    let members: Vec<_> = (1..=VFS)
        .map(|i| {
            let (device, _) = Held::device(2, &[i]);
            VirtioFunction::new(format!("vf{i}"), device, ram.view().unwrap()).unwrap()
        })
        .collect();
    let group = members.iter().map(|vf| Arc::clone(vf) as _).collect();
    let group = Owner::new(group, admin::Options::default()).unwrap();
    let (device, _) = Held::device(2, &[0]);
    let pf = VirtioFunction::new_owner("pf", device, ram.view().unwrap(), group).unwrap();
    functions.push(Arc::clone(&pf));
    functions.extend(members.iter().cloned());
    let owner = OwnerPci::new(pf, members, &controller, owner::Options::default()).unwrap();
    pci.push(Arc::clone(owner.pf()));
    pci.extend(owner.members().iter().cloned());
    let seat = owner.at(DevFn(0)).unwrap();
    root.add_root_port(owner).unwrap();
    root.assign_resources().unwrap();
    Machine {
        root,
        controller,
        functions,
        pci,
        owner: seat,
    }
}

/// Where a guest finds the functions while it leaves the bus numbers alone: bridges, endpoints, the owner, its members.
const PLACES: [(u8, u8); 11] = [
    (0, 0x00),
    (0, 0x18),
    (0, 0x20),
    (0, 0x08),
    (0, 0x10),
    (1, 0),
    (2, 0),
    (2, 1),
    (2, 2),
    (2, 3),
    (2, 4),
];
/// Index of the port of the owner, of its PF, and of the first function with MSI-X, in [`PLACES`].
const PORT: usize = 2;
const PF: usize = 6;
const FIRST: usize = 3;

#[derive(Clone, Debug)]
enum Step {
    /// A write to the configuration space of one of the places.
    Config(usize, u64, Vec<u8>),
    /// A write to a decoded range, wherever it is.
    Memory(usize, u64, Vec<u8>),
    /// What a driver does: forwards ARI, sets NumVFs and page size, enables and decodes.
    Enable(u8, u8),
    Disable,
    /// Bus mastering, MSI-X, and a queue, of the function at this place.
    Start(usize),
    /// A device signals a vector.
    Signal(usize, u16),
    /// Bus numbers, windows and addresses are what they were.
    Assign,
}

fn data() -> impl Strategy<Value = Vec<u8>> {
    let bytes = prop_oneof![any::<u8>(), Just(0), Just(0xff), Just(1)];
    let sizes = prop_oneof![Just(1usize), Just(2), Just(4), Just(8)];
    sizes.prop_flat_map(move |n| prop::collection::vec(bytes.clone(), n))
}

fn step() -> impl Strategy<Value = Step> {
    let register = prop_oneof![
        0u64..0x40,
        0x40u64..0x100,
        (0u64..0x40).prop_map(|at| SRIOV + at),
        0u64..0x1000,
        Just(4),
        Just(MSIX_CONTROL),
    ];
    let bar = prop_oneof![
        0u64..0x120,
        (0u64..40).prop_map(|dword| 0x2000 + dword * 4),
        0u64..0x1_4000,
    ];
    let place = 0usize..PLACES.len();
    prop_oneof![
        6 => (place.clone(), register, data()).prop_map(|(p, r, d)| Step::Config(p, r, d)),
        4 => (0usize..8, bar, data()).prop_map(|(e, o, d)| Step::Memory(e, o, d)),
        2 => (0..=VFS + 1, 0u8..12).prop_map(|(n, page)| Step::Enable(n, page)),
        1 => Just(Step::Disable),
        4 => (FIRST..PLACES.len()).prop_map(Step::Start),
        2 => (0usize..8, 0u16..6).prop_map(|(f, v)| Step::Signal(f, v)),
        2 => Just(Step::Assign),
    ]
}

impl Machine {
    fn config(&self, place: usize, register: u64, data: &[u8]) {
        let (bus, devfn) = PLACES[place];
        let offset = ecam_offset(bdf(bus, devfn), register);
        let _ = self.root.ecam().write(offset, data);
    }

    fn memory(&self, entry: usize, offset: u64, data: &[u8]) {
        let table = self.root.decode.load();
        if let Some(entry) = table.entries().get(entry) {
            let _ = entry.function.memory_write(entry.slot, offset, data);
        }
    }

    fn run(&self, step: &Step) {
        match step {
            Step::Config(place, register, data) => self.config(*place, *register, data),
            Step::Memory(entry, offset, data) => self.memory(*entry, *offset, data),
            Step::Enable(vfs, page) => {
                self.config(PORT, 0x68, &[0x20, 0]);
                self.config(PF, SRIOV + 0x20, &(1u32 << page).to_le_bytes());
                self.config(PF, SRIOV + 0x10, &[*vfs, 0]);
                self.config(PF, SRIOV + 0x08, &[0x19, 0]);
            }
            Step::Disable => self.config(PF, SRIOV + 0x08, &[0, 0]),
            Step::Start(place) => {
                self.config(*place, 4, &[6, 0]);
                self.config(*place, MSIX_CONTROL, &[0, 0x80]);
                let (bus, devfn) = PLACES[*place];
                if self.root.function_at(bdf(bus, devfn)).is_some() {
                    self.drive(*place - FIRST);
                }
            }
            Step::Signal(function, vector) => self.pci[*function].msix().signal(*vector),
            Step::Assign => {
                // Firmware finds the page size it has after reset.
                for (register, value) in [(0x08, 0), (0x20, 1)] {
                    let _ = self
                        .owner
                        .config_write(SRIOV as u16 + register, &[value, 0, 0, 0]);
                }
                self.root.assign_resources().unwrap();
            }
        }
    }

    /// What a driver writes to the BAR of function `i`: one vector, and queue 0 at addresses that are RAM.
    fn drive(&self, i: usize) {
        const WRITES: [(u64, &[u8]); 13] = [
            (0x2010, &[0, 0, 0xe0, 0xfe, 0, 0, 0, 0]),
            (0x2018, &[0x41, 0, 0, 0, 0, 0, 0, 0]),
            (20, &[1]),
            (20, &[3]),
            (8, &[1, 0, 0, 0]),
            (12, &[1, 0, 0, 0]),
            (20, &[0xb]),
            (22, &[0, 0]),
            (32, &[0, 0x10, 0, 0]),
            (40, &[0, 0x20, 0, 0]),
            (48, &[0, 0x30, 0, 0]),
            (28, &[1, 0]),
            (20, &[0xf]),
        ];
        for (offset, data) in WRITES {
            let slot = BarSlot::Own(BarIndex::ZERO);
            let _ = self.pci[i].memory_write(slot, offset, data);
        }
    }

    fn pause(&self) {
        let close =
            |f: &Arc<VirtioFunction>| f.stop(Reasons::PAUSED, Patience::prompt(Duration::ZERO));
        assert!(self.functions.iter().all(close));
    }

    /// Paused, as a machine is that nothing was done to yet.
    fn fresh() -> Self {
        let machine = machine();
        machine.pause();
        machine
    }

    /// Registers, and those of the virtio functions. Their device configuration is of no interest here.
    fn restore(&self, from: &Self, state: &PciState) {
        self.root.restore(state).unwrap();
        for (to, from) in self.functions.iter().zip(&from.functions) {
            let config = to.save().config;
            let state = from.save();
            let transient = from.save_transient().unwrap();
            to.restore_exact(&FunctionState { config, ..state }, &transient)
                .unwrap();
        }
    }

    /// Where the guest finds what: the decode table, with the functions by name.
    fn decoded(&self) -> Vec<(Range<u64>, u64, BarSlot, String)> {
        let table = self.root.decode.load();
        let entries = table.entries().iter();
        entries
            .map(|e| {
                (
                    e.range.clone(),
                    e.base,
                    e.slot,
                    e.function.name().to_owned(),
                )
            })
            .collect()
    }

    fn doorbells(&self) -> Vec<(u64, Option<u16>)> {
        let doorbells = self.root.doorbells().into_iter();
        doorbells.map(|d| (d.address, d.datamatch)).collect()
    }

    /// Every route of every function.
    fn routes(&self) -> Vec<Vec<Option<MsiMessage>>> {
        let sinks = self.controller.sinks.lock().unwrap();
        let routes = sinks.iter().map(|sink| {
            let mut routes = sink.state.lock().unwrap().0.clone();
            routes.resize(16, None);
            routes
        });
        routes.collect()
    }

    fn fired(&self) -> bool {
        let sinks = self.controller.sinks.lock().unwrap();
        let mut events = sinks.iter().flat_map(|sink| sink.take());
        events.any(|event| matches!(event, SinkEvent::Fire(..)))
    }

    fn reasons(&self) -> Vec<Reasons> {
        self.functions.iter().map(|f| f.reasons()).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Registers, decoded addresses, doorbells, routes and gates are those of the original, and nothing is sent.
    #[test]
    fn what_is_saved_and_restored_is_the_same_bus(steps in prop::collection::vec(step(), 1..60)) {
        let machine = machine();
        for step in &steps {
            machine.run(step);
        }
        machine.pause();
        let state = machine.root.save();
        let other = Machine::fresh();
        prop_assert_eq!(other.root.check(&state), Ok(()));
        other.restore(&machine, &state);
        prop_assert!(!other.fired());
        prop_assert_eq!(other.root.save(), state);
        prop_assert_eq!(other.decoded(), machine.decoded());
        prop_assert_eq!(other.doorbells(), machine.doorbells());
        prop_assert_eq!(other.routes(), machine.routes());
        prop_assert_eq!(other.reasons(), machine.reasons());
        for (bus, devfn) in PLACES {
            let found = [&other, &machine].map(|m| m.root.function_at(bdf(bus, devfn)).is_some());
            prop_assert_eq!(found[0], found[1], "{}:{:#x}", bus, devfn);
        }
    }

    /// A state with one byte changed is refused, or is restored as it is. Nothing panics, and what is refused changes
    /// nothing.
    #[test]
    fn a_byte_that_was_changed_is_refused_or_restored(
        steps in prop::collection::vec(step(), 0..12),
        function in any::<prop::sample::Index>(),
        offset in prop_oneof![any::<u16>(), 0u16..0x148, 0x108u16..0x148],
        value in any::<u8>(),
    ) {
        let machine = machine();
        machine.run(&Step::Enable(2, 0));
        for step in &steps {
            machine.run(step);
        }
        machine.pause();
        let mut state = machine.root.save();
        let function = function.index(state.functions.len());
        let bytes = &mut state.functions[function].registers.config;
        let offset = usize::from(offset) % bytes.len();
        bytes[offset] = value;
        let other = Machine::fresh();
        let untouched = other.root.save();
        match other.root.check(&state) {
            Ok(()) => {
                prop_assert_eq!(other.root.restore(&state), Ok(()));
                prop_assert_eq!(other.root.save(), state);
            }
            Err(error) => {
                prop_assert_eq!(other.root.restore(&state), Err(error));
                prop_assert_eq!(other.root.save(), untouched);
            }
        }
        prop_assert!(!other.fired());
    }
}

fn place(text: &str) -> Place {
    text.parse().unwrap()
}

/// The state of a machine with two VFs, and whose functions are where.
fn two_vfs() -> PciState {
    let machine = machine();
    machine.run(&Step::Enable(2, 0));
    machine.pause();
    machine.root.save()
}

#[test]
fn only_functions_that_exist_are_in_the_state() {
    let places = |state: &PciState| -> Vec<(String, String)> {
        let functions = state.functions.iter();
        functions
            .map(|f| (f.place.to_string(), f.name.clone()))
            .collect()
    };
    let always = [
        ("00.0", "host bridge"),
        ("01.0", "held"),
        ("02.0", "held"),
        ("03.0", "root port"),
        ("03.0/00.0", "held"),
        ("04.0", "root port"),
        ("04.0/00.0", "pf"),
    ];
    let owned = |list: &[(&str, &str)]| -> Vec<(String, String)> {
        let list = list.iter();
        list.map(|(place, name)| ((*place).into(), (*name).into()))
            .collect()
    };
    assert_eq!(places(&machine().root.save()), owned(&always));
    let with_vfs = [&always[..], &[("04.0/00.1", "vf1"), ("04.0/00.2", "vf2")]].concat();
    assert_eq!(places(&two_vfs()), owned(&with_vfs));
}

#[test]
fn functions_that_are_missing_unknown_or_there_twice_are_named() {
    type Change = fn(&mut PciState);
    let cases: [(Change, PciStateError); 6] = [
        (
            |s| drop(s.functions.remove(1)),
            PciStateError::Missing {
                place: place("01.0"),
                name: "held".into(),
            },
        ),
        (
            |s| drop(s.functions.pop()),
            PciStateError::Missing {
                place: place("04.0/00.2"),
                name: "vf2".into(),
            },
        ),
        (
            |s| s.functions[1].place = place("1f.7"),
            PciStateError::Missing {
                place: place("01.0"),
                name: "held".into(),
            },
        ),
        (
            |s| {
                let mut extra = s.functions[8].clone();
                extra.place = place("04.0/00.3");
                s.functions.push(extra);
            },
            PciStateError::Unknown {
                place: place("04.0/00.3"),
                name: "vf2".into(),
            },
        ),
        (
            |s| s.functions.push(s.functions[3].clone()),
            PciStateError::Duplicate(place("03.0")),
        ),
        (
            |s| s.functions[8].name = "vf3".into(),
            PciStateError::Name {
                place: place("04.0/00.2"),
                saved: "vf3".into(),
                own: "vf2".into(),
            },
        ),
    ];
    let machine = Machine::fresh();
    let untouched = machine.root.save();
    for (change, error) in cases {
        let mut state = two_vfs();
        change(&mut state);
        assert_eq!(machine.root.restore(&state), Err(error));
    }
    assert_eq!(machine.root.save(), untouched);
}

#[test]
fn registers_that_no_guest_can_bring_about_are_refused() {
    type Change = fn(&mut PciState);
    const PF: usize = 6;
    const SRIOV: usize = 0x108;
    let cases: [(usize, Change, RegistersError); 11] = [
        (
            PF,
            |s| s.functions[PF].registers.config.truncate(0x147),
            ConfigStateError::Length {
                saved: 0x147,
                own: 0x148,
            }
            .into(),
        ),
        (
            1,
            |s| s.functions[1].registers.config[2] = 0x41,
            ConfigStateError::Byte {
                offset: 2,
                saved: 0x41,
                own: 0x42,
            }
            .into(),
        ),
        (
            PF,
            // An address within the BAR's size.
            |s| s.functions[PF].registers.config[0x11] |= 0x10,
            ConfigStateError::Byte {
                offset: 0x11,
                saved: 0x10,
                own: 0,
            }
            .into(),
        ),
        (
            3,
            // A port does not report errors.
            |s| s.functions[3].registers.config[0x07] |= 0x80,
            ConfigStateError::Byte {
                offset: 7,
                saved: 0x80,
                own: 0,
            }
            .into(),
        ),
        (
            PF,
            |s| s.functions[PF].registers.config[SRIOV + 0x10] = VFS + 1,
            SriovStateError::NumVfs {
                num_vfs: 5,
                total: 4,
            }
            .into(),
        ),
        (
            PF,
            |s| s.functions[PF].registers.config[SRIOV + 0x20] = 3,
            SriovStateError::PageSize(3).into(),
        ),
        (
            PF,
            |s| {
                let config = &mut s.functions[PF].registers.config;
                config[SRIOV + 0x20] = 0x10;
                config[SRIOV + 0x24] = 0x0c;
                config[SRIOV + 0x25] = 0x40;
            },
            SriovStateError::Bar {
                address: 0x10_0010_4000,
                size: 0x1_0000,
            }
            .into(),
        ),
        (
            1,
            |s| s.functions[1].registers.msix = None,
            RegistersError::NoMsix,
        ),
        (
            3,
            |s| s.functions[3].registers.msix = s.functions[1].registers.msix.clone(),
            RegistersError::Msix,
        ),
        (
            1,
            |s| s.functions[1].registers.config[0x7f] |= 0x80,
            RegistersError::Control,
        ),
        (
            8,
            |s| s.functions[8].registers.msix.as_mut().unwrap().pending = vec![0],
            MsixStateError::Pending(0).into(),
        ),
    ];
    let machine = Machine::fresh();
    let untouched = machine.root.save();
    for (index, change, source) in cases {
        let mut state = two_vfs();
        change(&mut state);
        let function = &state.functions[index];
        let error = PciStateError::Function {
            place: function.place,
            name: function.name.clone(),
            source,
        };
        assert_eq!(machine.root.restore(&state), Err(error));
    }
    assert_eq!(machine.root.save(), untouched);
}

#[test]
fn a_function_that_runs_is_not_restored() {
    let error = machine().root.restore(&two_vfs()).unwrap_err();
    assert_eq!(
        error,
        PciStateError::Function {
            place: place("01.0"),
            name: "held".into(),
            source: RegistersError::Running,
        }
    );
}

#[test]
fn vfs_that_come_to_exist_by_a_restore_keep_their_state() {
    let machine = machine();
    machine.run(&Step::Enable(2, 0));
    machine.run(&Step::Start(PF + 2));
    machine.pause();
    let other = Machine::fresh();
    other.restore(&machine, &machine.root.save());
    let vf2 = &other.functions[PF + 2 - FIRST];
    assert!(vf2.is_live());
    assert_eq!(vf2.reasons(), Reasons::PAUSED);
    assert_eq!(other.doorbells().len(), 1);
}
