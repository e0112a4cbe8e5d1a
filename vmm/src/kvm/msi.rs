//! Interrupt vectors of PCI functions: each is an interrupt route and an irqfd of KVM.
//!
//! KVM has 4096 routes for a VM, 40 of which belong to the interrupt controllers, so a vector takes one only when the
//! guest first unmasks it. A masked vector keeps its route for the next unmasking, which then costs nothing, as long as
//! fewer than half of the routes are taken; after that it gives it back. A vector for which there is no route is slower
//! and not deaf: each of its interrupts is a system call with the message.
//!
//! KVM takes all routes at once, so each change costs as much as there are routes. A batch collects changes and makes
//! them together when it ends; until then the vectors concerned are as slow as those without a route.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::msi::{MsiBatch, MsiController, MsiMessage, MsiSink};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_msi,
};
use kvm_ioctls::{Cap, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{KvmError, event, failed};

/// Interrupt lines of the I/O APIC; vectors take the numbers after them.
const LINES: u32 = 24;
/// Interrupt lines of the legacy controllers.
const LEGACY_LINES: u32 = 16;
/// Routes of interrupt lines, which count towards the limit: one for each line of each controller.
const CHIP_ROUTES: u32 = LINES + LEGACY_LINES;

/// What vectors need of a VM.
trait Host: Send + Sync {
    /// Makes the routes of the VM those of its interrupt lines and `messages`, which are by number.
    fn set_routes(&self, messages: &BTreeMap<u32, MsiMessage>) -> Result<(), KvmError>;

    /// From now on `event` causes interrupt `gsi`.
    fn connect(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError>;

    /// Undoes [`Self::connect`].
    fn disconnect(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError>;

    /// Delivers `message` without a route.
    fn send(&self, message: MsiMessage) -> Result<(), KvmError>;
}

impl Host for VmFd {
    fn set_routes(&self, messages: &BTreeMap<u32, MsiMessage>) -> Result<(), KvmError> {
        let mut entries = chip_routes();
        entries.extend(messages.iter().map(|(gsi, m)| message_route(*gsi, *m)));
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| KvmError::Capability("room for interrupt routes"))?;
        self.set_gsi_routing(&table)
            .map_err(failed("set interrupt routes"))
    }

    fn connect(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.register_irqfd(event, gsi)
            .map_err(failed("connect an interrupt"))
    }

    fn disconnect(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.unregister_irqfd(event, gsi)
            .map_err(failed("disconnect an interrupt"))
    }

    fn send(&self, message: MsiMessage) -> Result<(), KvmError> {
        self.signal_msi(kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        })
        .map(drop)
        .map_err(failed("send a message"))
    }
}

/// Hands out the interrupt vectors of one VM.
pub struct KvmMsi {
    shared: Arc<Shared>,
}

struct Shared {
    host: Arc<dyn Host>,
    routes: Mutex<Routes>,
    /// That a vector has no route was said.
    warned: AtomicBool,
}

/// Which route numbers are taken, and where they lead.
struct Routes {
    /// Where each leads in KVM. `None` for one that KVM was not told of.
    taken: BTreeMap<u32, Option<MsiMessage>>,
    /// As many can be taken.
    limit: u32,
    /// No number below this one is free.
    lowest: u32,
    /// Where routes are to lead, as far as KVM was not told.
    wanted: BTreeMap<u32, Wanted>,
    /// Batches that are open.
    batches: u32,
}

/// A change of a route.
struct Wanted {
    line: Arc<Line>,
    message: MsiMessage,
}

impl Routes {
    fn new(limit: u32) -> Self {
        Self {
            taken: BTreeMap::new(),
            limit,
            lowest: LINES,
            wanted: BTreeMap::new(),
            batches: 0,
        }
    }

    /// Takes the lowest free route number.
    fn take(&mut self) -> Option<u32> {
        if self.taken.len() as u32 >= self.limit {
            return None;
        }
        let mut next = self.lowest;
        for (gsi, _) in self.taken.range(next..) {
            if *gsi != next {
                break;
            }
            next += 1;
        }
        self.lowest = next + 1;
        self.taken.insert(next, None);
        Some(next)
    }

    /// Gives route number `gsi` back.
    fn release(&mut self, gsi: u32) {
        self.taken.remove(&gsi);
        self.wanted.remove(&gsi);
        self.lowest = self.lowest.min(gsi);
    }

    fn is_tight(&self) -> bool {
        self.taken.len() as u32 > self.limit / 2
    }
}

impl KvmMsi {
    /// No vector has a route yet.
    pub fn new(vm: Arc<VmFd>) -> Self {
        let limit = u32::try_from(vm.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
        Self::with_limit(vm, limit.max(1024) - CHIP_ROUTES)
    }

    /// With at most `limit` routes for vectors.
    fn with_limit(host: Arc<dyn Host>, limit: u32) -> Self {
        Self {
            shared: Arc::new(Shared {
                host,
                routes: Mutex::new(Routes::new(limit)),
                warned: AtomicBool::new(false),
            }),
        }
    }

    /// Routes taken by vectors.
    pub fn routes_taken(&self) -> usize {
        self.shared.routes().taken.len()
    }
}

impl MsiController for KvmMsi {
    fn sink(&self, vectors: u16) -> Arc<dyn MsiSink> {
        Arc::new(Sink {
            shared: Arc::clone(&self.shared),
            vectors: (0..vectors).map(|_| Mutex::default()).collect(),
        })
    }

    fn batch(&self) -> MsiBatch<'_> {
        self.shared.routes().batches += 1;
        MsiBatch::until(|| {
            let mut routes = self.shared.routes();
            routes.batches -= 1;
            let settled = self.shared.settle(&mut routes);
            drop(routes);
            self.shared.note(settled);
        })
    }
}

impl Shared {
    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Delivers `message` without a route.
    fn send(&self, message: MsiMessage) {
        // The guest's doing, such as a processor that is not there.
        if let Err(error) = self.host.send(message) {
            tracing::debug!(%error, ?message, "an interrupt was not delivered");
        }
    }

    /// Says once that there are vectors without a route: a guest can cause it as often as it likes.
    fn note(&self, result: Result<(), KvmError>) {
        if let Err(error) = result
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(%error, "interrupts without a route are slow");
        }
    }

    /// Unless a batch is open, tells KVM of every route that is wanted. The error is the first there was; its route is
    /// not set up, and can be wanted again.
    fn settle(&self, routes: &mut Routes) -> Result<(), KvmError> {
        if routes.batches != 0 || routes.wanted.is_empty() {
            return Ok(());
        }
        let wanted: Vec<_> = std::mem::take(&mut routes.wanted).into_values().collect();
        self.settle_part(routes, &wanted)
    }

    /// A message that KVM does not take, such as one to a processor number it cannot have, fails alone: in the half it
    /// is in, and in the half of that.
    fn settle_part(&self, routes: &mut Routes, wanted: &[Wanted]) -> Result<(), KvmError> {
        let Err(error) = self.commit(routes, wanted) else {
            return self.connect(wanted);
        };
        let (first, second) = wanted.split_at(wanted.len() / 2);
        if first.is_empty() {
            return Err(error);
        }
        let result = self.settle_part(routes, first);
        self.settle_part(routes, second).and(result)
    }

    /// Makes KVM's routes those of the interrupt lines, those it has, and `wanted`. All of them or none.
    fn commit(&self, routes: &mut Routes, wanted: &[Wanted]) -> Result<(), KvmError> {
        let now = routes.taken.iter();
        let mut messages: BTreeMap<_, _> = now.filter_map(|(gsi, m)| Some((*gsi, (*m)?))).collect();
        messages.extend(wanted.iter().map(|w| (w.line.gsi, w.message)));
        self.host.set_routes(&messages)?;
        for Wanted { line, message } in wanted {
            routes.taken.insert(line.gsi, Some(*message));
        }
        Ok(())
    }

    /// KVM has these routes: the events of their lines may cause interrupts.
    fn connect(&self, wanted: &[Wanted]) -> Result<(), KvmError> {
        let mut result = Ok(());
        for Wanted { line, .. } in wanted {
            if !line.connected.load(Ordering::Acquire) {
                if let Err(error) = self.host.connect(&line.event, line.gsi) {
                    result = result.and(Err(error));
                    continue;
                }
                line.connected.store(true, Ordering::Release);
            }
            line.current.store(true, Ordering::Release);
        }
        result
    }
}

/// The routes of the interrupt lines.
fn chip_routes() -> Vec<kvm_irq_routing_entry> {
    let mut entries = Vec::with_capacity(CHIP_ROUTES as usize);
    for line in 0..LINES {
        if line < LEGACY_LINES {
            let (chip, pin) = if line < 8 {
                (KVM_IRQCHIP_PIC_MASTER, line)
            } else {
                (KVM_IRQCHIP_PIC_SLAVE, line - 8)
            };
            entries.push(chip_route(line, chip, pin));
        }
        entries.push(chip_route(line, KVM_IRQCHIP_IOAPIC, line));
    }
    entries
}

fn chip_route(gsi: u32, chip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = chip;
    entry.u.irqchip.pin = pin;
    entry
}

fn message_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

/// The vectors of one function.
struct Sink {
    shared: Arc<Shared>,
    vectors: Box<[Mutex<Vector>]>,
}

#[derive(Default)]
struct Vector {
    /// Where the guest wants it to go; `None` while it is masked.
    message: Option<MsiMessage>,
    route: Option<Route>,
}

/// A route number, and where it leads or is to lead.
struct Route {
    line: Arc<Line>,
    message: MsiMessage,
}

/// A route number and its event.
struct Line {
    gsi: u32,
    event: EventFd,
    /// The event causes the interrupt.
    connected: AtomicBool,
    /// The interrupt goes where it is wanted.
    current: AtomicBool,
}

impl Line {
    fn is_ready(&self) -> bool {
        self.connected.load(Ordering::Acquire) && self.current.load(Ordering::Acquire)
    }
}

impl Sink {
    fn vector(&self, vector: u16) -> Option<MutexGuard<'_, Vector>> {
        let slot = self.vectors.get(usize::from(vector))?;
        Some(slot.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Has a route lead to `message`: the one that is there or a new one. Until a batch that is open ends, and after a
    /// failure, it does not.
    fn connect(&self, slot: &mut Option<Route>, message: MsiMessage) -> Result<(), KvmError> {
        let (mut routes, line) = match slot {
            Some(route) if route.message == message && route.line.is_ready() => return Ok(()),
            Some(route) => {
                route.message = message;
                (self.shared.routes(), Arc::clone(&route.line))
            }
            None => {
                let event = event("create an interrupt event")?;
                let mut routes = self.shared.routes();
                let Some(gsi) = routes.take() else {
                    return Err(KvmError::Capability("a free interrupt route"));
                };
                let line = Arc::new(Line {
                    gsi,
                    event,
                    connected: AtomicBool::new(false),
                    current: AtomicBool::new(false),
                });
                *slot = Some(Route {
                    line: Arc::clone(&line),
                    message,
                });
                (routes, line)
            }
        };
        line.current.store(false, Ordering::Release);
        routes.wanted.insert(line.gsi, Wanted { line, message });
        self.shared.settle(&mut routes)
    }

    fn disconnect(&self, slot: &mut Option<Route>) {
        let Some(Route { line, .. }) = slot.take() else {
            return;
        };
        let mut routes = self.shared.routes();
        if line.connected.load(Ordering::Acquire)
            && let Err(error) = self.shared.host.disconnect(&line.event, line.gsi)
        {
            tracing::warn!(%error, "cannot disconnect an interrupt");
        }
        // The route itself goes with the next commit: without an irqfd it leads nowhere.
        routes.release(line.gsi);
    }
}

impl MsiSink for Sink {
    fn set_route(&self, vector: u16, message: Option<MsiMessage>) {
        let Some(mut slot) = self.vector(vector) else {
            return;
        };
        slot.message = message;
        match message {
            Some(message) => {
                let connected = self.connect(&mut slot.route, message);
                self.shared.note(connected);
            }
            None => {
                if self.shared.routes().is_tight() {
                    self.disconnect(&mut slot.route);
                }
            }
        }
    }

    fn fire(&self, vector: u16) {
        let Some(slot) = self.vector(vector) else {
            return;
        };
        let Some(message) = slot.message else {
            return;
        };
        match &slot.route {
            Some(Route { line, .. }) if line.is_ready() => {
                // Fails only when the counter is full, and then the interrupt is pending already.
                let _ = line.event.write(1);
            }
            _ => self.shared.send(message),
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        for index in 0..self.vectors.len() {
            if let Some(mut slot) = self.vector(index as u16) {
                self.disconnect(&mut slot.route);
            }
        }
    }
}

#[cfg(test)]
mod tests;
