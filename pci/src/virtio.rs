//! The virtio-pci transport, modern only: a [`VirtioFunction`] as a PCI Express endpoint.
//!
//! One 64-bit prefetchable BAR (BAR 0) holds every structure; see [`layout`]. There is no interrupt pin: without
//! MSI-X a driver can still poll the ISR status, whose bits are set either way.
//!
//! A function is one of three things to SR-IOV. Most are nothing to it. Of an owner and its members, shown together by
//! [`OwnerPci`](crate::owner::OwnerPci), the owner has the capability, and a member has what PCIe leaves to a virtual
//! function (D2): no identity, no BARs of its own and no Memory Space Enable; its BAR 0 is a part of its owner's VF BAR.
//!
//! A virtual function that a monitor passes through is none of these: hypervisors show such a function as an ordinary
//! endpoint, with its real identity and BARs, and so does [`VirtioPci::new`].
//!
//! Locks, in the order they are taken: `doors`, then those of the function, then `config` or the MSI-X table. `config` is never
//! held across a call into the function or the table; a command that asks where doorbells are takes it under the function's.

mod capabilities;
pub mod common;
mod device_state;
pub mod identity;
pub mod layout;
mod managed;
mod vectors;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use devices::bus::Effect;
use devices::gate::{Patience, Reasons};
use devices::virtio::{VirtioFunction, feature};

use crate::bar::{BadBar, Bar, BarIndex, BarKind, Bars};
use crate::cap;
use crate::cap::pcie::{self, PortType};
use crate::cap::virtio as vendor;
use crate::config::{ConfigBuilder, ConfigError, ConfigSpace};
use crate::ecap::ari;
use crate::ecap::sriov::{Declaration, Sriov, SriovError};
use crate::function::{BarSlot, ConfigTarget, Decoded, FunctionDoorbell, PciFunction, Resource};
use crate::header::{self, Command};
use crate::msix::state::MsixState;
use crate::msix::{Msix, VectorCount};
use crate::owner::registers::SriovRegisters;
use crate::state::{Registers, RegistersError};
use crate::topology::DevFn;
use capabilities::Offsets;
use common::CommonConfig;
use devices::msi::MsiController;
use layout::{Layout, MAX_DEVICE_LEN, Region};
use managed::{Managed, Pages};
use vectors::Vectors;

/// The BAR that holds the virtio structures, MSI-X table and pending bits.
const BAR: BarIndex = BarIndex::ZERO;

/// How long a write that clears Bus Master Enable waits for what storage works on, so that nothing reaches memory after
/// it (E10). Requests it has not begun are recalled at once. A backend that takes longer is broken, and must not hold up its vCPU as well.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);

/// How long a function level reset holds up its vCPU for what is in flight. Software waits as long before it touches the
/// function again (PCIe base specification, "Function Level Reset").
const RESET_PATIENCE: Duration = Duration::from_millis(100);

/// How a function is shown on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// [`PortType::RootComplexIntegratedEndpoint`] for the root bus, [`PortType::Endpoint`] behind a port.
    pub port_type: PortType,
    /// MSI-X vectors; `None` for one per queue (the administration virtqueue included) and one for configuration
    /// changes (E4).
    pub vectors: Option<u16>,
}

/// What a function is to SR-IOV. See the [module documentation](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Nothing.
    Plain,
    /// A physical function with this capability.
    Owner(Declaration),
    /// A virtual function.
    Member,
}

impl Options {
    /// For the root bus.
    pub const ROOT_BUS: Self = Self {
        port_type: PortType::RootComplexIntegratedEndpoint,
        vectors: None,
    };
    /// For a bus behind a root port.
    pub const BEHIND_PORT: Self = Self {
        port_type: PortType::Endpoint,
        vectors: None,
    };
}

/// Why a function cannot be shown on a PCI bus. A mistake of the program, not of a guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VirtioPciError {
    /// The device configuration is too long for its place in the BAR.
    #[error("device configuration of {0} bytes is longer than {MAX_DEVICE_LEN}")]
    ConfigTooLong(usize),
    /// A function has 1 to 2048 vectors.
    #[error("{0} MSI-X vectors are not 1 to 2048")]
    Vectors(u32),
    /// A virtio function is an endpoint.
    #[error("a virtio function cannot be a port")]
    Port,
    /// Configuration space cannot be laid out.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The BAR cannot be declared.
    #[error(transparent)]
    Bar(#[from] BadBar),
    /// The SR-IOV capability cannot be declared.
    #[error(transparent)]
    Sriov(#[from] SriovError),
    /// A function that offers VIRTIO_F_SR_IOV without the capability, or the other way round (B-50).
    #[error("function {0} and its SR-IOV capability do not go together")]
    Role(String),
}

/// See the [module documentation](self).
pub struct VirtioPci {
    function: Arc<VirtioFunction>,
    port_type: PortType,
    layout: Layout,
    /// None of a member.
    bars: Bars,
    offsets: Offsets,
    /// Of an owner.
    sriov: Option<Sriov>,
    config: Arc<Mutex<ConfigSpace>>,
    common: CommonConfig,
    vectors: Arc<Vectors>,
    /// What it manages, if anything.
    managed: Managed,
    /// Held while a change of configuration space is carried over to the gate and to MSI-X, so that of two writes
    /// at once the one that ends up in the register also ends up there.
    doors: Mutex<()>,
}

impl VirtioPci {
    /// Shows `function` as a PCI Express endpoint, with vectors from `msi`. Closes the function's gate until the
    /// guest enables bus mastering. An owner needs an [`OwnerPci`](crate::owner::OwnerPci) instead.
    pub fn new(
        function: Arc<VirtioFunction>,
        msi: &dyn MsiController,
        options: Options,
    ) -> Result<Arc<Self>, VirtioPciError> {
        Self::with_role(function, msi, options, Role::Plain)
    }

    pub(crate) fn with_role(
        function: Arc<VirtioFunction>,
        msi: &dyn MsiController,
        options: Options,
        role: Role,
    ) -> Result<Arc<Self>, VirtioPciError> {
        if matches!(options.port_type, PortType::RootPort { .. }) {
            return Err(VirtioPciError::Port);
        }
        let offers = u64::from(function.device_features(1)) << 32 & feature::SR_IOV != 0;
        if offers != matches!(role, Role::Owner(_)) {
            return Err(VirtioPciError::Role(function.name().to_string()));
        }
        let (layout, vectors) = Self::lay_out(&function, options.vectors)?;
        let bar = Bar {
            index: BAR,
            kind: BarKind::Prefetchable64,
            size: layout.size(),
        };
        let identity = identity::identity(function.device_type());
        let (header, bars) = match role {
            Role::Member => (header::virtual_function(&identity), Bars::default()),
            Role::Plain | Role::Owner(_) => {
                let bars = Bars::new(&[bar])?;
                (header::type0(&identity, &bars), bars)
            }
        };
        let mut builder = ConfigBuilder::new(&header);
        let offsets = capabilities::add(&mut builder, &layout, vectors, options.port_type, role)?;
        let sriov = match role {
            Role::Owner(declaration) => Some(Sriov::add(&mut builder, &declaration)?),
            Role::Plain | Role::Member => None,
        };
        let msix = Msix::new(vectors, msi.sink(vectors.get()));
        let vectors = Arc::new(Vectors::new(msix, function.total_queues()));
        let common = CommonConfig::new(Arc::clone(&vectors));
        let managed = Managed::of(&function);
        function.close(Reasons::NO_DMA);
        managed.close();
        function.set_interrupt(Arc::clone(&vectors) as _);
        let config = Arc::new(Mutex::new(builder.build()));
        let pages = Pages {
            config: Arc::clone(&config),
            bars: bars.clone(),
            start: layout.range(Region::Doorbells).start,
        };
        function.with_manager(|manager| manager.set_doorbells(Arc::new(pages)));
        Ok(Arc::new(Self {
            managed,
            port_type: options.port_type,
            layout,
            bars,
            offsets,
            sriov,
            config,
            common,
            vectors,
            doors: Mutex::new(()),
            function,
        }))
    }

    /// Where the structures of `function` lie in its BAR, and how many vectors it has.
    pub(crate) fn lay_out(
        function: &VirtioFunction,
        vectors: Option<u16>,
    ) -> Result<(Layout, VectorCount), VirtioPciError> {
        let device_len = function.config_len();
        if device_len as u64 > MAX_DEVICE_LEN {
            return Err(VirtioPciError::ConfigTooLong(device_len));
        }
        let needed = u32::from(function.total_queues()) + 1;
        let count = vectors.map_or(needed, u32::from);
        let vectors = u16::try_from(count)
            .ok()
            .and_then(VectorCount::new)
            .ok_or(VirtioPciError::Vectors(count))?;
        let state_len = device_state::len(function);
        let layout = Layout::new(
            function.total_queues(),
            vectors,
            device_len as u64,
            state_len,
            Managed::of(function).pages_len(),
        );
        Ok((layout, vectors))
    }

    /// Where its configuration access capability is.
    #[cfg(test)]
    pub(crate) fn pci_cfg_offset(&self) -> u16 {
        self.offsets.pci_cfg
    }

    /// The SR-IOV registers of an owner.
    pub(crate) fn sriov_registers(&self) -> Option<SriovRegisters> {
        let sriov = self.sriov.clone()?;
        Some(SriovRegisters::new(sriov, Arc::clone(&self.config)))
    }

    /// The virtio function behind it.
    pub fn function(&self) -> &Arc<VirtioFunction> {
        &self.function
    }

    /// Its MSI-X vectors.
    pub fn msix(&self) -> &Msix {
        self.vectors.msix()
    }

    /// Bus Master Enable and the MSI-X switches take effect, as the registers have them now. Returns when nothing is
    /// in flight any more, if bus mastering is off.
    fn apply_switches(&self) {
        let _doors = self.doors.lock().unwrap_or_else(PoisonError::into_inner);
        let (command, control) = {
            let config = self.config();
            let control = cap::msix::control(&config, self.offsets.msix);
            (Command::of(&config), control)
        };
        // MSI-X first: what the function signals when its gate opens is to find its vectors as they are now.
        if self.msix().set_control(control) {
            self.function.deliver_pending();
        }
        if command.contains(Command::BUS_MASTER) {
            self.function.reopen(Reasons::NO_DMA);
            self.managed.reopen();
            return;
        }
        let since = Instant::now();
        // Commands stop first, so that none starts what is to stop.
        self.function.close(Reasons::NO_DMA);
        self.managed.close();
        let own = self
            .function
            .stop(Reasons::NO_DMA, Patience::prompt(DRAIN_PATIENCE));
        let left = DRAIN_PATIENCE.saturating_sub(since.elapsed());
        if !self.managed.stop(left) || !own {
            tracing::warn!(
                function = self.function.name(),
                "still in flight without bus mastering"
            );
        }
    }

    /// Carries out the access that is set up in the configuration access capability: a read into its data bytes.
    fn window_read(&self) {
        let (data_at, _) = vendor::data_span(self.offsets.pci_cfg);
        let Some(access) = self.window_access() else {
            return;
        };
        let mut bytes = [0; 4];
        if let Some(part) = bytes.get_mut(..access.len.into()) {
            self.memory_read(BarSlot::Own(access.bar), access.offset.into(), part);
        }
        self.config().set_dword(data_at, u32::from_le_bytes(bytes));
    }

    /// The same for a write of its data bytes.
    fn window_write(&self) -> Effect {
        let (data_at, _) = vendor::data_span(self.offsets.pci_cfg);
        let Some(access) = self.window_access() else {
            return Effect::None;
        };
        let bytes = self.config().dword(data_at).to_le_bytes();
        match bytes.get(..access.len.into()) {
            Some(part) => self.memory_write(BarSlot::Own(access.bar), access.offset.into(), part),
            None => Effect::None,
        }
    }

    fn window_access(&self) -> Option<vendor::Access> {
        let access = vendor::access(&self.config(), self.offsets.pci_cfg)?;
        let end = u64::from(access.offset) + u64::from(access.len);
        (access.bar == BAR && end <= self.layout.size()).then_some(access)
    }

    /// On a bus of several functions behind a port: the one after this is at `next`. Once told, for good; the last
    /// function is not. Guests that enumerate by ARI follow this list.
    pub fn set_next_function(&self, next: DevFn) {
        if let Some(at) = self.offsets.ari {
            ari::set_next(&mut self.config(), at, next);
        }
    }

    /// A member comes to exist, or ceases to: after a reset nothing is left of what its owner's drivers did to it.
    pub(crate) fn renew(&self) {
        PciFunction::reset(self);
        self.function.renew();
    }

    /// Configuration space without what is not state: whether transactions are pending is the function's to say.
    fn settled_config(&self) -> ConfigSpace {
        let mut config = self.config().clone();
        pcie::set_transactions_pending(&mut config, self.offsets.pcie, false);
        config
    }

    /// The parts of a saved form that this function accepts.
    fn checked<'a>(
        &self,
        saved: &'a Registers,
    ) -> Result<(ConfigSpace, &'a MsixState), RegistersError> {
        let config = self.settled_config().restored(&saved.config)?;
        if let Some(sriov) = &self.sriov {
            sriov.check(&config)?;
        }
        let msix = saved.msix.as_ref().ok_or(RegistersError::NoMsix)?;
        self.msix().check(msix)?;
        if msix.control != cap::msix::control(&config, self.offsets.msix) {
            return Err(RegistersError::Control);
        }
        Ok((config, msix))
    }

    fn decoded_by(&self, config: &ConfigSpace) -> Vec<Decoded> {
        let memory = Command::of(config).contains(Command::MEMORY);
        let own = self.bars.iter().filter(|_| memory).filter_map(|bar| {
            Some(Decoded {
                slot: BarSlot::Own(bar.index),
                range: self.bars.range(config, bar)?,
            })
        });
        // VF MSE, not Memory Space Enable, is the switch of the members.
        let members = self.sriov.as_ref().and_then(|s| s.decoded(config));
        own.chain(members).collect()
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConfigTarget for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let touches = |(at, len): (u16, u16)| {
            offset < at + len && at < offset.saturating_add(data.len() as u16)
        };
        if touches(vendor::data_span(self.offsets.pci_cfg)) {
            self.window_read();
        }
        let resetting = self.function.is_resetting();
        let mut config = self.config();
        pcie::set_transactions_pending(&mut config, self.offsets.pcie, resetting);
        config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Effect {
        // The access window belongs to the function's registers, which do not change in mode Freeze (S3-18). All else
        // here is PCI's, and works in every mode (S3-12).
        let frozen = self.function.reasons().intersects(Reasons::FREEZE);
        if frozen && vendor::access_span(self.offsets.pci_cfg).contains(&offset) {
            return Effect::None;
        }
        let (written, moved) = {
            let mut config = self.config();
            let before = self.decoded_by(&config);
            let written = match &self.sriov {
                Some(sriov) => sriov.write(&mut config, offset, data),
                None => config.write(offset, data),
            };
            (written, before != self.decoded_by(&config))
        };
        let touches = |(at, len)| written.touches(at, len);
        let mut effect = match moved {
            true => Effect::LayoutChanged,
            false => Effect::None,
        };
        let control = cap::msix::control_span(self.offsets.msix);
        if touches((header::COMMAND, 2)) || touches(control) {
            self.apply_switches();
        }
        if touches(vendor::data_span(self.offsets.pci_cfg)) {
            effect = effect.and(self.window_write());
        }
        if pcie::flr_requested(&written, self.offsets.pcie) {
            self.reset();
            // Pages that the guest reuses after this should not be written to any more. Storage that takes longer is
            // seen in Transactions Pending.
            if !self.function.wait_for_reset(RESET_PATIENCE) {
                tracing::debug!(
                    function = self.function.name(),
                    "still in flight after a function level reset"
                );
            }
            effect = Effect::LayoutChanged;
        }
        effect
    }

    fn set_multi_function(&self) {
        header::set_multi_function(&mut self.config());
    }

    fn name(&self) -> &str {
        self.function.name()
    }

    fn save(&self) -> Registers {
        Registers {
            config: self.settled_config().save(),
            msix: Some(self.msix().save()),
        }
    }

    fn check(&self, saved: &Registers) -> Result<(), RegistersError> {
        self.checked(saved).map(drop)
    }

    /// The function must be closed for a pause: what it owes its driver goes out when it is resumed.
    fn restore(&self, saved: &Registers) -> Result<(), RegistersError> {
        if !self.function.reasons().contains(Reasons::PAUSED) {
            return Err(RegistersError::Running);
        }
        {
            let _doors = self.doors.lock().unwrap_or_else(PoisonError::into_inner);
            let (config, msix) = self.checked(saved)?;
            *self.config() = config;
            self.msix().restore(msix)?;
        }
        self.apply_switches();
        Ok(())
    }
}

impl PciFunction for VirtioPci {
    fn port_type(&self) -> PortType {
        self.port_type
    }

    fn resources(&self) -> Vec<Resource> {
        let resource = |bar: &Bar| Resource {
            slot: BarSlot::Own(bar.index),
            kind: bar.kind,
            size: bar.size,
            align: bar.size,
        };
        let members = self.sriov.as_ref().map(Sriov::resource);
        self.bars.iter().map(resource).chain(members).collect()
    }

    fn assign(&self, slot: BarSlot, address: u64) {
        match (slot, &self.sriov) {
            (BarSlot::Own(index), _) => self.bars.assign(&mut self.config(), index, address),
            (BarSlot::Members(_), Some(sriov)) => sriov.assign(&mut self.config(), address),
            (BarSlot::Members(_), None) => {}
        }
    }

    fn decoded(&self) -> Vec<Decoded> {
        self.decoded_by(&self.config())
    }

    fn memory_read(&self, slot: BarSlot, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if slot != BarSlot::Own(BAR) {
            return;
        }
        let Some((region, offset)) = self.layout.locate(offset) else {
            return;
        };
        match region {
            Region::Common => self.common.read(&self.function, offset, data),
            Region::Isr => {
                if let Some(first) = data.first_mut() {
                    *first = self.function.take_isr();
                }
            }
            Region::State => device_state::read(&self.function, offset, data),
            Region::Device => self.function.read_config(offset as usize, data),
            Region::Notify | Region::Doorbells => {}
            Region::MsixTable => self.msix().read_table(offset, data),
            Region::MsixPba => self.msix().read_pba(offset, data),
        }
    }

    fn memory_write(&self, slot: BarSlot, offset: u64, data: &[u8]) -> Effect {
        if slot != BarSlot::Own(BAR) {
            return Effect::None;
        }
        let Some((region, offset)) = self.layout.locate(offset) else {
            return Effect::None;
        };
        match region {
            Region::Common => return self.common.write(&self.function, offset, data),
            Region::State => device_state::write(&self.function, offset, data),
            Region::Device => self.function.write_config(offset as usize, data),
            Region::Notify => {
                if let Some(queue) = Layout::notified_queue(offset) {
                    self.function.kick(queue);
                }
            }
            Region::Doorbells => self.managed.kick(offset, data),
            Region::MsixTable => {
                if self.msix().write_table(offset, data) {
                    self.function.deliver_pending();
                }
            }
            Region::Isr | Region::MsixPba => {}
        }
        Effect::None
    }

    fn doorbells(&self) -> Vec<FunctionDoorbell> {
        let pages = self.layout.range(Region::Doorbells).start;
        let managed = self.managed.doorbells(pages);
        if !self.function.is_live() {
            return managed.collect();
        }
        let doorbell = |queue| {
            let info = self.function.queue(queue)?;
            let event = self.function.kick_event(queue)?;
            (info.enabled && !info.resetting).then(|| FunctionDoorbell {
                slot: BarSlot::Own(BAR),
                offset: Layout::notify_offset(queue),
                datamatch: None,
                event: Arc::clone(event),
            })
        };
        (0..self.function.total_queues())
            .filter_map(doorbell)
            .chain(managed)
            .collect()
    }

    /// Also what a function level reset does (E3): virtio state, MSI-X and all of configuration space, at once. What
    /// the device still has in flight completes unseen, whatever the guest programs meanwhile; Transactions Pending
    /// reads 1 until it has.
    fn reset(&self) {
        let _doors = self.doors.lock().unwrap_or_else(PoisonError::into_inner);
        self.function.close(Reasons::NO_DMA);
        self.managed.close();
        // The caller reports the layout change, whatever this says.
        let _ = self.function.request_reset();
        self.msix().reset();
        self.config().reset();
    }
}

#[cfg(test)]
mod tests;
