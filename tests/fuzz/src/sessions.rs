//! Context sessions: drivers of an owner that read and write the contexts of live members.

use std::sync::Arc;

use devices::admin::{Failure, FixedMembership, Options, Outcome, Owner, Qualifier, Session};
use devices::context::{Decoder, Pushed, encode};
use devices::gate::{Mode, Party, Reasons};
use devices::state::FunctionState;
use devices::virtio::{Doors, Suspend, VirtioFunction};
use driver::access::Dma;
use driver::host::{HostDma, Shape};
use driver::virtio::admin::command;
use driver::virtio::{feature, status};

use crate::fixture::{Rig, loopback};
use crate::input::Input;

const MODE_SET: u16 = 0x08;
const SIZE_GET: u16 = 0x09;
const READ: u16 = 0x0a;
const WRITE: u16 = 0x0b;
const DISCARD: u16 = 0x0d;

const MEMBERS: usize = 2;
const PARTIES: [Party; 2] = [Party::Guest, Party::Monitor];
const RAM: usize = 1 << 20;
const BAD_FIELD: Failure = Failure::invalid(Qualifier::InvalidField);
const BAD_STATE: Failure = Failure::invalid(Qualifier::InvalidCommand);

/// How far one driver must be with the context of one member.
#[derive(Default)]
struct Progress {
    reading: Reading,
    writing: Option<Decoder>,
}

#[derive(Default)]
enum Reading {
    #[default]
    Begin,
    /// What is left.
    Part(Vec<u8>, usize),
    End,
}

impl Progress {
    fn is_partial(&self) -> bool {
        let read = matches!(self.reading, Reading::Part(_, 1..));
        read || self.writing.as_ref().is_some_and(Decoder::is_partial)
    }
}

struct World {
    rigs: Vec<Rig>,
    owner: Arc<Owner>,
    dma: HostDma,
    sessions: [Session; 2],
    progress: [[Progress; MEMBERS]; 2],
}

/// Two drivers freeze, read, write and thaw two members under their own drivers, with any bytes in any chunks: every
/// answer is the one the rules give, what is refused changes nothing, what is accepted is the state of the member, and
/// members that run afterwards work, or ask for a reset and then do.
pub fn context_sessions(data: &[u8]) {
    let mut input = Input::new(data);
    let mut world = World::new(input.byte());
    while !input.is_empty() {
        let (party, member) = (input.pick(2).into(), input.pick(MEMBERS as u8).into());
        match input.pick(10) {
            0 | 1 => world.set_mode(party, member, input.pick(4)),
            2 => world.read(party, member, input.word().into()),
            3 => world.read(party, member, 4096),
            4 => {
                let len = input.byte().into();
                world.write(party, member, input.slice(len));
            }
            5 | 6 => {
                let from = usize::from(input.pick(MEMBERS as u8));
                let bytes = world.any_context(&mut input, from);
                let chunk = usize::from(input.byte()).max(1);
                let chunk = if chunk < 32 { chunk } else { bytes.len() };
                // Not always to its end.
                let most = usize::from(input.byte()).max(1);
                for piece in bytes.chunks(chunk.max(1)).take(most) {
                    world.write(party, member, piece);
                }
            }
            7 => world.discard(party, member),
            8 => world.reset(member),
            _ => world.drive(member, &mut input),
        }
    }
    world.finish();
}

impl World {
    fn new(bits: u8) -> Self {
        let dma = HostDma::new(0, RAM).expect("RAM");
        let doors = Doors {
            suspend: [None, Some(Suspend::V5), Some(Suspend::V1_4)][usize::from(bits % 3)],
            device_stop: (bits & 4 != 0).then_some(Doors::DEVICE_STOP),
            queue_status: bits & 8 != 0,
        };
        let rigs: Vec<_> = (0..MEMBERS)
            .map(|_| Rig::offering(loopback(Shape::default()).0, &dma, doors))
            .collect();
        let members = rigs.iter().map(|rig| Arc::clone(&rig.function) as _);
        let owner = Owner::new(members.collect(), Options::default()).expect("descriptors");
        owner.set_membership(Arc::new(FixedMembership(MEMBERS as u16)));
        let mut world = Self {
            rigs,
            owner,
            dma,
            sessions: PARTIES.map(Session::new),
            progress: Default::default(),
        };
        for party in 0..2 {
            let list = world.send(party, &command(0, 1, 0, &[]), 64);
            let list = list.expect("LIST_QUERY").0;
            world
                .send(party, &command(1, 1, 0, &list), 64)
                .expect("LIST_USE");
        }
        (0..MEMBERS).for_each(|member| world.start(member));
        world
    }

    /// The result and the output of a command, or why it was refused; it then had no effect.
    fn send(
        &mut self,
        party: usize,
        request: &[u8],
        room: usize,
    ) -> Result<(Vec<u8>, u32), Failure> {
        let before = self.states();
        let session = &mut self.sessions[party];
        let Outcome::Done(reply) = self.owner.execute(session, request, 8 + room) else {
            panic!("nothing is in flight, and so there is nothing to wait for");
        };
        let answer = reply.0.map(|answer| (answer.result, answer.output));
        if answer.is_err() {
            assert_eq!(self.states(), before, "a refused command has an effect");
        }
        answer
    }

    fn command(
        &mut self,
        party: usize,
        member: usize,
        opcode: u16,
        data: &[u8],
        room: usize,
    ) -> Result<(Vec<u8>, u32), Failure> {
        self.send(party, &command(opcode, 1, member as u64 + 1, data), room)
    }

    fn states(&self) -> Vec<(FunctionState, Reasons)> {
        let functions = self.rigs.iter().map(|rig| &rig.function);
        functions.map(|f| (f.save(), f.reasons())).collect()
    }

    fn function(&self, member: usize) -> &Arc<VirtioFunction> {
        &self.rigs[member].function
    }

    fn mode(&self, party: usize, member: usize) -> Mode {
        self.function(member).reasons().mode(PARTIES[party])
    }

    fn set_mode(&mut self, party: usize, member: usize, raw: u8) {
        let (now, mode) = (self.mode(party, member), Mode::from_raw(raw));
        let progress = &self.progress[party][member];
        let partial = progress.is_partial();
        let written = progress.writing.as_ref().and_then(Decoder::latest).cloned();
        let expected = match mode {
            None => Err(BAD_FIELD),
            Some(mode) if mode == now => Ok(()),
            Some(Mode::Active | Mode::Stop) if partial => Err(BAD_STATE),
            Some(_) => Ok(()),
        };
        let before = self.function(member).save();
        let answer = self.command(party, member, MODE_SET, &[raw], 0);
        assert_eq!(
            answer.map(drop),
            expected,
            "DEV_MODE_SET of {now:?} to {raw}"
        );
        let Some(mode) = mode.filter(|mode| *mode != now && expected.is_ok()) else {
            return;
        };
        assert_eq!(self.mode(party, member), mode, "S3-3");
        self.progress[party][member] = Progress::default();
        let after = self.function(member).save();
        match written.filter(|_| now == Mode::Freeze) {
            Some(mut state) => {
                let generation = &mut state.registers.config_generation;
                *generation = generation.wrapping_add(1);
                state.offered = before.offered;
                assert_eq!(after, state, "S3-32");
            }
            None => assert_eq!(after, before, "a mode is no part of the context"),
        }
    }

    fn context(&self, party: usize, member: usize) -> Vec<u8> {
        let function = self.function(member);
        let writing = self.progress[party][member].writing.as_ref();
        let shape = function.shape();
        match writing.and_then(Decoder::latest) {
            Some(state) => encode(state, &shape),
            None => encode(&function.save(), &shape),
        }
    }

    fn read(&mut self, party: usize, member: usize, room: usize) {
        let (bytes, at) = match std::mem::take(&mut self.progress[party][member].reading) {
            Reading::Begin => (self.context(party, member), 0),
            Reading::Part(bytes, at) => (bytes, at),
            Reading::End => (Vec::new(), 0),
        };
        let end = (at + room).min(bytes.len());
        let (result, output) = self.command(party, member, READ, &[], room).expect("S3-22");
        assert_eq!(result, bytes[at..end], "S3-25, G3-m");
        assert_eq!(output as usize, end - at, "S3-24");
        let left = bytes.len() - end;
        self.progress[party][member].reading = match left {
            0 => Reading::End,
            _ => Reading::Part(bytes, end),
        };
        let (size, _) = self
            .command(party, member, SIZE_GET, &[0], 8)
            .expect("S3-26");
        assert_eq!(size, (left as u64).to_le_bytes(), "S3-26, S3-27");
    }

    fn write(&mut self, party: usize, member: usize, data: &[u8]) {
        let frozen = self.mode(party, member) == Mode::Freeze;
        let answer = self.command(party, member, WRITE, data, 0).map(drop);
        if !frozen {
            assert_eq!(answer, Err(BAD_STATE), "S3-29");
            return;
        }
        let function = Arc::clone(self.function(member));
        let progress = &mut self.progress[party][member];
        let writing = &mut progress.writing;
        let decoder = writing.get_or_insert_with(|| Decoder::new(&function.shape()));
        match decoder.push_checked(data, |state| function.check(state).map(drop)) {
            Ok(pushed) => {
                assert_eq!(answer, Ok(()), "S3-34");
                if pushed == Pushed::Complete {
                    progress.reading = Reading::Begin;
                }
            }
            Err(error) => assert_eq!(answer, Err(BAD_FIELD), "G3-p: {error}"),
        }
    }

    /// The context of a member, or one with a byte of it changed, or another state in it.
    fn any_context(&self, input: &mut Input<'_>, from: usize) -> Vec<u8> {
        let function = self.function(from);
        let mut state = function.save();
        match input.pick(6) {
            0 => state.registers.status = input.byte(),
            1 => {
                let queue = &mut state.queues[usize::from(input.pick(2))];
                queue.enabled = input.byte() & 1 != 0;
                let (next, owned) = (input.word(), input.pick(4));
                let owned = (0..owned).map(|_| input.pick(16).into()).collect();
                if let Some(ring) = queue.split_mut() {
                    (ring.next_available, ring.owned) = (next, owned);
                }
            }
            2 => {
                let queue = &mut state.queues[usize::from(input.pick(2))];
                queue.size = 1 << input.pick(6);
                queue.stopped = input.byte() & 1 != 0;
                queue.descriptor_area = u64::from(input.word()) << 4;
                queue.driver_area = u64::from(input.word()) << 4;
                queue.device_area = u64::from(input.word()) << 4;
            }
            3 => state.config = (0..state.config.len()).map(|_| input.byte()).collect(),
            _ => {}
        }
        let mut bytes = encode(&state, &function.shape());
        if input.pick(4) == 0 {
            let at = usize::from(input.word()) % bytes.len();
            bytes[at] = input.byte();
        }
        bytes
    }

    fn discard(&mut self, party: usize, member: usize) {
        self.command(party, member, DISCARD, &[], 0).expect("S3-28");
        self.progress[party][member] = Progress::default();
    }

    /// A function level reset, which works in every mode and ends what was begun (G3-z).
    fn reset(&mut self, member: usize) {
        let modes = [0, 1].map(|party| self.mode(party, member));
        // The layout of nothing is watched here.
        let _ = self.function(member).request_reset();
        assert!(
            !self.function(member).is_resetting(),
            "nothing is in flight"
        );
        assert_eq!([0, 1].map(|party| self.mode(party, member)), modes, "G3-z");
        for progress in &mut self.progress {
            // What is being read is a snapshot, and stays one.
            progress[member].writing = None;
        }
    }

    /// What the driver of a member does; in mode Freeze, it changes nothing (S3-14, S3-17).
    fn drive(&mut self, member: usize, input: &mut Input<'_>) {
        let function = Arc::clone(self.function(member));
        let before = function.save();
        match input.pick(6) {
            // As with every write to a register here, nobody watches the layout.
            0 => {
                let _ = function.write_status(input.byte());
            }
            1 => function.write_config(input.pick(16).into(), &[input.byte()]),
            2 => function.run_queue(input.pick(2).into(), input.byte() & 1 != 0),
            3 => {
                let address = u64::from(input.word()) << 4;
                let len = input.byte().into();
                self.dma.write(address, input.slice(len));
            }
            4 => self.start(member),
            _ => (0..2).for_each(|queue| function.kick(queue)),
        }
        self.rigs[member].settle();
        if function.reasons().intersects(Reasons::FREEZE) {
            assert_eq!(function.save(), before, "S3-14, S3-17");
        }
    }

    /// Sets a device up, from its reset or as far as it goes.
    fn start(&self, member: usize) {
        let function = self.function(member);
        let steps = [
            status::ACKNOWLEDGE,
            status::DRIVER,
            status::FEATURES_OK,
            status::DRIVER_OK,
        ];
        let offered =
            u64::from(function.device_features(0)) | u64::from(function.device_features(1)) << 32;
        let accepted = offered & !feature::EVENT_IDX;
        function.set_driver_features(0, accepted as u32);
        function.set_driver_features(1, (accepted >> 32) as u32);
        let base = 0x1_0000 * (1 + member as u64);
        for step in steps {
            if step == status::DRIVER_OK {
                for queue in 0..2 {
                    let at = base + 0x1000 * u64::from(queue);
                    function.update_queue(queue, |registers| {
                        registers.descriptor_area = at;
                        registers.driver_area = at + 0x400;
                        registers.device_area = at + 0x800;
                    });
                    let _ = function.enable_queue(queue);
                }
            }
            let _ = function.write_status(function.status() | step);
        }
    }

    /// All members run: they rest whatever is in their rings, and after a reset they work.
    fn finish(mut self) {
        for member in 0..MEMBERS {
            for party in 0..2 {
                self.discard(party, member);
                self.set_mode(party, member, Mode::Active as u8);
            }
            self.rigs[member].settle();
            self.reset(member);
            assert_eq!(self.function(member).status(), 0, "S3-12");
            self.start(member);
            let status = self.function(member).status();
            assert_ne!(status & status::DRIVER_OK, 0, "it does not start any more");
            self.echo(member);
        }
    }

    /// One request to queue 0 of a device that was just started.
    fn echo(&self, member: usize) {
        let base = 0x1_0000 * (1 + member as u64);
        let (available, used) = (base + 0x400, base + 0x800);
        let (from, to) = (base + 0x4000, base + 0x5000);
        self.dma.write(from, b"still alive");
        self.dma.write(to, &[0; 11]);
        let descriptor = |address: u64, flags: u16, next: u16| {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(11u32.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            bytes
        };
        let table = [descriptor(from, 1, 1), descriptor(to, 2, 0)].concat();
        self.dma.write(base, &table);
        // Flags, index, and the first entry.
        self.dma.write(available, &[0; 64]);
        self.dma.write(used, &[0; 64]);
        self.dma.store(available + 2, 1);
        self.function(member).kick(0);
        self.rigs[member].settle();
        assert_eq!(self.dma.load(used + 2), 1, "the request does not come back");
        let mut echo = [0; 11];
        self.dma.read(to, &mut echo);
        assert_eq!(&echo, b"still alive");
    }
}
