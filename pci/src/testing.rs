//! What the tests of this crate share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use devices::bus::Effect;
use devices::memory::{GuestRam, RamRange, View};
use devices::state::{DeviceState, Unsavable};
use devices::virtio::{
    DeviceType, Io, Progress, RingError, Source, Ticket, VirtioDevice, VirtioFunction,
};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use crate::bar::{BarIndex, BarKind};
use crate::cap::pcie::PortType;
use crate::function::{BarSlot, ConfigTarget, Decoded, FunctionDoorbell, PciFunction, Resource};
use crate::state::{Registers, RegistersError};
use devices::msi::{MsiBatch, MsiController, MsiMessage, MsiSink};

/// What happened at a [`RecordingSink`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SinkEvent {
    Route(u16, Option<MsiMessage>),
    Fire(u16, Option<MsiMessage>),
}

/// Remembers routes and every event.
#[derive(Debug, Default)]
pub(crate) struct RecordingSink {
    pub(crate) state: Mutex<(Vec<Option<MsiMessage>>, Vec<SinkEvent>)>,
}

impl RecordingSink {
    /// Takes the events since the last call.
    pub(crate) fn take(&self) -> Vec<SinkEvent> {
        std::mem::take(&mut self.state.lock().unwrap().1)
    }

    /// The messages that were delivered since the last call, of any event.
    pub(crate) fn delivered(&self) -> Vec<MsiMessage> {
        self.take()
            .into_iter()
            .filter_map(|event| match event {
                SinkEvent::Fire(_, message) => message,
                SinkEvent::Route(..) => None,
            })
            .collect()
    }
}

impl MsiSink for RecordingSink {
    fn set_route(&self, vector: u16, message: Option<MsiMessage>) {
        let mut state = self.state.lock().unwrap();
        let slot = usize::from(vector);
        if state.0.len() <= slot {
            state.0.resize(slot + 1, None);
        }
        state.0[slot] = message;
        state.1.push(SinkEvent::Route(vector, message));
    }

    fn fire(&self, vector: u16) {
        let mut state = self.state.lock().unwrap();
        let route = state.0.get(usize::from(vector)).copied().flatten();
        state.1.push(SinkEvent::Fire(vector, route));
    }
}

/// Hands out one recording sink per function, in order.
#[derive(Debug, Default)]
pub(crate) struct RecordingController {
    pub(crate) sinks: Mutex<Vec<Arc<RecordingSink>>>,
}

impl MsiController for RecordingController {
    fn sink(&self, _vectors: u16) -> Arc<dyn MsiSink> {
        let sink = Arc::new(RecordingSink::default());
        self.sinks.lock().unwrap().push(Arc::clone(&sink));
        sink
    }

    fn batch(&self) -> MsiBatch<'_> {
        MsiBatch::none()
    }
}

/// A function with one 64-bit BAR of 16 KiB that remembers what it was asked, and decodes wherever it was assigned.
pub(crate) struct Stub {
    name: String,
    port_type: PortType,
    resources: Vec<Resource>,
    pub(crate) state: Mutex<StubState>,
}

#[derive(Default)]
pub(crate) struct StubState {
    pub(crate) assigned: Vec<(BarSlot, u64)>,
    pub(crate) writes: Vec<(BarSlot, u64, Vec<u8>)>,
    pub(crate) config_accesses: Vec<(u16, usize)>,
    pub(crate) multi_function: bool,
    pub(crate) resets: u32,
}

impl Stub {
    pub(crate) fn new(name: impl Into<String>) -> Arc<Self> {
        Self::with(
            name,
            PortType::RootComplexIntegratedEndpoint,
            &[(BarKind::Prefetchable64, 0x4000)],
        )
    }

    pub(crate) fn with(
        name: impl Into<String>,
        port_type: PortType,
        bars: &[(BarKind, u64)],
    ) -> Arc<Self> {
        let resources = bars.iter().enumerate().map(|(i, (kind, size))| Resource {
            slot: BarSlot::Own(BarIndex::new(i as u8 * 2).unwrap()),
            kind: *kind,
            size: *size,
            align: *size,
        });
        Arc::new(Self {
            name: name.into(),
            port_type,
            resources: resources.collect(),
            state: Mutex::default(),
        })
    }

    /// Address of its first range.
    pub(crate) fn address(&self) -> u64 {
        self.state.lock().unwrap().assigned[0].1
    }
}

impl ConfigTarget for Stub {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut state = self.state.lock().unwrap();
        state.config_accesses.push((offset, data.len()));
        data.fill(0x42);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Effect {
        let mut state = self.state.lock().unwrap();
        state.config_accesses.push((offset, data.len()));
        Effect::None
    }

    fn set_multi_function(&self) {
        self.state.lock().unwrap().multi_function = true;
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn save(&self) -> Registers {
        Registers {
            config: Vec::new(),
            msix: None,
        }
    }

    fn check(&self, _saved: &Registers) -> Result<(), RegistersError> {
        Ok(())
    }

    fn restore(&self, _saved: &Registers) -> Result<(), RegistersError> {
        Ok(())
    }
}

impl PciFunction for Stub {
    fn port_type(&self) -> PortType {
        self.port_type
    }

    fn resources(&self) -> Vec<Resource> {
        self.resources.clone()
    }

    fn assign(&self, slot: BarSlot, address: u64) {
        let mut state = self.state.lock().unwrap();
        state.assigned.retain(|(s, _)| *s != slot);
        state.assigned.push((slot, address));
    }

    fn decoded(&self) -> Vec<Decoded> {
        let state = self.state.lock().unwrap();
        let sizes = |slot| {
            self.resources
                .iter()
                .find(|r| r.slot == slot)
                .map_or(0, |r| r.size)
        };
        let decoded = state.assigned.iter().map(|(slot, address)| Decoded {
            slot: *slot,
            range: *address..*address + sizes(*slot),
        });
        decoded.collect()
    }

    fn memory_read(&self, _slot: BarSlot, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }

    fn memory_write(&self, slot: BarSlot, offset: u64, data: &[u8]) -> Effect {
        let mut state = self.state.lock().unwrap();
        state.writes.push((slot, offset, data.to_vec()));
        Effect::None
    }

    fn doorbells(&self) -> Vec<FunctionDoorbell> {
        let doorbell = |resource: &Resource| FunctionDoorbell {
            slot: resource.slot,
            offset: 0x1000,
            datamatch: None,
            event: Arc::new(EventFd::new(0).unwrap()),
        };
        self.resources.iter().map(doorbell).collect()
    }

    fn reset(&self) {
        self.state.lock().unwrap().resets += 1;
    }
}

/// A device with queues of 8 entries that takes every chain and gives none back before [`Held::release`] is set.
pub(crate) struct Held {
    queues: usize,
    config: Vec<u8>,
    release: Arc<AtomicBool>,
    tickets: Vec<(u16, Ticket)>,
}

impl Held {
    /// Such a device, and the switch that makes it complete its requests.
    pub(crate) fn device(queues: usize, config: &[u8]) -> (Box<Self>, Arc<AtomicBool>) {
        let release = Arc::new(AtomicBool::new(false));
        let device = Self {
            queues,
            config: config.to_vec(),
            release: Arc::clone(&release),
            tickets: Vec::new(),
        };
        (Box::new(device), release)
    }

    /// A function with such a device, and RAM of its own.
    pub(crate) fn function(
        queues: usize,
        config: &[u8],
    ) -> (Arc<VirtioFunction>, View, Arc<AtomicBool>) {
        let view = ram().view().unwrap();
        let (device, release) = Self::device(queues, config);
        let function = VirtioFunction::new("held", device, view.clone()).unwrap();
        (function, view, release)
    }
}

/// 1 MiB of RAM.
pub(crate) fn ram() -> Arc<GuestRam> {
    let start = GuestAddress(0);
    GuestRam::new(&[RamRange {
        start,
        len: 1 << 20,
    }])
    .unwrap()
}

impl VirtioDevice for Held {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        1 << 9
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![8; self.queues]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config[offset..offset + data.len()].copy_from_slice(data);
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        self.tickets.clear();
    }

    fn save_state(&self) -> Result<DeviceState, Unsavable> {
        Ok(DeviceState::None)
    }

    fn check_state(&self, state: &DeviceState) -> Result<(), &'static str> {
        state.must_be_none()
    }

    fn restore_state(&mut self, _state: &DeviceState) {}

    fn process(&mut self, queue: u16, io: &mut Io<'_>) -> Result<Progress, RingError> {
        while let Some(chain) = io.pop(queue)? {
            self.tickets.push((queue, chain.ticket()));
        }
        Ok(Progress::Exhausted)
    }

    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    /// Token 0: completes everything if that was allowed. Token 1: the configuration changed.
    fn on_event(&mut self, token: u16, io: &mut Io<'_>) -> Result<(), RingError> {
        if token == 1 {
            io.config_changed();
        } else if self.release.load(Ordering::SeqCst) {
            for (queue, head) in self.tickets.drain(..) {
                io.push(queue, head, 0)?;
            }
        }
        Ok(())
    }
}
