//! One thread for each vCPU, and how the rest of the machine stops and starts them.
//!
//! ```text
//!            start                 pause: state set, every vCPU kicked
//!   created ───────► running ───────────────────────────────► paused
//!                       │  ▲                                     │
//!                       │  └──────────────── resume ─────────────┘
//!                       └──── finish: the first outcome counts ───► ended (never left)
//! ```
//!
//! A vCPU looks at the state before every entry into the guest. [`kick`] makes it leave the guest for that, without a
//! window in which a kick could be lost. So does [`throttle`], which has the vCPUs of a running machine stand still again
//! and again.
//!
//! A vCPU's descriptor belongs to its thread. Whoever wants something of a paused vCPU leaves a job for that thread
//! ([`Control::on_vcpu`]), which runs it where it waits for the end of the pause.

pub mod control;
pub mod kick;
pub mod throttle;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use devices::bus::{Bus, Effect};
use kvm_ioctls::{VcpuExit, VcpuFd};

pub use control::{Control, ControlError, RunState};
pub use throttle::Throttled;

use crate::exit::Outcome;
use crate::kvm::{cpu, state};

/// Stack of a vCPU thread: exits are shallow.
const STACK: usize = 256 << 10;

/// What a vCPU needs besides KVM.
#[derive(Clone)]
pub struct Wiring {
    /// Port I/O.
    pub ports: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// State of the machine.
    pub control: Arc<Control>,
    /// KVM can tell the guest that it was paused.
    pub tells_pause: bool,
    /// Called after a write that changed the layout, on the thread of the vCPU that wrote.
    pub layout_changed: Arc<dyn Fn() + Send + Sync>,
}

/// The thread of a vCPU, which waits for its vCPU. It ends if this is dropped.
#[derive(Debug)]
pub struct Thread {
    give: Sender<VcpuFd>,
    thread: JoinHandle<()>,
}

impl Thread {
    /// The thread of vCPU `id`.
    pub fn spawn(id: u8, wiring: Wiring) -> io::Result<Self> {
        let (give, given) = channel();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{id}"))
            .stack_size(STACK)
            .spawn(move || {
                if let Ok(fd) = given.recv() {
                    Vcpu { id, fd, wiring }.run();
                }
            })?;
        Ok(Self { give, thread })
    }

    /// Gives it the vCPU. It enters the guest as soon as the machine's state is running.
    pub fn give(self, fd: VcpuFd) -> JoinHandle<()> {
        // It waits for that.
        let _ = self.give.send(fd);
        self.thread
    }
}

struct Vcpu {
    id: u8,
    fd: VcpuFd,
    wiring: Wiring,
}

/// What an exit was about, once nothing of it is borrowed from the vCPU any more.
enum Exit {
    Port(Direction),
    Handled(Effect),
    End(Outcome),
    TripleFault,
    Failure(String),
    Interrupted,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    In,
    Out,
}

impl Vcpu {
    fn run(&mut self) {
        let control = Arc::clone(&self.wiring.control);
        let _kicks = kick::receive(&mut self.fd);
        let _membership = control.enter();
        loop {
            // Cleared before anything is read: a kick after the read sets it again.
            self.fd.set_kvm_immediate_exit(0);
            control.stand_still();
            match control.state() {
                RunState::Running => {}
                // One more entry, which returns at once, completes the port or memory access of the last exit.
                RunState::Paused => self.fd.set_kvm_immediate_exit(1),
                RunState::Ended => return,
            }
            match self.enter_guest() {
                Exit::Handled(effect) => self.apply(effect),
                Exit::Port(direction) => {
                    let effect = self.port_access(direction);
                    self.apply(effect);
                }
                Exit::Interrupted => {
                    if control.state() == RunState::Paused && self.wiring.tells_pause {
                        state::tell_pause(&self.fd, self.id.into());
                    }
                    control.park_while_paused(usize::from(self.id), &mut self.fd);
                }
                Exit::End(outcome) => control.finish(outcome),
                Exit::TripleFault => {
                    let registers = cpu::describe_crash(&mut self.fd);
                    tracing::error!("vCPU {} triple-faulted{registers}", self.id);
                    control.finish(Outcome::Reset { triple_fault: true });
                }
                Exit::Failure(what) => {
                    let registers = cpu::describe(&mut self.fd);
                    let id = self.id;
                    control.finish(Outcome::KvmFailure(format!(
                        "KVM could not go on running vCPU {id}: {what}{registers}"
                    )));
                }
            }
        }
    }

    fn enter_guest(&mut self) -> Exit {
        let mmio = &self.wiring.mmio;
        match self.fd.run() {
            Ok(VcpuExit::IoIn(..)) => Exit::Port(Direction::In),
            Ok(VcpuExit::IoOut(..)) => Exit::Port(Direction::Out),
            Ok(VcpuExit::MmioRead(address, data)) => {
                mmio.read(address, data);
                Exit::Handled(Effect::None)
            }
            Ok(VcpuExit::MmioWrite(address, data)) => Exit::Handled(mmio.write(address, data)),
            Ok(VcpuExit::Hlt) => Exit::Handled(Effect::None),
            Ok(VcpuExit::Intr) => Exit::Interrupted,
            Ok(VcpuExit::Shutdown) => Exit::TripleFault,
            Ok(VcpuExit::SystemEvent(kind, _)) => match kind {
                kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => Exit::End(Outcome::PowerOff),
                kvm_bindings::KVM_SYSTEM_EVENT_RESET => Exit::End(Outcome::Reset {
                    triple_fault: false,
                }),
                kvm_bindings::KVM_SYSTEM_EVENT_CRASH => Exit::End(Outcome::Panic),
                other => Exit::Failure(format!("system event {other} is unknown")),
            },
            Ok(VcpuExit::FailEntry(reason, cpu)) => Exit::Failure(format!(
                "the processor refused to enter the guest, reason {reason:#x} on CPU {cpu}"
            )),
            Ok(VcpuExit::InternalError) => {
                let code = cpu::internal_error(&mut self.fd);
                let meaning = match code {
                    1 => "an instruction could not be emulated",
                    2 => "events could not be delivered",
                    3 => "an event was delivered in a forbidden way",
                    4 => "an exit has an unknown reason",
                    _ => "of an unknown kind",
                };
                Exit::Failure(format!("internal error {code}: {meaning}"))
            }
            Ok(other) => Exit::Failure(format!("exit {other:?} is not expected")),
            Err(e) => match e.errno() {
                // A waiting secondary processor was woken: EAGAIN.
                libc::EINTR | libc::EAGAIN => Exit::Interrupted,
                _ => Exit::Failure(io::Error::from(e).to_string()),
            },
        }
    }

    /// Performs the port access of the last exit: `count` times `size` bytes, all at one port.
    #[allow(unsafe_code)]
    fn port_access(&mut self, direction: Direction) -> Effect {
        let run = self.fd.get_kvm_run();
        // SAFETY: the last exit was KVM_EXIT_IO, for which KVM fills this member.
        let io = unsafe { run.__bindgen_anon_1.io };
        let size = usize::from(io.size).clamp(1, 4);
        let total = size * io.count as usize;
        // SAFETY: for KVM_EXIT_IO, KVM guarantees `total` bytes of data at `data_offset` inside the mapping of
        // `kvm_run`, which lives as long as the descriptor that `self` owns and borrows mutably here.
        let data = unsafe {
            let start = std::ptr::from_mut(run)
                .cast::<u8>()
                .add(io.data_offset as usize);
            std::slice::from_raw_parts_mut(start, total)
        };
        let port = u64::from(io.port);
        let mut effect = Effect::None;
        for access in data.chunks_exact_mut(size) {
            match direction {
                Direction::In => self.wiring.ports.read(port, access),
                Direction::Out => effect = effect.and(self.wiring.ports.write(port, access)),
            }
        }
        effect
    }

    fn apply(&self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::LayoutChanged => (self.wiring.layout_changed)(),
        }
    }
}
