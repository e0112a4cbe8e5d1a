//! Registers of the functions on the PCI bus.

use pci::msix::state::MsixState;
use pci::msix::{Control, Entry};
use pci::state::{self, PciState, Place};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::config_space::Bytes;
use super::error::{At, Invalid, check_ascending, check_name, convert_all};
use super::hex::Hex;
use super::version::Version;

/// The functions on the PCI bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pci {
    /// Version of this section.
    pub version: Version<1>,
    /// Every function that exists, ascending by place.
    pub functions: Vec<Registers>,
}

/// Registers of one function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Registers {
    /// Device and function on the root bus, as in `02.0`, or those of a root port and then those behind it, as in
    /// `02.0/00.1`.
    #[schemars(regex(pattern = "^[0-9a-f]{2}\\.[0-7](/[0-9a-f]{2}\\.[0-7])?$"))]
    pub place: String,
    /// Name of the function.
    pub name: String,
    /// Configuration space.
    pub config: Bytes,
    /// MSI-X, of a function that has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub msix: Option<Msix>,
}

/// MSI-X of a function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Msix {
    /// MSI-X Enable.
    pub enabled: bool,
    /// Function Mask.
    pub function_mask: bool,
    /// The table, an entry for each vector.
    #[schemars(length(max = 2048))]
    pub entries: Vec<MsixEntry>,
    /// Vectors whose pending bit is set, ascending.
    pub pending: Vec<u16>,
}

/// An entry of an MSI-X table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MsixEntry {
    /// Message address, a multiple of 4.
    pub address: Hex<u64>,
    /// Message data.
    pub data: Hex<u32>,
    /// Mask bit of Vector Control.
    pub masked: bool,
}

/// The most entries a table has.
const MAX_VECTORS: usize = 2048;

impl Pci {
    /// The JSON of `state`.
    pub fn of(state: &PciState) -> Self {
        Self {
            version: Version::default(),
            functions: state.functions.iter().map(Registers::of).collect(),
        }
    }

    /// The state.
    ///
    /// # Errors
    ///
    /// What no function has, or a function that does not follow those before it.
    pub fn plain(&self) -> Result<PciState, Invalid> {
        let functions = convert_all(&self.functions, Registers::plain).field("functions")?;
        let places: Vec<_> = functions.iter().map(|function| function.place).collect();
        check_ascending(&places).field("functions")?;
        Ok(PciState { functions })
    }
}

impl Registers {
    fn of(state: &state::FunctionState) -> Self {
        let state::FunctionState {
            place,
            name,
            registers: state::Registers { config, msix },
        } = state;
        Self {
            place: place.to_string(),
            name: name.clone(),
            config: Bytes::of(config),
            msix: msix.as_ref().map(Msix::of),
        }
    }

    fn plain(&self) -> Result<state::FunctionState, Invalid> {
        check_name(&self.name)?;
        let place = self.place.parse::<Place>().map_err(Invalid::new);
        Ok(state::FunctionState {
            place: place.field("place")?,
            name: self.name.clone(),
            registers: state::Registers {
                config: self.config.plain().field("config")?,
                msix: self
                    .msix
                    .as_ref()
                    .map(Msix::plain)
                    .transpose()
                    .field("msix")?,
            },
        })
    }
}

impl Msix {
    /// The JSON of `state`.
    pub fn of(state: &MsixState) -> Self {
        let MsixState {
            control,
            entries,
            pending,
        } = state;
        let entries = entries.iter().map(|entry| MsixEntry {
            address: Hex(entry.address),
            data: Hex(entry.data),
            masked: entry.masked,
        });
        Self {
            enabled: control.enabled,
            function_mask: control.function_mask,
            entries: entries.collect(),
            pending: pending.clone(),
        }
    }

    /// The state.
    ///
    /// # Errors
    ///
    /// What no table has.
    pub fn plain(&self) -> Result<MsixState, Invalid> {
        let vectors = self.entries.len();
        if vectors > MAX_VECTORS {
            let reason = format!("{vectors} entries are more than {MAX_VECTORS}");
            return Err(Invalid::new(reason)).field("entries");
        }
        let pending = &self.pending;
        check_ascending(pending).field("pending")?;
        if let Some(vector) = pending.last().filter(|last| usize::from(**last) >= vectors) {
            let reason = format!("there is no vector {vector} in a table of {vectors}");
            return Err(Invalid::new(reason))
                .entry(pending.len() - 1)
                .field("pending");
        }
        Ok(MsixState {
            control: Control {
                enabled: self.enabled,
                function_mask: self.function_mask,
            },
            entries: convert_all(&self.entries, MsixEntry::plain).field("entries")?,
            pending: pending.clone(),
        })
    }
}

impl MsixEntry {
    fn plain(&self) -> Result<Entry, Invalid> {
        let address = self.address.0;
        if !address.is_multiple_of(4) {
            let reason = format!("{address:#x} is no multiple of 4");
            return Err(Invalid::new(reason)).field("address");
        }
        Ok(Entry {
            address,
            data: self.data.0,
            masked: self.masked,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A bridge, and a function behind it.
    pub fn sample() -> PciState {
        let mut config = vec![0; 256];
        config[..4].copy_from_slice(&[0xf4, 0x1a, 0x41, 0x10]);
        let bridge = state::FunctionState {
            place: "02.0".parse().unwrap(),
            name: "port0".to_owned(),
            registers: state::Registers { config, msix: None },
        };
        let function = state::FunctionState {
            place: "02.0/00.1".parse().unwrap(),
            name: "pf0-vf1".to_owned(),
            registers: state::Registers {
                config: vec![0; 4096],
                msix: Some(msix()),
            },
        };
        PciState {
            functions: vec![bridge, function],
        }
    }

    #[test]
    fn the_state_is_the_same_after_json() {
        let text = serde_json::to_string(&Pci::of(&sample())).unwrap();
        let read: Pci = serde_json::from_str(&text).unwrap();
        assert_eq!(read.plain(), Ok(sample()));
    }

    fn msix() -> MsixState {
        MsixState {
            control: Control {
                enabled: true,
                function_mask: false,
            },
            entries: vec![
                Entry {
                    address: 0xfee0_0000,
                    data: 0x4021,
                    masked: false,
                },
                Entry::default(),
            ],
            pending: vec![0, 1],
        }
    }

    /// A change, and why what it leaves is refused.
    type Case = (fn(&mut Pci), &'static str);

    #[test]
    fn values_out_of_range_are_named() {
        let cases: [Case; 7] = [
            (
                |p| p.functions[0].place = "2.0".to_owned(),
                "functions[0].place: a place on the PCI bus looks like 02.0, or 02.0/00.1 behind a port",
            ),
            (
                |p| p.functions.swap(0, 1),
                "functions[1]: 02.0 follows 02.0/00.1; the list ascends",
            ),
            (
                |p| p.functions[0].config.length = 4097,
                "functions[0].config.length: 4097 is more than 4096",
            ),
            (
                |p| table(p).entries[1].address = Hex(2),
                "functions[1].msix.entries[1].address: 0x2 is no multiple of 4",
            ),
            (
                |p| table(p).pending = vec![0, 2],
                "functions[1].msix.pending[1]: there is no vector 2 in a table of 2",
            ),
            (
                |p| table(p).pending = vec![1, 0],
                "functions[1].msix.pending[1]: 0 follows 1; the list ascends",
            ),
            (
                |p| table(p).entries = vec![table(p).entries[0]; 2049],
                "functions[1].msix.entries: 2049 entries are more than 2048",
            ),
        ];
        for (change, expected) in cases {
            let mut pci = Pci::of(&sample());
            change(&mut pci);
            assert_eq!(pci.plain().unwrap_err().to_string(), expected);
        }
    }

    fn table(pci: &mut Pci) -> &mut Msix {
        pci.functions[1].msix.as_mut().unwrap()
    }
}
