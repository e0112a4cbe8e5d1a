//! The transport virtqueue: the driver's way to a management device.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::envelope::{Answer, Request};
use super::manager::{Manager, Options};
use crate::memory::View;
use crate::state::Kept;
use crate::virtio::{Executed, Service, VirtioDevice, VirtioFunction, feature};

/// What it is called.
pub const NAME: &str = "transport virtqueue";

/// Entries of the queue.
pub const QUEUE_SIZE: u16 = 64;

/// Bytes of a command that are looked at, and of an answer that are made. No device configuration comes near it.
pub const MAX_COMMAND: usize = 8 << 10;

/// What serves the queue.
pub(super) struct TransportService {
    manager: Manager,
    /// The driver accepted VIRTIO_F_TRANSPT_VQ_MDEV.
    negotiated: bool,
}

impl TransportService {
    fn devices_feature(&self) -> u64 {
        1 << self.manager.options().devices_feature
    }

    pub fn manager(&mut self) -> &mut Manager {
        &mut self.manager
    }
}

impl Service for TransportService {
    fn name(&self) -> &'static str {
        NAME
    }

    fn feature(&self) -> u64 {
        1 << self.manager.options().queue_feature
    }

    fn queue_size(&self) -> u16 {
        QUEUE_SIZE
    }

    fn limits(&self) -> (usize, usize) {
        (MAX_COMMAND, MAX_COMMAND)
    }

    fn config(&self) -> &[u8] {
        self.manager.counters()
    }

    /// No managed devices without the queue (S4-1).
    fn agrees(&self, features: u64) -> bool {
        features & self.devices_feature() == 0 || features & self.feature() != 0
    }

    fn activate(&mut self, features: u64) {
        self.negotiated = features & self.devices_feature() != 0;
    }

    fn execute(&mut self, command: &[u8], room: usize) -> Executed {
        self.manager.execute(command, room, self.negotiated)
    }

    fn wait_until(&self) -> Option<Instant> {
        None
    }

    fn wake_fd(&self) -> RawFd {
        self.manager.wake_fd()
    }

    /// What waits is a device or a virtqueue that comes to rest. It does, whether or not somebody waits.
    fn abandon(&mut self) {}

    fn begin_reset(&mut self) {
        self.manager.begin_reset();
    }

    fn is_at_rest(&self) -> bool {
        self.manager.is_at_rest()
    }

    fn reset(&mut self) {
        self.negotiated = false;
        self.manager.reset();
    }

    fn save(&self) -> Kept {
        Kept::Managed(self.manager.save())
    }

    fn check(&self, kept: &Kept, driver: Option<u64>) -> Result<(), String> {
        let Kept::Managed(state) = kept else {
            return Err("its managed devices are missing".into());
        };
        let has_commands = driver.is_some_and(|features| features & self.devices_feature() != 0);
        if !state.devices.is_empty() && !has_commands {
            return Err("it has managed devices, which its driver cannot have made".into());
        }
        self.manager.check(state).map_err(|error| error.to_string())
    }

    fn restore(&mut self, kept: &Kept) {
        if let Kept::Managed(state) = kept {
            // It was checked.
            let _ = self.manager.restore(state);
        }
    }
}

impl VirtioFunction {
    /// Puts `device`, which manages others through its transport virtqueue, behind a function. That virtqueue comes after those
    /// of the device: its index is `num_queues`. Rings may be packed if `packed` says so. It has no doors: a suspended device
    /// could not execute commands.
    pub fn new_manager(
        name: impl Into<String>,
        device: Box<dyn VirtioDevice>,
        view: View,
        manager: Manager,
        packed: bool,
    ) -> io::Result<Arc<Self>> {
        let Options {
            devices_feature, ..
        } = manager.options();
        let packed = if packed { feature::RING_PACKED } else { 0 };
        let features = 1 << devices_feature | packed;
        let service = TransportService {
            manager,
            negotiated: false,
        };
        Self::with_services(name, device, view, vec![Box::new(service)], features)
    }

    /// Executes a command for a managed device as the monitor, in the layout of its manager: the same bytes as on the virtqueue.
    /// Blocks while it waits, `patience` at most. `None` if there is no manager, or if that was not enough: what it began goes
    /// on to its end by itself.
    pub fn execute_managed(&self, request: Request<'_>, patience: Duration) -> Option<Answer> {
        let started = Instant::now();
        let (wire, wakeups) = self.with_manager(|m| (m.options().wire, Arc::clone(m.wakeups())))?;
        let bytes = request.encode(wire);
        loop {
            let seen = wakeups.count();
            if let Some(answer) = self.with_manager(|m| m.attempt(&bytes, MAX_COMMAND, true))? {
                return Some(answer);
            }
            wakeups.wait(seen, patience.checked_sub(started.elapsed())?);
        }
    }

    /// Lets `act` have its manager, if it has one, with the function locked.
    pub fn with_manager<R>(&self, act: impl FnOnce(&mut Manager) -> R) -> Option<R> {
        self.with_service(|service: &mut TransportService, _| act(service.manager()))
    }
}
