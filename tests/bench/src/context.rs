//! What it takes to move device contexts: bytes of a context, and microseconds to save, restore and activate members,
//! on one thread.
//!
//! The argument is how many rounds to run. Each prints a line for each number of members and of queues:
//! `MEMBERS QUEUES BYTES SAVE RESTORE ACTIVATE THAW`, the times for all members together:
//!
//! * SAVE: DEV_CTX_READ of the whole context, of a member in mode Freeze
//! * RESTORE: DEV_CTX_WRITE of it, and DEV_MODE_SET to Active
//! * ACTIVATE: that DEV_MODE_SET alone
//! * THAW: DEV_MODE_SET to Active without a context that was written
//!
//! Every queue of the members is live, of 256 entries, with a ring of its own.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use devices::admin::{FixedMembership, GroupType, Member, Options, Owner, OwnerDriver, Request};
use devices::memory::{GuestRam, PAGE_SIZE, RamRange};
use devices::state::{DeviceState, Unsavable};
use devices::virtio::{
    DeviceType, Io, Progress, RingError, Source, Status, VirtioDevice, VirtioFunction, feature,
};
use vm_memory::GuestAddress;

/// Members, and queues of each.
const CASES: [(u16, u16); 7] = [
    (1, 1),
    (1, 16),
    (1, 64),
    (1, 255),
    (16, 1),
    (16, 16),
    (255, 1),
];
const QUEUE_SIZE: u16 = 256;
/// Bytes of guest memory for the ring of each queue, and where its parts begin in them.
const RING: u64 = 0x2000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x1400;
/// Members use the same rings: none of them ever has anything to do.
const MOST_QUEUES: u64 = 255;

const MODE_SET: u16 = 0x08;
const READ: u16 = 0x0a;
const WRITE: u16 = 0x0b;
const ACTIVE: u8 = 0;
const FREEZE: u8 = 2;

/// Members are measured one after the other; each of them this often in a round, to be longer than what the clock and a
/// cold cache cost.
const REPEATS: u32 = 8;

/// A device of so many queues that does nothing.
struct Idle(u16);

impl VirtioDevice for Idle {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.0.into()]
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn save_state(&self) -> Result<DeviceState, Unsavable> {
        Ok(DeviceState::None)
    }

    fn check_state(&self, state: &DeviceState) -> Result<(), &'static str> {
        state.must_be_none()
    }

    fn restore_state(&mut self, _state: &DeviceState) {}

    fn process(&mut self, _queue: u16, _io: &mut Io<'_>) -> Result<Progress, RingError> {
        Ok(Progress::Exhausted)
    }

    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    fn on_event(&mut self, _token: u16, _io: &mut Io<'_>) -> Result<(), RingError> {
        Ok(())
    }
}

/// Sets up a function as a driver does, all queues enabled.
fn start(function: &VirtioFunction) {
    let steps = [Status::ACKNOWLEDGE, Status::DRIVER];
    let write = |bits: Status| {
        let old = Status::from_bits_truncate(function.status());
        // Nobody watches the layout here.
        let _ = function.write_status((old | bits).bits());
    };
    steps.into_iter().for_each(write);
    let accepted = feature::VERSION_1 | feature::RING_RESET;
    function.set_driver_features(0, accepted as u32);
    function.set_driver_features(1, (accepted >> 32) as u32);
    write(Status::FEATURES_OK);
    for queue in 0..function.num_queues() {
        let base = RING * (1 + u64::from(queue));
        function.update_queue(queue, |registers| {
            registers.descriptor_area = base;
            registers.driver_area = base + AVAILABLE;
            registers.device_area = base + USED;
        });
        let _ = function.enable_queue(queue);
    }
    write(Status::DRIVER_OK);
}

/// Nanoseconds of all members.
#[derive(Default)]
struct Times {
    save: u128,
    restore: u128,
    activate: u128,
    thaw: u128,
}

struct Bench {
    driver: OwnerDriver,
    members: u16,
}

impl Bench {
    fn new(members: u16, queues: u16) -> Result<Self, Box<dyn Error>> {
        let len = RING * (1 + MOST_QUEUES);
        let ram = GuestRam::new(&[RamRange {
            start: GuestAddress(0),
            len: (len as usize).next_multiple_of(PAGE_SIZE),
        }])?;
        let mut group = Vec::new();
        for number in 1..=members {
            let device = Box::new(Idle(queues));
            let function = VirtioFunction::new(format!("vf{number}"), device, ram.view()?)?;
            start(&function);
            group.push(function as Arc<dyn Member>);
        }
        let owner = Owner::new(group, Options::default())?;
        owner.set_membership(Arc::new(FixedMembership(members)));
        let mut driver = OwnerDriver::new(owner);
        driver
            .negotiate(GroupType::SrIov)
            .map_err(|refused| format!("{refused:?}"))?;
        Ok(Self { driver, members })
    }

    fn command(
        &mut self,
        opcode: u16,
        member: u16,
        data: &[u8],
    ) -> Result<Vec<u8>, Box<dyn Error>> {
        let request = Request::encode(opcode, GroupType::SrIov, member.into(), data);
        self.execute(&request)
    }

    fn execute(&mut self, request: &[u8]) -> Result<Vec<u8>, Box<dyn Error>> {
        let answer = self.driver.execute(request).0;
        Ok(answer.map_err(|refused| format!("{refused:?}"))?.result)
    }

    /// What it takes to move every member once, and the bytes of a context.
    fn round(&mut self) -> Result<(usize, Times), Box<dyn Error>> {
        let mut times = Times::default();
        let mut bytes = 0;
        for member in 1..=self.members {
            let active = Request::encode(MODE_SET, GroupType::SrIov, member.into(), &[ACTIVE]);
            self.command(MODE_SET, member, &[FREEZE])?;
            let began = Instant::now();
            let context = self.command(READ, member, &[])?;
            times.save += began.elapsed().as_nanos();
            bytes = context.len();
            if !self.command(READ, member, &[])?.is_empty() {
                return Err("more than one command reads".into());
            }
            let write = Request::encode(WRITE, GroupType::SrIov, member.into(), &context);
            let began = Instant::now();
            self.execute(&write)?;
            let written = Instant::now();
            self.execute(&active)?;
            times.activate += written.elapsed().as_nanos();
            times.restore += began.elapsed().as_nanos();
            self.command(MODE_SET, member, &[FREEZE])?;
            let began = Instant::now();
            self.execute(&active)?;
            times.thaw += began.elapsed().as_nanos();
        }
        Ok((bytes, times))
    }
}

fn run(rounds: u32) -> Result<(), Box<dyn Error>> {
    let micros = |nanos: u128| nanos as f64 / 1000.0 / f64::from(REPEATS);
    for (members, queues) in CASES {
        let mut bench = Bench::new(members, queues)?;
        // Whatever is done for the first time.
        bench.round()?;
        for _ in 0..rounds {
            let mut sum = Times::default();
            let mut bytes = 0;
            for _ in 0..REPEATS {
                let (len, times) = bench.round()?;
                bytes = len;
                sum.save += times.save;
                sum.restore += times.restore;
                sum.activate += times.activate;
                sum.thaw += times.thaw;
            }
            let [save, restore, activate, thaw] =
                [sum.save, sum.restore, sum.activate, sum.thaw].map(micros);
            println!("{members} {queues} {bytes} {save:.2} {restore:.2} {activate:.2} {thaw:.2}");
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let rounds = std::env::args().nth(1).and_then(|text| text.parse().ok());
    let Some(rounds) = rounds else {
        eprintln!("how many rounds?");
        return ExitCode::FAILURE;
    };
    match run(rounds) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
