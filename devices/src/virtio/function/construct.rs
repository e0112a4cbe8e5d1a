//! How a function comes to be, and what it is connected to.

use std::io;
use std::sync::{Arc, Condvar, Mutex, OnceLock};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Core, Doors, Epoch, Selectors, VirtioFunction, config_end};
use crate::gate::{Gate, Reasons};
use crate::memory::View;
use crate::virtio::queue::Virtqueue;
use crate::virtio::service::{Service, ServiceQueue};
use crate::virtio::{Interrupt, Status, VirtioDevice, Warnings, feature};

/// What a function offers its driver that not every function does. Nothing by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Offer {
    /// Doors to its gate.
    pub doors: Doors,
    /// Packed rings (VIRTIO_F_RING_PACKED).
    pub packed: bool,
}

impl From<Doors> for Offer {
    fn from(doors: Doors) -> Self {
        Self {
            doors,
            packed: false,
        }
    }
}

impl VirtioFunction {
    /// Puts `device` behind a function. `name` is used in messages. Bus mastering starts out enabled: a transport
    /// that has such a control closes the gate for it.
    pub fn new(
        name: impl Into<String>,
        device: Box<dyn VirtioDevice>,
        view: View,
    ) -> io::Result<Arc<Self>> {
        Self::offering(name, device, view, Offer::default())
    }

    /// The same for a function that offers more than every function does.
    pub fn offering(
        name: impl Into<String>,
        device: Box<dyn VirtioDevice>,
        view: View,
        offer: impl Into<Offer>,
    ) -> io::Result<Arc<Self>> {
        let Offer { doors, packed } = offer.into();
        let features = if packed { feature::RING_PACKED } else { 0 };
        Self::build(name.into(), device, view, doors, Vec::new(), features)
    }

    /// The same with virtqueues after those of the device, which `services` serve, one each. `features` are those of its
    /// transport that not every function has. It has no doors: a function that is suspended serves nobody.
    pub fn with_services(
        name: impl Into<String>,
        device: Box<dyn VirtioDevice>,
        view: View,
        services: Vec<Box<dyn Service>>,
        features: u64,
    ) -> io::Result<Arc<Self>> {
        Self::build(
            name.into(),
            device,
            view,
            Doors::default(),
            services,
            features,
        )
    }

    fn build(
        name: String,
        device: Box<dyn VirtioDevice>,
        view: View,
        doors: Doors,
        services: Vec<Box<dyn Service>>,
        transport_features: u64,
    ) -> io::Result<Arc<Self>> {
        let mut sizes = device.queue_sizes();
        let device_queues = sizes.len() as u16;
        sizes.extend(services.iter().map(|service| service.queue_size()));
        let queues: Vec<_> = sizes.into_iter().map(Virtqueue::new).collect();
        let kicks = queues
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
            .collect::<io::Result<_>>()?;
        let services = services.into_iter().map(ServiceQueue::new);
        let services = services.collect::<io::Result<Vec<_>>>()?;
        let device_config_len = device.config().len();
        let behind = |len, queue: &ServiceQueue| config_end(len, queue.service().config());
        let config_len = services.iter().fold(device_config_len, behind);
        Ok(Arc::new(Self {
            name,
            device_type: device.device_type(),
            config_len,
            device_config_len,
            core: Mutex::new(Core {
                device,
                view,
                queues,
                services,
                transport_features,
                allowed_features: u64::MAX,
                has_queue_status: doors.queue_status,
                gate: Gate::closed_for(Reasons::NO_DRIVER),
                doors,
                selectors: Selectors::default(),
                status: Status::empty(),
                driver_features: 0,
                config_generation: 0,
                isr: 0,
                config_pending: false,
                missed: Vec::new(),
                signal_again: false,
                rescan: false,
                awaited: false,
                epoch: Epoch::default(),
            }),
            drained: Condvar::new(),
            kicks,
            interrupt: OnceLock::new(),
            revived: OnceLock::new(),
            device_queues,
            doors,
            wake: OnceLock::new(),
            warnings: Warnings::default(),
        }))
    }

    /// Connects the transport's interrupts. Only the first call counts.
    pub fn set_interrupt(&self, interrupt: Arc<dyn Interrupt>) {
        // A second transport for one function is a wiring mistake that shows as missing interrupts at once.
        let _ = self.interrupt.set(interrupt);
    }

    /// Has `event` signalled whenever a restored state may have made the function live. No write of its driver returned
    /// [`Effect::LayoutChanged`](crate::bus::Effect::LayoutChanged) then, so whoever has its doorbells is to compare them
    /// when the event comes; until then kicks arrive as register writes. Only the first call counts.
    pub fn set_revived(&self, event: Arc<EventFd>) {
        // A second machine around one function is a wiring mistake that shows as slow kicks.
        let _ = self.revived.set(event);
    }

    /// The doorbells that should exist are others, and not because of a write of its driver.
    pub(crate) fn doorbells_changed(&self) {
        if let Some(revived) = self.revived.get() {
            // An eventfd refuses only when its counter is full, and then it is already signalled.
            let _ = revived.write(1);
        }
    }
}
