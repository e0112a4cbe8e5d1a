//! Slowing vCPUs down, for a migration that cannot keep up with what the guest writes.
//!
//! While a share is set, a thread lets all vCPUs run for a [`UNIT`] and then holds them for as long as
//! makes up the share. All of them at the same time: one that ran on would only spin for a lock that another one holds.
//! There is no such thread while the share is 0.
//!
//! A hold is no pause. Nobody may touch a vCPU that is held, time goes on for the guest, and a pause ends the wait of
//! every vCPU at once, so that it takes no longer than otherwise.
//!
//! A vCPU that is halted waits in the kernel, which the kick interrupts: it is still halted when it goes back there, and
//! what has come for it meanwhile wakes it then.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;

use super::control::{Control, RunState};

/// How long vCPUs run between two times of standing still. Shorter ones cost more in kicks; longer ones are felt by
/// whoever uses the guest.
const UNIT: Duration = Duration::from_millis(10);

/// The highest share, in percent.
pub const MAX_SHARE: u8 = 99;

/// Stack of the thread, which only waits.
const STACK: usize = 64 << 10;

/// The speed of a machine's vCPUs. They have their full speed again when it is dropped.
///
/// If there are several of one machine, vCPUs stand still as long as any of them wants it.
#[derive(Debug)]
#[must_use = "vCPUs have their full speed again when this is dropped"]
pub struct Throttled<V: 'static = VcpuFd> {
    control: Arc<Control<V>>,
    /// The percentage of time for which vCPUs stand still. Written with the control's lock held, so that the thread
    /// cannot miss it on its way to wait.
    share: Arc<AtomicU8>,
    thread: Option<JoinHandle<()>>,
}

impl<V: 'static> Throttled<V> {
    /// The vCPUs of `control`, at full speed.
    pub fn new(control: &Arc<Control<V>>) -> Self {
        Self {
            control: Arc::clone(control),
            share: Arc::default(),
            thread: None,
        }
    }

    /// The percentage of time for which vCPUs stand still.
    pub fn share(&self) -> u8 {
        self.share.load(Ordering::Relaxed)
    }

    /// Has each vCPU stand still for `share` percent of the time from now on; more than [`MAX_SHARE`] is taken for that.
    /// With 0 they have their full speed again when this returns.
    ///
    /// # Errors
    ///
    /// The host refuses a thread. vCPUs then have their full speed.
    pub fn set(&mut self, share: u8) -> io::Result<()> {
        let share = share.min(MAX_SHARE);
        {
            let _lock = self.control.lock();
            self.share.store(share, Ordering::Relaxed);
            self.control.changed.notify_all();
        }
        if share == 0 {
            if let Some(thread) = self.thread.take() {
                let _ = thread.join();
            }
        } else if self.thread.is_none() {
            let (control, current) = (Arc::clone(&self.control), Arc::clone(&self.share));
            let thread = std::thread::Builder::new()
                .name("throttle".to_owned())
                .stack_size(STACK)
                .spawn(move || tick(&control, &current));
            match thread {
                Ok(thread) => self.thread = Some(thread),
                Err(error) => {
                    self.share.store(0, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

impl<V: 'static> Drop for Throttled<V> {
    fn drop(&mut self) {
        // Nothing is started for it, so nothing can be refused.
        let _ = self.set(0);
    }
}

/// How long vCPUs stand still after a [`UNIT`] so that it is `share` percent of the time.
fn still(share: u8) -> Duration {
    let share = share.min(MAX_SHARE);
    UNIT * u32::from(share) / u32::from(100 - share)
}

/// The thread. Returns when the share is 0, or the guest has ended.
fn tick<V>(control: &Control<V>, share: &AtomicU8) {
    let mut inner = control.lock();
    let (mut held, mut since) = (false, Instant::now());
    loop {
        let share = share.load(Ordering::Relaxed);
        let state = inner.state;
        if share == 0 || state != RunState::Running {
            if std::mem::take(&mut held) {
                control.release(&mut inner);
            }
            if share == 0 || state == RunState::Ended {
                return;
            }
            inner = control.wait(inner);
            since = Instant::now();
            continue;
        }
        // Of the share that is set now, also if it was another one when this began.
        let length = if held { still(share) } else { UNIT };
        let left = length.saturating_sub(since.elapsed());
        if !left.is_zero() {
            inner = control.wait_at_most(inner, left);
            continue;
        }
        held = !held;
        if held {
            control.hold(&mut inner);
        } else {
            control.release(&mut inner);
        }
        since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use devices::bus::Bus;
    use devices::memory::{GuestRam, RamRange, View};
    use kvm_bindings::KVM_MP_STATE_HALTED;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::control::tests::{LONG, end, vcpus};
    use super::super::{Thread, Wiring, kick};
    use super::*;
    use crate::exit::Outcome;
    use crate::kvm::Vm;

    /// How long is measured.
    const WHILE: Duration = Duration::from_millis(500);
    /// What a pause may take on a busy host; a vCPU that is held at 99 % would take up to 0.99 s.
    const PROMPT: Duration = Duration::from_millis(500);

    #[test]
    fn the_time_of_standing_still_makes_up_the_share() {
        let millis = [0, 50, 75, 90, 99, 100].map(|share| still(share).as_millis());
        assert_eq!(millis, [0, 10, 30, 90, 990, 990]);
    }

    /// For how long each of three threads stood still while the machine ran for [`WHILE`], as a share of that.
    ///
    /// Not how much they got done: on a busy host, one that rests gets more done in the time that is left.
    fn standing_still(share: u8) -> Vec<f64> {
        let control = Arc::new(Control::<Duration>::of(3).unwrap());
        kick::install().unwrap();
        let vcpu = |id| {
            let control = Arc::clone(&control);
            std::thread::spawn(move || {
                let _membership = control.enter();
                let mut standing = Duration::ZERO;
                loop {
                    let begun = Instant::now();
                    control.stand_still();
                    standing += begun.elapsed();
                    match control.state() {
                        RunState::Running => std::thread::sleep(Duration::from_millis(1)),
                        RunState::Paused => control.park_while_paused(id, &mut standing),
                        RunState::Ended => return,
                    }
                }
            })
        };
        let threads: Vec<_> = (0..3).map(vcpu).collect();
        let mut throttled = Throttled::new(&control);
        throttled.set(share).unwrap();
        throttled.set(share).unwrap();
        assert_eq!(throttled.share(), share);
        let begun = Instant::now();
        control.resume().unwrap();
        std::thread::sleep(WHILE);
        control.pause(LONG).unwrap();
        let total = begun.elapsed();
        let standing = control.on_all(|_, standing| *standing).unwrap();
        control.finish(Outcome::PowerOff);
        threads.into_iter().for_each(|t| t.join().unwrap());
        let part = |standing: &Duration| standing.as_secs_f64() / total.as_secs_f64();
        standing.iter().map(part).collect()
    }

    #[test]
    fn all_vcpus_stand_still_for_about_their_share() {
        let bounds = [(0, 0.0..0.3), (50, 0.1..0.9), (90, 0.4..0.995)];
        for (share, bounds) in bounds {
            // A busy host lets threads wait for a good part of the time that is measured, now and then.
            let about = |parts: Vec<f64>| parts.iter().all(|part| bounds.contains(part));
            let met = (0..8).any(|_| about(standing_still(share)));
            assert!(met, "{share} %");
        }
    }

    #[test]
    fn the_most_that_is_asked_for_counts_and_the_end_of_it_is_the_end() {
        let control = Arc::new(Control::<u32>::of(1).unwrap());
        let threads = vcpus(&control, 1);
        let (mut a, mut b) = (Throttled::new(&control), Throttled::new(&control));
        a.set(100).unwrap();
        b.set(50).unwrap();
        assert_eq!(a.share(), MAX_SHARE);
        control.resume().unwrap();
        std::thread::sleep(10 * UNIT);
        assert!(control.lock().holds > 0);
        drop(a);
        b.set(0).unwrap();
        assert_eq!(control.lock().holds, 0);
        b.set(50).unwrap();
        drop(b);
        assert_eq!(control.lock().holds, 0);
        end(&control, threads);
    }

    #[test]
    fn a_pause_is_as_prompt_as_at_full_speed() {
        let control = Arc::new(Control::<u32>::of(2).unwrap());
        let threads = vcpus(&control, 2);
        let mut throttled = Throttled::new(&control);
        throttled.set(99).unwrap();
        for _ in 0..20 {
            control.resume().unwrap();
            // Long enough for them to be held.
            std::thread::sleep(2 * UNIT);
            let begun = Instant::now();
            control.pause(LONG).unwrap();
            assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());
        }
        // The time of a pause is nobody's turn to run or to stand still.
        std::thread::sleep(2 * UNIT);
        assert_eq!(control.lock().holds, 0);
        control.resume().unwrap();
        std::thread::sleep(5 * UNIT);
        let begun = Instant::now();
        drop(throttled);
        assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());
        end(&control, threads);
    }

    #[test]
    fn the_end_of_the_guest_is_the_end_of_the_thread() {
        let control = Arc::new(Control::<u32>::of(1).unwrap());
        let threads = vcpus(&control, 1);
        let mut throttled = Throttled::new(&control);
        throttled.set(99).unwrap();
        control.resume().unwrap();
        std::thread::sleep(2 * UNIT);
        let begun = Instant::now();
        end(&control, threads);
        let thread = throttled.thread.take().unwrap();
        thread.join().unwrap();
        assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());
        throttled.set(50).unwrap();
        assert_eq!(control.lock().holds, 0);
    }

    /// A guest with one vCPU, whose thread is that of a machine.
    struct Real {
        control: Arc<Control>,
        thread: Option<JoinHandle<()>>,
        view: View,
        /// Dropped last.
        _vm: Vm,
    }

    impl Real {
        const CODE: u64 = 0x1000;
        const COUNTER: u64 = 0x2000;

        /// It runs `program` in real mode. None where there is no KVM.
        fn new(program: &[u8]) -> Option<Self> {
            let kvm = crate::kvm::open().ok()?;
            kick::install().unwrap();
            let range = RamRange {
                start: GuestAddress(0),
                len: 0x4000,
            };
            let ram = GuestRam::new(&[range]).unwrap();
            let view = ram.view().unwrap();
            view.write_slice(program, GuestAddress(Self::CODE)).unwrap();
            // The handler of NMIs: iret.
            view.write_obj(0x3000u32, GuestAddress(8)).unwrap();
            view.write_obj(0xcfu8, GuestAddress(0x3000)).unwrap();
            let vm = Vm::new(kvm, &ram).unwrap();
            let fd = vm.create_vcpu(0).unwrap();
            let mut sregs = fd.get_sregs().unwrap();
            (sregs.cs.base, sregs.cs.selector) = (0, 0);
            fd.set_sregs(&sregs).unwrap();
            let mut regs = fd.get_regs().unwrap();
            (regs.rip, regs.rsp, regs.rflags) = (Self::CODE, 0x4000, 2);
            fd.set_regs(&regs).unwrap();
            let control = Arc::new(Control::new(1).unwrap());
            let wiring = Wiring {
                ports: Arc::new(Bus::new()),
                mmio: Arc::new(Bus::new()),
                control: Arc::clone(&control),
                tells_pause: false,
                layout_changed: Arc::new(|| ()),
            };
            let thread = Some(Thread::spawn(0, wiring).unwrap().give(fd));
            Some(Self {
                control,
                thread,
                view,
                _vm: vm,
            })
        }

        fn counter(&self) -> u32 {
            self.view.read_obj(GuestAddress(Self::COUNTER)).unwrap()
        }

        /// For which part of a time its thread was executed, and whether the guest did anything.
        fn activity(&self) -> (f64, bool) {
            let time = || self.control.on_vcpu(0, |_| cpu_time()).unwrap();
            let (before, counted) = (time(), self.counter());
            let begun = Instant::now();
            self.control.resume().unwrap();
            std::thread::sleep(WHILE);
            self.control.pause(LONG).unwrap();
            let total = begun.elapsed();
            let active = (time() - before).as_secs_f64() / total.as_secs_f64();
            (active, self.counter() != counted)
        }
    }

    /// Of the calling thread.
    #[allow(unsafe_code)]
    fn cpu_time() -> Duration {
        // SAFETY: all-zero is a valid timespec.
        let mut time: libc::timespec = unsafe { std::mem::zeroed() };
        // SAFETY: `time` is a live local.
        let outcome = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
        assert_eq!(outcome, 0);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }

    impl Drop for Real {
        fn drop(&mut self) {
            self.control.finish(Outcome::PowerOff);
            if let Some(thread) = self.thread.take() {
                thread.join().unwrap();
            }
        }
    }

    #[test]
    fn a_guest_that_computes_is_slowed_down_and_paused_promptly() {
        // inc dword [COUNTER]; jmp back
        let Some(guest) = Real::new(&[0x66, 0xff, 0x06, 0x00, 0x20, 0xeb, 0xf9]) else {
            return;
        };
        let mut throttled = Throttled::new(&guest.control);
        throttled.set(90).unwrap();
        let slow = |(active, counts)| active < 0.5 && counts;
        assert!((0..8).any(|_| slow(guest.activity())));
        throttled.set(99).unwrap();
        for _ in 0..10 {
            guest.control.resume().unwrap();
            std::thread::sleep(2 * UNIT);
            let begun = Instant::now();
            guest.control.pause(LONG).unwrap();
            assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());
        }
        throttled.set(0).unwrap();
        let (_, counts) = guest.activity();
        assert!(counts);
    }

    #[test]
    fn a_halted_vcpu_stays_halted_and_is_woken_by_everything_that_comes() {
        // hlt; inc dword [COUNTER]; jmp back
        let Some(guest) = Real::new(&[0xf4, 0x66, 0xff, 0x06, 0x00, 0x20, 0xeb, 0xf8]) else {
            return;
        };
        let mut throttled = Throttled::new(&guest.control);
        throttled.set(50).unwrap();
        for wakes in 0..5 {
            guest.control.resume().unwrap();
            // Several times in and out.
            std::thread::sleep(6 * UNIT);
            guest.control.pause(LONG).unwrap();
            assert_eq!(guest.counter(), wakes);
            let state = |fd: &mut VcpuFd| fd.get_mp_state().unwrap().mp_state;
            let state = guest.control.on_vcpu(0, state).unwrap();
            assert_eq!(state, KVM_MP_STATE_HALTED);
            let nmi = guest.control.on_vcpu(0, |fd| fd.nmi());
            nmi.unwrap().unwrap();
        }
    }
}
