//! A virtio function: its device context, and what a context leaves out.

use devices::admin::queue::NAME as ADMIN_QUEUE;
use devices::state::{DeviceState, QueueState, TransientState};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::context::Context;
use super::error::{At, Invalid, check_ascending};
use super::hex::{Hex, HexBytes};
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
    /// Virtqueues with used buffers that the driver was not notified of yet, ascending. The administration virtqueue has
    /// the number after those of the device.
    pub unsignalled: Vec<u16>,
    /// Administration virtqueue, of an owner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin_queue: Option<Queue>,
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

/// A split virtqueue.
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
    /// Available-ring entry the device fetches next, modulo 2^16.
    pub next_available: u16,
    /// Used-ring entry the device writes next, modulo 2^16.
    pub next_used: u16,
    /// The driver wrote `last_avail_idx`, and nothing was fetched since.
    pub restarts: bool,
    /// Head descriptors of the chains that the device fetched and did not use, in the order in which they were fetched.
    pub owned: Vec<u16>,
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
        Self {
            isr: *isr,
            config_pending: *config_pending,
            unsignalled: unsignalled.clone(),
            admin_queue: services.get(ADMIN_QUEUE).map(Queue::of),
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
        let admin_queue = self.admin_queue.as_ref().map(Queue::plain).transpose();
        let admin_queue = admin_queue.field("admin_queue")?;
        Ok(TransientState {
            isr: self.isr,
            config_pending: self.config_pending,
            unsignalled: self.unsignalled.clone(),
            services: admin_queue
                .map(|queue| (ADMIN_QUEUE, queue))
                .into_iter()
                .collect(),
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
            next_available,
            next_used,
            restarts,
            owned,
        } = state;
        Self {
            size: *size,
            vector: *vector,
            descriptor_area: Hex(*descriptor_area),
            driver_area: Hex(*driver_area),
            device_area: Hex(*device_area),
            enabled: *enabled,
            stopped: *stopped,
            next_available: *next_available,
            next_used: *next_used,
            restarts: *restarts,
            owned: owned.clone(),
        }
    }

    /// The state.
    ///
    /// # Errors
    ///
    /// Chains that a queue of this size does not have.
    pub fn plain(&self) -> Result<QueueState, Invalid> {
        let size = self.size;
        for (index, head) in self.owned.iter().enumerate() {
            if *head >= size {
                let reason = format!("there is no descriptor {head} in a queue of size {size}");
                return Err(Invalid::new(reason)).entry(index).field("owned");
            }
        }
        if self.owned.len() > size.into() {
            let count = self.owned.len();
            let reason = format!("{count} chains are too many for a queue of size {size}");
            return Err(Invalid::new(reason)).field("owned");
        }
        Ok(QueueState {
            size,
            vector: self.vector,
            descriptor_area: self.descriptor_area.0,
            driver_area: self.driver_area.0,
            device_area: self.device_area.0,
            enabled: self.enabled,
            stopped: self.stopped,
            next_available: self.next_available,
            next_used: self.next_used,
            restarts: self.restarts,
            owned: self.owned.clone(),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn sample() -> TransientState {
        TransientState {
            isr: 3,
            config_pending: true,
            unsignalled: vec![0, 2],
            services: [(
                ADMIN_QUEUE,
                QueueState {
                    size: 8,
                    vector: 0xffff,
                    descriptor_area: 0x1000,
                    driver_area: 0x2000,
                    device_area: u64::MAX,
                    enabled: true,
                    stopped: false,
                    next_available: 7,
                    next_used: 5,
                    restarts: true,
                    owned: vec![7, 0],
                },
            )]
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
                |f| f.transient.admin_queue.as_mut().unwrap().owned = vec![7, 8],
                "transient.admin_queue.owned[1]: there is no descriptor 8 in a queue of size 8",
            ),
            (
                |f| f.transient.admin_queue.as_mut().unwrap().owned = vec![1; 9],
                "transient.admin_queue.owned: 9 chains are too many for a queue of size 8",
            ),
        ];
        for (change, expected) in cases {
            assert_eq!(refusal(change), expected);
        }
    }
}
