//! KVM's memory slots of a VM, and the log of what its vCPUs write to them.
//!
//! There is a slot for each RAM range, with its number. While the log is on, KVM notes which pages vCPUs (and KVM itself)
//! write; what this process writes it does not see: `devices::memory::DirtyPages` does. The log costs the guest a fault
//! for each page it writes after the page was cleared, and large pages are split; switched off it costs nothing, and KVM
//! puts large pages together again.
//!
//! # How a write is never lost
//!
//! [`Slots::get`] reads the log of a slot, [`Slots::clear`] makes KVM watch the pages again that were read, and only then
//! they are copied. A write before the clearing is in the copy; one after it is in the log. Where KVM cannot be told
//! which pages to clear (before Linux 5.1), reading clears.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use devices::memory::{GuestRam, PAGE_SIZE, RamRange};
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_MEM_LOG_DIRTY_PAGES,
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;

use super::{KvmError, failed};

/// Bit of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: reading the log does not clear it. (Bindings lack the name.)
const MANUAL_PROTECT: u32 = 1;

/// Words of the log that are cleared at once: KVM holds up the vCPUs' faults meanwhile.
const CLEAR_WORDS: usize = 1024;

/// kvm-ioctls lacks it.
#[allow(missing_docs)]
mod ioctl {
    use kvm_bindings::{KVMIO, kvm_clear_dirty_log};

    vmm_sys_util::ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}

/// The slots of one VM. See the [module documentation](self).
#[derive(Debug)]
pub struct Slots {
    fd: Arc<VmFd>,
    /// The memory KVM maps; it must outlive the VM.
    ram: Arc<GuestRam>,
    /// Bits of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` that are on.
    manual: u32,
    logging: Mutex<bool>,
}

impl Slots {
    /// Gives `ram` to the VM, and lets the log be cleared page by page where KVM can do it.
    pub fn register(fd: &Arc<VmFd>, ram: &Arc<GuestRam>) -> Result<Self, KvmError> {
        Self::with(fd, ram, manual_protect(fd))
    }

    /// With the bits of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` that are on.
    fn with(fd: &Arc<VmFd>, ram: &Arc<GuestRam>, manual: u32) -> Result<Self, KvmError> {
        let slots = Self {
            fd: Arc::clone(fd),
            ram: Arc::clone(ram),
            manual,
            logging: Mutex::new(false),
        };
        slots.set_all(0, "map guest memory")?;
        Ok(slots)
    }

    /// Number of slots.
    pub fn count(&self) -> usize {
        self.ram.ranges().len()
    }

    /// The memory they map.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Whether the log is on.
    pub fn is_logging(&self) -> bool {
        *self.logging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if a log that was just switched on names every page, instead of none. Then KVM watches a page only once it
    /// was cleared, which spares the guest from finding all of its pages protected at once.
    pub fn is_initially_set(&self) -> bool {
        self.manual & KVM_DIRTY_LOG_INITIALLY_SET != 0
    }

    /// Switches the log on. What it names at first is either nothing or everything: see
    /// [`is_initially_set`](Self::is_initially_set).
    pub fn start_log(&self) -> Result<(), KvmError> {
        self.set_log(true)
    }

    /// Switches the log off and drops it. The guest has its full speed again.
    pub fn stop_log(&self) -> Result<(), KvmError> {
        self.set_log(false)
    }

    fn set_log(&self, on: bool) -> Result<(), KvmError> {
        let mut logging = self.logging.lock().unwrap_or_else(PoisonError::into_inner);
        if *logging == on {
            return Ok(());
        }
        let outcome = if on {
            self.set_all(KVM_MEM_LOG_DIRTY_PAGES, "log what the guest writes")
        } else {
            self.set_all(0, "end the log of what the guest writes")
        };
        match &outcome {
            Ok(()) => *logging = on,
            // Not half of it.
            Err(_) if on => _ = self.set_all(0, ""),
            // A start sets all of them anew.
            Err(_) => *logging = false,
        }
        outcome
    }

    #[allow(unsafe_code)]
    fn set_all(&self, flags: u32, what: &'static str) -> Result<(), KvmError> {
        for (slot, (range, host)) in (0u32..).zip(self.ram.host_addresses()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: range.start.0,
                memory_size: range.len as u64,
                userspace_addr: host as u64,
            };
            // SAFETY: the region is a live mapping of `range.len` bytes, and `self` keeps its owner alive as long as
            // the VM.
            unsafe { self.fd.set_user_memory_region(region) }.map_err(failed(what))?;
        }
        Ok(())
    }

    /// The pages of slot number `slot` that were written: page n is bit n mod 64 of word n / 64.
    ///
    /// They stay in the log until they are [cleared](Self::clear), where KVM can do that; otherwise they do not. So either
    /// keep them or do something about them.
    pub fn get(&self, slot: usize) -> Result<Vec<u64>, KvmError> {
        let range = self.range(slot)?;
        // There are only a few slots.
        self.fd
            .get_dirty_log(slot as u32, range.len)
            .map_err(failed("read the log of what the guest writes"))
    }

    /// Removes `pages`, which [`get`](Self::get) gave for slot number `slot`, from the log; a page that is written
    /// afterwards is in it again. Before, none of them may be copied.
    pub fn clear(&self, slot: usize, pages: &[u64]) -> Result<(), KvmError> {
        let range = self.range(slot)?;
        if self.manual == 0 {
            return Ok(());
        }
        let total = range.len / PAGE_SIZE;
        let words = pages.get(..total.div_ceil(64)).unwrap_or(pages);
        for (index, chunk) in words.chunks(CLEAR_WORDS).enumerate() {
            if chunk.iter().all(|word| *word == 0) {
                continue;
            }
            let first = index * CLEAR_WORDS * 64;
            self.clear_chunk(slot, first, (chunk.len() * 64).min(total - first), chunk)?;
        }
        Ok(())
    }

    /// `words` has a bit for each of the `count` pages.
    #[allow(unsafe_code)]
    fn clear_chunk(
        &self,
        slot: usize,
        first: usize,
        count: usize,
        words: &[u64],
    ) -> Result<(), KvmError> {
        debug_assert_eq!(words.len(), count.div_ceil(64));
        let request = kvm_clear_dirty_log {
            slot: slot as u32,
            num_pages: count as u32,
            first_page: first as u64,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: words.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: the descriptor is that of a VM; KVM reads `request`, and as many bits of `words` as it has pages.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), ioctl::KVM_CLEAR_DIRTY_LOG(), &request) } {
            0 => Ok(()),
            _ => Err(KvmError::Operation {
                what: "clear the log of what the guest writes",
                source: std::io::Error::last_os_error(),
            }),
        }
    }

    fn range(&self, slot: usize) -> Result<RamRange, KvmError> {
        let range = self.ram.ranges().get(slot).copied();
        range.ok_or_else(|| KvmError::Operation {
            what: "find a memory slot",
            source: std::io::ErrorKind::NotFound.into(),
        })
    }
}

/// Lets the log be cleared page by page, if KVM can do it; the bits that are on.
fn manual_protect(fd: &VmFd) -> u32 {
    let offered = fd.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
    let flags =
        u32::try_from(offered).unwrap_or(0) & (MANUAL_PROTECT | KVM_DIRTY_LOG_INITIALLY_SET);
    if flags & MANUAL_PROTECT == 0 {
        return 0;
    }
    let cap = kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        args: [flags.into(), 0, 0, 0],
        ..Default::default()
    };
    match fd.enable_cap(&cap) {
        Ok(()) => flags,
        Err(_) => 0,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use devices::memory::View;
    use kvm_ioctls::{VcpuExit, VcpuFd};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::kvm::Vm;

    const P: usize = PAGE_SIZE;
    /// Where the guest's program is.
    const CODE: u64 = 0x1000;

    /// A guest that writes where it is told to.
    pub(crate) struct Scribbler {
        pub vm: Vm,
        pub ram: Arc<GuestRam>,
        vcpu: VcpuFd,
        view: View,
    }

    impl Scribbler {
        /// With two ranges of RAM: 70 pages from 0 on and 128 pages from 0x80000 on. None where there is no KVM.
        ///
        /// Its log is cleared page by page if KVM can do that and `manual` says so.
        pub fn new(backing: devices::memory::Backing, manual: bool) -> Option<Self> {
            let kvm = crate::kvm::open().ok()?;
            let ranges = [(0, 70 * P), (0x8_0000, 128 * P)].map(|(start, len)| RamRange {
                start: GuestAddress(start),
                len,
            });
            let ram = GuestRam::with_backing(&ranges, backing).unwrap();
            let vm = if manual {
                Vm::new(kvm, &ram).unwrap()
            } else {
                let fd = Arc::new(kvm.create_vm().unwrap());
                let layout = (crate::layout::KVM_IDENTITY_MAP, crate::layout::KVM_TSS);
                fd.set_identity_map_address(layout.0).unwrap();
                fd.set_tss_address(layout.1 as usize).unwrap();
                fd.create_irq_chip().unwrap();
                let slots = Arc::new(Slots::with(&fd, &ram, 0).unwrap());
                Vm { kvm, fd, slots }
            };
            let vcpu = vm.create_vcpu(0).unwrap();
            let view = ram.view().unwrap();
            let mut sregs = vcpu.get_sregs().unwrap();
            (sregs.cs.base, sregs.cs.selector) = (0, 0);
            vcpu.set_sregs(&sregs).unwrap();
            Some(Self {
                vm,
                ram,
                vcpu,
                view,
            })
        }

        /// Lets the guest write 0x5a to each of `addresses`, below 1 MiB. The monitor writes the page of the program.
        pub fn write(&mut self, addresses: &[u32]) {
            let mut program = Vec::new();
            for address in addresses {
                let [a, b, ..] = (address >> 4 & 0xf000).to_le_bytes();
                let [c, d, ..] = (address & 0xffff).to_le_bytes();
                // mov ax, segment; mov ds, ax; mov byte [offset], 0x5a
                program.extend([0xb8, a, b, 0x8e, 0xd8, 0xc6, 0x06, c, d, 0x5a]);
            }
            program.extend([0xe6, 0x80]); // out 0x80, al
            assert!(program.len() < P);
            self.view.write_slice(&program, GuestAddress(CODE)).unwrap();
            let mut regs = self.vcpu.get_regs().unwrap();
            (regs.rip, regs.rflags) = (CODE, 2);
            self.vcpu.set_regs(&regs).unwrap();
            loop {
                match self.vcpu.run() {
                    Ok(VcpuExit::IoOut(0x80, _)) => break,
                    Ok(VcpuExit::Intr) => {}
                    Err(e) if e.errno() == libc::EINTR => {}
                    other => panic!("{other:?}"),
                }
            }
            // Completes the port write.
            self.vcpu.set_kvm_immediate_exit(1);
            let _ = self.vcpu.run();
            self.vcpu.set_kvm_immediate_exit(0);
        }

        /// What slot `slot` says was written; and forgets it.
        fn take(&self, slot: usize) -> Vec<usize> {
            let words = self.vm.slots().get(slot).unwrap();
            self.vm.slots().clear(slot, &words).unwrap();
            let bits = |n: &usize| words[n / 64] >> (n % 64) & 1 != 0;
            (0..words.len() * 64).filter(bits).collect()
        }

        /// What is initially set.
        fn forget(&self) {
            (0..self.vm.slots().count()).for_each(|slot| _ = self.take(slot));
        }
    }

    fn scribbler(manual: bool) -> Option<Scribbler> {
        Scribbler::new(devices::memory::Backing::Anonymous, manual)
    }

    #[test]
    fn the_log_has_what_the_guest_writes_and_nothing_else() {
        scribbler(true).into_iter().for_each(log_writes);
    }

    #[test]
    fn a_log_that_is_cleared_by_reading_has_the_same() {
        scribbler(false).into_iter().for_each(log_writes);
    }

    fn log_writes(mut guest: Scribbler) {
        let slots = Arc::clone(guest.vm.slots());
        guest.write(&[0x3000]);
        assert!(slots.get(0).is_err(), "the log is off");
        slots.start_log().unwrap();
        slots.start_log().unwrap();
        assert!(slots.is_logging());
        if slots.is_initially_set() {
            assert_eq!(guest.take(0), (0..70).collect::<Vec<_>>());
            assert_eq!(guest.take(1), (0..128).collect::<Vec<_>>());
        } else {
            guest.forget();
        }
        assert_eq!((guest.take(0), guest.take(1)), (vec![], vec![]));
        guest.write(&[0x4fff, 0x45_fff, 0x8_0000, 0xc_0000, 0xf_fffe]);
        assert_eq!(guest.take(0), [4, 69]);
        assert_eq!(guest.take(1), [0, 64, 127]);
        assert_eq!((guest.take(0), guest.take(1)), (vec![], vec![]));
        guest.write(&[0xc_0000]);
        assert_eq!((guest.take(0), guest.take(1)), (vec![], vec![64]));
        slots.stop_log().unwrap();
        assert!(!slots.is_logging() && slots.get(0).is_err());
        guest.write(&[0x5000]);
        slots.start_log().unwrap();
        guest.forget();
        guest.write(&[0x6000]);
        assert_eq!(guest.take(0), [6]);
    }

    #[test]
    fn pages_that_are_not_cleared_stay_in_the_log() {
        let Some(mut guest) = scribbler(true) else {
            return;
        };
        let slots = Arc::clone(guest.vm.slots());
        if slots.manual == 0 {
            return;
        }
        slots.start_log().unwrap();
        guest.forget();
        guest.write(&[0x2000, 0x3000]);
        assert_eq!(slots.get(0).unwrap(), [0b1100, 0]);
        slots.clear(0, &[0b0100, 0]).unwrap();
        assert_eq!(guest.take(0), [3]);
        // Bits beyond the end, and words that are missing, are of no matter.
        slots.clear(0, &[0, u64::MAX, u64::MAX]).unwrap();
        slots.clear(0, &[]).unwrap();
    }

    #[test]
    fn a_slot_that_does_not_exist_is_an_error() {
        let Some(guest) = scribbler(true) else {
            return;
        };
        assert!(guest.vm.slots().get(2).is_err());
        assert!(guest.vm.slots().clear(2, &[1]).is_err());
    }

    #[test]
    fn large_slots_are_cleared_piece_by_piece() {
        let Ok(kvm) = crate::kvm::open() else {
            return;
        };
        let pages = 3 * CLEAR_WORDS * 64 + 5;
        let range = RamRange {
            start: GuestAddress(0),
            len: pages * P,
        };
        let ram = GuestRam::new(&[range]).unwrap();
        let vm = Vm::new(kvm, &ram).unwrap();
        vm.slots().start_log().unwrap();
        let all = vm.slots().get(0).unwrap();
        vm.slots().clear(0, &all).unwrap();
        let set: u32 = all.iter().map(|word| word.count_ones()).sum();
        assert!(set == 0 || set as usize == pages, "{set}");
        assert!(vm.slots().get(0).unwrap().iter().all(|word| *word == 0));
    }
}
