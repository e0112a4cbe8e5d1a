//! Taking a snapshot.
//!
//! Most of memory is written while the guest runs; what it changed meanwhile is written again, and the last of it while
//! nothing of the guest happens:
//!
//! ```text
//! lease ─► log on ─► pages, the guest runs ─► pages again, while that shrinks ─► pause:
//!    devices at rest ─► functions ─► owners ─► PCI ─► COM1 ─► interrupt controllers, clock, vCPUs ─► last pages
//! ─► the guest goes on ─► digest ─► disks synced ─► files synced, directory renamed
//! ```
//!
//! A snapshot that fails leaves nothing behind: no file, no page that is taken for saved, and a guest that does what it did
//! before.

use std::cell::Cell;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use migration::{
    Existing, Guest, GuestPages, MemoryWriter, PageSet, RamLayout, SnapshotId, WriteError, Writer,
};

use super::capture::{self, Devices};
use super::devices::SaveError;
use super::format::FormatError;
use super::format::machine::Machine as MachineJson;
use super::format::state::{Parts, State};
use super::report::{Bytes, Pause, Phase, Report, Request, Then};
use crate::errors::chain;
use crate::exit::Outcome;
use crate::kvm::state::StateError;
use crate::machine::lease::Purpose;
use crate::machine::pages::{RamPages, SourceError};
use crate::machine::{Machine, TransitionError};

/// Memory is written once more while the guest runs if it has changed more than this: so much is written in a pause that
/// nobody notices.
const SMALL: u64 = 4 << 20;
/// How often memory is written while the guest runs, at most.
const PASSES: u32 = 8;

/// Why there is no snapshot. The guest does what it did before.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It cannot be paused now.
    #[error(transparent)]
    Transition(#[from] TransitionError),
    /// What it writes cannot be tracked.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Guest memory cannot be described. A mistake of the program.
    #[error(transparent)]
    Layout(#[from] migration::layout::LayoutError),
    /// The directory or its files.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The state of a device.
    #[error(transparent)]
    Device(#[from] SaveError),
    /// The state of vCPUs.
    #[error(transparent)]
    Cpu(#[from] StateError),
    /// The state is too long. A mistake of the program.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The base is another one than changes are tracked since.
    #[error(
        "--base {}: {reason}; take a full snapshot with --track, and use that as the base", base.display()
    )]
    Base {
        /// The base that was asked for.
        base: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A disk cannot be synced.
    #[error("{name}: cannot sync {}: {source}; the guest's disk must be there by its name", path.display())]
    Sync {
        /// Name of the disk.
        name: String,
        /// Its file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl SnapshotError {
    /// True if the same request may succeed at another time.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Transition(_) | Self::Base { .. })
            || matches!(
                self,
                Self::Write(
                    WriteError::Exists(_)
                        | WriteError::NotASnapshot { .. }
                        | WriteError::Name(_)
                        | WriteError::ReplacesBase(_)
                        | WriteError::TooDeep(_)
                )
            )
    }
}

/// Takes a snapshot of `machine`.
pub fn save(machine: &Machine, request: &Request) -> Result<Report, SnapshotError> {
    let begun = Instant::now();
    let lease = machine
        .lease(Purpose::Snapshot)
        .map_err(TransitionError::from)?;
    let meter = Shown {
        machine,
        captured: Cell::new(false),
    };
    let tracked = machine.pages().since();
    if let Some(base) = &request.base {
        check_base(base, tracked)?;
    }
    let existing = if request.replace {
        Existing::Replace
    } else {
        Existing::Refuse
    };
    let writer = Writer::create(&request.directory, existing)?;
    let guest = RamPages::new(machine.ram())?;
    let mut memory = Copy {
        writer: writer.memory(guest.layout(), request.base.as_deref())?,
        guest: &guest,
        meter: &meter,
    };
    let was_tracking = machine.pages().is_recording();
    let mut bytes = Bytes {
        memory: guest.layout().bytes(),
        ..Bytes::default()
    };
    machine.pages().start(None)?;
    let tracking = Tracking {
        machine,
        keep: was_tracking,
    };
    let mut attempt = machine.pages().attempt()?;
    // A full snapshot has every page, whatever was written since an older one.
    let first = |changed: PageSet, layout: &RamLayout| match request.base {
        Some(_) => changed,
        None => PageSet::full(layout),
    };
    let mut next = first(attempt.take()?, guest.layout());

    meter.begin(Phase::Memory);
    for _ in 0..PASSES {
        let before = next.count();
        if !machine.is_running() || before * migration::PAGE_SIZE <= SMALL {
            break;
        }
        bytes.written_running += memory.write(&next, Guest::Running)?;
        next = attempt.take()?;
        // A guest that changes memory about as fast as it can be written is not overtaken by doing it again.
        if next.count() > before / 4 * 3 {
            break;
        }
    }

    meter.begin(Phase::Pause);
    let mut pause = Pause::default();
    let paused = Instant::now();
    let mut clock = Stopwatch(paused);
    let quiesced = machine.quiesce(&lease)?;
    pause.stop = clock.lap();
    let devices = Devices::of(machine)?;
    pause.devices = clock.lap();
    let cpu = capture::cpus(machine)?;
    pause.vcpus = clock.lap();
    next.union_with(&attempt.take()?);
    bytes.written_paused = memory.write(&next, Guest::Paused)?;
    // As they are at this moment: a guest that goes on changes its disks.
    let specification = MachineJson::of(machine.spec());
    pause.memory = clock.lap();
    // If anything fails from here on, the guest goes on in any case.
    meter.captured.set(true);
    let held = (request.then != Then::Resume).then_some(quiesced);
    pause.total = micros(paused.elapsed());

    meter.begin(Phase::Digest);
    let id = memory.writer.id();
    let memory = memory.finish()?;
    meter.begin(Phase::Sync);
    sync_disks(&specification)?;
    let document = State::of(Parts {
        id,
        digest: memory.digest(),
        machine: specification,
        model: machine.model(),
        cpu: &cpu,
        pci: devices.pci,
        functions: devices.functions,
        owners: devices.owners,
        serial: devices.serial,
    });
    let text = super::format::write(&document)?;
    bytes.state = text.len() as u64;
    let committed = writer.commit(&text, memory)?;
    // From here on it is there, whatever happens.
    if was_tracking && request.base.is_none() && !request.track {
        // One beside those that build on each other: what changed since the last of them is still to be written.
        drop(attempt);
    } else {
        attempt.succeed(id);
        tracking.end(request.track);
    }
    if let Some(quiesced) = held {
        quiesced.keep();
    }
    if request.then == Then::Stop {
        machine.finish(Outcome::Stopped("a snapshot that was to end it"));
    }
    Ok(Report {
        directory: committed.path,
        id: id.to_string(),
        bytes,
        pause_us: pause,
        total_us: micros(begun.elapsed()),
    })
}

/// Refuses a base that is not the snapshot since which changes are tracked.
fn check_base(base: &std::path::Path, tracked: Option<SnapshotId>) -> Result<(), SnapshotError> {
    let refused = |reason: String| SnapshotError::Base {
        base: base.to_owned(),
        reason,
    };
    let tracked = tracked.ok_or_else(|| {
        refused("nothing tracks what this guest changed since a snapshot".to_owned())
    })?;
    let header = migration::Reader::open(base)
        .and_then(|reader| reader.header())
        .map_err(|error| refused(chain(&error)))?;
    if header.id == tracked {
        return Ok(());
    }
    Err(refused(format!(
        "it is snapshot {}, and changes are tracked since {tracked}",
        header.id
    )))
}

/// Has everything on the disk that the guest's disks were told to write.
fn sync_disks(machine: &MachineJson) -> Result<(), SnapshotError> {
    for (name, file, _) in machine.files() {
        let opened = std::fs::File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&file.path);
        let synced = opened.and_then(|file| file.sync_data());
        synced.map_err(|source| SnapshotError::Sync {
            name,
            path: file.path,
            source,
        })?;
    }
    Ok(())
}

/// Guest memory on its way to its file.
struct Copy<'a> {
    writer: MemoryWriter,
    guest: &'a RamPages,
    meter: &'a Shown<'a>,
}

impl Copy<'_> {
    /// Writes `pages`; returns how many bytes of data that was.
    fn write(&mut self, pages: &PageSet, mode: Guest) -> Result<u64, SnapshotError> {
        let pass = self
            .writer
            .pass(self.guest, pages, mode, &mut self.meter.progress())?;
        Ok(pass.data_pages * migration::PAGE_SIZE)
    }

    fn finish(self) -> Result<migration::Finished, SnapshotError> {
        Ok(self.writer.finish(&mut self.meter.progress())?)
    }
}

/// The meter of a machine while a snapshot is taken, which is given up if nobody waits for it any more, or if the guest ends
/// before its state was read.
struct Shown<'a> {
    machine: &'a Machine,
    /// All of the state was read.
    captured: Cell<bool>,
}

impl Shown<'_> {
    fn begin(&self, phase: Phase) {
        self.machine.meter.begin(phase);
    }

    fn progress(&self) -> impl FnMut(migration::Progress) -> ControlFlow<()> + '_ {
        |progress| {
            let meter = &self.machine.meter;
            meter.show(progress.done, progress.total);
            let in_vain = !self.captured.get() && self.machine.outcome().is_some();
            if meter.is_given_up() || in_vain {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        }
    }
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        self.machine.meter.end();
    }
}

/// The log of what the guest writes: switched off after a snapshot unless it is to stay.
struct Tracking<'a> {
    machine: &'a Machine,
    keep: bool,
}

impl Tracking<'_> {
    /// The snapshot succeeded.
    fn end(mut self, keep: bool) {
        self.keep = keep;
    }
}

impl Drop for Tracking<'_> {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = self.machine.pages().stop()
        {
            tracing::warn!(%error, "the guest stays slower than it could be");
        }
    }
}

/// Measures one thing after the other.
struct Stopwatch(Instant);

impl Stopwatch {
    fn lap(&mut self) -> u64 {
        let now = Instant::now();
        micros(now - std::mem::replace(&mut self.0, now))
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
