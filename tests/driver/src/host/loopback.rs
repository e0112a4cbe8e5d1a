//! A device for testing the core and the transport: it copies what it reads into what it may write, when it may.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::state::{DeviceState, Unsavable};
use devices::virtio::{Chain, DeviceType, Io, Progress, RingError, Source, VirtioDevice};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What a [`Loopback`] looks like.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Maximum size of each queue.
    pub queues: Vec<u16>,
    /// Feature bits of the device type.
    pub features: u64,
    /// Initial configuration; all of it can be written.
    pub config: Vec<u8>,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            queues: vec![16, 8],
            features: 1 << 5,
            config: (0..16).collect(),
        }
    }
}

/// The device. A chain comes back with the bytes the driver gave, as many as there is room for; or, while the test
/// holds it back, not before the test lets it.
pub struct Loopback {
    shape: Shape,
    config: Vec<u8>,
    shared: Arc<Shared>,
}

struct Shared {
    event: EventFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    hold: bool,
    give_up: bool,
    held: VecDeque<(u16, Chain)>,
    release: usize,
    release_newest: usize,
    new_config: Option<Vec<u8>>,
    unsavable: Option<String>,
    activated: Vec<u64>,
    resets: usize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The test's side of a [`Loopback`].
#[derive(Clone)]
pub struct Controls {
    shared: Arc<Shared>,
}

impl Loopback {
    /// A device and the controls of it.
    pub fn new(shape: Shape) -> std::io::Result<(Box<Self>, Controls)> {
        let shared = Arc::new(Shared {
            event: EventFd::new(EFD_NONBLOCK)?,
            state: Mutex::default(),
        });
        let device = Self {
            config: shape.config.clone(),
            shape,
            shared: Arc::clone(&shared),
        };
        Ok((Box::new(device), Controls { shared }))
    }
}

impl Controls {
    /// From now on fetched chains are kept until [`Self::release`]; `false`: they come back at once.
    pub fn hold(&self, hold: bool) {
        self.shared.lock().hold = hold;
    }

    /// Whether chains that are held count as not begun, so that the device gives them up when it is asked to. At first
    /// they do not.
    pub fn give_up(&self, give_up: bool) {
        self.shared.lock().give_up = give_up;
    }

    /// Chains the device has in its hands.
    pub fn held(&self) -> usize {
        self.shared.lock().held.len()
    }

    /// Lets `count` held chains come back, oldest first, when the device is pumped next.
    pub fn release(&self, count: usize) {
        self.shared.lock().release += count;
        self.poke();
    }

    /// Lets `count` held chains come back, newest first.
    pub fn release_newest(&self, count: usize) {
        self.shared.lock().release_newest += count;
        self.poke();
    }

    /// Changes the configuration when the device is pumped next. Keeps its length.
    pub fn change_config(&self, config: Vec<u8>) {
        self.shared.lock().new_config = Some(config);
        self.poke();
    }

    /// From now on the device cannot be saved, for this reason.
    pub fn refuse_to_be_saved(&self, why: &str) {
        self.shared.lock().unsavable = Some(why.to_owned());
    }

    /// The features of every activation so far.
    pub fn activations(&self) -> Vec<u64> {
        self.shared.lock().activated.clone()
    }

    /// How often the device was reset.
    pub fn resets(&self) -> usize {
        self.shared.lock().resets
    }

    fn poke(&self) {
        // Refused only if the counter is full, and then the device wakes up anyway.
        let _ = self.shared.event.write(1);
    }
}

fn echo(io: &mut Io<'_>, queue: u16, chain: &Chain) -> Result<(), RingError> {
    if io.is_resetting() {
        return io.push(queue, chain.ticket(), 0);
    }
    let mut buffer = [0; 4096];
    let (mut offset, mut written) = (0, 0);
    loop {
        let read = chain.read(io.memory(), offset, &mut buffer)?;
        let piece = buffer.get(..read).unwrap_or_default();
        let wrote = chain.write(io.memory(), offset, piece)?;
        written += wrote as u32;
        offset += read as u64;
        if wrote < buffer.len() {
            break;
        }
    }
    io.push(queue, chain.ticket(), written)
}

impl VirtioDevice for Loopback {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        self.shape.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        self.shape.queues.clone()
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let Some(field) = self.config.get_mut(offset..offset + data.len()) {
            field.copy_from_slice(data);
        }
    }

    fn activate(&mut self, features: u64) {
        self.shared.lock().activated.push(features);
    }

    fn reset(&mut self) {
        self.config.clone_from(&self.shape.config);
        self.shared.lock().resets += 1;
    }

    fn recall(&mut self, io: &mut Io<'_>) {
        let mut state = self.shared.lock();
        if state.give_up {
            for (queue, chain) in state.held.drain(..).rev() {
                io.recall(queue, chain);
            }
        }
    }

    fn accepts_config(&self, config: &[u8], _features: u64) -> bool {
        config.len() == self.config.len()
    }

    fn restore_config(&mut self, config: &[u8]) {
        self.config = config.to_vec();
    }

    fn save_state(&self) -> Result<DeviceState, Unsavable> {
        match &self.shared.lock().unsavable {
            Some(why) => Err(Unsavable(why.clone())),
            None => Ok(DeviceState::None),
        }
    }

    fn check_state(&self, state: &DeviceState) -> Result<(), &'static str> {
        state.must_be_none()
    }

    fn restore_state(&mut self, _state: &DeviceState) {}

    fn process(&mut self, queue: u16, io: &mut Io<'_>) -> Result<Progress, RingError> {
        while let Some(chain) = io.pop(queue)? {
            let mut state = self.shared.lock();
            if state.hold {
                state.held.push_back((queue, chain));
            } else {
                drop(state);
                echo(io, queue, &chain)?;
            }
        }
        Ok(Progress::Exhausted)
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source {
            fd: self.shared.event.as_raw_fd(),
            token: 0,
        }]
    }

    fn on_event(&mut self, _token: u16, io: &mut Io<'_>) -> Result<(), RingError> {
        let _ = self.shared.event.read();
        let mut state = self.shared.lock();
        let count = std::mem::take(&mut state.release).min(state.held.len());
        let mut released: Vec<_> = state.held.drain(..count).collect();
        for _ in 0..std::mem::take(&mut state.release_newest) {
            released.extend(state.held.pop_back());
        }
        if let Some(config) = state.new_config.take()
            && config.len() == self.config.len()
        {
            self.config = config;
            io.config_changed();
        }
        drop(state);
        for (queue, chain) in released {
            echo(io, queue, &chain)?;
        }
        Ok(())
    }
}
