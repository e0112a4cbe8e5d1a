//! Finding functions.

use std::fmt;

use super::header;
use crate::access::{Function, FunctionExt};

/// Where a function is. Displays as `00:01.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// Bus number.
    pub bus: u8,
    /// Device number in bits 7:3, function number in bits 2:0.
    pub devfn: u8,
}

impl Address {
    /// The function `function` (0 to 7) of device `device` (0 to 31) on `bus`.
    pub const fn new(bus: u8, device: u8, function: u8) -> Self {
        Self {
            bus,
            devfn: device << 3 | function & 7,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:02x}:{:02x}.{}",
            self.bus,
            self.devfn >> 3,
            self.devfn & 7
        )
    }
}

/// A function that answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where.
    pub address: Address,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// For a bridge, the bus behind it.
    pub secondary_bus: Option<u8>,
}

/// The functions on `bus` and behind its bridges, in the order of a depth-first walk. `open` reaches a function, whether there is one or not.
///
/// A bridge whose secondary bus is not above its own is not followed, so the walk ends whatever the registers say.
pub fn scan<F: Function>(bus: u8, open: &dyn Fn(Address) -> F) -> Vec<Found> {
    let mut found = Vec::new();
    walk(bus, open, &mut found);
    found
}

fn walk<F: Function>(bus: u8, open: &dyn Fn(Address) -> F, found: &mut Vec<Found>) {
    for device in 0..32 {
        let mut functions = 1;
        let mut number = 0;
        while number < functions {
            let address = Address::new(bus, device, number);
            number += 1;
            let function = open(address);
            let vendor: u16 = function.config(header::VENDOR_ID);
            if vendor == 0xffff {
                continue;
            }
            let kind: u8 = function.config(header::HEADER_TYPE);
            if kind & 0x80 != 0 {
                functions = 8;
            }
            let secondary_bus =
                (kind & 0x7f == 1).then(|| function.config::<u8>(header::SECONDARY_BUS));
            found.push(Found {
                address,
                vendor,
                device: function.config(header::DEVICE_ID),
                secondary_bus,
            });
            if let Some(behind) = secondary_bus.filter(|behind| *behind > bus) {
                walk(behind, open, found);
            }
        }
    }
}
