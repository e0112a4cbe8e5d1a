//! The administration virtqueue.

use devices::admin::{Options, Strictness};
use driver::access::FunctionExt;
use driver::virtio::common;

use crate::rig::{ADMIN_VQ, Live, Rig, SR_IOV};

const SIMPLE: u64 = conformance::SIMPLE;
const SR_IOV_GROUP: u16 = 1;
const SELF_GROUP: u16 = 0;

/// A command: opcode, group, member, data.
fn command(opcode: u16, group: u16, member: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(group.to_le_bytes());
    bytes.extend([0; 12]);
    bytes.extend(member.to_le_bytes());
    bytes.extend(data);
    bytes
}

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
    driver::pci::change_command(&function, driver::pci::command::MEMORY, 0);
    let mut second = pf(&rig);
    assert_eq!(second.request(ADMIN, &query, 8), [0; 8]);
}
