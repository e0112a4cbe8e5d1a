//! State of everything on the PCI bus: registers, virtio functions, owners.
//!
//! Nothing of the guest happens while it is taken or put back. Which virtual functions exist follows from the SR-IOV
//! registers of their owners, which are therefore restored first.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

use devices::admin::SessionError;
use devices::context;
use devices::state::{FunctionState, Shape, Unsavable};
use devices::virtio::{RestoreError, VirtioFunction};
use migration::{PageSet, RamLayout};
use pci::root::PciRoot;
use pci::state::PciStateError;

use super::format::context::Context;
use super::format::error::{At, Invalid};
use super::format::function::Function;
use super::format::owner::Owner;
use super::format::pci::Pci;
use super::members::{Engine, MemberError};
use crate::machine::functions::Functions;
use crate::machine::manager::Manager;
use crate::machine::owner::Group;

/// Why the state of devices could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// A device cannot give it away.
    #[error("{name} {source}")]
    Unsavable {
        /// Its name.
        name: String,
        /// Why.
        source: Unsavable,
    },
    /// A member of a group.
    #[error("{name}: {source}")]
    Member {
        /// Its name, or that of its owner.
        name: String,
        /// What was refused.
        source: MemberError,
    },
    /// The context of a member is not one. A mistake of the program.
    #[error("{name}: {source}")]
    Context {
        /// Its name.
        name: String,
        /// What is wrong with it.
        source: context::ContextError,
    },
}

/// Why the state of devices was rejected.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A value that no device has.
    #[error(transparent)]
    Value(#[from] Invalid),
    /// Registers on the PCI bus.
    #[error("pci: {0}")]
    Pci(#[from] PciStateError),
    /// A function of this machine is not in the state.
    #[error("functions: {0} is missing")]
    Missing(String),
    /// The state of a function that this machine does not have, or that does not exist in it by the registers of its owner.
    #[error("functions: this machine has no {0:?}")]
    Unknown(String),
    /// The state of a function is there twice.
    #[error("functions: {0} is there twice")]
    Twice(String),
    /// The state of an owner is there twice.
    #[error("owners: {0} is there twice")]
    OwnerTwice(String),
    /// An owner of this machine is not in the state.
    #[error("owners: {0} is missing")]
    OwnerMissing(String),
    /// The state of an owner that this machine does not have.
    #[error("owners: this machine has no {0:?}")]
    OwnerUnknown(String),
    /// A function cannot have this state.
    #[error("functions ({name}): {source}")]
    Function {
        /// Its name.
        name: String,
        /// Why.
        source: RestoreError,
    },
    /// A member of a group.
    #[error("functions ({name}): {source}")]
    Member {
        /// Its name, or that of its owner.
        name: String,
        /// What was refused.
        source: MemberError,
    },
    /// An owner cannot have this state.
    #[error("owners ({name}): {source}")]
    Owner {
        /// Its name.
        name: String,
        /// Why.
        source: SessionError,
    },
}

/// A function that exists; of a member, its group and its id there.
type Existing<'a> = (&'a Arc<VirtioFunction>, Option<(&'a Group, u16)>);

/// The functions that exist. Of a management device it and its devices.
fn existing(functions: &Functions) -> Vec<Existing<'_>> {
    let managed = functions.managers().iter().flat_map(managed);
    let managed = managed.map(|function| (function, None));
    on_the_bus(functions).into_iter().chain(managed).collect()
}

/// The managed devices of `manager`, in the order of what they are made of.
fn managed(manager: &Manager) -> impl Iterator<Item = &Arc<VirtioFunction>> {
    let devices = manager.devices();
    let is_device = move |seat: &&Arc<VirtioFunction>| {
        devices
            .iter()
            .any(|(_, function)| Arc::ptr_eq(function, seat))
    };
    manager.seats.iter().filter(is_device)
}

/// The functions that exist on the PCI bus.
fn on_the_bus(functions: &Functions) -> Vec<Existing<'_>> {
    let managers = functions.managers().iter().map(|manager| &manager.function);
    let single = functions.single().iter().map(|f| &f.virtio);
    let single = single.chain(managers).map(|function| (function, None));
    let grouped = functions.groups().iter().flat_map(|group| {
        let own = group.pf.iter().map(|pf| (pf, None));
        let ids = group.owner.members().map(|(id, _)| id.0);
        let members = ids.zip(&group.members);
        own.chain(members.map(move |(id, member)| (member, Some((group, id)))))
    });
    single.chain(grouped).collect()
}

/// The state of all functions that exist.
pub fn save_functions(functions: &Functions) -> Result<Vec<Function>, SaveError> {
    let mut engines = Engines::default();
    let mut saved = Vec::new();
    for (function, member) in existing(functions) {
        let name = function.name();
        let failed = |source| SaveError::Member {
            name: name.to_owned(),
            source,
        };
        let engine = match member {
            Some((group, id)) => engines
                .of(group)
                .map_err(failed)?
                .map(|engine| (engine, id)),
            None => None,
        };
        let context = match engine {
            Some((engine, id)) => {
                let bytes = engine.read(id).map_err(failed)?;
                Context::decode(&bytes).map_err(|source| SaveError::Context {
                    name: name.to_owned(),
                    source,
                })?
            }
            None => Context::of_state(&function.save(), &function.shape()),
        };
        let transient = function
            .save_transient()
            .map_err(|source| SaveError::Unsavable {
                name: name.to_owned(),
                source,
            })?;
        saved.push(Function::of(name, context, &transient));
    }
    Ok(saved)
}

/// Members that run while memory is copied: their writes are recorded and their contexts read by administration commands.
///
/// All of it is done again, or is in the VM's own record, when the machine is at rest. So a member whose owner refuses a
/// command now, since the guest resets or disables it, is left out.
pub struct Watched<'m> {
    functions: &'m Functions,
    recorded: Vec<(&'m Group, u16)>,
}

impl<'m> Watched<'m> {
    /// Records from now on what the members write that exist.
    pub fn start(functions: &'m Functions, ram: &RamLayout) -> Self {
        let mut watched = Self {
            functions,
            recorded: Vec::new(),
        };
        let mut engines = Engines::default();
        for (function, member) in existing(functions) {
            let Some((group, id)) = member else { continue };
            let Ok(Some(engine)) = engines.of(group) else {
                continue;
            };
            match engine.start_records(id, ram) {
                Ok(()) => watched.recorded.push((group, id)),
                Err(error) => tracing::debug!(%error, name = function.name(), "is not recorded"),
            }
        }
        watched
    }

    /// Adds the pages to `pages` that were recorded since the last call.
    pub fn written(&self, pages: &mut PageSet) {
        let mut engines = Engines::default();
        for (group, id) in &self.recorded {
            if let Ok(Some(engine)) = engines.of(group)
                && let Err(error) = engine.read_records(*id, pages)
            {
                tracing::debug!(%error, member = id, "has no records");
            }
        }
    }

    /// The contexts of members as they are.
    pub fn contexts(&self) -> Vec<Function> {
        let mut engines = Engines::default();
        let mut read = Vec::new();
        for (function, member) in existing(self.functions) {
            let Some((group, id)) = member else { continue };
            let Ok(Some(engine)) = engines.of(group) else {
                continue;
            };
            let context = engine.read_active(id).ok();
            if let Some(context) = context.and_then(|bytes| Context::decode(&bytes).ok()) {
                read.push(Function::of(function.name(), context, &Default::default()));
            }
        }
        read
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        let mut engines = Engines::default();
        for (group, id) in &self.recorded {
            if let Ok(Some(engine)) = engines.of(group) {
                let _ = engine.stop_records(*id);
            }
        }
    }
}

/// Looks whether the members of this machine, which may not exist yet, could have these contexts.
pub fn check_contexts(functions: &Functions, contexts: &[Function]) -> Result<(), DeviceError> {
    let all: BTreeMap<_, _> = functions.all().map(|f| (f.name(), f)).collect();
    for (index, saved) in contexts.iter().enumerate() {
        let here = |error| in_function(index, error);
        let name = saved.name.as_str();
        let function = all.get(name);
        let function = function.ok_or_else(|| DeviceError::Unknown(name.to_owned()))?;
        let state = saved.context.state(&function.shape());
        let state = state.field("context").map_err(here)?;
        function
            .check(&state)
            .map_err(|source| DeviceError::Function {
                name: name.to_owned(),
                source,
            })?;
    }
    Ok(())
}

/// The sessions of all owners.
pub fn save_owners(functions: &Functions) -> Vec<Owner> {
    let groups = functions.groups().iter();
    groups
        .map(|group| Owner::of(group.name.as_str(), &group.save_sessions()))
        .collect()
}

/// The registers of everything on the bus.
pub fn save_pci(root: &PciRoot) -> Pci {
    Pci::of(&root.save())
}

/// Puts devices that nothing was done to yet into a state. On failure they are in no state to be used.
pub fn restore(
    root: &PciRoot,
    functions: &Functions,
    pci: &Pci,
    saved: &[Function],
    owners: &[Owner],
) -> Result<(), DeviceError> {
    root.restore(&pci.plain().field("pci")?)?;
    restore_functions(functions, saved)?;
    restore_owners(functions, owners)
}

fn restore_functions(functions: &Functions, saved: &[Function]) -> Result<(), DeviceError> {
    let mut left = BTreeMap::new();
    for (index, function) in saved.iter().enumerate() {
        let name = function.name.as_str();
        if left.insert(name, (index, function)).is_some() {
            return Err(DeviceError::Twice(name.to_owned()));
        }
    }
    let mut engines = Engines::default();
    let mut restore = |(function, member): Existing<'_>| {
        let name = function.name();
        let found = left.remove(name);
        let found = found.ok_or_else(|| DeviceError::Missing(name.to_owned()))?;
        restore_function(&mut engines, function, member, found)
    };
    for existing in on_the_bus(functions) {
        restore(existing)?;
    }
    // Which managed devices there are is known now.
    for function in functions.managers().iter().flat_map(managed) {
        restore((function, None))?;
    }
    match left.keys().next() {
        Some(name) => Err(DeviceError::Unknown((*name).to_owned())),
        None => Ok(()),
    }
}

/// Puts one function into its state, which is entry `index` of the list.
fn restore_function(
    engines: &mut Engines,
    function: &VirtioFunction,
    member: Option<(&Group, u16)>,
    (index, saved): (usize, &Function),
) -> Result<(), DeviceError> {
    let name = function.name();
    let rejected = |source| DeviceError::Function {
        name: name.to_owned(),
        source,
    };
    let refused = |source| DeviceError::Member {
        name: name.to_owned(),
        source,
    };
    let here = |error| in_function(index, error);
    let transient = saved.transient().map_err(here)?;
    let state = saved
        .context
        .state(&function.shape())
        .field("context")
        .map_err(here)?;
    let engine = match member {
        Some((group, id)) => engines
            .of(group)
            .map_err(refused)?
            .map(|engine| (engine, id)),
        None => None,
    };
    match engine {
        Some((engine, id)) => {
            // For the reason, which the answer to a command has no place for.
            function.check(&state).map_err(rejected)?;
            let bytes = saved.context_bytes().map_err(here)?;
            engine.write(id, &bytes).map_err(refused)?;
            function.restore_transient(&transient).map_err(rejected)?;
        }
        None => function
            .restore_exact(&state, &transient)
            .map_err(rejected)?,
    }
    // Last: whatever else is wrong with it has a better name.
    consistent(&saved.context, &state, &function.shape()).map_err(here)?;
    Ok(())
}

/// Rejects a field that says something else than `state`, which was made of all of them: several registers are windows on
/// what other fields have in full, and nobody looks at them otherwise.
fn consistent(context: &Context, state: &FunctionState, shape: &Shape) -> Result<(), Invalid> {
    let whole = Context::of_state(state, shape);
    for (index, field) in context.0.iter().enumerate() {
        if whole.0.get(index) != Some(field) && !whole.0.contains(field) {
            let reason = format!("contradicts other fields of this context: {field}");
            return Err(Invalid::new(reason)).entry(index).field("context");
        }
    }
    Ok(())
}

/// `error` of the function that is entry `index` of the list.
fn in_function(index: usize, error: Invalid) -> Invalid {
    match Err::<Infallible, _>(error).entry(index).field("functions") {
        Err(error) => error,
        Ok(never) => match never {},
    }
}

fn restore_owners(functions: &Functions, saved: &[Owner]) -> Result<(), DeviceError> {
    for (index, owner) in saved.iter().enumerate() {
        let groups = functions.groups();
        let group = groups.iter().find(|group| group.name == owner.name);
        let group = group.ok_or_else(|| DeviceError::OwnerUnknown(owner.name.clone()))?;
        if saved.iter().take(index).any(|o| o.name == owner.name) {
            return Err(DeviceError::OwnerTwice(owner.name.clone()));
        }
        let state = owner.plain().entry(index).field("owners")?;
        group
            .restore_sessions(&state)
            .map_err(|source| DeviceError::Owner {
                name: owner.name.clone(),
                source,
            })?;
    }
    let there = |group: &&Group| !saved.iter().any(|owner| owner.name == group.name);
    match functions.groups().iter().find(there) {
        Some(group) => Err(DeviceError::OwnerMissing(group.name.clone())),
        None => Ok(()),
    }
}

/// One engine for each owner, made when its first member is moved.
#[derive(Default)]
struct Engines(BTreeMap<String, Option<Engine>>);

impl Engines {
    fn of(&mut self, group: &Group) -> Result<Option<&mut Engine>, MemberError> {
        if !self.0.contains_key(&group.name) {
            self.0.insert(group.name.clone(), Engine::of(group)?);
        }
        Ok(self.0.get_mut(&group.name).and_then(Option::as_mut))
    }
}
