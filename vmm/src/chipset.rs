//! The few port I/O devices of the machine: power and reset registers, and the panic device. And what stands in guest
//! memory beside them: the instructions that reset the machine, and the VM generation ID.
//!
//! | port | width | what |
//! |---|---|---|
//! | `0x3f8..0x400` | 1 | COM1, a 16550A ([`crate::serial`]) |
//! | `0x505` | 1 | panic device (pvpanic): reads the events it knows, a write reports one |
//! | `0x600` | 1 | ACPI sleep control: sleep type in bits 4:2, bit 5 enters it |
//! | `0x601` | 1 | ACPI sleep status: reads 0 |
//! | `0x602` | 1 | ACPI reset register: a write of 1 resets |

use std::io;
use std::sync::Arc;

use devices::bus::{Bus, BusDevice, BusError, Effect};
use devices::memory::View;
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::exit::Outcome;
use crate::layout;
use crate::vcpu::Control;

/// First of the eight ports of COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// Interrupt line of COM1.
pub const COM1_IRQ: u32 = 4;
/// Interrupt line of the generic event device for the power button.
pub const POWER_BUTTON_IRQ: u32 = 5;
/// Interrupt line of the generic event device for a change of the [`VmGeneration`].
pub const VM_GENERATION_IRQ: u32 = 6;
/// Port of the panic device.
pub const PANIC_PORT: u16 = 0x505;
/// ACPI sleep control register.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register.
pub const RESET_PORT: u16 = 0x602;
/// What resets when written to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 1;

/// What stands at [`crate::layout::RESET_VECTOR`], in 16-bit code: writes [`RESET_VALUE`] to [`RESET_PORT`].
///
/// Linux takes hardware-reduced ACPI for a promise of EFI, and without EFI ignores the reset register: it goes back to
/// real mode and jumps to where firmware would be.
pub const RESET_STUB: [u8; 9] = [
    0xb0,
    RESET_VALUE, // mov al, RESET_VALUE
    0xba,
    RESET_PORT as u8,
    (RESET_PORT >> 8) as u8, // mov dx, RESET_PORT
    0xee,                    // out dx, al
    0xf4,                    // hlt
    0xeb,
    0xfd, // jmp to the hlt
];

/// Power-off: sleep type 5, and the bit that enters it.
const ENTER_S5: u8 = 5 << 2 | 1 << 5;
/// The bits of the sleep control register that count.
const SLEEP_MASK: u8 = 0b11_1100;

/// Events of the panic device: the kernel panicked.
const PANICKED: u8 = 1;
/// The kernel panicked and a crash kernel takes over: the guest goes on.
const CRASH_LOADED: u8 = 2;

/// The VM generation ID: a random number that a guest reads in its memory, and that is another one in every VM that went
/// on from the same state. Its kernel seeds its random numbers anew when it is told of a change.
///
/// A new machine gets one before it boots. A machine that was restored gets another one before its vCPUs run, and then one
/// interrupt on [`VM_GENERATION_IRQ`]. One that moved, and runs nowhere else, keeps what is in its memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct VmGeneration([u8; Self::LEN]);

impl VmGeneration {
    /// Bytes of the identifier.
    pub const LEN: usize = 16;

    /// One that no other machine has.
    pub fn random() -> io::Result<Self> {
        let mut id = [0; Self::LEN];
        let mut filled = 0;
        while let Some(rest) = id.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match getrandom(rest, GetRandomFlags::empty()) {
                Ok(more) => filled += more,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self(id))
    }

    /// Writes it to where the guest reads it, [`layout::VM_GENERATION_ID`]. The guest must not run: it would see a part.
    pub fn write(&self, memory: &View) -> Result<(), GuestMemoryError> {
        memory.write_slice(&self.0, GuestAddress(layout::VM_GENERATION_ID))
    }
}

/// Maps the power, reset and panic registers.
pub fn attach(ports: &Bus, control: &Arc<Control>) -> Result<(), BusError> {
    let power = Power(Arc::clone(control));
    let sleep = u64::from(SLEEP_CONTROL_PORT);
    ports.insert(sleep..u64::from(RESET_PORT) + 1, Arc::new(power))?;
    let panic = PanicDevice(Arc::clone(control));
    let port = u64::from(PANIC_PORT);
    ports.insert(port..port + 1, Arc::new(panic))
}

struct Power(Arc<Control>);

impl BusDevice for Power {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        match (offset, data) {
            (0, [value]) if value & SLEEP_MASK == ENTER_S5 => self.0.finish(Outcome::PowerOff),
            (2, [RESET_VALUE]) => self.0.finish(Outcome::Reset {
                triple_fault: false,
            }),
            _ => {}
        }
        Effect::None
    }
}

struct PanicDevice(Arc<Control>);

impl BusDevice for PanicDevice {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Effect {
        match data {
            [events] if events & CRASH_LOADED != 0 => {
                tracing::warn!("the guest's kernel panicked; its crash kernel takes over");
            }
            [events] if events & PANICKED != 0 => self.0.finish(Outcome::Panic),
            _ => {}
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use devices::memory::GuestRam;

    use super::*;

    fn outcome_of(port: u16, data: &[u8]) -> Option<Outcome> {
        let control = Arc::new(Control::new(1).unwrap());
        let ports = Bus::new();
        attach(&ports, &control).unwrap();
        let _ = ports.write(u64::from(port), data);
        control.outcome()
    }

    #[test]
    fn the_documented_writes_end_the_guest_and_no_other() {
        let reset = Outcome::Reset {
            triple_fault: false,
        };
        let cases: [(u16, &[u8], Option<Outcome>); 11] = [
            (0x600, &[0x34], Some(Outcome::PowerOff)),
            (0x600, &[0x14], None),
            (0x600, &[0x2c], None),
            (0x600, &[0x34, 0], None),
            (0x601, &[0x80], None),
            (0x602, &[1], Some(reset)),
            (0x602, &[0], None),
            (0x505, &[1], Some(Outcome::Panic)),
            (0x505, &[2], None),
            (0x505, &[0], None),
            (0x505, &[], None),
        ];
        for (port, data, expected) in cases {
            assert_eq!(outcome_of(port, data), expected, "{port:#x} {data:?}");
        }
    }

    #[test]
    fn every_generation_is_another_one_and_stands_where_acpi_says() {
        let ram = GuestRam::new(&layout::ram_ranges(layout::MIN_RAM)).unwrap();
        let view = ram.view().unwrap();
        let mut seen = Vec::new();
        for _ in 0..3 {
            VmGeneration::random().unwrap().write(&view).unwrap();
            let mut around = [0; 32];
            let at = GuestAddress(layout::VM_GENERATION_ID - 8);
            view.read_slice(&mut around, at).unwrap();
            assert_eq!((&around[..8], &around[24..]), (&[0; 8][..], &[0; 8][..]));
            assert!(!seen.contains(&around));
            assert_ne!(around, [0; 32]);
            seen.push(around);
        }
    }

    #[test]
    fn the_panic_device_says_what_it_understands() {
        let ports = Bus::new();
        attach(&ports, &Arc::new(Control::new(1).unwrap())).unwrap();
        let mut data = [0xaa; 1];
        ports.read(0x505, &mut data);
        assert_eq!(data, [3]);
    }
}
