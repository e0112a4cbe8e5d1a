//! A guest that writes anything anywhere: a whole root complex with real functions, under random accesses.

use std::sync::atomic::{AtomicBool, Ordering};

use devices::gate::Reasons;
use devices::virtio::VirtioFunction;
use proptest::prelude::*;

use super::{ecam_offset, layout};
use crate::bar::BarKind;
use crate::function::{PciFunction, SingleFunction};
use crate::header::Command;
use crate::root::*;
use crate::testing::{Held, RecordingController};
use crate::virtio::{Options, VirtioPci};

struct Machine {
    root: Arc<PciRoot>,
    controller: RecordingController,
    /// Places, and functions in the order of the decode table: root bus first.
    places: Vec<Bdf>,
    functions: Vec<(Arc<VirtioPci>, Arc<VirtioFunction>)>,
    releases: Vec<Arc<AtomicBool>>,
}

/// A host bridge, two endpoints on the root bus, and two behind ports.
fn machine() -> Machine {
    let root = PciRoot::new(layout()).unwrap();
    let controller = RecordingController::default();
    let mut places = vec![Bdf::default()];
    let mut functions = Vec::new();
    let mut releases = Vec::new();
    for (i, options) in [
        Options::ROOT_BUS,
        Options::ROOT_BUS,
        Options::BEHIND_PORT,
        Options::BEHIND_PORT,
    ]
    .into_iter()
    .enumerate()
    {
        let (function, _, release) = Held::function(2 + i, &[7; 12]);
        let pci = VirtioPci::new(Arc::clone(&function), &controller, options).unwrap();
        let place = match options.port_type {
            PortType::Endpoint => {
                root.add_root_port(Arc::new(SingleFunction(Arc::clone(&pci) as _)))
            }
            _ => root.add_endpoint(Arc::clone(&pci) as _),
        };
        places.push(place.unwrap());
        functions.push((pci, function));
        releases.push(release);
    }
    root.assign_resources().unwrap();
    places.extend([
        Bdf::new(BusNumber(1), DevFn(0)),
        Bdf::new(BusNumber(2), DevFn(0)),
    ]);
    Machine {
        root,
        controller,
        places,
        functions,
        releases,
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// A write to configuration space of one of the places, or anywhere in ECAM.
    Config(usize, u64, Vec<u8>),
    Anywhere(u64, Vec<u8>),
    /// A write to the BAR of one of the functions, wherever it is.
    Bar(usize, u64, Vec<u8>),
    /// Reads of both kinds, and work on the device side.
    Read(usize, u64, usize),
    Work(usize),
    /// What a well-behaved driver does to get a function going.
    Start(usize),
}

fn data() -> impl Strategy<Value = Vec<u8>> {
    let bytes = prop_oneof![any::<u8>(), Just(0), Just(0xff), Just(1)];
    let sizes = prop_oneof![Just(1usize), Just(2), Just(4), Just(8), 1usize..9];
    sizes.prop_flat_map(move |n| prop::collection::vec(bytes.clone(), n))
}

fn step() -> impl Strategy<Value = Step> {
    let register = prop_oneof![0u64..0x110, 0u64..0x1000, Just(4u64)];
    let bar = prop_oneof![
        0u64..0x120,
        (0u64..16).prop_map(|q| 0x1000 + q * 2),
        (0u64..40).prop_map(|d| 0x2000 + d * 4),
        0u64..0x4010,
    ];
    prop_oneof![
        4 => (0usize..7, register.clone(), data()).prop_map(|(p, r, d)| Step::Config(p, r, d)),
        1 => (0u64..0x1000_0008, data()).prop_map(|(a, d)| Step::Anywhere(a, d)),
        4 => (0usize..4, bar.clone(), data()).prop_map(|(f, o, d)| Step::Bar(f, o, d)),
        1 => (0usize..4, bar, 1usize..9).prop_map(|(f, o, n)| Step::Read(f, o, n)),
        1 => (0usize..4).prop_map(Step::Work),
        1 => (0usize..4).prop_map(Step::Start),
    ]
}

/// Message Control of the MSI-X capability of every function here.
const MSIX_CONTROL: u64 = 0x7e;

/// Offsets and values a driver writes to the BAR: negotiation, one vector, queue 0 at addresses that are RAM.
const DRIVER: [(u64, &[u8]); 13] = [
    (0x2008, &[1, 0, 0, 0]),
    (0x200c, &[0; 4]),
    (20, &[1]),
    (20, &[3]),
    (8, &[1, 0, 0, 0]),
    (12, &[1, 0, 0, 0]),
    (20, &[0xb]),
    (22, &[0, 0]),
    (32, &[0, 0x10, 0, 0]),
    (40, &[0, 0x20, 0, 0]),
    (48, &[0, 0x30, 0, 0]),
    (28, &[1, 0]),
    (20, &[0xf]),
];

impl Machine {
    fn run(&self, step: &Step) {
        let ecam = self.root.ecam();
        match step {
            Step::Config(place, register, data) => {
                let _ = ecam.write(ecam_offset(self.places[*place], *register), data);
            }
            Step::Anywhere(offset, data) => {
                let _ = ecam.write(*offset, data);
            }
            Step::Bar(function, offset, data) => {
                for decoded in self.functions[*function].0.decoded() {
                    self.bus_write(decoded.range.start + offset, data);
                }
            }
            Step::Read(function, offset, len) => {
                let mut data = [0xcc; 8];
                ecam.read(offset * 0x1001, &mut data[..*len]);
                for decoded in self.functions[*function].0.decoded() {
                    self.bus_read(decoded.range.start + offset, &mut data[..*len]);
                }
            }
            Step::Work(function) => {
                let (_, virtio) = &self.functions[*function];
                self.releases[*function].fetch_xor(true, Ordering::SeqCst);
                virtio.on_event(0);
                virtio.on_event(1);
                (0..virtio.num_queues()).for_each(|q| virtio.service(q));
            }
            Step::Start(function) => {
                // After the host bridge come two endpoints, two ports, and what is behind the ports.
                let place = self.places[[1, 2, 5, 6][*function]];
                let _ = ecam.write(ecam_offset(place, 0x04), &[6, 0]);
                let _ = ecam.write(ecam_offset(place, MSIX_CONTROL), &[0, 0x80]);
                for (offset, data) in DRIVER {
                    self.run(&Step::Bar(*function, offset, data.to_vec()));
                }
            }
        }
    }

    fn bus_write(&self, address: u64, data: &[u8]) {
        for (range, window) in self.root.mmio_windows() {
            if range.contains(&address) {
                let _ = window.write(address - range.start, data);
            }
        }
    }

    fn bus_read(&self, address: u64, data: &mut [u8]) {
        for (range, window) in self.root.mmio_windows() {
            if range.contains(&address) {
                window.read(address - range.start, data);
            }
        }
    }

    fn dword(&self, place: Bdf, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.root
            .ecam()
            .read(ecam_offset(place, register), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// The addresses that reach function `i` by the registers as the guest reads them, computed here from scratch.
    fn expected_ranges(&self, i: usize) -> Vec<Range<u64>> {
        let (pci, _) = &self.functions[i];
        let register = |at| {
            let mut bytes = [0; 4];
            pci.config_read(at, &mut bytes);
            u64::from(u32::from_le_bytes(bytes))
        };
        let size = pci.resources()[0].size;
        let start = register(0x14) << 32 | register(0x10) & !0xf;
        let enabled = register(0x04) & u64::from(Command::MEMORY.bits()) != 0;
        let Some(end) = start.checked_add(size).filter(|_| enabled) else {
            return Vec::new();
        };
        if i < 2 {
            return std::iter::once(start..end).collect();
        }
        let port = self.places[i + 1];
        if self.dword(port, 0x3c) >> 16 & 0x40 != 0 || self.dword(port, 0x04) & 2 == 0 {
            return Vec::new();
        }
        let memory = u64::from(self.dword(port, 0x20));
        let low = u64::from(self.dword(port, 0x24));
        let upper = |at| u64::from(self.dword(port, at)) << 32;
        let windows = [
            (memory << 16 & 0xfff0_0000, memory & 0xfff0_0000 | 0xf_ffff),
            (
                upper(0x28) | low << 16 & 0xfff0_0000,
                upper(0x2c) | low & 0xfff0_0000 | 0xf_ffff,
            ),
        ];
        let cut = |(first, last): (u64, u64)| start.max(first)..end.min(last.saturating_add(1));
        windows.map(cut).into()
    }

    /// The function that should answer at `address`.
    fn expected_at(&self, address: u64) -> Option<usize> {
        let PciLayout { mmio32, mmio64, .. } = layout();
        if !mmio32.contains(&address) && !mmio64.contains(&address) {
            return None;
        }
        let reaches = |i: &usize| {
            self.expected_ranges(*i)
                .iter()
                .any(|r| r.contains(&address))
        };
        (0..4).find(reaches)
    }

    /// The function that does answer at `address`.
    fn found_at(&self, address: u64) -> Option<usize> {
        let table = self.root.decode.load();
        let (entry, _) = table.resolve(address)?;
        let found = Arc::as_ptr(&entry.function);
        let own = |(pci, _): &(Arc<VirtioPci>, _)| std::ptr::addr_eq(Arc::as_ptr(pci), found);
        self.functions.iter().position(own)
    }
}

/// The bits of the whole configuration space of one place that never change, by what its registers may do.
const READ_ONLY: [(u16, u32); 6] = [
    (0x00, 0xffff_ffff),
    (0x08, 0xffff_ffff),
    (0x2c, 0xffff_ffff),
    (0x34, 0xffff_ffff),
    (0x40, 0xffff_ffff),
    (0x44, 0xffff_ffff),
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    /// Nothing panics; identities stay; the functions that answer memory accesses are those whose registers say so;
    /// doorbells lie in decoded ranges of live functions; nothing is delivered without a route.
    #[test]
    fn registers_and_routing_always_agree(steps in prop::collection::vec(step(), 1..60)) {
        let machine = machine();
        let constant = |machine: &Machine| -> Vec<u32> {
            // Type 1 headers have the upper window limit at 0x2c; only the places with type 0 count there.
            let places = machine.places.iter().take(5).enumerate();
            places
                .flat_map(|(i, place)| READ_ONLY.map(|(at, mask)| {
                    let bridge = i >= 3 && at == 0x2c;
                    if bridge { 0 } else { machine.dword(*place, at.into()) & mask }
                }))
                .collect()
        };
        let before = constant(&machine);
        for step in &steps {
            machine.run(step);
        }
        prop_assert_eq!(constant(&machine), before);

        let mut probes = vec![0, u64::MAX, layout().mmio32.start, layout().mmio64.start];
        for i in 0..4 {
            for range in machine.expected_ranges(i) {
                probes.extend([range.start, range.start.wrapping_sub(1)]);
                probes.extend([range.end, range.end.wrapping_sub(1)]);
            }
        }
        for address in probes {
            let (found, expected) = (machine.found_at(address), machine.expected_at(address));
            prop_assert_eq!(found, expected, "at {:#x}", address);
        }
        for doorbell in machine.root.doorbells() {
            let owner = machine.found_at(doorbell.address).unwrap();
            prop_assert!(machine.functions[owner].1.is_live());
        }
        for sink in machine.controller.sinks.lock().unwrap().iter() {
            let unrouted = sink.take().into_iter().filter(|event| {
                matches!(event, crate::testing::SinkEvent::Fire(_, None))
            });
            prop_assert_eq!(unrouted.count(), 0);
        }
    }
}

#[test]
fn the_machine_of_these_tests_has_what_it_should() {
    let machine = machine();
    let ids: Vec<_> = machine
        .places
        .iter()
        .map(|p| machine.dword(*p, 0))
        .collect();
    let (virtio, port) = (0x1042_1af4, 0x000c_1b36);
    assert_eq!(
        ids,
        [0x0008_1b36, virtio, virtio, port, port, virtio, virtio]
    );
    assert!(machine.root.doorbells().is_empty());
    for started in 0..4 {
        machine.run(&Step::Start(started));
        assert_eq!(machine.root.doorbells().len(), started + 1);
        let enabled = machine.functions[started].0.msix().save().control.enabled;
        assert!(enabled, "MSI-X of {started}");
    }
    let kinds: Vec<_> = machine
        .functions
        .iter()
        .map(|(pci, _)| pci.resources()[0].kind)
        .collect();
    assert_eq!(kinds, [BarKind::Prefetchable64; 4]);
}

/// Four vCPUs and an I/O thread at once: it ends, and then gate and MSI-X agree with the registers.
#[test]
fn concurrent_writes_leave_switches_and_registers_in_agreement() {
    let machine = machine();
    let place = machine.places[1];
    let (pci, virtio) = &machine.functions[0];
    std::thread::scope(|threads| {
        for vcpu in 0..4u8 {
            let machine = &machine;
            threads.spawn(move || {
                let ecam = machine.root.ecam();
                for round in 0..400u16 {
                    let bits = (round as u8).wrapping_mul(vcpu + 3);
                    let command = [bits & 6, 0];
                    let _ = ecam.write(ecam_offset(place, 0x04), &command);
                    let _ = ecam.write(ecam_offset(place, MSIX_CONTROL), &[0, bits << 6]);
                    let _ = ecam.write(ecam_offset(place, 0x11), &[bits & 0xc0]);
                    match round % 16 {
                        0 => machine.run(&Step::Start(0)),
                        7 if vcpu == 0 => {
                            let _ = ecam.write(ecam_offset(place, 0x49), &[0x80]);
                        }
                        _ => machine.run(&Step::Read(0, 0x2000, 8)),
                    }
                }
            });
        }
        threads.spawn(|| (0..1000).for_each(|_| machine.run(&Step::Work(0))));
    });
    let master = machine.dword(place, 0x04) & 4 != 0;
    assert_eq!(virtio.reasons().contains(Reasons::NO_DMA), !master);
    let control = machine.dword(place, MSIX_CONTROL - 2) >> 16;
    assert_eq!(pci.msix().save().control.enabled, control & 0x8000 != 0);
    for address in machine.expected_ranges(0).iter().map(|r| r.start) {
        assert_eq!(machine.found_at(address), machine.expected_at(address));
    }
}
