//! Virtual functions of a physical one.

use super::HostFunction;
use crate::access::{Function, FunctionExt};
use crate::pci::{Address, CapabilityLoop, find_extended_capability, header, id};

/// Byte offsets in the SR-IOV capability (PCIe Base, 9.3.3).
mod at {
    pub const FIRST_VF_OFFSET: u16 = 0x14;
    pub const VF_STRIDE: u16 = 0x16;
    pub const VF_DEVICE_ID: u16 = 0x1a;
    pub const VF_BAR0: u16 = 0x24;
}

/// A virtual function, as its driver reaches it. Its own configuration space gives no ids and no BAR: the ids, its place
/// and its address are those the capability of the physical function says, at the time of [`Self::new`].
#[derive(Clone)]
pub struct VirtualFunction {
    inner: HostFunction,
    ids: Vec<u8>,
    bar: u64,
}

impl VirtualFunction {
    /// Virtual function `number` of `pf`, from 1, whether it is enabled or not. `None` if `pf` has no such capability.
    pub fn new(pf: &HostFunction, number: u8) -> Result<Option<Self>, CapabilityLoop> {
        let Some(capability) = find_extended_capability(pf, id::EXT_SRIOV)? else {
            return Ok(None);
        };
        let word = |at| -> u16 { pf.config(capability.offset + at) };
        let index = number.wrapping_sub(1);
        let distance = word(at::FIRST_VF_OFFSET) + word(at::VF_STRIDE) * u16::from(index);
        let vendor: u16 = pf.config(header::VENDOR_ID);
        let ids = [vendor, word(at::VF_DEVICE_ID)].map(u16::to_le_bytes);

        let bar = capability.offset + at::VF_BAR0;
        let (low, high): (u32, u32) = (pf.config(bar), pf.config(bar + 4));
        pf.set_config(bar, u32::MAX);
        let mask: u32 = pf.config(bar);
        pf.set_config(bar, low);
        let size = u64::from(!(mask & !0xf)) + 1;
        let base = u64::from(high) << 32 | u64::from(low & !0xf);

        let Address { bus, devfn } = pf.address();
        let address = Address {
            bus,
            devfn: devfn.wrapping_add(distance as u8),
        };
        Ok(Some(Self {
            inner: pf.machine().function(address),
            ids: ids.concat(),
            bar: base.wrapping_add(size * u64::from(index)),
        }))
    }
}

impl Function for VirtualFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.inner.read_config(offset, data);
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.ids.get(at).copied().unwrap_or(*byte);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.inner.write_config(offset, data);
    }

    /// A virtual function has BAR 0 alone.
    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        match bar {
            0 => self
                .inner
                .machine()
                .read(self.bar.wrapping_add(offset), data),
            _ => data.fill(0xff),
        }
    }

    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) {
        if bar == 0 {
            self.inner
                .machine()
                .write(self.bar.wrapping_add(offset), data);
        }
    }

    fn relax(&self) {
        self.inner.relax();
    }
}
