//! Every target, over its seeds and over random bytes, for a bounded time.

// Helpers of tests, which clippy does not know for tests.
#![allow(clippy::panic, clippy::unwrap_used)]

use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};

/// Time for random bytes, for each target.
const TIME: Duration = Duration::from_secs(3);

/// Runs target `name` over `corpus/<name>`, then over bytes that are the same in every run.
fn smoke(name: &str) {
    let (_, target) = fuzz::TARGETS
        .iter()
        .find(|(known, _)| *known == name)
        .unwrap();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(name);
    let mut seeds: Vec<_> = std::fs::read_dir(&corpus)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "{} has no seeds", corpus.display());
    for seed in seeds {
        println!("{}", seed.display());
        target(&std::fs::read(&seed).unwrap());
    }
    target(&[]);
    let mut runner = TestRunner::new_with_rng(
        Config::default(),
        proptest::test_runner::TestRng::deterministic_rng(
            proptest::test_runner::RngAlgorithm::ChaCha,
        ),
    );
    let bytes = prop::collection::vec(any::<u8>(), 0..2048);
    let deadline = Instant::now() + TIME;
    while Instant::now() < deadline {
        let tree = bytes.new_tree(&mut runner).unwrap();
        let input = tree.current();
        let outcome = std::panic::catch_unwind(|| target(&input));
        if outcome.is_err() {
            let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
            std::fs::write(&path, &input).unwrap();
            panic!("{name} fails; the bytes are in {}", path.display());
        }
    }
}

macro_rules! smoke {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            smoke(stringify!($name));
        })*

        #[test]
        fn every_target_has_a_smoke_test() {
            let tested = [$(stringify!($name)),*];
            let targets: Vec<_> = fuzz::TARGETS.iter().map(|(name, _)| *name).collect();
            assert_eq!(targets, tested);
        }
    };
}

smoke! {
    admin_commands
    configuration
    context
    context_sessions
    kernel_image
    migration_stream
    net_frames
    pci_config
    queue_device_side
    queue_driver_side
    snapshot_restore
    snapshot_state
    sriov_config
    transport_commands
    virtio_registers
    write_records
}
