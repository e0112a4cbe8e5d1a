//! A state that is being put together from its fields.

use super::error::ContextError;
use super::field::{Field, FieldId, FieldType};
use super::value::{CommonConfig, OwnedChains, QueueConfig, QueueStatus, SplitRuntime};
use crate::state::{FunctionState, QueueState, RegisterState, Shape};

/// The fields that came so far, each checked against the device and against the others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Draft {
    offered: Option<u128>,
    accepted: Option<u128>,
    registers: Option<CommonConfig>,
    queues: Vec<QueueDraft>,
    config: Option<Vec<u8>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct QueueDraft {
    config: Option<QueueConfig>,
    runtime: Option<SplitRuntime>,
    owned: Option<Vec<u16>>,
    status: Option<QueueStatus>,
}

impl Draft {
    /// Nothing yet of a device with so many queues.
    pub fn new(queues: usize) -> Self {
        Self {
            queues: vec![QueueDraft::default(); queues],
            ..Self::default()
        }
    }

    /// True if `id` is there already.
    pub fn has(&self, id: FieldId) -> bool {
        let queue = id
            .queue
            .and_then(|index| self.queues.get(usize::from(index)));
        match id.kind {
            FieldType::DeviceFeatures => self.offered.is_some(),
            FieldType::DriverFeatures => self.accepted.is_some(),
            FieldType::CommonConfig => self.registers.is_some(),
            FieldType::DeviceConfig => self.config.is_some(),
            FieldType::QueueConfig => queue.is_some_and(|q| q.config.is_some()),
            FieldType::SplitRuntime => queue.is_some_and(|q| q.runtime.is_some()),
            FieldType::OwnedChains => queue.is_some_and(|q| q.owned.is_some()),
            FieldType::QueueStatus => queue.is_some_and(|q| q.status.is_some()),
            FieldType::PackedRuntime | FieldType::OwnedPackedChains => false,
        }
    }

    /// Adds `field`. A field that is refused changes nothing.
    pub fn add(&mut self, field: Field, shape: &Shape) -> Result<(), ContextError> {
        let id = field.id();
        if self.has(id) {
            return Err(ContextError::Duplicate(id));
        }
        match field {
            Field::DeviceFeatures(value) => self.offered = Some(value),
            Field::DriverFeatures(value) => self.accepted = Some(value),
            Field::CommonConfig(value) => {
                let (found, expected) = (value.num_queues.get(), self.queues.len());
                if usize::from(found) != expected {
                    return Err(ContextError::QueueCount { found, expected });
                }
                self.registers = Some(value);
            }
            Field::QueueConfig(value) => {
                let queue = self.queue(id)?;
                if let Some(owned) = &queue.owned {
                    check_chains(FieldType::OwnedChains.of(id.queue), owned, value.size.get())?;
                }
                queue.config = Some(value);
            }
            Field::SplitRuntime(value) => self.queue(id)?.runtime = Some(value),
            Field::OwnedChains(OwnedChains {
                queue: index,
                heads,
            }) => {
                let most = shape.queue_sizes.get(usize::from(index)).copied();
                let queue = self.queue(id)?;
                let size = queue.config.map_or(u16::MAX, |config| config.size.get());
                check_chains(id, &heads, size.min(most.unwrap_or(0)))?;
                queue.owned = Some(heads);
            }
            Field::QueueStatus(value) => self.queue(id)?.status = Some(value),
            Field::DeviceConfig(value) => self.config = Some(value),
            Field::PackedRuntime(_) | Field::OwnedPackedChains(_) => {
                return Err(ContextError::Unsupported(id.kind));
            }
        }
        Ok(())
    }

    /// What came so far. Added to another draft of the same device, in this order, it makes an equal one.
    pub fn fields(&self) -> Vec<Field> {
        let features = self.offered.map(Field::DeviceFeatures);
        let mut fields: Vec<_> = features.into_iter().collect();
        fields.extend(self.accepted.map(Field::DriverFeatures));
        fields.extend(self.registers.map(Field::CommonConfig));
        for (index, queue) in (0..).zip(&self.queues) {
            fields.extend(queue.config.map(Field::QueueConfig));
            fields.extend(queue.runtime.map(Field::SplitRuntime));
            let owned = queue.owned.clone();
            let chains = owned.map(|heads| OwnedChains {
                queue: index,
                heads,
            });
            fields.extend(chains.map(Field::OwnedChains));
            fields.extend(queue.status.map(Field::QueueStatus));
        }
        fields.extend(self.config.clone().map(Field::DeviceConfig));
        fields
    }

    /// Takes back what was added as `id`.
    pub fn remove(&mut self, id: FieldId) {
        let index = id.queue.map(usize::from);
        let queue = index.and_then(|index| self.queues.get_mut(index));
        match (id.kind, queue) {
            (FieldType::DeviceFeatures, _) => self.offered = None,
            (FieldType::DriverFeatures, _) => self.accepted = None,
            (FieldType::CommonConfig, _) => self.registers = None,
            (FieldType::DeviceConfig, _) => self.config = None,
            (FieldType::QueueConfig, Some(queue)) => queue.config = None,
            (FieldType::SplitRuntime, Some(queue)) => queue.runtime = None,
            (FieldType::OwnedChains, Some(queue)) => queue.owned = None,
            (FieldType::QueueStatus, Some(queue)) => queue.status = None,
            // Never added.
            _ => {}
        }
    }

    fn queue(&mut self, id: FieldId) -> Result<&mut QueueDraft, ContextError> {
        let queues = self.queues.len();
        let index = id.queue.map(usize::from);
        index
            .and_then(|index| self.queues.get_mut(index))
            .ok_or(ContextError::NoSuchQueue { field: id, queues })
    }

    /// The state, now that no more fields come.
    pub fn finish(&self, shape: &Shape) -> Result<FunctionState, ContextError> {
        let offered = required(self.offered, FieldType::DeviceFeatures)?;
        let registers = required(self.registers, FieldType::CommonConfig)?;
        let queues = self.queues.iter().zip(0..=u16::MAX);
        let queues = queues.map(|(queue, index)| queue.finish(index));
        let queues = queues.collect::<Result<_, _>>()?;
        let config = match shape.config_len {
            0 => Vec::new(),
            _ => required(self.config.clone(), FieldType::DeviceConfig)?,
        };
        Ok(FunctionState {
            offered,
            // The draft of the migration commands has no field for what the driver accepted (G3-d).
            accepted: self.accepted.unwrap_or(offered),
            registers: RegisterState {
                device_feature_select: registers.device_feature_select.get(),
                driver_feature_select: registers.driver_feature_select.get(),
                config_vector: registers.config_vector.get(),
                num_queues: registers.num_queues.get(),
                status: registers.status,
                config_generation: registers.config_generation,
                queue_select: registers.queue_select.get(),
                state_queue_select: self.state_queue_select(),
            },
            queues,
            config,
        })
    }
}

impl Draft {
    /// The queue that a VQ_STATUS calls selected. If all that came say they are not, then one that does not exist is; and 0
    /// without any.
    fn state_queue_select(&self) -> u16 {
        let statuses = || self.queues.iter().filter_map(|queue| queue.status);
        let selected = statuses().find(|status| status.has(QueueStatus::SELECTED));
        match (selected, statuses().next()) {
            (Some(status), _) => status.queue.get(),
            (None, Some(_)) => u16::MAX,
            (None, None) => 0,
        }
    }
}

impl QueueDraft {
    fn finish(&self, index: u16) -> Result<QueueState, ContextError> {
        let missing = |kind: FieldType| ContextError::Missing(kind.of(index));
        let config = self.config.ok_or(missing(FieldType::QueueConfig))?;
        let runtime = self.runtime.ok_or(missing(FieldType::SplitRuntime))?;
        let next_available = runtime.next_available.get();
        let owned = self.owned.clone().unwrap_or_default();
        let derived = next_available.wrapping_sub(owned.len() as u16);
        let enabled = runtime.enabled != 0;
        let status = self.status;
        Ok(QueueState {
            size: config.size.get(),
            vector: config.vector.get(),
            descriptor_area: config.descriptor_area.get(),
            driver_area: config.driver_area.get(),
            device_area: config.device_area.get(),
            enabled,
            stopped: status.is_some_and(|status| status.running == 0),
            next_available,
            next_used: status.map_or(if enabled { derived } else { 0 }, |s| s.next_used.get()),
            restarts: status.is_some_and(|status| status.has(QueueStatus::RESTARTS)),
            owned,
        })
    }
}

fn required<T>(value: Option<T>, kind: FieldType) -> Result<T, ContextError> {
    value.ok_or(ContextError::Missing(kind.of(None)))
}

/// Chains of a queue of `size`, listed in `field`: not more than it has descriptors, and none outside (G3-h).
fn check_chains(field: FieldId, heads: &[u16], size: u16) -> Result<(), ContextError> {
    if heads.len() > size.into() {
        let count = heads.len();
        return Err(ContextError::TooManyChains { field, count, size });
    }
    match heads.iter().find(|head| **head >= size) {
        Some(&head) => Err(ContextError::Head { field, head, size }),
        None => Ok(()),
    }
}
