//! Base address registers.

use super::{command, header};
use crate::access::{Function, FunctionExt};

/// What a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes this register and the next.
    Memory64,
}

/// An implemented BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its number, 0 to 5.
    pub index: u8,
    /// What it decodes.
    pub kind: BarKind,
    /// True if reads have no side effects.
    pub prefetchable: bool,
    /// Where it is.
    pub address: u64,
    /// How long it is, in bytes.
    pub size: u64,
}

fn register(index: u8) -> u16 {
    header::BAR0 + 4 * u16::from(index)
}

/// The BARs of a function with a type 0 header, sized by writing ones. Decoding is off meanwhile; afterwards the
/// registers are as before.
pub fn bars(function: &impl Function) -> Vec<Bar> {
    let old: u16 = function.config(header::COMMAND);
    function.set_config(header::COMMAND, old & !(command::MEMORY | 1));
    let mut list = Vec::new();
    let mut index = 0;
    while index < 6 {
        let low: u32 = function.config(register(index));
        let kind = match (low & 1, low >> 1 & 3) {
            (1, _) => BarKind::Io,
            (_, 2) if index < 5 => BarKind::Memory64,
            _ => BarKind::Memory32,
        };
        let wide = kind == BarKind::Memory64;
        let flags: u32 = if kind == BarKind::Io { 3 } else { 0xf };
        let address = u64::from(low & !flags) | upper(function, index, wide);
        function.set_config(register(index), u32::MAX);
        let mut mask = u64::from(function.config::<u32>(register(index)) & !flags);
        function.set_config(register(index), low);
        if wide {
            let high = upper(function, index, true);
            function.set_config(register(index + 1), u32::MAX);
            mask |= upper(function, index, true);
            function.set_config(register(index + 1), (high >> 32) as u32);
        } else if mask != 0 {
            mask |= 0xffff_ffff_0000_0000;
        }
        if mask != 0 {
            list.push(Bar {
                index,
                kind,
                prefetchable: kind != BarKind::Io && low & 8 != 0,
                address,
                size: mask & mask.wrapping_neg(),
            });
        }
        index += if wide { 2 } else { 1 };
    }
    function.set_config(header::COMMAND, old);
    list
}

/// The upper 32 bits of the address in BAR `index`, if it is `wide`.
fn upper(function: &impl Function, index: u8, wide: bool) -> u64 {
    if wide {
        u64::from(function.config::<u32>(register(index + 1))) << 32
    } else {
        0
    }
}

/// Moves a BAR to `address`, as two 32-bit writes for a 64-bit BAR. The caller turns decoding off around it, or
/// means not to.
pub fn set_bar_address(function: &impl Function, bar: &Bar, address: u64) {
    function.set_config(register(bar.index), address as u32);
    if bar.kind == BarKind::Memory64 {
        function.set_config(register(bar.index + 1), (address >> 32) as u32);
    }
}
