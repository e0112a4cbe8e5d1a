use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use devices::memory::View;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{Held, RecordingController, RecordingSink};
use devices::msi::MsiMessage;

const SLOT: BarSlot = BarSlot::Own(BAR);
/// Common configuration registers, by offset (D2).
mod reg {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_MSIX_VECTOR: u64 = 16;
    pub const NUM_QUEUES: u64 = 18;
    pub const DEVICE_STATUS: u64 = 20;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_MSIX_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    pub const QUEUE_DESC: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
    pub const QUEUE_RESET: u64 = 58;
    pub const ADMIN_QUEUE_INDEX: u64 = 60;
    pub const ADMIN_QUEUE_NUM: u64 = 62;
}

/// A function on no bus, and a driver of few words.
struct Rig {
    pci: Arc<VirtioPci>,
    function: Arc<VirtioFunction>,
    sink: Arc<RecordingSink>,
    view: View,
    release: Arc<AtomicBool>,
}

fn rig() -> Rig {
    rig_with(2, &[1, 2, 3, 4, 5], Options::ROOT_BUS)
}

fn rig_with(queues: usize, config: &[u8], options: Options) -> Rig {
    let (function, view, release) = Held::function(queues, config);
    let controller = RecordingController::default();
    let pci = VirtioPci::new(Arc::clone(&function), &controller, options).unwrap();
    let sink = Arc::clone(&controller.sinks.lock().unwrap()[0]);
    Rig {
        pci,
        function,
        sink,
        view,
        release,
    }
}

impl Rig {
    fn get<const N: usize>(&self, offset: u64) -> u64 {
        let mut bytes = [0xcc; N];
        self.pci.memory_read(SLOT, offset, &mut bytes);
        let mut wide = [0; 8];
        wide[..N].copy_from_slice(&bytes);
        u64::from_le_bytes(wide)
    }

    fn put<const N: usize>(&self, offset: u64, value: u64) -> Effect {
        let bytes = value.to_le_bytes();
        self.pci.memory_write(SLOT, offset, &bytes[..N])
    }

    fn config<const N: usize>(&self, at: u16) -> u64 {
        let mut bytes = [0xcc; N];
        self.pci.config_read(at, &mut bytes);
        let mut wide = [0; 8];
        wide[..N].copy_from_slice(&bytes);
        u64::from_le_bytes(wide)
    }

    fn set_config<const N: usize>(&self, at: u16, value: u64) -> Effect {
        self.pci.config_write(at, &value.to_le_bytes()[..N])
    }

    /// Offsets of the capabilities with this ID, in list order.
    fn capabilities(&self, id: u8) -> Vec<u16> {
        let mut found = Vec::new();
        let mut at = self.config::<1>(0x34) as u16;
        while at != 0 {
            if self.config::<1>(at) as u8 == id {
                found.push(at);
            }
            at = self.config::<1>(at + 1) as u16;
        }
        found
    }

    fn master(&self) {
        let _ = self.set_config::<2>(0x04, 0x0006);
    }

    /// Programs MSI-X vector `n` with data `n` and enables MSI-X.
    fn msix(&self, n: u64) {
        let entry = 0x2000 + n * 16;
        let _ = self.put::<8>(entry, 0xfee0_0000);
        let _ = self.put::<8>(entry + 8, n);
        let cap = self.capabilities(0x11)[0];
        let _ = self.set_config::<2>(cap + 2, 0x8000);
    }

    /// Brings the device to DRIVER_OK with queue 0 at fixed addresses and vectors 0 (configuration) and 1 (queue).
    fn start(&self) {
        for status in [1, 3] {
            let _ = self.put::<1>(reg::DEVICE_STATUS, status);
        }
        let _ = self.put::<4>(reg::DRIVER_FEATURE_SELECT, 1);
        // VERSION_1 and RING_RESET.
        let _ = self.put::<4>(reg::DRIVER_FEATURE, 1 | 1 << 8);
        let _ = self.put::<1>(reg::DEVICE_STATUS, 0xb);
        assert_eq!(self.get::<1>(reg::DEVICE_STATUS), 0xb);
        let _ = self.put::<2>(reg::CONFIG_MSIX_VECTOR, 0);
        self.enable_queue();
        let _ = self.put::<1>(reg::DEVICE_STATUS, 0xf);
    }

    fn enable_queue(&self) {
        let _ = self.put::<2>(reg::QUEUE_SELECT, 0);
        let _ = self.put::<2>(reg::QUEUE_MSIX_VECTOR, 1);
        let _ = self.put::<8>(reg::QUEUE_DESC, 0x1000);
        let _ = self.put::<8>(reg::QUEUE_DRIVER, 0x2000);
        let _ = self.put::<8>(reg::QUEUE_DEVICE, 0x3000);
        let _ = self.put::<2>(reg::QUEUE_ENABLE, 1);
    }

    /// Makes `count` requests available on queue 0 and lets the device take them.
    fn request(&self, count: u16) {
        let view = &self.view;
        for i in 0..count {
            let at = 0x1000 + u64::from(i) * 16;
            // Address, length, flags = device-writable, next.
            view.write_obj(0x8000u64, GuestAddress(at)).unwrap();
            view.write_obj(16u32, GuestAddress(at + 8)).unwrap();
            view.write_obj(2u16, GuestAddress(at + 12)).unwrap();
            let entry = 0x2004 + u64::from(i) * 2;
            view.write_obj(i, GuestAddress(entry)).unwrap();
        }
        view.write_obj(count, GuestAddress(0x2002)).unwrap();
        self.function.service(0);
    }

    fn complete(&self) {
        self.release.store(true, SeqCst);
        self.function.on_event(0);
    }

    fn used(&self) -> u16 {
        self.view.read_obj(GuestAddress(0x3002)).unwrap()
    }

    fn flr(&self) -> Effect {
        let control = self.capabilities(0x10)[0] + 8;
        let old = self.config::<2>(control);
        self.set_config::<2>(control, old | 0x8000)
    }
}

fn message(data: u32) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_0000,
        data,
    }
}

#[test]
fn d2_the_header_and_capabilities_are_what_a_driver_looks_for() {
    let rig = rig();
    assert_eq!(rig.config::<4>(0x00), 0x1042_1af4);
    assert_eq!(rig.config::<4>(0x08), 0x0100_0001);
    assert_eq!(rig.config::<4>(0x2c), 0x0040_1af4);
    assert_eq!(rig.config::<1>(0x3d), 0, "no interrupt pin");
    let vendor: Vec<_> = rig
        .capabilities(9)
        .into_iter()
        .map(|cap| {
            let (kind, bar) = (rig.config::<1>(cap + 3), rig.config::<1>(cap + 4));
            let (offset, len) = (rig.config::<4>(cap + 8), rig.config::<4>(cap + 12));
            (kind, bar, offset, len)
        })
        .collect();
    let expected = [
        (1, 0, 0, 64),
        (3, 0, 0x80, 1),
        (4, 0, 0x100, 5),
        (2, 0, 0x1000, 8),
        (5, 0, 0, 0),
    ];
    assert_eq!(vendor, expected);
    assert_eq!(rig.capabilities(0x11).len(), 1);
    assert_eq!(rig.config::<2>(rig.capabilities(0x10)[0] + 2), 0x0092);
    assert_eq!(rig.config::<4>(0x100), 0);
    assert!(rig.capabilities(0x01).is_empty(), "E9: no PM capability");
}

#[test]
fn without_device_configuration_there_is_no_capability_for_it() {
    let rig = rig_with(1, &[], Options::ROOT_BUS);
    let kinds = rig.capabilities(9).into_iter();
    let kinds: Vec<_> = kinds.map(|cap| rig.config::<1>(cap + 3)).collect();
    assert_eq!(kinds, [1, 3, 2, 5]);
    assert_eq!(rig.get::<4>(0x100), 0);
}

#[test]
fn behind_a_port_a_function_is_an_endpoint_with_ari() {
    let rig = rig_with(1, &[], Options::BEHIND_PORT);
    assert_eq!(rig.config::<2>(rig.capabilities(0x10)[0] + 2), 0x0002);
    assert_eq!(rig.config::<4>(0x100), 0x0001_000e);
}

#[test]
fn functions_that_cannot_be_shown_are_refused() {
    let new = |queues, config: &[u8], vectors| {
        let (function, ..) = Held::function(queues, config);
        let controller = RecordingController::default();
        let options = Options {
            vectors,
            ..Options::ROOT_BUS
        };
        VirtioPci::new(function, &controller, options).map(|_| ())
    };
    let long = vec![0; 3841];
    assert_eq!(
        new(1, &long, None),
        Err(VirtioPciError::ConfigTooLong(3841))
    );
    assert_eq!(new(1, &[], Some(0)), Err(VirtioPciError::Vectors(0)));
    assert_eq!(new(1, &[], Some(2049)), Err(VirtioPciError::Vectors(2049)));
    assert_eq!(new(1, &long[..3840], Some(2048)), Ok(()));
}

#[test]
fn features_are_seen_through_a_window_of_32_bits() {
    let rig = rig();
    let window = |select| {
        let _ = rig.put::<4>(reg::DEVICE_FEATURE_SELECT, select);
        rig.get::<4>(reg::DEVICE_FEATURE)
    };
    let low = window(0);
    assert_eq!(low & 1 << 9, 1 << 9);
    assert_eq!(window(1) & 1, 1, "VERSION_1");
    assert_eq!([2, 3, u64::from(u32::MAX)].map(window), [0; 3], "E2");
}

#[test]
fn driver_features_are_fixed_once_features_ok_is_set() {
    let rig = rig();
    rig.start();
    let _ = rig.put::<4>(reg::DRIVER_FEATURE_SELECT, 0);
    let _ = rig.put::<4>(reg::DRIVER_FEATURE, 1 << 9);
    assert_eq!(rig.get::<4>(reg::DRIVER_FEATURE), 0);
}

#[test]
fn queue_registers_belong_to_the_selected_queue() {
    let rig = rig();
    assert_eq!(rig.get::<2>(reg::NUM_QUEUES), 2);
    for queue in [0, 1] {
        let _ = rig.put::<2>(reg::QUEUE_SELECT, queue);
        assert_eq!(rig.get::<2>(reg::QUEUE_SIZE), 8);
        assert_eq!(rig.get::<2>(reg::QUEUE_NOTIFY_OFF), queue);
        let _ = rig.put::<2>(reg::QUEUE_SIZE, 4 >> queue);
    }
    let sizes = [0, 1].map(|queue| {
        let _ = rig.put::<2>(reg::QUEUE_SELECT, queue);
        rig.get::<2>(reg::QUEUE_SIZE)
    });
    assert_eq!(sizes, [4, 2]);
}

#[test]
fn a_queue_that_is_not_there_reads_zero_and_ignores_writes() {
    let rig = rig();
    let _ = rig.put::<2>(reg::QUEUE_SELECT, 2);
    for at in (24..60).step_by(2) {
        assert_eq!(rig.put::<2>(at, 1), Effect::None, "{at}");
        assert_eq!(rig.get::<2>(at), 0, "{at}");
    }
    assert_eq!(rig.get::<2>(reg::QUEUE_SELECT), 2);
}

#[test]
fn b53_halves_of_addresses_are_independent() {
    let rig = rig();
    for at in [reg::QUEUE_DESC, reg::QUEUE_DRIVER, reg::QUEUE_DEVICE] {
        let _ = rig.put::<4>(at + 4, 0x11);
        let _ = rig.put::<4>(at, 0x2222_0000);
        assert_eq!(rig.get::<8>(at), 0x11_2222_0000);
        assert_eq!(rig.get::<4>(at + 4), 0x11);
    }
}

#[test]
fn writes_that_are_not_one_register_are_ignored() {
    let rig = rig();
    let _ = rig.put::<4>(reg::QUEUE_SIZE, 0x0001_0002);
    let _ = rig.put::<1>(reg::QUEUE_SELECT, 1);
    let _ = rig.put::<2>(reg::DEVICE_STATUS, 1);
    let _ = rig.put::<2>(reg::QUEUE_DESC, 0xffff);
    let _ = rig.put::<4>(reg::QUEUE_DESC + 2, 0xffff);
    let _ = rig.put::<8>(reg::DEVICE_FEATURE_SELECT, 1);
    let found = [
        rig.get::<2>(reg::QUEUE_SIZE),
        rig.get::<2>(reg::QUEUE_SELECT),
        rig.get::<1>(reg::DEVICE_STATUS),
        rig.get::<8>(reg::QUEUE_DESC),
        rig.get::<4>(reg::DEVICE_FEATURE_SELECT),
    ];
    assert_eq!(found, [8, 0, 0, 0, 0]);
}

#[test]
fn e4_a_vector_that_is_not_there_reads_back_as_no_vector() {
    let rig = rig();
    for at in [reg::CONFIG_MSIX_VECTOR, reg::QUEUE_MSIX_VECTOR] {
        let read_back = [2, 3, 0, 0xffff].map(|vector| {
            let _ = rig.put::<2>(at, vector);
            rig.get::<2>(at)
        });
        assert_eq!(read_back, [2, 0xffff, 0, 0xffff]);
    }
}

#[test]
fn b9_a_plain_function_has_no_admin_queues() {
    let rig = rig();
    let _ = rig.put::<2>(reg::ADMIN_QUEUE_NUM, 1);
    assert_eq!(rig.get::<2>(reg::ADMIN_QUEUE_INDEX), 0);
    assert_eq!(rig.get::<2>(reg::ADMIN_QUEUE_NUM), 0);
}

#[test]
fn device_configuration_ends_at_the_length_of_its_capability() {
    let rig = rig();
    assert_eq!(rig.get::<8>(0x100), 0x05_0403_0201);
    let _ = rig.put::<1>(0x104, 9);
    let _ = rig.put::<4>(0x104, u64::MAX);
    assert_eq!(rig.get::<1>(0x104), 9);
}

#[test]
fn e10_nothing_happens_before_bus_mastering() {
    let rig = rig();
    rig.msix(1);
    rig.start();
    rig.request(1);
    rig.complete();
    assert_eq!((rig.used(), rig.sink.delivered()), (0, vec![]));
    rig.master();
    rig.function.service(0);
    rig.function.on_event(0);
    assert_eq!((rig.used(), rig.sink.delivered()), (1, vec![message(1)]));
    assert_eq!(rig.get::<1>(0x80), 1, "ISR");
    assert_eq!(rig.get::<1>(0x80), 0, "reading cleared it");
}

#[test]
fn opening_the_gate_kicks_every_enabled_queue() {
    let rig = rig();
    rig.start();
    let event = rig.function.kick_event(0).unwrap();
    let _ = event.read();
    rig.master();
    assert!(event.read().is_ok());
}

#[test]
fn isr_bits_are_set_without_msix_too() {
    let rig = rig();
    rig.master();
    rig.start();
    rig.request(1);
    rig.complete();
    rig.function.on_event(1);
    assert_eq!(rig.sink.take(), []);
    assert_eq!(rig.get::<4>(0x80), 3);
}

#[test]
fn a_notification_by_exit_kicks_its_queue_and_no_other() {
    let rig = rig();
    let kicked = || [0, 1].map(|q| rig.function.kick_event(q).unwrap().read().is_ok());
    let _ = rig.put::<2>(0x1000, 0);
    assert_eq!(kicked(), [true, false]);
    let _ = rig.put::<4>(0x1004, 1);
    assert_eq!(kicked(), [false, true]);
    for offset in [0x1002, 0x1005, 0x1008] {
        let _ = rig.put::<2>(offset, 0);
    }
    assert_eq!(kicked(), [false, false]);
}

#[test]
fn doorbells_are_those_of_enabled_queues_of_a_live_function() {
    let rig = rig();
    assert!(rig.pci.doorbells().is_empty());
    rig.start();
    let offsets: Vec<_> = rig.pci.doorbells().iter().map(|d| d.offset).collect();
    assert_eq!(offsets, [0x1000]);
    assert_eq!(rig.put::<1>(reg::DEVICE_STATUS, 0), Effect::LayoutChanged);
    assert!(rig.pci.doorbells().is_empty());
}

#[test]
fn only_what_moves_or_hides_the_bar_is_a_layout_change() {
    let rig = rig();
    let cases: [(u16, u64, Effect); 7] = [
        (0x10, 0x4000, Effect::None),
        (0x04, 0x0004, Effect::None),
        (0x04, 0x0006, Effect::LayoutChanged),
        (0x04, 0x0006, Effect::None),
        (0x10, 0x8000, Effect::LayoutChanged),
        (0x14, 0x0010, Effect::LayoutChanged),
        (0x04, 0x0004, Effect::LayoutChanged),
    ];
    for (at, value, effect) in cases {
        assert_eq!(rig.set_config::<4>(at, value), effect, "{at:#x} {value:#x}");
    }
    assert_eq!(rig.pci.decoded(), []);
}

#[test]
fn b51_e5_a_queue_reset_waits_for_what_is_in_flight() {
    let rig = rig();
    rig.master();
    rig.start();
    rig.request(2);
    assert_eq!(rig.put::<2>(reg::QUEUE_RESET, 1), Effect::LayoutChanged);
    assert_eq!(rig.get::<2>(reg::QUEUE_RESET), 1);
    assert!(rig.pci.doorbells().is_empty());
    rig.complete();
    assert_eq!(rig.get::<2>(reg::QUEUE_RESET), 0);
    assert_eq!(rig.get::<2>(reg::QUEUE_ENABLE), 0);
    rig.enable_queue();
    assert_eq!(rig.get::<2>(reg::QUEUE_ENABLE), 1);
    assert_eq!(rig.pci.doorbells().len(), 1);
}

#[test]
fn e3_flr_resets_virtio_msix_and_configuration_space() {
    let rig = rig();
    rig.pci.set_multi_function();
    rig.pci.assign(SLOT, 0x12_3456_4000);
    rig.master();
    rig.msix(1);
    rig.start();
    assert_eq!(rig.pci.decoded().len(), 1);
    assert_eq!(rig.flr(), Effect::LayoutChanged);
    assert_eq!(rig.get::<1>(reg::DEVICE_STATUS), 0);
    assert_eq!(rig.config::<2>(0x04), 0);
    assert_eq!(rig.config::<8>(0x10), 0xc);
    assert_eq!(rig.config::<2>(rig.capabilities(0x11)[0] + 2), 2);
    assert_eq!(rig.get::<4>(0x201c), 1, "vector masked");
    assert_eq!(rig.config::<1>(0x0e), 0x80, "not a register to reset");
    assert_eq!(rig.pci.decoded(), []);
    assert!(rig.pci.doorbells().is_empty());
    assert!(rig.function.reasons().contains(Reasons::NO_DMA));
}

#[test]
fn e3_after_flr_under_load_nothing_is_delivered_and_the_driver_recovers() {
    let rig = rig();
    rig.master();
    rig.msix(1);
    rig.start();
    rig.request(3);
    let _ = rig.flr();
    let status = rig.capabilities(0x10)[0] + 0x0a;
    assert_eq!(rig.config::<2>(status) & 0x20, 0x20, "transactions pending");
    rig.master();
    rig.msix(1);
    rig.sink.take();
    rig.complete();
    assert_eq!(rig.config::<2>(status) & 0x20, 0);
    assert_eq!(rig.get::<1>(reg::DEVICE_STATUS), 0);
    assert_eq!(rig.sink.delivered(), []);
    for at in [0x2000, 0x3000] {
        rig.view.write_slice(&[0; 64], GuestAddress(at)).unwrap();
    }
    rig.start();
    rig.request(1);
    rig.complete();
    assert_eq!((rig.used(), rig.sink.delivered()), (1, vec![message(1)]));
}

#[test]
fn e3_flr_waits_a_little_for_what_is_in_flight() {
    let rig = rig();
    rig.master();
    rig.start();
    rig.request(1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !rig.function.is_resetting() {
                std::thread::yield_now();
            }
            rig.complete();
        });
        let _ = rig.flr();
        assert!(!rig.function.is_resetting());
    });
    rig.master();
    rig.start();
    rig.release.store(false, SeqCst);
    rig.request(1);
    let start = Instant::now();
    let _ = rig.flr();
    assert!(rig.function.is_resetting());
    assert!(start.elapsed() >= RESET_PATIENCE);
}

#[test]
fn virtio_reset_leaves_configuration_space_and_msix_alone() {
    let rig = rig();
    rig.pci.assign(SLOT, 0x4000);
    rig.master();
    rig.msix(1);
    rig.start();
    let _ = rig.put::<1>(reg::DEVICE_STATUS, 0);
    assert_eq!(rig.config::<2>(0x04), 6);
    assert_eq!(rig.pci.decoded().len(), 1);
    assert_eq!(rig.get::<4>(0x2018), 1);
    assert_eq!(rig.get::<2>(reg::CONFIG_MSIX_VECTOR), 0xffff);
    let selectors = [reg::DRIVER_FEATURE_SELECT, reg::QUEUE_SELECT].map(|at| rig.get::<2>(at));
    assert_eq!(selectors, [0, 0]);
}

/// Sets up the configuration access capability; returns where its data bytes are.
fn window(rig: &Rig, bar: u64, offset: u64, len: u64) -> u16 {
    let cap = rig.pci.offsets.pci_cfg;
    let _ = rig.set_config::<1>(cap + 4, bar);
    let _ = rig.set_config::<4>(cap + 8, offset);
    let _ = rig.set_config::<4>(cap + 12, len);
    cap + 16
}

#[test]
fn the_access_window_reads_and_writes_the_bar_while_decoding_is_off() {
    let rig = rig();
    let data = window(&rig, 0, reg::NUM_QUEUES, 2);
    assert_eq!(rig.config::<2>(data), 2);
    let data = window(&rig, 0, reg::DEVICE_STATUS, 1);
    let _ = rig.set_config::<1>(data, 1);
    assert_eq!(rig.get::<1>(reg::DEVICE_STATUS), 1);
    let data = window(&rig, 0, 0x2000, 4);
    let _ = rig.set_config::<4>(data, 0xfee0_1000);
    assert_eq!(rig.get::<4>(0x2000), 0xfee0_1000);
    let _ = window(&rig, 0, reg::DEVICE_STATUS, 1);
    let effect = rig.set_config::<1>(data, 0);
    assert_eq!(effect, Effect::LayoutChanged, "a reset through the window");
}

#[test]
fn the_access_window_ignores_what_breaks_its_rules() {
    let rig = rig();
    let _ = rig.put::<2>(reg::QUEUE_SELECT, 1);
    let select = reg::QUEUE_SELECT;
    for (bar, offset, len) in [
        (1, select, 2),
        (6, select, 2),
        (0, select, 3),
        (0, select, 8),
        (0, select, 4),
        (0, select - 1, 2),
        (0, 0x4000, 4),
        (0, 0xffff_fffe, 2),
    ] {
        let data = window(&rig, bar, offset, len);
        assert_eq!(rig.set_config::<2>(data, 0x5a), Effect::None);
        assert_eq!(rig.get::<2>(select), 1, "{bar} {offset:#x} {len}");
        assert_eq!(rig.config::<2>(data), 0x5a, "{bar} {offset:#x} {len}");
    }
}

proptest! {
    /// Random accesses of every size all over the BAR: no panic, reads fill every byte, and registers keep to the
    /// values their width and rules allow.
    #[test]
    fn random_bar_accesses_keep_the_rules(
        steps in prop::collection::vec(
            (prop_oneof![0u64..0x48, 0x7e_u64..0x110, 0xff0u64..0x1010, 0x1ff0u64..0x2040, 0u64..0x5000],
             prop::collection::vec(any::<u8>(), 1..9)),
            0..100),
    ) {
        let rig = rig();
        rig.master();
        for (offset, data) in steps {
            let _ = rig.pci.memory_write(SLOT, offset, &data);
            let mut back = vec![0xcc; data.len()];
            rig.pci.memory_read(SLOT, offset, &mut back);
            if rig.pci.layout.locate(offset).is_none() {
                prop_assert!(back.iter().all(|byte| *byte == 0));
            }
            rig.function.service(0);
        }
        let _ = rig.put::<2>(reg::QUEUE_SELECT, 0);
        prop_assert!(rig.get::<2>(reg::QUEUE_SIZE).is_power_of_two());
        prop_assert!(rig.get::<2>(reg::QUEUE_SIZE) <= 8);
        for at in [reg::QUEUE_MSIX_VECTOR, reg::CONFIG_MSIX_VECTOR] {
            let vector = rig.get::<2>(at);
            prop_assert!(vector < 3 || vector == 0xffff);
        }
        prop_assert_eq!(rig.get::<2>(reg::NUM_QUEUES), 2);
    }
}
