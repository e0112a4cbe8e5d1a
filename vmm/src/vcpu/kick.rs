//! Taking a thread out of KVM_RUN.
//!
//! A signal alone has a window: it may arrive after the thread looked at the state and before it entered the guest, and
//! is then lost. The handler therefore sets `immediate_exit` of the vCPU its thread runs, and KVM looks at that after
//! it has disabled interrupts.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::time::Duration;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// The vCPU this thread runs. Without destructor and lazy initialisation, so that a handler may read it.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = RUN.get();
    if !run.is_null() {
        // SAFETY: RUN is not null only while a `Receiver` of this thread borrows the vCPU, so the mapping exists. The
        // handler runs on that thread; one byte is written, whole, as KVM's interface wants it.
        unsafe { std::ptr::write_volatile(&raw mut (*run).immediate_exit, 1) };
    }
}

/// Installs the handler, once per process. Needed before any kick.
pub fn install() -> io::Result<()> {
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    DONE.get_or_init(|| register_signal_handler(SIGRTMIN(), on_kick).map_err(|e| e.errno()))
        .map_err(io::Error::from_raw_os_error)
}

/// Makes kicks of the calling thread reach `vcpu` until the result is dropped.
pub fn receive(vcpu: &mut VcpuFd) -> Receiver {
    RUN.set(vcpu.get_kvm_run());
    Receiver {
        _same_thread: PhantomData,
    }
}

/// See [`receive`]. Must be dropped before the vCPU is.
#[derive(Debug)]
pub struct Receiver {
    _same_thread: PhantomData<*mut ()>,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        RUN.set(null_mut());
    }
}

/// A thread that can be kicked as long as it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread(libc::pthread_t);

impl Thread {
    /// The calling thread.
    pub fn current() -> Self {
        // SAFETY: no preconditions.
        Self(unsafe { libc::pthread_self() })
    }

    /// Kicks it. The caller knows that it has not gone: it holds the lock under which threads leave.
    pub(super) fn kick(self) {
        // SAFETY: the thread exists (see above) and the handler of the signal is installed.
        unsafe { libc::pthread_kill(self.0, SIGRTMIN()) };
    }
}

/// Kicks the calling thread once, after a while.
#[derive(Debug)]
pub struct Alarm {
    timer: libc::timer_t,
    _receiver: Receiver,
}

impl Alarm {
    /// Kicks this thread, and so `vcpu`, after `delay` and then every 10 ms until it is dropped.
    pub fn start(vcpu: &mut VcpuFd, delay: Duration) -> io::Result<Self> {
        install()?;
        let receiver = receive(vcpu);
        // SAFETY: all-zero is a valid sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = SIGRTMIN();
        // SAFETY: no preconditions.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer: libc::timer_t = null_mut();
        // SAFETY: both pointers are to live locals.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let alarm = Self {
            timer,
            _receiver: receiver,
        };
        let times = libc::itimerspec {
            it_value: libc::timespec {
                tv_sec: delay.as_secs() as libc::time_t,
                tv_nsec: libc::c_long::from(delay.subsec_nanos()),
            },
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 10_000_000,
            },
        };
        // SAFETY: the timer was just created; `times` is a live local.
        if unsafe { libc::timer_settime(alarm.timer, 0, &times, null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(alarm)
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer was created by `start` and is deleted once.
        unsafe { libc::timer_delete(self.timer) };
    }
}
