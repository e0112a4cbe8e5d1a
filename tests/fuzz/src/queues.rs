//! Virtqueues, from both sides.

use std::collections::BTreeMap;

use devices::virtio::{QueueRegisters, VirtioFunction, feature};
use driver::access::{Dma, DmaExt};
use driver::host::{HostDma, Shape};
use driver::virtio::{Buffer, Descriptor, Layout, Queue, status};

use crate::fixture::{Rig, loopback};
use crate::input::Input;

/// Guest memory: small, so that random addresses hit it.
const RAM: usize = 64 * 1024;

/// Feature negotiation to FEATURES_OK. True if the device accepted.
pub fn negotiate(function: &VirtioFunction, features: u64) -> bool {
    function
        .write_status(status::ACKNOWLEDGE | status::DRIVER)
        .apply();
    function.set_driver_features(0, features as u32);
    function.set_driver_features(1, (features >> 32) as u32);
    function.write_status(status::FEATURES_OK).apply();
    function.status() & status::FEATURES_OK != 0
}

/// There is no machine around the function, so an effect has nothing to change.
pub trait Apply {
    fn apply(self);
}

impl Apply for devices::bus::Effect {
    fn apply(self) {}
}

fn program(function: &VirtioFunction, index: u16, layout: &Layout) {
    function.update_queue(index, |registers| {
        *registers = QueueRegisters {
            size: layout.size,
            descriptor_area: layout.descriptors,
            driver_area: layout.available,
            device_area: layout.used,
        };
    });
}

/// A driver that writes anything anywhere: rings, descriptors, indices, registers, in any order. The device must
/// come to rest after each step, hold on to nothing, and reset when it is told to.
pub fn queue_device_side(data: &[u8]) {
    let mut input = Input::new(data);
    let dma = HostDma::new(0, RAM).expect("RAM");
    let rig = Rig::any(input.byte(), &dma);
    let function = &rig.function;
    let choice = input.byte();
    let mut features = offered(function) & !(u64::from(choice & 3) << 28);
    if choice & 4 != 0 {
        features &= !feature::RING_PACKED;
    }
    negotiate(function, features);
    let layouts: Vec<Layout> = (0..function.num_queues())
        .filter_map(|index| {
            let size = function.queue(index)?.max_size.min(16);
            let layout = Layout::allocate(&dma, size)?;
            program(function, index, &layout);
            function.enable_queue(index).apply();
            Some(layout)
        })
        .collect();
    function.write_status(status::DRIVER_OK).apply();
    while !input.is_empty() {
        let index = u16::from(input.pick(layouts.len().clamp(1, 4) as u8));
        let Some(layout) = layouts.get(usize::from(index)) else {
            return;
        };
        match input.pick(8) {
            0 => {
                let address = u64::from(input.word());
                let len = input.byte().into();
                dma.write(address, input.slice(len));
            }
            1 => {
                let at = layout.descriptor(u16::from(input.pick(16)));
                let mut descriptor = any_descriptor(&mut input);
                if features & feature::RING_PACKED != 0 {
                    // Buffer id and flags are the other way round there, and the flags say whose it is.
                    let owner = [0, 1 << 7, 1 << 15, 1 << 7 | 1 << 15];
                    let flags = descriptor.flags | owner[usize::from(input.pick(4))];
                    (descriptor.flags, descriptor.next) = (descriptor.next, flags);
                }
                descriptor.store(&dma, at);
            }
            2 => {
                let indirect = u64::from(input.word()) & !15;
                any_descriptor(&mut input).store(&dma, indirect);
            }
            3 => dma.set(layout.avail_entry(input.byte().into()), input.word() % 32),
            4 => {
                let index = dma.load(layout.avail_index());
                let count = input.pick(5).into();
                dma.store(layout.avail_index(), index.wrapping_add(count));
            }
            5 => dma.store(layout.avail_index(), input.word()),
            6 => any_registers(&mut input, function, index),
            _ => dma.set(layout.used_event(), input.word()),
        }
        function.kick(index);
        rig.drain();
    }
    function.write_status(0).apply();
    rig.drain();
    assert_eq!(
        function.status(),
        0,
        "a reset with nothing in flight is done"
    );
}

pub fn offered(function: &VirtioFunction) -> u64 {
    u64::from(function.device_features(0)) | u64::from(function.device_features(1)) << 32
}

fn any_descriptor(input: &mut Input<'_>) -> Descriptor {
    let address = match input.pick(8) {
        0 => input.qword(),
        _ => input.word().into(),
    };
    let len = match input.pick(8) {
        0 => input.dword(),
        _ => (input.word() % 4096).into(),
    };
    Descriptor {
        address,
        len,
        flags: (input.byte() % 8).into(),
        next: (input.byte() % 20).into(),
    }
}

fn any_registers(input: &mut Input<'_>, function: &VirtioFunction, index: u16) {
    match input.pick(8) {
        0 => function.write_status(input.byte()).apply(),
        1 => function.set_driver_features(input.byte().into(), input.dword()),
        2 => function.update_queue(index, |r| r.size = input.word()),
        3 => function.update_queue(index, |r| r.descriptor_area = input.word().into()),
        4 => function.update_queue(index, |r| r.driver_area = input.word().into()),
        5 => function.update_queue(index, |r| r.device_area = input.word().into()),
        6 => function.enable_queue(index).apply(),
        _ => function.reset_queue(index).apply(),
    }
}

/// A driver that keeps to the rules, with chains of any shape: every chain comes back exactly once, with no more
/// bytes than there was room for, and with the right ones.
pub fn queue_driver_side(data: &[u8]) {
    let mut input = Input::new(data);
    let dma = HostDma::new(0, 1 << 20).expect("RAM");
    let (device, controls) = loopback(Shape::default());
    let rig = Rig::new(device, &dma);
    let function = &rig.function;
    let choice = input.byte();
    let mut features = feature::VERSION_1 | feature::RING_RESET;
    if choice & 1 != 0 {
        features |= feature::INDIRECT_DESC;
    }
    if choice & 2 != 0 {
        features |= feature::EVENT_IDX;
    }
    if choice & 32 != 0 {
        features |= feature::RING_PACKED;
    }
    assert!(negotiate(function, features), "offered features refused");
    let size = match features & feature::RING_PACKED {
        0 => 1 << (choice >> 2 & 3),
        // Of any size.
        _ => 1 + u16::from(choice >> 2 & 7),
    };
    let mut queue = Queue::new(dma.clone(), size, features).expect("queue");
    program(function, 0, &queue.layout());
    function.enable_queue(0).apply();
    function.write_status(status::DRIVER_OK).apply();
    let mut expected: BTreeMap<u16, Expected> = BTreeMap::new();
    while !input.is_empty() {
        match input.pick(6) {
            0..=2 => {
                if let Some((head, chain)) = any_chain(&mut input, &dma, &mut queue, features) {
                    expected.insert(head, chain);
                }
            }
            3 => {
                if queue.publish() {
                    function.kick(0);
                }
            }
            4 => controls.hold(input.byte() & 1 != 0),
            _ => controls.release(input.pick(4).into()),
        }
        rig.settle();
        collect(&dma, &mut queue, &mut expected);
    }
    controls.hold(false);
    if queue.publish() {
        function.kick(0);
    }
    rig.settle();
    controls.release(usize::MAX);
    rig.settle();
    collect(&dma, &mut queue, &mut expected);
    assert!(expected.is_empty(), "chains lost: {:?}", expected.keys());
    assert_eq!(
        function.status() & status::NEEDS_RESET,
        0,
        "rules were kept"
    );
}

struct Expected {
    /// What the device should have written, and where.
    writable: Vec<(u64, u32)>,
    bytes: Vec<u8>,
}

fn any_chain(
    input: &mut Input<'_>,
    dma: &HostDma,
    queue: &mut Queue<HostDma>,
    features: u64,
) -> Option<(u16, Expected)> {
    let (readable, writable) = (input.pick(4), input.pick(4));
    let mut buffers = Vec::new();
    let mut bytes = Vec::new();
    for _ in 0..readable {
        let len = input.byte();
        let piece: Vec<u8> = (0..len).map(|_| input.byte()).collect();
        buffers.push(Buffer::readable(dma.place(&piece)?, len.into()));
        bytes.extend(piece);
    }
    let mut places = Vec::new();
    for _ in 0..writable {
        let len = u32::from(input.byte());
        let address = dma.allocate(len.max(1) as usize, 1)?;
        buffers.push(Buffer::writable(address, len));
        places.push((address, len));
    }
    let indirect = features & feature::INDIRECT_DESC != 0 && input.byte() & 1 != 0;
    let head = if indirect {
        queue.add_indirect(&buffers)
    } else {
        queue.add(&buffers)
    };
    let room: u32 = places.iter().map(|(_, len)| len).sum();
    bytes.truncate(room as usize);
    let chain = Expected {
        writable: places,
        bytes,
    };
    Some((head.ok()?, chain))
}

fn collect(dma: &HostDma, queue: &mut Queue<HostDma>, expected: &mut BTreeMap<u16, Expected>) {
    while let Some(used) = queue.take().unwrap_or_else(|e| panic!("{e}")) {
        let chain = expected.remove(&used.head).expect("each head comes once");
        assert_eq!(used.len as usize, chain.bytes.len(), "used length");
        let got: Vec<u8> = chain
            .writable
            .iter()
            .flat_map(|(address, len)| dma.bytes(*address, *len as usize))
            .take(chain.bytes.len())
            .collect();
        assert_eq!(got, chain.bytes, "content");
    }
}
