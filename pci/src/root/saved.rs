//! State of all functions on the bus, taken out and put in: see [`state`](crate::state).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;

use super::{Occupant, PciRoot};
use crate::function::ConfigTarget;
use crate::state::{FunctionState, PciState, PciStateError, Place, Registers};

/// When a function is restored: after what its existence depends on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Turn {
    Bridge,
    Function,
    VirtualFunction,
}

/// A function that exists, by a state or now.
struct Present {
    place: Place,
    turn: Turn,
    target: Arc<dyn ConfigTarget>,
}

impl Present {
    /// The state of this function among `saved`, if it is one that the function can have.
    fn checked<'a>(
        &self,
        saved: &BTreeMap<Place, &'a FunctionState>,
    ) -> Result<&'a Registers, PciStateError> {
        let place = self.place;
        let name = || self.target.name().to_owned();
        let Some(state) = saved.get(&place) else {
            return Err(PciStateError::Missing {
                place,
                name: name(),
            });
        };
        if state.name != self.target.name() {
            return Err(PciStateError::Name {
                place,
                saved: state.name.clone(),
                own: name(),
            });
        }
        match self.target.check(&state.registers) {
            Ok(()) => Ok(&state.registers),
            Err(source) => Err(PciStateError::Function {
                place,
                name: name(),
                source,
            }),
        }
    }
}

impl PciRoot {
    /// State of all functions that exist. They must be quiet: vCPUs do not run, and nothing is in flight.
    pub fn save(&self) -> PciState {
        let Ok(present) =
            self.present(|first| Ok::<_, Infallible>(Cow::Owned(first.target.save().config)));
        PciState {
            functions: present
                .into_iter()
                .map(|function| FunctionState {
                    place: function.place,
                    name: function.target.name().to_owned(),
                    registers: function.target.save(),
                })
                .collect(),
        }
    }

    /// Whether [`Self::restore`] would accept `state`. Changes nothing.
    pub fn check(&self, state: &PciState) -> Result<(), PciStateError> {
        self.checked(state).map(drop)
    }

    /// Puts a root complex with the same functions at the same places, in their reset state, into `state`: bridges
    /// first, then endpoints and physical functions, then the virtual functions that exist by their registers.
    ///
    /// To be called before a vCPU runs, with every function closed for a pause
    /// ([`Reasons::PAUSED`](devices::gate::Reasons::PAUSED)) and before virtio state is restored. No interrupt is sent.
    /// Vectors get their routes, in one batch if the caller has one open; doorbells are the caller's to compare.
    ///
    /// All of `state` is checked before anything changes. After [`PciStateError::Function`] with
    /// [`RegistersError::Running`](crate::state::RegistersError::Running), a mistake of the program, some functions have
    /// their state and others do not: the machine is of no use.
    pub fn restore(&self, state: &PciState) -> Result<(), PciStateError> {
        let mut plan = self.checked(state)?;
        plan.sort_by_key(|(function, _)| function.turn);
        for (Present { place, target, .. }, registers) in plan {
            target
                .restore(registers)
                .map_err(|source| PciStateError::Function {
                    place,
                    name: target.name().to_owned(),
                    source,
                })?;
        }
        self.refresh();
        Ok(())
    }

    /// Every function that exists by `state`, with its registers there.
    fn checked<'a>(
        &self,
        state: &'a PciState,
    ) -> Result<Vec<(Present, &'a Registers)>, PciStateError> {
        let mut saved = BTreeMap::new();
        for function in &state.functions {
            if saved.insert(function.place, function).is_some() {
                return Err(PciStateError::Duplicate(function.place));
            }
        }
        // Which virtual functions exist is read from registers that were found good.
        let present = self.present(|first| {
            let registers = first.checked(&saved)?;
            Ok(Cow::Borrowed(registers.config.as_slice()))
        })?;
        let mut plan = Vec::with_capacity(present.len());
        for function in present {
            let registers = function.checked(&saved)?;
            saved.remove(&function.place);
            plan.push((function, registers));
        }
        match saved.pop_first() {
            None => Ok(plan),
            Some((place, function)) => Err(PciStateError::Unknown {
                place,
                name: function.name.clone(),
            }),
        }
    }

    /// The functions that exist, ascending by place, if `config` is the configuration space of the first function
    /// behind a port.
    fn present<'a, E>(
        &self,
        config: impl Fn(&Present) -> Result<Cow<'a, [u8]>, E>,
    ) -> Result<Vec<Present>, E> {
        let occupants: Vec<_> = self.bus().iter().map(|(at, o)| (*at, o.clone())).collect();
        let mut present = Vec::with_capacity(occupants.len());
        for (root, occupant) in occupants {
            let place = Place { root, behind: None };
            present.push(Present {
                place,
                turn: match occupant {
                    Occupant::HostBridge(_) | Occupant::Port(_) => Turn::Bridge,
                    Occupant::Endpoint(_) => Turn::Function,
                },
                target: occupant.config(),
            });
            let Occupant::Port(port) = occupant else {
                continue;
            };
            let mut seats = port.children().seats().into_iter();
            let behind = |(devfn, target), turn| Present {
                place: Place {
                    behind: Some(devfn),
                    ..place
                },
                turn,
                target,
            };
            let Some(first) = seats.next() else {
                continue;
            };
            let first = behind(first, Turn::Function);
            let others = port.children().existing(&config(&first)?).saturating_sub(1);
            present.push(first);
            let others = seats.take(others);
            present.extend(others.map(|seat| behind(seat, Turn::VirtualFunction)));
        }
        Ok(present)
    }
}
