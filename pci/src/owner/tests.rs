use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use devices::admin::{self, GroupType, Owner, OwnerDriver, Strictness};
use devices::gate::Reasons;
use devices::memory::View;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{Held, RecordingController, RecordingSink, ram};
use devices::msi::MsiMessage;

mod life;
mod on_a_bus;
mod random;

/// Where the extended capabilities of the PF are: ARI, then SR-IOV.
const SRIOV: u16 = 0x108;
const CONTROL: u16 = SRIOV + 0x08;
const NUM_VFS: u16 = SRIOV + 0x10;
const VF_BAR: u16 = SRIOV + 0x24;
/// VF Enable, and VF MSE.
const ENABLE: u64 = 1;
const ENABLE_AND_DECODE: u64 = 9;
/// Bytes of one VF's BAR.
const VF_SIZE: u64 = 0x4000;
const MEMBERS: BarSlot = BarSlot::Members(BarIndex::ZERO);
/// Queues of the device of each function.
const QUEUES: u64 = 2;

/// One function of the group, from its driver's side.
struct Side {
    function: Arc<VirtioFunction>,
    sink: Arc<RecordingSink>,
    release: Arc<AtomicBool>,
    /// Guest memory for its ring.
    ring: u64,
}

/// An owner and its members, on no bus.
struct Rig {
    owner: Arc<OwnerPci>,
    pf: Arc<dyn PciFunction>,
    admin: Arc<Owner>,
    view: View,
    /// The PF and the VFs, by devfn.
    sides: Vec<Side>,
}

fn rig(members: usize) -> Rig {
    let ram = ram();
    let mut releases = Vec::new();
    let mut held = |i| {
        let (device, release) = Held::device(QUEUES as usize, &[i]);
        releases.push(release);
        device
    };
    let pf_device = held(0);
    let vfs: Vec<_> = (1..=members)
        .map(|i| {
            let view = ram.view().unwrap();
            VirtioFunction::new(format!("vf{i}"), held(i as u8), view).unwrap()
        })
        .collect();
    let admin = Owner::new(
        vfs.iter().map(|vf| Arc::clone(vf) as _).collect(),
        admin::Options {
            strictness: Strictness::Strict,
            ..Default::default()
        },
    )
    .unwrap();
    let view = ram.view().unwrap();
    let pf = VirtioFunction::new_owner("pf", pf_device, view, Arc::clone(&admin)).unwrap();
    let controller = RecordingController::default();
    let functions = [vec![Arc::clone(&pf)], vfs.clone()].concat();
    let owner = OwnerPci::new(pf, vfs, &controller, Options::default()).unwrap();
    let sinks = controller.sinks.lock().unwrap().clone();
    let sides = functions.into_iter().zip(sinks).zip(releases).enumerate();
    Rig {
        pf: owner.functions().remove(0),
        owner,
        admin,
        view: ram.view().unwrap(),
        sides: sides
            .map(|(i, ((function, sink), release))| Side {
                function,
                sink,
                release,
                ring: 0x1_0000 + 0x4000 * (i as u64 % 32),
            })
            .collect(),
    }
}

fn wide(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |wide, byte| wide << 8 | u64::from(*byte))
}

impl Rig {
    /// A register of the configuration space at `devfn`; all ones if nothing is there.
    fn config<const N: usize>(&self, devfn: u8, at: u16) -> u64 {
        let mut bytes = [0xff; N];
        if let Some(target) = self.owner.at(DevFn(devfn)) {
            bytes = [0xcc; N];
            target.config_read(at, &mut bytes);
        }
        wide(&bytes)
    }

    fn set_config<const N: usize>(&self, devfn: u8, at: u16, value: u64) -> Effect {
        let target = self.owner.at(DevFn(devfn));
        target.map_or(Effect::None, |t| {
            t.config_write(at, &value.to_le_bytes()[..N])
        })
    }

    fn enable(&self, vfs: u64) {
        let _ = self.set_config::<2>(0, NUM_VFS, vfs);
        let _ = self.set_config::<2>(0, CONTROL, ENABLE_AND_DECODE);
    }

    fn disable(&self) -> Effect {
        self.set_config::<2>(0, CONTROL, 0)
    }

    /// Where byte `offset` of the BAR 0 of the function at `devfn` is.
    fn place(devfn: u8, offset: u64) -> (BarSlot, u64) {
        match u64::from(devfn).checked_sub(1) {
            None => (MEMBER_BAR, offset),
            Some(index) => (MEMBERS, index * VF_SIZE + offset),
        }
    }

    fn get<const N: usize>(&self, devfn: u8, offset: u64) -> u64 {
        let (slot, at) = Self::place(devfn, offset);
        let mut bytes = [0xcc; N];
        self.pf.memory_read(slot, at, &mut bytes);
        wide(&bytes)
    }

    fn put<const N: usize>(&self, devfn: u8, offset: u64, value: u64) -> Effect {
        let (slot, at) = Self::place(devfn, offset);
        self.pf.memory_write(slot, at, &value.to_le_bytes()[..N])
    }

    /// Offset of the first capability with this ID.
    fn capability(&self, devfn: u8, id: u64) -> u16 {
        let mut at = self.config::<1>(devfn, 0x34) as u16;
        while at != 0 && self.config::<1>(devfn, at) != id {
            at = self.config::<1>(devfn, at + 1) as u16;
        }
        assert_ne!(at, 0, "no capability {id:#x}");
        at
    }

    fn flr(&self, devfn: u8) -> Effect {
        let at = self.capability(devfn, 0x10) + 8;
        self.set_config::<2>(devfn, at, 0x8000)
    }

    fn master(&self, devfn: u8) {
        let _ = self.set_config::<2>(devfn, 0x04, 4);
    }

    /// Bus mastering, MSI-X with vector 1, and a driver at queue 0.
    fn start(&self, devfn: u8) {
        self.master(devfn);
        let _ = self.put::<8>(devfn, 0x2010, 0xfee0_0000);
        let _ = self.put::<8>(devfn, 0x2018, u64::from(devfn));
        let msix = self.capability(devfn, 0x11) + 2;
        let _ = self.set_config::<2>(devfn, msix, 0x8000);
        for status in [1, 3] {
            let _ = self.put::<1>(devfn, 20, status);
        }
        let _ = self.put::<4>(devfn, 8, 1);
        // VERSION_1.
        let _ = self.put::<4>(devfn, 12, 1);
        let _ = self.put::<1>(devfn, 20, 0xb);
        let ring = self.sides[usize::from(devfn)].ring;
        self.view
            .write_slice(&[0; 0x3000], GuestAddress(ring))
            .unwrap();
        let _ = self.put::<2>(devfn, 22, 0);
        let _ = self.put::<2>(devfn, 26, 1);
        for (i, register) in [32, 40, 48].into_iter().enumerate() {
            let _ = self.put::<8>(devfn, register, ring + 0x1000 * i as u64);
        }
        let _ = self.put::<2>(devfn, 28, 1);
        let _ = self.put::<1>(devfn, 20, 0xf);
    }

    /// Makes one request available on queue 0, which the device takes and keeps.
    fn request(&self, devfn: u8) {
        let side = &self.sides[usize::from(devfn)];
        let view = &self.view;
        let at = GuestAddress;
        view.write_obj(0x8000u64, at(side.ring)).unwrap();
        view.write_obj(16u32, at(side.ring + 8)).unwrap();
        view.write_obj(2u16, at(side.ring + 12)).unwrap();
        view.write_obj(1u16, at(side.ring + 0x1002)).unwrap();
        side.function.service(0);
    }

    /// Lets the device give back what it holds; returns the messages that were sent.
    fn complete(&self, devfn: u8) -> Vec<MsiMessage> {
        let side = &self.sides[usize::from(devfn)];
        side.release.store(true, SeqCst);
        side.function.on_event(0);
        side.release.store(false, SeqCst);
        side.sink.delivered()
    }

    fn reasons(&self, devfn: u8) -> Reasons {
        self.sides[usize::from(devfn)].function.reasons()
    }

    fn transactions_pending(&self, devfn: u8) -> bool {
        let status = self.capability(devfn, 0x10) + 0x0a;
        self.config::<2>(devfn, status) & 0x20 != 0
    }

    /// The places after the PF where configuration accesses are answered.
    fn answering(&self) -> Vec<u8> {
        let class = |devfn: &u8| self.config::<4>(*devfn, 0x08) != 0xffff_ffff;
        (1..=255).filter(class).collect()
    }
}

fn message(data: u32) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_0000,
        data,
    }
}

#[test]
fn d1_the_pf_has_ari_and_sr_iov_with_vfs_of_its_own_kind() {
    let rig = rig(5);
    assert_eq!(rig.config::<4>(0, 0x00), 0x1042_1af4);
    assert_eq!(rig.config::<4>(0, 0x100), 0x1081_000e, "ARI, then SR-IOV");
    assert_eq!(rig.config::<4>(0, 0x104), 0, "no next function");
    assert_eq!(rig.config::<4>(0, SRIOV), 0x0001_0010);
    assert_eq!(rig.config::<4>(0, SRIOV + 0x0c), 0x0005_0005);
    assert_eq!(rig.config::<4>(0, SRIOV + 0x14), 0x0001_0001);
    assert_eq!(rig.config::<2>(0, SRIOV + 0x1a), 0x1042);
    assert_eq!(rig.config::<1>(0, 0x0e), 0, "header type");
}

#[test]
fn d2_b50_the_pf_offers_both_features_and_its_vfs_neither() {
    let rig = rig(1);
    rig.enable(1);
    let features = [0, 1].map(|devfn| {
        let _ = rig.put::<4>(devfn, 0, 1);
        rig.get::<4>(devfn, 4) & (1 << 5 | 1 << 9)
    });
    assert_eq!(features, [1 << 5 | 1 << 9, 0]);
}

#[test]
fn b9_e4_the_admin_queue_has_registers_a_vector_and_a_doorbell() {
    let rig = rig(1);
    assert_eq!(rig.get::<2>(0, 18), QUEUES, "num_queues");
    assert_eq!(rig.get::<2>(0, 60), QUEUES, "admin_queue_index");
    assert_eq!(rig.get::<2>(0, 62), 1, "admin_queue_num");
    let control = rig.config::<2>(0, rig.capability(0, 0x11) + 2);
    assert_eq!(control & 0x7ff, QUEUES + 1, "table size - 1");
    for register in [60, 62] {
        let _ = rig.put::<2>(0, register, 7);
    }
    assert_eq!(rig.get::<4>(0, 60), 1 << 16 | QUEUES);

    let _ = rig.put::<2>(0, 22, QUEUES);
    assert_eq!(rig.get::<2>(0, 24), 0, "not negotiated");
    let _ = rig.put::<4>(0, 8, 1);
    let _ = rig.put::<4>(0, 12, 1 | 1 << 9);
    let _ = rig.put::<1>(0, 20, 0xb);
    assert_eq!(rig.get::<2>(0, 24), 256, "queue_size");
    assert_eq!(rig.get::<2>(0, 30), QUEUES, "queue_notify_off");
    let _ = rig.put::<2>(0, 26, QUEUES + 1);
    assert_eq!(rig.get::<2>(0, 26), QUEUES + 1, "queue_msix_vector");
    for (register, at) in [(32, 0x1_0000), (40, 0x1_1000), (48, 0x1_2000)] {
        let _ = rig.put::<8>(0, register, at);
    }
    let _ = rig.put::<2>(0, 28, 1);
    let _ = rig.put::<1>(0, 20, 0xf);
    let doorbells: Vec<_> = rig
        .pf
        .doorbells()
        .iter()
        .map(|d| (d.slot, d.offset))
        .collect();
    assert_eq!(doorbells, [(MEMBER_BAR, 0x1000 + 4 * QUEUES)]);
    let kicked = || {
        rig.sides[0]
            .function
            .kick_event(QUEUES as u16)
            .unwrap()
            .read()
            .is_ok()
    };
    let _ = kicked();
    let _ = rig.put::<2>(0, 0x1000 + 4 * QUEUES, QUEUES);
    assert!(kicked());
}

#[test]
fn b9_a_vf_has_no_admin_queue() {
    let rig = rig(1);
    rig.enable(1);
    assert_eq!(rig.get::<4>(1, 60), 0);
    assert_eq!(rig.get::<2>(1, 18), QUEUES);
}

#[test]
fn d2_a_vf_shows_no_identity_no_bars_and_only_bus_master() {
    let rig = rig(2);
    rig.enable(2);
    for devfn in [1, 2] {
        assert_eq!(rig.config::<4>(devfn, 0x00), 0xffff_ffff);
        assert_eq!(rig.config::<4>(devfn, 0x08), 0x0100_0001);
        assert_eq!(rig.config::<4>(devfn, 0x2c), 0x0040_1af4);
        for at in (0x00..0x40).step_by(4) {
            let _ = rig.set_config::<4>(devfn, at, 0xffff_ffff);
        }
        assert_eq!(
            rig.config::<4>(devfn, 0x04),
            0x0010_0004,
            "Status and Command"
        );
        for at in (0x10..0x28).step_by(4) {
            assert_eq!(rig.config::<4>(devfn, at), 0, "BAR at {at:#x}");
        }
        assert_eq!(rig.config::<4>(devfn, 0x0c), 0, "header type");
        assert_eq!(rig.config::<4>(devfn, 0x3c), 0, "no INTx");
    }
}

#[test]
fn d2_the_capabilities_of_a_vf() {
    let rig = rig(1);
    rig.enable(1);
    let pcie = rig.capability(1, 0x10);
    assert_eq!(rig.config::<2>(1, pcie + 2), 0x0002, "endpoint");
    assert_eq!(rig.config::<4>(1, pcie + 4) >> 28 & 1, 1, "FLR");
    let msix = rig.capability(1, 0x11);
    assert_eq!(
        rig.config::<2>(1, msix + 2),
        QUEUES,
        "one vector per queue and one"
    );
    assert_eq!(rig.config::<4>(1, msix + 4), 0x2000, "table in VF BAR 0");
    assert_eq!(rig.config::<4>(1, msix + 8), 0x3000, "PBA in VF BAR 0");
    let mut kinds = Vec::new();
    let mut at = rig.config::<1>(1, 0x34) as u16;
    while at != 0 {
        if rig.config::<1>(1, at) == 9 {
            kinds.push((rig.config::<1>(1, at + 3), rig.config::<1>(1, at + 4)));
        }
        at = rig.config::<1>(1, at + 1) as u16;
    }
    assert_eq!(kinds, [(1, 0), (3, 0), (4, 0), (2, 0), (5, 0)]);
    assert_eq!(
        rig.config::<4>(1, 0x100),
        0x0001_000e,
        "ARI and nothing after it"
    );
}

#[test]
fn d2_only_enabled_vfs_answer() {
    let rig = rig(4);
    assert!(rig.answering().is_empty());
    let _ = rig.set_config::<2>(0, NUM_VFS, 3);
    assert!(rig.answering().is_empty(), "NumVFs alone");
    let _ = rig.set_config::<2>(0, CONTROL, ENABLE);
    assert_eq!(rig.answering(), [1, 2, 3]);
    let _ = rig.disable();
    assert!(rig.answering().is_empty());
}

#[test]
fn d2_somebody_who_still_holds_a_vf_that_went_away_reads_all_ones() {
    let rig = rig(2);
    rig.enable(2);
    let seat = rig.owner.at(DevFn(2)).unwrap();
    let _ = rig.disable();
    let mut bytes = [0; 4];
    seat.config_read(0x08, &mut bytes);
    assert_eq!(bytes, [0xff; 4]);
    assert_eq!(seat.config_write(0x04, &[4, 0]), Effect::None);
    rig.enable(2);
    assert_eq!(rig.config::<2>(2, 0x04), 0, "the write went nowhere");
}

#[test]
fn d1_the_vf_bar_is_the_bars_of_the_vfs_one_after_the_other() {
    let rig = rig(4);
    rig.pf.assign(MEMBERS, 0x40_0000_0000);
    rig.enable(3);
    let ids: Vec<_> = (1..=4).map(|devfn| rig.get::<1>(devfn, 0x100)).collect();
    assert_eq!(ids, [1, 2, 3, 0xff]);
    let decoded = rig.pf.decoded();
    let range = 0x40_0000_0000..0x40_0000_0000 + 3 * VF_SIZE;
    assert_eq!(
        decoded,
        [Decoded {
            slot: MEMBERS,
            range
        }]
    );
    let _ = rig.put::<2>(2, 22, 1);
    let selected: Vec<_> = (0..=4).map(|devfn| rig.get::<2>(devfn, 22)).collect();
    assert_eq!(selected, [0, 0, 1, 0, 0xffff]);
}

#[test]
fn d1_without_vf_mse_no_bar_answers() {
    let rig = rig(2);
    let _ = rig.set_config::<2>(0, NUM_VFS, 2);
    let _ = rig.set_config::<2>(0, CONTROL, ENABLE);
    assert_eq!(rig.get::<4>(1, 0x100), 0xffff_ffff);
    let _ = rig.put::<2>(1, 22, 1);
    let _ = rig.set_config::<2>(0, CONTROL, ENABLE_AND_DECODE);
    assert_eq!(rig.get::<2>(1, 22), 0);
}

#[test]
fn d1_firmware_sees_one_range_for_all_vfs() {
    let rig = rig(5);
    let resources = rig.pf.resources();
    let members = resources.iter().find(|r| r.slot == MEMBERS).unwrap();
    assert_eq!((members.size, members.align), (5 * VF_SIZE, VF_SIZE));
    let _ = rig.set_config::<4>(0, VF_BAR, 0xffff_ffff);
    assert_eq!(rig.config::<4>(0, VF_BAR), 0xffff_c00c);
}

#[test]
fn what_changes_the_layout_says_so() {
    let rig = rig(4);
    for (at, value, effect) in [
        (NUM_VFS, 2, Effect::None),
        (CONTROL, 0x08, Effect::None),
        (CONTROL, 0x09, Effect::LayoutChanged),
        (CONTROL, 0x19, Effect::None),
        (NUM_VFS, 3, Effect::None),
        (VF_BAR, 0x4000, Effect::LayoutChanged),
        (CONTROL, 0x01, Effect::LayoutChanged),
        (VF_BAR, 0x8000, Effect::None),
        (CONTROL, 0x00, Effect::LayoutChanged),
    ] {
        assert_eq!(
            rig.set_config::<2>(0, at, value),
            effect,
            "{at:#x} {value:#x}"
        );
    }
}

#[test]
fn the_access_window_of_a_vf_reaches_its_own_bar() {
    let rig = rig(2);
    rig.enable(2);
    let window = rig.owner.members()[1].pci_cfg_offset();
    let _ = rig.set_config::<1>(2, window + 4, 0);
    let _ = rig.set_config::<4>(2, window + 8, 0x100);
    let _ = rig.set_config::<4>(2, window + 12, 1);
    assert_eq!(rig.config::<1>(2, window + 16), 2);
}

#[test]
fn groups_that_cannot_be_shown_are_refused() {
    let plain = |n: u8| Held::function(1, &[n]).0;
    let owning = || {
        let (device, _) = Held::device(1, &[]);
        let admin = Owner::new(Vec::new(), Default::default()).unwrap();
        VirtioFunction::new_owner("pf", device, ram().view().unwrap(), admin).unwrap()
    };
    let new = |pf, vfs: Vec<_>| {
        let msi = RecordingController::default();
        OwnerPci::new(pf, vfs, &msi, Options::default()).map(|_| ())
    };
    assert_eq!(new(owning(), vec![]), Err(OwnerError::Count(0)));
    let many = vec![plain(0); 256];
    assert_eq!(new(owning(), many), Err(OwnerError::Count(256)));
    let role = |name: &str| Err(VirtioPciError::Role(name.into()).into());
    assert_eq!(new(plain(0), vec![plain(1)]), role("held"));
    assert_eq!(new(owning(), vec![owning()]), role("pf"));
    let msi = RecordingController::default();
    let alone = VirtioPci::new(owning(), &msi, virtio::Options::BEHIND_PORT);
    assert!(matches!(alone, Err(VirtioPciError::Role(_))), "B-50");
}
