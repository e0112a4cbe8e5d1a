//! An SR-IOV owner and its members, from one declaration: devices, addresses, switch ports, functions, their places.
//!
//! [`GroupBackend::open`] claims what the host must give; [`Group::plug`] puts functions around it. There are two ways
//! to show them on a bus behind a root port: all of them, where the guest's driver of the owner enables the members; or
//! the members alone, as plain endpoints, while the monitor keeps the owner and drives it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::admin::envelope::REPLY_HEADER_LEN;
use devices::admin::{self, FixedMembership, Member, OwnerDriver, Reply, SessionError};
use devices::block::{Block, BlockConfig, Pool};
use devices::io::IoThread;
use devices::memory::GuestRam;
use devices::msi::MsiController;
use devices::net::{MacAddress, Net, PortConfig, PortInfo, Switch, SwitchPort, Uplink};
use devices::state::OwnerState;
use devices::virtio::{VirtioDevice, VirtioFunction};
use pci::function::{Children, ConfigTarget, PciFunction};
use pci::owner::{self, OwnerPci};
use pci::root::PciRoot;
use pci::topology::{Bdf, DevFn};
use pci::virtio::{Options, VirtioPci};

use super::functions::FunctionError;
use super::provider::Provider;
use crate::config::pf::{member_path, nth_mac};
use crate::config::{Layout, MachineSpec, Parameters, Pf, PfDevice};

/// Threads that the disks of an owner and its members share.
pub(super) const DISK_THREADS: usize = 4;
/// Stands for the uplink where addresses are made up; no member has this number.
const UPLINK_NUMBER: u16 = 0x8000;

/// An owner and its members that are not part of a machine yet.
pub struct GroupBackend {
    name: String,
    declaration: Pf,
    layout: Layout,
    parameters: Parameters,
    /// None if the monitor keeps the owner.
    pf: Option<Box<dyn VirtioDevice>>,
    members: Vec<Box<dyn VirtioDevice>>,
    switch: Option<Switch>,
    uplink: Option<Uplink>,
}

impl GroupBackend {
    /// Opens what `pf` names, of the machine `spec`. `switches` are those of the machine.
    pub(super) fn open(
        name: String,
        pf: &Pf,
        spec: &MachineSpec,
        switches: &mut BTreeMap<String, Switch>,
        provider: &mut Provider,
    ) -> Result<Self, FunctionError> {
        let mut backend = Self {
            name,
            declaration: pf.clone(),
            layout: spec.layout,
            parameters: spec.parameters,
            pf: None,
            members: Vec::with_capacity(pf.vfs.into()),
            switch: None,
            uplink: None,
        };
        match &pf.device {
            PfDevice::Net {
                switch,
                uplink_tap,
                mac,
            } => {
                let switch = match switch {
                    Some(name) => switches.entry(name.clone()).or_default().clone(),
                    None => Switch::new(),
                };
                let mac = mac.ok_or(FunctionError::Undecided)?;
                backend.open_net(switch, uplink_tap.as_deref(), mac, provider)?;
            }
            PfDevice::Block {
                path,
                vf_path,
                readonly,
            } => {
                let pool = Pool::new(DISK_THREADS);
                if let Some(path) = path {
                    backend.pf = Some(backend.open_disk(0, path, *readonly, &pool, provider)?);
                }
                for number in 1..=pf.vfs {
                    let path = member_path(vf_path, number);
                    let disk = backend.open_disk(number, &path, *readonly, &pool, provider)?;
                    backend.members.push(disk);
                }
            }
        }
        Ok(backend)
    }

    fn open_net(
        &mut self,
        switch: Switch,
        uplink_tap: Option<&str>,
        first: MacAddress,
        provider: &mut Provider,
    ) -> Result<(), FunctionError> {
        let mac = |number| nth_mac(first, number);
        // Members may only speak for themselves; their owner may speak for others, as a bridge does.
        let plug = |name: String, mac, check_source| {
            switch.port(PortConfig {
                name,
                mac,
                check_source,
            })
        };
        if !self.declaration.passthrough {
            let mac = mac(0);
            let port = plug(self.name.clone(), mac, false)?;
            provider.announcer(port.announcer());
            self.pf = Some(Box::new(self.card(mac, port)?));
        }
        for number in 1..=self.declaration.vfs {
            let mac = mac(number);
            let port = plug(member_name(&self.name, number), mac, true)?;
            provider.announcer(port.announcer());
            let card = self.card(mac, port)?;
            self.members.push(Box::new(card));
        }
        if let Some(tap) = uplink_tap {
            let mac = mac(UPLINK_NUMBER);
            let name = format!("{}-uplink", self.name);
            let port = plug(name.clone(), mac, false)?;
            let uplink = Uplink::new(port, provider.tap(&name, tap)?);
            provider.uplink(uplink.control());
            self.uplink = Some(uplink);
        }
        self.switch = Some(switch);
        Ok(())
    }

    fn open_disk(
        &self,
        number: u16,
        path: &Path,
        read_only: bool,
        pool: &Pool,
        provider: &mut Provider,
    ) -> Result<Box<dyn VirtioDevice>, FunctionError> {
        let name = member_name(&self.name, number);
        let file = provider.disk(&name, path, read_only)?;
        let config = BlockConfig {
            path: path.to_owned(),
            read_only,
            serial: name,
            queues: 1,
        };
        let disk = Block::with_backend(file, &config)?.with_parameters(&self.parameters.block)?;
        Ok(Box::new(disk.sharing(pool)))
    }

    fn card(&self, mac: MacAddress, port: SwitchPort) -> Result<Net, FunctionError> {
        let card = Net::new(mac, port).with_control_queue(self.layout.has_net_control());
        Ok(card.with_parameters(&self.parameters.net)?)
    }
}

/// The name of member `number` of `owner`; number 0 is the owner.
fn member_name(owner: &str, number: u16) -> String {
    match number {
        0 => owner.to_owned(),
        number => format!("{owner}-vf{number}"),
    }
}

/// An owner and its members in a machine.
pub struct Group {
    /// The owner's name; also that of its function.
    pub name: String,
    /// What it was made from.
    pub declaration: Pf,
    /// The group that executes administration commands.
    pub owner: Arc<admin::Owner>,
    /// The owner's function, unless the monitor keeps it.
    pub pf: Option<Arc<VirtioFunction>>,
    /// All members, whether or not they exist now.
    pub members: Vec<Arc<VirtioFunction>>,
    /// The root port they are behind.
    port: Bdf,
    switch: Option<Switch>,
    /// The monitor as a driver of the owner.
    driver: Mutex<OwnerDriver>,
}

impl Group {
    /// Puts functions around `backend` and plugs them into `pci`.
    pub fn plug(
        backend: GroupBackend,
        ram: &Arc<GuestRam>,
        pci: &PciRoot,
        msi: &dyn MsiController,
        io: &IoThread,
    ) -> Result<Self, FunctionError> {
        let GroupBackend { name, .. } = backend;
        let offer = backend.declaration.offer;
        let mut members = Vec::with_capacity(backend.members.len());
        for (number, device) in (1u16..).zip(backend.members) {
            let name = member_name(&name, number);
            members.push(VirtioFunction::offering(name, device, ram.view()?, offer)?);
        }
        let group = members.iter().map(|vf| Arc::clone(vf) as Arc<dyn Member>);
        let owner = admin::Owner::new(group.collect(), backend.declaration.admin_options())?;
        let (pf, port) = match backend.pf {
            Some(device) => {
                let owner = Arc::clone(&owner);
                let new = match offer.packed {
                    true => VirtioFunction::new_packed_owner,
                    false => VirtioFunction::new_owner,
                };
                let pf = new(name.clone(), device, ram.view()?, owner)?;
                let options = owner::Options::default();
                let bus = OwnerPci::new(Arc::clone(&pf), members.clone(), msi, options)?;
                (Some(pf), pci.add_root_port(bus)?)
            }
            None => {
                owner.set_membership(Arc::new(FixedMembership(backend.declaration.vfs)));
                (None, pci.add_root_port(Members::new(&members, msi)?)?)
            }
        };
        for function in pf.iter().chain(&members) {
            io.attach(function)?;
        }
        if let Some(uplink) = backend.uplink {
            io.add(Box::new(uplink))?;
        }
        Ok(Self {
            name,
            declaration: backend.declaration,
            driver: Mutex::new(OwnerDriver::new(Arc::clone(&owner))),
            owner,
            pf,
            members,
            port,
            switch: backend.switch,
        })
    }

    /// All functions, the owner's first.
    pub fn functions(&self) -> impl Iterator<Item = &Arc<VirtioFunction>> {
        self.pf.iter().chain(&self.members)
    }

    /// Where function `number` is on the bus now, or would be if it existed; 0 is the owner. `None` while the guest
    /// has not numbered the bus, and for an owner that is not on one.
    pub fn place(&self, pci: &PciRoot, number: u16) -> Option<Bdf> {
        let function = match self.pf {
            Some(_) => number,
            None => number.checked_sub(1)?,
        };
        let bus = pci.secondary_bus(self.port)?;
        Some(Bdf::new(bus, DevFn(u8::try_from(function).ok()?)))
    }

    /// The ports of its switch, if it has one.
    pub fn switch_ports(&self) -> Vec<PortInfo> {
        self.switch.as_ref().map(Switch::ports).unwrap_or_default()
    }

    /// The sessions with its owner. Nothing of the guest happens meanwhile.
    pub fn save_sessions(&self) -> OwnerState {
        admin::save_owner(self.pf.as_deref(), &self.lock_driver())
    }

    /// Puts the sessions into `state`, all of it or nothing, after the functions.
    pub fn restore_sessions(&self, state: &OwnerState) -> Result<(), SessionError> {
        admin::restore_owner(self.pf.as_deref(), &mut self.lock_driver(), state)
    }

    /// Executes a command as the monitor's own driver of the owner, in its own session. `request` is the
    /// device-readable part. Blocks while the command waits for a member, [`OwnerDriver`]'s patience at most.
    pub fn execute(&self, request: &[u8]) -> Reply {
        self.execute_within(request, usize::MAX)
    }

    /// The same, with `room` bytes for the command-specific result.
    pub fn execute_within(&self, request: &[u8], room: usize) -> Reply {
        let room = room.saturating_add(REPLY_HEADER_LEN);
        self.lock_driver().execute_within(request, room)
    }

    fn lock_driver(&self) -> MutexGuard<'_, OwnerDriver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Members that are passed through: plain functions on one bus, as ARI numbers them.
struct Members(Vec<Arc<VirtioPci>>);

impl Members {
    fn new(
        members: &[Arc<VirtioFunction>],
        msi: &dyn MsiController,
    ) -> Result<Arc<Self>, FunctionError> {
        let show =
            |vf: &Arc<VirtioFunction>| VirtioPci::new(Arc::clone(vf), msi, Options::BEHIND_PORT);
        let functions = members.iter().map(show).collect::<Result<Vec<_>, _>>()?;
        for (function, next) in functions
            .iter()
            .zip(1..)
            .take(functions.len().saturating_sub(1))
        {
            function.set_next_function(DevFn(next));
        }
        if let [first, _, ..] = functions.as_slice() {
            // For guests without ARI, which see the first eight.
            first.set_multi_function();
        }
        Ok(Arc::new(Self(functions)))
    }
}

impl Children for Members {
    fn at(&self, devfn: DevFn) -> Option<Arc<dyn ConfigTarget>> {
        let function = self.0.get(usize::from(devfn.0))?;
        Some(Arc::clone(function) as _)
    }

    fn functions(&self) -> Vec<Arc<dyn PciFunction>> {
        let functions = self.0.iter();
        functions
            .map(|f| Arc::clone(f) as Arc<dyn PciFunction>)
            .collect()
    }

    fn seats(&self) -> Vec<(DevFn, Arc<dyn ConfigTarget>)> {
        let seats = (0..).zip(&self.0);
        seats
            .map(|(place, f)| (DevFn(place), Arc::clone(f) as _))
            .collect()
    }

    fn existing(&self, _first: &[u8]) -> usize {
        self.0.len()
    }
}
