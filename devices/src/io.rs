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

    /// Serves `function` as soon as the thread has taken it over. Nothing that happens before is lost: kicks stay in their
    /// events, and sources are looked at when they are taken over.
    pub fn attach(&self, function: &Arc<VirtioFunction>) -> Result<(), IoThreadError> {
        self.add(Box::new(FunctionEvents::new(Arc::clone(function))))
    }

    /// Watches whatever `subscriber` asks for, as soon as the thread has taken it over. Nobody waits for that: a machine with
    /// hundreds of functions would wait for as many changes of threads.
    pub fn add(&self, subscriber: Subscriber) -> Result<(), IoThreadError> {
        self.endpoint
            .fire(|events| {
                events.add_subscriber(subscriber);
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
    /// What an event of each watched descriptor means.
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
        for index in 0..self.function.total_queues() {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{Block, BlockConfig};
    use crate::net::{MacAddress, Net, PortConfig, Switch};
    use crate::rng::Rng;
    use crate::testing::{Buf, Driver, PATIENCE};
    use std::time::Instant;

    /// Waits for the next used chain without taking turns: that is the thread's work here.
    fn served(driver: &mut Driver, queue: u16) -> (u16, u32) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(used) = driver.used(queue) {
                return used;
            }
            assert!(Instant::now() < deadline, "queue {queue} is not served");
            std::thread::yield_now();
        }
    }

    #[test]
    fn kicks_are_served() {
        let thread = IoThread::spawn("io").unwrap();
        let mut driver = Driver::live(Rng::new(), 0);
        thread.attach(&driver.function).unwrap();
        for _ in 0..100 {
            driver.add(0, &[Buf::In(8)]);
            driver.function.kick(0);
            assert_eq!(served(&mut driver, 0).1, 8);
        }
    }

    #[test]
    fn completions_of_a_disk_are_served_again_and_again() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let thread = IoThread::spawn("io").unwrap();
        let block = Block::open(&BlockConfig::new(file.path())).unwrap();
        let mut driver = Driver::live(block, u64::MAX);
        thread.attach(&driver.function).unwrap();
        for round in 0..500 {
            for _ in 0..round % 5 + 1 {
                driver.add(0, &[Buf::Out(vec![0; 16]), Buf::In(512), Buf::In(1)]);
            }
            driver.function.kick(0);
            for _ in 0..round % 5 + 1 {
                assert_eq!(served(&mut driver, 0).1, 513);
            }
        }
    }

    #[test]
    fn frames_cross_between_functions_of_two_threads() {
        let switch = Switch::new();
        let threads = ["a", "b"].map(|name| IoThread::spawn(name).unwrap());
        let mut drivers = [1u8, 2].map(|n| {
            let mac = MacAddress::new([2, 0, 0, 0, 0, n]);
            let port = PortConfig {
                name: String::new(),
                mac,
                check_source: true,
            };
            Driver::live(Net::new(mac, switch.port(port).unwrap()), 0)
        });
        for (thread, driver) in threads.iter().zip(&drivers) {
            thread.attach(&driver.function).unwrap();
        }
        let [a, b] = &mut drivers;
        let mut frame = vec![0; 12];
        frame.extend([2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
        for _ in 0..500 {
            for _ in 0..3 {
                b.add(0, &[Buf::In(100)]);
                a.add(1, &[Buf::Out(frame.clone())]);
            }
            b.function.kick(0);
            a.function.kick(1);
            for _ in 0..3 {
                served(a, 1);
                assert_eq!(served(b, 0).1, 26);
            }
        }
    }
}
