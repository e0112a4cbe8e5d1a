//! Saved form of everything on the bus: [`PciRoot::save`](crate::root::PciRoot::save) takes it, and
//! [`PciRoot::restore`](crate::root::PciRoot::restore) puts it into a root complex of the same make.
//!
//! A function is its configuration space and its MSI-X. The rest is the virtio function's, which has state of its own, or
//! follows from these: which addresses are decoded, which virtual functions exist, who may master the bus.

use std::fmt;
use std::str::FromStr;

use crate::config::{ConfigSpace, ConfigStateError};
use crate::ecap::sriov::SriovStateError;
use crate::msix::state::{MsixState, MsixStateError};
use crate::topology::{DevFn, DeviceNumber, FunctionNumber};

/// Every function that exists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PciState {
    /// The functions, ascending by place. Virtual functions that do not exist are not among them.
    pub functions: Vec<FunctionState>,
}

/// One function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionState {
    /// Where it is.
    pub place: Place,
    /// Its name, which has to be that of the function it is restored to.
    pub name: String,
    /// Its registers.
    pub registers: Registers,
}

/// The registers of one function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registers {
    /// Configuration space: as many bytes as the function has registers for.
    pub config: Vec<u8>,
    /// MSI-X; bridges have none.
    pub msix: Option<MsixState>,
}

impl Registers {
    /// The registers of a function that is nothing but a configuration space.
    pub(crate) fn plain(config: &ConfigSpace) -> Self {
        Self {
            config: config.save(),
            msix: None,
        }
    }

    /// `config` with these registers, for a function without MSI-X.
    pub(crate) fn without_msix(&self, config: &ConfigSpace) -> Result<ConfigSpace, RegistersError> {
        if self.msix.is_some() {
            return Err(RegistersError::Msix);
        }
        Ok(config.restored(&self.config)?)
    }
}

/// Where a function is, whatever the bus numbers: its place on the root bus, or that of its port and its own behind it.
///
/// Displays as `02.0` and `02.0/00.1`, and is read from that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Place on the root bus.
    pub root: DevFn,
    /// Of a function behind the port at `root`: its place there.
    pub behind: Option<DevFn>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.behind {
            None => self.root.fmt(f),
            Some(behind) => write!(f, "{}/{behind}", self.root),
        }
    }
}

/// Why a text is no [`Place`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a place on the PCI bus looks like 02.0, or 02.0/00.1 behind a port")]
pub struct BadPlace;

impl FromStr for Place {
    type Err = BadPlace;

    fn from_str(text: &str) -> Result<Self, BadPlace> {
        let (root, behind) = match text.split_once('/') {
            None => (text, None),
            Some((root, behind)) => (root, Some(behind)),
        };
        Ok(Self {
            root: devfn(root).ok_or(BadPlace)?,
            behind: behind
                .map(|behind| devfn(behind).ok_or(BadPlace))
                .transpose()?,
        })
    }
}

/// What `DevFn` displays as: two lower-case hexadecimal digits, a dot, one digit.
fn devfn(text: &str) -> Option<DevFn> {
    let (device, function) = text.split_once('.')?;
    let number = |text| u8::from_str_radix(text, 16).ok();
    let device = DeviceNumber::new(number(device)?)?;
    let function = FunctionNumber::new(number(function)?)?;
    let devfn = DevFn::new(device, function);
    (devfn.to_string() == text).then_some(devfn)
}

/// Why a saved form of a root complex was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PciStateError {
    /// A function of this machine is not in the state.
    #[error("PCI function {name:?} at {place} is missing in the state")]
    Missing {
        /// Where it is.
        place: Place,
        /// Its name.
        name: String,
    },
    /// A function of the state is not in this machine, or is a virtual function that does not exist by the state.
    #[error("PCI function {name:?} at {place} of the state does not exist")]
    Unknown {
        /// Where it is.
        place: Place,
        /// Its name.
        name: String,
    },
    /// A place is in the state twice.
    #[error("the state has more than one PCI function at {0}")]
    Duplicate(Place),
    /// Another function is at this place.
    #[error("the PCI function at {place} is {saved:?} in the state, and {own:?} in this machine")]
    Name {
        /// The place.
        place: Place,
        /// Its name in the state.
        saved: String,
        /// The name of the function of this machine.
        own: String,
    },
    /// The registers of a function.
    #[error("PCI function {name:?} at {place}: {source}")]
    Function {
        /// Where it is.
        place: Place,
        /// Its name.
        name: String,
        /// What is wrong with them.
        source: RegistersError,
    },
}

/// Why the saved registers of a function were refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegistersError {
    /// Configuration space.
    #[error(transparent)]
    Config(#[from] ConfigStateError),
    /// The SR-IOV capability.
    #[error(transparent)]
    Sriov(#[from] SriovStateError),
    /// The vector table.
    #[error(transparent)]
    Table(#[from] MsixStateError),
    /// There is MSI-X state for a function that has none.
    #[error("there is MSI-X state, and the function has no MSI-X")]
    Msix,
    /// There is no MSI-X state for a function that needs it.
    #[error("there is no MSI-X state, and the function has MSI-X")]
    NoMsix,
    /// Message Control in configuration space and in the MSI-X state differ.
    #[error(
        "MSI-X control differs between the capability in configuration space and the MSI-X state"
    )]
    Control,
    /// A function is restored that is not paused. A mistake of the program.
    #[error("the function is not paused")]
    Running,
}

#[cfg(test)]
mod tests;
