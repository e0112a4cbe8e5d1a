//! The I/O thread: one event loop that turns kicks and backend events into work.

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, RemoteEndpoint, SubscriberOps,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::VirtioFunction;

/// Stack of the I/O thread. Devices work on small buffers; guest memory is never copied to the stack.
const STACK_BYTES: usize = 256 * 1024;

/// Anything the I/O thread can watch.
pub type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// Why the I/O thread could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum IoThreadError {
    /// The kernel refused a descriptor or the thread.
    #[error("cannot start the I/O thread")]
    Start(#[source] std::io::Error),
    /// The event loop refused the operation.
    #[error("I/O thread: {0:?}")]
    Loop(event_manager::Error),
}

/// A thread that serves the kicks and backend events of any number of functions. Stops when dropped.
pub struct IoThread {
    endpoint: RemoteEndpoint<Subscriber>,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts the thread.
    pub fn spawn(name: &str) -> Result<Self, IoThreadError> {
        let stop = EventFd::new(EFD_NONBLOCK).map_err(IoThreadError::Start)?;
        let watched = stop.try_clone().map_err(IoThreadError::Start)?;
        let mut events = EventManager::<Subscriber>::new().map_err(IoThreadError::Loop)?;
        let endpoint = events.remote_endpoint();
        let stopping = Arc::new(std::sync::atomic::AtomicBool::new(false));
        events.add_subscriber(Box::new(Stop {
            event: watched,
            stopping: Arc::clone(&stopping),
        }));
        let thread = std::thread::Builder::new()
            .name(name.into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                while !stopping.load(std::sync::atomic::Ordering::Relaxed) {
                    if let Err(error) = events.run() {
                        tracing::error!(?error, "I/O thread: waiting for events failed");
                        return;
                    }
                }
            })
            .map_err(IoThreadError::Start)?;
        Ok(Self {
            endpoint,
            stop,
            thread: Some(thread),
        })
    }

    /// Serves `function` from now on. Waits until the thread has taken it over.
    pub fn attach(&self, function: &Arc<VirtioFunction>) -> Result<(), IoThreadError> {
        self.add(Box::new(FunctionEvents::new(Arc::clone(function))))
    }

    /// Watches whatever `subscriber` asks for. Waits until the thread has taken it over.
    pub fn add(&self, subscriber: Subscriber) -> Result<(), IoThreadError> {
        self.endpoint
            .call_blocking(|events| {
                events.add_subscriber(subscriber);
                Ok::<_, event_manager::Error>(())
            })
            .map_err(IoThreadError::Loop)
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        // A full counter is as good as a signal.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic on the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

struct Stop {
    event: EventFd,
    stopping: Arc<std::sync::atomic::AtomicBool>,
}

impl MutEventSubscriber for Stop {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let _ = self.event.read();
        self.stopping
            .store(true, std::sync::atomic::Ordering::Relaxed);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.event, EventSet::IN)) {
            tracing::error!(?error, "I/O thread cannot watch its stop event");
        }
    }
}

/// What one event of a function means.
#[derive(Clone, Copy)]
enum Meaning {
    Kick(u16),
    Source(u16),
}

struct FunctionEvents {
    function: Arc<VirtioFunction>,
    /// By position: the user data of each watched descriptor.
    meanings: HashMap<RawFd, Meaning>,
}

impl FunctionEvents {
    fn new(function: Arc<VirtioFunction>) -> Self {
        Self {
            function,
            meanings: HashMap::new(),
        }
    }

    fn watch(&mut self, ops: &mut EventOps<'_>, fd: RawFd, set: EventSet, meaning: Meaning) {
        match ops.add(Events::new_raw(fd, set)) {
            Ok(()) => {
                self.meanings.insert(fd, meaning);
            }
            // A regular file cannot be polled and needs no watching: it is always ready.
            Err(error) => {
                tracing::warn!(
                    function = self.function.name(),
                    ?error,
                    "cannot watch descriptor {fd}"
                );
            }
        }
    }
}

impl MutEventSubscriber for FunctionEvents {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match self.meanings.get(&events.fd()) {
            Some(Meaning::Kick(index)) => {
                if let Some(event) = self.function.kick_event(*index) {
                    let _ = event.read();
                }
                self.function.service(*index);
            }
            Some(Meaning::Source(token)) => {
                self.function.on_event(*token);
                // The other end is gone for good: nothing more will come, and the hang-up would be reported for ever.
                let hung_up = EventSet::HANG_UP | EventSet::ERROR;
                if events.event_set().intersects(hung_up)
                    && !events.event_set().contains(EventSet::IN)
                {
                    let _ = ops.remove(Events::new_raw(events.fd(), EventSet::IN));
                }
            }
            None => {}
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        use std::os::fd::AsRawFd;
        for index in 0..self.function.num_queues() {
            if let Some(fd) = self.function.kick_event(index).map(|e| e.as_raw_fd()) {
                self.watch(ops, fd, EventSet::IN, Meaning::Kick(index));
            }
        }
        for source in self.function.sources() {
            let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
            self.watch(ops, source.fd, set, Meaning::Source(source.token));
        }
    }
}
