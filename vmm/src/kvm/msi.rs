//! Interrupt vectors of PCI functions: each is an interrupt route and an irqfd of KVM.
//!
//! KVM has 4096 routes for a VM, 40 of which belong to the interrupt controllers, so a vector takes one only when the
//! guest first unmasks it. A masked vector keeps its route for the next unmasking, which then costs nothing, as long as
//! fewer than half of the routes are taken; after that it gives it back. A vector for which there is no route is slower
//! and not deaf: each of its interrupts is a system call with the message.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_msi,
};
use kvm_ioctls::{Cap, VmFd};
use pci::msi::{MsiController, MsiMessage, MsiSink};
use vmm_sys_util::eventfd::EventFd;

use super::{KvmError, event, failed};

/// Interrupt lines of the I/O APIC; vectors take the numbers after them.
const LINES: u32 = 24;
/// Interrupt lines of the legacy controllers.
const LEGACY_LINES: u32 = 16;
/// Routes of interrupt lines, which count towards the limit: one for each line of each controller.
const CHIP_ROUTES: u32 = LINES + LEGACY_LINES;

/// Hands out the interrupt vectors of one VM.
pub struct KvmMsi {
    shared: Arc<Shared>,
}

struct Shared {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
    /// That routes ran out was said.
    warned: AtomicBool,
}

/// Which route numbers are taken, and where they lead.
struct Routes {
    taken: BTreeMap<u32, MsiMessage>,
    /// As many can be taken.
    limit: u32,
}

impl Routes {
    /// The lowest free route number.
    fn free(&self) -> Option<u32> {
        if self.taken.len() as u32 >= self.limit {
            return None;
        }
        let mut next = LINES;
        for gsi in self.taken.keys() {
            if *gsi != next {
                break;
            }
            next += 1;
        }
        Some(next)
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
    fn with_limit(vm: Arc<VmFd>, limit: u32) -> Self {
        Self {
            shared: Arc::new(Shared {
                vm,
                routes: Mutex::new(Routes {
                    taken: BTreeMap::new(),
                    limit,
                }),
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
}

impl Shared {
    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Delivers `message` without a route.
    fn send(&self, message: MsiMessage) {
        let sent = self.vm.signal_msi(kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        });
        // The guest's doing, such as a processor that is not there.
        if let Err(error) = sent {
            tracing::debug!(%error, ?message, "an interrupt was not delivered");
        }
    }

    /// Makes KVM's routes those of the interrupt lines and `routes`.
    fn commit(&self, routes: &Routes) -> Result<(), KvmError> {
        let mut entries = Vec::with_capacity(routes.taken.len() + CHIP_ROUTES as usize);
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
        entries.extend(routes.taken.iter().map(|(gsi, m)| message_route(*gsi, *m)));
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| KvmError::Capability("room for interrupt routes"))?;
        self.vm
            .set_gsi_routing(&table)
            .map_err(failed("set interrupt routes"))
    }
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

/// A route in KVM.
struct Route {
    gsi: u32,
    /// Where it leads.
    message: MsiMessage,
    event: EventFd,
}

impl Sink {
    fn vector(&self, vector: u16) -> Option<MutexGuard<'_, Vector>> {
        let slot = self.vectors.get(usize::from(vector))?;
        Some(slot.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Has a route lead to `message`: the one that is there or a new one. On failure everything is as before.
    fn connect(&self, slot: &mut Option<Route>, message: MsiMessage) -> Result<(), KvmError> {
        if let Some(route) = slot {
            if route.message != message {
                let mut routes = self.shared.routes();
                routes.taken.insert(route.gsi, message);
                if let Err(error) = self.shared.commit(&routes) {
                    routes.taken.insert(route.gsi, route.message);
                    return Err(error);
                }
                route.message = message;
            }
            return Ok(());
        }
        let event = event("create an interrupt event")?;
        let mut routes = self.shared.routes();
        let Some(gsi) = routes.free() else {
            return Err(KvmError::Capability("a free interrupt route"));
        };
        routes.taken.insert(gsi, message);
        let connected = self.shared.commit(&routes).and_then(|()| {
            self.shared
                .vm
                .register_irqfd(&event, gsi)
                .map_err(failed("connect an interrupt"))
        });
        if let Err(error) = connected {
            routes.taken.remove(&gsi);
            return Err(error);
        }
        *slot = Some(Route {
            gsi,
            message,
            event,
        });
        Ok(())
    }

    fn disconnect(&self, slot: &mut Option<Route>) {
        if let Some(route) = slot.take() {
            if let Err(error) = self.shared.vm.unregister_irqfd(&route.event, route.gsi) {
                tracing::warn!(%error, "cannot disconnect an interrupt");
            }
            // The route itself goes with the next commit: without an irqfd it leads nowhere.
            self.shared.routes().taken.remove(&route.gsi);
        }
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
                if let Err(error) = self.connect(&mut slot.route, message) {
                    // Once: a guest can cause it as often as it likes.
                    if !self.shared.warned.swap(true, Ordering::Relaxed) {
                        tracing::warn!(%error, "interrupts without a route are slow");
                    }
                }
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
            Some(route) if route.message == message => {
                // Fails only when the counter is full, and then the interrupt is pending already.
                let _ = route.event.write(1);
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
mod tests {
    use super::*;

    const MESSAGE: MsiMessage = MsiMessage {
        address: 0xfee0_0000,
        data: 0x40,
    };

    fn routes(taken: impl IntoIterator<Item = u32>) -> Routes {
        Routes {
            taken: taken.into_iter().map(|gsi| (gsi, MESSAGE)).collect(),
            limit: 4096 - CHIP_ROUTES,
        }
    }

    #[test]
    fn the_lowest_free_route_is_taken() {
        assert_eq!(routes([]).free(), Some(24));
        assert_eq!(routes([24, 25]).free(), Some(26));
        assert_eq!(routes([24, 26]).free(), Some(25));
    }

    #[test]
    fn routes_of_lines_and_vectors_are_at_most_as_many_as_kvm_has() {
        let last = LINES + 4096 - CHIP_ROUTES - 1;
        assert_eq!(routes(LINES..last).free(), Some(last));
        assert_eq!(routes(LINES..=last).free(), None);
    }

    #[test]
    fn masked_vectors_keep_their_route_while_there_is_room() {
        assert!(!routes(24..2024).is_tight());
        assert!(routes(24..2424).is_tight());
    }

    /// The vectors that wait in the processor's local interrupt controller.
    fn pending(vcpu: &kvm_ioctls::VcpuFd) -> Vec<usize> {
        let lapic = vcpu.get_lapic().unwrap();
        let requested = |vector: &usize| {
            let byte = lapic.regs[0x200 + vector / 32 * 0x10 + vector % 32 / 8] as u8;
            byte >> (vector % 8) & 1 != 0
        };
        (0..256).filter(requested).collect()
    }

    #[test]
    fn vectors_beyond_the_last_route_are_delivered_all_the_same() {
        let Ok(kvm) = crate::kvm::open() else {
            println!("skipped: no KVM here");
            return;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        vm.create_irq_chip().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        // Local interrupt controllers take messages only once they are enabled.
        let mut lapic = vcpu.get_lapic().unwrap();
        lapic.regs[0xf1] = 1;
        vcpu.set_lapic(&lapic).unwrap();

        let msi = KvmMsi::with_limit(vm, 1);
        let sink = msi.sink(3);
        for vector in 0..3u16 {
            let data = MESSAGE.data + u32::from(vector);
            sink.set_route(vector, Some(MsiMessage { data, ..MESSAGE }));
        }
        assert_eq!(msi.routes_taken(), 1);
        sink.fire(1);
        assert_eq!(pending(&vcpu), [0x41]);
        sink.set_route(2, None);
        sink.fire(2);
        assert_eq!(pending(&vcpu), [0x41]);
        // Those with a route may take a moment.
        sink.fire(0);
        let start = std::time::Instant::now();
        while pending(&vcpu) != [0x40, 0x41] {
            assert!(start.elapsed().as_secs() < 10);
            std::thread::yield_now();
        }
        drop(sink);
        assert_eq!(msi.routes_taken(), 0);
    }
}
