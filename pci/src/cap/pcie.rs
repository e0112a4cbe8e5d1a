//! The PCI Express capability (PCIe Base, 7.5.3), version 2, for the three kinds of function there are here.

use crate::config::{Block, ConfigSpace, Register, Written};

/// Capability ID.
pub const ID: u8 = 0x10;
/// Length in bytes, with every register of version 2.
pub const LEN: u16 = 0x3c;

/// PCI Express Capabilities, 16 bits: version in bits 3:0, device/port type in 7:4.
const CAPABILITIES: u16 = 0x02;
const DEVICE_CAPABILITIES: u16 = 0x04;
const DEVICE_CONTROL: u16 = 0x08;
const DEVICE_STATUS: u16 = 0x0a;
const LINK_CAPABILITIES: u16 = 0x0c;
const LINK_CONTROL: u16 = 0x10;
const LINK_STATUS: u16 = 0x12;
const ROOT_CONTROL: u16 = 0x1c;
const DEVICE_CAPABILITIES_2: u16 = 0x24;
const DEVICE_CONTROL_2: u16 = 0x28;
const LINK_CAPABILITIES_2: u16 = 0x2c;
const LINK_CONTROL_2: u16 = 0x30;

const VERSION: u32 = 2;

/// DEVCAP: role-based error reporting, required of every function.
const ROLE_BASED_ERRORS: u32 = 1 << 15;
/// DEVCAP: Function Level Reset works.
const FLR_CAPABLE: u32 = 1 << 28;
/// DEVCTL: error reporting enables (3:0), relaxed ordering (4), payload size (7:5), extended tags (8), no snoop (11),
/// read request size (14:12). None has an effect on an emulated link.
const DEVICE_CONTROL_RW: u32 = 0x79ff;
/// DEVCTL after reset: relaxed ordering, no snoop, 512-byte read requests.
const DEVICE_CONTROL_RESET: u32 = 0x2810;
/// DEVCTL: Initiate Function Level Reset.
const INITIATE_FLR: u16 = 1 << 15;
/// DEVSTA: error bits, cleared by writing 1.
const DEVICE_STATUS_ERRORS: u32 = 0xf;
/// DEVSTA: Transactions Pending.
const TRANSACTIONS_PENDING: u16 = 1 << 5;

/// LNKCAP, LNKSTA: 2.5 GT/s in bits 3:0, one lane in 9:4.
const LINK_X1_2_5: u32 = 0x011;
/// LNKCAP of a port: it reports whether its link is up.
const LINK_ACTIVE_REPORTING: u32 = 1 << 20;
/// LNKSTA of a port: the link is up.
const LINK_ACTIVE: u32 = 1 << 13;
/// LNKCTL: ASPM control, read completion boundary, common clock, extended synch. No effect.
const LINK_CONTROL_RW: u32 = 0x00cb;
/// LNKCAP2: supported speeds, bit 1 = 2.5 GT/s.
const SPEED_2_5: u32 = 1 << 1;

/// Root Control: system error enables and PME interrupt enable. No effect.
const ROOT_CONTROL_RW: u32 = 0x000f;

/// DEVCAP2 and DEVCTL2: ARI forwarding.
const ARI_FORWARDING: u16 = 1 << 5;

/// What kind of function this is on the PCI Express fabric (PCIe Base, 7.5.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortType {
    /// An endpoint behind a port.
    Endpoint,
    /// A port of the root complex.
    RootPort {
        /// Port Number in the Link Capabilities; unique among the ports.
        port: u8,
    },
    /// An endpoint on the root bus, which has no link.
    RootComplexIntegratedEndpoint,
}

impl PortType {
    /// The value of the Device/Port Type field.
    pub const fn code(self) -> u8 {
        match self {
            Self::Endpoint => 0,
            Self::RootPort { .. } => 4,
            Self::RootComplexIntegratedEndpoint => 9,
        }
    }
}

/// The capability of a function of this type. Endpoints can be reset by FLR; ports forward ARI.
pub fn block(port_type: PortType) -> Block {
    let (flr, trigger) = match port_type {
        PortType::RootPort { .. } => (0, 0),
        _ => (FLR_CAPABLE, INITIATE_FLR.into()),
    };
    let mut registers = vec![
        Register::word(CAPABILITIES).reset(VERSION | u32::from(port_type.code()) << 4),
        Register::dword(DEVICE_CAPABILITIES).reset(ROLE_BASED_ERRORS | flr),
        Register::word(DEVICE_CONTROL)
            .reset(DEVICE_CONTROL_RESET)
            .writable(DEVICE_CONTROL_RW)
            .trigger(trigger),
        Register::word(DEVICE_STATUS).clear_by_one(DEVICE_STATUS_ERRORS),
    ];
    let link = |port: u32, active: u32, reporting: u32| {
        [
            Register::dword(LINK_CAPABILITIES).reset(LINK_X1_2_5 | reporting | port << 24),
            Register::word(LINK_CONTROL).writable(LINK_CONTROL_RW),
            Register::word(LINK_STATUS).reset(LINK_X1_2_5 | active),
            Register::dword(LINK_CAPABILITIES_2).reset(SPEED_2_5),
            Register::word(LINK_CONTROL_2).reset(1),
        ]
    };
    match port_type {
        PortType::RootComplexIntegratedEndpoint => {}
        PortType::Endpoint => registers.extend(link(0, 0, 0)),
        PortType::RootPort { port } => {
            registers.extend(link(port.into(), LINK_ACTIVE, LINK_ACTIVE_REPORTING));
            registers.extend([
                Register::word(ROOT_CONTROL).writable(ROOT_CONTROL_RW),
                Register::dword(DEVICE_CAPABILITIES_2).reset(ARI_FORWARDING.into()),
                Register::word(DEVICE_CONTROL_2).writable(ARI_FORWARDING.into()),
            ]);
        }
    }
    Block {
        len: LEN,
        registers,
    }
}

/// The capability of a virtual function (PCIe Base, 9.3.5): an endpoint whose Device Control and Link Control are those
/// of its PF, but for Initiate Function Level Reset.
pub fn virtual_function_block() -> Block {
    let registers = vec![
        Register::word(CAPABILITIES).reset(VERSION | u32::from(PortType::Endpoint.code()) << 4),
        Register::dword(DEVICE_CAPABILITIES).reset(ROLE_BASED_ERRORS | FLR_CAPABLE),
        Register::word(DEVICE_CONTROL).trigger(INITIATE_FLR.into()),
        Register::word(DEVICE_STATUS).clear_by_one(DEVICE_STATUS_ERRORS),
        Register::dword(LINK_CAPABILITIES).reset(LINK_X1_2_5),
        Register::dword(LINK_CAPABILITIES_2).reset(SPEED_2_5),
    ];
    Block {
        len: LEN,
        registers,
    }
}

/// True if this write asked the capability at `at` for a function level reset (E3).
pub fn flr_requested(written: &Written, at: u16) -> bool {
    written.triggered(at + DEVICE_CONTROL) & INITIATE_FLR != 0
}

/// Shows whether the function still has requests under way.
pub fn set_transactions_pending(config: &mut ConfigSpace, at: u16, pending: bool) {
    let status = config.word(at + DEVICE_STATUS) & !TRANSACTIONS_PENDING;
    let bit = if pending { TRANSACTIONS_PENDING } else { 0 };
    config.set_word(at + DEVICE_STATUS, status | bit);
}

/// True if the port whose capability is at `at` forwards to functions by ARI.
pub fn ari_forwarding(config: &ConfigSpace, at: u16) -> bool {
    config.word(at + DEVICE_CONTROL_2) & ARI_FORWARDING != 0
}

/// Offset and length of Device Control 2 of the capability at `at`, for finding writes to it.
pub fn device_control_2_span(at: u16) -> (u16, u16) {
    (at + DEVICE_CONTROL_2, 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigBuilder;

    fn config(port_type: PortType) -> (ConfigSpace, u16) {
        let header = Block {
            len: 64,
            registers: Vec::new(),
        };
        let mut builder = ConfigBuilder::new(&header);
        let at = builder.capability(ID, &block(port_type)).unwrap();
        (builder.build(), at)
    }

    #[test]
    fn the_type_is_in_the_capabilities_register() {
        for (port_type, expected) in [
            (PortType::Endpoint, 0x0002),
            (PortType::RootPort { port: 1 }, 0x0042),
            (PortType::RootComplexIntegratedEndpoint, 0x0092),
        ] {
            let (config, at) = config(port_type);
            assert_eq!(config.word(at + CAPABILITIES), expected);
        }
    }

    #[test]
    fn e3_endpoints_have_flr_and_the_bit_reads_zero() {
        for port_type in [PortType::Endpoint, PortType::RootComplexIntegratedEndpoint] {
            let (mut config, at) = config(port_type);
            assert_ne!(config.dword(at + DEVICE_CAPABILITIES) & FLR_CAPABLE, 0);
            let control = at + DEVICE_CONTROL;
            assert!(!flr_requested(&config.write(control, &[0xff, 0x7f]), at));
            assert!(flr_requested(&config.write(control + 1, &[0x80]), at));
            assert_eq!(config.word(control) & INITIATE_FLR, 0);
        }
        let (mut config, at) = config(PortType::RootPort { port: 1 });
        assert_eq!(config.dword(at + DEVICE_CAPABILITIES) & FLR_CAPABLE, 0);
        let written = config.write(at + DEVICE_CONTROL, &[0xff; 2]);
        assert!(!flr_requested(&written, at));
    }

    #[test]
    fn d2_a_virtual_function_has_flr_and_no_control_of_its_own() {
        let header = Block {
            len: 64,
            registers: Vec::new(),
        };
        let mut builder = ConfigBuilder::new(&header);
        let at = builder.capability(ID, &virtual_function_block()).unwrap();
        let mut config = builder.build();
        assert_eq!(config.word(at + CAPABILITIES), 0x0002);
        assert_eq!(config.dword(at + DEVICE_CAPABILITIES), 0x1000_8000);
        let written = config.write(at + DEVICE_CONTROL, &[0xff; 2]);
        assert!(flr_requested(&written, at));
        assert_eq!(config.word(at + DEVICE_CONTROL), 0);
        config.write(at + LINK_CONTROL, &[0xff; 2]);
        assert_eq!(config.word(at + LINK_CONTROL), 0);
    }

    #[test]
    fn d1_only_a_port_forwards_ari() {
        let (mut port, at) = config(PortType::RootPort { port: 3 });
        assert!(!ari_forwarding(&port, at));
        port.write(at + DEVICE_CONTROL_2, &[0x20, 0]);
        assert!(ari_forwarding(&port, at));
        let (mut endpoint, at) = config(PortType::Endpoint);
        endpoint.write(at + DEVICE_CONTROL_2, &[0xff; 2]);
        assert!(!ari_forwarding(&endpoint, at));
    }

    #[test]
    fn transactions_pending_is_the_functions_to_show() {
        let (mut config, at) = config(PortType::Endpoint);
        set_transactions_pending(&mut config, at, true);
        config.write(at + DEVICE_STATUS, &[0xff; 2]);
        assert_eq!(config.word(at + DEVICE_STATUS), TRANSACTIONS_PENDING);
        set_transactions_pending(&mut config, at, false);
        assert_eq!(config.word(at + DEVICE_STATUS), 0);
    }

    #[test]
    fn an_integrated_endpoint_has_no_link_and_a_port_shows_it_up() {
        let (config_, at) = config(PortType::RootComplexIntegratedEndpoint);
        assert_eq!(config_.dword(at + LINK_CAPABILITIES), 0);
        let (config_, at) = config(PortType::RootPort { port: 7 });
        assert_eq!(config_.dword(at + LINK_CAPABILITIES), 0x0710_0011);
        assert_eq!(config_.word(at + LINK_STATUS), 0x2011);
    }
}
