//! A management device and what it can make devices of, from one declaration: backends, addresses, switch ports, functions, the
//! place of the management device.
//!
//! [`ManagerBackend::open`] claims what the host must give; [`Manager::plug`] puts functions around it. All backends are ready
//! from the start, so that the guest's driver can make devices and cannot choose what of the host they have.

use std::collections::BTreeMap;
use std::sync::Arc;

use devices::block::{Block, BlockConfig, Pool};
use devices::io::IoThread;
use devices::memory::GuestRam;
use devices::msi::MsiController;
use devices::net::{Net, PortConfig, Switch};
use devices::transport_vq;
use devices::virtio::{VirtioDevice, VirtioFunction};
use pci::root::PciRoot;
use pci::topology::Bdf;
use pci::virtio::{Options, VirtioPci};

use super::functions::FunctionError;
use super::owner::DISK_THREADS;
use super::provider::Provider;
use crate::config::manager::{device_name, numbered_path};
use crate::config::pf::nth_mac;
use crate::config::{self, MachineSpec, ManagerDevice};

/// A management device and its seats that are not part of a machine yet.
pub struct ManagerBackend {
    name: String,
    declaration: config::Manager,
    /// That of the management device, and then those of its devices.
    devices: Vec<Box<dyn VirtioDevice>>,
}

impl ManagerBackend {
    /// Opens what `manager` names, of the machine `spec`. `switches` are those of the machine.
    pub(super) fn open(
        name: String,
        manager: &config::Manager,
        spec: &MachineSpec,
        switches: &mut BTreeMap<String, Switch>,
        provider: &mut Provider,
    ) -> Result<Self, FunctionError> {
        let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
        match &manager.device {
            ManagerDevice::Net { switch, mac } => {
                let switch = match switch {
                    Some(name) => switches.entry(name.clone()).or_default().clone(),
                    None => Switch::new(),
                };
                let first = mac.ok_or(FunctionError::Undecided)?;
                for number in manager.numbers() {
                    let mac = nth_mac(first, number);
                    let port = switch.port(PortConfig {
                        name: device_name(&name, number),
                        mac,
                        // Devices may only speak for themselves, as members of a group.
                        check_source: number > 0,
                    })?;
                    provider.announcer(port.announcer());
                    let card =
                        Net::new(mac, port).with_control_queue(spec.layout.has_net_control());
                    devices.push(Box::new(card.with_parameters(&spec.parameters.net)?));
                }
            }
            ManagerDevice::Block { path, readonly } => {
                let pool = Pool::new(DISK_THREADS);
                for number in manager.numbers() {
                    let name = device_name(&name, number);
                    let path = numbered_path(path, number);
                    let file = provider.disk(&name, &path, *readonly)?;
                    let config = BlockConfig {
                        path,
                        read_only: *readonly,
                        serial: name,
                        queues: 1,
                    };
                    let disk = Block::with_backend(file, &config)?;
                    let disk = disk.with_parameters(&spec.parameters.block)?;
                    devices.push(Box::new(disk.sharing(&pool)));
                }
            }
        }
        Ok(Self {
            name,
            declaration: manager.clone(),
            devices,
        })
    }
}

/// A management device in a machine.
pub struct Manager {
    /// Its name; also that of its function.
    pub name: String,
    /// What it was made from.
    pub declaration: config::Manager,
    /// Its function.
    pub function: Arc<VirtioFunction>,
    /// What managed devices can be made of, whether or not they are.
    pub seats: Vec<Arc<VirtioFunction>>,
    /// Its place on the root bus.
    pub place: Bdf,
}

impl Manager {
    /// Puts functions around `backend` and plugs the management device into `pci`.
    pub fn plug(
        backend: ManagerBackend,
        ram: &Arc<GuestRam>,
        pci: &PciRoot,
        msi: &dyn MsiController,
        io: &IoThread,
    ) -> Result<Self, FunctionError> {
        let ManagerBackend {
            name,
            declaration,
            devices,
        } = backend;
        let offer = declaration.offer;
        let mut devices = devices.into_iter();
        let own = devices.next().ok_or(FunctionError::Undecided)?;
        let mut seats = Vec::with_capacity(devices.len());
        for (number, device) in (1..).zip(devices) {
            let name = device_name(&name, number);
            seats.push(VirtioFunction::offering(name, device, ram.view()?, offer)?);
        }
        let manager = transport_vq::Manager::new(seats.clone(), msi, declaration.transport)?;
        let view = ram.view()?;
        let function = VirtioFunction::new_manager(&name, own, view, manager, offer.packed)?;
        let shown = VirtioPci::new(Arc::clone(&function), msi, Options::ROOT_BUS)?;
        let place = pci.add_endpoint(shown)?;
        for function in std::iter::once(&function).chain(&seats) {
            io.attach(function)?;
        }
        Ok(Self {
            name,
            declaration,
            function,
            seats,
            place,
        })
    }

    /// All functions, the management device's first, whether or not they are devices.
    pub fn functions(&self) -> impl Iterator<Item = &Arc<VirtioFunction>> {
        std::iter::once(&self.function).chain(&self.seats)
    }

    /// The managed devices there are now, with their ids.
    pub fn devices(&self) -> Vec<(u64, Arc<VirtioFunction>)> {
        let devices = self.function.with_manager(|manager| {
            let seats = manager.seats().iter();
            let device = seats.filter_map(|seat| Some((seat.id()?, Arc::clone(seat.function()))));
            device.collect()
        });
        devices.unwrap_or_default()
    }
}
