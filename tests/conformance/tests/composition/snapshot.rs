//! A whole group as a snapshot has it: the owner's function exactly, the contexts of its members by administration commands
//! of the engine, with what they leave out, and the sessions of the other drivers.

use std::sync::Arc;

use devices::admin::{GroupType, OwnerDriver, restore_owner, save_owner};
use devices::gate::Reasons;
use devices::state::{FunctionState, OwnerState, TransientState, Unsavable};
use driver::access::FunctionExt;
use driver::pci::header;

use crate::world::{Check, Hardware, same};

const MODE_SET: u16 = 0x08;
const CONTEXT_READ: u16 = 0x0a;
const CONTEXT_WRITE: u16 = 0x0b;
const ACTIVE: u8 = 0;
const FREEZE: u8 = 2;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    owner_function: (FunctionState, TransientState),
    members: Vec<Member>,
    owner: OwnerState,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Member {
    /// The Command register, of the PCI state.
    command: u16,
    context: Vec<u8>,
    transient: TransientState,
}

/// The engine as a driver of the owner.
struct Engine(OwnerDriver);

impl Engine {
    fn new(hardware: &Hardware) -> Result<Self, String> {
        let mut driver = OwnerDriver::engine(Arc::clone(&hardware.owner));
        let lists = driver.negotiate(GroupType::SrIov);
        lists.map_err(|failure| failure.to_string())?;
        Ok(Self(driver))
    }

    fn command(&mut self, opcode: u16, member: u64, data: &[u8]) -> Result<Vec<u8>, String> {
        let answer = self.0.command(GroupType::SrIov, opcode, member, data);
        let answer = answer.map_err(|failure| format!("opcode {opcode:#x}: {failure}"))?;
        Ok(answer.result)
    }
}

impl Snapshot {
    /// Of functions that stand still.
    pub fn save(from: &Hardware, monitor: &OwnerDriver) -> Result<Self, String> {
        let pf = &from.owner_function;
        let cannot = |error: Unsavable| error.to_string();
        let owner_function = (pf.save(), pf.save_transient().map_err(cannot)?);
        let mut engine = Engine::new(from)?;
        let mut members = Vec::new();
        for (id, seat) in (1..).zip(&from.seats) {
            engine.command(MODE_SET, id, &[FREEZE])?;
            members.push(Member {
                command: seat.place.config(header::COMMAND),
                context: engine.command(CONTEXT_READ, id, &[])?,
                transient: seat.function.save_transient().map_err(cannot)?,
            });
            engine.command(MODE_SET, id, &[ACTIVE])?;
        }
        Ok(Self {
            owner_function,
            members,
            owner: save_owner(Some(pf), monitor),
        })
    }

    /// Into functions that nobody has touched, and that are paused.
    pub fn restore(&self, to: &Hardware, monitor: &mut OwnerDriver, chunk: usize) -> Check {
        let pf = &to.owner_function;
        let (state, transient) = &self.owner_function;
        pf.restore_exact(state, transient)
            .map_err(|error| format!("the owner: {error}"))?;
        let mut engine = Engine::new(to)?;
        for (id, (member, seat)) in (1..).zip(self.members.iter().zip(&to.seats)) {
            seat.place.set_config(header::COMMAND, member.command);
            engine.command(MODE_SET, id, &[FREEZE])?;
            for piece in member.context.chunks(chunk) {
                engine.command(CONTEXT_WRITE, id, piece)?;
            }
            engine.command(MODE_SET, id, &[ACTIVE])?;
            seat.function
                .restore_transient(&member.transient)
                .map_err(|error| format!("member {id}: {error}"))?;
        }
        restore_owner(Some(pf), monitor, &self.owner).map_err(|error| error.to_string())?;
        for function in to.functions() {
            let reasons = function.reasons();
            same!(reasons.contains(Reasons::PAUSED), true, "it is paused");
        }
        Ok(())
    }
}
