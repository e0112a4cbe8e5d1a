//! Administration commands per second, on one thread: the bytes of a command go in as a driver writes them, the bytes
//! of its answer come out as a driver reads them.
//!
//! The argument is how many rounds to run; each prints one number. LIST_QUERY and LIST_USE of the SR-IOV group of an
//! owner with 255 members take turns: those that are about no single member.

use std::error::Error;
use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::admin::{FixedMembership, GroupType, Member, Options, Owner, OwnerDriver, Request};
use devices::memory::{GuestRam, PAGE_SIZE, RamRange};
use devices::rng::Rng;
use devices::virtio::VirtioFunction;
use vm_memory::GuestAddress;

const MEMBERS: u16 = 255;
/// LIST_QUERY and LIST_USE.
const OPCODES: [u16; 2] = [0, 1];
/// Commands between two looks at the clock.
const BATCH: u32 = 1000;
const ROUND: Duration = Duration::from_millis(500);

/// An owner of devices that do nothing.
fn owner() -> Result<Arc<Owner>, Box<dyn Error>> {
    let ram = GuestRam::new(&[RamRange {
        start: GuestAddress(0),
        len: PAGE_SIZE,
    }])?;
    let mut members = Vec::new();
    for number in 1..=MEMBERS {
        let view = ram.view()?;
        let function = VirtioFunction::new(format!("vf{number}"), Box::new(Rng::new()), view)?;
        members.push(function as Arc<dyn Member>);
    }
    Ok(Owner::new(members, Options::default())?)
}

fn main() -> ExitCode {
    let rounds = std::env::args().nth(1).and_then(|text| text.parse().ok());
    let Some(rounds) = rounds else {
        eprintln!("how many rounds?");
        return ExitCode::FAILURE;
    };
    let owner = match owner() {
        Ok(owner) => owner,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    owner.set_membership(Arc::new(FixedMembership(MEMBERS)));
    let mut driver = OwnerDriver::new(owner);
    let [query, choose] = OPCODES;
    let query = Request::encode(query, GroupType::SrIov, 0, &[]);
    let Ok(list) = driver.execute(&query).0 else {
        eprintln!("the owner refuses LIST_QUERY");
        return ExitCode::FAILURE;
    };
    let choose = Request::encode(choose, GroupType::SrIov, 0, &list.result);
    for _ in 0..rounds {
        match rate(&mut driver, [&query, &choose]) {
            Some(rate) => println!("{rate}"),
            None => {
                eprintln!("the owner refuses a command");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

/// Commands per second; none if one is refused.
fn rate(driver: &mut OwnerDriver, commands: [&[u8]; 2]) -> Option<u64> {
    let began = Instant::now();
    let mut done = 0u64;
    while began.elapsed() < ROUND {
        for _ in 0..BATCH {
            for command in commands {
                let reply = driver.execute(black_box(command));
                black_box(reply.encode());
                reply.0.ok()?;
                done += 1;
            }
        }
    }
    Some((done as f64 / began.elapsed().as_secs_f64()) as u64)
}
