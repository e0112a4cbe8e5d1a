//! What must follow from each step: a set of reasons, and what became of each request.

use std::collections::VecDeque;

use driver::virtio::status;

use crate::world::{Kind, STOPPED, SUSPEND, Setup, Suspending};

pub const QUEUES: usize = 2;
pub const CONFIG_LEN: usize = 16;

const GUEST: usize = 0;
pub const ACTIVE: u8 = 0;
pub const FREEZE: u8 = 2;

/// A request: unlike any other of its case.
pub type Id = u32;

#[derive(Clone, Debug, Default)]
pub struct Queue {
    pub enabled: bool,
    pub stopped: bool,
    pub resetting: bool,
    /// Entries of the available ring that were fetched.
    pub fetched: u16,
    pub available: VecDeque<Id>,
    /// Fetched and given up.
    pub owned: VecDeque<Id>,
    /// The driver is notified when the queue goes on, as nobody knows whether it was.
    pub signal_again: bool,
}

/// A change of the guest's mode that is not answered yet.
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    pub mode: u8,
    begun: bool,
}

/// What a step must bring about, and nothing else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Requests that come back, with their queue.
    pub completed: Vec<(usize, Id)>,
    /// Queues that were restored and go on.
    pub signalled: Vec<usize>,
    /// The driver hears of a change of the configuration.
    pub config: bool,
    /// The answer to the guest's change of the mode comes.
    pub answered: bool,
    /// The queues whose reset is complete.
    pub reset: Vec<usize>,
}

/// How a change of the mode ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    Done,
    Later,
}

#[derive(Clone, Debug)]
pub struct Model {
    setup: Setup,
    pub live: bool,
    pub bus_master: bool,
    pub paused: bool,
    pub suspended: bool,
    pub stopped: bool,
    pub resetting: bool,
    /// Of the guest and of the monitor.
    pub modes: [u8; 2],
    pub pending: Option<Pending>,
    pub queues: [Queue; QUEUES],
    pub hold: bool,
    /// With the backend, in order.
    pub held: VecDeque<(usize, Id)>,
    pub config: Vec<u8>,
    /// Waits until the function may change.
    pub new_config: Option<Vec<u8>>,
    config_pending: bool,
    pub generation: u8,
    pub effects: Effects,
}

impl Model {
    pub fn new(setup: Setup) -> Self {
        Self {
            setup,
            live: false,
            bus_master: false,
            paused: false,
            suspended: false,
            stopped: false,
            resetting: false,
            modes: [ACTIVE; 2],
            pending: None,
            queues: Default::default(),
            hold: false,
            held: VecDeque::new(),
            config: initial_config(),
            new_config: None,
            config_pending: false,
            generation: 0,
            effects: Effects::default(),
        }
    }

    // What can be seen ---------------------------------------------------------------------------------------------

    pub fn is_closed(&self) -> bool {
        !self.live || !self.bus_master || self.resetting || self.is_stilled()
    }

    fn is_stilled(&self) -> bool {
        self.paused || self.suspended || self.stopped || self.modes != [ACTIVE; 2]
    }

    pub fn is_drained(&self) -> bool {
        self.held.is_empty()
    }

    pub fn is_frozen(&self) -> bool {
        self.modes.contains(&FREEZE)
    }

    pub fn is_suspended(&self) -> bool {
        self.suspended && self.is_drained()
    }

    pub fn ignores_writes(&self) -> bool {
        self.is_frozen() || self.is_suspended()
    }

    pub fn ignores_config_writes(&self) -> bool {
        self.ignores_writes() || self.resetting || self.stopped && self.is_drained()
    }

    pub fn status(&self) -> u8 {
        if !self.live {
            return 0;
        }
        let mut bits =
            status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        if self.is_suspended() {
            bits |= SUSPEND;
            if self.setup.suspend == Suspending::V1_4 {
                bits &= !status::DRIVER_OK;
            }
        }
        if self.stopped && self.is_drained() {
            bits |= STOPPED;
        }
        bits
    }

    fn in_flight(&self, queue: usize) -> usize {
        self.held.iter().filter(|(q, _)| *q == queue).count()
    }

    /// queue_status.
    pub fn runs(&self, index: usize) -> bool {
        let queue = &self.queues[index];
        let done = self.in_flight(index) == 0 && queue.owned.is_empty();
        queue.enabled && !(queue.stopped && done)
    }

    /// last_avail_idx.
    pub fn index(&self, queue: usize) -> u16 {
        match self.runs(queue) {
            true => 0,
            false => self.queues[queue].fetched,
        }
    }

    /// True if `queue` would take a request at once.
    pub fn takes(&self, queue: usize) -> bool {
        let queue = &self.queues[queue];
        queue.enabled && !queue.stopped && !queue.resetting && !self.is_closed()
    }

    // Steps --------------------------------------------------------------------------------------------------------

    pub fn release(&mut self, count: usize) {
        let count = count.min(self.held.len());
        let released: Vec<_> = self.held.drain(..count).collect();
        if !self.resetting {
            self.effects.completed.extend(released);
        }
    }

    /// False if a backend keeps what it holds for as long as the test says.
    pub fn can_stand_still(&self) -> bool {
        !self.resetting
            && (self.is_drained() || self.setup.kind != Kind::Loopback { recall: false })
    }

    /// All stands still for a moment: what has not begun is the function's, and what has comes back.
    pub fn stand_still(&mut self) {
        self.recall();
        self.release(usize::MAX);
    }

    pub fn set_hold(&mut self, hold: bool) {
        self.hold = hold;
        if self.setup.kind == Kind::Disk && !hold {
            self.release(usize::MAX);
        }
    }

    /// The function waited for its backend long enough: what has not begun is the function's.
    fn recall(&mut self) {
        let begun = match self.setup.kind {
            Kind::Loopback { recall: true } => 0,
            Kind::Loopback { recall: false } => return,
            Kind::Disk => 1,
        };
        while self.held.len() > begun {
            let (queue, id) = self.held.pop_back().unwrap();
            self.queues[queue].owned.push_front(id);
        }
    }

    /// DEV_MODE_SET of a party: the guest's waits, the monitor's is taken back if it cannot be done at once.
    pub fn set_mode(&mut self, party: usize, mode: u8) -> Moved {
        let previous = self.modes[party];
        let mut moved = match self.resetting {
            true => Moved::Later,
            false => Moved::Done,
        };
        let begun = !self.resetting;
        if begun && mode != previous {
            self.modes[party] = mode;
            if mode != ACTIVE && !self.is_drained() {
                self.recall();
                if !self.is_drained() {
                    moved = Moved::Later;
                }
            }
        }
        match (moved, party) {
            (Moved::Done, GUEST) => self.effects.answered = true,
            (Moved::Later, GUEST) => self.pending = Some(Pending { mode, begun }),
            (Moved::Later, _) => self.modes[party] = previous,
            (Moved::Done, _) => {}
        }
        moved
    }

    pub fn change_config(&mut self, config: Vec<u8>) {
        if self.is_stilled() && self.is_drained() {
            self.new_config = Some(config);
        } else {
            self.take_config(config);
        }
    }

    fn take_config(&mut self, config: Vec<u8>) {
        self.new_config = None;
        self.config = config;
        self.generation = self.generation.wrapping_add(1);
        self.config_pending = true;
    }

    pub fn start_reset(&mut self) {
        self.resetting = true;
        if self.setup.kind == Kind::Disk {
            // One has begun; the others are called off.
            self.held.truncate(1);
        }
    }

    /// The function ceased to exist, and exists anew.
    pub fn renew(&mut self) {
        self.bus_master = false;
        self.start_reset();
        self.modes = [ACTIVE; 2];
        if let Some(pending) = &mut self.pending {
            pending.begun = false;
        }
    }

    /// A driver begins with a reset.
    pub fn initialise(&mut self) {
        self.reset();
        self.live = true;
        for queue in &mut self.queues {
            queue.enabled = true;
        }
    }

    /// A context took effect: the driver reads the configuration again.
    pub fn restored(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        self.config_pending = self.live;
        for queue in &mut self.queues {
            queue.signal_again = self.live && queue.enabled;
        }
    }

    /// All that follows by itself.
    pub fn settle(&mut self) {
        for index in 0..QUEUES {
            if self.queues[index].resetting && self.in_flight(index) == 0 {
                self.queues[index] = Queue::default();
                self.effects.reset.push(index);
            }
        }
        if self.is_drained() && self.resetting {
            self.reset();
            self.effects.reset = (0..QUEUES).collect();
        }
        if let Some(pending) = self.pending
            && self.is_drained()
        {
            self.pending = None;
            if pending.begun {
                self.effects.answered = true;
            } else {
                self.set_mode(GUEST, pending.mode);
            }
        }
        if self.is_closed() {
            return;
        }
        if let Some(config) = self.new_config.take() {
            self.take_config(config);
        }
        self.effects.config |= std::mem::take(&mut self.config_pending);
        for index in 0..QUEUES {
            if std::mem::take(&mut self.queues[index].signal_again) {
                self.effects.signalled.push(index);
            }
            self.fetch(index);
        }
    }

    fn fetch(&mut self, index: usize) {
        let hold = self.hold;
        let queue = &mut self.queues[index];
        if !queue.enabled || queue.resetting {
            return;
        }
        let mut taken: Vec<_> = queue.owned.drain(..).collect();
        // A stopped queue finishes what it began, and begins nothing.
        if !queue.stopped {
            queue.fetched = queue.fetched.wrapping_add(queue.available.len() as u16);
            taken.extend(queue.available.drain(..));
        }
        let taken = taken.into_iter().map(|id| (index, id));
        if hold {
            self.held.extend(taken);
        } else {
            self.effects.completed.extend(taken);
        }
    }

    fn reset(&mut self) {
        self.resetting = false;
        self.live = false;
        self.suspended = false;
        self.stopped = false;
        self.queues = Default::default();
        self.config = initial_config();
        self.config_pending = false;
    }
}

pub fn initial_config() -> Vec<u8> {
    (0..CONFIG_LEN as u8).collect()
}
