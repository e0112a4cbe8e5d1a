//! An SR-IOV owner and its members on a bus of their own: a physical function and its virtual functions.
//!
//! ```text
//! config access ─► OwnerPci (devfn) ─► 0: the PF ─► VF Enable changed? ─► members are reset
//!                                   ─► n: seat n-1 ─► does that VF exist now? ─► the VF
//! BAR access    ─► PF, slot Members ─► offset / VF BAR size ─► does that VF exist now? ─► the VF
//! ```
//!
//! Which VFs exist is what the PF's SR-IOV registers say (D1), read at every access: nothing here remembers it. A VF
//! that does not exist answers like an empty place on the bus, with all ones. Its gate is closed for bus mastering, as
//! after power-on: VFs are reset whenever VF Enable changes, in either direction, and with their PF.
//!
//! That reset is the one a function level reset does. It does not wait: requests in flight complete unseen. A VF that
//! is enabled again before the last of them has come back shows it the way it does after FLR, by Transactions Pending
//! and a device status that is not yet 0. An administration command that runs at that moment sees the members as they
//! were or as they are.
//!
//! Locks: accesses to VFs share `presence`; a write to the PF's configuration space, which can make VFs come and go,
//! has it alone, so that none finds an access to a VF half done. It is taken before every other lock of the functions.
//! Administration commands run under the lock of the PF's virtio function and therefore never take it.

pub(crate) mod registers;

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use devices::admin::Membership;
use devices::bus::Effect;
use devices::virtio::VirtioFunction;

use crate::bar::BarIndex;
use crate::cap::pcie::PortType;
use crate::ecap::sriov::{self, Declaration, SriovError};
use crate::function::{
    BarSlot, Children, ConfigTarget, Decoded, FunctionDoorbell, PciFunction, Resource,
};
use crate::state::{Registers, RegistersError};
use crate::topology::DevFn;
use crate::virtio::{self, Role, VirtioPci, VirtioPciError, identity};
use devices::msi::MsiController;
use registers::SriovRegisters;

/// How an owner and its members are shown on their bus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// MSI-X vectors of the owner; `None` for what its queues need.
    pub vectors: Option<u16>,
    /// MSI-X vectors of each member; `None` for what its queues need.
    pub member_vectors: Option<u16>,
}

/// Why an owner cannot be shown on a bus. A mistake of the configuration, not of a guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OwnerError {
    /// An owner has 1 to 255 members.
    #[error("{0} members are not 1 to {max}", max = sriov::MAX_VFS)]
    Count(usize),
    /// The capability has one VF Device ID, so that members are what their owner is.
    #[error("member {0} is not of the device type of its owner")]
    DeviceType(String),
    /// One of the functions cannot be shown.
    #[error(transparent)]
    Function(#[from] VirtioPciError),
}

/// The functions behind one root port: the PF as function 0, and the VFs after it. See the
/// [module documentation](self).
pub struct OwnerPci {
    group: Arc<Group>,
    seats: Vec<Arc<Seat>>,
}

impl OwnerPci {
    /// Shows `owner` (made by [`VirtioFunction::new_owner`]) and `members` on a bus, to be plugged in with
    /// [`PciRoot::add_root_port`](crate::root::PciRoot::add_root_port). All of them are of one device type; members
    /// are numbered in this order. Tells the owner where its membership is kept.
    pub fn new(
        owner: Arc<VirtioFunction>,
        members: Vec<Arc<VirtioFunction>>,
        msi: &dyn MsiController,
        options: Options,
    ) -> Result<Arc<Self>, OwnerError> {
        let total_vfs = u16::try_from(members.len())
            .ok()
            .filter(|n| (1..=sriov::MAX_VFS).contains(n))
            .ok_or(OwnerError::Count(members.len()))?;
        let device_type = owner.device_type();
        if let Some(other) = members.iter().find(|m| m.device_type() != device_type) {
            return Err(OwnerError::DeviceType(other.name().to_string()));
        }
        // The BAR of every member is as large as the largest needs.
        let mut vf_bar_size = 0;
        for member in &members {
            let (layout, _) = VirtioPci::lay_out(member, options.member_vectors)?;
            vf_bar_size = layout.size().max(vf_bar_size);
        }
        let declaration = Declaration {
            total_vfs,
            vf_device: identity::identity(device_type).device,
            vf_bar_size,
        };
        let show = |function, vectors, role| {
            let options = virtio::Options {
                port_type: PortType::Endpoint,
                vectors,
            };
            VirtioPci::with_role(function, msi, options, role)
        };
        let pf = show(
            Arc::clone(&owner),
            options.vectors,
            Role::Owner(declaration),
        )?;
        let members = members
            .into_iter()
            .map(|member| show(member, options.member_vectors, Role::Member))
            .collect::<Result<Vec<_>, _>>()?;
        let registers = pf.sriov_registers();
        // An owner has the capability: `show` put it there.
        let registers = registers
            .ok_or(SriovError::Count(0))
            .map_err(VirtioPciError::from)?;
        let registers = Arc::new(registers);
        if let Some(group) = owner.owner() {
            group.set_membership(Arc::clone(&registers) as _);
        }
        let group = Arc::new(Group {
            pf,
            members,
            registers,
            presence: RwLock::new(()),
        });
        let seats = (0..).zip(&group.members).map(|(index, member)| {
            Arc::new(Seat {
                group: Arc::clone(&group),
                index,
                function: Arc::clone(member),
            })
        });
        Ok(Arc::new(Self {
            seats: seats.collect(),
            group: Arc::clone(&group),
        }))
    }

    /// Which members exist, as the registers have it.
    pub fn membership(&self) -> Arc<dyn Membership> {
        Arc::clone(&self.group.registers) as _
    }

    /// The physical function.
    pub fn pf(&self) -> &Arc<VirtioPci> {
        &self.group.pf
    }

    /// All virtual functions, whether or not they exist now.
    pub fn members(&self) -> &[Arc<VirtioPci>] {
        &self.group.members
    }
}

impl Children for OwnerPci {
    fn at(&self, devfn: DevFn) -> Option<Arc<dyn ConfigTarget>> {
        let Some(index) = sriov::vf_index(devfn) else {
            return Some(Arc::clone(&self.group) as _);
        };
        // The seat asks again, with the membership held.
        self.group.member(index)?;
        Some(Arc::clone(self.seats.get(usize::from(index))?) as _)
    }

    fn functions(&self) -> Vec<Arc<dyn PciFunction>> {
        vec![Arc::clone(&self.group) as _]
    }

    fn seats(&self) -> Vec<(DevFn, Arc<dyn ConfigTarget>)> {
        let pf = (DevFn(0), Arc::clone(&self.group) as Arc<dyn ConfigTarget>);
        let vfs = (0..).zip(&self.seats).filter_map(|(index, seat)| {
            let place = sriov::vf_place(index)?;
            Some((place, Arc::clone(seat) as Arc<dyn ConfigTarget>))
        });
        std::iter::once(pf).chain(vfs).collect()
    }

    fn existing(&self, first: &[u8]) -> usize {
        let vfs = self.group.registers.enabled_in(first);
        1 + usize::from(vfs).min(self.seats.len())
    }
}

/// The PF, and what it decides over.
struct Group {
    pf: Arc<VirtioPci>,
    members: Vec<Arc<VirtioPci>>,
    registers: Arc<SriovRegisters>,
    /// Protects no data: that members stay while they are accessed.
    presence: RwLock<()>,
}

impl Group {
    /// Member `index`, if it exists now.
    fn member(&self, index: u16) -> Option<&VirtioPci> {
        let enabled = self.registers.enabled_members()?;
        let member = self.members.get(usize::from(index))?;
        (index < enabled).then_some(member)
    }

    /// Does something to the PF that may make members come or go.
    fn alone<T>(&self, change: impl FnOnce(&VirtioPci) -> T) -> (T, bool) {
        let _presence: RwLockWriteGuard<'_, ()> = self
            .presence
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let before = self.registers.enabled_members();
        let result = change(&self.pf);
        // NumVFs does not change while VF Enable is set, so this is all there is to see.
        let changed = before != self.registers.enabled_members();
        if changed {
            for member in &self.members {
                member.renew();
            }
        }
        (result, changed)
    }

    fn shared(&self) -> RwLockReadGuard<'_, ()> {
        self.presence.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConfigTarget for Group {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.pf.config_read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Effect {
        let (effect, changed) = self.alone(|pf| pf.config_write(offset, data));
        match changed {
            true => Effect::LayoutChanged,
            false => effect,
        }
    }

    fn set_multi_function(&self) {
        self.pf.set_multi_function();
    }

    fn name(&self) -> &str {
        self.pf.name()
    }

    fn save(&self) -> Registers {
        self.pf.save()
    }

    fn check(&self, saved: &Registers) -> Result<(), RegistersError> {
        self.pf.check(saved)
    }

    /// Members come to exist with these registers, and are not renewed: they are in their reset state, or have state of
    /// their own.
    fn restore(&self, saved: &Registers) -> Result<(), RegistersError> {
        let _presence = self
            .presence
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        self.pf.restore(saved)
    }
}

impl PciFunction for Group {
    fn port_type(&self) -> PortType {
        self.pf.port_type()
    }

    fn resources(&self) -> Vec<Resource> {
        self.pf.resources()
    }

    fn assign(&self, slot: BarSlot, address: u64) {
        self.pf.assign(slot, address);
    }

    fn decoded(&self) -> Vec<Decoded> {
        self.pf.decoded()
    }

    fn memory_read(&self, slot: BarSlot, offset: u64, data: &mut [u8]) {
        if let BarSlot::Own(_) = slot {
            return self.pf.memory_read(slot, offset, data);
        }
        let _shared = self.shared();
        let found = self.registers.locate(offset);
        match found.and_then(|(index, at)| Some((self.member(index)?, at))) {
            Some((member, at)) => member.memory_read(MEMBER_BAR, at, data),
            None => data.fill(0xff),
        }
    }

    fn memory_write(&self, slot: BarSlot, offset: u64, data: &[u8]) -> Effect {
        if let BarSlot::Own(_) = slot {
            return self.pf.memory_write(slot, offset, data);
        }
        let _shared = self.shared();
        let found = self.registers.locate(offset);
        match found.and_then(|(index, at)| Some((self.member(index)?, at))) {
            Some((member, at)) => member.memory_write(MEMBER_BAR, at, data),
            None => Effect::None,
        }
    }

    fn doorbells(&self) -> Vec<FunctionDoorbell> {
        let mut doorbells = self.pf.doorbells();
        let _shared = self.shared();
        let size = self.registers.member_size();
        let enabled = self.registers.enabled_members().unwrap_or(0);
        for (index, member) in (0..enabled).zip(&self.members) {
            let base = u64::from(index) * size;
            doorbells.extend(member.doorbells().into_iter().map(|own| FunctionDoorbell {
                slot: BarSlot::Members(BarIndex::ZERO),
                offset: base + own.offset,
                ..own
            }));
        }
        doorbells
    }

    fn reset(&self) {
        let ((), _) = self.alone(VirtioPci::reset);
    }
}

/// What a member calls the BAR that is a part of its owner's VF BAR 0.
const MEMBER_BAR: BarSlot = BarSlot::Own(BarIndex::ZERO);

/// A member's place on the bus. The member is there while it exists.
struct Seat {
    group: Arc<Group>,
    index: u16,
    /// The member, whether or not it exists now.
    function: Arc<VirtioPci>,
}

impl ConfigTarget for Seat {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let _shared = self.group.shared();
        match self.group.member(self.index) {
            Some(member) => member.config_read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Effect {
        let _shared = self.group.shared();
        match self.group.member(self.index) {
            Some(member) => member.config_write(offset, data),
            None => Effect::None,
        }
    }

    /// Virtual functions do not count as functions of a device.
    fn set_multi_function(&self) {}

    fn name(&self) -> &str {
        self.function.name()
    }

    fn save(&self) -> Registers {
        self.function.save()
    }

    fn check(&self, saved: &Registers) -> Result<(), RegistersError> {
        self.function.check(saved)
    }

    fn restore(&self, saved: &Registers) -> Result<(), RegistersError> {
        self.function.restore(saved)
    }
}

#[cfg(test)]
mod tests;
