//! The configuration space of an SR-IOV owner and its virtual functions.

use std::sync::Arc;

use devices::admin::{Options, Owner};
use devices::virtio::VirtioFunction;
use driver::access::{Function, FunctionExt};
use driver::host::{HostFunction, Machine, Shape, VirtualFunction};
use driver::pci::{
    Address, change_command, command, find_extended_capability, header, id, request_flr,
};
use driver::virtio::{Layout, NO_VECTOR, Transport, common, feature};
use pci::owner::{self, OwnerPci};

use crate::fixture::{assert_works, check_doorbells, check_interrupts, loopback};
use crate::input::Input;

const TOTAL: u8 = 5;
/// Bytes of the SR-IOV capability.
const LEN: u16 = 0x40;
const CONTROL: u16 = 0x08;
const NUM_VFS: u16 = 0x10;
const VF_BAR0: u16 = 0x24;
/// Bridge Control of the port, with its secondary bus reset.
const BRIDGE_CONTROL: u16 = 0x3e;
const SECONDARY_BUS_RESET: u16 = 1 << 6;
/// VF Enable and VF MSE.
const ON: u16 = 0x09;

struct Group {
    machine: Machine,
    owner: Arc<Owner>,
    port: HostFunction,
    bus: u8,
    /// Where the SR-IOV capability is.
    capability: u16,
}

/// A guest that writes configuration space of the PF, of VFs that may not be there, and BARs of both, between enables,
/// drivers that start, and resets of every kind: after each step the VFs that answer are those the capability says.
pub fn sriov_config(data: &[u8]) {
    let mut input = Input::new(data);
    let group = Group::new();
    while !input.is_empty() {
        let (enabled, vfs) = (group.enabled() != 0, group.register(NUM_VFS));
        group.step(&mut input);
        assert!(group.machine.settle(), "a device never rests");
        group.check();
        // A reset alone takes NumVFs back while VFs are enabled.
        let now = group.register(NUM_VFS);
        let reset = now == 0 && group.register(CONTROL) & 1 == 0;
        assert!(
            !enabled || now == vfs || reset,
            "NumVFs went from {vfs} to {now}"
        );
    }
    group.recover();
}

impl Group {
    fn new() -> Self {
        let machine = Machine::new().expect("machine");
        let function = || loopback(Shape::default()).0;
        let view = || machine.dma().ram().view().expect("view");
        let members: Vec<_> = (1..=TOTAL)
            .map(|n| VirtioFunction::new(format!("vf{n}"), function(), view()).expect("events"))
            .collect();
        let owner = Owner::new(
            members.iter().map(|vf| Arc::clone(vf) as _).collect(),
            Options::default(),
        )
        .expect("descriptors");
        let pf = VirtioFunction::new_owner("pf", function(), view(), Arc::clone(&owner));
        let pf = pf.expect("events");
        for function in members.iter().chain([&pf]) {
            machine.serve(function).expect("events");
        }
        let shown = OwnerPci::new(pf, members, machine.msi(), owner::Options::default());
        let port = machine.root().add_root_port(shown.expect("an owner"));
        let port = port.expect("a place");
        machine.power_on().expect("addresses");
        let bus = machine.root().secondary_bus(port).expect("a bridge").0;
        let port = machine.function(Address {
            bus: port.bus.0,
            devfn: port.devfn.0,
        });
        let mut group = Self {
            machine,
            owner,
            port,
            bus,
            capability: 0,
        };
        let capability = find_extended_capability(&group.at(0), id::EXT_SRIOV);
        group.capability = capability.expect("a list").expect("SR-IOV").offset;
        change_command(&group.at(0), command::MEMORY | command::BUS_MASTER, 0);
        group
    }

    fn at(&self, devfn: u8) -> HostFunction {
        self.machine.function(Address {
            bus: self.bus,
            devfn,
        })
    }

    fn vf(&self, number: u8) -> VirtualFunction {
        VirtualFunction::new(&self.at(0), number)
            .expect("a list")
            .expect("SR-IOV")
    }

    fn register(&self, at: u16) -> u16 {
        self.at(0).config(self.capability + at)
    }

    fn set_register(&self, at: u16, value: u16) {
        self.at(0).set_config(self.capability + at, value);
    }

    /// NumVFs if VF Enable is set.
    fn enabled(&self) -> u16 {
        let enable = self.register(CONTROL) & 1;
        enable * self.register(NUM_VFS)
    }

    fn step(&self, input: &mut Input<'_>) {
        let number = 1 + input.pick(TOTAL + 1);
        let width = 1 << input.pick(4);
        let mut bytes = [0; 8];
        let bytes = bytes.get_mut(..width).unwrap_or_default();
        match input.pick(12) {
            0..=2 => {
                let at = self.capability + input.word() % LEN;
                bytes.fill_with(|| input.byte());
                self.at(0).write_config(at, bytes);
            }
            3 => {
                let at = input.word() % 4096;
                bytes.fill_with(|| input.byte());
                self.at(input.pick(TOTAL + 2)).write_config(at, bytes);
            }
            4 | 5 => {
                self.set_register(NUM_VFS, input.pick(TOTAL + 2).into());
                self.set_register(CONTROL, u16::from(input.pick(32)));
            }
            6 => {
                let devfn = input.pick(TOTAL + 1);
                request_flr(&self.at(devfn));
                if devfn == 0 {
                    // As a driver does that wants it back.
                    self.machine.power_on().expect("addresses");
                    change_command(&self.at(0), command::MEMORY | command::BUS_MASTER, 0);
                }
            }
            7 => {
                self.port.set_config(BRIDGE_CONTROL, SECONDARY_BUS_RESET);
                self.port.set_config(BRIDGE_CONTROL, 0u16);
            }
            8 => {
                let at = u64::from(input.word()) % 0x4010;
                bytes.fill_with(|| input.byte());
                self.vf(number).write_bar(0, at, bytes);
            }
            9 => change_command(&self.vf(number), command::BUS_MASTER, 0),
            10 => self.vf(number).read_bar(0, input.word().into(), bytes),
            _ => self.start(number),
        }
    }

    /// A driver brings a VF up with one queue, if it can.
    fn start(&self, number: u8) {
        let vf = self.vf(number);
        change_command(&vf, command::BUS_MASTER, 0);
        let Ok(transport) = Transport::new(vf) else {
            return;
        };
        // Whether it answers in its BAR is for the capability to say.
        let queues: u16 = transport.get(common::NUM_QUEUES);
        if queues != u16::MAX {
            transport.negotiate(feature::EVENT_IDX).expect("features");
            let layout = Layout::allocate(self.machine.dma(), 8).expect("memory");
            transport
                .enable_queue(0, &layout, NO_VECTOR)
                .expect("a queue");
            transport.start();
        }
    }

    /// Compares everything that depends on which VFs exist with what the capability says.
    fn check(&self) {
        let enabled = self.enabled();
        assert!(self.register(NUM_VFS) <= TOTAL.into());
        for number in 1..=TOTAL + 1 {
            let class: u32 = self.at(number).config(header::REVISION);
            let there = u16::from(number) <= enabled;
            assert_eq!(class != u32::MAX, there, "VF {number} of {enabled}");
        }
        let members: Vec<_> = self.owner.members().map(|(id, _)| id.0).collect();
        assert_eq!(members, (1..=enabled).collect::<Vec<_>>());
        check_doorbells(&self.machine);
        check_interrupts(&self.machine);
    }

    /// Resets everything and gives it addresses again, as firmware does: then all VFs work.
    fn recover(&self) {
        self.port.set_config(BRIDGE_CONTROL, 0u16);
        assert!(request_flr(&self.at(0)), "no FLR");
        assert_eq!(self.enabled(), 0, "FLR of the PF takes its VFs away");
        self.machine.power_on().expect("addresses");
        change_command(&self.at(0), command::MEMORY | command::BUS_MASTER, 0);
        self.set_register(NUM_VFS, TOTAL.into());
        self.set_register(CONTROL, ON);
        self.check();
        for number in 1..=TOTAL {
            let vf = self.vf(number);
            change_command(&vf, command::BUS_MASTER, 0);
            assert_works(&self.machine, vf);
        }
        let low: u32 = self.at(0).config(self.capability + VF_BAR0);
        assert_ne!(low & !0xf, 0, "the VFs have addresses");
    }
}
