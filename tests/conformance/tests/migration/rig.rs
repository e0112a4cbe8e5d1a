//! A group with two drivers of its owner: the guest's, over the administration virtqueue, and the monitor's.

use std::sync::Arc;
use std::time::Duration;

use conformance::group::{self, ADMIN_VQ, Devices, SR_IOV};
use conformance::{SIMPLE, group::Live};
use devices::admin::{Drain, Options, OwnerDriver};
use devices::block::{Block, BlockConfig};
use devices::net::{MacAddress, Net, PortConfig, Switch};
use devices::virtio::{Doors, VirtioFunction};
use driver::access::{Function, FunctionExt};
use driver::host::{Controls, HostDma, HostFunction, Machine, Storage, VirtualFunction};
use driver::pci::{change_command, command};
use driver::virtio::Transport;
use driver::virtio::admin::{AdminError, AdminQueue, Answer, Posted, Shape};
use driver::virtio::migration::{CommandError, Commands, Migrate, request};

/// EINVAL with INVALID_FIELD (G3-p).
pub const BAD_FIELD: CommandError = CommandError::Refused(22, 3);
/// EINVAL with INVALID_COMMAND (G3-p).
pub const BAD_STATE: CommandError = CommandError::Refused(22, 1);
/// EAGAIN.
pub const AGAIN: CommandError = CommandError::Refused(11, 7);
/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// The first VF.
pub const VF: u64 = 1;
/// Bytes of every disk.
pub const DISK: usize = 256 * 512;

/// The guest's driver of the PF.
pub struct Guest {
    pub transport: Transport<HostFunction>,
    pub queue: AdminQueue<HostDma>,
}

impl Guest {
    /// Sets the PF going, with nothing but its administration queue, and takes all commands into use.
    pub fn start(group: &group::Rig) -> Self {
        let transport = Transport::new(group.at(0)).unwrap();
        let features = SIMPLE | ADMIN_VQ | SR_IOV;
        transport.negotiate(features).unwrap();
        let queue = AdminQueue::new(&transport, group.machine.dma().clone()).unwrap();
        transport.start();
        let mut guest = Self { transport, queue };
        guest.use_all().unwrap();
        guest
    }

    /// Sends a command and does not wait for the answer.
    pub fn post(&mut self, opcode: u16, member: u64, data: &[u8]) -> Posted {
        let bytes = request(opcode, member, data);
        self.queue.post(&self.transport, &bytes, 4096).unwrap()
    }

    /// The outcome of a command, if it was answered.
    pub fn answered(&mut self, posted: &Posted) -> Option<(u16, u16)> {
        let answer = self.queue.poll(posted).unwrap();
        answer.map(|answer| answer.outcome())
    }
}

impl Commands for Guest {
    fn send(&mut self, request: &[u8], room: usize) -> Result<Answer, AdminError> {
        // No buffer is as long as a driver may wish.
        let room = room.min(1 << 20);
        self.queue
            .send(&self.transport, request, room, Shape::Direct)
    }
}

/// The monitor as a driver of the PF.
pub struct Monitor(pub OwnerDriver);

impl Commands for Monitor {
    fn send(&mut self, request: &[u8], room: usize) -> Result<Answer, AdminError> {
        let mut bytes = self.0.execute_within(request, room).encode();
        bytes.truncate(room);
        Ok(Answer { bytes })
    }
}

/// The group, with all its VFs enabled.
pub struct Rig {
    pub group: group::Rig,
    pub guest: Guest,
    pub monitor: Monitor,
}

impl Rig {
    /// `vfs` members that echo.
    pub fn new(vfs: usize) -> Self {
        Self::with(vfs, patient())
    }

    pub fn with(vfs: usize, options: Options) -> Self {
        Self::over(group::Rig::new(vfs, options))
    }

    /// One member with these doors.
    pub fn with_doors(doors: Doors) -> Self {
        Self::over(group::Rig::with_doors(&[doors], patient()))
    }

    /// Network interfaces on one switch: port `n` is that of VF `n`, with address [`mac`]`(n)`, and port 0 the PF's.
    pub fn with_interfaces(vfs: usize) -> (Self, Switch) {
        let switch = Switch::new();
        let net = |number: usize| {
            let mac = MacAddress::new(mac(number as u8));
            let port = switch.port(PortConfig {
                name: format!("port {number}"),
                mac,
                check_source: true,
            });
            Box::new(Net::new(mac, port.unwrap()))
        };
        let devices = Devices {
            pf: net(0),
            vfs: (1..=vfs).map(|n| (net(n) as _, Doors::default())).collect(),
        };
        let machine = Machine::new().unwrap();
        let group = group::Rig::of(machine, devices, patient());
        (Self::over(group), switch)
    }

    /// A disk of [`DISK`] bytes for each member, filled with `fill` and the number of the VF.
    pub fn with_disks(vfs: usize, options: Options) -> (Self, Vec<Storage>) {
        let block = |storage: &Storage| {
            let config = BlockConfig::new("disk");
            Box::new(Block::with_backend(storage.backend(), &config).unwrap())
        };
        let disks = (0..=vfs).map(|index| Storage::new(content(index)));
        let disks: Vec<_> = disks.collect();
        let vfs = disks[1..].iter();
        let devices = Devices {
            pf: block(&disks[0]),
            vfs: vfs
                .map(|disk| (block(disk) as _, Doors::default()))
                .collect(),
        };
        let machine = Machine::new().unwrap();
        (Self::over(group::Rig::of(machine, devices, options)), disks)
    }

    pub fn over(group: group::Rig) -> Self {
        group.enable(group.owner.capacity() as u16);
        let guest = Guest::start(&group);
        let mut monitor = Monitor(OwnerDriver::new(Arc::clone(&group.owner)));
        monitor.use_all().unwrap();
        Self {
            group,
            guest,
            monitor,
        }
    }

    /// Both drivers of the owner.
    pub fn both(&mut self) -> [&mut dyn Commands; 2] {
        [&mut self.guest, &mut self.monitor]
    }

    /// Sets a mode for the guest's driver (0) or the monitor's (1), while the machine works.
    pub fn set_mode(&mut self, party: usize, member: u64, mode: u8) -> Result<(), CommandError> {
        if party == 0 {
            return self.guest.set_mode(member, mode);
        }
        let (group, monitor) = (&self.group, &mut self.monitor);
        std::thread::scope(|scope| {
            let change = scope.spawn(move || monitor.set_mode(member, mode));
            while !change.is_finished() {
                group.at(0).relax();
            }
            change.join().unwrap()
        })
    }

    /// A live driver of VF `number`.
    pub fn drive(&self, number: u8) -> Live<VirtualFunction> {
        self.drive_with(number, SIMPLE)
    }

    pub fn drive_with(&self, number: u8, features: u64) -> Live<VirtualFunction> {
        self.group.drive(self.group.vf(number), features)
    }

    /// The function of VF `number`, behind its registers.
    pub fn function(&self, number: usize) -> &Arc<VirtioFunction> {
        &self.group.functions[number]
    }

    pub fn controls(&self, number: usize) -> &Controls {
        &self.group.controls[number]
    }

    pub fn settle(&self) {
        assert!(self.group.machine.settle(), "the machine never rests");
    }

    /// All of guest memory.
    pub fn memory(&self) -> Vec<u8> {
        use driver::access::DmaExt;
        self.group.machine.dma().bytes(0, driver::host::RAM)
    }

    /// What a hypervisor does for a VF beside its context (G3-cc): bus mastering and MSI-X are as before an FLR.
    pub fn restore_pci(&self, vf: &Live<VirtualFunction>) {
        change_command(vf.transport.function(), command::BUS_MASTER, 0);
        conformance::enable_msix(&vf.transport);
    }

    /// Lets the machine work until the guest's command is answered, which takes no longer than a test may.
    pub fn answer(&mut self, posted: &Posted) -> (u16, u16) {
        let function = self.guest.transport.function().clone();
        let mut outcome = None;
        function.wait_until(PATIENCE, || {
            outcome = self.guest.answered(posted);
            outcome.is_some()
        });
        outcome.expect("the command is answered")
    }

    /// Forgets the interrupts so far.
    pub fn quiet(&self) {
        self.group.machine.msi().take();
    }

    /// The vectors of interrupts since the last call, whoever sent them.
    pub fn interrupts(&self) -> Vec<u16> {
        self.group.machine.msi().take_vectors()
    }
}

/// An owner that takes nothing back, however slow the host of a test is.
pub fn patient() -> Options {
    Options {
        drain: Drain(PATIENCE),
        ..Options::default()
    }
}

/// The address of VF `number`.
pub fn mac(number: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, number]
}

/// What the disk of VF `number` holds at first: each sector is different, and different from that of another disk.
pub fn content(number: usize) -> Vec<u8> {
    let byte = |at: usize| (at / 512 * 7 + at % 512 * 13 + number * 101) as u8;
    (0..DISK).map(byte).collect()
}

/// A block request that writes `data` to `sector`; it has one byte of answer, the status.
pub fn write_request(sector: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = block_header(1, sector);
    bytes.extend_from_slice(data);
    bytes
}

/// A block request that reads from `sector`; its answer is the data and the status.
pub fn read_request(sector: u64) -> Vec<u8> {
    block_header(0, sector)
}

fn block_header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&sector.to_le_bytes());
    bytes
}
