//! An owner behind a root port, through configuration space and memory as a vCPU reaches them.

use std::time::{Duration, Instant};

use devices::bus::BusDevice;

use super::*;
use crate::root::PciRoot;
use crate::topology::PciLayout;

const MMIO64: u64 = 0x40_0000_0000;

struct Machine {
    root: Arc<PciRoot>,
    ecam: Arc<dyn BusDevice>,
    memory: Arc<dyn BusDevice>,
}

fn machine(rig: &Rig) -> Machine {
    let root = PciRoot::new(PciLayout {
        ecam: 0xe000_0000..0xf000_0000,
        mmio32: 0xc000_0000..0xe000_0000,
        mmio64: MMIO64..MMIO64 + (1 << 36),
    })
    .unwrap();
    root.add_root_port(Arc::clone(&rig.owner) as _).unwrap();
    root.assign_resources().unwrap();
    let mut windows = root.mmio_windows();
    Machine {
        ecam: root.ecam(),
        memory: windows.remove(1).1,
        root,
    }
}

impl Machine {
    fn config(&self, bus: u64, devfn: u64, at: u64) -> u64 {
        let mut bytes = [0; 4];
        self.ecam.read(bus << 20 | devfn << 12 | at, &mut bytes);
        wide(&bytes)
    }

    fn set_config(&self, bus: u64, devfn: u64, at: u64, value: u16) -> Effect {
        let offset = bus << 20 | devfn << 12 | at;
        self.ecam.write(offset, &value.to_le_bytes())
    }

    /// What a driver does before it enables VFs: ARI forwarding in the port, whose PCI Express capability is the first
    /// after its header.
    fn ari(&self) {
        let _ = self.set_config(0, 8, 0x40 + 0x28, 1 << 5);
    }

    fn enable(&self, vfs: u16) {
        let _ = self.set_config(1, 0, NUM_VFS.into(), vfs);
        let _ = self.set_config(1, 0, CONTROL.into(), 0x19);
    }

    fn answering(&self) -> Vec<u64> {
        let there = |devfn: &u64| self.config(1, *devfn, 0x08) != 0xffff_ffff;
        (1..256).filter(there).collect()
    }

    fn read(&self, address: u64) -> u64 {
        let mut bytes = [0; 4];
        self.memory.read(address - MMIO64, &mut bytes);
        wide(&bytes)
    }
}

#[test]
fn d1_255_vfs_enumerate_with_ari_and_each_bar_answers() {
    let rig = rig(255);
    let machine = machine(&rig);
    machine.ari();
    assert!(machine.answering().is_empty());
    machine.enable(255);
    assert_eq!(machine.answering(), (1..256).collect::<Vec<_>>());
    let base = machine.config(1, 0, VF_BAR.into()) & !0xf
        | machine.config(1, 0, u64::from(VF_BAR) + 4) << 32;
    for index in 0..255 {
        let found = machine.read(base + index * VF_SIZE + 0x100) as u8;
        assert_eq!(u64::from(found), index + 1);
    }
    assert_eq!(machine.read(base + 255 * VF_SIZE), 0xffff_ffff);
}

#[test]
fn d1_without_ari_forwarding_seven_vfs_can_be_addressed() {
    let rig = rig(20);
    let machine = machine(&rig);
    machine.enable(20);
    assert_eq!(machine.answering(), (1..8).collect::<Vec<_>>());
    machine.ari();
    assert_eq!(machine.answering().len(), 20);
}

#[test]
fn doorbells_are_at_the_addresses_of_the_vfs() {
    let rig = rig(4);
    let machine = machine(&rig);
    machine.ari();
    machine.enable(3);
    rig.start(1);
    rig.start(3);
    // A doorbell appears with the next change of the layout, such as the one of DRIVER_OK.
    let range = rig.pf.decoded()[0].range.clone();
    let found: Vec<_> = machine
        .root
        .doorbells()
        .iter()
        .map(|d| d.address - range.start)
        .collect();
    assert_eq!(found, [0x1000, 2 * VF_SIZE + 0x1000]);
    let _ = machine.set_config(1, 0, CONTROL.into(), 0);
    assert!(machine.root.doorbells().is_empty());
}

#[test]
fn a_secondary_bus_reset_takes_the_vfs_away() {
    let rig = rig(2);
    let machine = machine(&rig);
    machine.enable(2);
    rig.start(1);
    let _ = machine.set_config(0, 8, 0x3e, 1 << 6);
    let _ = machine.set_config(0, 8, 0x3e, 0);
    assert_eq!(machine.config(1, 0, CONTROL.into()) & 1, 0);
    assert!(machine.answering().is_empty());
    assert!(rig.reasons(1).contains(Reasons::NO_DMA));
}

/// How long two vCPUs are let loose on the same VFs.
const EFFORT: Duration = Duration::from_secs(2);

/// One vCPU enables and disables VFs and resets the PF while another uses a VF: whenever the VFs are gone, nothing of
/// what was tried on them is left.
#[test]
fn vfs_that_come_and_go_under_the_hands_of_their_drivers() {
    let rig = rig(4);
    let machine = machine(&rig);
    machine.ari();
    let stop = AtomicBool::new(false);
    let found = std::thread::scope(|scope| {
        scope.spawn(|| {
            for turn in 0.. {
                let _ = machine.set_config(1, 1, 0x04, 4);
                let _ = rig.put::<1>(1, 20, turn % 16);
                rig.sides[1].function.service(0);
                let _ = rig.pf.doorbells();
                if stop.load(SeqCst) {
                    return;
                }
            }
        });
        let end = Instant::now() + EFFORT;
        let mut open = None;
        for round in 0u32.. {
            machine.enable(1 + (round % 4) as u16);
            std::thread::yield_now();
            if round % 3 == 0 {
                let _ = rig.flr(0);
            }
            let _ = machine.set_config(1, 0, CONTROL.into(), 0);
            std::thread::yield_now();
            open = (1..=4).find(|vf| !rig.reasons(*vf).contains(Reasons::NO_DMA));
            if open.is_some() || Instant::now() > end {
                break;
            }
        }
        stop.store(true, SeqCst);
        open
    });
    assert_eq!(found, None, "VF with an open gate that does not exist");
    assert!(machine.answering().is_empty());
    machine.enable(4);
    for devfn in 1..=4 {
        assert_eq!(machine.config(1, devfn, 0x04) & 0xffff, 0);
        assert_eq!(rig.get::<1>(devfn as u8, 20), 0);
    }
}
