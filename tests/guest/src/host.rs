//! Other hosts on the network: a thread with a network namespace of its own, and one interface in it.
//!
//! A kernel sends packets between its own addresses over `lo`, whatever interface has them. Between namespaces they
//! take the way they would between machines.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread::JoinHandle;

use crate::netlink::Netlink;
use crate::{Context, Failure, Result, sys};

/// Length of the prefix of every network.
pub const PREFIX: u8 = 24;

/// The namespace of the first process, which every interface starts in.
const FIRST_NAMESPACE: &str = "/proc/1/ns/net";

type Job = Box<dyn FnOnce() + Send>;

/// One of them.
pub struct Host {
    pub interface: String,
    pub address: Ipv4Addr,
    jobs: mpsc::Sender<Job>,
    thread: JoinHandle<()>,
}

impl Host {
    /// Moves `interface` to a new namespace, gives it an address and brings it up.
    pub fn start(interface: &str, address: Ipv4Addr) -> Result<Self> {
        let (jobs, receiver) = mpsc::channel::<Job>();
        let thread = std::thread::spawn(move || {
            for job in receiver {
                job();
            }
        });
        let host = Self {
            interface: interface.to_owned(),
            address,
            jobs,
            thread,
        };
        let namespace = host.run(new_namespace)?;
        Netlink::open()?.move_to(interface, namespace)?;
        let interface = interface.to_owned();
        host.run(move || {
            let netlink = Netlink::open()?;
            netlink.address(&interface, address, PREFIX)?;
            netlink.up(&interface)
        })?;
        Ok(host)
    }

    /// Has the host do something; it does one thing after another. Sockets that it opens stay its own wherever they
    /// are used.
    pub fn begin<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Pending<T> {
        let (sender, receiver) = mpsc::channel();
        let job = Box::new(move || {
            // Nobody listens if the scenario failed meanwhile.
            let _ = sender.send(job());
        });
        // If the thread is gone, so is the sender in the job, and the one who waits learns of it.
        let _ = self.jobs.send(job);
        Pending(receiver)
    }

    /// Has the host do something, and waits.
    pub fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.begin(job).wait()
    }

    /// Gives the interface back; its name may be another by then.
    pub fn end(self) -> Result<()> {
        let interface = self.interface.clone();
        self.run(move || {
            let first = File::open(FIRST_NAMESPACE).context(FIRST_NAMESPACE)?;
            Netlink::open()?.move_back(&interface, first)
        })?;
        self.forget()
    }

    /// Ends the host whose interface is gone.
    pub fn forget(self) -> Result<()> {
        drop(self.jobs);
        self.thread
            .join()
            .map_err(|_| Failure("a host panicked".into()))
    }
}

/// What a host is still doing.
pub struct Pending<T>(mpsc::Receiver<Result<T>>);

impl<T> Pending<T> {
    /// Waits for the result.
    pub fn wait(self) -> Result<T> {
        self.0
            .recv()
            .map_err(|_| Failure("a host is gone".into()))?
    }
}

fn new_namespace() -> Result<OwnedFd> {
    sys::new_network().context("unshare")?;
    let namespace = File::open("/proc/thread-self/ns/net").context("/proc/thread-self/ns/net")?;
    Ok(namespace.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_thread_did_not_do_is_an_error() {
        let (sender, receiver) = mpsc::channel::<Result<()>>();
        drop(sender);
        let error = Pending(receiver).wait().unwrap_err();
        assert_eq!(error.to_string(), "a host is gone");
    }
}
