use super::*;
use crate::bar::BarKind;
use crate::function::{PciFunction, SingleFunction};
use crate::testing::Stub;

fn port() -> (RootPort, Arc<Stub>) {
    let stub = Stub::with(
        "child",
        PortType::Endpoint,
        &[(BarKind::Prefetchable64, 0x4000)],
    );
    let child = Arc::clone(&stub) as Arc<dyn PciFunction>;
    let port = RootPort::new(1, Arc::new(SingleFunction(child))).unwrap();
    (port, stub)
}

fn dword(port: &RootPort, at: u16) -> u32 {
    let mut bytes = [0; 4];
    port.config_read(at, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// A device full of functions, as a PF with 255 VFs is.
struct Crowd(Arc<Stub>);

impl Children for Crowd {
    fn at(&self, _devfn: DevFn) -> Option<Arc<dyn ConfigTarget>> {
        Some(Arc::clone(&self.0) as _)
    }

    fn functions(&self) -> Vec<Arc<dyn PciFunction>> {
        vec![Arc::clone(&self.0) as _]
    }

    fn seats(&self) -> Vec<(DevFn, Arc<dyn ConfigTarget>)> {
        let places = (0..=255).map(DevFn);
        places.map(|at| (at, Arc::clone(&self.0) as _)).collect()
    }

    fn existing(&self, _first: &[u8]) -> usize {
        256
    }
}

#[test]
fn after_reset_nothing_is_forwarded() {
    let (port, _) = port();
    assert_eq!(port.windows(), None);
    assert_eq!(port.secondary_bus(), None);
    assert!((0..=255).all(|bus| !port.forwards_bus(BusNumber(bus))));
    assert!(port.child(BusNumber(0), DevFn(0)).is_none());
}

#[test]
fn the_header_is_that_of_a_bridge_without_io_or_bars() {
    let (port, _) = port();
    for at in [0x10, 0x14, 0x1c, 0x30, 0x38] {
        let _ = port.config_write(at, &[0xff; 4]);
    }
    assert_eq!(dword(&port, 0x00), 0x000c_1b36);
    assert_eq!(dword(&port, 0x08) >> 8, 0x06_04_00);
    assert_eq!(dword(&port, 0x0c) >> 16, 0x0001);
    for at in [0x10, 0x14, 0x30, 0x38] {
        assert_eq!(dword(&port, at), 0, "{at:#x}");
    }
    assert_eq!(dword(&port, 0x1c) & 0xffff, 0);
}

#[test]
fn assigned_windows_and_buses_are_forwarded() {
    let (port, _) = port();
    let windows = Windows {
        memory: 0xc000_0000..0xc020_0000,
        prefetchable: 0x12_0000_0000..0x12_0010_0000,
    };
    port.assign(BusNumber(5), &windows);
    assert_eq!(port.windows(), Some(windows));
    assert_eq!(dword(&port, 0x18), 0x0005_0500);
    assert!(port.child(BusNumber(5), DevFn(0)).is_some());
    assert!(port.child(BusNumber(6), DevFn(0)).is_none());
}

#[test]
fn empty_windows_are_closed() {
    let (port, _) = port();
    let closed = Windows {
        memory: 0..0,
        prefetchable: 0..0,
    };
    port.assign(BusNumber(1), &closed);
    assert_eq!(port.windows(), Some(closed));
}

#[test]
fn a_window_change_is_a_layout_change_and_others_are_not() {
    let (port, _) = port();
    port.assign(
        BusNumber(1),
        &Windows {
            memory: 0xc000_0000..0xc010_0000,
            prefetchable: 0..0,
        },
    );
    let cases: [(u16, &[u8], Effect); 6] = [
        (0x22, &[0x10, 0xc0], Effect::LayoutChanged),
        (0x22, &[0x10, 0xc0], Effect::None),
        (0x3c, &[9], Effect::None),
        (0x1a, &[4], Effect::None),
        (0x04, &[0, 0], Effect::LayoutChanged),
        (0x22, &[0x20, 0xc0], Effect::None),
    ];
    for (at, data, effect) in cases {
        assert_eq!(port.config_write(at, data), effect, "{at:#x} {data:x?}");
    }
}

#[test]
fn the_whole_of_64_bits_can_be_a_window() {
    let (port, _) = port();
    let _ = port.config_write(0x24, &[0, 0, 0xff, 0xff]);
    let _ = port.config_write(0x28, &[0; 4]);
    let _ = port.config_write(0x2c, &[0xff; 4]);
    let _ = port.config_write(0x04, &[2, 0]);
    let windows = port.windows().unwrap();
    assert_eq!(windows.prefetchable, 0..u64::MAX);
}

#[test]
fn d1_only_with_ari_forwarding_are_all_functions_reachable() {
    let stub = Stub::with("crowd", PortType::Endpoint, &[]);
    let port = RootPort::new(1, Arc::new(Crowd(stub))).unwrap();
    let closed = Windows {
        memory: 0..0,
        prefetchable: 0..0,
    };
    port.assign(BusNumber(1), &closed);
    let reachable = || {
        let devfns = (0..=255).map(DevFn);
        devfns
            .filter(|d| port.child(BusNumber(1), *d).is_some())
            .count()
    };
    assert_eq!(reachable(), 8);
    let (control_2, _) = pcie::device_control_2_span(port.pcie);
    let _ = port.config_write(control_2, &[0x20, 0]);
    assert_eq!(reachable(), 256);
}

#[test]
fn a_secondary_bus_reset_resets_children_once_and_hides_them() {
    let (port, stub) = port();
    let windows = Windows {
        memory: 0xc000_0000..0xc010_0000,
        prefetchable: 0..0,
    };
    port.assign(BusNumber(1), &windows);
    let resets = || stub.state.lock().unwrap().resets;
    assert_eq!(port.config_write(0x3e, &[0x40, 0]), Effect::LayoutChanged);
    assert_eq!(port.config_write(0x3e, &[0x40, 0]), Effect::None);
    assert_eq!(resets(), 1);
    assert!(port.child(BusNumber(1), DevFn(0)).is_none());
    assert_eq!(port.windows(), None);
    assert_eq!(port.config_write(0x3e, &[0, 0]), Effect::LayoutChanged);
    assert_eq!(resets(), 1);
    assert!(port.child(BusNumber(1), DevFn(0)).is_some());
    assert_eq!(port.windows(), Some(windows));
}
