//! The capabilities of a virtio function, in the order in which they stand in configuration space.

use super::layout::{Layout, NOTIFY_MULTIPLIER, Region};
use super::{BAR, Role};
use crate::cap;
use crate::cap::pcie::{self, PortType};
use crate::cap::virtio::{self as vendor, CfgType, Structure};
use crate::config::{ConfigBuilder, ConfigError};
use crate::ecap::ari;
use crate::msix::VectorCount;

/// Where the capabilities are whose registers do something.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offsets {
    pub pcie: u16,
    pub msix: u16,
    pub pci_cfg: u16,
    /// Behind a port.
    pub ari: Option<u16>,
}

/// Lays out the capability lists, but for SR-IOV.
pub(super) fn add(
    builder: &mut ConfigBuilder,
    layout: &Layout,
    vectors: VectorCount,
    port_type: PortType,
    role: Role,
) -> Result<Offsets, ConfigError> {
    // Everything in the BAR lies below 4 GiB of it: `Layout` makes at most some hundred KiB.
    let structure = |region| {
        let range = layout.range(region);
        Structure {
            bar: BAR,
            offset: range.start as u32,
            len: (range.end - range.start) as u32,
        }
    };
    let pcie = match role {
        Role::Member => pcie::virtual_function_block(),
        Role::Plain | Role::Owner(_) => pcie::block(port_type),
    };
    let pcie = builder.capability(pcie::ID, &pcie)?;
    let table = structure(Region::MsixTable).offset;
    let pba = structure(Region::MsixPba).offset;
    let msix = cap::msix::block(vectors, BAR, table, pba);
    let msix = builder.capability(cap::msix::ID, &msix)?;
    let plain = [
        (CfgType::Common, Region::Common),
        (CfgType::Isr, Region::Isr),
        (CfgType::Device, Region::Device),
        (CfgType::DeviceState, Region::State),
    ];
    for (cfg_type, region) in plain {
        // What a device does not have, it has no capability for.
        if structure(region).len != 0 {
            builder.capability(vendor::ID, &vendor::block(cfg_type, structure(region)))?;
        }
    }
    let notify = vendor::notify_block(structure(Region::Notify), NOTIFY_MULTIPLIER);
    builder.capability(vendor::ID, &notify)?;
    let pci_cfg = builder.capability(vendor::ID, &vendor::access_block())?;
    let ari = match port_type {
        // The list of functions ends here: VFs are not in it, wherever they are.
        PortType::Endpoint => Some(builder.extended(ari::ID, ari::VERSION, &ari::block(None))?),
        _ => None,
    };
    Ok(Offsets {
        pcie,
        msix,
        pci_cfg,
        ari,
    })
}
