//! The DSDT: what a kernel cannot find by probing.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Or, Package, Path, ResourceTemplate,
    Return, Scope, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, Platform};
use crate::{chipset, layout};

/// `_OSC` capabilities of a PCI host bridge.
const OSC_PCI: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// What the kernel may control: the PCI Express capability structures, and nothing we do not have.
const OSC_GRANTED: u32 = 1 << 4;
/// First dword of an `_OSC` answer: the UUID is unknown.
const OSC_UNKNOWN_UUID: u32 = 1 << 2;

/// What a VM generation ID device is called, whoever makes it.
const VM_GENERATION: &str = "VM_Gen_Counter";
/// Notification of a device: of a button that it was pressed, of the VM generation ID that it changed.
const STATUS_CHANGE: u8 = 0x80;

/// Bytes that are AML already.
pub(super) struct Raw(Vec<u8>);

impl Raw {
    fn of(parts: &[&dyn Aml]) -> Self {
        let mut bytes = Vec::new();
        for part in parts {
            part.to_aml_bytes(&mut bytes);
        }
        Self(bytes)
    }
}

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

pub(super) fn dsdt(platform: &Platform) -> Raw {
    let five = 5u8;
    let body = Raw::of(&[
        &Scope::new(
            Path::new("_SB_"),
            vec![
                &host_bridge(platform),
                &configuration_space(),
                &serial_port(),
                &power_button(),
                &generation_device(),
                &event_device(),
                &panic_device(),
            ],
        ),
        // The only sleep state: power-off.
        &Name::new(Path::new("_S5_"), &Package::new(vec![&five])),
    ]);
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&body.0);
    Raw(table.as_slice().to_vec())
}

fn id(hid: &str) -> Name {
    Name::new(Path::new("_HID"), &EISAName::new(hid))
}

fn uid() -> Name {
    Name::new(Path::new("_UID"), &ZERO)
}

fn resources(list: Vec<&dyn Aml>) -> Name {
    Name::new(Path::new("_CRS"), &ResourceTemplate::new(list))
}

/// The PCI Express host bridge: buses, memory windows, and which features the kernel may use.
fn host_bridge(platform: &Platform) -> Raw {
    let low = layout::PCI_MMIO32;
    let high = &platform.mmio64;
    let low = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        low.start as u32,
        (low.end - 1) as u32,
        None,
    );
    let high = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        high.start,
        high.end - 1,
        None,
    );
    let crs = resources(vec![
        &AddressSpace::new_bus_number(0u16, u16::from(platform.last_bus())),
        &low,
        &high,
    ]);
    let cid = Name::new(Path::new("_CID"), &EISAName::new("PNP0A03"));
    let segment = Name::new(Path::new("_SEG"), &ZERO);
    let bus = Name::new(Path::new("_BBN"), &ZERO);
    let coherent = Name::new(Path::new("_CCA"), &1u8);
    Raw::of(&[&Device::new(
        Path::new("PCI0"),
        vec![
            &id("PNP0A08"),
            &cid,
            &uid(),
            &segment,
            &bus,
            &coherent,
            &crs,
            &osc(),
        ],
    )])
}

/// `_OSC`: masks the third dword of the request, which asks for control, with what is granted.
fn osc() -> Raw {
    let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
    let buffer = Arg(3);
    Raw::of(&[&Method::new(
        Path::new("_OSC"),
        4,
        false,
        vec![
            &CreateDWordField::new(&status, &buffer, &0u8),
            &If::new(
                &Equal::new(&Arg(0), &Uuid::new(OSC_PCI)),
                vec![
                    &CreateDWordField::new(&control, &buffer, &8u8),
                    &And::new(&control, &control, &OSC_GRANTED),
                ],
            ),
            &Else::new(vec![&Or::new(&status, &status, &OSC_UNKNOWN_UUID)]),
            &Return::new(&buffer),
        ],
    )])
}

/// Reserves the configuration space window. Linux ignores an MCFG whose window no device has reserved.
fn configuration_space() -> Raw {
    let window = layout::PCI_ECAM;
    let crs = resources(vec![&Memory32Fixed::new(
        true,
        window.start as u32,
        (window.end - window.start) as u32,
    )]);
    Raw::of(&[&Device::new(
        Path::new("ECAM"),
        vec![&id("PNP0C02"), &uid(), &crs],
    )])
}

fn serial_port() -> Raw {
    let crs = resources(vec![
        &IO::new(chipset::COM1_PORT, chipset::COM1_PORT, 1, 8),
        &Interrupt::new(true, true, false, false, chipset::COM1_IRQ),
    ]);
    Raw::of(&[&Device::new(
        Path::new("COM1"),
        vec![&id("PNP0501"), &uid(), &crs],
    )])
}

fn power_button() -> Raw {
    Raw::of(&[&Device::new(
        Path::new("PWRB"),
        vec![&id("PNP0C0C"), &uid()],
    )])
}

/// The VM generation ID device: `ADDR` says where the identifier is, as the low and high half of an address. Linux and
/// Windows bind to it by its compatible ID.
fn generation_device() -> Raw {
    let hid = Name::new(Path::new("_HID"), &"TERN0001");
    let cid = Name::new(Path::new("_CID"), &VM_GENERATION);
    let description = Name::new(Path::new("_DDN"), &VM_GENERATION);
    let address = layout::VM_GENERATION_ID;
    let (low, high) = (address as u32, (address >> 32) as u32);
    let halves = Package::new(vec![&low, &high]);
    let answer = Return::new(&halves);
    let address = Method::new(Path::new("ADDR"), 0, false, vec![&answer]);
    Raw::of(&[&Device::new(
        Path::new("VGEN"),
        vec![&hid, &uid(), &cid, &description, &address],
    )])
}

/// The generic event device. Each event has an interrupt of its own, whose number `_EVT` is given.
fn event_device() -> Raw {
    let events = [
        (chipset::POWER_BUTTON_IRQ, "PWRB"),
        (chipset::VM_GENERATION_IRQ, "VGEN"),
    ];
    let interrupts = events.map(|(line, _)| Interrupt::new(true, true, false, false, line));
    let crs = resources(interrupts.iter().map(|i| i as &dyn Aml).collect());
    let hid = Name::new(Path::new("_HID"), &"ACPI0013");
    let branches = events.map(|(line, device)| {
        let device = Path::new(device);
        Raw::of(&[&If::new(
            &Equal::new(&Arg(0), &line),
            vec![&Notify::new(&device, &STATUS_CHANGE)],
        )])
    });
    let branches = branches.iter().map(|b| b as &dyn Aml).collect();
    let event = Method::new(Path::new("_EVT"), 1, true, branches);
    Raw::of(&[&Device::new(
        Path::new("GED_"),
        vec![&hid, &uid(), &crs, &event],
    )])
}

fn panic_device() -> Raw {
    let crs = resources(vec![&IO::new(
        chipset::PANIC_PORT,
        chipset::PANIC_PORT,
        1,
        1,
    )]);
    let hid = Name::new(Path::new("_HID"), &"QEMU0001");
    let status = Name::new(Path::new("_STA"), &0xfu8);
    Raw::of(&[&Device::new(
        Path::new("PEVT"),
        vec![&hid, &uid(), &status, &crs],
    )])
}
