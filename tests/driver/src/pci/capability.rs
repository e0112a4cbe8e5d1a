//! Walking the two capability lists.

use std::collections::BTreeSet;

use super::header;
use crate::access::{Function, FunctionExt};

/// An entry of the capability list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// What it is; see [`super::id`].
    pub id: u8,
    /// Where it starts in configuration space.
    pub offset: u16,
}

/// An entry of the extended capability list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtendedCapability {
    /// What it is; see [`super::id`].
    pub id: u16,
    /// Version of its layout.
    pub version: u8,
    /// Where it starts in configuration space.
    pub offset: u16,
}

/// The list visits `offset` twice, or points outside the space for capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("capability list is broken at {offset:#x}")]
pub struct CapabilityLoop {
    /// Where.
    pub offset: u16,
}

/// Status bit: there is a capability list.
const HAS_CAPABILITIES: u16 = 1 << 4;

/// The capabilities, in list order.
pub fn capabilities(function: &impl Function) -> Result<Vec<Capability>, CapabilityLoop> {
    let mut list = Vec::new();
    if function.config::<u16>(header::STATUS) & HAS_CAPABILITIES == 0 {
        return Ok(list);
    }
    let mut seen = BTreeSet::new();
    let mut offset = u16::from(function.config::<u8>(header::CAPABILITIES)) & !3;
    while offset != 0 {
        if offset < 0x40 || !seen.insert(offset) {
            return Err(CapabilityLoop { offset });
        }
        list.push(Capability {
            id: function.config(offset),
            offset,
        });
        offset = u16::from(function.config::<u8>(offset + 1)) & !3;
    }
    Ok(list)
}

/// The extended capabilities, in list order.
pub fn extended_capabilities(
    function: &impl Function,
) -> Result<Vec<ExtendedCapability>, CapabilityLoop> {
    let mut list = Vec::new();
    let mut seen = BTreeSet::new();
    let mut offset = 0x100;
    while offset != 0 {
        if offset < 0x100 || !seen.insert(offset) {
            return Err(CapabilityLoop { offset });
        }
        let dword: u32 = function.config(offset);
        // An empty list is a first entry of zeros; a function without extended space reads as ones.
        if dword == 0 || dword == u32::MAX {
            break;
        }
        list.push(ExtendedCapability {
            id: dword as u16,
            version: (dword >> 16) as u8 & 0xf,
            offset,
        });
        offset = (dword >> 20) as u16 & !3;
    }
    Ok(list)
}

/// The first capability `id`.
pub fn find_capability(
    function: &impl Function,
    id: u8,
) -> Result<Option<Capability>, CapabilityLoop> {
    Ok(capabilities(function)?.into_iter().find(|c| c.id == id))
}

/// The first extended capability `id`.
pub fn find_extended_capability(
    function: &impl Function,
    id: u16,
) -> Result<Option<ExtendedCapability>, CapabilityLoop> {
    Ok(extended_capabilities(function)?
        .into_iter()
        .find(|c| c.id == id))
}
