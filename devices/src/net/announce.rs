//! Telling the network where a machine is now.
//!
//! Switches learn from the source of a frame which way its sender is. After a machine was moved they would send frames for it
//! the old way until it happens to send something, so a frame is sent in its name: a RARP request (RFC 903), which asks for
//! the protocol address of its own sender and so changes no table of neighbours, and which nobody answers any more.
//!
//! The frame goes out several times, with growing gaps, since a switch may drop the first ones while the port they come in by
//! is only coming up.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::timerfd::TimerFd;

use super::MacAddress;
use super::link::HEADER_LEN;
use super::switch::Outlet;
use super::tap::TapHandle;

/// Length of the shortest frame on a wire, without its checksum. Some switches drop what is shorter.
const LEN: usize = 60;
const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERTYPE_RARP: [u8; 2] = 0x8035u16.to_be_bytes();
/// Hardware addresses of Ethernet (1), of 6 octets, for protocol addresses of IPv4, of 4.
const ADDRESSES: [u8; 6] = [0, 1, 0x08, 0x00, 6, 4];
const REVERSE_REQUEST: [u8; 2] = 3u16.to_be_bytes();
const UNKNOWN: [u8; 4] = [0; 4];

/// Times from one frame to the next; the first goes out at once.
const GAPS: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(250),
    Duration::from_millis(350),
];

/// Says where a network device is. Thread-safe; it may outlive the device, and then does nothing.
pub struct Announcer {
    mac: MacAddress,
    way: Way,
}

enum Way {
    Tap(TapHandle),
    Port(Outlet),
}

impl Announcer {
    pub(super) fn on_tap(mac: MacAddress, tap: TapHandle) -> Self {
        let way = Way::Tap(tap);
        Self { mac, way }
    }

    pub(super) fn on_port(mac: MacAddress, port: Outlet) -> Self {
        let way = Way::Port(port);
        Self { mac, way }
    }

    /// Sends the frame from where the device sends its own, if a driver is there.
    pub fn announce(&self) {
        let frame = frame(self.mac);
        match &self.way {
            Way::Tap(tap) => tap.announce(&frame),
            Way::Port(port) => port.announce(frame, self.mac, MacAddress::new(BROADCAST)),
        }
    }
}

/// Announces all network devices of a machine, to be added to an [`IoThread`](crate::io::IoThread). It begins closed.
pub struct Announcements {
    schedule: Arc<Mutex<Schedule>>,
    timer: RawFd,
}

/// Starts, closes and opens [`Announcements`]. Nobody who calls it has the lock of a function.
#[derive(Clone)]
pub struct AnnouncementControl(Arc<Mutex<Schedule>>);

struct Schedule {
    announcers: Vec<Announcer>,
    /// Expires when the next frames are due. Watched edge-triggered and never read.
    timer: TimerFd,
    /// Gaps before the frames that are still to be sent.
    gaps: &'static [Duration],
    open: bool,
}

impl AnnouncementControl {
    /// Sends five frames for each device that has a driver: the first now, or when this is opened, and the others 50, 150,
    /// 250 and 350 ms after the one before. Starts over if some are still to be sent.
    pub fn start(&self) {
        let mut schedule = lock(&self.0);
        schedule.gaps = &GAPS;
        schedule.step();
    }

    /// When this returns nothing more is sent.
    pub fn close(&self) {
        let mut schedule = lock(&self.0);
        schedule.open = false;
        schedule.set_timer();
    }

    /// What was not sent when this was closed is sent from now on.
    pub fn reopen(&self) {
        let mut schedule = lock(&self.0);
        schedule.open = true;
        schedule.set_timer();
    }
}

fn lock(schedule: &Mutex<Schedule>) -> MutexGuard<'_, Schedule> {
    schedule.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Announcements {
    /// Of the devices of `announcers`.
    ///
    /// # Errors
    ///
    /// The host refused a timer.
    pub fn new(announcers: Vec<Announcer>) -> std::io::Result<Self> {
        let timer = TimerFd::new()?;
        Ok(Self {
            timer: timer.as_raw_fd(),
            schedule: Arc::new(Mutex::new(Schedule {
                announcers,
                timer,
                gaps: &[],
                open: false,
            })),
        })
    }

    /// What starts, closes and opens them.
    pub fn control(&self) -> AnnouncementControl {
        AnnouncementControl(Arc::clone(&self.schedule))
    }
}

impl Schedule {
    /// Sends the next frames, if there are any.
    fn step(&mut self) {
        if !self.open {
            return;
        }
        let Some((_, later)) = self.gaps.split_first() else {
            return;
        };
        self.gaps = later;
        for announcer in &self.announcers {
            announcer.announce();
        }
        self.set_timer();
    }

    fn set_timer(&mut self) {
        let set = match self.gaps.first() {
            // Zero would disarm it.
            Some(gap) if self.open => self.timer.reset((*gap).max(Duration::from_nanos(1)), None),
            _ => self.timer.clear(),
        };
        if let Err(error) = set {
            // The first frames went out all the same.
            tracing::warn!(%error, "cannot set the timer of announcements");
        }
    }
}

impl MutEventSubscriber for Announcements {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        lock(&self.schedule).step();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
        if let Err(error) = ops.add(Events::new_raw(self.timer, edges)) {
            tracing::error!(?error, "cannot watch the timer of announcements");
        }
    }
}

/// The frame for `mac`, header included.
fn frame(mac: MacAddress) -> Vec<u8> {
    let mac = mac.octets();
    let mut frame = vec![0; HEADER_LEN];
    for part in [
        BROADCAST.as_slice(),
        &mac,
        &ETHERTYPE_RARP,
        &ADDRESSES,
        &REVERSE_REQUEST,
        // Sender, then target.
        &mac,
        &UNKNOWN,
        &mac,
        &UNKNOWN,
    ] {
        frame.extend_from_slice(part);
    }
    frame.resize(HEADER_LEN + LEN, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::link::Link;
    use crate::net::{PortConfig, Switch, SwitchPort};
    use event_manager::{EventManager, SubscriberOps};
    use std::time::Instant;

    const MAC: MacAddress = MacAddress::new([2, 0, 0, 0, 0, 1]);

    fn port(switch: &Switch, mac: MacAddress) -> SwitchPort {
        let config = PortConfig {
            name: String::new(),
            mac,
            check_source: true,
        };
        switch.port(config).unwrap()
    }

    #[test]
    fn the_frame_is_a_request_of_the_device_for_its_own_address() {
        let frame = frame(MAC);
        let expected = [
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // header of virtio
            0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x80, 0x35, // Ethernet
            0, 1, 8, 0, 6, 4, 0, 3, // kinds and lengths of addresses, operation
            2, 0, 0, 0, 0, 1, 0, 0, 0, 0, // sender
            2, 0, 0, 0, 0, 1, 0, 0, 0, 0, // target
        ];
        assert_eq!(frame[..expected.len()], expected);
        assert_eq!(frame[expected.len()..], [0; 18]);
    }

    #[test]
    fn it_reaches_every_other_port_and_wakes_its_receiver() {
        let switch = Switch::new();
        let mut sender = port(&switch, MAC);
        let announcer = sender.announcer();
        let mut others = [2, 3].map(|n| port(&switch, MacAddress::new([2, 0, 0, 0, 0, n])));
        for port in &mut others {
            port.up(0);
        }
        announcer.announce();
        assert!(others[0].peek().is_none(), "announced without a driver");

        sender.up(0);
        std::thread::spawn(move || announcer.announce())
            .join()
            .unwrap();
        for port in &mut others {
            assert_eq!(port.peek().unwrap(), frame(MAC));
            port.consume();
            assert!(port.peek().is_none());
            assert_eq!(port.shared_event().read().unwrap(), 1);
        }
        assert!(sender.peek().is_none());
    }

    #[test]
    fn an_announcer_of_a_port_that_is_gone_does_not_speak_for_the_next_one() {
        let switch = Switch::new();
        let mut sender = port(&switch, MAC);
        sender.up(0);
        let announcer = sender.announcer();
        drop(sender);
        let next = MacAddress::new([2, 0, 0, 0, 0, 9]);
        let mut others = [next, MacAddress::new([2, 0, 0, 0, 0, 8])].map(|mac| port(&switch, mac));
        for port in &mut others {
            port.up(0);
        }
        announcer.announce();
        assert!(others.iter_mut().all(|port| port.peek().is_none()));
        assert_eq!(switch.ports()[0].learned, 0);
    }

    /// Announcements of a port, what moves them, and another port that hears them.
    fn announced() -> (
        EventManager<Announcements>,
        AnnouncementControl,
        [SwitchPort; 2],
    ) {
        let switch = Switch::new();
        let mut ports = [1, 2].map(|n| port(&switch, MacAddress::new([2, 0, 0, 0, 0, n])));
        for port in &mut ports {
            port.up(0);
        }
        let announcements = Announcements::new(vec![ports[0].announcer()]).unwrap();
        let control = announcements.control();
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(announcements);
        (events, control, ports)
    }

    fn heard([_, port]: &mut [SwitchPort; 2]) -> usize {
        let mut count = 0;
        while port.peek().is_some() {
            port.consume();
            count += 1;
        }
        count
    }

    /// Takes turns of the I/O thread for so many milliseconds.
    fn run_for(events: &mut EventManager<Announcements>, ms: u64) {
        let end = Instant::now() + Duration::from_millis(ms);
        while let left = end.saturating_duration_since(Instant::now())
            && !left.is_zero()
        {
            let ms = left.as_millis().max(1) as i32;
            events.run_with_timeout(ms).unwrap();
        }
    }

    #[test]
    fn frames_are_repeated_with_growing_gaps_and_then_no_more() {
        let (mut events, control, mut ports) = announced();
        control.reopen();
        let began = Instant::now();
        control.start();
        assert_eq!(heard(&mut ports), 1, "the first is not waited for");
        for gap in GAPS.iter().skip(1) {
            let before = Instant::now();
            while heard(&mut ports) == 0 {
                assert!(before.elapsed() < crate::testing::PATIENCE);
                events.run_with_timeout(1000).unwrap();
            }
            let total: Duration = GAPS.iter().take_while(|g| *g <= gap).sum();
            assert!(began.elapsed() >= total, "{gap:?} is too soon");
        }
        run_for(&mut events, 400);
        assert_eq!(heard(&mut ports), 0, "five are enough");
    }

    #[test]
    fn nothing_is_sent_while_closed_and_the_rest_afterwards() {
        let (mut events, control, mut ports) = announced();
        control.start();
        run_for(&mut events, 60);
        assert_eq!(heard(&mut ports), 0, "before the machine runs");
        control.reopen();
        events.run_with_timeout(1000).unwrap();
        assert_eq!(heard(&mut ports), 1);
        control.close();
        run_for(&mut events, 120);
        assert_eq!(heard(&mut ports), 0, "while paused");
        control.reopen();
        let mut rest = 0;
        let began = Instant::now();
        while rest < GAPS.len() - 1 {
            assert!(began.elapsed() < crate::testing::PATIENCE);
            events.run_with_timeout(1000).unwrap();
            rest += heard(&mut ports);
        }
        run_for(&mut events, 400);
        assert_eq!(heard(&mut ports), 0);
    }

    #[test]
    fn whoever_opens_without_an_arrival_announces_nothing() {
        let (mut events, control, mut ports) = announced();
        control.reopen();
        run_for(&mut events, 60);
        assert_eq!(heard(&mut ports), 0);
    }
}
