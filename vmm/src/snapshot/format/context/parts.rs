//! Reads fields from JSON.
//!
//! The derived reader of a tagged enum puts the whole object aside before it knows the type, so that its errors name
//! neither the member nor the line. This one reads any member of any field as it comes, and then looks at which are
//! there.

use std::borrow::Cow;
use std::fmt;

use devices::context::FieldType;
use serde::de::{Error as _, Unexpected};
use serde::{Deserialize, Deserializer};

use super::super::hex::{Hex, HexBytes};
use super::{Chain, Common, Field, Position, Raw};

/// A member that may be absent, but not null.
fn present<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    T::deserialize(deserializer).map(Some)
}

macro_rules! parts {
    ($($name:ident: $type:ty,)*) => {
        /// Members of all fields together.
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Parts {
            r#type: Type,
            $(#[serde(default, deserialize_with = "present")] $name: Option<$type>,)*
        }

        impl Parts {
            /// A member that was read and belongs to no field of this type.
            fn left_over(&self) -> Option<&'static str> {
                $(if self.$name.is_some() {
                    return Some(stringify!($name));
                })*
                None
            }
        }
    };
}

parts! {
    admin_queue_index: u16,
    admin_queue_num: u16,
    available: Position,
    chains: Vec<Chain>,
    config: HexBytes,
    config_generation: u8,
    config_vector: u16,
    descriptor_area: Hex<u64>,
    device_area: Hex<u64>,
    device_feature: Hex<u32>,
    device_feature_select: u32,
    driver_area: Hex<u64>,
    driver_feature: Hex<u32>,
    driver_feature_select: u32,
    enabled: bool,
    features: Hex<u128>,
    heads: Vec<u16>,
    next_available: u16,
    next_used: u16,
    num_queues: u16,
    queue: u16,
    queue_desc: Hex<u64>,
    queue_device: Hex<u64>,
    queue_driver: Hex<u64>,
    queue_enable: u16,
    queue_notif_config_data: u16,
    queue_notify_off: u16,
    queue_reset: u16,
    queue_select: u16,
    queue_size: u16,
    queue_vector: u16,
    reserved: Hex<u64>,
    restarts: bool,
    running: bool,
    selected: bool,
    size: u16,
    status: u8,
    used: Position,
    value: HexBytes,
    vector: u16,
}

/// Type of a field: its name, or its number in hexadecimal.
enum Type {
    Named(FieldType),
    Raw(u16),
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(kind) => kind.fmt(f),
            Self::Raw(kind) => write!(f, "a field of type {kind:#06x}"),
        }
    }
}

impl<'de> Deserialize<'de> for Type {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let named = FieldType::ALL.into_iter().find(|kind| kind.name() == text);
        let raw = || Hex::parse(&text).map(|Hex(number)| Self::Raw(number));
        let expected = "a type of field, as in \"VQ_CFG\" or \"0x1234\"";
        named
            .map(Self::Named)
            .or_else(raw)
            .ok_or_else(|| D::Error::invalid_value(Unexpected::Str(&text), &expected))
    }
}

impl<'de> Deserialize<'de> for Field {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut parts = Parts::deserialize(deserializer)?;
        let field = take(&mut parts).map_err(|missing| {
            D::Error::custom(format_args!("{} has no `{missing}`", parts.r#type))
        })?;
        match parts.left_over() {
            Some(name) => {
                let kind = &parts.r#type;
                Err(D::Error::custom(format_args!(
                    "`{name}` is no member of {kind}"
                )))
            }
            None => Ok(field),
        }
    }
}

/// Makes a field of its members, and leaves the others; the name of one that is missing.
fn take(parts: &mut Parts) -> Result<Field, &'static str> {
    macro_rules! take {
        ($name:ident) => {
            parts.$name.take().ok_or(stringify!($name))?
        };
    }
    let kind = match parts.r#type {
        Type::Named(kind) => kind,
        Type::Raw(kind) => {
            return Ok(Field::Raw(Raw {
                kind: Hex(kind),
                reserved: parts.reserved.take(),
                value: take!(value),
            }));
        }
    };
    Ok(match kind {
        FieldType::DeviceFeatures => Field::DeviceFeatures {
            features: take!(features),
        },
        FieldType::DriverFeatures => Field::DriverFeatures {
            features: take!(features),
        },
        FieldType::CommonConfig => Field::CommonConfig(Box::new(Common {
            device_feature_select: take!(device_feature_select),
            device_feature: take!(device_feature),
            driver_feature_select: take!(driver_feature_select),
            driver_feature: take!(driver_feature),
            config_vector: take!(config_vector),
            num_queues: take!(num_queues),
            status: take!(status),
            config_generation: take!(config_generation),
            queue_select: take!(queue_select),
            queue_size: take!(queue_size),
            queue_vector: take!(queue_vector),
            queue_enable: take!(queue_enable),
            queue_notify_off: take!(queue_notify_off),
            queue_desc: take!(queue_desc),
            queue_driver: take!(queue_driver),
            queue_device: take!(queue_device),
            queue_notif_config_data: take!(queue_notif_config_data),
            queue_reset: take!(queue_reset),
            admin_queue_index: take!(admin_queue_index),
            admin_queue_num: take!(admin_queue_num),
        })),
        FieldType::QueueConfig => Field::QueueConfig {
            queue: take!(queue),
            size: take!(size),
            vector: take!(vector),
            descriptor_area: take!(descriptor_area),
            driver_area: take!(driver_area),
            device_area: take!(device_area),
        },
        FieldType::SplitRuntime => Field::SplitRuntime {
            queue: take!(queue),
            enabled: take!(enabled),
            next_available: take!(next_available),
        },
        FieldType::OwnedChains => Field::OwnedChains {
            queue: take!(queue),
            heads: take!(heads),
        },
        FieldType::PackedRuntime => Field::PackedRuntime {
            queue: take!(queue),
            enabled: take!(enabled),
            available: take!(available),
            used: take!(used),
        },
        FieldType::OwnedPackedChains => Field::OwnedPackedChains {
            queue: take!(queue),
            chains: take!(chains),
        },
        FieldType::QueueStatus => Field::QueueStatus {
            queue: take!(queue),
            running: take!(running),
            restarts: take!(restarts),
            selected: take!(selected),
            next_used: take!(next_used),
        },
        FieldType::DeviceConfig => Field::DeviceConfig {
            config: take!(config),
        },
    })
}
