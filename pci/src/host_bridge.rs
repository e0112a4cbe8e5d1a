//! The host bridge at 00:00.0, which has an identity and nothing to configure.

use std::sync::{Mutex, MutexGuard, PoisonError};

use devices::bus::Effect;

use crate::bar::Bars;
use crate::config::{ConfigBuilder, ConfigSpace};
use crate::function::ConfigTarget;
use crate::header::{self, Identity};
use crate::state::{Registers, RegistersError};

/// The identity of a generic PCI Express host bridge (Red Hat's, which no guest has quirks for).
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// See the [module documentation](self).
#[derive(Debug)]
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl HostBridge {
    /// A host bridge in its reset state.
    pub fn new() -> Self {
        let header = header::type0(&IDENTITY, &Bars::default());
        Self {
            config: Mutex::new(ConfigBuilder::new(&header).build()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl ConfigTarget for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) -> Effect {
        // Its registers have no effect on anything.
        let _ = self.lock().write(offset, data);
        Effect::None
    }

    fn set_multi_function(&self) {
        header::set_multi_function(&mut self.lock());
    }

    fn name(&self) -> &str {
        "host bridge"
    }

    fn save(&self) -> Registers {
        Registers::plain(&self.lock())
    }

    fn check(&self, saved: &Registers) -> Result<(), RegistersError> {
        saved.without_msix(&self.lock()).map(drop)
    }

    fn restore(&self, saved: &Registers) -> Result<(), RegistersError> {
        let mut config = self.lock();
        *config = saved.without_msix(&config)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_host_bridge_without_capabilities_or_bars() {
        let bridge = HostBridge::new();
        let dword = |at| {
            let mut bytes = [0; 4];
            bridge.config_read(at, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        for at in (0x10..0x28).step_by(4) {
            assert_eq!(bridge.config_write(at, &[0xff; 4]), Effect::None);
        }
        let found = [0x00, 0x08, 0x10, 0x18, 0x34, 0x100].map(dword);
        assert_eq!(found, [0x0008_1b36, 0x0600_0000, 0, 0, 0, 0]);
        assert_eq!(dword(0x0c), 0);
        bridge.set_multi_function();
        assert_eq!(dword(0x0c), 0x0080_0000);
    }
}
