//! Feature negotiation of managed devices: class 3.

use driver::virtio::management::{code, command, number};
use driver::virtio::{feature, status};

use crate::rig::{OWN_FEATURE, Rig};

/// Requirements: S4-12, S4-13, S4-14, M11, M13
#[test]
fn s4_13_a_device_offers_what_it_was_made_with_and_gets_what_its_driver_accepts() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let made = feature::VERSION_1 | OWN_FEATURE;
    let id = live.create(made);
    let offered = live.call(id, command::DEVICE_FEATURES, &[]).unwrap();
    assert_eq!(number(&offered[..8]), made);
    let none = live.call(id, command::DRIVER_FEATURES, &[]).unwrap();
    assert_eq!(number(&none[..8]), 0);
    let accept = |features: u64| features.to_le_bytes().to_vec();
    let answer = live.call(
        id,
        command::ACCEPT_FEATURES,
        &accept(made | feature::RING_RESET),
    );
    assert_eq!(
        answer,
        Err(code::VALUE),
        "it has that, and does not offer it"
    );
    let fewer = accept(feature::VERSION_1);
    live.call(id, command::ACCEPT_FEATURES, &fewer).unwrap();
    live.set_status(
        id,
        status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK,
    );
    let late = live.call(id, command::ACCEPT_FEATURES, &accept(made));
    assert_eq!(late, Err(code::STATE), "after FEATURES_OK");
    let accepted = live.call(id, command::DRIVER_FEATURES, &[]).unwrap();
    assert_eq!(number(&accepted[..8]), feature::VERSION_1);
}

/// Requirements: M12
#[test]
fn m12_the_driver_says_how_many_words_of_features_it_wants() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let id = live.create(feature::VERSION_1);
    for (room, words) in [(8 + 8, 1), (8 + 15, 1), (8 + 24, 3), (8 + 256, 8)] {
        let answer = live
            .management
            .send(&live.transport, id, command::DEVICE_FEATURES, &[], room);
        let answer = answer.unwrap();
        let features = live.management.parse(command::DEVICE_FEATURES, &answer);
        let features = features.unwrap().unwrap();
        assert_eq!(features.len(), 8 * words, "{room} bytes");
        assert_eq!(number(&features[..8]), feature::VERSION_1);
        assert!(features[8..].iter().all(|byte| *byte == 0));
    }
    let mut two = feature::VERSION_1.to_le_bytes().to_vec();
    two.extend([0; 8]);
    live.call(id, command::ACCEPT_FEATURES, &two).unwrap();
    two[15] = 1;
    let answer = live.call(id, command::ACCEPT_FEATURES, &two);
    assert_eq!(answer, Err(code::VALUE), "there is no feature 120");
}
