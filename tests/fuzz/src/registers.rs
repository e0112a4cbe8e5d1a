//! Configuration space and the virtio-pci registers.

use driver::access::{Function, FunctionExt};
use driver::host::{ECAM, HostFunction, MMIO32, MMIO64};
use driver::pci::{Address, MsiX, change_command, command, header, request_flr};
use driver::virtio::{Layout, Transport, common};

use crate::fixture::{Board, assert_works};
use crate::input::Input;

/// Bridge Control of the port, with its secondary bus reset.
const BRIDGE_CONTROL: u16 = 0x3e;

/// A guest that reads and writes configuration space and what BARs it finds: identities stay, the doorbells that are
/// registered are the ones that should be, interrupts have a route, and after a reset everything works.
pub fn pci_config(data: &[u8]) {
    let mut input = Input::new(data);
    let board = Board::new();
    while !input.is_empty() {
        let place = any_place(&mut input, &board);
        let width = 1 << input.pick(4);
        let mut bytes = [0; 8];
        let bytes = bytes.get_mut(..width).unwrap_or_default();
        match input.pick(8) {
            0..=3 => {
                let offset = input.word() % 4096;
                fill(&mut input, bytes);
                place.write_config(offset, bytes);
            }
            4 => place.read_config(input.word() % 4096, bytes),
            5 => {
                let address = any_address(&mut input, &place);
                fill(&mut input, bytes);
                board.machine.write(address, bytes);
            }
            6 => {
                let address = any_address(&mut input, &place);
                board.machine.read(address, bytes);
            }
            _ => likely_write(&mut input, &place),
        }
        board.settle();
        check(&board);
    }
    recover(&board);
}

fn any_place(input: &mut Input<'_>, board: &Board) -> HostFunction {
    match input.pick(8) {
        0..=2 => board.functions[0].clone(),
        3 | 4 => board.functions[1].clone(),
        5 | 6 => board.port(),
        _ => board.machine.function(Address {
            bus: input.pick(16),
            devfn: input.byte(),
        }),
    }
}

fn fill(input: &mut Input<'_>, bytes: &mut [u8]) {
    bytes.fill_with(|| input.byte());
}

fn any_address(input: &mut Input<'_>, place: &HostFunction) -> u64 {
    let offset = u64::from(input.word());
    match input.pick(8) {
        0 => MMIO32.start + offset * 16,
        1 => MMIO64.start + offset * 16,
        2 => MMIO64.end - offset % 64,
        3 => ECAM.start + offset * 256,
        _ => place.bar_address(0, offset % 0x4010),
    }
}

/// Writes that lead somewhere: switches, BARs among the others', resets, bus numbers.
fn likely_write(input: &mut Input<'_>, place: &HostFunction) {
    match input.pick(6) {
        0 => place.set_config(header::COMMAND, input.word()),
        1 => place.set_config(
            header::BAR0,
            u32::from(input.pick(8)) * 0x4000 + MMIO64.start as u32,
        ),
        2 => place.set_config(header::BAR0 + 4, (MMIO64.start >> 32) as u32),
        3 => {
            request_flr(place);
        }
        4 => place.set_config(0x18, u32::from(input.pick(4)) << 8 | 0x10_0000),
        _ => {
            if let Ok(Some(msix)) = MsiX::find(place) {
                let bits = input.byte();
                msix.set_control(place, bits & 1 != 0, bits & 2 != 0);
            }
        }
    }
}

fn check(board: &Board) {
    let identity: u32 = board.functions[0].config(header::VENDOR_ID);
    assert_eq!(identity, 0x1044_1af4, "the device on the root bus is gone");
    let identity: u32 = board.port().config(header::VENDOR_ID);
    assert_ne!(identity, u32::MAX, "the port is gone");
    board.check_doorbells();
    board.check_interrupts();
}

/// Resets everything and gives it addresses again, as firmware does.
fn recover(board: &Board) {
    board.port().set_config(BRIDGE_CONTROL, 0u16);
    board.machine.power_on().expect("addresses");
    for function in &board.functions {
        assert!(request_flr(function), "no FLR");
    }
    board.machine.power_on().expect("addresses");
    for function in &board.functions {
        change_command(function, command::MEMORY | command::BUS_MASTER, 0);
    }
    for function in &board.functions {
        assert_works(&board.machine, function);
    }
}

/// A driver that writes any register of the BAR, with queues at hand that could be enabled: the device comes to rest,
/// the doorbells that are registered are the ones that should be, interrupts have a route, and after a reset it works.
pub fn virtio_registers(data: &[u8]) {
    let mut input = Input::new(data);
    let board = Board::new();
    let function = &board.functions[usize::from(input.pick(2))];
    let transport = Transport::new(function.clone()).expect("capabilities");
    let msix = *transport.msix().expect("MSI-X");
    let layouts = [8, 16].map(|size| Layout::allocate(board.machine.dma(), size).expect("memory"));
    while !input.is_empty() {
        match input.pick(8) {
            0..=2 => any_access(&mut input, function, transport.common_region().offset, 64),
            3 => any_access(&mut input, function, msix.table.offset, msix.table.len),
            4 => any_access(&mut input, function, 0, 0x4010),
            5 => {
                let queue = u16::from(input.pick(3));
                let layout = layouts[usize::from(input.pick(2))];
                let vector = u16::from(input.pick(5));
                let _ = transport.program_queue(queue, &layout, vector);
                transport.set(common::QUEUE_ENABLE, 1);
            }
            6 => {
                let bits = [0, 1, 2, 4, 8, 0x80];
                transport.accept(transport.offered() & !(u64::from(input.pick(4)) << 28));
                transport.add_status(bits[usize::from(input.pick(6))]);
            }
            _ => {
                let bits = input.byte();
                msix.set_control(function, bits & 1 != 0, bits & 2 != 0);
            }
        }
        board.settle();
        board.check_doorbells();
        board.check_interrupts();
    }
    assert_works(&board.machine, function);
}

fn any_access(input: &mut Input<'_>, function: &HostFunction, start: u64, len: u64) {
    let choice = input.byte();
    let width = 1 << (choice & 3);
    let mut offset = u64::from(input.word()) % len;
    if choice & 4 == 0 {
        offset &= !(width as u64 - 1);
    }
    let mut bytes = [0; 8];
    let bytes = bytes.get_mut(..width).unwrap_or_default();
    if choice & 0x18 == 0 {
        function.read_bar(0, start + offset, bytes);
    } else {
        fill(input, bytes);
        function.write_bar(0, start + offset, bytes);
    }
}
