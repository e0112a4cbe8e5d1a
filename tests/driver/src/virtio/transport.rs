//! The virtio-pci transport (virtio 1.4, "Virtio Over PCI Bus").

use std::time::Duration;

use super::{Layout, NO_VECTOR, feature, status};
use crate::access::{Function, FunctionExt, Region, Register, Word};
use crate::pci::{CapabilityLoop, MsiX, capabilities, header, id};

/// PCI vendor ID of virtio devices.
pub const VENDOR: u16 = 0x1af4;

/// Types of virtio structure (`cfg_type` of a vendor capability).
pub mod structure {
    /// Common configuration.
    pub const COMMON: u8 = 1;
    /// Notifications.
    pub const NOTIFY: u8 = 2;
    /// ISR status.
    pub const ISR: u8 = 3;
    /// Device-specific configuration.
    pub const DEVICE: u8 = 4;
    /// Access to the BARs through configuration space.
    pub const PCI_CFG: u8 = 5;
    /// State of the queues.
    pub const DEVICE_STATE: u8 = 10;
}

/// Registers of the common configuration.
pub mod common {
    use crate::access::Register;

    /// Which 32 bits of the offered features [`DEVICE_FEATURE`] shows.
    pub const DEVICE_FEATURE_SELECT: Register<u32> = Register::at(0);
    /// Offered features.
    pub const DEVICE_FEATURE: Register<u32> = Register::at(4);
    /// Which 32 bits of the accepted features [`DRIVER_FEATURE`] shows.
    pub const DRIVER_FEATURE_SELECT: Register<u32> = Register::at(8);
    /// Accepted features.
    pub const DRIVER_FEATURE: Register<u32> = Register::at(12);
    /// Vector for configuration changes.
    pub const CONFIG_MSIX_VECTOR: Register<u16> = Register::at(16);
    /// Number of queues, administration queues excepted.
    pub const NUM_QUEUES: Register<u16> = Register::at(18);
    /// Device status.
    pub const DEVICE_STATUS: Register<u8> = Register::at(20);
    /// Changes with the device configuration.
    pub const CONFIG_GENERATION: Register<u8> = Register::at(21);
    /// The queue the registers from here on are about.
    pub const QUEUE_SELECT: Register<u16> = Register::at(22);
    /// Entries; the maximum after a reset; 0 if there is no such queue.
    pub const QUEUE_SIZE: Register<u16> = Register::at(24);
    /// Vector of the queue.
    pub const QUEUE_MSIX_VECTOR: Register<u16> = Register::at(26);
    /// 1 while the queue is enabled.
    pub const QUEUE_ENABLE: Register<u16> = Register::at(28);
    /// Where to notify, in units of the notification multiplier.
    pub const QUEUE_NOTIFY_OFF: Register<u16> = Register::at(30);
    /// Address of the descriptor table, lower half.
    pub const QUEUE_DESC: Register<u32> = Register::at(32);
    /// Upper half.
    pub const QUEUE_DESC_HIGH: Register<u32> = Register::at(36);
    /// Address of the available ring, lower half.
    pub const QUEUE_DRIVER: Register<u32> = Register::at(40);
    /// Upper half.
    pub const QUEUE_DRIVER_HIGH: Register<u32> = Register::at(44);
    /// Address of the used ring, lower half.
    pub const QUEUE_DEVICE: Register<u32> = Register::at(48);
    /// Upper half.
    pub const QUEUE_DEVICE_HIGH: Register<u32> = Register::at(52);
    /// What to notify with, if that was negotiated.
    pub const QUEUE_NOTIF_CONFIG_DATA: Register<u16> = Register::at(56);
    /// 1 while the queue is being reset.
    pub const QUEUE_RESET: Register<u16> = Register::at(58);
    /// First administration queue.
    pub const ADMIN_QUEUE_INDEX: Register<u16> = Register::at(60);
    /// Number of administration queues.
    pub const ADMIN_QUEUE_NUM: Register<u16> = Register::at(62);
}

/// A virtio capability as it stands in configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Structure {
    /// Which structure; see [`structure`].
    pub kind: u8,
    /// Where the capability is in configuration space.
    pub capability: u16,
    /// Its own length in bytes.
    pub capability_len: u8,
    /// Where the structure is.
    pub region: Region,
}

/// Why a function cannot be driven, or did not do as it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// Not a virtio 1.0 PCI device.
    #[error("function {vendor:04x}:{device:04x} is not a modern virtio device")]
    NotVirtio {
        /// Its vendor ID.
        vendor: u16,
        /// Its device ID.
        device: u16,
    },
    /// The capability list cannot be walked.
    #[error(transparent)]
    Capabilities(#[from] CapabilityLoop),
    /// A mandatory structure is not there.
    #[error("virtio structure {0} is missing")]
    Missing(u8),
    /// The device did not finish in time.
    #[error("{0} did not finish in time")]
    Timeout(&'static str),
    /// The device asks for a reset, and will not do what it was told.
    #[error("the device needs a reset")]
    NeedsReset,
    /// The device refused the features, or does not offer VIRTIO_F_VERSION_1.
    #[error("device refused features {0:#x}")]
    Refused(u64),
    /// The device has no such queue, or not of that size.
    #[error("queue {0} does not exist or is too small")]
    NoQueue(u16),
    /// The device did not accept a vector.
    #[error("device refused vector {0}")]
    VectorRefused(u16),
}

/// How long a device may take for a reset.
const PATIENCE: Duration = Duration::from_secs(10);

/// A virtio-pci function. Holds what its capabilities say, and no copy of any state.
#[derive(Clone, Debug)]
pub struct Transport<F> {
    function: F,
    structures: Vec<Structure>,
    common: Region,
    notify: Region,
    notify_multiplier: u32,
    isr: Region,
    device: Option<Region>,
    window: Option<u16>,
    msix: Option<MsiX>,
}

impl<F: Function> Transport<F> {
    /// Walks the capabilities. Takes the first structure of each type that lies in a BAR 0 to 5, as a driver must.
    pub fn new(function: F) -> Result<Self, TransportError> {
        let (vendor, device) = (
            function.config(header::VENDOR_ID),
            function.config(header::DEVICE_ID),
        );
        if vendor != VENDOR || !(0x1040..0x1080).contains(&device) {
            return Err(TransportError::NotVirtio { vendor, device });
        }
        let structures: Vec<_> = capabilities(&function)?
            .into_iter()
            .filter(|cap| cap.id == id::VENDOR)
            .map(|cap| Structure {
                kind: function.config(cap.offset + 3),
                capability: cap.offset,
                capability_len: function.config(cap.offset + 2),
                region: Region {
                    bar: function.config(cap.offset + 4),
                    offset: function.config::<u32>(cap.offset + 8).into(),
                    len: function.config::<u32>(cap.offset + 12).into(),
                },
            })
            .collect();
        let first = |kind| {
            structures
                .iter()
                .find(|s| s.kind == kind && s.region.bar < 6)
        };
        let need = |kind| first(kind).ok_or(TransportError::Missing(kind));
        let notify = need(structure::NOTIFY)?;
        Ok(Self {
            common: need(structure::COMMON)?.region,
            notify: notify.region,
            notify_multiplier: function.config(notify.capability + 16),
            isr: need(structure::ISR)?.region,
            device: first(structure::DEVICE).map(|s| s.region),
            window: structures
                .iter()
                .find(|s| s.kind == structure::PCI_CFG)
                .map(|s| s.capability),
            msix: MsiX::find(&function)?,
            structures,
            function,
        })
    }

    /// The function underneath.
    pub fn function(&self) -> &F {
        &self.function
    }

    /// All virtio capabilities, in list order.
    pub fn structures(&self) -> &[Structure] {
        &self.structures
    }

    /// Where the common configuration is.
    pub fn common_region(&self) -> Region {
        self.common
    }

    /// Where the notification structure is.
    pub fn notify_region(&self) -> Region {
        self.notify
    }

    /// Bytes per unit of `queue_notify_off`.
    pub fn notify_multiplier(&self) -> u32 {
        self.notify_multiplier
    }

    /// Where the ISR status is.
    pub fn isr_region(&self) -> Region {
        self.isr
    }

    /// Where the device configuration is, if there is one.
    pub fn device_region(&self) -> Option<Region> {
        self.device
    }

    /// Where in configuration space the window to the BARs is.
    pub fn window(&self) -> Option<u16> {
        self.window
    }

    /// The MSI-X capability.
    pub fn msix(&self) -> Option<&MsiX> {
        self.msix.as_ref()
    }

    /// Reads a register of the common configuration.
    pub fn get<T: Word>(&self, register: Register<T>) -> T {
        self.function.get(self.common, register)
    }

    /// Writes a register of the common configuration.
    pub fn set<T: Word>(&self, register: Register<T>, value: T) {
        self.function.set(self.common, register, value);
    }

    // Status and features ------------------------------------------------------------------------------------------

    /// The device status.
    pub fn status(&self) -> u8 {
        self.get(common::DEVICE_STATUS)
    }

    /// Adds bits to the device status.
    pub fn add_status(&self, bits: u8) {
        self.set(common::DEVICE_STATUS, self.status() | bits);
    }

    /// Resets the device and waits until it shows that it is done.
    pub fn reset(&self) -> Result<(), TransportError> {
        self.set(common::DEVICE_STATUS, 0);
        let done = self.function.wait_until(PATIENCE, || self.status() == 0);
        done.then_some(())
            .ok_or(TransportError::Timeout("device reset"))
    }

    /// What the device offers, bits 0 to 63.
    pub fn offered(&self) -> u64 {
        let [low, high] = [0, 1].map(|select| {
            self.set(common::DEVICE_FEATURE_SELECT, select);
            u64::from(self.get(common::DEVICE_FEATURE))
        });
        low | high << 32
    }

    /// Writes the accepted features, bits 0 to 63.
    pub fn accept(&self, features: u64) {
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(common::DRIVER_FEATURE_SELECT, select);
            self.set(common::DRIVER_FEATURE, half);
        }
    }

    /// Reads back the accepted features, bits 0 to 63.
    pub fn accepted(&self) -> u64 {
        let [low, high] = [0, 1].map(|select| {
            self.set(common::DRIVER_FEATURE_SELECT, select);
            u64::from(self.get(common::DRIVER_FEATURE))
        });
        low | high << 32
    }

    /// Brings the device from reset to FEATURES_OK with those of `wanted` that it offers, and
    /// VIRTIO_F_VERSION_1. Returns what was agreed on.
    pub fn negotiate(&self, wanted: u64) -> Result<u64, TransportError> {
        self.reset()?;
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        let features = self.offered() & (wanted | feature::VERSION_1);
        self.accept(features);
        self.add_status(status::FEATURES_OK);
        if self.status() & status::FEATURES_OK == 0 || features & feature::VERSION_1 == 0 {
            self.add_status(status::FAILED);
            return Err(TransportError::Refused(features));
        }
        Ok(features)
    }

    /// Sets DRIVER_OK.
    pub fn start(&self) {
        self.add_status(status::DRIVER_OK);
    }

    // Queues -------------------------------------------------------------------------------------------------------

    /// Selects the queue the queue registers are about.
    pub fn select(&self, queue: u16) {
        self.set(common::QUEUE_SELECT, queue);
    }

    /// The size queue `queue` has now; 0 if there is no such queue.
    pub fn queue_size(&self, queue: u16) -> u16 {
        self.select(queue);
        self.get(common::QUEUE_SIZE)
    }

    /// Programs size, addresses and vector of `queue`, without enabling it.
    pub fn program_queue(
        &self,
        queue: u16,
        layout: &Layout,
        vector: u16,
    ) -> Result<(), TransportError> {
        let max = self.queue_size(queue);
        if layout.size > max {
            return Err(TransportError::NoQueue(queue));
        }
        self.set(common::QUEUE_SIZE, layout.size);
        let halves = [
            (
                common::QUEUE_DESC,
                common::QUEUE_DESC_HIGH,
                layout.descriptors,
            ),
            (
                common::QUEUE_DRIVER,
                common::QUEUE_DRIVER_HIGH,
                layout.available,
            ),
            (common::QUEUE_DEVICE, common::QUEUE_DEVICE_HIGH, layout.used),
        ];
        for (low, high, address) in halves {
            self.set(low, address as u32);
            self.set(high, (address >> 32) as u32);
        }
        self.set(common::QUEUE_MSIX_VECTOR, vector);
        if self.get(common::QUEUE_MSIX_VECTOR) != vector {
            return Err(TransportError::VectorRefused(vector));
        }
        Ok(())
    }

    /// Programs and enables `queue`.
    pub fn enable_queue(
        &self,
        queue: u16,
        layout: &Layout,
        vector: u16,
    ) -> Result<(), TransportError> {
        self.program_queue(queue, layout, vector)?;
        self.set(common::QUEUE_ENABLE, 1);
        Ok(())
    }

    /// Resets `queue` and waits until the device shows that it is done.
    pub fn reset_queue(&self, queue: u16) -> Result<(), TransportError> {
        self.select(queue);
        self.set(common::QUEUE_RESET, 1);
        let idle = || self.get(common::QUEUE_RESET) == 0 && self.get(common::QUEUE_ENABLE) == 0;
        let done = self.function.wait_until(PATIENCE, idle);
        done.then_some(())
            .ok_or(TransportError::Timeout("queue reset"))
    }

    /// Where `queue` is notified: the 16 bits at this place in a BAR.
    pub fn notify_place(&self, queue: u16) -> Region {
        self.select(queue);
        let unit: u16 = self.get(common::QUEUE_NOTIFY_OFF);
        Region {
            bar: self.notify.bar,
            offset: self.notify.offset + u64::from(unit) * u64::from(self.notify_multiplier),
            len: 2,
        }
    }

    /// Notifies `queue`.
    pub fn notify(&self, queue: u16) {
        let place = self.notify_place(queue);
        self.function.set(place, Register::<u16>::at(0), queue);
    }

    /// Reads the ISR status, which clears it.
    pub fn isr(&self) -> u8 {
        self.function.get(self.isr, Register::<u8>::at(0))
    }

    /// Sets the vector for configuration changes.
    pub fn set_config_vector(&self, vector: u16) -> Result<(), TransportError> {
        self.set(common::CONFIG_MSIX_VECTOR, vector);
        if vector != NO_VECTOR && self.get(common::CONFIG_MSIX_VECTOR) != vector {
            return Err(TransportError::VectorRefused(vector));
        }
        Ok(())
    }

    // Configuration ------------------------------------------------------------------------------------------------

    /// Reads a register of the device configuration, once. All ones if there is no such configuration.
    pub fn device_get<T: Word>(&self, register: Register<T>) -> T {
        match self.device {
            Some(region) => self.function.get(region, register),
            None => {
                let mut ones = T::Bytes::default();
                ones.as_mut().fill(0xff);
                T::from_le(ones)
            }
        }
    }

    /// Writes a register of the device configuration.
    pub fn device_set<T: Word>(&self, register: Register<T>, value: T) {
        if let Some(region) = self.device {
            self.function.set(region, register, value);
        }
    }

    /// Runs `read` until no configuration change fell into it.
    pub fn device_read<T>(&self, mut read: impl FnMut(&Self) -> T) -> T {
        loop {
            let before = self.get(common::CONFIG_GENERATION);
            let value = read(self);
            if self.get(common::CONFIG_GENERATION) == before {
                return value;
            }
        }
    }

    /// Reads 1, 2 or 4 bytes of a BAR through the window in configuration space. `None` if there is no window.
    pub fn window_get<T: Word>(&self, bar: u8, offset: u32) -> Option<T> {
        let window = self.aim::<T>(bar, offset)?;
        Some(self.function.config(window + 16))
    }

    /// Writes 1, 2 or 4 bytes of a BAR through the window in configuration space. `None` if there is no window.
    pub fn window_set<T: Word>(&self, bar: u8, offset: u32, value: T) -> Option<()> {
        let window = self.aim::<T>(bar, offset)?;
        self.function.set_config(window + 16, value);
        Some(())
    }

    fn aim<T: Word>(&self, bar: u8, offset: u32) -> Option<u16> {
        let window = self.window?;
        self.function.set_config(window + 4, bar);
        self.function.set_config(window + 8, offset);
        self.function.set_config(window + 12, size_of::<T>() as u32);
        Some(window)
    }
}
