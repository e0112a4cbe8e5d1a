//! A machine whose guest comes from another process.
//!
//! ```text
//! wait ─► Offered guest ─► checks ─► machine built ─► accept ─► memory, state ─► prepared ─► commit ─► runs
//!             any error: refused, with everything that does not fit
//! ```
//!
//! From the acceptance on, a thread hears who connects: a source that sends pages over further connections, or one that lost
//! its connection and asks what became of the guest.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context, bail};
use devices::memory::{Backing, GuestRam};
use migration::live::destination::{
    Arrived, Decision, Failure, Incoming, Offered, Prepared, Receiving, answer,
};
use migration::live::{DestinationGuest, GuestError};
use migration::wire::connection::{Limits, Section};
use migration::wire::message::{Memory, Outcome};

use super::address::{Address, Caller, Listener};
use super::tls;
use crate::config::check::console_file;
use crate::config::{MachineSpec, MemoryBacking};
use crate::console::output::Output;
use crate::errors::chain;
use crate::kvm::model::{CpuModel, HostCpu};
use crate::layout;
use crate::machine::functions::Backends;
use crate::machine::hardware::fresh_ram;
use crate::machine::pages::RamPages;
use crate::machine::provider::Provider;
use crate::machine::{Arrival, Hardware, Host, Machine};
use crate::snapshot::capture;
use crate::snapshot::devices::check_contexts;
use crate::snapshot::format::moving::{self, Contexts, Guest, Offer};
use crate::snapshot::format::parse;
use crate::snapshot::overrides::Overrides;
use crate::snapshot::overrides::check::disk_file;
use crate::snapshot::restore::ClockChoice;

/// Name of the descriptor of a guest's memory.
pub const MEMORY: &str = "memory";

/// How often a thread that waits for connections looks whether it is needed.
const LOOK: Duration = Duration::from_millis(100);
/// The same, while somebody is about to say what they want.
const SOON: Duration = Duration::from_millis(2);
/// What the end of a destination means to whoever wonders whether the guest is there.
const NEVER: &str = "the guest did not run here and never will; if its source is in doubt, `tern resolve --run` lets it go on there";
/// How long a source that may be in doubt has time to ask, before this process ends without its guest.
const GRACE: Duration = Duration::from_secs(20);
/// Connections that have said nothing yet, at most.
const STRANGERS: usize = 8;
/// Stack of a thread that hears somebody: a TLS handshake takes the most.
const STACK: usize = 512 << 10;
/// What a source is told of this program.
const PROGRAM: &str = concat!("tern ", env!("CARGO_PKG_VERSION"));

/// A process that waits for a guest.
pub struct Receiver {
    listener: Listener,
}

/// A guest that was offered and that this host can run, as far as that can be said before it is built.
pub struct Candidate {
    offered: Option<Box<Offered>>,
    listener: Option<Listener>,
    model: Option<CpuModel>,
    spec: MachineSpec,
    host: Option<Host>,
    cpu: HostCpu,
    provider: Option<Provider>,
    memory: Option<OwnedFd>,
    /// Files were handed over.
    handed_over: bool,
}

impl Receiver {
    /// Listens at `address`. Over TCP, either `tls` says who may come, or anybody may, which is insecure.
    pub fn bind(
        address: &Address,
        tls: Option<&tls::Files>,
        insecure: bool,
    ) -> anyhow::Result<Self> {
        let tls = address.server(tls, insecure)?;
        Ok(Self {
            listener: Listener::bind(address, tls)?,
        })
    }

    /// Waits for a source that offers a guest. What does not fit is told to the source and is an error here.
    pub fn wait(self, overrides: &Overrides, host: Host) -> anyhow::Result<Candidate> {
        let mut offered = self.offer()?;
        let authenticated = self.listener.authenticates();
        let checked = check(&mut offered, overrides, authenticated, host);
        match checked {
            Ok(checked) => Ok(Candidate {
                offered: Some(offered),
                listener: Some(self.listener),
                ..checked
            }),
            Err(reasons) => {
                let told = reasons.join("\n  ");
                offered.refuse(reasons);
                bail!("the guest that was offered is refused:\n  {told}");
            }
        }
    }
}

impl Receiver {
    /// The first guest that is offered. Whoever connects has a thread, so that one who says nothing holds nobody up.
    fn offer(&self) -> anyhow::Result<Box<Offered>> {
        let (tell, told) = channel();
        let mut waiting = 0;
        loop {
            while let Ok(heard) = told.try_recv() {
                waiting -= 1;
                match heard {
                    Ok(Incoming::Offer(offered)) => return Ok(offered),
                    Ok(Incoming::Question { connection, .. }) => {
                        let _ = answer(connection, Outcome::Unknown);
                    }
                    Ok(Incoming::Pages(joining)) => {
                        joining.refuse("no guest arrives here yet".to_owned());
                    }
                    // A port scanner, or a source that thought better of it. The next one may be better.
                    Err(error) => {
                        tracing::warn!("a connection brought no guest: {}", chain(&error));
                    }
                }
            }
            if waiting >= STRANGERS {
                std::thread::sleep(LOOK);
                continue;
            }
            // As soon as somebody says something, that is looked at.
            let patience = if waiting == 0 { LOOK } else { SOON };
            let Some(caller) = self.listener.accept(Limits::default(), patience)? else {
                continue;
            };
            let tell = tell.clone();
            waiting += 1;
            std::thread::Builder::new()
                .name("hello".to_owned())
                .stack_size(STACK)
                .spawn(move || {
                    // Nobody listens any more once there is an offer.
                    let _ = tell.send(hear(caller));
                })?;
        }
    }
}

/// Hears who somebody is and what they want.
fn hear(caller: Caller) -> Result<Incoming, Failure> {
    let connection = caller.connection().map_err(|error| Failure::Wire {
        during: "hello",
        source: error.into(),
    })?;
    Incoming::accept(connection, PROGRAM)
}

/// Everything that can be said without building the machine; all that does not fit is the error.
fn check(
    offered: &mut Offered,
    overrides: &Overrides,
    authenticated: bool,
    host: Host,
) -> Result<Candidate, Vec<String>> {
    let one = |error: &dyn std::fmt::Display| vec![error.to_string()];
    let sections = offered.sections();
    let section = only(sections, moving::OFFER).map_err(|e| one(&e))?;
    let mut offer: Offer = parse(&section.bytes).map_err(|e| vec![format!("machine: {e}")])?;
    let mut files: BTreeMap<String, OwnedFd> = BTreeMap::new();
    for (name, file) in offered.descriptors() {
        if files.insert(name.clone(), file).is_some() {
            return Err(vec![format!("the descriptor {name:?} came twice")]);
        }
    }
    let mut reasons = Vec::new();
    let memory = files.remove(MEMORY);
    // What an option names is that, whatever was handed over.
    files.retain(|name, _| !overrides.replaces(name));
    if (offered.how() == Memory::Handoff) != memory.is_some() {
        reasons.push("memory: its descriptor and how it is to come here disagree".to_owned());
    }
    let unnamed = if authenticated {
        Vec::new()
    } else {
        overrides.unnamed(&offer.machine)
    };
    let sizes: BTreeMap<_, _> = offer
        .machine
        .files()
        .into_iter()
        .filter_map(|(name, file, _)| Some((name, file.identity?.size)))
        .collect();
    let errors = overrides.apply(&mut offer.machine).err();
    reasons.extend(errors.iter().flatten().map(ToString::to_string));
    // Whoever can connect to a port may be anybody: then no path of theirs is followed.
    if !unnamed.is_empty() {
        // Nor is anything said of what is there.
        reasons.push(Unfit::Unnamed(unnamed.join(", ")).to_string());
        return Err(reasons);
    }
    let spec = offer.machine.to_spec();
    reasons.extend(spec.as_ref().err().map(ToString::to_string));
    if let Ok(spec) = &spec {
        let ranges = layout::ram_ranges(spec.memory);
        let expected = ranges.iter().map(|range| (range.start.0, range.len as u64));
        if !expected.eq(offered.memory().iter().copied()) {
            reasons.push("memory: its ranges are not those of the machine".to_owned());
        }
        reasons.extend(host.lacks(spec).iter().map(ToString::to_string));
        let consoles = [Some(&spec.console), spec.virtio_console.as_ref()];
        for console in consoles.into_iter().flatten() {
            // A file that is made for it goes again.
            let unusable = console_file(console, &spec.boot_files()).err();
            reasons.extend(unusable.map(|error| error.to_string()));
        }
    }
    for (name, file, readonly) in offer.machine.files() {
        if files.contains_key(&name) {
            continue;
        }
        match disk_file(&file.path, !readonly) {
            Err(error) => reasons.push(format!("{name}: {}: {error}", file.path.display())),
            Ok(there) => {
                let size = sizes.get(&name);
                if size.is_some_and(|size| there.is_file() && *size != there.len()) {
                    let (path, len) = (file.path.display(), there.len());
                    reasons.push(format!(
                        "{name}: {path} has {len} bytes here and another size at the source; it has to be the same disk"
                    ));
                }
            }
        }
    }
    let model = offer.model();
    match &model {
        Ok(model) => {
            let lacking = model.check_host(host.cpu());
            reasons.extend(lacking.iter().map(ToString::to_string));
        }
        Err(error) => reasons.push(error.to_string()),
    }
    let (Ok(spec), Ok(model), true) = (spec, model, reasons.is_empty()) else {
        return Err(reasons);
    };
    let handed_over = !files.is_empty();
    let mut provider = Provider::by_name().received(files);
    if !handed_over {
        // The source has them until it gives the guest away.
        provider = provider.without_locks();
    }
    Ok(Candidate {
        offered: None,
        listener: None,
        model: Some(model),
        spec,
        cpu: host.cpu().clone(),
        host: Some(host),
        provider: Some(provider),
        memory,
        handed_over,
    })
}

/// The one section there is, which is called `name`.
fn only(sections: Vec<Section>, name: &'static str) -> Result<Section, Unfit> {
    let mut found = None;
    for section in sections {
        if section.name != name || found.is_some() {
            return Err(Unfit::Section(section.name));
        }
        if section.version != moving::NEWEST {
            return Err(Unfit::Version(section.name, section.version));
        }
        found = Some(section);
    }
    found.ok_or(Unfit::Missing(name))
}

/// What is wrong with what came.
#[derive(Debug, thiserror::Error)]
enum Unfit {
    #[error("section {0:?} is not known to this tern")]
    Section(String),
    #[error("section {0:?} has version {1}, which this tern does not read")]
    Version(String, u32),
    #[error("section {0:?} is missing")]
    Missing(&'static str),
    #[error(
        "whoever is at the source has not proved who they are (--insecure), so paths that it names are not followed: name \
         the files of {0} with --disk NAME=PATH, taps with --net NAME=tap=TAP, consoles with --console TARGET"
    )]
    Unnamed(String),
    #[error("vcpus: {found} came, and the machine has {expected}")]
    Vcpus { found: usize, expected: u8 },
    #[error("this host cannot run the guest: {0}")]
    Host(String),
}

impl Candidate {
    /// What the machine is built from.
    pub fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    /// Gives its devices their files.
    pub fn provider(&mut self) -> Provider {
        self.provider.take().unwrap_or_else(Provider::by_name)
    }

    /// Builds the machine around `backends`.
    pub fn build(
        &mut self,
        backends: Backends,
        output: Option<&Output>,
    ) -> anyhow::Result<Arc<Machine>> {
        let ram = match self.memory.take() {
            Some(memory) => {
                let ranges = layout::ram_ranges(self.spec.memory);
                GuestRam::with_backing(&ranges, Backing::Memfd(memory))?
            }
            None => fresh_ram(self.spec.memory, MemoryBacking::Memfd)?,
        };
        let once = "a machine is built once";
        let (host, model) = (self.host.take(), self.model.take());
        let hardware = Hardware::create(
            host.context(once)?,
            self.spec.clone(),
            model.context(once)?,
            ram,
            backends,
            output,
        )?;
        let machine = hardware.finish();
        // Before anybody can ask for something to happen to it.
        machine.expect_arrival();
        machine.migration.arriving(Arrived::default());
        machine.make_threads()?;
        Ok(machine)
    }

    /// Refuses the guest, for what was found out while its machine was built.
    pub fn refuse(&mut self, error: &anyhow::Error) {
        if let Some(offered) = self.offered.take() {
            offered.refuse(vec![chain(error.as_ref())]);
        }
    }

    /// Accepts the guest, and waits until all of it has arrived in `machine`.
    pub fn arrive(&mut self, machine: &Arc<Machine>) -> anyhow::Result<ArrivedGuest> {
        let once = "a guest arrives once";
        let offered = self.offered.take().context(once)?;
        let listener = self.listener.take().context(once)?;
        let decision = offered.decision();
        let answering = Answering::start(listener, decision.clone())?;
        let receiving: Receiving = offered.accept()?;
        let mut landing = Landing {
            machine,
            ram: RamPages::new(machine.ram())?,
            cpu: &self.cpu,
            paused: false,
        };
        let prepared = receiving.receive(&mut landing, &mut |arrived| {
            machine.migration.arriving(arrived);
            match machine.outcome() {
                Some(_) => ControlFlow::Break(()),
                None => ControlFlow::Continue(()),
            }
        })?;
        Ok(ArrivedGuest {
            prepared,
            decision,
            paused: landing.paused,
            handed_over: self.handed_over,
            answering,
        })
    }
}

/// A machine with its guest in it, as far as it has arrived.
struct Landing<'m> {
    machine: &'m Machine,
    ram: RamPages,
    cpu: &'m HostCpu,
    paused: bool,
}

impl DestinationGuest for Landing<'_> {
    type Memory = RamPages;

    fn memory(&self) -> &RamPages {
        &self.ram
    }

    fn early(&mut self, section: Section) -> Result<(), GuestError> {
        let section = only(vec![section], moving::CONTEXTS)?;
        let contexts: Contexts = parse(&section.bytes)?;
        Ok(check_contexts(
            self.machine.functions(),
            &contexts.functions,
        )?)
    }

    fn restore(&mut self, sections: Vec<Section>) -> Result<(), GuestError> {
        let section = only(sections, moving::GUEST)?;
        let guest: Guest = parse(&section.bytes)?;
        let cpu = guest.cpu(self.machine.model())?;
        let expected = self.machine.spec().cpus;
        if cpu.vcpus.len() != usize::from(expected) {
            let found = cpu.vcpus.len();
            return Err(Unfit::Vcpus { found, expected }.into());
        }
        let lacking = cpu.check_host(self.cpu);
        if !lacking.is_empty() {
            let all: Vec<_> = lacking.iter().map(ToString::to_string).collect();
            return Err(Unfit::Host(all.join("; ")).into());
        }
        self.paused = guest.paused;
        let arrival = if guest.untold {
            Arrival::MovedUntold
        } else {
            Arrival::Moved
        };
        let devices = guest.devices();
        let clock = ClockChoice::Host;
        capture::put(self.machine, &devices, &cpu, arrival, clock)?;
        // Now, since nothing that can fail may be left once the source has given the guest away.
        Ok(self.machine.give_threads()?)
    }
}

/// A guest that has arrived and waits for the source to give it away.
pub struct ArrivedGuest {
    prepared: Prepared,
    decision: Decision,
    paused: bool,
    handed_over: bool,
    answering: Answering,
}

impl ArrivedGuest {
    /// Waits until the source gives the guest away, and has it run in `machine`, unless it was paused or is to be. `watch` is
    /// asked now and then; with `Break` the guest stays at its source.
    pub fn start(
        self,
        machine: &Machine,
        paused: bool,
        watch: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> anyhow::Result<()> {
        let take = || {
            if let Some(outcome) = machine.outcome() {
                return Err(outcome.to_string().into());
            }
            if self.handed_over {
                return Ok(());
            }
            let taken = machine.functions().take_locks();
            taken.map_err(|names| format!("another process has {}", names.join(", ")).into())
        };
        let mut committed = match self.prepared.commit(watch, take) {
            Ok(committed) => committed,
            Err(failure) => {
                // A source that does not know yet may ask.
                if !matches!(failure, Failure::Cancelled { .. }) {
                    tracing::warn!("{}; waiting for the source to ask", chain(&failure));
                    self.decision.wait_until_told(GRACE);
                }
                return Err(anyhow::Error::from(failure).context(NEVER));
            }
        };
        machine.migration.end();
        // If it has ended meanwhile it ended here.
        crate::cli::process::start(machine, paused || self.paused)?;
        // Before anything that the guest's first steps could delay.
        let told = committed.tell();
        let answering = self.answering;
        let said = std::thread::Builder::new()
            .name("moved".to_owned())
            .stack_size(256 << 10)
            .spawn(move || {
                if told && committed.await_bye() {
                    answering.end();
                }
                // Otherwise the source asks, whenever it can.
                answering.forget();
            });
        if let Err(error) = said {
            tracing::warn!(%error, "the source is not told that the guest runs here; it will ask");
        }
        Ok(())
    }
}

/// Answers sources that ask what became of the guest, and takes connections for its pages.
struct Answering {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Answering {
    fn start(listener: Listener, decision: Decision) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("outcome".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let busy = Arc::new(AtomicUsize::new(0));
                while !ended.load(Ordering::Acquire) && !decision.is_known() {
                    serve(&listener, &decision, &busy);
                }
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }

    /// Nobody will ask any more.
    fn end(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// It goes on as long as it is needed.
    fn forget(mut self) {
        self.thread = None;
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.end();
            let _ = thread.join();
        }
    }
}

/// Accepts one connection, and answers it on a thread of its own: one who says nothing holds nobody up.
fn serve(listener: &Listener, decision: &Decision, busy: &Arc<AtomicUsize>) {
    if busy.load(Ordering::Acquire) >= STRANGERS {
        std::thread::sleep(LOOK);
        return;
    }
    let caller = match listener.accept(Limits::default(), LOOK) {
        Ok(Some(caller)) => caller,
        Ok(None) => return,
        Err(error) => {
            tracing::debug!(%error, "cannot accept connections");
            std::thread::sleep(LOOK);
            return;
        }
    };
    busy.fetch_add(1, Ordering::AcqRel);
    let (decision, counted) = (decision.clone(), Arc::clone(busy));
    let thread = std::thread::Builder::new()
        .name("question".to_owned())
        .stack_size(STACK)
        .spawn(move || {
            reply(caller, &decision);
            counted.fetch_sub(1, Ordering::AcqRel);
        });
    if thread.is_err() {
        busy.fetch_sub(1, Ordering::AcqRel);
    }
}

fn reply(caller: Caller, decision: &Decision) {
    match hear(caller) {
        Ok(Incoming::Question {
            session,
            connection,
        }) => {
            let outcome = decision.asked(&session);
            if answer(connection, outcome).is_ok() {
                decision.told();
            }
        }
        Ok(Incoming::Pages(joining)) => {
            if let Err(reason) = decision.join(joining) {
                tracing::debug!("a connection for pages was refused: {reason}");
            }
        }
        Ok(Incoming::Offer(offered)) => {
            offered.refuse(vec!["this process has a guest already".to_owned()]);
        }
        Err(error) => tracing::debug!("a connection brought no question: {}", chain(&error)),
    }
}
