//! What can happen to a function.

use proptest::prelude::*;

/// Who moves a member, and between which functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Guest,
    Monitor,
}

/// One thing that is done, by whoever can do it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The driver makes a request available. Without `kick`, it does not notify a function that is stopped.
    Submit {
        queue: usize,
        kick: bool,
    },
    /// The driver notifies a queue for no reason.
    Kick(usize),
    /// From now on the device keeps requests; or no more.
    Hold(bool),
    /// The device is done with some of those it keeps.
    Release(usize),
    /// SUSPEND, as the device offers it.
    Suspend(bool),
    DeviceStop(bool),
    GuestMode(u8),
    MonitorMode(u8),
    /// queue_status.
    RunQueue(usize, bool),
    /// Reads last_avail_idx and writes it back.
    Index(usize),
    ResetQueue(usize),
    /// Sets up a queue that was reset.
    EnableQueue(usize),
    /// The driver writes a byte of the device configuration.
    WriteConfig(usize, u8),
    /// The device changes its configuration.
    ChangeConfig(u8),
    BusMaster(bool),
    /// The monitor pauses the VM.
    Pause(bool),
    FunctionReset,
    DeviceReset,
    /// The driver sets up a device that was reset.
    Init,
    /// VF Enable goes off and on.
    Renew,
    /// Freeze, read the context, write it back in chunks of this length, go on.
    SaveRestore(By, usize),
    /// The same, but it goes on as the other virtual function.
    Move(By, usize),
    /// The VM is saved and goes on in another machine. Contexts travel in chunks of this length.
    Snapshot(usize),
}

pub fn step() -> impl Strategy<Value = Step> {
    let by = || prop_oneof![Just(By::Guest), Just(By::Monitor)];
    let chunk = || prop_oneof![1usize..40, Just(4000usize)];
    let on = any::<bool>;
    prop_oneof![
        12 => (0..2usize, on()).prop_map(|(queue, kick)| Step::Submit { queue, kick }).boxed(),
        1 => (0..2usize).prop_map(Step::Kick).boxed(),
        5 => prop::bool::weighted(0.7).prop_map(Step::Hold).boxed(),
        3 => (1..4usize).prop_map(Step::Release).boxed(),
        4 => on().prop_map(Step::Suspend).boxed(),
        4 => on().prop_map(Step::DeviceStop).boxed(),
        3 => (0..3u8).prop_map(Step::GuestMode).boxed(),
        3 => (0..3u8).prop_map(Step::MonitorMode).boxed(),
        5 => (0..2usize, on()).prop_map(|(queue, run)| Step::RunQueue(queue, run)).boxed(),
        1 => (0..2usize).prop_map(Step::Index).boxed(),
        2 => (0..2usize).prop_map(Step::ResetQueue).boxed(),
        2 => (0..2usize).prop_map(Step::EnableQueue).boxed(),
        1 => (0..16usize, any::<u8>()).prop_map(|(at, byte)| Step::WriteConfig(at, byte)).boxed(),
        2 => any::<u8>().prop_map(Step::ChangeConfig).boxed(),
        2 => on().prop_map(Step::BusMaster).boxed(),
        3 => on().prop_map(Step::Pause).boxed(),
        1 => Just(Step::FunctionReset).boxed(),
        1 => Just(Step::DeviceReset).boxed(),
        6 => Just(Step::Init).boxed(),
        2 => Just(Step::Renew).boxed(),
        2 => (by(), chunk()).prop_map(|(by, chunk)| Step::SaveRestore(by, chunk)).boxed(),
        2 => (by(), chunk()).prop_map(|(by, chunk)| Step::Move(by, chunk)).boxed(),
        4 => chunk().prop_map(Step::Snapshot).boxed(),
    ]
}
