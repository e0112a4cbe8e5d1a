//! The administration virtqueue.

use devices::admin::{Options, Profile, Strictness};
use driver::access::{DmaExt, FunctionExt};
use driver::virtio::admin::{command, group};
use driver::virtio::{Buffer, common, status};

use conformance::group::{ADMIN_VQ, Live, Rig, SR_IOV};
use driver::pci::{change_command, command as pci_command};

const SIMPLE: u64 = conformance::SIMPLE;
const SR_IOV_GROUP: u16 = group::SR_IOV;
const SELF_GROUP: u16 = group::SELF;

fn pf(rig: &Rig) -> Live<driver::host::HostFunction> {
    rig.drive(rig.at(0), SIMPLE | ADMIN_VQ | SR_IOV)
}

/// The index of the administration virtqueue.
const ADMIN: usize = 2;

/// What a driver of Linux does at DRIVER_OK, while no VF is enabled.
///
/// Requirements: D3, D4, B-3, B-4, B-6
#[test]
fn d4_the_probe_of_linux_is_answered_before_any_vf_is_enabled() {
    let rig = Rig::new(4, Options::default());
    let mut pf = pf(&rig);
    let query = pf.request(ADMIN, &command(0, SR_IOV_GROUP, 0, &[]), 16);
    assert_eq!(query[..8], [0; 8]);
    let supported = u64::from_le_bytes(query[8..].try_into().unwrap());
    assert_eq!(supported & 3, 3);
    // Bits 0 and 1 are not in its mask.
    let mask = 0x3_e780 | 0x7c;
    let list = (supported & mask).to_le_bytes();
    let answer = pf.request(ADMIN, &command(1, SR_IOV_GROUP, 0, &list), 8);
    assert_eq!(answer, [0; 8]);
}

/// Requirements: B-6
#[test]
fn b6_a_strict_owner_refuses_the_group_until_vfs_are_enabled() {
    let options = Options {
        strictness: Strictness::Strict,
        ..Options::default()
    };
    let rig = Rig::new(4, options);
    let mut pf = pf(&rig);
    let refused = [22, 0, 4, 0, 0, 0, 0, 0];
    for opcode in [0, 1] {
        let bytes = command(opcode, SR_IOV_GROUP, 0, &[]);
        assert_eq!(pf.request(ADMIN, &bytes, 8), refused);
    }
    rig.enable(1);
    let bytes = command(0, SR_IOV_GROUP, 0, &[]);
    assert_eq!(pf.request(ADMIN, &bytes, 8), [0; 8]);
    rig.disable();
    assert_eq!(pf.request(ADMIN, &bytes, 8), refused);
}

/// Requirements: B-1, B-2
#[test]
fn b1_group_then_opcode() {
    let rig = Rig::new(1, Options::default());
    rig.enable(1);
    let mut pf = pf(&rig);
    for (opcode, group, qualifier) in [
        (0, 2, 4),
        (0xffff, 0xffff, 4),
        (0x12, SR_IOV_GROUP, 2),
        (7, SELF_GROUP, 2),
    ] {
        let answer = pf.request(ADMIN, &command(opcode, group, 9, &[]), 8);
        assert_eq!(answer[..4], [22, 0, qualifier, 0], "{opcode:#x} {group}");
    }
    assert_eq!(
        pf.request(ADMIN, &command(0, SR_IOV_GROUP, 0, &[]), 8),
        [0; 8]
    );
}

/// Requirements: D3, E4, B-9
#[test]
fn d3_the_admin_queue_interrupts_with_its_own_vector() {
    let rig = Rig::new(1, Options::default());
    let mut pf = pf(&rig);
    assert_eq!(pf.transport.get(common::NUM_QUEUES), 2);
    let size = pf.transport.queue_size(ADMIN as u16);
    assert!(size.is_power_of_two() && size >= 64, "{size}");
    rig.machine.msi().take();
    pf.request(ADMIN, &command(0, SELF_GROUP, 0, &[]), 16);
    assert_eq!(rig.machine.msi().take_vectors(), [1 + ADMIN as u16]);
}

/// Requirements: B-9
#[test]
fn b9_without_the_feature_there_is_no_admin_queue() {
    let rig = Rig::new(1, Options::default());
    let pf = rig.drive(rig.at(0), SIMPLE | SR_IOV);
    assert_eq!(pf.queues.len(), ADMIN);
    assert_eq!(pf.transport.queue_size(ADMIN as u16), 0);
}

/// Requirements: B-4
#[test]
fn b4_a_function_level_reset_forgets_what_was_negotiated() {
    let rig = Rig::new(1, Options::default());
    let mut first = pf(&rig);
    let give_up = command(1, SELF_GROUP, 0, &[]);
    let query = command(0, SELF_GROUP, 0, &[]);
    assert_eq!(first.request(ADMIN, &give_up, 8), [0; 8]);
    assert_eq!(first.request(ADMIN, &query, 8)[0], 22);
    let function = rig.at(0);
    let (low, high): (u32, u32) = (function.config(0x10), function.config(0x14));
    assert!(driver::pci::request_flr(&function));
    function.set_config(0x10, low);
    function.set_config(0x14, high);
    change_command(&function, pci_command::MEMORY, 0);
    let mut second = pf(&rig);
    assert_eq!(second.request(ADMIN, &query, 8), [0; 8]);
}

/// Linux shifts 1 by the opcode and reads one word, so that it must not see opcodes from 64 on.
///
/// Requirements: E12, B-3
#[test]
fn e12_every_supported_command_is_in_the_first_word() {
    for profile in [Profile::V1_4, Profile::Draft] {
        let options = Options {
            profile,
            ..Options::default()
        };
        let rig = Rig::new(1, options);
        rig.enable(1);
        let mut pf = pf(&rig);
        for group in [SELF_GROUP, SR_IOV_GROUP] {
            let answer = pf.request(ADMIN, &command(0, group, 0, &[]), 4096);
            assert_eq!(answer[..8], [0; 8], "{profile:?} {group}");
            assert_eq!(answer[8] & 3, 3, "{profile:?} {group}");
            assert!(answer[16..].iter().all(|byte| *byte == 0));
            // Which is what LIST_USE takes back.
            let taken = pf.request(ADMIN, &command(1, group, 0, &answer[8..16]), 8);
            assert_eq!(taken, [0; 8], "{profile:?} {group}");
        }
    }
}

/// Whatever a chain looks like, it comes back: Linux waits for each without end.
///
/// Requirements: E13, B-7, B-8
#[test]
fn e13_every_command_comes_back_whatever_it_is() {
    let rig = Rig::new(1, Options::default());
    let mut pf = pf(&rig);
    let query = command(0, SELF_GROUP, 0, &[]);
    let cases: [(&[u8], u32, u32); 6] = [
        (&query, 16, 16),
        (&query, 1, 1),
        (&query[..1], 8, 8),
        (&[0xff; 40], 64, 8),
        (&[0xff; 5000], 8, 8),
        (&query, 5000, 16),
    ];
    // All at once, then all come back, in order.
    let places: Vec<_> = cases
        .iter()
        .map(|(bytes, room, _)| pf.submit(ADMIN, bytes, *room))
        .collect();
    for ((bytes, room, written), place) in cases.iter().zip(places) {
        let len = pf.complete(ADMIN);
        assert_eq!(len, Some(*written), "{} bytes, room {room}", bytes.len());
        let rest = rig.machine.dma().bytes(place, *room as usize);
        assert!(rest[*written as usize..].iter().all(|byte| *byte == 0xee));
    }
    assert_eq!(pf.complete(ADMIN), None);
}

/// Commands without room for an answer, or without a command, come back as well.
///
/// Requirements: E13, B-8
#[test]
fn e13_a_command_with_one_direction_only_comes_back() {
    let rig = Rig::new(1, Options::default());
    let mut pf = pf(&rig);
    let dma = rig.machine.dma();
    let from = dma.place(&command(0, SELF_GROUP, 0, &[])).unwrap();
    let to = dma.place(&[0xee; 16]).unwrap();
    for (buffer, written) in [
        (Buffer::readable(from, 24), 0),
        (Buffer::writable(to, 16), 16),
    ] {
        pf.queues[ADMIN].add(&[buffer]).unwrap();
        if pf.queues[ADMIN].publish() {
            pf.transport.notify(ADMIN as u16);
        }
        assert_eq!(pf.complete(ADMIN), Some(written));
    }
    // Zeroes are LIST_QUERY for the owner's own group.
    assert_eq!(dma.bytes(to, 8), [0; 8]);
}

/// A reset with commands outstanding ends them: Linux completes them with an error once status reads 0, and the queue
/// works again afterwards.
///
/// Requirements: E13, E1, B-4
#[test]
fn e13_after_a_reset_no_command_of_before_is_answered() {
    let rig = Rig::new(1, Options::default());
    let mut first = pf(&rig);
    change_command(&rig.at(0), 0, pci_command::BUS_MASTER);
    let to = first.submit(ADMIN, &command(0, SELF_GROUP, 0, &[]), 16);
    assert_eq!(first.complete(ADMIN), None, "there is no way to memory");
    first.transport.reset().unwrap();
    assert_eq!(first.transport.status(), 0);
    change_command(&rig.at(0), pci_command::BUS_MASTER, 0);
    rig.machine.settle();
    assert_eq!(rig.machine.dma().bytes(to, 16), [0xee; 16]);
    let mut second = pf(&rig);
    assert_eq!(second.transport.status() & status::NEEDS_RESET, 0);
    let answer = second.request(ADMIN, &command(0, SELF_GROUP, 0, &[]), 8);
    assert_eq!(answer, [0; 8]);
}

/// The whole sequence of Linux, twice: at DRIVER_OK, and again after a reset, with VFs that come and go in between and
/// result buffers of many pieces.
///
/// Requirements: D3, D4, B-4, B-5, E12
#[test]
fn d4_the_probe_of_linux_can_be_repeated() {
    let rig = Rig::new(4, Options::default());
    for round in 0..2 {
        let mut pf = pf(&rig);
        let query = pf.request(ADMIN, &command(0, SR_IOV_GROUP, 0, &[]), 16);
        assert_eq!(query[..8], [0; 8], "round {round}");
        // What Linux never sets, it can do without.
        let mask = !3u64;
        let supported = u64::from_le_bytes(query[8..].try_into().unwrap());
        let list = (supported & mask).to_le_bytes();
        let used = pf.request(ADMIN, &command(1, SR_IOV_GROUP, 0, &list), 8);
        assert_eq!(used, [0; 8], "round {round}");
        rig.enable(4);
        let gone = pf.request(ADMIN, &command(0, SR_IOV_GROUP, 0, &[]), 8);
        assert_eq!(gone[..4], [22, 0, 2, 0], "LIST_QUERY was given up");
        let own = pf.request(ADMIN, &command(0, SELF_GROUP, 0, &[]), 16);
        assert_eq!(own[..8], [0; 8], "but not in the other group");
        rig.disable();
    }
}
