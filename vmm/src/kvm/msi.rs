//! Interrupt vectors of PCI functions: each is an interrupt route and an irqfd of KVM.
//!
//! KVM has 4096 routes for a VM, 24 of which belong to the I/O APIC, so a vector takes one only when the guest first
//! unmasks it. A masked vector keeps its route for the next unmasking, which then costs nothing, as long as fewer than
//! half of the routes are taken; after that it gives it back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::{Cap, VmFd};
use pci::msi::{MsiController, MsiMessage, MsiSink};
use vmm_sys_util::eventfd::EventFd;

use super::{KvmError, event, failed};

/// Interrupt lines of the I/O APIC; vectors take the numbers after them.
const LINES: u32 = 24;
/// Interrupt lines of the legacy controllers.
const LEGACY_LINES: u32 = 16;

/// Hands out the interrupt vectors of one VM.
pub struct KvmMsi {
    shared: Arc<Shared>,
}

struct Shared {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

/// Which route numbers are taken, and where they lead.
struct Routes {
    taken: BTreeMap<u32, MsiMessage>,
    limit: u32,
}

impl Routes {
    /// The lowest free route number.
    fn free(&self) -> Option<u32> {
        let mut next = LINES;
        for gsi in self.taken.keys() {
            if *gsi != next {
                break;
            }
            next += 1;
        }
        (next < self.limit).then_some(next)
    }

    fn is_tight(&self) -> bool {
        self.taken.len() as u32 > self.limit / 2
    }
}

impl KvmMsi {
    /// No vector has a route yet.
    pub fn new(vm: Arc<VmFd>) -> Self {
        let limit = u32::try_from(vm.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
        Self {
            shared: Arc::new(Shared {
                vm,
                routes: Mutex::new(Routes {
                    taken: BTreeMap::new(),
                    limit: limit.max(1024),
                }),
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

    fn commit(&self, routes: &Routes) -> Result<(), KvmError> {
        let mut entries = Vec::with_capacity(routes.taken.len() + 40);
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
    vectors: Box<[Mutex<Option<Vector>>]>,
}

/// A vector that has a route.
struct Vector {
    gsi: u32,
    message: MsiMessage,
    event: EventFd,
    /// The guest wants it: not masked.
    live: bool,
}

impl Sink {
    fn vector(&self, vector: u16) -> Option<MutexGuard<'_, Option<Vector>>> {
        let slot = self.vectors.get(usize::from(vector))?;
        Some(slot.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Leads the vector to `message`, over the route it has or a new one.
    fn connect(&self, slot: &mut Option<Vector>, message: MsiMessage) -> Result<(), KvmError> {
        if let Some(vector) = slot {
            if vector.message != message {
                let mut routes = self.shared.routes();
                routes.taken.insert(vector.gsi, message);
                self.shared.commit(&routes)?;
                vector.message = message;
            }
            vector.live = true;
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
        *slot = Some(Vector {
            gsi,
            message,
            event,
            live: true,
        });
        Ok(())
    }

    fn disconnect(&self, slot: &mut Option<Vector>) {
        if let Some(vector) = slot.take() {
            if let Err(error) = self.shared.vm.unregister_irqfd(&vector.event, vector.gsi) {
                tracing::warn!(%error, "cannot disconnect an interrupt");
            }
            // The route itself goes with the next commit: without an irqfd it leads nowhere.
            self.shared.routes().taken.remove(&vector.gsi);
        }
    }
}

impl MsiSink for Sink {
    fn set_route(&self, vector: u16, message: Option<MsiMessage>) {
        let Some(mut slot) = self.vector(vector) else {
            return;
        };
        match message {
            Some(message) => {
                if let Err(error) = self.connect(&mut slot, message) {
                    tracing::error!(%error, vector, "the guest will miss interrupts");
                }
            }
            None => {
                if self.shared.routes().is_tight() {
                    self.disconnect(&mut slot);
                } else if let Some(vector) = slot.as_mut() {
                    vector.live = false;
                }
            }
        }
    }

    fn fire(&self, vector: u16) {
        let Some(slot) = self.vector(vector) else {
            return;
        };
        if let Some(vector) = slot.as_ref().filter(|v| v.live) {
            // Fails only when the counter is full, and then the interrupt is pending already.
            let _ = vector.event.write(1);
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        for index in 0..self.vectors.len() {
            if let Some(mut slot) = self.vector(index as u16) {
                self.disconnect(&mut slot);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(taken: impl IntoIterator<Item = u32>) -> Routes {
        let message = MsiMessage {
            address: 0xfee0_0000,
            data: 0,
        };
        Routes {
            taken: taken.into_iter().map(|gsi| (gsi, message)).collect(),
            limit: 4096,
        }
    }

    #[test]
    fn the_lowest_free_route_is_taken() {
        assert_eq!(routes([]).free(), Some(24));
        assert_eq!(routes([24, 25]).free(), Some(26));
        assert_eq!(routes([24, 26]).free(), Some(25));
        assert_eq!(routes(24..4096).free(), None);
    }

    #[test]
    fn masked_vectors_keep_their_route_while_there_is_room() {
        assert!(!routes(24..2024).is_tight());
        assert!(routes(24..2424).is_tight());
    }
}
