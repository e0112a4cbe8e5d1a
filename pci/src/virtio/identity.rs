//! What a virtio function says it is in its header (virtio 1.4, "PCI Device Discovery").

use devices::virtio::DeviceType;

use crate::header::Identity;

/// Vendor ID of virtio.
pub const VENDOR: u16 = 0x1af4;
/// Device ID of device type 0.
const DEVICE_BASE: u16 = 0x1040;
/// Revision of a non-transitional device.
const REVISION: u8 = 1;
/// Subsystem ID: 0x40 or higher, so that no legacy driver binds (D2).
const SUBSYSTEM: u16 = 0x0040;

/// The identity of a function of this device type.
pub fn identity(device_type: DeviceType) -> Identity {
    Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + device_type as u16,
        revision: REVISION,
        class: class(device_type),
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    }
}

/// The class code. Drivers go by the IDs; this is what tools show.
fn class(device_type: DeviceType) -> u32 {
    match device_type {
        DeviceType::Net => 0x02_00_00,
        DeviceType::Block => 0x01_00_00,
        DeviceType::Console => 0x07_80_00,
        DeviceType::Rng => 0xff_00_00,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn d2_ids_follow_the_device_type() {
        for (device_type, device, class) in [
            (DeviceType::Net, 0x1041, 0x020000),
            (DeviceType::Block, 0x1042, 0x010000),
            (DeviceType::Console, 0x1043, 0x078000),
            (DeviceType::Rng, 0x1044, 0xff0000),
        ] {
            let identity = identity(device_type);
            assert_eq!((identity.vendor, identity.device), (0x1af4, device));
            assert_eq!(identity.class, class);
            assert!(identity.revision >= 1 && identity.subsystem >= 0x40);
        }
    }
}
