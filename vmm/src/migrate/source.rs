//! A machine whose guest goes to another process.

use std::io::Write;
use std::ops::{ControlFlow, RangeInclusive};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use migration::live::commit::{Resolution, Source as State, SourceAction, SourceEvent};
use migration::live::source::{self, End, Options};
use migration::live::{GuestError, Limits, OnTimeout, Report, SourceGuest, attempt, report};
use migration::wire::connection::{self, Named, Section};
use migration::wire::message::{MAX_CONNECTIONS, Memory, Outcome as Known};
use migration::{PageSet, SnapshotId};
use serde::{Deserialize, Serialize};

use super::address::{Address, SecurityError};
use super::tls;
use crate::errors::chain;
use crate::exit::Outcome;
use crate::machine::lease::{Busy, Lease, Purpose};
use crate::machine::pages::{Attempt, RamPages};
use crate::machine::{Machine, Quiesced};
use crate::snapshot::capture::{self, Devices};
use crate::snapshot::devices::Watched;
use crate::snapshot::format::machine::Machine as MachineJson;
use crate::snapshot::format::moving::{self, Contexts, Guest, Offer};
use crate::vcpu::Throttled;

/// How often a lost destination is asked at once, and how long between.
const ASK: (u32, Duration) = (5, Duration::from_millis(500));
/// How often it is asked again as long as the doubt lasts.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// How soon the end of a guest in doubt is noticed.
const LOOK: Duration = Duration::from_millis(200);

/// How a guest is to be moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Where the destination listens, as in `unix:/run/move.sock`.
    pub to: String,
    /// Copy memory also where it could be handed over.
    #[serde(default)]
    pub copy: bool,
    /// Have the destination compare all of memory with that of this process before the guest is given away.
    #[serde(default)]
    pub verify: bool,
    /// How many connections memory is copied over.
    #[serde(default = "connections")]
    pub connections: u32,
    /// Longest pause that is planned for, in milliseconds.
    #[serde(default = "downtime")]
    pub downtime_ms: u64,
    /// How long memory is copied at most while the guest runs, in seconds.
    #[serde(default = "timeout")]
    pub timeout_s: u64,
    /// What to do then.
    #[serde(default)]
    pub on_timeout: OnTimeout,
    /// Whoever can read what crosses the network, or change it, may have the guest.
    #[serde(default)]
    pub insecure: bool,
    /// Certificates for a `tcp:` address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<tls::Files>,
}

/// What [`Request::connections`] may be.
pub const CONNECTIONS: RangeInclusive<u32> = 1..=MAX_CONNECTIONS;
/// What [`Request::downtime_ms`] may be.
pub const DOWNTIMES_MS: RangeInclusive<u64> = 1..=600_000;
/// What [`Request::timeout_s`] may be.
pub const TIMEOUTS_S: RangeInclusive<u64> = 1..=86_400;
/// Default of [`Request::connections`], for guests of any size: each further one takes a CPU from the guests of either host.
pub const DEFAULT_CONNECTIONS: u32 = 1;
/// Default of [`Request::downtime_ms`].
pub const DOWNTIME_MS: u64 = 100;
/// Default of [`Request::timeout_s`].
pub const TIMEOUT_S: u64 = 300;

fn connections() -> u32 {
    DEFAULT_CONNECTIONS
}

fn downtime() -> u64 {
    DOWNTIME_MS
}

fn timeout() -> u64 {
    TIMEOUT_S
}

/// Why a migration was not begun, or the guest stays.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The address.
    #[error("{0}")]
    Address(String),
    /// An address with too little, or too much, to be secure.
    #[error(transparent)]
    Security(#[from] SecurityError),
    /// Somebody else is changing what the machine does.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// Guest memory cannot be described. A mistake of the program.
    #[error(transparent)]
    Layout(#[from] migration::layout::LayoutError),
    /// Memory is to be verified and would not be copied.
    #[error(
        "memory would be handed over, so that there is nothing to compare it with; have it copied (--copy), or leave out --verify"
    )]
    NothingToVerify,
    /// Memory is to be copied over several connections and would not be copied.
    #[error(
        "memory would be handed over, which takes one connection; have it copied (--copy), or leave out --connections"
    )]
    NothingToCopy,
    /// A number that no migration can keep to.
    #[error("{name} has to be from {} to {}", .range.start(), .range.end())]
    Number {
        /// The member of the request.
        name: &'static str,
        /// What it may be.
        range: RangeInclusive<u64>,
    },
    /// The guest stays.
    #[error("the guest stays here: {reason}")]
    Kept {
        /// Why.
        reason: String,
        /// How far it came.
        attempt: Box<report::Attempt>,
    },
}

/// What became of a guest that was to be moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Answer {
    /// It runs at the destination.
    Moved {
        /// What it came to.
        report: Report,
    },
    /// It may run at the destination. Here it stands still.
    InDoubt {
        /// What happened, and how to end the doubt.
        reason: String,
        /// How far it came.
        attempt: Box<report::Attempt>,
    },
}

/// Moves the guest of `machine`. `answer` is told once what became of it; if that is in doubt, this returns only when the
/// doubt is over.
pub fn run(
    machine: &Arc<Machine>,
    request: &Request,
    called_off: &AtomicBool,
    answer: impl FnOnce(Result<Answer, MigrateError>),
) {
    let (lease, to, tls) = match begin(machine, request) {
        Ok(begun) => begun,
        Err(error) => return answer(Err(error)),
    };
    let ram = match RamPages::new(machine.ram()) {
        Ok(ram) => ram,
        Err(error) => return answer(Err(error.into())),
    };
    let how = match machine.ram().memfd() {
        Some(_) if to.passes_files() && !request.copy => Memory::Handoff,
        _ => Memory::Copy,
    };
    if request.verify && how == Memory::Handoff {
        return answer(Err(MigrateError::NothingToVerify));
    }
    if request.connections > 1 && how == Memory::Handoff {
        return answer(Err(MigrateError::NothingToCopy));
    }
    let name = to.to_string();
    let mut leaving = Leaving {
        machine,
        lease: &lease,
        ram,
        how,
        paused: !machine.is_running(),
        was_tracking: machine.pages().is_recording(),
        attempt: None,
        first: true,
        throttled: None,
        watched: None,
        quiesced: None,
    };
    let options = Options {
        how,
        files: to.passes_files(),
        verify: request.verify,
        connections: request.connections,
        limits: Limits {
            downtime: Duration::from_millis(request.downtime_ms),
            timeout: Duration::from_secs(request.timeout_s),
            on_timeout: request.on_timeout,
        },
        ask: ASK,
    };
    machine.migration.begin(&name);
    let mut connect = || to.connect(tls.as_ref(), connection::Limits::default());
    let mut watch = |progress: source::Progress| {
        // A guest that has ended is moved nowhere.
        let asked = machine.migration.leaving(&name, &progress);
        if asked || called_off.load(Ordering::Relaxed) || machine.outcome().is_some() {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    let (end, attempt) = attempt(&mut leaving, &mut connect, &options, &mut watch);
    let attempt = Box::new(attempt);
    let result = match end {
        End::Moved(report) => {
            leaving.stay_stopped();
            answer(Ok(Answer::Moved { report: *report }));
            machine.finish(Outcome::Moved(name));
            machine.migration.end();
            return;
        }
        End::Kept(reason) => {
            let reason = match machine.outcome() {
                Some(outcome) => format!("{outcome} ({})", chain(&reason)),
                None => chain(&reason),
            };
            Err(MigrateError::Kept { reason, attempt })
        }
        End::Lost { reason, error } => {
            leaving.stay_stopped();
            let reason = format!(
                "{}; it stands still, since {error}; when that is free again, `tern resume` lets it go on",
                chain(&reason)
            );
            Err(MigrateError::Kept { reason, attempt })
        }
        End::InDoubt {
            session,
            reason,
            asked,
        } => {
            let reason = doubt(&name, &chain(&reason), &asked);
            machine.migration.doubt(&name, reason.clone());
            lease.becomes(Purpose::Doubt);
            // For whoever sits at its console and sees it stand still.
            let _ = writeln!(std::io::stderr(), "tern: {reason}");
            answer(Ok(Answer::InDoubt { reason, attempt }));
            if !settle(machine, &mut leaving, session, &mut connect, &name) {
                // How the process ends says that, too.
                return;
            }
            machine.migration.end();
            return;
        }
    };
    // Whoever is told can begin something else at once.
    drop(leaving);
    machine.migration.end();
    drop(lease);
    answer(result);
}

fn begin<'m>(
    machine: &'m Machine,
    request: &Request,
) -> Result<(Lease<'m>, Address, Option<tls::Client>), MigrateError> {
    let (fewest, most) = CONNECTIONS.into_inner();
    for (name, value, range) in [
        (
            "connections",
            request.connections.into(),
            fewest.into()..=most.into(),
        ),
        ("downtime_ms", request.downtime_ms, DOWNTIMES_MS),
        ("timeout_s", request.timeout_s, TIMEOUTS_S),
    ] {
        if !range.contains(&value) {
            return Err(MigrateError::Number { name, range });
        }
    }
    let to: Address = request.to.parse().map_err(MigrateError::Address)?;
    let tls = to.client(request.tls.as_ref(), request.insecure)?;
    Ok((machine.lease(Purpose::Migration)?, to, tls))
}

fn doubt(to: &str, reason: &str, asked: &str) -> String {
    format!(
        "the guest was given to {to}, and whether it runs there is not known ({reason}; {asked}). It stands still here. \
         Look whether it ran there: if it did, however briefly, end it here with `tern resolve --discard`; if it did not and \
         never will, go on here with `tern resolve --run`"
    )
}

/// Waits until the doubt is over: a person says so, or the destination can be asked. False if the guest is ended before.
fn settle(
    machine: &Machine,
    leaving: &mut Leaving<'_>,
    session: SnapshotId,
    connect: &mut dyn FnMut() -> Result<migration::wire::Connection, migration::wire::WireError>,
    to: &str,
) -> bool {
    let mut waited = Duration::ZERO;
    let action = loop {
        let event = match machine.migration.wait_for_resolution(LOOK) {
            // Whoever says that may be wrong, and somebody may know better by now.
            Some(Resolution::Run) => match source::ask(connect, session) {
                Ok(Known::Running) => SourceEvent::Outcome(Known::Running),
                Ok(_) | Err(_) => SourceEvent::Resolve(Resolution::Run),
            },
            Some(Resolution::Discard) => SourceEvent::Resolve(Resolution::Discard),
            None if machine.outcome().is_some() => {
                leaving.stay_stopped();
                return false;
            }
            None if waited >= ASK_AGAIN => {
                waited = Duration::ZERO;
                match source::ask(connect, session) {
                    Ok(outcome) => SourceEvent::Outcome(outcome),
                    Err(_) => continue,
                }
            }
            None => {
                waited += LOOK;
                continue;
            }
        };
        match State::InDoubt.on(event).1 {
            SourceAction::Nothing => {}
            action => break action,
        }
    };
    let resumed = match action {
        SourceAction::Resume => leaving.resume(),
        _ => {
            leaving.stay_stopped();
            machine.finish(Outcome::Moved(to.to_owned()));
            return true;
        }
    };
    if let Err(error) = resumed {
        leaving.stay_stopped();
        tracing::error!("the guest stands still: {error}");
        machine.migration.stuck(format!(
            "the guest stands still: {error}; when that is free again, `tern resume` lets it go on"
        ));
    }
    true
}

/// A guest on its way to another process.
struct Leaving<'m> {
    machine: &'m Machine,
    lease: &'m Lease<'m>,
    ram: RamPages,
    how: Memory,
    /// It was paused before.
    paused: bool,
    was_tracking: bool,
    attempt: Option<Attempt>,
    /// Pages were not asked for yet.
    first: bool,
    throttled: Option<Throttled>,
    watched: Option<Watched<'m>>,
    quiesced: Option<Quiesced<'m>>,
}

impl Leaving<'_> {
    /// The guest does not go on when this is dropped.
    fn stay_stopped(&mut self) {
        if let Some(quiesced) = self.quiesced.take() {
            quiesced.keep();
        }
    }
}

impl SourceGuest for Leaving<'_> {
    type Memory = RamPages;

    fn memory(&self) -> &RamPages {
        &self.ram
    }

    fn offer(&mut self) -> Result<Vec<Section>, GuestError> {
        let machine = MachineJson::of(self.machine.spec());
        let offer = Offer::of(machine, self.machine.model());
        Ok(vec![Section {
            name: moving::OFFER.to_owned(),
            version: moving::NEWEST,
            bytes: serde_json::to_vec(&offer)?,
        }])
    }

    fn descriptors(&mut self) -> Result<Vec<Named>, GuestError> {
        let mut all = self.machine.functions().lend()?;
        if self.how == Memory::Handoff
            && let Some(memory) = self.machine.ram().memfd()
        {
            all.push((
                super::destination::MEMORY.to_owned(),
                memory.try_clone_to_owned()?,
            ));
        }
        Ok(all)
    }

    fn track(&mut self) -> Result<(), GuestError> {
        self.machine.pages().start(None)?;
        self.attempt = Some(self.machine.pages().attempt()?);
        let layout = self.machine.pages().layout();
        self.watched = Some(Watched::start(self.machine.functions(), layout));
        Ok(())
    }

    fn early(&mut self) -> Result<Vec<Section>, GuestError> {
        // Most of it, so that little of it is left for the pause. Whether it works is seen then.
        if let Err(error) = self.machine.functions().sync() {
            tracing::debug!(%error, "cannot sync before the pause");
        }
        let contexts = self.watched.as_ref().map(Watched::contexts);
        let contexts = contexts.unwrap_or_default();
        if contexts.is_empty() {
            return Ok(Vec::new());
        }
        Ok(vec![Section {
            name: moving::CONTEXTS.to_owned(),
            version: moving::NEWEST,
            bytes: serde_json::to_vec(&Contexts::of(contexts))?,
        }])
    }

    fn written(&mut self) -> Result<PageSet, GuestError> {
        let attempt = self.attempt.as_mut().ok_or("nothing is tracked")?;
        let mut written = attempt.take()?;
        // What members wrote is in there too: the devices behind them are this process's own.
        if let Some(watched) = &self.watched {
            watched.written(&mut written);
        }
        if std::mem::take(&mut self.first) {
            // Whatever was tracked before, since some snapshot.
            return Ok(PageSet::full(self.machine.pages().layout()));
        }
        Ok(written)
    }

    fn slow_down(&mut self, percent: u8) {
        let machine = self.machine;
        let throttled = self.throttled.get_or_insert_with(|| machine.throttle());
        if let Err(error) = throttled.set(percent) {
            tracing::warn!(%error, "the guest is not slowed down");
        }
    }

    fn stop(&mut self) -> Result<(), GuestError> {
        self.quiesced = Some(self.machine.quiesce(self.lease)?);
        self.throttled = None;
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<Section>, GuestError> {
        let devices = Devices::of(self.machine)?;
        let cpu = capture::cpus(self.machine)?;
        let untold = self.machine.owes_generation();
        let guest = Guest::of(devices, &cpu, self.paused, untold);
        // Another host reads from the storage what the guest was told to be written.
        self.machine
            .functions()
            .sync()
            .map_err(|error| format!("cannot sync {error}"))?;
        Ok(vec![Section {
            name: moving::GUEST.to_owned(),
            version: moving::NEWEST,
            bytes: serde_json::to_vec(&guest)?,
        }])
    }

    fn release(&mut self) {
        self.machine.functions().release_locks();
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.throttled = None;
        self.machine.functions().end_lending();
        self.machine
            .functions()
            .take_locks()
            .map_err(|names| format!("another process has {}", names.join(", ")))?;
        self.quiesced = None;
        Ok(())
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        // What was taken goes back first.
        let tracked = self.attempt.take().is_some();
        if tracked
            && !self.was_tracking
            && let Err(error) = self.machine.pages().stop()
        {
            tracing::warn!(%error, "the guest stays slower than it could be");
        }
    }
}
