//! The common configuration: the 64 bytes through which a driver negotiates and sets up queues (D2).

use std::sync::Arc;

use devices::bus::Effect;
use devices::virtio::{Cause, Interrupt, QueueInfo, VirtioFunction};

use super::vectors::Vectors;

/// A register of the common configuration, by its name in the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigMsixVector,
    NumQueues,
    DeviceStatus,
    ConfigGeneration,
    QueueSelect,
    QueueSize,
    QueueMsixVector,
    QueueEnable,
    QueueNotifyOff,
    QueueDesc,
    QueueDriver,
    QueueDevice,
    QueueNotifConfigData,
    QueueReset,
    AdminQueueIndex,
    AdminQueueNum,
}

/// Every register: byte offset and width in bytes. Together they fill the structure.
const FIELDS: [(Field, u64, u64); 20] = [
    (Field::DeviceFeatureSelect, 0, 4),
    (Field::DeviceFeature, 4, 4),
    (Field::DriverFeatureSelect, 8, 4),
    (Field::DriverFeature, 12, 4),
    (Field::ConfigMsixVector, 16, 2),
    (Field::NumQueues, 18, 2),
    (Field::DeviceStatus, 20, 1),
    (Field::ConfigGeneration, 21, 1),
    (Field::QueueSelect, 22, 2),
    (Field::QueueSize, 24, 2),
    (Field::QueueMsixVector, 26, 2),
    (Field::QueueEnable, 28, 2),
    (Field::QueueNotifyOff, 30, 2),
    (Field::QueueDesc, 32, 8),
    (Field::QueueDriver, 40, 8),
    (Field::QueueDevice, 48, 8),
    (Field::QueueNotifConfigData, 56, 2),
    (Field::QueueReset, 58, 2),
    (Field::AdminQueueIndex, 60, 2),
    (Field::AdminQueueNum, 62, 2),
];

/// Which part of a register a write covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Whole,
    /// Bits 31:0 of a 64-bit register (B-53).
    Low,
    /// Bits 63:32 of a 64-bit register (B-53).
    High,
}

impl Part {
    fn merge(self, old: u64, value: u64) -> u64 {
        match self {
            Self::Whole => value,
            Self::Low => old & !0xffff_ffff | value & 0xffff_ffff,
            Self::High => old & 0xffff_ffff | value << 32,
        }
    }
}

/// The registers, as a structure in a BAR. What they hold is the function's, but for the vectors.
pub struct CommonConfig {
    vectors: Arc<Vectors>,
}

impl CommonConfig {
    /// The common configuration of a function with these vectors.
    pub fn new(vectors: Arc<Vectors>) -> Self {
        Self { vectors }
    }

    /// Reads at byte `offset`. Drivers must read whole registers; other sizes get the bytes that are there, and bytes
    /// beyond the structure read 0. Reading has no side effect.
    pub fn read(&self, function: &VirtioFunction, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let end = offset.saturating_add(data.len() as u64);
        for (field, at, width) in FIELDS {
            if at >= end || offset >= at + width {
                continue;
            }
            let bytes = self.get(function, field).to_le_bytes();
            for (i, byte) in (at..at + width).zip(bytes) {
                let slot = i.checked_sub(offset).and_then(|i| usize::try_from(i).ok());
                if let Some(to) = slot.and_then(|i| data.get_mut(i)) {
                    *to = byte;
                }
            }
        }
    }

    /// Writes at byte `offset`: one whole register, or one half of a 64-bit one. Other writes are ignored.
    pub fn write(&self, function: &VirtioFunction, offset: u64, data: &[u8]) -> Effect {
        let len = data.len() as u64;
        let hit = FIELDS.iter().find_map(|(field, at, width)| {
            let part = match (*width, len) {
                (8, 4) if offset == *at => Part::Low,
                (8, 4) if offset == at + 4 => Part::High,
                _ if offset == *at && len == *width => Part::Whole,
                _ => return None,
            };
            Some((*field, part))
        });
        let Some((field, part)) = hit else {
            return Effect::None;
        };
        let mut bytes = [0; 8];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        self.set(function, field, part, u64::from_le_bytes(bytes))
    }

    fn get(&self, function: &VirtioFunction, field: Field) -> u64 {
        let selectors = function.selectors();
        let queue = |value: fn(&QueueInfo) -> u64| {
            let info = function.queue(selectors.queue);
            info.as_ref().map_or(0, value)
        };
        match field {
            Field::DeviceFeatureSelect => selectors.device_feature.into(),
            Field::DeviceFeature => function.device_features(selectors.device_feature).into(),
            Field::DriverFeatureSelect => selectors.driver_feature.into(),
            Field::DriverFeature => function.driver_features(selectors.driver_feature).into(),
            Field::ConfigMsixVector => self.vectors.vector(Cause::Config).into(),
            Field::NumQueues => function.num_queues().into(),
            Field::DeviceStatus => function.status().into(),
            Field::ConfigGeneration => function.config_generation().into(),
            Field::QueueSelect => selectors.queue.into(),
            Field::QueueSize => queue(|q| q.registers.size.into()),
            Field::QueueMsixVector => {
                let cause = Cause::Queue(selectors.queue);
                let there = function.queue(selectors.queue);
                there.map_or(0, |_| self.vectors.vector(cause).into())
            }
            Field::QueueEnable => queue(|q| q.enabled.into()),
            // A queue's notification register is numbered like the queue.
            Field::QueueNotifyOff => {
                let select = selectors.queue;
                function.queue(select).map_or(0, |_| select.into())
            }
            Field::QueueDesc => queue(|q| q.registers.descriptor_area),
            Field::QueueDriver => queue(|q| q.registers.driver_area),
            Field::QueueDevice => queue(|q| q.registers.device_area),
            Field::QueueReset => queue(|q| q.resetting.into()),
            // VIRTIO_F_NOTIF_CONFIG_DATA is not offered.
            Field::QueueNotifConfigData => 0,
            Field::AdminQueueIndex => function.admin_queue_index().into(),
            Field::AdminQueueNum => function.admin_queue_num().into(),
        }
    }

    fn set(&self, function: &VirtioFunction, field: Field, part: Part, value: u64) -> Effect {
        let selectors = function.selectors();
        let index = selectors.queue;
        match field {
            Field::DeviceFeatureSelect => function.select(|s| s.device_feature = value as u32),
            Field::DriverFeatureSelect => function.select(|s| s.driver_feature = value as u32),
            Field::DriverFeature => {
                function.set_driver_features(selectors.driver_feature, value as u32);
            }
            Field::ConfigMsixVector => {
                function.change_interrupt(Cause::Config, || self.vectors.set(Cause::Config, value));
            }
            Field::DeviceStatus => return function.write_status(value as u8),
            Field::QueueSelect => function.select(|s| s.queue = value as u16),
            Field::QueueSize => function.update_queue(index, |q| q.size = value as u16),
            Field::QueueMsixVector => {
                let cause = Cause::Queue(index);
                function.change_interrupt(cause, || self.vectors.set(cause, value));
            }
            Field::QueueEnable if value == 1 => return function.enable_queue(index),
            Field::QueueDesc => function.update_queue(index, |q| {
                q.descriptor_area = part.merge(q.descriptor_area, value);
            }),
            Field::QueueDriver => function.update_queue(index, |q| {
                q.driver_area = part.merge(q.driver_area, value);
            }),
            Field::QueueDevice => function.update_queue(index, |q| {
                q.device_area = part.merge(q.device_area, value);
            }),
            Field::QueueReset if value == 1 => return function.reset_queue(index),
            // Drivers must write nothing but 1 to these two.
            Field::QueueEnable | Field::QueueReset => {}
            // Read-only.
            Field::DeviceFeature
            | Field::NumQueues
            | Field::ConfigGeneration
            | Field::QueueNotifyOff
            | Field::QueueNotifConfigData
            | Field::AdminQueueIndex
            | Field::AdminQueueNum => {}
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn d2_the_registers_fill_64_bytes_without_overlap() {
        let end = FIELDS.iter().fold(0, |next, (field, at, width)| {
            assert_eq!(*at, next, "{field:?}");
            at + width
        });
        assert_eq!(end, super::super::layout::COMMON_LEN);
    }

    #[test]
    fn b53_halves_leave_each_other_alone() {
        let old = 0x1111_2222_3333_4444;
        assert_eq!(Part::Low.merge(old, 0xaaaa_bbbb), 0x1111_2222_aaaa_bbbb);
        assert_eq!(Part::High.merge(old, 0xaaaa_bbbb), 0xaaaa_bbbb_3333_4444);
        assert_eq!(Part::Whole.merge(old, 5), 5);
    }
}
