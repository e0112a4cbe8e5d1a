//! What a virtual function costs: bytes on the heap, with a network device on a switch behind it.
//!
//! The aim is below 100 KiB, so that 255 of them do not matter. Guest memory and what the kernel keeps (an event for each
//! queue) are not in it.

// The allocator counts; the helpers state what must hold, like the test they are part of.
#![allow(unsafe_code, clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use devices::admin::Owner;
use devices::memory::{GuestRam, RamRange};
use devices::msi::{MsiBatch, MsiController, MsiMessage, MsiSink};
use devices::net::{MacAddress, Net, PortConfig, Switch};
use devices::virtio::VirtioFunction;
use pci::bar::BarIndex;
use pci::function::{BarSlot, Children, PciFunction};
use pci::owner::{Options, OwnerPci};
use pci::topology::DevFn;
use vm_memory::GuestAddress;

/// Counts the bytes that are allocated.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct NoInterrupts;

impl MsiSink for NoInterrupts {
    fn set_route(&self, _vector: u16, _message: Option<MsiMessage>) {}

    fn fire(&self, _vector: u16) {}
}

impl MsiController for NoInterrupts {
    fn sink(&self, _vectors: u16) -> Arc<dyn MsiSink> {
        Arc::new(NoInterrupts)
    }

    fn batch(&self) -> MsiBatch<'_> {
        MsiBatch::none()
    }
}

/// A guest large enough that a bitmap per function would show: 1 GiB.
const RAM: usize = 1 << 30;
const VFS: u16 = 64;
const LIMIT: usize = 100 * 1024;
const VF_BAR_SIZE: u64 = 0x4000;

/// An owner with this many network VFs, all enabled and with a live driver.
fn group(ram: &Arc<GuestRam>, switch: &Switch, vfs: u16) -> (Arc<OwnerPci>, Arc<Owner>) {
    let device = |index: u16| {
        let mac = MacAddress::derive(1, index);
        let port = switch.port(PortConfig {
            name: format!("port{index}"),
            mac,
            check_source: true,
        });
        Box::new(Net::new(mac, port.unwrap()))
    };
    let members: Vec<_> = (1..=vfs)
        .map(|i| VirtioFunction::new(format!("vf{i}"), device(i), ram.view().unwrap()).unwrap())
        .collect();
    let admin = Owner::new(
        members.iter().map(|vf| Arc::clone(vf) as _).collect(),
        Default::default(),
    )
    .unwrap();
    let view = ram.view().unwrap();
    let pf = VirtioFunction::new_owner("pf", device(0), view, Arc::clone(&admin)).unwrap();
    let owner = OwnerPci::new(pf, members, &NoInterrupts, Options::default()).unwrap();
    let pf = owner.functions().remove(0);
    let _ = pf.config_write(0x108 + 0x10, &vfs.to_le_bytes());
    let _ = pf.config_write(0x108 + 0x08, &9u16.to_le_bytes());
    for index in 0..vfs {
        start(&owner, &*pf, index);
    }
    (owner, admin)
}

/// Brings a VF to DRIVER_OK with both queues at the same (unused) ring.
fn start(owner: &OwnerPci, pf: &dyn PciFunction, index: u16) {
    let seat = owner.at(DevFn(index as u8 + 1)).unwrap();
    let _ = seat.config_write(0x04, &[4, 0]);
    let put = |at: u64, data: &[u8]| {
        let offset = u64::from(index) * VF_BAR_SIZE + at;
        let _ = pf.memory_write(BarSlot::Members(BarIndex::ZERO), offset, data);
    };
    put(20, &[3]);
    put(8, &1u32.to_le_bytes());
    put(12, &1u32.to_le_bytes());
    put(20, &[0xb]);
    for queue in 0..2u16 {
        put(22, &queue.to_le_bytes());
        for (register, address) in [(32, 0x1000u64), (40, 0x3000), (48, 0x5000)] {
            put(register, &address.to_le_bytes());
        }
        put(28, &1u16.to_le_bytes());
    }
    put(20, &[0xf]);
    assert!(owner.members()[usize::from(index)].function().is_live());
}

#[test]
fn a_live_vf_costs_less_than_100_kib() {
    let start = GuestAddress(0);
    let ram = GuestRam::new(&[RamRange { start, len: RAM }]).unwrap();
    // What the first VF brings is not counted, so that what all share does not.
    let one = Switch::new();
    let before = LIVE.load(Relaxed);
    let first = group(&ram, &one, 1);
    let with_one = LIVE.load(Relaxed) - before;
    let many = Switch::new();
    let before = LIVE.load(Relaxed);
    let group = group(&ram, &many, VFS);
    let with_many = LIVE.load(Relaxed) - before;
    let each = (with_many - with_one) / usize::from(VFS - 1);
    println!("{each} bytes for each VF");
    assert!(each < LIMIT, "{each} bytes");
    assert!(each > 1024, "{each} bytes are too few to be true");
    drop((first, group));
}
