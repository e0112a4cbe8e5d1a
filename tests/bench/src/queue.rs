//! What a virtqueue costs the device: buffers a second that are fetched and given back, on one thread.
//!
//! The argument is how many rounds to run. Each prints a line for each shape of chains and each kind of queue:
//! `SHAPE KIND BUFFERS NANOSECONDS`, where KIND is
//!
//! * split, packed: a turn of the function, which has its gate, its lock, its accounts of what is in flight, and a device that
//!   gives every chain back at once
//! * plain: the `virtio-queue` crate alone, over the same memory; its descriptors are walked and given back, and nothing is
//!   checked or kept of them
//!
//! The driver's work is not in the time. All of them mark the pages they write.

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::state::{DeviceState, Unsavable};
use devices::virtio::{
    DeviceType, Io, Progress, RingError, Source, Status, VirtioDevice, VirtioFunction, feature,
};
use driver::access::Dma;
use driver::host::HostDma;
use driver::virtio::{Buffer, Queue};
use virtio_queue::{Queue as PlainQueue, QueueOwnedT, QueueT};

const SIZE: u16 = 256;
const RAM: usize = 16 << 20;
/// Turns of one measurement.
const TURNS: u32 = 2000;

/// Chains of one shape.
#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    /// Buffers that are read, and that are written.
    buffers: (u32, u32),
    indirect: bool,
    /// Chains that the driver adds at a time.
    batch: u32,
}

const SHAPES: [Shape; 4] = [
    Shape {
        name: "receive",
        buffers: (0, 1),
        indirect: false,
        batch: 64,
    },
    Shape {
        name: "request",
        buffers: (1, 2),
        indirect: false,
        batch: 64,
    },
    Shape {
        name: "request-indirect",
        buffers: (1, 2),
        indirect: true,
        batch: 64,
    },
    Shape {
        name: "long",
        buffers: (1, 15),
        indirect: false,
        batch: 16,
    },
];

/// Gives every chain back at once.
struct Sink;

impl VirtioDevice for Sink {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![SIZE]
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

    fn process(&mut self, queue: u16, io: &mut Io<'_>) -> Result<Progress, RingError> {
        while let Some(chain) = io.pop(queue)? {
            io.push(queue, chain.ticket(), 1)?;
        }
        Ok(Progress::Exhausted)
    }

    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    fn on_event(&mut self, _token: u16, _io: &mut Io<'_>) -> Result<(), RingError> {
        Ok(())
    }
}

/// What is measured: it takes what was made available and gives it back.
trait Device {
    fn turn(&mut self) -> Result<(), Box<dyn Error>>;
}

impl Device for Arc<VirtioFunction> {
    fn turn(&mut self) -> Result<(), Box<dyn Error>> {
        self.service(0);
        Ok(())
    }
}

/// The `virtio-queue` crate by itself.
struct Plain {
    queue: PlainQueue,
    dma: HostDma,
}

impl Device for Plain {
    fn turn(&mut self) -> Result<(), Box<dyn Error>> {
        let memory = &**self.dma.view();
        self.queue.disable_notification(memory)?;
        loop {
            while let Some(chain) = self.queue.iter(memory)?.next() {
                let head = chain.head_index();
                // Walked to its end, as a device would.
                let bytes: u64 = chain.map(|descriptor| u64::from(descriptor.len())).sum();
                std::hint::black_box(bytes);
                self.queue.add_used(memory, head, 1)?;
            }
            if !self.queue.enable_notification(memory)? {
                break;
            }
        }
        std::hint::black_box(self.queue.needs_notification(memory)?);
        Ok(())
    }
}

/// Time that the device took for all turns, and buffers it saw.
fn measure(
    shape: Shape,
    dma: &HostDma,
    queue: &mut Queue<HostDma>,
    device: &mut dyn Device,
) -> Result<(Duration, u64), Box<dyn Error>> {
    let at = dma.allocate(4096, 4096).ok_or("no memory")?;
    let (outs, ins) = shape.buffers;
    let buffers: Vec<_> = (0..outs + ins)
        .map(|n| match n < outs {
            true => Buffer::readable(at + 64 * u64::from(n), 64),
            false => Buffer::writable(at + 64 * u64::from(n), 64),
        })
        .collect();
    let mut spent = Duration::ZERO;
    for _ in 0..TURNS {
        for _ in 0..shape.batch {
            match shape.indirect {
                true => queue.add_indirect(&buffers)?,
                false => queue.add(&buffers)?,
            };
        }
        let _ = queue.publish();
        let start = Instant::now();
        device.turn()?;
        spent += start.elapsed();
        for _ in 0..shape.batch {
            queue.take()?.ok_or("a chain did not come back")?;
        }
    }
    let chains = u64::from(TURNS) * u64::from(shape.batch);
    Ok((spent, chains * buffers.len() as u64))
}

/// Memory, the driver's end of a queue in it, and the device.
type Rig<D> = Result<(HostDma, Queue<HostDma>, D), Box<dyn Error>>;

/// A live function.
fn function(packed: bool) -> Rig<Arc<VirtioFunction>> {
    let dma = HostDma::new(0, RAM)?;
    let view = dma.ram().view()?;
    let offer = devices::virtio::Offer {
        packed,
        ..devices::virtio::Offer::default()
    };
    let function = VirtioFunction::offering("bench", Box::new(Sink), view, offer)?;
    let mut accepted = feature::VERSION_1 | feature::INDIRECT_DESC | feature::EVENT_IDX;
    if packed {
        accepted |= feature::RING_PACKED;
    }
    let write = |bits: Status| {
        let old = Status::from_bits_truncate(function.status());
        // Nobody watches the layout here.
        let _ = function.write_status((old | bits).bits());
    };
    write(Status::ACKNOWLEDGE | Status::DRIVER);
    function.set_driver_features(0, accepted as u32);
    function.set_driver_features(1, (accepted >> 32) as u32);
    write(Status::FEATURES_OK);
    let queue = Queue::new(dma.clone(), SIZE, accepted).ok_or("no memory")?;
    let layout = queue.layout();
    function.update_queue(0, |registers| {
        registers.size = layout.size;
        registers.descriptor_area = layout.descriptors;
        registers.driver_area = layout.available;
        registers.device_area = layout.used;
    });
    let _ = function.enable_queue(0);
    write(Status::DRIVER_OK);
    Ok((dma, queue, function))
}

fn plain() -> Rig<Plain> {
    let dma = HostDma::new(0, RAM)?;
    let driver = Queue::new(dma.clone(), SIZE, feature::EVENT_IDX).ok_or("no memory")?;
    let layout = driver.layout();
    let mut queue = PlainQueue::new(SIZE)?;
    let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
    let (low, high) = halves(layout.descriptors);
    queue.set_desc_table_address(low, high);
    let (low, high) = halves(layout.available);
    queue.set_avail_ring_address(low, high);
    let (low, high) = halves(layout.used);
    queue.set_used_ring_address(low, high);
    queue.set_size(SIZE);
    queue.set_event_idx(true);
    queue.set_ready(true);
    let dma_of_device = dma.clone();
    let plain = Plain {
        queue,
        dma: dma_of_device,
    };
    Ok((dma, driver, plain))
}

fn run() -> Result<(), Box<dyn Error>> {
    let rounds = std::env::args().nth(1).ok_or("how many rounds?")?;
    for _ in 0..rounds.parse::<u32>()? {
        for shape in SHAPES {
            for kind in ["plain", "split", "packed"] {
                let (spent, buffers) = match kind {
                    "plain" => {
                        let (dma, mut queue, mut plain) = plain()?;
                        measure(shape, &dma, &mut queue, &mut plain)?
                    }
                    kind => {
                        let (dma, mut queue, mut function) = function(kind == "packed")?;
                        measure(shape, &dma, &mut queue, &mut function)?
                    }
                };
                println!("{} {kind} {buffers} {}", shape.name, spent.as_nanos());
            }
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("queue: {error}");
            ExitCode::FAILURE
        }
    }
}
