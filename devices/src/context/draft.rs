//! A state that is being put together from its fields.

use super::error::ContextError;
use super::field::{Field, FieldId, FieldType};
use super::value::{
    CommonConfig, OwnedChains, OwnedPackedChains, PackedRuntime, QueueConfig, QueueStatus,
    SplitRuntime,
};
use crate::state::{
    FunctionState, OwnedChain, PackedState, QueueState, RegisterState, RingState, Shape, SplitState,
};
use crate::virtio::{Position, feature};

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
    ring: Option<RingDraft>,
    status: Option<QueueStatus>,
}

/// What came of one kind of rings.
#[derive(Clone, Debug, PartialEq, Eq)]
enum RingDraft {
    Split {
        runtime: Option<SplitRuntime>,
        owned: Option<Vec<u16>>,
    },
    Packed {
        runtime: Option<PackedRuntime>,
        owned: Option<Vec<OwnedChain>>,
    },
}

impl RingDraft {
    const SPLIT: Self = Self::Split {
        runtime: None,
        owned: None,
    };
    const PACKED: Self = Self::Packed {
        runtime: None,
        owned: None,
    };

    /// True if a field of this type came.
    fn has(&self, kind: FieldType) -> bool {
        match (kind, self) {
            (FieldType::SplitRuntime, Self::Split { runtime, .. }) => runtime.is_some(),
            (FieldType::OwnedChains, Self::Split { owned, .. }) => owned.is_some(),
            (FieldType::PackedRuntime, Self::Packed { runtime, .. }) => runtime.is_some(),
            (FieldType::OwnedPackedChains, Self::Packed { owned, .. }) => owned.is_some(),
            _ => false,
        }
    }

    /// Takes back the field of this type. True if none is left.
    fn remove(&mut self, kind: FieldType) -> bool {
        match (kind, &mut *self) {
            (FieldType::SplitRuntime, Self::Split { runtime, .. }) => *runtime = None,
            (FieldType::OwnedChains, Self::Split { owned, .. }) => *owned = None,
            (FieldType::PackedRuntime, Self::Packed { runtime, .. }) => *runtime = None,
            (FieldType::OwnedPackedChains, Self::Packed { owned, .. }) => *owned = None,
            // Never added.
            _ => {}
        }
        *self == Self::SPLIT || *self == Self::PACKED
    }

    /// The chains fit a queue of `size`, which has the number `queue`.
    fn check(&self, queue: Option<u16>, size: u16) -> Result<(), ContextError> {
        match self {
            Self::Split { owned, .. } => {
                let heads = owned.as_deref().unwrap_or_default();
                check_heads(FieldType::OwnedChains.of(queue), heads, size)
            }
            Self::Packed { owned, .. } => {
                let chains = owned.as_deref().unwrap_or_default();
                check_chains(FieldType::OwnedPackedChains.of(queue), chains, size)
            }
        }
    }
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
            FieldType::QueueStatus => queue.is_some_and(|q| q.status.is_some()),
            kind @ (FieldType::SplitRuntime
            | FieldType::OwnedChains
            | FieldType::PackedRuntime
            | FieldType::OwnedPackedChains) => {
                let ring = queue.and_then(|queue| queue.ring.as_ref());
                ring.is_some_and(|ring| ring.has(kind))
            }
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
                if let Some(ring) = &queue.ring {
                    ring.check(id.queue, value.size.get())?;
                }
                queue.config = Some(value);
            }
            Field::SplitRuntime(value) => {
                let (runtime, _) = self.queue(id)?.split(id)?;
                *runtime = Some(value);
            }
            Field::OwnedChains(OwnedChains { queue, heads }) => {
                let size = self.size(id, queue, shape)?;
                check_heads(id, &heads, size)?;
                let (_, owned) = self.queue(id)?.split(id)?;
                *owned = Some(heads);
            }
            Field::PackedRuntime(value) => {
                let (runtime, _) = self.queue(id)?.packed(id)?;
                *runtime = Some(value);
            }
            Field::OwnedPackedChains(OwnedPackedChains { queue, chains }) => {
                let size = self.size(id, queue, shape)?;
                check_chains(id, &chains, size)?;
                let (_, owned) = self.queue(id)?.packed(id)?;
                *owned = Some(chains);
            }
            Field::QueueStatus(value) => self.queue(id)?.status = Some(value),
            Field::DeviceConfig(value) => self.config = Some(value),
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
            match queue.ring.clone() {
                Some(RingDraft::Split { runtime, owned }) => {
                    fields.extend(runtime.map(Field::SplitRuntime));
                    let queue = index;
                    let owned = owned.map(|heads| OwnedChains { queue, heads });
                    fields.extend(owned.map(Field::OwnedChains));
                }
                Some(RingDraft::Packed { runtime, owned }) => {
                    fields.extend(runtime.map(Field::PackedRuntime));
                    let queue = index;
                    let owned = owned.map(|chains| OwnedPackedChains { queue, chains });
                    fields.extend(owned.map(Field::OwnedPackedChains));
                }
                None => {}
            }
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
            (FieldType::QueueStatus, Some(queue)) => queue.status = None,
            (kind, Some(queue)) => {
                let ring = queue.ring.as_mut();
                if ring.is_some_and(|ring| ring.remove(kind)) {
                    queue.ring = None;
                }
            }
            // Never added.
            (_, None) => {}
        }
    }

    fn queue(&mut self, id: FieldId) -> Result<&mut QueueDraft, ContextError> {
        let queues = self.queues.len();
        let index = id.queue.map(usize::from);
        index
            .and_then(|index| self.queues.get_mut(index))
            .ok_or(ContextError::NoSuchQueue { field: id, queues })
    }

    /// The most descriptors that `queue` can have, as far as is known.
    fn size(&mut self, id: FieldId, queue: u16, shape: &Shape) -> Result<u16, ContextError> {
        let most = shape.queue_sizes.get(usize::from(queue)).copied();
        let chosen = self.queue(id)?.config.map(|config| config.size.get());
        Ok(chosen.unwrap_or(u16::MAX).min(most.unwrap_or(0)))
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
            accepted: self.accepted.unwrap_or_else(|| self.presumed(offered)),
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
    /// What the driver accepted if no field says it, as in the draft of the migration commands (G3-d): all that is offered, but
    /// packed rings only if it has some.
    fn presumed(&self, offered: u128) -> u128 {
        let is_packed = |queue: &QueueDraft| matches!(queue.ring, Some(RingDraft::Packed { .. }));
        match self.queues.iter().any(is_packed) {
            true => offered,
            false => offered & !u128::from(feature::RING_PACKED),
        }
    }

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
    /// What came of its split rings.
    fn split(
        &mut self,
        id: FieldId,
    ) -> Result<(&mut Option<SplitRuntime>, &mut Option<Vec<u16>>), ContextError> {
        match self.ring.get_or_insert(RingDraft::SPLIT) {
            RingDraft::Split { runtime, owned } => Ok((runtime, owned)),
            RingDraft::Packed { .. } => Err(ContextError::Mixed(id)),
        }
    }

    /// What came of its packed ring.
    fn packed(
        &mut self,
        id: FieldId,
    ) -> Result<(&mut Option<PackedRuntime>, &mut Option<Vec<OwnedChain>>), ContextError> {
        match self.ring.get_or_insert(RingDraft::PACKED) {
            RingDraft::Packed { runtime, owned } => Ok((runtime, owned)),
            RingDraft::Split { .. } => Err(ContextError::Mixed(id)),
        }
    }

    fn finish(&self, index: u16) -> Result<QueueState, ContextError> {
        let missing = |kind: FieldType| ContextError::Missing(kind.of(index));
        let config = self.config.ok_or(missing(FieldType::QueueConfig))?;
        let status = self.status;
        let (enabled, ring) = match self.ring.clone() {
            Some(RingDraft::Packed { runtime, owned }) => {
                let runtime = runtime.ok_or(missing(FieldType::PackedRuntime))?;
                let ring = PackedState {
                    next_available: Position::from_raw(runtime.next_available.get()),
                    next_used: Position::from_raw(runtime.next_used.get()),
                    owned: owned.unwrap_or_default(),
                };
                (runtime.enabled, RingState::Packed(ring))
            }
            ring => {
                let (runtime, owned) = match ring {
                    Some(RingDraft::Split { runtime, owned }) => (runtime, owned),
                    _ => (None, None),
                };
                let runtime = runtime.ok_or(missing(FieldType::SplitRuntime))?;
                let owned = owned.unwrap_or_default();
                let next_available = runtime.next_available.get();
                // It is not in the fields of the draft of the migration commands.
                let derived = match runtime.enabled {
                    0 => 0,
                    _ => next_available.wrapping_sub(owned.len() as u16),
                };
                let ring = SplitState {
                    next_available,
                    next_used: status.map_or(derived, |status| status.next_used.get()),
                    owned,
                };
                (runtime.enabled, RingState::Split(ring))
            }
        };
        Ok(QueueState {
            size: config.size.get(),
            vector: config.vector.get(),
            descriptor_area: config.descriptor_area.get(),
            driver_area: config.driver_area.get(),
            device_area: config.device_area.get(),
            enabled: enabled != 0,
            stopped: status.is_some_and(|status| status.running == 0),
            restarts: status.is_some_and(|status| status.has(QueueStatus::RESTARTS)),
            ring,
        })
    }
}

fn required<T>(value: Option<T>, kind: FieldType) -> Result<T, ContextError> {
    value.ok_or(ContextError::Missing(kind.of(None)))
}

/// Chains of a queue of `size`, listed in `field`: not more than it has descriptors, and none outside (G3-h).
fn check_heads(field: FieldId, heads: &[u16], size: u16) -> Result<(), ContextError> {
    if heads.len() > size.into() {
        let count = heads.len();
        return Err(ContextError::TooManyChains { field, count, size });
    }
    match heads.iter().find(|head| **head >= size) {
        Some(&head) => Err(ContextError::Head { field, head, size }),
        None => Ok(()),
    }
}

/// Chains of a packed queue of `size`, listed in `field`: they have not more descriptors than it, and not more buffers (G3-i).
fn check_chains(field: FieldId, chains: &[OwnedChain], size: u16) -> Result<(), ContextError> {
    let taken = chains.iter().map(|chain| {
        // One without descriptors or with more buffers than these is refused when it is known of which device it is.
        u32::from(chain.descriptors).max(chain.buffers.len() as u32)
    });
    let count: u32 = taken.sum();
    if count > size.into() || chains.len() > size.into() {
        let count = count.max(chains.len() as u32);
        return Err(ContextError::TooManyDescriptors { field, count, size });
    }
    Ok(())
}
