//! The administration virtqueue (B-7): the guest driver's way to an owner.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Instant;

use super::envelope::{Outcome, REPLY_HEADER_LEN, REQUEST_HEADER_LEN};
use super::owner::Owner;
use super::session::Session;
use crate::gate::Party;
use crate::memory::View;
use crate::state::Kept;
use crate::virtio::{Executed, Service, VirtioDevice, VirtioFunction, feature};

/// What it is called.
pub const NAME: &str = "administration virtqueue";

/// Entries of the queue. Linux gives a result one descriptor per page and waits for ever if they do not fit, so this
/// is generous (D4); longer lists go through indirect tables.
pub const QUEUE_SIZE: u16 = 256;

/// Bytes of command-specific data that are looked at, and of a command-specific result that are made. The longest that
/// make sense are those of a device context, which has 134 KiB with 256 queues. What is longer is ignored (B-8), but for a
/// context: of that, nothing may get lost.
pub const MAX_DATA: usize = 1 << 20;

/// What serves the queue: an owner, and the session its driver has with it.
pub struct AdminService {
    owner: Arc<Owner>,
    session: Session,
}

impl AdminService {
    /// With nothing negotiated.
    pub fn new(owner: Arc<Owner>) -> Self {
        Self {
            owner,
            session: Session::new(Party::Guest),
        }
    }

    /// What its driver negotiated.
    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// The same, to put another in its place.
    pub(super) fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }
}

impl Service for AdminService {
    fn name(&self) -> &'static str {
        NAME
    }

    fn feature(&self) -> u64 {
        feature::ADMIN_VQ
    }

    fn queue_size(&self) -> u16 {
        QUEUE_SIZE
    }

    fn limits(&self) -> (usize, usize) {
        // One byte more tells a context that is too long from one that is not.
        let command = REQUEST_HEADER_LEN + MAX_DATA + 1;
        (command, REPLY_HEADER_LEN + MAX_DATA)
    }

    fn execute(&mut self, command: &[u8], room: usize) -> Executed {
        match self.owner.execute(&mut self.session, command, room) {
            Outcome::Done(reply) => Executed::Done(reply.encode()),
            Outcome::Later => Executed::Later,
        }
    }

    fn wait_until(&self) -> Option<Instant> {
        self.session.wait_until()
    }

    fn wake_fd(&self) -> RawFd {
        self.owner.wakeups().fd()
    }

    fn abandon(&mut self) {
        self.owner.abandon(&mut self.session);
    }

    /// Nothing is negotiated any more (B-4).
    fn reset(&mut self) {
        self.owner.forget(&mut self.session);
    }

    /// Sessions are the owner's state: see [`saved`](super::saved).
    fn save(&self) -> Kept {
        Kept::Nothing
    }

    fn check(&self, kept: &Kept, _driver: Option<u64>) -> Result<(), String> {
        match kept {
            Kept::Nothing => Ok(()),
            Kept::Managed(_) => Err("it has managed devices, which this function has not".into()),
        }
    }

    fn restore(&mut self, _kept: &Kept) {}
}

impl VirtioFunction {
    /// Puts `device`, which owns others as an SR-IOV physical function, behind a function. It has an administration virtqueue
    /// after those of the device, and offers VIRTIO_F_ADMIN_VQ and VIRTIO_F_SR_IOV. It has no doors: a suspended owner could
    /// not execute the commands that its driver waits for (G1-i).
    pub fn new_owner(
        name: impl Into<String>,
        device: Box<dyn VirtioDevice>,
        view: View,
        owner: Arc<Owner>,
    ) -> io::Result<Arc<Self>> {
        Self::serving(name, device, view, owner, feature::SR_IOV)
    }

    /// The same with virtqueues that may be packed, the administration virtqueue among them.
    pub fn new_packed_owner(
        name: impl Into<String>,
        device: Box<dyn VirtioDevice>,
        view: View,
        owner: Arc<Owner>,
    ) -> io::Result<Arc<Self>> {
        let features = feature::SR_IOV | feature::RING_PACKED;
        Self::serving(name, device, view, owner, features)
    }

    fn serving(
        name: impl Into<String>,
        device: Box<dyn VirtioDevice>,
        view: View,
        owner: Arc<Owner>,
        features: u64,
    ) -> io::Result<Arc<Self>> {
        let service = Box::new(AdminService::new(owner));
        Self::with_services(name, device, view, vec![service], features)
    }

    /// The owner it is, if it is one.
    pub fn owner(&self) -> Option<Arc<Owner>> {
        self.with_service(|service: &mut AdminService, _| Arc::clone(&service.owner))
    }

    /// `admin_queue_index`: the first administration virtqueue, or 0 if there is none (B-9).
    pub fn admin_queue_index(&self) -> u16 {
        match self.service_queues(feature::ADMIN_VQ) {
            none if none.is_empty() => 0,
            queues => queues.start,
        }
    }

    /// `admin_queue_num`: the number of administration virtqueues (B-9).
    pub fn admin_queue_num(&self) -> u16 {
        self.service_queues(feature::ADMIN_VQ).len() as u16
    }
}
