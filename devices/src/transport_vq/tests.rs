//! The bytes of commands, and commands of any bytes.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::msi::{MsiBatch, MsiController, MsiMessage, MsiSink};
use crate::net::{MacAddress, Net, PortConfig, Switch};
use crate::rng::Rng;
use crate::testing::ram;
use crate::virtio::{Executed, VirtioFunction, feature};

/// Messages go nowhere.
struct Nowhere;

impl MsiSink for Nowhere {
    fn set_route(&self, _vector: u16, _message: Option<MsiMessage>) {}

    fn fire(&self, _vector: u16) {}
}

impl MsiController for Nowhere {
    fn sink(&self, _vectors: u16) -> Arc<dyn MsiSink> {
        Arc::new(Self)
    }

    fn batch(&self) -> MsiBatch<'_> {
        MsiBatch::none()
    }
}

/// A manager of two sources of entropy.
fn manager(wire: Wire) -> Manager {
    let ram = ram();
    let function =
        |name| VirtioFunction::new(name, Box::new(Rng::new()), ram.view().unwrap()).unwrap();
    let options = Options {
        wire,
        ..Options::default()
    };
    Manager::new(vec![function("one"), function("two")], &Nowhere, options).unwrap()
}

fn execute(manager: &mut Manager, device: u64, command: Command, data: &[u8]) -> Answer {
    let wire = manager.options().wire;
    let request = Request {
        device,
        command,
        data,
    };
    match manager.execute(&request.encode(wire), 256, true) {
        Executed::Done(reply) => decode_reply(wire, &reply).unwrap(),
        Executed::Later => panic!("nothing is in flight"),
    }
}

#[test]
fn every_command_has_a_class_and_a_number_of_its_own() {
    for (command, class, number) in Command::TABLE {
        assert_eq!(Command::from_raw(class, number), Some(command));
        assert_eq!(command.raw(), (class, number));
    }
    for missing in [(0, 0), (11, 0), (13, 0), (14, 0), (15, 0), (2, 2)] {
        assert_eq!(Command::from_raw(missing.0, missing.1), None);
    }
}

/// Requirements: G4-a, G4-i, M22
#[test]
fn g4_i_fields_lie_where_the_layout_has_them() {
    type Write = fn(&mut Fields) -> &mut Fields;
    let of = |wire, write: Write| {
        let mut fields = Fields::new(wire);
        write(&mut fields);
        fields.bytes()
    };
    let offset = |bytes: &[u8]| bytes.iter().position(|byte| *byte == 0xaa).unwrap();
    let cases: [(&str, Write, usize, usize); 7] = [
        ("config of CREATE", |f| f.u32(0).u64(0).raw(&[0xaa]), 16, 12),
        ("data of VQ_SET", |f| f.u16(0).u64(0).u32(0xaa), 16, 10),
        ("data of CONFIG_SET", |f| f.u64(0).u32(0xaa), 8, 8),
        ("enable", |f| f.u16(0).u8(0xaa), 2, 2),
        ("device area", |f| f.u16(0).u64(0).u64(0xaa), 16, 10),
        ("asid", |f| f.u16(0).u32(0xaa), 4, 2),
        (
            "used index",
            |f| f.u16(0).u16(0).u16(0).u16(0).u16(0xaa),
            8,
            8,
        ),
    ];
    for (what, write, aligned, packed) in cases {
        assert_eq!(offset(&of(Wire::Aligned, write)), aligned, "{what}");
        assert_eq!(offset(&of(Wire::Packed, write)), packed, "{what}");
    }
    let request = Request {
        device: 0x0102_0304_0506_0708,
        command: Command::VqStateGet,
        data: &[0xaa],
    };
    let head = [8, 7, 6, 5, 4, 3, 2, 1, 12, 0, 1, 0];
    let packed = request.encode(Wire::Packed);
    assert_eq!(packed, [&head[..], &[0xaa]].concat());
    let aligned = request.encode(Wire::Aligned);
    assert_eq!(aligned, [&head[..], &[0; 4], &[0xaa]].concat());
}

/// Requirements: M22
#[test]
fn m22_answers_are_padded_as_far_as_there_is_room() {
    for (room, len) in [(16, 16), (100, 16), (13, 13), (11, 11), (3, 11)] {
        let reply = encode_reply(Wire::Aligned, &Ok(vec![1, 2, 3]), room);
        assert_eq!(reply.len(), len, "{room} bytes");
        assert_eq!(
            u32::from_le_bytes(reply[4..8].try_into().unwrap()),
            len as u32 - 8
        );
    }
    assert_eq!(
        encode_reply(Wire::Packed, &Ok(vec![1, 2, 3]), 100),
        [0, 1, 2, 3]
    );
    for error in Error::ALL {
        let aligned = encode_reply(Wire::Aligned, &Err(error), 100);
        assert_eq!(decode_reply(Wire::Aligned, &aligned), Some(Err(error)));
        assert_eq!(encode_reply(Wire::Packed, &Err(error), 100), [1]);
    }
}

#[test]
fn a_device_without_configuration_has_none() {
    let mut manager = manager(Wire::Aligned);
    let mut create = Fields::new(Wire::Aligned);
    create.u32(4).u64(feature::VERSION_1);
    let made = execute(&mut manager, 0, Command::Create, &create.bytes()).unwrap();
    let id = u64::from_le_bytes(made[..8].try_into().unwrap());
    let nothing = Fields::new(Wire::Aligned).u32(0).u32(0).bytes();
    execute(&mut manager, id, Command::ConfigGet, &nothing).unwrap();
    let one = Fields::new(Wire::Aligned).u32(0).u32(1).u8(1).bytes();
    let beyond = execute(&mut manager, id, Command::ConfigSet, &one);
    assert_eq!(beyond, Err(Error::Value));
}

/// Requirements: G4-n
#[test]
fn g4_n_a_write_of_a_field_that_cannot_be_written_succeeds_without_effect() {
    let switch = Switch::new();
    let mac = MacAddress::new([2, 0, 0, 0, 0, 1]);
    let port = switch.port(PortConfig {
        name: "card".into(),
        mac,
        check_source: true,
    });
    let card = Box::new(Net::new(mac, port.unwrap()));
    let function = VirtioFunction::new("card", card, ram().view().unwrap()).unwrap();
    let options = Options::default();
    let mut manager = Manager::new(vec![function], &Nowhere, options).unwrap();
    let mut create = Fields::new(Wire::Aligned);
    create.u32(1).u64(feature::VERSION_1).raw(&mac.octets());
    let made = execute(&mut manager, 0, Command::Create, &create.bytes()).unwrap();
    let id = u64::from_le_bytes(made[..8].try_into().unwrap());
    let mut write = Fields::new(Wire::Aligned);
    write.u32(0).u32(4).raw(&[9; 4]);
    execute(&mut manager, id, Command::ConfigSet, &write.bytes()).unwrap();
    let read = Fields::new(Wire::Aligned).u32(0).u32(6).bytes();
    let config = execute(&mut manager, id, Command::ConfigGet, &read).unwrap();
    assert_eq!(config[..6], mac.octets());
}

proptest! {
    /// Any bytes have an answer, and a command that fails has no effect.
    #[test]
    fn any_bytes_are_a_command(
        packed: bool,
        negotiated: bool,
        commands in prop::collection::vec((any_command(), 0usize..64), 1..24),
    ) {
        let wire = if packed { Wire::Packed } else { Wire::Aligned };
        let mut manager = manager(wire);
        for (bytes, room) in commands {
            let before = (manager.save(), states(&manager));
            let Executed::Done(reply) = manager.execute(&bytes, room, negotiated) else {
                panic!("nothing is in flight");
            };
            let whole = if reply.len() < wire.reply_header_len() { None } else { decode_reply(wire, &reply) };
            let answer = whole.expect("an answer is well-formed");
            if answer.is_err() {
                prop_assert_eq!((manager.save(), states(&manager)), before);
            } else {
                prop_assert!(reply.len() <= room);
            }
            manager.check_counts();
        }
    }
}

fn states(manager: &Manager) -> Vec<crate::state::FunctionState> {
    let seats = manager.seats().iter();
    seats.map(|seat| seat.function().save()).collect()
}

impl Manager {
    /// The counters are those of what there is.
    fn check_counts(&self) {
        let free = self.seats().iter().filter(|seat| seat.id().is_none());
        let free = free.count() as u16;
        let expected = [free, 1, 1, free].map(u16::to_le_bytes);
        assert_eq!(self.counters(), expected.as_flattened());
    }
}

/// Commands that are nearly right: known ones for devices that may exist, with data of small numbers.
fn any_command() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![4 => 0u8..4, 1 => any::<u8>()];
    let data = prop::collection::vec(number, 0..48);
    let command = prop_oneof![
        1 => Just(Command::Create),
        3 => (0..Command::TABLE.len()).prop_map(|at| Command::TABLE[at].0),
    ];
    let known =
        (any::<bool>(), 0u64..4, command, data).prop_map(|(packed, device, command, data)| {
            let wire = if packed { Wire::Packed } else { Wire::Aligned };
            let create = [&[4, 0, 0, 0, 0, 0, 0, 0][..], &[0, 0, 0, 0, 1, 0, 0, 0]].concat();
            let data = match command {
                Command::Create if data.len() < 24 => create,
                _ => data,
            };
            let request = Request {
                device,
                command,
                data: &data,
            };
            request.encode(wire)
        });
    prop_oneof![8 => known, 1 => prop::collection::vec(any::<u8>(), 0..64)]
}
