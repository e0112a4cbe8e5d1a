use super::*;

const MESSAGE: MsiMessage = MsiMessage {
    address: 0xfee0_0000,
    data: 0x40,
};

fn routes(taken: impl IntoIterator<Item = u32>) -> Routes {
    let mut routes = Routes::new(4096 - CHIP_ROUTES);
    routes.taken = taken.into_iter().map(|gsi| (gsi, None)).collect();
    routes
}

#[test]
fn the_lowest_free_route_is_taken() {
    assert_eq!(routes([]).take(), Some(24));
    assert_eq!(routes([24, 25]).take(), Some(26));
    assert_eq!(routes([24, 26]).take(), Some(25));
    let mut routes = routes([]);
    let taken: Vec<_> = (0..4).filter_map(|_| routes.take()).collect();
    assert_eq!(taken, [24, 25, 26, 27]);
    routes.release(26);
    routes.release(25);
    let again: Vec<_> = (0..3).filter_map(|_| routes.take()).collect();
    assert_eq!(again, [25, 26, 28]);
}

#[test]
fn routes_of_lines_and_vectors_are_at_most_as_many_as_kvm_has() {
    let last = LINES + 4096 - CHIP_ROUTES - 1;
    assert_eq!(routes(LINES..last).take(), Some(last));
    assert_eq!(routes(LINES..=last).take(), None);
}

#[test]
fn masked_vectors_keep_their_route_while_there_is_room() {
    assert!(!routes(24..2024).is_tight());
    assert!(routes(24..2424).is_tight());
}

/// Data of a message that the host does not take.
const REFUSED: u32 = 0xbad;

/// A VM that counts.
#[derive(Default)]
struct Counts(Mutex<Counted>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Counted {
    commits: usize,
    /// Messages of the last table that was taken.
    table: BTreeMap<u32, u32>,
    connected: Vec<u32>,
    sent: Vec<u32>,
}

impl Host for Counts {
    fn set_routes(&self, messages: &BTreeMap<u32, MsiMessage>) -> Result<(), KvmError> {
        let table: BTreeMap<_, _> = messages.iter().map(|(gsi, m)| (*gsi, m.data)).collect();
        let mut counted = self.0.lock().unwrap();
        counted.commits += 1;
        if table.values().any(|data| *data == REFUSED) {
            return Err(KvmError::Capability("a message"));
        }
        counted.table = table;
        Ok(())
    }

    fn connect(&self, _event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.0.lock().unwrap().connected.push(gsi);
        Ok(())
    }

    fn disconnect(&self, _event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.0.lock().unwrap().connected.retain(|c| *c != gsi);
        Ok(())
    }

    fn send(&self, message: MsiMessage) -> Result<(), KvmError> {
        self.0.lock().unwrap().sent.push(message.data);
        Ok(())
    }
}

fn counting() -> (KvmMsi, Arc<Counts>) {
    let counts = Arc::new(Counts::default());
    let host = Arc::clone(&counts) as Arc<dyn Host>;
    (KvmMsi::with_limit(host, 4096 - CHIP_ROUTES), counts)
}

fn message(data: u32) -> Option<MsiMessage> {
    Some(MsiMessage { data, ..MESSAGE })
}

impl Counts {
    fn now(&self) -> Counted {
        self.0.lock().unwrap().clone()
    }
}

#[test]
fn a_batch_tells_kvm_once_whatever_it_holds() {
    let (msi, counts) = counting();
    let sinks: Vec<_> = (0..255).map(|_| msi.sink(4)).collect();
    let batch = msi.batch();
    for sink in &sinks {
        for vector in 0..4 {
            sink.set_route(vector, message(1));
            sink.set_route(vector, message(u32::from(vector) + 2));
        }
    }
    assert_eq!(counts.now(), Counted::default());
    drop(batch);
    let counted = counts.now();
    assert_eq!((counted.commits, counted.table.len()), (1, 1020));
    assert_eq!(counted.connected, (24..1044).collect::<Vec<_>>());
    let data: Vec<_> = counted.table.into_values().take(5).collect();
    assert_eq!(data, [2, 3, 4, 5, 2]);
}

#[test]
fn what_is_fired_in_a_batch_is_sent_and_after_it_signalled() {
    let (msi, counts) = counting();
    let sink = msi.sink(2);
    sink.set_route(0, message(1));
    let outer = msi.batch();
    let inner = msi.batch();
    // One that had a route to somewhere else, and one that had none.
    sink.set_route(0, message(2));
    sink.set_route(1, message(3));
    sink.fire(0);
    sink.fire(1);
    drop(inner);
    sink.fire(1);
    assert_eq!(counts.now().commits, 1, "the outer batch is open");
    drop(outer);
    sink.fire(0);
    sink.fire(1);
    let counted = counts.now();
    assert_eq!(counted.sent, [2, 3, 3]);
    assert_eq!(counted.commits, 2);
    assert_eq!(counted.table, BTreeMap::from([(24, 2), (25, 3)]));
}

#[test]
fn a_function_that_goes_in_a_batch_leaves_no_route() {
    let (msi, counts) = counting();
    let (gone, stays) = (msi.sink(1), msi.sink(1));
    let batch = msi.batch();
    gone.set_route(0, message(1));
    stays.set_route(0, message(2));
    drop(gone);
    drop(batch);
    assert_eq!(counts.now().table, BTreeMap::from([(25, 2)]));
    assert_eq!(counts.now().connected, [25]);
}

#[test]
fn a_message_that_is_refused_slows_down_no_other() {
    let (msi, counts) = counting();
    let sink = msi.sink(64);
    let batch = msi.batch();
    for vector in 0..64 {
        let data = if vector == 37 { REFUSED } else { vector.into() };
        sink.set_route(vector, message(data));
    }
    drop(batch);
    assert_eq!(counts.now().table.len(), 63);
    assert_eq!(counts.now().connected.len(), 63);
    assert!(counts.now().commits < 20);
    (36..39).for_each(|vector| sink.fire(vector));
    assert_eq!(counts.now().sent, [REFUSED]);
    // It is tried again, alone and with a message that is good.
    sink.set_route(37, None);
    sink.set_route(37, message(REFUSED));
    sink.set_route(37, message(7));
    sink.set_route(38, message(8));
    assert_eq!(counts.now().table.len(), 64);
    sink.fire(37);
    assert_eq!(counts.now().sent, [REFUSED]);
}

#[test]
fn a_route_that_led_elsewhere_is_not_used_after_a_refusal() {
    let (msi, counts) = counting();
    let sink = msi.sink(1);
    sink.set_route(0, message(1));
    sink.set_route(0, message(REFUSED));
    sink.fire(0);
    assert_eq!(counts.now().sent, [REFUSED]);
    assert_eq!(counts.now().table, BTreeMap::from([(24, 1)]));
}

/// The vectors that wait in the processor's local interrupt controller.
fn pending(vcpu: &kvm_ioctls::VcpuFd) -> Vec<usize> {
    let lapic = vcpu.get_lapic().unwrap();
    let requested = |vector: &usize| {
        let byte = lapic.regs[0x200 + vector / 32 * 0x10 + vector % 32 / 8] as u8;
        byte >> (vector % 8) & 1 != 0
    };
    (0..256).filter(requested).collect()
}

#[test]
fn vectors_beyond_the_last_route_are_delivered_all_the_same() {
    let Ok(kvm) = crate::kvm::open() else {
        println!("skipped: no KVM here");
        return;
    };
    let vm = Arc::new(kvm.create_vm().unwrap());
    vm.create_irq_chip().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    // Local interrupt controllers take messages only once they are enabled.
    let mut lapic = vcpu.get_lapic().unwrap();
    lapic.regs[0xf1] = 1;
    vcpu.set_lapic(&lapic).unwrap();

    let msi = KvmMsi::with_limit(vm, 1);
    let sink = msi.sink(3);
    for vector in 0..3u16 {
        let data = MESSAGE.data + u32::from(vector);
        sink.set_route(vector, Some(MsiMessage { data, ..MESSAGE }));
    }
    assert_eq!(msi.routes_taken(), 1);
    sink.fire(1);
    assert_eq!(pending(&vcpu), [0x41]);
    sink.set_route(2, None);
    sink.fire(2);
    assert_eq!(pending(&vcpu), [0x41]);
    // Those with a route may take a moment.
    sink.fire(0);
    let start = std::time::Instant::now();
    while pending(&vcpu) != [0x40, 0x41] {
        assert!(start.elapsed().as_secs() < 10);
        std::thread::yield_now();
    }
    // In a batch they are delivered by message, and after it by their routes again.
    let batch = msi.batch();
    sink.set_route(0, message(0x50));
    sink.fire(0);
    assert_eq!(pending(&vcpu), [0x40, 0x41, 0x50]);
    sink.set_route(0, message(0x51));
    drop(batch);
    sink.fire(0);
    while pending(&vcpu) != [0x40, 0x41, 0x50, 0x51] {
        assert!(start.elapsed().as_secs() < 10);
        std::thread::yield_now();
    }
    drop(sink);
    assert_eq!(msi.routes_taken(), 0);
}
