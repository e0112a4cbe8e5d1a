//! Commands that cannot be: a specified error, and no side effect.

use driver::virtio::management::{code, command};

use crate::rig::{Live, QUEUES, Rig, SIMPLE};

/// Commands for a managed device, and enough data for each; those about one queue begin with its index.
fn commands(live: &Live, queue: u16) -> Vec<((u16, u16), Vec<u8>, bool)> {
    let out = || live.management.out();
    let of_queue = || out().half(queue);
    vec![
        (command::DESTROY, vec![], false),
        (command::DEVICE_FEATURES, vec![], false),
        (command::ACCEPT_FEATURES, out().long(0).bytes(), false),
        (command::DRIVER_FEATURES, vec![], false),
        (command::SET_STATUS, out().byte(1).bytes(), false),
        (command::GET_STATUS, vec![], false),
        (command::GENERATION, vec![], false),
        (command::GET_CONFIG, out().word(0).word(4).bytes(), false),
        (
            command::SET_CONFIG,
            out().word(0).word(4).raw(&[9; 4]).bytes(),
            false,
        ),
        (
            command::SET_CONFIG_MSI,
            out().long(0).word(0).bytes(),
            false,
        ),
        (command::ENABLE_CONFIG_MSI, out().byte(1).bytes(), false),
        (command::MASK_CONFIG_MSI, out().byte(1).bytes(), false),
        (command::GET_CONFIG_MSI, vec![], false),
        (
            command::SET_QUEUE_MSI,
            of_queue().long(0).word(0).bytes(),
            true,
        ),
        (command::ENABLE_QUEUE_MSI, of_queue().byte(1).bytes(), true),
        (command::MASK_QUEUE_MSI, of_queue().byte(1).bytes(), true),
        (command::GET_QUEUE_MSI, of_queue().bytes(), true),
        (
            command::SET_ADDRESS,
            of_queue().long(0).long(0).long(0).bytes(),
            true,
        ),
        (command::GET_ADDRESS, of_queue().bytes(), true),
        (command::SET_ENABLE, of_queue().byte(0).bytes(), true),
        (command::GET_ENABLE, of_queue().bytes(), true),
        (command::SET_SIZE, of_queue().half(8).bytes(), true),
        (command::GET_SIZE, of_queue().bytes(), true),
        (command::GET_NOTIFY, of_queue().bytes(), true),
        (command::SET_STATE, of_queue().half(0).bytes(), true),
        (command::GET_STATE, of_queue().bytes(), true),
        (command::SET_ASID, of_queue().word(0).bytes(), true),
        (command::GET_ASID, of_queue().bytes(), true),
        (command::RESET, of_queue().bytes(), true),
    ]
}

/// Requirements: S4-10, S4-12, S4-17, S4-20, S4-22, S4-26, S4-30, S4-33, S4-36, S4-39, S4-43, S4-45, M17, G4-g, G4-l
#[test]
fn m17_commands_for_a_managed_device_need_its_id() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE);
    for (command, data, _) in commands(&live, 0) {
        for id in [0, device.id + 1, device.id | 1 << 32, u64::MAX] {
            assert_eq!(
                live.call(id, command, &data),
                Err(code::DEVICE),
                "{command:?} for {id}"
            );
        }
    }
    rig.echoes(&mut device, 0, b"unharmed");
}

/// Requirements: S4-3, S4-6
#[test]
fn s4_6_commands_for_the_management_device_need_id_0() {
    let rig = Rig::new(2);
    let mut live = rig.live();
    let device = rig.device(&mut live, SIMPLE);
    let before = live.resources();
    let create = live
        .management
        .out()
        .word(crate::rig::TYPE)
        .long(SIMPLE)
        .bytes();
    for id in [device.id, device.id + 1, u64::MAX] {
        assert_eq!(
            live.call(id, command::AVAIL_RES_GET, &[]),
            Err(code::DEVICE)
        );
        assert_eq!(live.call(id, command::CREATE, &create), Err(code::DEVICE));
    }
    assert_eq!(live.resources(), before);
}

/// Requirements: S4-27, S4-31, S4-34, S4-37, S4-40, S4-44, S4-46, M23, G4-g
#[test]
fn m23_an_index_beyond_the_queues_of_the_device_is_invalid() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE);
    for queue in [QUEUES, QUEUES + 1, 0x7fff, 0xffff] {
        let commands = commands(&live, queue);
        for (command, data, _) in commands.iter().filter(|(.., of_queue)| *of_queue) {
            let answer = live.call(device.id, *command, data);
            assert_eq!(answer, Err(code::QUEUE), "{command:?} for {queue}");
        }
    }
    rig.echoes(&mut device, 0, b"unharmed");
}

/// Requirements: G4-d, G4-e
#[test]
fn g4_e_classes_and_commands_that_are_not_there_fail() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let device = rig.device(&mut live, SIMPLE);
    let known: Vec<_> = commands(&live, 0).into_iter().map(|row| row.0).collect();
    let known = [known, vec![command::AVAIL_RES_GET, command::CREATE]].concat();
    for class in (0..20).chain([0x0100, 0xffff]) {
        for number in (0..10).chain([0x0100, 0xffff]) {
            if known.contains(&(class, number)) {
                continue;
            }
            for id in [0, device.id] {
                let answer = live.call(id, (class, number), &[0; 64]);
                assert_eq!(answer, Err(code::COMMAND), "{class}, {number}");
            }
        }
    }
    assert_eq!(known.len(), 31);
}

/// Any number of bytes is a command, and all but the whole of one is refused.
#[test]
fn a_command_that_is_too_short_fails_and_does_nothing() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE);
    for (command, data, _) in commands(&live, 0) {
        let whole = live.management.request(device.id, command, &data);
        for len in 0..whole.len().min(16 + data.len()) {
            let (head, out) = whole.split_at(len.min(16));
            if len >= 16 && (out.is_empty() || is_padding(command, len - 16)) {
                continue;
            }
            let cut = whole.get(..len).unwrap_or(head);
            let bytes = live.management.send_raw(&live.transport, cut, 256).unwrap();
            assert_eq!(bytes[..2], [1, code::LENGTH], "{command:?} of {len} bytes");
        }
    }
    rig.echoes(&mut device, 0, b"unharmed");
}

/// True if so many bytes of command-out-data are all that matters of it.
fn is_padding(command: (u16, u16), len: usize) -> bool {
    let needed = match command {
        command::DESTROY
        | command::DEVICE_FEATURES
        | command::DRIVER_FEATURES
        | command::GET_STATUS
        | command::GENERATION
        | command::GET_CONFIG_MSI => 0,
        command::SET_STATUS | command::ENABLE_CONFIG_MSI | command::MASK_CONFIG_MSI => 1,
        command::SET_SIZE | command::SET_STATE => 4,
        command::ENABLE_QUEUE_MSI | command::MASK_QUEUE_MSI | command::SET_ENABLE => 3,
        command::ACCEPT_FEATURES | command::GET_CONFIG | command::SET_ASID => 8,
        command::SET_CONFIG | command::SET_CONFIG_MSI => 12,
        command::SET_QUEUE_MSI => 20,
        command::SET_ADDRESS => 32,
        _ => 2,
    };
    len >= needed
}

/// Requirements: S4-9
#[test]
fn s4_9_an_answer_without_room_is_a_failure_without_effect() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let create = live
        .management
        .out()
        .word(crate::rig::TYPE)
        .long(SIMPLE)
        .bytes();
    for room in [0, 1, 7, 8, 15] {
        let bytes = live
            .management
            .send(&live.transport, 0, command::CREATE, &create, room)
            .unwrap();
        let expected = [1, code::ROOM, 0, 0, 0, 0, 0, 0];
        assert_eq!(bytes, expected[..room.min(8)], "{room} bytes");
    }
    assert_eq!(live.resources()[3], 1, "no device was lost");
}

/// Switches are 0 or 1, and messages are aligned.
#[test]
fn values_that_cannot_be_are_refused() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE);
    for command in [
        command::ENABLE_QUEUE_MSI,
        command::MASK_QUEUE_MSI,
        command::SET_ENABLE,
    ] {
        for value in [2, 255] {
            let answer = live.switch(device.id, command, 0, value);
            assert_eq!(answer, Err(code::VALUE), "{command:?}");
        }
    }
    let odd = live
        .management
        .out()
        .half(0)
        .long(0xfee0_0002)
        .word(0)
        .bytes();
    let answer = live.call(device.id, command::SET_QUEUE_MSI, &odd);
    assert_eq!(answer, Err(code::VALUE));
    rig.echoes(&mut device, 0, b"unharmed");
}
