//! All doors to the gate at once, in any order, to a virtual function under I/O.
//!
//! A sequence of [`Step`](model::Step)s is what the guest, its owner driver, the monitor and the device do. The
//! [`Model`](model::Model) says what follows from each; the [`World`](world::World) does the same to a real owner with
//! two members, as seen from a guest, and compares. At times all of it is saved and put into another machine, where it goes
//! on; what is saved there is the same. `PROPTEST_CASES` asks for more sequences than the usual ones.

// Helpers of tests, which clippy does not know for tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod disk;
mod model;
mod singles;
mod snapshot;
mod step;
mod world;

use std::fmt::Debug;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

use step::Step;
use world::{Kind, Setup, World};

/// The steps that remove every reason; what is held comes back, and what was reset is set up again.
const FINALE: [Step; 14] = [
    Step::Hold(false),
    Step::Release(usize::MAX),
    Step::MonitorMode(0),
    Step::GuestMode(0),
    Step::Pause(false),
    Step::BusMaster(true),
    Step::Init,
    Step::Suspend(false),
    Step::DeviceStop(false),
    Step::EnableQueue(0),
    Step::EnableQueue(1),
    Step::RunQueue(0, true),
    Step::RunQueue(1, true),
    Step::Release(usize::MAX),
];

/// The same sequences in every run, as many as `PROPTEST_CASES` says, or `cases`.
fn check<S: Strategy<Value = (Setup, Vec<Step>)>>(cases: u32, sequences: S)
where
    S::Value: Debug,
{
    let asked = std::env::var_os("PROPTEST_CASES").is_some();
    let mut config = Config {
        failure_persistence: None,
        // A disk that does not answer costs ten seconds, each time.
        max_shrink_time: 60_000,
        ..Config::default()
    };
    if !asked {
        config.cases = cases;
    }
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let outcome = runner.run(&sequences, |(setup, steps)| {
        let mut world = World::new(setup);
        let all = steps.iter().chain(&FINALE);
        for (index, step) in all.enumerate() {
            world
                .apply(step)
                .map_err(|what| TestCaseError::fail(format!("step {index}, {step:?}: {what}")))?;
        }
        world.finish().map_err(TestCaseError::fail)
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

fn sequences(kind: BoxedStrategy<Kind>) -> impl Strategy<Value = (Setup, Vec<Step>)> {
    (
        world::setup(kind),
        prop::collection::vec(step::step(), 1..60),
    )
}

/// While any reason holds and is acknowledged, no interrupt, no write to memory and no movement of a ring; when the
/// last is gone, everything goes on without a kick, and every request comes back once.
///
/// Requirements: S0-4, S0-5, S0-9, S0-11, S1-12, S1-13, S1-14, S1-19, S2-6, S2-8, S2-9, S2-10, S3-3, S3-8, S3-9, S3-14,
/// S3-15, S3-16, S3-17, S3-20, S3-32, B-41, B-42, B-44, B-45, B-46
#[test]
fn s3_8_any_order_of_stops_is_one_stop() {
    check(192, sequences(world::loopback()));
}

/// The same with disks, whose requests run on another thread: one has begun, those behind it can be given up.
///
/// Requirements: S3-9, S3-15, S0-5, S2-9
#[test]
fn s3_9_any_order_of_stops_is_one_stop_for_disks() {
    check(96, sequences(Just(Kind::Disk).boxed()));
}
