//! A virtio function: its device context, and what a context leaves out.

use std::collections::BTreeMap;

use devices::admin::queue::NAME as ADMIN_QUEUE;
use devices::state::{
    DeviceState, Kept, PackedState, QueueState, RingState, ServiceState, SplitState, TransientState,
};
use devices::transport_vq::NAME as TRANSPORT_QUEUE;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::context::{Chain, Context, Position};
use super::error::{At, Invalid, check_ascending, convert_all};
use super::hex::{Hex, HexBytes};
use super::managed::Managed;
use super::version::Version;

/// State of a virtio function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Function {
    /// Version of this section.
    pub version: Version<1>,
    /// Name of the function, as `tern info` shows it: `disk0`, `pf0`, `pf0-vf1`.
    pub name: String,
    /// Its device context.
    pub context: Context,
    /// State that a device context leaves out.
    pub transient: Transient,
}

/// State of a virtio function that its device context leaves out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Transient {
    /// ISR status.
    pub isr: u8,
    /// The driver was not yet notified of a configuration change or of DEVICE_NEEDS_RESET.
    pub config_pending: bool,
    /// Virtqueues with used buffers that the driver was not notified of yet, ascending. The administration virtqueue, or
    /// the transport virtqueue, has the number after those of the device.
    pub unsignalled: Vec<u16>,
    /// Administration virtqueue, of an owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin_queue: Option<Queue>,
    /// Transport virtqueue, of a management device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transport_queue: Option<Queue>,
    /// Managed devices, of a management device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub managed: Option<Managed>,
    /// State of the device type's own.
    pub device: Device,
}

/// State of one device type that is neither in its virtqueues nor in its configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Device {
    /// There is none.
    None,
    /// virtio-console.
    Console {
        /// Bytes read from the input and not yet given to the driver.
        input: HexBytes,
    },
}

/// A virtqueue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Queue {
    /// `queue_size`.
    pub size: u16,
    /// `queue_msix_vector`.
    pub vector: u16,
    /// `queue_desc`, a guest physical address.
    pub descriptor_area: Hex<u64>,
    /// `queue_driver`, a guest physical address.
    pub driver_area: Hex<u64>,
    /// `queue_device`, a guest physical address.
    pub device_area: Hex<u64>,
    /// `queue_enable`.
    pub enabled: bool,
    /// The driver stopped the queue through the device-state capability.
    pub stopped: bool,
    /// Available-ring entry the device fetches next, modulo 2^16. Of split rings only, as `next_used` and `owned`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_available: Option<u16>,
    /// Used-ring entry the device writes next, modulo 2^16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_used: Option<u16>,
    /// The driver wrote where the queue goes on, and nothing was fetched since.
    pub restarts: bool,
    /// Head descriptors of the chains that the device fetched and did not use, in the order in which they were fetched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owned: Option<Vec<u16>>,
    /// Where the device is in a packed ring, instead of the three.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packed: Option<PackedRing>,
}

/// Where the device is in a packed ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PackedRing {
    /// Descriptor the device fetches next.
    pub available: Position,
    /// Descriptor the device uses next.
    pub used: Position,
    /// Chains that the device fetched and did not use, in the order in which they were fetched.
    pub chains: Vec<Chain>,
}

impl Function {
    /// The JSON of function `name`.
    pub fn of(name: impl Into<String>, context: Context, transient: &TransientState) -> Self {
        Self {
            version: Version::default(),
            name: name.into(),
            context,
            transient: Transient::of(transient),
        }
    }

    /// The device context in bytes.
    ///
    /// # Errors
    ///
    /// A value that no field has.
    pub fn context_bytes(&self) -> Result<Vec<u8>, Invalid> {
        self.context.encode().field("context")
    }

    /// What the context leaves out.
    ///
    /// # Errors
    ///
    /// A value that is out of range in every function.
    pub fn transient(&self) -> Result<TransientState, Invalid> {
        self.transient.plain().field("transient")
    }
}

impl Transient {
    /// The JSON of `state`.
    pub fn of(state: &TransientState) -> Self {
        let TransientState {
            isr,
            config_pending,
            unsignalled,
            services,
            device,
        } = state;
        let queue = |name| services.get(name).map(|service| Queue::of(&service.queue));
        Self {
            isr: *isr,
            config_pending: *config_pending,
            unsignalled: unsignalled.clone(),
            admin_queue: queue(ADMIN_QUEUE),
            transport_queue: queue(TRANSPORT_QUEUE),
            managed: match services.get(TRANSPORT_QUEUE).map(|service| &service.kept) {
                Some(Kept::Managed(state)) => Some(Managed::of(state)),
                Some(Kept::Nothing) | None => None,
            },
            device: Device::of(device),
        }
    }

    /// The state.
    ///
    /// # Errors
    ///
    /// A value that is out of range in every function.
    pub fn plain(&self) -> Result<TransientState, Invalid> {
        check_ascending(&self.unsignalled).field("unsignalled")?;
        let managed = self.managed.as_ref().map(Managed::plain).transpose();
        let managed = managed.field("managed")?;
        if managed.is_some() && self.transport_queue.is_none() {
            let reason = "is there, and the transport virtqueue is not";
            return Err(Invalid::new(reason.to_owned())).field("managed");
        }
        let mut services = BTreeMap::new();
        for (name, field, queue, kept) in [
            (ADMIN_QUEUE, "admin_queue", &self.admin_queue, Kept::Nothing),
            (
                TRANSPORT_QUEUE,
                "transport_queue",
                &self.transport_queue,
                managed.map_or(Kept::Nothing, Kept::Managed),
            ),
        ] {
            if let Some(queue) = queue {
                let queue = queue.plain().field(field)?;
                services.insert(name, ServiceState { queue, kept });
            }
        }
        Ok(TransientState {
            isr: self.isr,
            config_pending: self.config_pending,
            unsignalled: self.unsignalled.clone(),
            services,
            device: self.device.plain(),
        })
    }
}

impl Device {
    fn of(state: &DeviceState) -> Self {
        match state {
            DeviceState::None => Self::None,
            DeviceState::Console { input } => Self::Console {
                input: HexBytes(input.clone()),
            },
        }
    }

    fn plain(&self) -> DeviceState {
        match self {
            Self::None => DeviceState::None,
            Self::Console { input } => DeviceState::Console {
                input: input.0.clone(),
            },
        }
    }
}

impl Queue {
    /// The JSON of `state`.
    pub fn of(state: &QueueState) -> Self {
        let QueueState {
            size,
            vector,
            descriptor_area,
            driver_area,
            device_area,
            enabled,
            stopped,
            restarts,
            ring,
        } = state;
        let queue = Self {
            size: *size,
            vector: *vector,
            descriptor_area: Hex(*descriptor_area),
            driver_area: Hex(*driver_area),
            device_area: Hex(*device_area),
            enabled: *enabled,
            stopped: *stopped,
            restarts: *restarts,
            next_available: None,
            next_used: None,
            owned: None,
            packed: None,
        };
        match ring {
            RingState::Split(ring) => Self {
                next_available: Some(ring.next_available),
                next_used: Some(ring.next_used),
                owned: Some(ring.owned.clone()),
                ..queue
            },
            RingState::Packed(ring) => Self {
                packed: Some(PackedRing {
                    available: Position::of(ring.next_available),
                    used: Position::of(ring.next_used),
                    chains: ring.owned.iter().map(Chain::of).collect(),
                }),
                ..queue
            },
        }
    }

    /// The state.
    ///
    /// # Errors
    ///
    /// Chains that a queue of this size does not have; both kinds of rings, or none.
    pub fn plain(&self) -> Result<QueueState, Invalid> {
        Ok(QueueState {
            size: self.size,
            vector: self.vector,
            descriptor_area: self.descriptor_area.0,
            driver_area: self.driver_area.0,
            device_area: self.device_area.0,
            enabled: self.enabled,
            stopped: self.stopped,
            restarts: self.restarts,
            ring: match &self.packed {
                Some(packed) => RingState::Packed(self.packed_ring(packed)?),
                None => RingState::Split(self.split_rings()?),
            },
        })
    }

    fn split_rings(&self) -> Result<SplitState, Invalid> {
        let missing = |name| {
            let reason = "is missing, and there is no `packed` instead";
            Invalid::at(name, reason)
        };
        let owned = self.owned.as_deref().ok_or_else(|| missing("owned"))?;
        let size = self.size;
        for (index, head) in owned.iter().enumerate() {
            if *head >= size {
                let reason = format!("there is no descriptor {head} in a queue of size {size}");
                return Err(Invalid::new(reason)).entry(index).field("owned");
            }
        }
        if owned.len() > size.into() {
            let count = owned.len();
            let reason = format!("{count} chains are too many for a queue of size {size}");
            return Err(Invalid::new(reason)).field("owned");
        }
        Ok(SplitState {
            next_available: self
                .next_available
                .ok_or_else(|| missing("next_available"))?,
            next_used: self.next_used.ok_or_else(|| missing("next_used"))?,
            owned: owned.to_vec(),
        })
    }

    fn packed_ring(&self, ring: &PackedRing) -> Result<PackedState, Invalid> {
        let names = ["next_available", "next_used", "owned"];
        let split = [
            self.next_available.is_some(),
            self.next_used.is_some(),
            self.owned.is_some(),
        ];
        if let Some((name, _)) = names.into_iter().zip(split).find(|(_, is_there)| *is_there) {
            return Err(Invalid::at(name, "is there although `packed` is"));
        }
        let position = |position: Position, name| position.plain().field(name).field("packed");
        let count: u64 = ring.chains.iter().map(|c| u64::from(c.descriptors)).sum();
        if count > self.size.into() || ring.chains.len() > self.size.into() {
            let reason = format!(
                "{} chains of {count} descriptors are too many for a queue of size {}",
                ring.chains.len(),
                self.size
            );
            return Err(Invalid::new(reason)).field("chains").field("packed");
        }
        let owned = convert_all(&ring.chains, Chain::plain);
        Ok(PackedState {
            next_available: position(ring.available, "available")?,
            next_used: position(ring.used, "used")?,
            owned: owned.field("chains").field("packed")?,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use devices::state::{ManagedState, ManagerState, MessageState};

    use super::*;

    fn queue() -> QueueState {
        QueueState {
            size: 8,
            vector: 0xffff,
            descriptor_area: 0x1000,
            driver_area: 0x2000,
            device_area: u64::MAX,
            enabled: true,
            stopped: false,
            restarts: true,
            ring: RingState::Split(SplitState {
                next_available: 7,
                next_used: 5,
                owned: vec![7, 0],
            }),
        }
    }

    fn managed() -> ManagerState {
        let message = MessageState {
            address: 0xfee0_0000,
            data: 33,
            enabled: true,
            masked: true,
            pending: true,
        };
        ManagerState {
            next_id: 8,
            devices: vec![ManagedState {
                id: 7,
                name: "manager0-1".to_owned(),
                features: 1 << 63 | 1,
                config: MessageState::default(),
                queues: vec![message, MessageState::default()],
            }],
        }
    }

    pub fn sample() -> TransientState {
        TransientState {
            isr: 3,
            config_pending: true,
            unsignalled: vec![0, 2],
            services: [
                (
                    ADMIN_QUEUE,
                    ServiceState {
                        queue: queue(),
                        kept: Kept::Nothing,
                    },
                ),
                (
                    TRANSPORT_QUEUE,
                    ServiceState {
                        queue: queue(),
                        kept: Kept::Managed(managed()),
                    },
                ),
            ]
            .into(),
            device: DeviceState::Console {
                input: b"ls\n".to_vec(),
            },
        }
    }

    #[test]
    fn the_state_is_the_same_after_json() {
        for state in [TransientState::default(), sample()] {
            let text = serde_json::to_string(&Transient::of(&state)).unwrap();
            let read: Transient = serde_json::from_str(&text).unwrap();
            assert_eq!(read.plain(), Ok(state), "{text}");
        }
    }

    /// A change, and why what it leaves is refused.
    type Case = (fn(&mut Function), &'static str);

    #[test]
    fn values_out_of_range_are_named() {
        let refusal = |change: fn(&mut Function)| {
            let mut function = Function::of("disk0", Context::default(), &sample());
            change(&mut function);
            function.transient().unwrap_err().to_string()
        };
        let cases: [Case; 3] = [
            (
                |f| f.transient.unsignalled = vec![1, 1],
                "transient.unsignalled[1]: 1 follows 1; the list ascends",
            ),
            (
                |f| f.transient.admin_queue.as_mut().unwrap().owned = Some(vec![7, 8]),
                "transient.admin_queue.owned[1]: there is no descriptor 8 in a queue of size 8",
            ),
            (
                |f| f.transient.admin_queue.as_mut().unwrap().owned = Some(vec![1; 9]),
                "transient.admin_queue.owned: 9 chains are too many for a queue of size 8",
            ),
        ];
        for (change, expected) in cases {
            assert_eq!(refusal(change), expected);
        }
    }
}
