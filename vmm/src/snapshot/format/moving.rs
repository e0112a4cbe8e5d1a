//! Documents of a live migration: what a machine is built from, contexts that are read early, and the state of a guest but
//! for its memory.
//!
//! Their members are those of [`state.json`](super::state).

use std::borrow::Cow;
use std::ops::RangeInclusive;

use serde::de::{Error as _, Unexpected};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::clock::Clock;
use super::cpu::{CpuModel, Vcpu};
use super::document::Document;
use super::error::{At, Invalid, check_name, convert_all};
use super::function::Function;
use super::irqchip::Irqchip;
use super::machine::Machine;
use super::owner::Owner;
use super::pci::Pci;
use super::serial::Serial;
use super::state::validate_devices;
use super::version::Version;
use crate::kvm::{model, state};
use crate::snapshot::capture::Devices;

/// Newest version of these documents.
pub const NEWEST: u32 = 1;
/// Name of the section with an [`Offer`].
pub const OFFER: &str = "machine";
/// Name of the section with [`Contexts`].
pub const CONTEXTS: &str = "contexts";
/// Name of the section with a [`Guest`].
pub const GUEST: &str = "guest";

/// Declares the type of a member `format` that is always the same.
macro_rules! format_name {
    ($(#[$doc:meta])* $name:ident, $text:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name;

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str($text)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = Cow::<str>::deserialize(deserializer)?;
                if text == $text {
                    Ok(Self)
                } else {
                    Err(D::Error::invalid_value(Unexpected::Str(&text), &$text))
                }
            }
        }
    };
}

format_name!(
    /// `format` of an [`Offer`].
    OfferFormat,
    Offer::FORMAT
);
format_name!(
    /// `format` of [`Contexts`].
    ContextsFormat,
    Contexts::FORMAT
);
format_name!(
    /// `format` of a [`Guest`].
    GuestFormat,
    Guest::FORMAT
);

/// What a machine is built from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// Name of the format.
    pub format: OfferFormat,
    /// Version of the format.
    pub version: Version<NEWEST>,
    /// The machine.
    pub machine: Machine,
    /// The processor the guest sees.
    pub cpu_model: CpuModel,
}

/// Contexts of virtual functions, read while the guest ran: for the destination to check before the guest is stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contexts {
    /// Name of the format.
    pub format: ContextsFormat,
    /// Version of the format.
    pub version: Version<NEWEST>,
    /// The functions.
    pub functions: Vec<Function>,
}

impl Document for Contexts {
    const FORMAT: &'static str = "tern-migration-contexts";
    const VERSIONS: RangeInclusive<u64> = 1..=NEWEST as u64;

    fn validate(&self) -> Result<(), Invalid> {
        convert_all(&self.functions, |function| {
            check_name(&function.name)?;
            function.context_bytes()
        })
        .field("functions")
        .map(drop)
    }
}

impl Contexts {
    /// Of these functions.
    pub fn of(functions: Vec<Function>) -> Self {
        Self {
            format: ContextsFormat,
            version: Version::default(),
            functions,
        }
    }
}

/// State of a guest but for its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    /// Name of the format.
    pub format: GuestFormat,
    /// Version of the format.
    pub version: Version<NEWEST>,
    /// It was paused before it was moved, and stays so.
    pub paused: bool,
    /// Its VM generation ID is another one, and it was not told.
    pub untold: bool,
    /// State of each vCPU, in their order.
    pub vcpus: Vec<Vcpu>,
    /// Interrupt controllers that vCPUs share.
    pub irqchip: Irqchip,
    /// The guest's clock.
    pub clock: Clock,
    /// Registers of everything on the PCI bus.
    pub pci: Pci,
    /// Virtio functions that exist.
    pub functions: Vec<Function>,
    /// SR-IOV owners.
    pub owners: Vec<Owner>,
    /// COM1.
    pub serial: Serial,
}

impl Document for Offer {
    const FORMAT: &'static str = "tern-migration-machine";
    const VERSIONS: RangeInclusive<u64> = 1..=NEWEST as u64;

    fn validate(&self) -> Result<(), Invalid> {
        self.cpu_model.plain().field("cpu_model").map(drop)
    }
}

impl Document for Guest {
    const FORMAT: &'static str = "tern-migration-guest";
    const VERSIONS: RangeInclusive<u64> = 1..=NEWEST as u64;

    fn validate(&self) -> Result<(), Invalid> {
        self.irqchip.plain().field("irqchip")?;
        self.clock.plain().field("clock")?;
        validate_devices(&self.pci, &self.functions, &self.owners, &self.serial)
    }
}

impl Offer {
    /// Of a machine and the processor its guest sees.
    pub fn of(machine: Machine, model: &model::CpuModel) -> Self {
        Self {
            format: OfferFormat,
            version: Version::default(),
            machine,
            cpu_model: CpuModel::of(model),
        }
    }

    /// The processor.
    ///
    /// # Errors
    ///
    /// The first value that none has.
    pub fn model(&self) -> Result<model::CpuModel, Invalid> {
        self.cpu_model.plain().field("cpu_model")
    }
}

impl Guest {
    /// Of a guest with this state, which was `paused` before, and `untold` of its VM generation ID.
    pub fn of(devices: Devices, cpu: &state::State, paused: bool, untold: bool) -> Self {
        Self {
            format: GuestFormat,
            version: Version::default(),
            paused,
            untold,
            vcpus: cpu.vcpus.iter().map(Vcpu::of).collect(),
            irqchip: Irqchip::of(&cpu.irqchip),
            clock: Clock::of(&cpu.clock),
            pci: devices.pci,
            functions: devices.functions,
            owners: devices.owners,
            serial: devices.serial,
        }
    }

    /// The state of vCPUs, interrupt controllers and clock of a guest that sees the processor `model`.
    ///
    /// # Errors
    ///
    /// The first value that none has.
    pub fn cpu(&self, model: &model::CpuModel) -> Result<state::State, Invalid> {
        Ok(state::State {
            irqchip: self.irqchip.plain().field("irqchip")?,
            clock: self.clock.plain().field("clock")?,
            vcpus: convert_all(&self.vcpus, |vcpu| vcpu.plain(model.xsave_size)).field("vcpus")?,
        })
    }

    /// The state of its devices.
    pub fn devices(self) -> Devices {
        Devices {
            pci: self.pci,
            functions: self.functions,
            owners: self.owners,
            serial: self.serial,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::tests::sample;
    use super::super::{parse, write};
    use super::*;

    #[test]
    fn documents_are_the_same_after_json() {
        let state = sample();
        let (model, cpu) = state.cpu().unwrap();
        let offer = Offer::of(state.machine, &model);
        assert_eq!(parse(&write(&offer).unwrap()), Ok(offer.clone()));
        let devices = Devices {
            pci: state.pci,
            functions: state.functions,
            owners: state.owners,
            serial: state.serial,
        };
        let guest = Guest::of(devices, &cpu, true, false);
        let text = write(&guest).unwrap();
        assert_eq!(parse(&text), Ok(guest.clone()));
        assert_eq!(guest.cpu(&model).unwrap(), cpu);
        // One is not taken for the other.
        assert!(parse::<Offer>(&text).is_err());
    }
}
