use super::*;
use driver::host::{Controls, Loopback, Machine, Place, Plugged, Shape};
use driver::pci::{change_command, command};
use driver::virtio::{Buffer, NO_VECTOR, SplitQueue, Transport};

const PATIENCE: Duration = Duration::from_millis(300);

/// A machine with these functions.
fn machine(names: &[&str]) -> (Machine, Vec<(Plugged, Controls)>) {
    let machine = Machine::new().unwrap();
    let plug = |name: &&str| {
        let (device, controls) = Loopback::new(Shape::default()).unwrap();
        (machine.add(name, device, Place::RootBus).unwrap(), controls)
    };
    let plugged = names.iter().map(plug).collect();
    machine.power_on().unwrap();
    (machine, plugged)
}

/// Has the device fetch a chain and hold it.
fn hold_one(machine: &Machine, (plugged, controls): &(Plugged, Controls)) {
    let function = machine.function(machine.locate(plugged));
    change_command(&function, command::MEMORY | command::BUS_MASTER, 0);
    let transport = Transport::new(function).unwrap();
    transport.negotiate(0).unwrap();
    let dma = machine.dma().clone();
    let mut queue = SplitQueue::new(dma, transport.queue_size(0), false).unwrap();
    transport
        .enable_queue(0, queue.layout(), NO_VECTOR)
        .unwrap();
    transport.start();
    controls.hold(true);
    queue.add(&[Buffer::readable(0x1000, 8)]).unwrap();
    if queue.publish() {
        transport.notify(0);
    }
    assert!(machine.settle());
    assert_eq!(controls.held(), 1);
}

fn functions(plugged: &[(Plugged, Controls)]) -> impl Iterator<Item = &Arc<VirtioFunction>> {
    plugged.iter().map(|(plugged, _)| &plugged.function)
}

#[test]
fn a_pause_that_fails_takes_its_time_once_and_names_all_that_are_stuck() {
    let (machine, plugged) = machine(&["first", "idle", "second"]);
    hold_one(&machine, &plugged[0]);
    hold_one(&machine, &plugged[2]);
    let start = Instant::now();
    let stuck = close_and_drain(|| functions(&plugged), Reasons::PAUSED, PATIENCE).unwrap_err();
    let took = start.elapsed();
    assert_eq!(stuck, ["first", "second"]);
    assert!(took >= PATIENCE && took < 2 * PATIENCE, "{took:?}");
    assert!(!functions(&plugged).any(|f| f.reasons().contains(Reasons::PAUSED)));
}

#[test]
fn every_function_is_stopped_while_the_first_one_drains() {
    let (machine, plugged) = machine(&["first", "last"]);
    hold_one(&machine, &plugged[0]);
    std::thread::scope(|scope| {
        let pausing = scope.spawn(|| {
            let patience = Duration::from_secs(10);
            close_and_drain(|| functions(&plugged), Reasons::PAUSED, patience)
        });
        let last = &plugged[1].0.function;
        while !last.reasons().contains(Reasons::PAUSED) {
            assert!(!pausing.is_finished());
            std::thread::yield_now();
        }
        plugged[0].1.release(1);
        while !pausing.is_finished() {
            machine.pump();
        }
        assert_eq!(pausing.join().unwrap(), Ok(()));
    });
    assert!(functions(&plugged).all(|f| f.reasons().contains(Reasons::PAUSED)));
}
