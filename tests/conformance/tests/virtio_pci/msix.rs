//! MSI-X: vectors, masks, pending bits.

use conformance::{ALL, MESSAGE_ADDRESS, QUIET, Rig, SIMPLE, enable_msix, message_data};
use driver::pci::VectorEntry;
use driver::virtio::{NO_VECTOR, common};

/// Requirements: E4
#[test]
fn e4_there_is_a_vector_for_every_queue_and_one_for_the_configuration() {
    let rig = Rig::new();
    let transport = rig.transport();
    let queues = transport.get(common::NUM_QUEUES);
    assert!(transport.msix().unwrap().vectors > queues);
}

/// Requirements: E4
#[test]
fn e4_vectors_start_masked_and_off() {
    let rig = Rig::new();
    let transport = rig.transport();
    let msix = transport.msix().unwrap();
    assert!(!msix.is_enabled(transport.function()));
    assert!(!msix.is_masked(transport.function()));
    for vector in 0..msix.vectors {
        assert!(msix.entry(transport.function(), vector).masked);
        assert!(!msix.is_pending(transport.function(), vector));
    }
}

/// Requirements: E4
#[test]
fn e4_vectors_read_back_and_impossible_ones_are_refused() {
    let rig = Rig::new();
    let transport = rig.transport();
    let vectors = transport.msix().unwrap().vectors;
    transport.select(1);
    for register in [common::CONFIG_MSIX_VECTOR, common::QUEUE_MSIX_VECTOR] {
        for (vector, expected) in [
            (0, 0),
            (vectors - 1, vectors - 1),
            (vectors, NO_VECTOR),
            (1, 1),
            (0x800, NO_VECTOR),
            (2, 2),
            (NO_VECTOR, NO_VECTOR),
        ] {
            transport.set(register, vector);
            assert_eq!(transport.get(register), expected, "{vector:#x}");
        }
    }
}

/// Requirements: E4
#[test]
fn e4_each_queue_interrupts_by_its_own_vector_with_its_message() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    for queue in [1, 0] {
        live.echo(queue, b"message");
        let delivered = rig.machine.msi().take();
        assert_eq!(delivered.len(), 1);
        let message = delivered[0].message.unwrap();
        assert_eq!(delivered[0].vector, 1 + queue);
        assert_eq!(message.address, MESSAGE_ADDRESS);
        assert_eq!(message.data, message_data(1 + queue));
    }
}

/// Requirements: E4
#[test]
fn e4_queues_and_configuration_can_share_a_vector() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    for queue in [0, 1] {
        live.transport.select(queue);
        live.transport.set(common::QUEUE_MSIX_VECTOR, 0);
    }
    live.echo(0, b"shared");
    live.echo(1, b"shared");
    rig.controls.change_config(vec![7; 16]);
    rig.settle();
    assert_eq!(live.interrupts(), [0, 0, 0]);
}

/// Requirements: E4
#[test]
fn e4_no_vector_means_no_interrupt() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    live.transport.select(0);
    live.transport.set(common::QUEUE_MSIX_VECTOR, NO_VECTOR);
    live.transport.set_config_vector(NO_VECTOR).unwrap();
    live.echo(0, b"silence");
    rig.controls.change_config(vec![7; 16]);
    rig.settle();
    assert_eq!(live.interrupts(), QUIET);
}

/// Requirements: E4
#[test]
fn e4_a_masked_vector_is_pending_until_it_is_unmasked() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    let function = rig.function();
    let msix = *live.transport.msix().unwrap();
    msix.mask(&function, 1, true);
    live.echo(0, b"first");
    live.echo(0, b"second");
    assert_eq!(live.interrupts(), QUIET);
    assert!(msix.is_pending(&function, 1));
    assert!(!msix.is_pending(&function, 2));
    msix.mask(&function, 1, false);
    assert_eq!(live.interrupts(), [1], "one, however many were due");
    assert!(!msix.is_pending(&function, 1));
    msix.mask(&function, 1, true);
    msix.mask(&function, 1, false);
    assert_eq!(live.interrupts(), QUIET);
}

/// Requirements: E4
#[test]
fn e4_a_mask_holds_back_no_other_vector() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    let msix = *live.transport.msix().unwrap();
    msix.mask(&rig.function(), 1, true);
    live.echo(1, b"other queue");
    assert_eq!(live.interrupts(), [2]);
}

/// Requirements: E4
#[test]
fn e4_the_function_mask_holds_back_all_vectors() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    let function = rig.function();
    let msix = *live.transport.msix().unwrap();
    msix.set_control(&function, true, true);
    live.echo(0, b"one");
    live.echo(1, b"two");
    assert_eq!(live.interrupts(), QUIET);
    assert!(msix.is_pending(&function, 1) && msix.is_pending(&function, 2));
    msix.mask(&function, 2, true);
    msix.set_control(&function, true, false);
    assert_eq!(live.interrupts(), [1]);
    assert!(msix.is_pending(&function, 2));
    msix.mask(&function, 2, false);
    assert_eq!(live.interrupts(), [2]);
}

/// Requirements: E4
#[test]
fn e4_a_message_that_changed_under_the_mask_is_the_one_that_is_sent() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    let function = rig.function();
    let msix = *live.transport.msix().unwrap();
    msix.mask(&function, 1, true);
    live.echo(0, b"due");
    let entry = VectorEntry {
        address: 0x1_fee0_1000,
        data: 0x99,
        masked: false,
    };
    msix.set_entry(&function, 1, entry);
    assert_eq!(msix.entry(&function, 1), entry);
    let delivered = rig.machine.msi().take();
    assert_eq!(delivered.len(), 1);
    let message = delivered[0].message.unwrap();
    assert_eq!((message.address, message.data), (0x1_fee0_1000, 0x99));
}

/// Requirements: E4
#[test]
fn e4_without_msix_nothing_is_sent_or_remembered() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    let function = rig.function();
    let msix = *live.transport.msix().unwrap();
    msix.set_control(&function, false, false);
    live.echo(0, b"unheard");
    assert!(!msix.is_pending(&function, 1));
    msix.set_control(&function, true, false);
    assert_eq!(live.interrupts(), QUIET);
    live.echo(0, b"heard");
    assert_eq!(live.interrupts(), [1]);
}

/// Requirements: E4
#[test]
fn e4_the_pending_bits_are_read_only() {
    let rig = Rig::new();
    let live = rig.live(ALL);
    let function = rig.function();
    let msix = *live.transport.msix().unwrap();
    msix.mask(&function, 1, true);
    let word = driver::access::Register::<u64>::at(0);
    driver::access::FunctionExt::set(&function, msix.pending, word, u64::MAX);
    assert!(!msix.is_pending(&function, 1));
    msix.mask(&function, 1, false);
    assert_eq!(live.interrupts(), QUIET);
}

/// Requirements: E4
#[test]
fn e4_the_vector_of_a_live_queue_can_change() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    live.transport.select(0);
    live.transport.set(common::QUEUE_MSIX_VECTOR, 2);
    live.echo(0, b"elsewhere");
    assert_eq!(live.interrupts(), [2]);
    live.transport.set(common::QUEUE_MSIX_VECTOR, NO_VECTOR);
    live.echo(0, b"nowhere");
    assert_eq!(live.interrupts(), QUIET);
}

/// Requirements: E4, E1
#[test]
fn e4_a_device_reset_leaves_the_vector_table_alone() {
    let rig = Rig::new();
    let live = rig.live(SIMPLE);
    let function = rig.function();
    let msix = *live.transport.msix().unwrap();
    live.transport.reset().unwrap();
    assert!(msix.is_enabled(&function));
    assert_eq!(msix.entry(&function, 1).data, message_data(1));
}

/// Requirements: E4
#[test]
fn e4_every_interrupt_goes_to_a_vector_that_has_a_route() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    let function = rig.function();
    let msix = *live.transport.msix().unwrap();
    for step in 0..32u8 {
        msix.mask(&function, 1, step & 1 != 0);
        msix.set_control(&function, step & 2 == 0, step & 4 != 0);
        live.echo(0, &[step]);
    }
    enable_msix(&live.transport);
    let delivered = rig.machine.msi().take();
    assert!(!delivered.is_empty());
    assert!(delivered.iter().all(|d| d.message.is_some()));
}
