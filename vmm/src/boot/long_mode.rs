//! The processor state a 64-bit kernel expects at its entry: flat segments, the first GiB identity-mapped.

use devices::memory::View;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{GuestAddress, GuestMemoryError};

use super::Entry;
use crate::layout::{GDT, PAGE_TABLES};

/// Descriptors: null, unused, flat 64-bit code (selector 0x10), flat data (0x18), task state (0x20).
const DESCRIPTORS: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x008f_8b00_0000_ffff,
];

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Present and writable, in a page table entry.
const TABLE: u64 = 0b11;
/// Present, writable, and 2 MiB long, in a page directory entry.
const LARGE_PAGE: u64 = 0b1000_0011;

/// Writes page tables and descriptors into guest memory.
pub fn write_tables(memory: &View) -> Result<(), GuestMemoryError> {
    let directory_pointers = PAGE_TABLES + 0x1000;
    let directory = PAGE_TABLES + 0x2000;
    memory.write_obj(directory_pointers | TABLE, GuestAddress(PAGE_TABLES))?;
    memory.write_obj(directory | TABLE, GuestAddress(directory_pointers))?;
    for index in 0..512u64 {
        memory.write_obj(
            index << 21 | LARGE_PAGE,
            GuestAddress(directory + index * 8),
        )?;
    }
    for (index, descriptor) in (0u64..).zip(DESCRIPTORS) {
        memory.write_obj(descriptor, GuestAddress(GDT + index * 8))?;
    }
    Ok(())
}

/// Turns the special registers of a processor at reset into those of one in 64-bit mode.
pub fn special_registers(sregs: &mut kvm_sregs) {
    let data = segment(3);
    sregs.cs = segment(2);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = segment(4);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (size_of_val(&DESCRIPTORS) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
}

/// The general registers at the entry.
pub fn registers(entry: Entry) -> kvm_regs {
    kvm_regs {
        rip: entry.rip,
        rsi: entry.zero_page,
        // Below the zero page's end: the kernel switches to a stack of its own at once.
        rsp: 0x8ff0,
        rbp: 0x8ff0,
        rflags: 2,
        ..Default::default()
    }
}

fn segment(index: usize) -> kvm_segment {
    let descriptor = DESCRIPTORS.get(index).copied().unwrap_or_default();
    let bit = |n: u32| (descriptor >> n & 1) as u8;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: (index * 8) as u16,
        type_: (descriptor >> 40 & 0xf) as u8,
        s: bit(44),
        dpl: 0,
        present: bit(47),
        avl: 0,
        l: bit(53),
        db: bit(54),
        g: bit(55),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::memory::{GuestRam, RamRange};

    #[test]
    fn the_first_gibibyte_is_identity_mapped() {
        let ram = GuestRam::new(&[RamRange {
            start: GuestAddress(0),
            len: 0x10_0000,
        }])
        .unwrap();
        let view = ram.view().unwrap();
        write_tables(&view).unwrap();
        let read = |a: u64| view.read_obj::<u64>(GuestAddress(a)).unwrap();
        for address in [0u64, 0x20_0000, 0x100_0000, 0x3fff_ffff] {
            let top = read(PAGE_TABLES + (address >> 39 & 511) * 8);
            let pointer = read((top & !0xfff) + (address >> 30 & 511) * 8);
            let entry = read((pointer & !0xfff) + (address >> 21 & 511) * 8);
            assert_eq!(entry & !0xfff, address & !0x1f_ffff, "{address:#x}");
            assert_eq!(entry & 0x83, 0x83);
        }
    }

    #[test]
    fn the_code_segment_is_64_bit_and_the_others_are_data() {
        let mut sregs = kvm_sregs::default();
        special_registers(&mut sregs);
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.type_), (1, 0, 0xb));
        assert_eq!((sregs.ds.l, sregs.ds.db, sregs.ds.type_), (0, 1, 3));
        assert_eq!((sregs.tr.s, sregs.tr.type_), (0, 0xb));
    }
}
