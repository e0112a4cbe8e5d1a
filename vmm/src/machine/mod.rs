//! One machine: everything wired together.
//!
//! | module | what it does |
//! |---|---|
//! | [`functions`] | the virtio functions a specification asks for |
//! | [`hardware`] | a machine before anything of a guest is in it |
//! | [`large`] | large pages for memory in a memfd |
//! | [`lease`] | who may change what a machine does: one at a time |
//! | [`owner`] | SR-IOV owners and their members |
//! | [`pages`] | which pages of guest memory were written, by vCPUs or by devices |
//! | [`provider`] | where devices get their files and taps: by name, or from another process |
//! | [`run`] | the main loop: console, signals, the end of the guest |
//!
//! ```text
//! MachineSpec ── Hardware::create ─► Hardware ── boot ─► Hardware ── finish ─► Machine ── start ─► the guest runs
//! ```
//!
//! Pause: vCPUs out of the guest, then the gates of the devices closed and drained. Resume: the reverse.

pub mod functions;
pub mod hardware;
pub mod large;
pub mod lease;
pub mod manager;
pub mod owner;
pub mod pages;
pub mod provider;
pub mod run;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::gate::Reasons;
use devices::memory::GuestRam;
use devices::msi::MsiController;
use kvm_ioctls::VcpuFd;
use pci::root::PciRoot;
use vmm_sys_util::eventfd::EventFd;

use crate::chipset::VmGeneration;
use crate::config::MachineSpec;
use crate::exit::Outcome;
use crate::kvm::Vm;
use crate::kvm::model::CpuModel;
use crate::kvm::msi::KvmMsi;
use crate::migrate::monitor::Monitor;
use crate::serial::{SerialPort, SerialState, SerialStateError};
use crate::snapshot::report::{Meter, Progress};
use crate::vcpu::{self, Control, ControlError, RunState, Throttled, Wiring};
use functions::Functions;
pub use hardware::{BuildError, Hardware, Host};
use lease::{Busy, Lease, Leases, Purpose};
use pages::PageSource;

/// How long a pause waits for what devices have in flight, all of them together.
pub const DRAIN: Duration = Duration::from_secs(10);

/// How long a pause waits for vCPUs to leave the guest.
const LEAVE: Duration = Duration::from_secs(5);

/// What a machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is complete and was not started yet.
    Created,
    /// The guest runs.
    Running,
    /// Nothing of the guest happens.
    Paused,
    /// A snapshot of it is being taken. The guest runs for most of the time.
    Saving,
    /// It is being moved to another process. The guest runs for most of the time.
    Migrating,
    /// The guest was given to another process, and nobody could say whether it runs there. Here it stands still.
    InDoubt,
    /// The guest comes from another process.
    Receiving,
    /// The guest has ended.
    Ended,
}

/// Why a machine could not be paused, resumed or saved.
#[derive(Debug, thiserror::Error)]
pub enum TransitionError {
    /// Somebody else is changing what it does.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// The guest has ended, or a vCPU does not leave it.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The host refuses threads for the vCPUs.
    #[error("the host refuses a thread for a vCPU: {0}")]
    Threads(#[from] std::io::Error),
    /// Another process has disks of the machine.
    #[error("another process has {0} now; the guest stays as it is until that is free again")]
    Locked(String),
    /// Devices did not finish what they had begun.
    #[error("requests are still in flight in {0}; the guest goes on running")]
    InFlight(String),
}

/// How a guest came into a machine in which it did not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// From a snapshot: another VM may have gone on from the same state.
    Restored,
    /// From another process, which does not run it any more.
    Moved,
    /// The same, after it was restored there and never ran: it was not told of its new VM generation ID.
    MovedUntold,
}

/// How the start of the guest stands.
#[derive(Debug, Default)]
struct Start {
    /// It was.
    done: bool,
    /// A pause came first: the guest does not run until it is resumed.
    paused: bool,
}

/// A machine. See the [module documentation](self).
pub struct Machine {
    model: CpuModel,
    /// Model-specific registers that are state of its vCPUs.
    msrs: Vec<u32>,
    spec: MachineSpec,
    leases: Leases,
    /// How far the snapshot is that is being taken.
    pub(crate) meter: Meter,
    /// How its migration stands.
    pub(crate) migration: Monitor,
    start: Mutex<Start>,
    /// Read from standard input for the serial port, and not yet taken by it. Whatever reaches the guest from outside its
    /// devices does so with this lock held, and only while the guest runs.
    input: Mutex<Vec<u8>>,
    control: Arc<Control>,
    serial: Arc<SerialPort>,
    power_button: EventFd,
    /// Tells the guest that its VM generation ID is another one.
    generation: EventFd,
    /// What was put into it since it last ran.
    arrival: Mutex<Option<Arrival>>,
    pci: Arc<PciRoot>,
    functions: Functions,
    /// The pages of its memory that were written.
    pages: Arc<PageSource>,
    _large_pages: Option<large::LargePages>,
    /// Registers the doorbells that should exist, and removes those that should not.
    layout_changed: Arc<dyn Fn() + Send + Sync>,
    /// Its vCPUs, until they get their threads.
    unstarted: Mutex<Option<Unstarted>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    msi: KvmMsi,
    ram: Arc<GuestRam>,
    // Dropped last: vCPUs and devices use them.
    vm: Vm,
}

/// vCPUs that do not have their threads yet.
struct Unstarted {
    wiring: Wiring,
    vcpus: Vec<VcpuFd>,
    /// Threads that wait for them.
    threads: Vec<vcpu::Thread>,
}

impl Unstarted {
    fn make_threads(&mut self) -> std::io::Result<()> {
        for id in self.threads.len()..self.vcpus.len() {
            let thread = vcpu::Thread::spawn(id as u8, self.wiring.clone())?;
            self.threads.push(thread);
        }
        Ok(())
    }
}

impl Machine {
    /// What it was built from.
    pub fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    /// The right to change what it does, for `purpose`.
    pub(crate) fn lease(&self, purpose: Purpose) -> Result<Lease<'_>, Busy> {
        self.check_here()?;
        self.leases.take(purpose)
    }

    /// Refuses a guest that has ended, or was moved: what is left of it here is nobody's business.
    fn check_here(&self) -> Result<(), Busy> {
        match self.outcome() {
            Some(outcome) => Err(Busy::Over(outcome.to_string())),
            None => Ok(()),
        }
    }

    /// Who has the right to change what it does.
    pub fn holder(&self) -> Option<Purpose> {
        self.leases.holder()
    }

    /// Its guest comes from another process, and is there until it was started.
    pub(crate) fn expect_arrival(&self) {
        self.leases.arriving();
    }

    /// Has `listener` called whenever what it does may have changed, but for its end.
    pub(crate) fn on_change(&self, listener: Box<dyn Fn() + Send + Sync>) {
        self.leases.listen(listener);
    }

    /// State of its vCPUs, and the way to have them do something.
    pub(crate) fn control(&self) -> &Control {
        &self.control
    }

    /// The speed of its vCPUs, to be lowered. They have their full speed again when the result is dropped.
    pub fn throttle(&self) -> Throttled {
        Throttled::new(&self.control)
    }

    /// KVM's part of it.
    pub(crate) fn vm(&self) -> &Vm {
        &self.vm
    }

    /// The pages of its memory that were written, as far as that is tracked.
    pub(crate) fn pages(&self) -> &Arc<PageSource> {
        &self.pages
    }

    /// Waits for the end of a snapshot or migration that is under way: once its state is read, a snapshot is worth
    /// completing although the guest has ended, and whoever asked for a migration is told what became of it.
    pub fn wait_for_leaving(&self) {
        const LOOK: Duration = Duration::from_millis(5);
        while matches!(
            self.leases.holder(),
            Some(Purpose::Snapshot | Purpose::Migration | Purpose::Doubt)
        ) {
            std::thread::sleep(LOOK);
        }
    }

    /// True while vCPUs run guest code.
    pub(crate) fn is_running(&self) -> bool {
        self.control.state() == RunState::Running
    }

    /// Its memory.
    pub(crate) fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The state of its serial port, and the input that waits for it.
    pub(crate) fn save_serial(&self) -> (SerialState, Vec<u8>) {
        let input = self.lock_input();
        (self.serial.save(), input.clone())
    }

    /// The processor its guest sees.
    pub fn model(&self) -> &CpuModel {
        &self.model
    }

    /// Model-specific registers that are state of its vCPUs.
    pub(crate) fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    /// Its PCI root complex.
    pub fn pci(&self) -> &Arc<PciRoot> {
        &self.pci
    }

    /// Its virtio functions.
    pub fn functions(&self) -> &Functions {
        &self.functions
    }

    /// What it does now.
    pub fn state(&self) -> State {
        let start = self.lock_start();
        let holder = self.leases.holder();
        match (self.control.state(), holder) {
            (RunState::Ended, _) => State::Ended,
            (_, Some(Purpose::Doubt)) => State::InDoubt,
            (_, Some(Purpose::Snapshot)) => State::Saving,
            (_, Some(Purpose::Migration)) => State::Migrating,
            (RunState::Running, _) => State::Running,
            (RunState::Paused, _) if start.done || start.paused => State::Paused,
            (RunState::Paused, Some(Purpose::Arrival)) => State::Receiving,
            (RunState::Paused, _) => State::Created,
        }
    }

    /// How far the snapshot is that is being taken.
    pub fn progress(&self) -> Option<Progress> {
        self.meter.read()
    }

    /// Nobody waits any more for the snapshot that is being taken.
    pub fn give_up_snapshot(&self) {
        self.meter.give_up();
    }

    /// How the guest ended, if it has.
    pub fn outcome(&self) -> Option<Outcome> {
        self.control.outcome()
    }

    /// Ends the guest; the first outcome counts.
    pub fn finish(&self, outcome: Outcome) {
        self.control.finish(outcome);
    }

    /// Says that an administration command of the monitor is under way, as long as the result lives.
    pub fn command(&self) -> Result<lease::UnderWay<'_>, Busy> {
        self.check_here()?;
        self.leases.command()
    }

    /// Starts the guest, unless it is to begin paused or a pause was asked for before. Called once.
    pub fn start(&self, paused: bool) -> Result<(), TransitionError> {
        let mut start = self.lock_start();
        start.done = true;
        let outcome = self.give_threads().and_then(|()| {
            if paused || start.paused {
                Ok(())
            } else {
                self.let_run()
            }
        });
        self.leases.started();
        // Whoever is told looks at it.
        drop(start);
        self.leases.tell();
        outcome
    }

    /// Whether the guest is to begin paused, if it has not begun. False if it has. One that comes from another process is
    /// there until it was started: what is asked for here does not happen to it.
    fn begin_paused(&self, paused: bool) -> Result<bool, Busy> {
        let mut start = self.lock_start();
        if start.done {
            return Ok(false);
        }
        self.check_here()?;
        if self.leases.holder() == Some(Purpose::Arrival) {
            return Err(Busy::Held(Purpose::Arrival));
        }
        start.paused = paused;
        drop(start);
        self.leases.tell();
        Ok(true)
    }

    /// Lets the guest run. No effect on a running machine. Returns the state the machine is in then.
    pub fn resume(&self) -> Result<State, TransitionError> {
        if self.begin_paused(false)? {
            return Ok(State::Created);
        }
        let _lease = self.lease(Purpose::Resume)?;
        self.let_run()?;
        Ok(State::Running)
    }

    /// Stops vCPUs, then devices; returns when nothing of the guest happens any more. No effect on a paused machine.
    ///
    /// If a vCPU or a device does not come to rest the guest goes on running, as if nothing had been asked.
    pub fn pause(&self) -> Result<State, TransitionError> {
        if self.begin_paused(true)? {
            return Ok(State::Paused);
        }
        let lease = self.lease(Purpose::Pause)?;
        self.quiesce(&lease)?.keep();
        Ok(State::Paused)
    }

    /// Has nothing of the guest happen until the result is dropped.
    pub(crate) fn quiesce<'a>(
        &'a self,
        _lease: &'a Lease<'_>,
    ) -> Result<Quiesced<'a>, TransitionError> {
        let ran = self.control.state() == RunState::Running;
        self.control.pause(LEAVE)?;
        if !ran {
            // Devices are at rest already.
            return Ok(Quiesced { machine: self, ran });
        }
        // Whoever was about to press the power button has done so, or finds the guest paused.
        drop(self.lock_input());
        self.serial.pause();
        if let Err(stuck) = self.functions.close_and_drain(Reasons::PAUSED, DRAIN) {
            self.serial.resume();
            self.control.resume()?;
            return Err(TransitionError::InFlight(stuck.join(", ")));
        }
        Ok(Quiesced { machine: self, ran })
    }

    /// Whether the guest was not told yet that its VM generation ID is another one.
    pub(crate) fn owes_generation(&self) -> bool {
        matches!(
            *self.lock_arrival(),
            Some(Arrival::Restored | Arrival::MovedUntold)
        )
    }

    /// Has `put` put a state into the machine, which was not started: its vCPUs have no threads yet. Interrupt routes are
    /// set up together at the end.
    pub(crate) fn put<E>(
        &self,
        arrival: Arrival,
        put: impl FnOnce(&[VcpuFd]) -> Result<(), E>,
    ) -> Result<(), E> {
        let _batch = self.msi.batch();
        *self.lock_arrival() = Some(arrival);
        let unstarted = self.lock_unstarted();
        put(unstarted.as_ref().map_or(&[], |unstarted| &unstarted.vcpus))
    }

    /// Gives every vCPU its thread, where it waits until the guest runs.
    pub(crate) fn give_threads(&self) -> Result<(), TransitionError> {
        let Some(mut unstarted) = self.lock_unstarted().take() else {
            return Ok(());
        };
        unstarted.make_threads()?;
        let vcpus = unstarted.threads.into_iter().zip(unstarted.vcpus);
        let started = vcpus.map(|(thread, vcpu)| thread.give(vcpu));
        self.lock_threads().extend(started);
        Ok(())
    }

    /// Makes the threads that vCPUs will have, for a guest that must not wait for them.
    pub(crate) fn make_threads(&self) -> Result<(), TransitionError> {
        if let Some(unstarted) = self.lock_unstarted().as_mut() {
            unstarted.make_threads()?;
        }
        Ok(())
    }

    /// Gives the machine a VM generation ID that no other has. The guest is told when it goes on.
    pub(crate) fn renew_generation(&self) -> Result<(), BuildError> {
        Ok(VmGeneration::random()?.write(&self.ram.view()?)?)
    }

    /// Puts the serial port into a state, with the input that waits for it.
    pub(crate) fn put_serial(
        &self,
        state: &SerialState,
        waiting: Vec<u8>,
    ) -> Result<(), SerialStateError> {
        self.serial.restore(state)?;
        *self.lock_input() = waiting;
        Ok(())
    }

    fn let_run(&self) -> Result<(), TransitionError> {
        // Nothing of a guest that has ended happens any more, in devices either.
        if self.control.state() == RunState::Ended {
            return Err(ControlError::Ended.into());
        }
        // They were given back if the guest was to run elsewhere.
        let locked = self.functions.take_locks();
        locked.map_err(|names| TransitionError::Locked(names.join(", ")))?;
        let arrival = self.lock_arrival().take();
        if arrival.is_some() {
            // Interrupts that were on their way when the state was taken are in no copy of it.
            for function in self.functions.all() {
                function.signal_again();
            }
        }
        if matches!(arrival, Some(Arrival::Restored | Arrival::MovedUntold)) {
            let _ = self.generation.write(1);
        }
        self.functions.reopen(Reasons::PAUSED);
        self.serial.resume();
        self.control.resume()?;
        if matches!(arrival, Some(Arrival::Moved | Arrival::MovedUntold)) {
            self.functions.announce();
        }
        Ok(())
    }

    /// Registers the doorbells of functions that became live without a write of their drivers.
    fn register_doorbells(&self) {
        // First: whatever comes after this is seen below, or makes it readable again.
        let _ = self.functions.revived().read();
        (self.layout_changed)();
    }

    /// Presses the power button: the guest's operating system is asked to shut down. False if the guest does not run, and
    /// could not notice.
    pub fn press_power_button(&self) -> std::io::Result<bool> {
        let _input = self.lock_input();
        if self.control.state() != RunState::Running {
            return Ok(false);
        }
        self.power_button.write(1)?;
        Ok(true)
    }

    /// Input for the serial port, after what was not taken of it before.
    fn type_in(&self, bytes: &[u8]) {
        self.lock_input().extend_from_slice(bytes);
    }

    /// Offers the serial port its input. True if some is left.
    fn offer_input(&self) -> bool {
        let mut input = self.lock_input();
        let taken = self.serial.offer(&input);
        let taken = taken.min(input.len());
        input.drain(..taken);
        !input.is_empty()
    }

    /// Ends the guest if it has not ended, and waits for its vCPUs.
    fn stop(&self) {
        self.control
            .finish(Outcome::Stopped("the end of the process"));
        let threads = std::mem::take(&mut *self.lock_threads());
        for thread in threads {
            let _ = thread.join();
        }
    }

    fn lock_start(&self) -> MutexGuard<'_, Start> {
        self.start.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_unstarted(&self) -> MutexGuard<'_, Option<Unstarted>> {
        self.unstarted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_arrival(&self) -> MutexGuard<'_, Option<Arrival>> {
        self.arrival.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_input(&self) -> MutexGuard<'_, Vec<u8>> {
        self.input.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A machine of whose guest nothing happens. If the guest ran before, it goes on when this is dropped.
#[must_use = "the guest goes on when this is dropped"]
pub struct Quiesced<'a> {
    machine: &'a Machine,
    /// The guest ran before.
    ran: bool,
}

impl Quiesced<'_> {
    /// The guest stays paused.
    pub fn keep(mut self) {
        self.ran = false;
    }
}

impl Drop for Quiesced<'_> {
    fn drop(&mut self) {
        if self.ran
            && let Err(error) = self.machine.let_run()
        {
            tracing::debug!(%error, "the guest ended meanwhile");
        }
    }
}
