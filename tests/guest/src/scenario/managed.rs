//! `managed`: managed devices, made and driven from user space through the transport virtqueues of two management devices, one
//! of network devices and one of disks, which are taken from their stock drivers.

use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use driver::access::{Dma, DmaExt, Function as _, FunctionExt};
use driver::pci::{change_command, command as pci_command};
use driver::virtio::management::{Management, Wire, command, number};
use driver::virtio::{Buffer, Queue, Transport, feature};

use super::sriov::{APIC, DEVICES, Function, VECTOR, interrupts};
use super::{Found, console};
use crate::cmdline::Request;
use crate::kernel_log::Mark;
use crate::pattern;
use crate::user::function::SysfsFunction;
use crate::user::memory::Pages;
use crate::{Context, Failure, Result, check};

/// Features of a management device: a transport virtqueue, and the commands for managed devices.
const MANAGES: u64 = 1 << 45 | 1 << 46;
/// Virtio device types.
const NET: u32 = 1;
const BLOCK: u32 = 2;
/// Network device: it has a MAC address.
const MAC: u64 = 1 << 5;
/// Queues of a network device.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Entries of every queue.
const ENTRIES: u16 = 16;
/// Bytes of the `virtio_net_hdr` in front of a frame, and of a frame.
const HEADER: usize = 12;
const FRAME: usize = 600;
/// An EtherType for experiments.
const EXPERIMENT: [u8; 2] = [0x88, 0xb5];
/// Bytes that are written to the disk at once, and how often: 1 MiB in all.
const PIECE: usize = 4096;
const PIECES: u64 = 256;
const SECTOR: u64 = 512;
/// Types of block requests.
const READ: u32 = 0;
const WRITE: u32 = 1;
/// What is written.
const SEED: u64 = 4;
/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(30);
const PAGES: usize = 128;

/// Makes two network devices and a disk, sends frames and writes; reads where the disk's queue is, destroys the disk, makes
/// it anew with its queue there, and goes on. With `holds`, it asks for so many lines on the console, for whoever has this guest
/// to do something with it, and goes on after each.
pub fn run(request: &Request) -> Result<Found> {
    let wire = match request.text("wire", "aligned") {
        "aligned" => Wire::Aligned,
        "packed" => Wire::Packed,
        other => {
            return Err(Failure(format!(
                "wire={other} is neither aligned nor packed"
            )));
        }
    };
    let rings = match request.text("packed", "no") {
        "yes" => feature::RING_PACKED,
        _ => 0,
    };
    let holds: u64 = request.number("holds", 0)?;
    let log = Mark::now()?;
    let mut nets = Manager::take("0x1041", wire)?;
    let mut disks = Manager::take("0x1042", wire)?;
    let mut pair = [
        Card::start(&mut nets, 0).context("the first card")?,
        Card::start(&mut nets, rings).context("the second card")?,
    ];
    let mut disk = Disk::start(&mut disks, rings)?;
    let parts = holds + 2;
    let mut part = |number: u64, disk: &mut Disk, disks: &Manager, nets: &Manager| {
        let each = PIECES / parts;
        let end = if number + 1 == parts {
            PIECES
        } else {
            (number + 1) * each
        };
        for piece in number * each..end {
            disk.write(disks, piece)
                .context(format_args!("piece {piece}"))?;
        }
        exchange(nets, &mut pair, number).context(format_args!("frames, part {number}"))
    };
    part(0, &mut disk, &disks, &nets)?;
    disk.move_over(&mut disks).context("making the disk anew")?;
    part(1, &mut disk, &disks, &nets)?;
    for hold in 0..holds {
        console::ask()?;
        part(hold + 2, &mut disk, &disks, &nets).context(format_args!("after hold {hold}"))?;
    }
    let crc32 = disk.read_all(&disks)?;
    let left = [&mut nets, &mut disks].map(Manager::left);
    let [nets_left, disks_left] = left;
    let (nets_left, disks_left) = (nets_left?, disks_left?);
    log.check_clean()?;
    Ok(Found::default()
        .with("cards", pair.len())
        .with("interrupts", interrupts()?)
        .with("left", nets_left + disks_left)
        .with("crc32", format_args!("{crc32:08x}")))
}

/// A management device, and a driver of it.
struct Manager {
    transport: Transport<SysfsFunction>,
    management: Management<Rc<Pages>>,
    pages: Rc<Pages>,
}

impl Manager {
    /// The first function with this PCI device ID.
    fn take(device: &str, wire: Wire) -> Result<Self> {
        let mut paths: Vec<_> = fs::read_dir(DEVICES)
            .context(DEVICES)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        paths.sort();
        let is_it = |path: &Path| {
            let id = Function::at(path.to_owned())?.text("device").ok()?;
            (id == device).then_some(())
        };
        let path = paths.into_iter().find(|path| is_it(path).is_some());
        let function = path.and_then(Function::at);
        let function = function.ok_or_else(|| Failure(format!("there is no device {device}")))?;
        if function.driver().is_some() {
            function.unbind()?;
        }
        let registers = function.open()?;
        change_command(&registers, pci_command::MEMORY | pci_command::BUS_MASTER, 0);
        let transport = Transport::new(registers).context(&function.address)?;
        let agreed = transport.negotiate(MANAGES | feature::VERSION_1);
        let agreed = agreed.context(&function.address)?;
        check(agreed & MANAGES == MANAGES, || {
            format!("{} manages nothing: features {agreed:#x}", function.address)
        })?;
        let pages = Rc::new(Pages::new(PAGES)?);
        let management = Management::new(&transport, Rc::clone(&pages), wire);
        let management = management.context(&function.address)?;
        transport.start();
        Ok(Self {
            transport,
            management,
            pages,
        })
    }

    /// A live device with these virtqueues, which interrupt.
    fn device(&mut self, device_type: u32, features: u64, queues: u16) -> Result<Device> {
        let features = features | feature::VERSION_1 | feature::RING_RESET;
        let created = self
            .management
            .create(&self.transport, device_type, features, &[]);
        let id = created.context("CREATE")?;
        self.management
            .negotiate(&self.transport, id, features)
            .context("negotiating")?;
        let mut device = Device {
            id,
            queues: Vec::new(),
            doorbells: Vec::new(),
        };
        for index in 0..queues {
            let queue = Queue::new(Rc::clone(&self.pages), ENTRIES, features)
                .ok_or("none is left")
                .context("memory")?;
            self.set_up(id, index, &queue)?;
            device.queues.push(queue);
        }
        self.start(&mut device)?;
        Ok(device)
    }

    fn set_up(&mut self, id: u64, index: u16, queue: &Queue<Rc<Pages>>) -> Result<()> {
        let Self {
            transport,
            management,
            ..
        } = self;
        management
            .enable_interrupt(transport, id, index, APIC, VECTOR)
            .context("MSI")?;
        management
            .enable_queue(transport, id, index, &queue.layout())
            .context("VQ_ENABLE")
    }

    fn start(&mut self, device: &mut Device) -> Result<()> {
        let Self {
            transport,
            management,
            ..
        } = self;
        management
            .start(transport, device.id)
            .context("DRIVER_OK")?;
        device.doorbells.clear();
        for index in 0..device.queues.len() as u16 {
            let doorbell = management.doorbell(transport, device.id, index);
            device.doorbells.push(doorbell.context("VQ_NOTIFY")?);
        }
        Ok(())
    }

    /// How many devices can be made yet.
    fn left(&mut self) -> Result<u64> {
        let answer = self
            .management
            .execute(&self.transport, 0, command::AVAIL_RES_GET, &[]);
        let answer = answer.context("AVAIL_RES")?;
        Ok(number(answer.get(6..8).unwrap_or_default()))
    }
}

/// A managed device.
struct Device {
    id: u64,
    queues: Vec<Queue<Rc<Pages>>>,
    doorbells: Vec<u64>,
}

impl Device {
    fn publish(&mut self, manager: &Manager, queue: u16) {
        let index = usize::from(queue);
        if self.queues[index].publish() {
            let function = manager.transport.function();
            function.write_bar(0, self.doorbells[index], &queue.to_le_bytes());
        }
    }

    /// Waits for the next used chain of `queue`: its length.
    fn wait(&mut self, manager: &Manager, queue: u16) -> Result<u32> {
        let ring = &mut self.queues[usize::from(queue)];
        let mut outcome = Ok(None);
        manager.transport.function().wait_until(PATIENCE, || {
            outcome = ring.take();
            outcome != Ok(None)
        });
        let used = outcome.context("the ring")?;
        Ok(used.ok_or("it takes too long").context("an answer")?.len)
    }
}

/// A network device.
struct Card {
    device: Device,
    mac: Vec<u8>,
    /// Where the next frame comes in, and where one goes out from.
    incoming: u64,
    outgoing: u64,
}

impl Card {
    fn start(manager: &mut Manager, features: u64) -> Result<Self> {
        let device = manager.device(NET, MAC | features, 2)?;
        let range = manager.management.out().word(0).word(6).bytes();
        let mac =
            manager
                .management
                .execute(&manager.transport, device.id, command::GET_CONFIG, &range);
        let mut mac = mac.context("CONFIG")?;
        mac.truncate(6);
        let buffer = || {
            manager
                .pages
                .allocate(PIECE, PIECE)
                .ok_or("none is left")
                .context("memory")
        };
        let mut card = Self {
            mac,
            device,
            incoming: buffer()?,
            outgoing: buffer()?,
        };
        card.offer(manager)?;
        Ok(card)
    }

    fn offer(&mut self, manager: &Manager) -> Result<()> {
        let buffer = Buffer::writable(self.incoming, PIECE as u32);
        let added = self.device.queues[usize::from(RECEIVE)].add(&[buffer]);
        added.context("a buffer")?;
        self.device.publish(manager, RECEIVE);
        Ok(())
    }

    /// The next frame of ours. Others come as well: a guest that was moved is announced.
    fn receive(&mut self, manager: &Manager) -> Result<Vec<u8>> {
        loop {
            let len = self.device.wait(manager, RECEIVE).context("receiving")?;
            let frame = (len as usize).saturating_sub(HEADER);
            let bytes = manager.pages.bytes(self.incoming + HEADER as u64, frame);
            self.offer(manager)?;
            if bytes.get(12..14) == Some(&EXPERIMENT) {
                return Ok(bytes);
            }
        }
    }
}

/// Each card sends the other a frame.
fn exchange(manager: &Manager, pair: &mut [Card; 2], round: u64) -> Result<()> {
    for (from, to) in [(0, 1), (1, 0)] {
        let mut frame = vec![0; FRAME];
        pattern::fill(&mut frame, round + 1, 0);
        frame[..6].copy_from_slice(&pair[to].mac);
        frame[6..12].copy_from_slice(&pair[from].mac);
        frame[12..14].copy_from_slice(&EXPERIMENT);
        let before = interrupts()?;
        let sender = &mut pair[from];
        manager.pages.write(sender.outgoing, &[0; HEADER]);
        manager.pages.write(sender.outgoing + HEADER as u64, &frame);
        let buffer = Buffer::readable(sender.outgoing, (HEADER + FRAME) as u32);
        let added = sender.device.queues[usize::from(TRANSMIT)].add(&[buffer]);
        added.context("a frame")?;
        sender.device.publish(manager, TRANSMIT);
        sender.device.wait(manager, TRANSMIT).context("sending")?;
        let came = pair[to].receive(manager)?;
        check(came == frame, || "another frame came".into())?;
        manager
            .transport
            .function()
            .wait_until(PATIENCE, || interrupts().is_ok_and(|count| count > before));
        check(interrupts()? > before, || "no interrupt came".into())?;
    }
    Ok(())
}

/// A disk.
struct Disk {
    device: Device,
    features: u64,
    head: u64,
    data: u64,
}

impl Disk {
    fn start(manager: &mut Manager, features: u64) -> Result<Self> {
        let device = manager.device(BLOCK, features, 1).context("the disk")?;
        let buffer = || {
            manager
                .pages
                .allocate(PIECE, PIECE)
                .ok_or("none is left")
                .context("memory")
        };
        Ok(Self {
            device,
            features,
            head: buffer()?,
            data: buffer()?,
        })
    }

    fn request(&mut self, manager: &Manager, kind: u32, piece: u64) -> Result<()> {
        let sector = piece * (PIECE as u64 / SECTOR);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let status = self.head + 16;
        manager.pages.write(self.head, &header);
        manager.pages.write(status, &[0xff]);
        let data = match kind {
            WRITE => Buffer::readable(self.data, PIECE as u32),
            _ => Buffer::writable(self.data, PIECE as u32),
        };
        let chain = [
            Buffer::readable(self.head, 16),
            data,
            Buffer::writable(status, 1),
        ];
        self.device.queues[0].add(&chain).context("a request")?;
        self.device.publish(manager, 0);
        self.device.wait(manager, 0)?;
        let status = manager.pages.bytes(status, 1)[0];
        check(status == 0, || format!("status {status}"))
    }

    fn write(&mut self, manager: &Manager, piece: u64) -> Result<()> {
        let mut bytes = vec![0; PIECE];
        pattern::fill(&mut bytes, SEED, piece * PIECE as u64);
        manager.pages.write(self.data, &bytes);
        self.request(manager, WRITE, piece)
    }

    /// Reads everything; its checksum, if it is what was written.
    fn read_all(&mut self, manager: &Manager) -> Result<u32> {
        let mut hasher = crc32fast::Hasher::new();
        for piece in 0..PIECES {
            self.request(manager, READ, piece)
                .context(format_args!("reading piece {piece}"))?;
            let came = manager.pages.bytes(self.data, PIECE);
            let mut expected = vec![0; PIECE];
            pattern::fill(&mut expected, SEED, piece * PIECE as u64);
            check(came == expected, || format!("piece {piece} is another one"))?;
            hasher.update(&came);
        }
        Ok(hasher.finalize())
    }

    /// Destroys the device, and makes another whose queue goes on in the same ring where this one was.
    fn move_over(&mut self, manager: &mut Manager) -> Result<()> {
        let features = self.features | feature::VERSION_1 | feature::RING_RESET;
        let id = self.device.id;
        let Manager {
            transport,
            management,
            ..
        } = manager;
        management
            .switch_queue(transport, id, 0, false)
            .context("disabling")?;
        let index = management.out().half(0).bytes();
        let state = management.execute(transport, id, command::GET_STATE, &index);
        let state = state.context("VQ_STATE")?;
        management
            .execute(transport, id, command::DESTROY, &[])
            .context("DESTROY")?;
        let created = management.create(transport, BLOCK, features, &[]);
        let id = created.context("CREATE")?;
        management
            .negotiate(transport, id, features)
            .context("negotiating")?;
        // The aligned layout has the index in the answer.
        let place = match management.wire() {
            Wire::Aligned => state,
            Wire::Packed => [vec![0, 0], state].concat(),
        };
        management
            .execute(transport, id, command::SET_STATE, &place)
            .context("setting VQ_STATE")?;
        self.device.id = id;
        manager.set_up(id, 0, &self.device.queues[0])?;
        manager.start(&mut self.device)
    }
}
