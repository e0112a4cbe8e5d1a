//! Commands on a transport virtqueue.

use std::sync::Arc;

use devices::gate::Reasons;
use devices::state::{FunctionState, ManagerState};
use devices::transport_vq::{Command, Manager, Options, Request, Wire, decode_reply};
use devices::virtio::{Executed, Offer, VirtioFunction, feature};
use driver::access::Dma;
use driver::host::{Controls, HostDma, MockMsi, Pump, Shape};
use driver::virtio::status;

use crate::fixture::loopback;
use crate::input::Input;

const DEVICES: usize = 2;
const RAM: usize = 1 << 20;
/// Where rings are likely to be.
const RINGS: u64 = 0x1000;
/// The type of a loopback device, and its feature.
const TYPE: u32 = 4;
const OWN: u64 = 1 << 5;
/// Turns that a device may take to come to rest.
const TURNS: usize = 4096;

struct World {
    manager: Manager,
    seats: Vec<Arc<VirtioFunction>>,
    pumps: Vec<Pump>,
    controls: Vec<Controls>,
    dma: HostDma,
}

/// A driver sends any commands, while its devices have requests in flight: every command is answered as the rules say or waits
/// for what is in flight, one that fails changes nothing, no id comes back, and after a reset nothing is left.
pub fn transport_commands(data: &[u8]) {
    let mut input = Input::new(data);
    let wire = [Wire::Aligned, Wire::Packed][usize::from(input.pick(2))];
    let mut world = World::new(wire);
    let mut last = 0;
    while !input.is_empty() {
        match input.pick(8) {
            0 => {
                let device = usize::from(input.pick(DEVICES as u8));
                world.controls[device].hold(input.pick(2) == 1);
            }
            1 => {
                let device = usize::from(input.pick(DEVICES as u8));
                world.controls[device].release(input.pick(4).into());
            }
            2 => {
                let at = RINGS + u64::from(input.word() % 0x1000);
                let len = input.byte().into();
                world.dma.write(at, input.slice(len));
            }
            3 => {
                let device = usize::from(input.pick(DEVICES as u8));
                world.seats[device].kick(input.pick(3).into());
                world.pump();
            }
            _ => {
                let request = any_request(&mut input, wire);
                world.execute(&request, &mut last);
            }
        }
        world.pump();
    }
    world.end();
}

impl World {
    fn new(wire: Wire) -> Self {
        let dma = HostDma::new(0, RAM).expect("RAM");
        let mut seats = Vec::new();
        let mut pumps = Vec::new();
        let mut controls = Vec::new();
        for number in 0..DEVICES {
            let (device, of_it) = loopback(Shape::default());
            let view = dma.ram().view().expect("view");
            let offer = Offer {
                packed: true,
                ..Offer::default()
            };
            let name = format!("device{number}");
            let function = VirtioFunction::offering(name, device, view, offer).expect("events");
            pumps.push(Pump::new(Arc::clone(&function)).expect("events"));
            seats.push(function);
            controls.push(of_it);
        }
        let options = Options {
            wire,
            ..Options::default()
        };
        let manager = Manager::new(seats.clone(), &MockMsi::default(), options);
        let world = Self {
            manager: manager.expect("descriptors"),
            seats,
            pumps,
            controls,
            dma,
        };
        for seat in &world.seats {
            seat.reopen(Reasons::NO_DMA);
        }
        world
    }

    fn pump(&self) {
        for pump in &self.pumps {
            pump.turn();
        }
    }

    fn state(&self) -> (ManagerState, Vec<FunctionState>) {
        let seats = self.seats.iter().map(|seat| seat.save());
        (self.manager.save(), seats.collect())
    }

    /// Executes a command until it is done; lets go what it waits for if it waits.
    fn execute(&mut self, request: &[u8], last: &mut u64) {
        let before = self.state();
        let wire = self.manager.options().wire;
        let mut waited = false;
        let reply = loop {
            match self.manager.execute(request, 256, true) {
                Executed::Done(reply) => break reply,
                Executed::Later => {
                    assert!(!waited, "it waits for nothing");
                    waited = true;
                    self.let_go();
                }
            }
        };
        let answer = decode_reply(wire, &reply).expect("a well-formed answer");
        match answer {
            Err(_) if waited => panic!("a command that waited fails"),
            Err(error) => assert_eq!(self.state(), before, "{error}: it has an effect"),
            Ok(data) => {
                let parsed = Request::parse(wire, request).expect("a command that is done");
                if parsed.command == Command::Create {
                    let id = u64::from_le_bytes(data[..8].try_into().expect("an id"));
                    assert!(id > *last, "S4-9: ids grow");
                    *last = id;
                }
            }
        }
    }

    /// Everything in flight comes back.
    fn let_go(&self) {
        for control in &self.controls {
            control.hold(false);
            control.release(usize::MAX);
        }
        for pump in &self.pumps {
            assert!(pump.rest(TURNS), "a device never rests");
        }
    }

    /// All devices are destroyed, and what they were made of works in another one.
    fn end(mut self) {
        let devices: Vec<_> = self.manager.save().devices;
        let wire = self.manager.options().wire;
        let mut last = u64::MAX - 1;
        let command = |device, command, data: &[u8]| {
            let request = Request {
                device,
                command,
                data,
            };
            request.encode(wire)
        };
        for device in devices {
            self.execute(&command(device.id, Command::Destroy, &[]), &mut last);
        }
        let left = self.manager.save();
        assert!(left.devices.is_empty(), "a device outlives its end");
        for seat in &self.seats {
            assert_eq!(seat.status(), 0);
            assert_eq!(seat.features().0, seat.all_features());
            let _ = seat.write_status(status::ACKNOWLEDGE | status::DRIVER);
            assert!(seat.accept_features(feature::VERSION_1 | OWN));
            let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
            let _ = seat.write_status(ready);
            let _ = seat.write_status(ready | status::DRIVER_OK);
            assert!(seat.is_live(), "a seat is of no use any more");
        }
    }
}

/// Any bytes, or a command with numbers that are likely to mean something.
fn any_request(input: &mut Input<'_>, wire: Wire) -> Vec<u8> {
    if input.pick(8) == 0 {
        let len = usize::from(input.byte());
        return input.slice(len).to_vec();
    }
    let which = usize::from(input.byte()) % Command::TABLE.len();
    let command = match input.pick(6) {
        0 => Command::Create,
        1 => Command::StatusSet,
        2 => Command::VqEnableSet,
        _ => Command::TABLE[which].0,
    };
    let device = match input.byte() {
        choice @ 0..0xf0 => (choice % 5).into(),
        _ => input.qword(),
    };
    let mut fields = devices::transport_vq::Fields::new(wire);
    let queue = input.pick(3).into();
    let device = match command {
        Command::AvailResGet | Command::Create if input.pick(16) > 0 => 0,
        _ => device,
    };
    let data = match (input.pick(8), command) {
        (0, _) => {
            let len = input.pick(48).into();
            input.slice(len).to_vec()
        }
        (_, Command::Create) => {
            let more = u64::from(input.byte()) << 28 & feature::RING_PACKED;
            let features = feature::VERSION_1 | feature::RING_RESET | OWN | more;
            fields.u32(TYPE).u64(features).bytes()
        }
        (_, Command::FeatDriverSet) => {
            let packed = u64::from(input.pick(2)) * feature::RING_PACKED;
            let features = feature::VERSION_1 | feature::RING_RESET | packed;
            features.to_le_bytes().to_vec()
        }
        (_, Command::StatusSet) => {
            let ready = [0, 3, 11, 15, input.byte()];
            fields.u8(ready[usize::from(input.pick(5))]).bytes()
        }
        (_, Command::VqAddrSet) => {
            let at = RINGS + u64::from(input.byte()) * 0x10;
            fields.u16(queue).u64(at).u64(at + 0x400).u64(at + 0x200);
            fields.bytes()
        }
        (_, Command::VqStateSet) => {
            fields.u16(queue);
            for _ in 0..4 {
                fields.u16(input.pick(2).into());
            }
            fields.bytes()
        }
        (_, Command::VqEnableSet | Command::MsiVqEnable | Command::MsiVqMask) => {
            fields.u16(queue).u8(input.pick(2)).bytes()
        }
        _ => {
            let more = u64::from(input.word());
            fields.u16(queue).u16(input.pick(17).into());
            fields.raw(&more.to_le_bytes()).raw(&[0; 16]).bytes()
        }
    };
    let request = Request {
        device,
        command,
        data: &data,
    };
    request.encode(wire)
}
