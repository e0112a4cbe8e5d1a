//! The administration virtqueue of a function, from its driver's side.

use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::gate::{Patience, Reasons};
use crate::memory::{GuestRam, Records};
use crate::state::{DeviceState, FunctionState, QueueState, Shape, Unsavable};
use crate::testing::{Buf, Driver, INDIRECT, NEEDS_RESET, NEXT, WRITE, ram};
use crate::virtio::{
    CheckedState, DeviceType, Io, Progress, Restoration, RestoreError, RingError, Source,
    VirtioDevice, VirtioFunction, feature,
};

/// A device with two queues that only counts how often it was asked to work on them.
#[derive(Clone, Default)]
pub(super) struct Idle(Arc<Mutex<Vec<u16>>>);

impl VirtioDevice for Idle {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![8, 8]
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn save_state(&self) -> Result<DeviceState, Unsavable> {
        Ok(DeviceState::None)
    }

    fn check_state(&self, state: &DeviceState) -> Result<(), &'static str> {
        state.must_be_none()
    }

    fn restore_state(&mut self, _state: &DeviceState) {}

    fn process(&mut self, queue: u16, _io: &mut Io<'_>) -> Result<Progress, RingError> {
        self.0.lock().unwrap().push(queue);
        Ok(Progress::Waiting)
    }

    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    fn on_event(&mut self, _token: u16, _io: &mut Io<'_>) -> Result<(), RingError> {
        Ok(())
    }
}

/// The queue after those of [`Idle`].
pub(super) const ADMIN: u16 = 2;
const LIVE: u64 =
    feature::ADMIN_VQ | feature::SR_IOV | feature::INDIRECT_DESC | feature::RING_RESET;

fn untouched() -> (Driver, Idle) {
    let (owner, vfs) = owner(Options::default());
    vfs.0.store(2, SeqCst);
    let device = Idle::default();
    let ram = ram();
    let view = ram.view().unwrap();
    let function = VirtioFunction::new_owner("pf", Box::new(device.clone()), view, owner);
    (Driver::of(function.unwrap(), &ram), device)
}

fn live() -> Driver {
    let (mut driver, _) = untouched();
    driver.start(LIVE);
    driver
}

const QUERY_SELF: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn b9_the_admin_queue_comes_after_those_of_the_device() {
    let (driver, _) = untouched();
    let f = &driver.function;
    assert_eq!(f.num_queues(), 2);
    assert_eq!((f.admin_queue_index(), f.admin_queue_num()), (2, 1));
    assert_eq!(f.total_queues(), 3);
    assert!(f.kick_event(ADMIN).is_some());
}

#[test]
fn b50_an_owner_offers_sr_iov_and_the_admin_queue_and_others_do_not() {
    let (owner, _) = untouched();
    let plain = Driver::new(Idle::default());
    let bits = (feature::ADMIN_VQ | feature::SR_IOV) >> 32;
    assert_eq!(u64::from(owner.function.device_features(1)) & bits, bits);
    assert_eq!(u64::from(plain.function.device_features(1)) & bits, 0);
    assert_eq!(plain.function.admin_queue_num(), 0);
    assert_eq!(plain.function.admin_queue_index(), 0);
    assert!(plain.function.owner().is_none());
}

#[test]
fn d3_the_admin_queue_is_big_and_only_there_if_it_was_negotiated() {
    let driver = live();
    let info = driver.function.queue(ADMIN).unwrap();
    assert!(info.enabled && info.max_size >= 64);
    let (mut other, _) = untouched();
    other.start(feature::INDIRECT_DESC);
    assert_eq!(other.function.queue(ADMIN), None);
    other.function.kick(ADMIN);
    other.turn();
    assert_eq!(other.function.status() & NEEDS_RESET, 0);
    assert!(other.function.queue(1).unwrap().enabled);
}

#[test]
fn d4_a_command_is_answered_with_an_interrupt_and_its_exact_length() {
    let mut driver = live();
    driver.interrupts.take();
    let request = raw(0, 0, 0, &[]);
    let (len, bytes) = driver.request(ADMIN, &[Buf::Out(request), Buf::In(16)]);
    assert_eq!((len, &bytes[..]), (16, &QUERY_SELF[..]));
    assert_eq!(driver.interrupts.take(), [ADMIN]);
}

#[test]
fn the_device_never_sees_the_admin_queue() {
    let (mut driver, device) = untouched();
    driver.start(LIVE);
    driver.request(ADMIN, &[Buf::Out(raw(0, 0, 0, &[])), Buf::In(16)]);
    assert!(device.0.lock().unwrap().iter().all(|queue| *queue < ADMIN));
}

#[test]
fn b8_an_answer_is_cut_to_the_buffer_and_leaves_the_rest_of_it_alone() {
    for (room, used) in [(1, 1), (4, 4), (7, 7), (8, 8), (10, 10), (16, 16), (40, 16)] {
        let mut driver = live();
        let bufs = [Buf::Out(raw(0, 0, 0, &[])), Buf::In(room)];
        let (len, bytes) = driver.request(ADMIN, &bufs);
        let mut expected = vec![0xee; room];
        expected[..used].copy_from_slice(&QUERY_SELF[..used]);
        assert_eq!((len, bytes), (used as u32, expected), "room for {room}");
    }
}

#[test]
fn b8_a_command_without_room_for_an_answer_is_executed() {
    let mut driver = live();
    let (len, _) = driver.request(ADMIN, &[Buf::Out(raw(1, 1, 0, &[]))]);
    assert_eq!(len, 0);
    let (_, bytes) = driver.request(ADMIN, &[Buf::Out(raw(0, 1, 0, &[])), Buf::In(8)]);
    assert_eq!(
        bytes,
        [22, 0, 2, 0, 0, 0, 0, 0],
        "LIST_USE gave LIST_QUERY up"
    );
}

#[test]
fn b8_a_command_without_bytes_is_a_query_of_the_self_group() {
    let mut driver = live();
    let (len, bytes) = driver.request(ADMIN, &[Buf::In(16)]);
    assert_eq!((len, &bytes[..]), (16, &QUERY_SELF[..]));
}

#[test]
fn b8_data_beyond_what_is_looked_at_is_ignored() {
    let mut driver = live();
    let mut data = vec![0; queue::MAX_DATA + 2];
    *data.last_mut().unwrap() = 0xff;
    let (_, bytes) = driver.request(ADMIN, &[Buf::Out(raw(1, 1, 0, &data)), Buf::In(8)]);
    assert_eq!(bytes, [0; 8]);
}

#[test]
fn d4_fields_may_be_split_over_any_number_of_buffers() {
    let mut driver = live();
    let request = raw(1, 1, 0, &[3, 0, 0, 0, 0, 0, 0, 0]);
    let mut bufs: Vec<_> = request.iter().map(|byte| Buf::Out(vec![*byte])).collect();
    bufs.extend((0..8).map(|_| Buf::In(1)));
    let (len, bytes) = driver.request(ADMIN, &bufs);
    assert_eq!((len, bytes), (8, vec![0; 8]));
}

#[test]
fn d4_an_indirect_table_may_be_longer_than_the_ring() {
    let mut driver = live();
    let mut bufs: Vec<_> = raw(0, 0, 0, &[])
        .iter()
        .map(|b| Buf::Out(vec![*b]))
        .collect();
    bufs.extend((0..600).map(|_| Buf::In(1)));
    let placed = driver.place(&bufs);
    assert!(placed.len() > queue::QUEUE_SIZE.into());
    let table = driver.alloc(placed.len() * 16 + 16).next_multiple_of(16);
    for (i, (addr, len, flags)) in placed.iter().enumerate() {
        let more = if i + 1 == placed.len() { 0 } else { NEXT };
        let slot = i as u16;
        driver.descriptor(table, slot, *addr, *len, flags | more, slot + 1);
    }
    let ring = driver.rings[usize::from(ADMIN)];
    driver.descriptor(ring.table, 0, table, placed.len() * 16, INDIRECT, 0);
    driver.publish(ADMIN, 0);
    driver.kick(ADMIN);
    assert_eq!(driver.wait_used(ADMIN), (0, 16));
    let answer: Vec<u8> = placed
        .iter()
        .filter(|(_, _, flags)| flags & WRITE != 0)
        .flat_map(|(addr, len, _)| driver.bytes(*addr, *len))
        .collect();
    assert_eq!(answer[..16], QUERY_SELF);
    assert!(answer[16..].iter().all(|byte| *byte == 0xee));
}

#[test]
fn b7_commands_are_executed_and_used_in_the_order_they_were_queued() {
    let mut driver = live();
    let room = || Buf::In(16);
    let added = [
        driver.add(ADMIN, &[Buf::Out(raw(0, 1, 0, &[])), room()]),
        driver.add(ADMIN, &[Buf::Out(raw(1, 1, 0, &[2])), room()]),
        driver.add(ADMIN, &[Buf::Out(raw(0, 1, 0, &[])), room()]),
    ];
    driver.kick(ADMIN);
    for chain in &added {
        assert_eq!(driver.wait_used(ADMIN).0, chain.head);
    }
    let statuses = added.map(|chain| driver.written(&chain)[0]);
    assert_eq!(statuses, [0, 0, 22]);
}

#[test]
fn b4_a_reset_of_the_owner_forgets_the_list_and_keeps_that_of_the_monitor() {
    let (mut driver, _) = untouched();
    let owner = driver.function.owner().unwrap();
    let mut monitor = OwnerDriver::new(owner);
    assert_eq!(
        monitor.command(GroupType::SrIov, 1, 0, &[2]),
        Ok(Answer::default())
    );
    driver.start(LIVE);
    let give_up = [Buf::Out(raw(1, 0, 0, &[])), Buf::In(8)];
    let query = [Buf::Out(raw(0, 0, 0, &[])), Buf::In(8)];
    driver.request(ADMIN, &give_up);
    assert_eq!(driver.request(ADMIN, &query).1[0], 22);
    driver.status(0);
    driver.start(LIVE);
    assert_eq!(driver.request(ADMIN, &query).1[0], 0);
    let refused = monitor.command(GroupType::SrIov, 0, 0, &[]);
    assert_eq!(refused, Err(Failure::invalid(Qualifier::InvalidOpcode)));
}

#[test]
fn e10_a_closed_gate_holds_commands_back_and_none_is_lost() {
    let mut driver = live();
    driver.function.close(Reasons::NO_DMA);
    driver.add(ADMIN, &[Buf::Out(raw(0, 0, 0, &[])), Buf::In(16)]);
    driver.kick(ADMIN);
    assert_eq!(driver.used(ADMIN), None);
    driver.function.reopen(Reasons::NO_DMA);
    assert_eq!(driver.wait_used(ADMIN), (0, 16), "E13");
}

#[test]
fn the_admin_queue_can_be_reset_alone() {
    let mut driver = live();
    let _ = driver.function.reset_queue(ADMIN);
    assert!(!driver.function.queue(ADMIN).unwrap().enabled);
    driver.enable(ADMIN);
    let (len, _) = driver.request(ADMIN, &[Buf::Out(raw(0, 0, 0, &[])), Buf::In(16)]);
    assert_eq!(len, 16);
}

#[test]
fn a_malformed_chain_needs_a_reset_like_on_any_queue() {
    let mut driver = live();
    let table = driver.rings[usize::from(ADMIN)].table;
    // Writable before readable.
    driver.descriptor(table, 0, 0x1000, 8, WRITE | NEXT, 1);
    driver.descriptor(table, 1, 0x2000, 8, 0, 0);
    driver.publish(ADMIN, 0);
    driver.kick(ADMIN);
    assert_ne!(driver.function.status() & NEEDS_RESET, 0);
    assert_eq!(driver.used(ADMIN), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Commands of any bytes in buffers of any sizes: each is used once, in order, with what was written.
    #[test]
    fn e13_every_command_is_used(
        commands in prop::collection::vec(
            (prop::collection::vec(prop_oneof![0u8..3, any::<u8>()], 0..64), 0usize..32), 1..8),
    ) {
        let mut driver = live();
        for (request, room) in commands {
            let mut bufs = Vec::new();
            if !request.is_empty() {
                bufs.push(Buf::Out(request));
            }
            if room != 0 || bufs.is_empty() {
                bufs.push(Buf::In(room.max(1)));
            }
            let (len, bytes) = driver.request(ADMIN, &bufs);
            prop_assert!(len as usize <= bytes.len());
            prop_assert!(len as usize >= bytes.len().min(REPLY_HEADER_LEN));
            prop_assert!(bytes[len as usize..].iter().all(|byte| *byte == 0xee));
        }
        prop_assert_eq!(driver.function.status() & NEEDS_RESET, 0);
    }
}

/// A member that is at rest when the test says so.
pub(super) struct Slow {
    function: Arc<VirtioFunction>,
    pub busy: AtomicBool,
    wake: OnceLock<Arc<dyn Wake>>,
}

impl Slow {
    pub fn rests(&self) {
        self.busy.store(false, SeqCst);
        self.wake.get().unwrap().wake();
    }
}

impl Member for Slow {
    fn name(&self) -> &str {
        "slow"
    }

    fn mode(&self, party: Party) -> Mode {
        Member::mode(&*self.function, party)
    }

    fn set_mode(&self, party: Party, mode: Mode) {
        Member::set_mode(&*self.function, party, mode);
    }

    fn rest(&self) -> Rest {
        if self.busy.load(SeqCst) {
            Rest::Draining
        } else {
            Rest::AtRest
        }
    }

    fn recall(&self) {}

    fn epoch(&self) -> Epoch {
        self.function.epoch()
    }

    fn shape(&self) -> Shape {
        Member::shape(&*self.function)
    }

    fn save(&self) -> FunctionState {
        Member::save(&*self.function)
    }

    fn check(&self, state: &FunctionState) -> Result<CheckedState, RestoreError> {
        Member::check(&*self.function, state)
    }

    fn restore(
        &self,
        state: &FunctionState,
        checked: Option<CheckedState>,
        epoch: Epoch,
        how: Restoration,
    ) -> Result<(), RestoreError> {
        Member::restore(&*self.function, state, checked, epoch, how)
    }

    fn records(&self) -> Arc<Records> {
        self.function.records()
    }

    fn set_wake(&self, wake: Arc<dyn Wake>) {
        let _ = self.wake.set(wake);
    }
}

/// An owner over `ram` that nobody has touched, and its member, which is never at rest before the test says so.
fn slow_owner(ram: &Arc<GuestRam>) -> (Driver, Arc<Slow>) {
    let device = Box::new(Idle::default());
    let slow = Arc::new(Slow {
        function: VirtioFunction::new("vf1", device, ram.view().unwrap()).unwrap(),
        busy: true.into(),
        wake: OnceLock::new(),
    });
    let owner = Owner::new(vec![Arc::clone(&slow) as _], Options::default()).unwrap();
    owner.set_membership(Arc::new(FixedMembership(1)));
    let view = ram.view().unwrap();
    let function = VirtioFunction::new_owner("pf", Box::new(Idle::default()), view, owner);
    (Driver::of(function.unwrap(), ram), slow)
}

/// The same over the memory of `driver`, whose rings its driver uses; paused.
pub(super) fn twin_of(driver: &Driver) -> (Driver, Arc<Slow>) {
    let (mut twin, slow) = slow_owner(driver.view.ram());
    twin.rings.clone_from(&driver.rings);
    twin.function.close(Reasons::PAUSED);
    (twin, slow)
}

/// A live owner whose DEV_MODE_SET waits for its member, as the only command on the queue.
pub(super) fn waiting() -> (Driver, Arc<Slow>) {
    let (mut driver, slow) = slow_owner(&ram());
    driver.start(LIVE);
    let (_, list) = driver.request(ADMIN, &[Buf::Out(raw(0, 1, 0, &[])), Buf::In(16)]);
    let list = [Buf::Out(raw(1, 1, 0, &list[8..])), Buf::In(8)];
    driver.request(ADMIN, &list);
    driver.add(ADMIN, &[Buf::Out(raw(8, 1, 1, &[1])), Buf::In(8)]);
    driver.kick(ADMIN);
    driver.turn();
    assert_eq!(driver.used(ADMIN), None, "it waits for the member");
    (driver, slow)
}

pub(super) const AT_ONCE: Patience = Patience::prompt(Duration::ZERO);

#[test]
fn a_command_that_waits_keeps_its_owner_from_stopping_for_no_reason() {
    for reasons in [
        [Reasons::PAUSED, Reasons::NO_DMA],
        [Reasons::NO_DMA, Reasons::PAUSED],
    ] {
        let (mut driver, slow) = waiting();
        for reason in reasons {
            assert!(driver.function.stop(reason, AT_ONCE), "{reason:?}");
        }
        slow.rests();
        for reason in reasons {
            let before = driver.bytes(0, crate::testing::RAM);
            driver.turn();
            assert!(
                driver.bytes(0, crate::testing::RAM) == before,
                "answered in spite of {:?}",
                driver.function.reasons()
            );
            driver.function.reopen(reason);
        }
        let (_, len) = driver.wait_used(ADMIN);
        assert_eq!(len, 8);
        assert_eq!(driver.function.status() & NEEDS_RESET, 0);
    }
}

#[test]
fn a_reset_ends_a_command_that_waits_also_while_paused() {
    for reset_queue in [false, true] {
        let (mut driver, slow) = waiting();
        assert!(driver.function.stop(Reasons::PAUSED, AT_ONCE));
        if reset_queue {
            let _ = driver.function.reset_queue(ADMIN);
            assert!(!driver.function.queue(ADMIN).unwrap().enabled);
        } else {
            driver.status(0);
            assert_eq!(driver.function.status(), 0);
        }
        assert_eq!(slow.mode(Party::Guest), Mode::Active, "undone");
        slow.rests();
        driver.function.reopen(Reasons::PAUSED);
        driver.turn();
        assert_eq!(driver.used(ADMIN), None);
    }
}

#[test]
fn an_owner_is_restored_with_its_queue_or_not_at_all() {
    let (driver, _) = waiting();
    assert!(driver.function.stop(Reasons::PAUSED, AT_ONCE));
    let state = driver.function.save();
    let transient = driver.function.save_transient().unwrap();
    let queue = transient.services[queue::NAME].queue.clone();
    assert!(queue.enabled && queue.split().unwrap().owned.len() == 1);

    let (mut other, _) = twin_of(&driver);
    let f = Arc::clone(&other.function);
    assert!(matches!(f.check(&state), Err(RestoreError::Inexact(_))));
    assert!(matches!(f.restore(&state), Err(RestoreError::Inexact(_))));
    assert!(matches!(
        f.restore_transient(&transient),
        Err(RestoreError::Inexact(_))
    ));
    let spoil: [fn(&mut QueueState); 4] = [
        |q| q.size = 512,
        |q| q.vector = 1024,
        |q| q.split_mut().unwrap().owned = vec![256],
        |q| q.stopped = true,
    ];
    for spoil in spoil {
        let mut bad = transient.clone();
        spoil(&mut bad.services.get_mut(queue::NAME).unwrap().queue);
        assert!(f.restore_exact(&state, &bad).is_err());
    }
    let mut none = transient.clone();
    none.services.clear();
    let refused = f.restore_exact(&state, &none);
    assert!(matches!(refused, Err(RestoreError::ServiceMissing(_))));
    assert_eq!(f.status(), 0);

    f.restore_exact(&state, &transient).unwrap();
    assert_eq!((f.save(), f.save_transient().unwrap()), (state, transient));
    f.reopen(Reasons::PAUSED);
    // The command was not negotiated with this owner, but it is answered.
    let (head, len) = other.wait_used(ADMIN);
    assert_eq!((head, len), (queue.split().unwrap().owned[0], 8));
    let (len, _) = other.request(ADMIN, &[Buf::Out(raw(0, 0, 0, &[])), Buf::In(16)]);
    assert_eq!(len, 16);
}
