//! A learning Ethernet switch in this process. Its ports are plugged into functions; nothing of it needs privilege.
//!
//! A sender copies its frame from guest memory and puts it into the inbox of each receiving port, and the receiver
//! copies it from there: no function ever touches another one. A flooded frame is in memory once. Locks are taken in
//! the order function, table, inbox, and a receiver takes only the last of them.
//!
//! Everything is bounded: frames and bytes that wait in an inbox and in all of them, addresses learned from a port,
//! ports. What does not fit is dropped and counted, as on a wire. The less is left for all inboxes, the less one of
//! them may take of it, so that ports which are not served leave room for the others; and each has a share of its own.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::MacAddress;
use super::announce::Announcer;
use super::link::{Counters, FRAME_MAX, FRAME_MIN, HEADER_LEN, Link, Stats, frame_len};
use super::offload::{self, Adapted};
use crate::memory::View;
use crate::virtio::Chain;

/// The most ports of one switch.
const MAX_PORTS: usize = 1024;
/// Frames that may wait for a port.
const MAX_FRAMES: usize = 1024;
/// Bytes that may wait for a port, if there is plenty.
const MAX_BYTES: usize = 2 << 20;
/// Bytes that may wait for a port, whatever the others have: more than the longest frame.
const MIN_BYTES: usize = 128 << 10;
/// Bytes that may wait for all ports together, but for the [`MIN_BYTES`] of each.
const POOL_BYTES: usize = 64 << 20;
/// One port may have as much as this part of what is left.
const PART: usize = 8;
/// What a frame takes besides its bytes, so that short ones are not for free.
const OVERHEAD: usize = 128;
/// Addresses that may be learned from one port, besides its own. The oldest makes room.
const MAX_LEARNED: usize = 256;

const _: () = assert!(HEADER_LEN + FRAME_MAX + OVERHEAD <= MIN_BYTES);

/// Why a port could not be added.
#[derive(Debug, thiserror::Error)]
pub enum SwitchError {
    /// Two ports with one address.
    #[error("MAC address {0} is already on this switch; give each device its own")]
    Duplicate(MacAddress),
    /// Too many ports.
    #[error("a switch has at most {MAX_PORTS} ports")]
    Full,
    /// The kernel refused a descriptor.
    #[error("cannot add a port to the switch")]
    Event(#[source] std::io::Error),
}

/// What a port is made of.
#[derive(Clone, Debug)]
pub struct PortConfig {
    /// Shown by [`Switch::ports`].
    pub name: String,
    /// The address of the device that is plugged in. It belongs to this port: no other can take it over by sending
    /// from it.
    pub mac: MacAddress,
    /// Drop frames the device sends from any other address.
    pub check_source: bool,
}

/// One port, as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortInfo {
    /// From [`PortConfig::name`].
    pub name: String,
    /// From [`PortConfig::mac`].
    pub mac: MacAddress,
    /// A driver is there to receive.
    pub up: bool,
    /// Frames that wait for the driver.
    pub waiting: usize,
    /// Addresses learned from it.
    pub learned: usize,
    /// What went through.
    pub stats: Stats,
}

/// A switch. Clones are the same switch; it lives as long as any clone or port.
#[derive(Clone, Default)]
pub struct Switch {
    table: Arc<RwLock<Table>>,
    /// Bytes that wait for all ports.
    waiting: Arc<AtomicUsize>,
}

#[derive(Default)]
struct Table {
    /// By port number; a hole is a port that was unplugged.
    ports: Vec<Option<Port>>,
    stations: HashMap<MacAddress, Station>,
}

/// Where an address is.
#[derive(Clone, Copy)]
struct Station {
    port: usize,
    /// It is the port's own and stays there.
    fixed: bool,
}

struct Port {
    shared: Arc<Shared>,
    /// Addresses learned from this port, oldest first. Some may have moved to another port since.
    learned: VecDeque<MacAddress>,
}

/// What senders and the receiver of a port share.
struct Shared {
    config: PortConfig,
    event: EventFd,
    counters: Arc<Counters>,
    inbox: Mutex<Inbox>,
    /// Bytes that wait for all ports of the switch; each changes it with its inbox locked.
    all_waiting: Arc<AtomicUsize>,
}

/// A frame on its way; flooded ones are shared by their receivers.
type Frame = Arc<Vec<u8>>;

/// What a frame counts for.
fn weight(frame: &Frame) -> usize {
    frame.len() + OVERHEAD
}

#[derive(Default)]
struct Inbox {
    up: bool,
    frames: VecDeque<Frame>,
    bytes: usize,
}

impl Shared {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts `frame` into the inbox. True if the receiver must be woken.
    fn accept(&self, frame: Frame) -> bool {
        let mut inbox = self.inbox();
        if !inbox.up {
            return false;
        }
        let bytes = weight(&frame);
        // Two ports at once may both find the last room; a frame too many for each thread does no harm.
        let left = POOL_BYTES.saturating_sub(self.all_waiting.load(Ordering::Relaxed));
        let most = (left / PART).clamp(MIN_BYTES, MAX_BYTES);
        if inbox.frames.len() >= MAX_FRAMES || inbox.bytes + bytes > most {
            self.counters.overflow();
            return false;
        }
        let first = inbox.frames.is_empty();
        inbox.bytes += bytes;
        self.all_waiting.fetch_add(bytes, Ordering::Relaxed);
        inbox.frames.push_back(frame);
        first
    }

    /// Takes the oldest frame out of the inbox.
    fn take(&self) -> Option<Frame> {
        let mut inbox = self.inbox();
        let frame = inbox.frames.pop_front()?;
        let bytes = weight(&frame);
        inbox.bytes -= bytes;
        self.all_waiting.fetch_sub(bytes, Ordering::Relaxed);
        Some(frame)
    }

    /// Drops what waits, and what comes from now on.
    fn close(&self) {
        let mut inbox = self.inbox();
        self.all_waiting.fetch_sub(inbox.bytes, Ordering::Relaxed);
        *inbox = Inbox::default();
    }
}

impl Table {
    fn port(&self, index: usize) -> Option<&Arc<Shared>> {
        self.ports.get(index)?.as_ref().map(|port| &port.shared)
    }

    /// True if a frame from `source` on `port` teaches nothing new.
    fn knows(&self, source: MacAddress, port: usize) -> bool {
        self.stations
            .get(&source)
            .is_some_and(|station| station.port == port || station.fixed)
    }

    fn learn(&mut self, source: MacAddress, index: usize) {
        let Some(Some(port)) = self.ports.get_mut(index) else {
            return;
        };
        let full = port.learned.len() >= MAX_LEARNED;
        if let Some(oldest) = full.then(|| port.learned.pop_front()).flatten()
            && self
                .stations
                .get(&oldest)
                .is_some_and(|s| s.port == index && !s.fixed)
        {
            self.stations.remove(&oldest);
        }
        port.learned.push_back(source);
        let station = Station {
            port: index,
            fixed: false,
        };
        self.stations.insert(source, station);
    }
}

impl Switch {
    /// A switch without ports.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a port. It is down until a driver is ready, and goes when it is dropped.
    pub fn port(&self, config: PortConfig) -> Result<SwitchPort, SwitchError> {
        let mac = config.mac;
        let shared = Arc::new(Shared {
            config,
            event: EventFd::new(EFD_NONBLOCK).map_err(SwitchError::Event)?,
            counters: Arc::default(),
            inbox: Mutex::default(),
            all_waiting: Arc::clone(&self.waiting),
        });
        let mut table = self.write();
        if table.stations.get(&mac).is_some_and(|s| s.fixed) {
            return Err(SwitchError::Duplicate(mac));
        }
        let index = table.ports.iter().position(Option::is_none);
        let index = index.unwrap_or(table.ports.len());
        if index >= MAX_PORTS {
            return Err(SwitchError::Full);
        }
        let port = Some(Port {
            shared: Arc::clone(&shared),
            learned: VecDeque::new(),
        });
        match table.ports.get_mut(index) {
            Some(hole) => *hole = port,
            None => table.ports.push(port),
        }
        let station = Station {
            port: index,
            fixed: true,
        };
        table.stations.insert(mac, station);
        drop(table);
        Ok(SwitchPort {
            switch: self.clone(),
            index,
            shared,
            features: 0,
            to_wake: Vec::new(),
            adapted: Adapted::Done,
            front: None,
        })
    }

    /// All ports, in the order of their numbers.
    pub fn ports(&self) -> Vec<PortInfo> {
        let table = self.read();
        let mut ports = Vec::new();
        for (index, port) in table.ports.iter().enumerate() {
            let Some(port) = port else {
                continue;
            };
            let stations = table.stations.values();
            let (up, waiting) = {
                let inbox = port.shared.inbox();
                (inbox.up, inbox.frames.len())
            };
            ports.push(PortInfo {
                name: port.shared.config.name.clone(),
                mac: port.shared.config.mac,
                up,
                waiting,
                learned: stations.filter(|s| s.port == index && !s.fixed).count(),
                stats: port.shared.counters.snapshot(),
            });
        }
        ports
    }

    /// Sends the admitted `frame` of port `from` to whom it concerns. `wake` gets receivers that had nothing before.
    fn forward(
        &self,
        from: usize,
        frame: Vec<u8>,
        source: MacAddress,
        destination: MacAddress,
        mut wake: impl FnMut(&Arc<Shared>),
    ) {
        let frame = Arc::new(frame);
        if !self.read().knows(source, from) {
            self.write().learn(source, from);
        }
        let table = self.read();
        let station = table.stations.get(&destination);
        if let Some(station) = station.filter(|_| !destination.is_group()) {
            // A frame to a station on the sender's own side has already reached it.
            let port = table.port(station.port).filter(|_| station.port != from);
            if let Some(port) = port
                && port.accept(frame)
            {
                wake(port);
            }
            return;
        }
        for (index, port) in table.ports.iter().enumerate() {
            let Some(port) = port.as_ref().filter(|_| index != from) else {
                continue;
            };
            if port.shared.accept(Arc::clone(&frame)) {
                wake(&port.shared);
            }
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A port of a [`Switch`], to plug a network device in.
pub struct SwitchPort {
    switch: Switch,
    index: usize,
    shared: Arc<Shared>,
    /// What the driver accepted.
    features: u64,
    /// Ports that got frames since the last flush and did not have any before.
    to_wake: Vec<Arc<Shared>>,
    /// What the frame that was last taken from the inbox is turned into for the driver. No more than one is taken,
    /// so that senders see how much waits.
    adapted: Adapted,
    /// The frame that waits to be consumed.
    front: Option<Vec<u8>>,
}

impl SwitchPort {
    #[cfg(test)]
    pub(super) fn shared_event(&self) -> EventFd {
        self.shared.event.try_clone().unwrap()
    }

    /// Sends the admitted `frame`, if its addresses are in order.
    fn dispatch(&mut self, frame: Vec<u8>) {
        let counters = &self.shared.counters;
        let address = |at: usize| {
            let octets = frame.get(HEADER_LEN + at..HEADER_LEN + at + 6);
            octets.and_then(|o| o.try_into().ok()).map(MacAddress::new)
        };
        let (Some(destination), Some(source)) = (address(0), address(6)) else {
            return counters.malformed();
        };
        if source.is_group() {
            return counters.malformed();
        }
        let config = &self.shared.config;
        if config.check_source && source != config.mac {
            return counters.spoofed();
        }
        counters.sent(frame.len().saturating_sub(HEADER_LEN));
        let to_wake = &mut self.to_wake;
        self.switch
            .forward(self.index, frame, source, destination, |receiver| {
                to_wake.push(Arc::clone(receiver));
            });
    }

    /// Sends `frame`, header included, which did not come from a driver but from the host.
    pub(super) fn inject(&mut self, frame: &[u8]) {
        let len = frame.len().saturating_sub(HEADER_LEN);
        if !(FRAME_MIN..=FRAME_MAX).contains(&len) {
            return self.shared.counters.malformed();
        }
        let mut frame = frame.to_vec();
        if !offload::admit(&mut frame, self.features) {
            return self.shared.counters.malformed();
        }
        self.dispatch(frame);
    }

    /// Announces the address of its device from it.
    pub fn announcer(&self) -> Announcer {
        let outlet = Outlet {
            switch: self.switch.clone(),
            index: self.index,
            shared: Arc::clone(&self.shared),
        };
        Announcer::on_port(self.shared.config.mac, outlet)
    }

    /// Counts a frame that was taken from the port, header included.
    pub(super) fn delivered(&self, len: usize) {
        let counters = &self.shared.counters;
        counters.received(len.saturating_sub(HEADER_LEN));
    }

    /// Makes its own event look as if a frame had come in.
    pub(super) fn wake(&self) {
        let _ = self.shared.event.write(1);
    }

    /// The next frame as the driver takes it.
    fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some(frame) = self.adapted.next() {
                return Some(frame);
            }
            let frame = Arc::unwrap_or_clone(self.shared.take()?);
            self.adapted = offload::adapt(frame, self.features);
        }
    }
}

/// The sending side of a port, for those who do not own the port. It may outlive it, and then does nothing.
pub(super) struct Outlet {
    switch: Switch,
    index: usize,
    shared: Arc<Shared>,
}

impl Outlet {
    /// Sends `frame`, header included, if the port is up. No count of the device's own frames has it.
    pub(super) fn announce(&self, frame: Vec<u8>, source: MacAddress, destination: MacAddress) {
        let is_there = self
            .switch
            .read()
            .port(self.index)
            .is_some_and(|port| Arc::ptr_eq(port, &self.shared));
        if !is_there || !self.shared.inbox().up {
            return;
        }
        self.switch
            .forward(self.index, frame, source, destination, |receiver| {
                let _ = receiver.event.write(1);
            });
    }
}

impl Link for SwitchPort {
    fn event_fd(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }

    fn offloads(&self) -> u64 {
        offload::ALL
    }

    fn up(&mut self, features: u64) {
        self.features = features;
        self.shared.inbox().up = true;
    }

    fn down(&mut self) {
        self.features = 0;
        self.adapted = Adapted::Done;
        self.front = None;
        self.shared.close();
    }

    fn send(&mut self, view: &View, chain: &Chain) {
        let counters = &self.shared.counters;
        let Some(len) = frame_len(chain) else {
            return counters.malformed();
        };
        let mut frame = vec![0; HEADER_LEN + len];
        if chain.read(view, 0, &mut frame).is_err() || !offload::admit(&mut frame, self.features) {
            return counters.malformed();
        }
        self.dispatch(frame);
    }

    fn flush(&mut self) {
        for port in self.to_wake.drain(..) {
            // Watched edge-triggered and never read: each write is an event.
            let _ = port.event.write(1);
        }
    }

    fn peek(&mut self) -> Option<&mut [u8]> {
        if self.front.is_none() {
            self.front = self.next();
        }
        self.front.as_deref_mut()
    }

    fn consume(&mut self) {
        self.front = None;
    }

    fn counters(&self) -> &Arc<Counters> {
        &self.shared.counters
    }
}

impl Drop for SwitchPort {
    fn drop(&mut self) {
        let mut table = self.switch.write();
        if let Some(port) = table.ports.get_mut(self.index) {
            *port = None;
        }
        // No sender finds it any more.
        self.shared.close();
        let index = self.index;
        table.stations.retain(|_, station| station.port != index);
    }
}
