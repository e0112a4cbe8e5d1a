use super::*;
use crate::bar::{BarIndex, BarKind};
use crate::function::{BarSlot, SingleFunction};
use crate::testing::Stub;

mod hostile;
mod saved;

pub(super) fn layout() -> PciLayout {
    PciLayout {
        ecam: 0xe000_0000..0xf000_0000,
        mmio32: 0xc000_0000..0xe000_0000,
        mmio64: 0x10_0000_0000..0x20_0000_0000,
    }
}

fn root() -> Arc<PciRoot> {
    PciRoot::new(layout()).unwrap()
}

pub(super) fn ecam_offset(bdf: Bdf, register: u64) -> u64 {
    u64::from(bdf.rid().0) * CONFIG_SPACE_SIZE + register
}

fn bdf(bus: u8, devfn: u8) -> Bdf {
    Bdf::new(BusNumber(bus), DevFn(devfn))
}

fn read<const N: usize>(device: &dyn BusDevice, offset: u64) -> [u8; N] {
    let mut bytes = [0xcc; N];
    device.read(offset, &mut bytes);
    bytes
}

fn behind_port(root: &PciRoot, bars: &[(BarKind, u64)]) -> (Bdf, Arc<Stub>) {
    let stub = Stub::with("child", PortType::Endpoint, bars);
    let child = Arc::clone(&stub) as Arc<dyn PciFunction>;
    let port = root.add_root_port(Arc::new(SingleFunction(child))).unwrap();
    (port, stub)
}

#[test]
fn the_host_bridge_is_at_00_00_0_and_the_rest_is_absent() {
    let ecam = root().ecam();
    assert_eq!(read(&*ecam, 0), [0x36, 0x1b, 0x08, 0x00]);
    for offset in [0x1000, 0x8000, 0x10_0000, 0xfff_fffc, 0x1000_0000, u64::MAX] {
        assert_eq!(read(&*ecam, offset), [0xff; 8], "{offset:#x}");
        assert_eq!(ecam.write(offset, &[0; 8]), Effect::None);
    }
}

#[test]
fn accesses_reach_functions_as_parts_of_one_dword_each() {
    let root = root();
    let stub = Stub::new("a");
    let place = root.add_endpoint(Arc::clone(&stub) as _).unwrap();
    let ecam = root.ecam();
    type Parts = &'static [(u16, usize)];
    let cases: [(u64, usize, Parts); 6] = [
        (0x10, 4, &[(0x10, 4)]),
        (0x10, 8, &[(0x10, 4), (0x14, 4)]),
        (0x11, 2, &[(0x11, 2)]),
        (0x13, 2, &[(0x13, 1), (0x14, 1)]),
        (0x12, 8, &[(0x12, 2), (0x14, 4), (0x18, 2)]),
        (0xffe, 4, &[(0xffe, 2)]),
    ];
    for (register, len, expected) in cases {
        let mut data = vec![0; len];
        ecam.read(ecam_offset(place, register), &mut data);
        let _ = ecam.write(ecam_offset(place, register), &data);
        let seen = std::mem::take(&mut stub.state.lock().unwrap().config_accesses);
        assert_eq!(seen, [expected, expected].concat(), "{register:#x}+{len}");
    }
}

#[test]
fn an_access_across_two_functions_reaches_both() {
    let root = root();
    let place = root.add_endpoint(Stub::new("a")).unwrap();
    let straddling = ecam_offset(place, 0xffe);
    assert_eq!(read(&*root.ecam(), straddling), [0x42, 0x42, 0xff, 0xff]);
}

#[test]
fn endpoints_get_devices_first_and_functions_when_devices_run_out() {
    let root = root();
    let stubs: Vec<_> = (0..255).map(|i| Stub::new(i.to_string())).collect();
    let add = |stub: &Arc<Stub>| root.add_endpoint(Arc::clone(stub) as _);
    let places: Vec<_> = stubs.iter().map(|s| add(s).unwrap()).collect();
    assert_eq!(places[0], bdf(0, 0x08));
    assert_eq!(places[30], bdf(0, 0xf8));
    assert_eq!(places[31], bdf(0, 0x01));
    assert_eq!(places[32], bdf(0, 0x09));
    assert_eq!(places[254], bdf(0, 0xff));
    assert_eq!(add(&Stub::new("last")), Err(AddError::Full));
    let told: Vec<_> = stubs
        .iter()
        .map(|s| s.state.lock().unwrap().multi_function)
        .collect();
    assert!(told[..31].iter().all(|told| *told) && !told[31..].contains(&true));
    assert_eq!(read(&*root.ecam(), 0x0e), [0x80], "host bridge");
}

#[test]
fn functions_only_fit_on_a_bus_of_their_kind() {
    let root = root();
    let endpoint = || Stub::with("e", PortType::Endpoint, &[]) as Arc<dyn PciFunction>;
    let wrong = AddError::WrongBus("e".into());
    assert_eq!(root.add_endpoint(endpoint()), Err(wrong));
    let wrong = AddError::WrongBus("i".into());
    let integrated = Arc::new(SingleFunction(Stub::new("i")));
    assert_eq!(root.add_root_port(integrated), Err(wrong));
    assert!(
        root.add_root_port(Arc::new(SingleFunction(endpoint())))
            .is_ok()
    );
}

#[test]
fn resources_are_aligned_disjoint_and_in_their_window() {
    let root = root();
    let (wide, narrow) = (BarKind::Prefetchable64, BarKind::Memory32);
    let sizes = [
        (wide, 0x4000),
        (narrow, 0x1000),
        (wide, 0x10_0000),
        (narrow, 0x8000),
    ];
    let mut stubs = Vec::new();
    for bar in sizes {
        let stub = Stub::with("r", PortType::RootComplexIntegratedEndpoint, &[bar]);
        root.add_endpoint(Arc::clone(&stub) as _).unwrap();
        stubs.push((stub, bar));
        stubs.push((behind_port(&root, &[bar]).1, bar));
    }
    root.assign_resources().unwrap();
    let mut ranges = Vec::new();
    for (stub, (kind, size)) in &stubs {
        let start = stub.address();
        assert_eq!(start % size, 0);
        let range = start..start + size;
        let window = match kind {
            BarKind::Memory32 => layout().mmio32,
            BarKind::Prefetchable64 => layout().mmio64,
        };
        assert!(window.start <= range.start && range.end <= window.end);
        ranges.push(range);
    }
    ranges.sort_by_key(|r| r.start);
    assert!(ranges.windows(2).all(|p| p[0].end <= p[1].start));
}

#[test]
fn assigning_twice_changes_nothing() {
    let root = root();
    let (_, child) = behind_port(&root, &[(BarKind::Prefetchable64, 0x4000)]);
    root.assign_resources().unwrap();
    let first = child.address();
    root.assign_resources().unwrap();
    assert_eq!(child.address(), first);
}

#[test]
fn ports_are_numbered_and_lead_to_their_children() {
    let root = root();
    let bars = [
        (BarKind::Prefetchable64, 0x4000),
        (BarKind::Memory32, 0x1000),
    ];
    let (first, _) = behind_port(&root, &bars);
    let (second, child) = behind_port(&root, &bars);
    let ecam = root.ecam();
    let at = ecam_offset(bdf(2, 0), 0);
    assert_eq!(read(&*ecam, at), [0xff; 4], "not numbered yet");
    root.assign_resources().unwrap();
    assert_eq!(root.secondary_bus(first), Some(BusNumber(1)));
    assert_eq!(root.secondary_bus(second), Some(BusNumber(2)));
    assert_eq!(read(&*ecam, at), [0x42; 4]);
    assert_eq!(read(&*ecam, ecam_offset(bdf(2, 1), 0)), [0xff; 4]);
    let (range, window) = &root.mmio_windows()[1];
    let address = child
        .state
        .lock()
        .unwrap()
        .assigned
        .iter()
        .find(|(slot, _)| *slot == BarSlot::Own(BarIndex::ZERO))
        .unwrap()
        .1;
    assert_eq!(read(&**window, address - range.start + 7), [7]);
}

#[test]
fn the_guest_can_renumber_a_bus_and_close_a_window() {
    let root = root();
    let (port, child) = behind_port(&root, &[(BarKind::Prefetchable64, 0x4000)]);
    root.assign_resources().unwrap();
    let ecam = root.ecam();
    let _ = ecam.write(ecam_offset(port, 0x18), &[0, 9, 9, 0]);
    assert_eq!(read(&*ecam, ecam_offset(bdf(1, 0), 0)), [0xff; 2]);
    assert_eq!(read(&*ecam, ecam_offset(bdf(9, 0), 0)), [0x42; 2]);
    let (range, window) = &root.mmio_windows()[1];
    let offset = child.address() - range.start + 5;
    assert_eq!(read(&**window, offset), [5]);
    assert_eq!(root.doorbells().len(), 1);
    let effect = ecam.write(ecam_offset(port, 0x04), &[0, 0]);
    assert_eq!(effect, Effect::LayoutChanged);
    assert_eq!(read(&**window, offset), [0xff]);
    assert_eq!(root.doorbells().len(), 0);
}

#[test]
fn memory_accesses_reach_the_function_or_nobody() {
    let root = root();
    let stub = Stub::new("a");
    root.add_endpoint(Arc::clone(&stub) as _).unwrap();
    root.assign_resources().unwrap();
    let windows = root.mmio_windows();
    assert_eq!(windows[0].0, layout().mmio32);
    let (range, window) = &windows[1];
    assert_eq!(*range, layout().mmio64);
    let offset = stub.address() - range.start;
    let _ = window.write(offset + 0x10, &[1, 2]);
    let _ = window.write(offset + 0x4000, &[3]);
    let _ = windows[0].1.write(0, &[4]);
    let slot = BarSlot::Own(BarIndex::ZERO);
    let seen = &stub.state.lock().unwrap().writes;
    assert_eq!(*seen, [(slot, 0x10, vec![1, 2])]);
    assert_eq!(read(&**window, offset + 0x4000), [0xff; 4]);
    assert_eq!(read(&**window, u64::MAX), [0xff]);
}

#[test]
fn of_two_functions_at_one_address_the_first_has_the_doorbell() {
    let root = root();
    let (a, b) = (Stub::new("a"), Stub::new("b"));
    root.add_endpoint(Arc::clone(&a) as _).unwrap();
    root.add_endpoint(Arc::clone(&b) as _).unwrap();
    root.assign_resources().unwrap();
    assert_eq!(root.doorbells().len(), 2);
    b.assign(BarSlot::Own(BarIndex::ZERO), a.address());
    root.refresh();
    let doorbells = root.doorbells();
    assert_eq!(doorbells.len(), 1);
    assert_eq!(doorbells[0].address, a.address() + 0x1000);
}

#[test]
fn a_range_outside_the_windows_is_nobodys() {
    let root = root();
    let stub = Stub::new("a");
    root.add_endpoint(Arc::clone(&stub) as _).unwrap();
    for address in [
        0,
        0xe000_0000,
        0xf000_0000,
        0x20_0000_0000,
        u64::MAX - 0x4000,
    ] {
        stub.assign(BarSlot::Own(BarIndex::ZERO), address);
        root.refresh();
        assert_eq!(root.doorbells().len(), 0, "{address:#x}");
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let mut small = layout();
    small.mmio64 = 0x10_0000_0000..0x10_0010_0000;
    small.ecam.end = small.ecam.start + (2 << 20);
    let root = PciRoot::new(small.clone()).unwrap();
    behind_port(&root, &[(BarKind::Prefetchable64, 0x4000)]);
    assert_eq!(root.assign_resources(), Ok(()));
    behind_port(&root, &[]);
    assert_eq!(root.assign_resources(), Err(AssignError::NoBus(2)));
    behind_port(&root, &[(BarKind::Prefetchable64, 0x4000)]);
    let window = small.mmio64;
    assert_eq!(
        root.assign_resources(),
        Err(AssignError::WindowFull { window })
    );
}

#[test]
fn without_a_64_bit_window_everything_goes_below_4_gib() {
    let mut low = layout();
    low.mmio64 = 0..0;
    let root = PciRoot::new(low).unwrap();
    let (_, child) = behind_port(&root, &[(BarKind::Prefetchable64, 0x4000)]);
    root.assign_resources().unwrap();
    assert!(layout().mmio32.contains(&child.address()));
    assert_eq!(root.mmio_windows().len(), 1);
    assert_eq!(root.doorbells().len(), 1);
}
