//! Managed devices of a function that has a transport virtqueue: their doorbells are pages of its BAR, and its Bus Master Enable
//! is theirs.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use devices::gate::{Patience, Reasons};
use devices::transport_vq;
use devices::virtio::VirtioFunction;

use super::BAR;
use crate::bar::Bars;
use crate::config::ConfigSpace;
use crate::function::{BarSlot, FunctionDoorbell};
use crate::header::Command;

/// Bytes of the page of one device.
pub const PAGE: u64 = 0x1000;

/// The functions that managed devices are made of, in order of their pages.
#[derive(Default)]
pub struct Managed(Vec<Arc<VirtioFunction>>);

impl Managed {
    /// Those of `function`; none if it manages nothing.
    pub fn of(function: &VirtioFunction) -> Self {
        let functions = function.with_manager(|manager| {
            let seats = manager.seats().iter();
            seats.map(|seat| Arc::clone(seat.function())).collect()
        });
        Self(functions.unwrap_or_default())
    }

    /// Bytes of all pages.
    pub fn pages_len(&self) -> u64 {
        self.0.len() as u64 * PAGE
    }

    /// None of them reaches memory any more. What is in flight still completes.
    pub fn close(&self) {
        for function in &self.0 {
            function.close(Reasons::NO_DMA);
        }
    }

    /// They reach memory again.
    pub fn reopen(&self) {
        for function in &self.0 {
            function.reopen(Reasons::NO_DMA);
        }
    }

    /// Stops them, and waits for what is in flight until `patience` is over. False if that was not enough.
    pub fn stop(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        self.close();
        let left = || deadline.saturating_duration_since(Instant::now());
        let stopped = |f: &&Arc<VirtioFunction>| f.stop(Reasons::NO_DMA, Patience::prompt(left()));
        self.0.iter().filter(stopped).count() == self.0.len()
    }

    /// A write to byte `offset` of the pages: the index of a virtqueue, at the beginning of one.
    pub fn kick(&self, offset: u64, data: &[u8]) {
        let page = usize::try_from(offset / PAGE).ok();
        let function = page.and_then(|page| self.0.get(page));
        if let (Some(function), Ok(index), true) =
            (function, data.try_into(), offset.is_multiple_of(PAGE))
        {
            function.kick(u16::from_le_bytes(index));
        }
    }

    /// The doorbells that should exist. The pages begin at byte `start` of the BAR.
    pub fn doorbells(&self, start: u64) -> impl Iterator<Item = FunctionDoorbell> {
        let pages = (start..).step_by(PAGE as usize).zip(&self.0);
        let live = pages.filter(|(_, function)| function.is_live());
        live.flat_map(|(offset, function)| {
            (0..function.total_queues()).filter_map(move |queue| {
                let info = function.queue(queue)?;
                let event = function.kick_event(queue)?;
                (info.enabled && !info.resetting).then(|| FunctionDoorbell {
                    slot: BarSlot::Own(BAR),
                    offset,
                    datamatch: Some(queue),
                    event: Arc::clone(event),
                })
            })
        })
    }
}

/// Where the pages are in memory now.
pub struct Pages {
    /// Of the function that has the BAR.
    pub config: Arc<Mutex<ConfigSpace>>,
    /// Its BARs.
    pub bars: Bars,
    /// The first byte of the pages in it.
    pub start: u64,
}

impl transport_vq::Doorbells for Pages {
    fn page(&self, index: u16) -> Option<u64> {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        let decodes = Command::of(&config).contains(Command::MEMORY);
        let bar = self.bars.get(BAR).filter(|_| decodes)?;
        let range = self.bars.range(&config, bar)?;
        Some(range.start + self.start + u64::from(index) * PAGE)
    }
}
