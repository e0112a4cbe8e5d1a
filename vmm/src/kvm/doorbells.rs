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

/// Who takes ioeventfds: KVM, for one VM.
pub trait Ioeventfds {
    /// Makes writes at `place` signal `event`.
    fn register(&self, place: Place, event: &EventFd) -> Result<(), kvm_ioctls::Error>;

    /// Undoes [`Self::register`].
    fn unregister(&self, place: Place, event: &EventFd) -> Result<(), kvm_ioctls::Error>;
}

impl Ioeventfds for VmFd {
    fn register(&self, (address, value): Place, event: &EventFd) -> Result<(), kvm_ioctls::Error> {
        let address = IoEventAddress::Mmio(address);
        match value {
            Some(value) => self.register_ioevent(event, &address, value),
            None => self.register_ioevent(event, &address, NoDatamatch),
        }
    }

    fn unregister(
        &self,
        (address, value): Place,
        event: &EventFd,
    ) -> Result<(), kvm_ioctls::Error> {
        let address = IoEventAddress::Mmio(address);
        match value {
            Some(value) => self.unregister_ioevent(event, &address, value),
            None => self.unregister_ioevent(event, &address, NoDatamatch),
        }
    }
}

/// The ioeventfds of one VM.
pub struct Doorbells<K = VmFd> {
    vm: Arc<K>,
    registered: Mutex<Registered>,
}

#[derive(Default)]
struct Registered {
    events: BTreeMap<Place, Arc<EventFd>>,
    /// It was said that KVM has no room for more.
    said: bool,
}

/// Where a doorbell is: guest physical address, and the 16 bits that must be written there, if it matters.
pub type Place = (u64, Option<u16>);

impl<K: Ioeventfds> Doorbells<K> {
    /// None registered yet.
    pub fn new(vm: Arc<K>) -> Self {
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
                let gone = self.vm.unregister(place, &event);
                gone.map_err(failed("unregister a doorbell"))?;
            }
        }
        let wanted = desired.len();
        for (place, event) in desired {
            let Entry::Vacant(slot) = registered.entry(place) else {
                continue;
            };
            match self.vm.register(place, &event) {
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Has room for so many.
    struct Room(usize, Mutex<BTreeSet<Place>>);

    impl Ioeventfds for Room {
        fn register(&self, place: Place, _event: &EventFd) -> Result<(), kvm_ioctls::Error> {
            let mut taken = self.1.lock().unwrap();
            if taken.len() == self.0 {
                return Err(kvm_ioctls::Error::new(libc::ENOSPC));
            }
            assert!(taken.insert(place), "{place:?} twice");
            Ok(())
        }

        fn unregister(&self, place: Place, _event: &EventFd) -> Result<(), kvm_ioctls::Error> {
            assert!(self.1.lock().unwrap().remove(&place), "{place:?} unknown");
            Ok(())
        }
    }

    fn rig(room: usize) -> (Arc<Room>, Doorbells<Room>, Vec<Doorbell>) {
        let vm = Arc::new(Room(room, Mutex::default()));
        let doorbell = |n: u64| Doorbell {
            address: 0x1000 + 4 * n,
            datamatch: None,
            event: Arc::new(EventFd::new(0).unwrap()),
        };
        let doorbells = (0..6).map(doorbell).collect();
        (Arc::clone(&vm), Doorbells::new(vm), doorbells)
    }

    fn addresses(vm: &Room) -> Vec<u64> {
        vm.1.lock().unwrap().iter().map(|place| place.0).collect()
    }

    #[test]
    fn what_is_registered_follows_what_should_be() {
        let (vm, doorbells, all) = rig(10);
        for range in [0..0, 0..4, 2..6, 0..6, 3..3] {
            let wanted = all[range].to_vec();
            doorbells.reconcile(|| wanted.clone()).unwrap();
            let expected: Vec<_> = wanted.iter().map(|d| d.address).collect();
            assert_eq!(addresses(&vm), expected);
        }
    }

    #[test]
    fn without_room_the_lowest_are_registered_and_the_others_when_there_is_some() {
        let (vm, doorbells, all) = rig(3);
        doorbells.reconcile(|| all.clone()).unwrap();
        assert_eq!(addresses(&vm), [0x1000, 0x1004, 0x1008]);
        doorbells.reconcile(|| all[1..].to_vec()).unwrap();
        assert_eq!(addresses(&vm), [0x1004, 0x1008, 0x100c]);
        doorbells.reconcile(Vec::new).unwrap();
        assert!(addresses(&vm).is_empty());
    }
}
