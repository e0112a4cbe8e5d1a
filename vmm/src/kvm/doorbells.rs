//! Keeps the registered ioeventfds equal to the set that should exist, as far as KVM has room.
//!
//! KVM takes about a thousand of them (`NR_IOBUS_DEVS`). A doorbell beyond that works all the same: its write exits to
//! the monitor, which passes it to the function like that of any other register, and kicks the queue.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use pci::root::Doorbell;
use vmm_sys_util::eventfd::EventFd;

use super::{KvmError, failed};

/// The ioeventfds of one VM.
pub struct Doorbells {
    vm: Arc<VmFd>,
    registered: Mutex<Registered>,
}

#[derive(Default)]
struct Registered {
    events: BTreeMap<Place, Arc<EventFd>>,
    /// It was said that KVM has no room for more.
    said: bool,
}

/// Where a doorbell is: guest physical address, and the 16 bits that must be written there, if it matters.
type Place = (u64, Option<u16>);

impl Doorbells {
    /// None registered yet.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            registered: Mutex::default(),
        }
    }

    /// Makes the registered set equal to what `desired` answers.
    ///
    /// `desired` is called with the lock held, so that of two vCPUs that change the layout at once the later one
    /// registers what both have done.
    pub fn reconcile(&self, desired: impl FnOnce() -> Vec<Doorbell>) -> Result<(), KvmError> {
        let mut registered = self
            .registered
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let Registered {
            events: registered,
            said,
        } = &mut *registered;
        let desired: BTreeMap<Place, Arc<EventFd>> = desired()
            .into_iter()
            .map(|d| ((d.address, d.datamatch), d.event))
            .collect();
        let stale: Vec<Place> = registered
            .iter()
            .filter(|(place, event)| {
                desired
                    .get(*place)
                    .is_none_or(|now| !Arc::ptr_eq(now, event))
            })
            .map(|(place, _)| *place)
            .collect();
        for place in stale {
            if let Some(event) = registered.remove(&place) {
                self.unregister(place, &event)?;
            }
        }
        let wanted = desired.len();
        for (place, event) in desired {
            let Entry::Vacant(slot) = registered.entry(place) else {
                continue;
            };
            match self.register(place, &event) {
                Ok(()) => {
                    slot.insert(event);
                }
                Err(error) if error.errno() == libc::ENOSPC => {
                    if !std::mem::replace(said, true) {
                        tracing::warn!(
                            "KVM has room for {} of {wanted} doorbells; kicks of the other queues are slower",
                            registered.len()
                        );
                    }
                    break;
                }
                Err(error) => return Err(failed("register a doorbell")(error)),
            }
        }
        Ok(())
    }

    fn register(&self, place: Place, event: &EventFd) -> Result<(), kvm_ioctls::Error> {
        let (address, datamatch) = place;
        let address = IoEventAddress::Mmio(address);
        match datamatch {
            Some(value) => self.vm.register_ioevent(event, &address, value),
            None => self.vm.register_ioevent(event, &address, NoDatamatch),
        }
    }

    fn unregister(&self, place: Place, event: &EventFd) -> Result<(), KvmError> {
        let (address, datamatch) = place;
        let address = IoEventAddress::Mmio(address);
        match datamatch {
            Some(value) => self.vm.unregister_ioevent(event, &address, value),
            None => self.vm.unregister_ioevent(event, &address, NoDatamatch),
        }
        .map_err(failed("unregister a doorbell"))
    }
}
